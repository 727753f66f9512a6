//! Sets through a real `qemu-ga`, which freezes real file systems: it runs on this machine in a mount name space and a root of its own,
//! where two ext4 images on loop devices are all that it can see. The other peers are fakes.
//!
//! Needs root, loop devices and `qemu-ga` (`VMSHADOW_QEMU_GA` names one that is not installed).
#![allow(clippy::unwrap_used, reason = "tests")]

mod fakes;

use fakes::{Fault, World, until};
use qmp_bridge::guest::AgentAddress;
use qmp_bridge::snapshot::document::{CreateRequest, Outcome, ReasonCode};
use qmp_bridge::snapshot::level::Level;
use qmp_bridge::snapshot::witness::Word;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

/// Makes the root and becomes the agent. `$1`: the root, an empty directory. `$2`: the agent.
const JAIL: &str = r#"
set -e
mount -t tmpfs tmpfs "$1"
cd "$1"
mkdir -p bin dev etc lib lib64 mnt/a mnt/b proc run sys var/run
cp -L "$2" bin/qemu-ga
for library in $(ldd bin/qemu-ga | grep -o '/[^ ]*'); do
    mkdir -p "./${library%/*}"
    cp -L "$library" "./$library"
done
cp -L /etc/os-release etc/
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mknod dev/null c 1 3
for name in a b; do
    truncate -s 32M "$1.$name"
    mkfs.ext4 -q "$1.$name"
    mount -o loop "$1.$name" "mnt/$name"
done
exec chroot . /bin/qemu-ga -m unix-listen -p /run/qga.sock -t /run -f /run/qga.pid
"#;

struct Jail {
    agent: Child,
    root: PathBuf,
    _directory: TempDir,
}

impl Jail {
    /// `None`, and a word of why, where it cannot be had.
    fn start() -> Option<Self> {
        let named = std::env::var_os("VMSHADOW_QEMU_GA").map(PathBuf::from);
        let usual = ["/usr/sbin/qemu-ga", "/usr/bin/qemu-ga"].map(PathBuf::from);
        let Some(program) = named.into_iter().chain(usual).find(|path| path.exists()) else {
            assert!(std::env::var("CI").is_err(), "no qemu-ga (run `make deps`)");
            eprintln!("SKIPPED: qemu-ga is not installed");
            return None;
        };
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/loop-control").exists() {
            eprintln!("SKIPPED: needs root and loop devices");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let agent = Command::new("unshare")
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                JAIL,
                "sh",
            ])
            .args([&root, &program])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut jail = Self {
            agent,
            root,
            _directory: directory,
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while UnixStream::connect(jail.socket()).is_err() {
            if let Some(status) = jail.agent.try_wait().unwrap() {
                eprintln!("skipped: no root for qemu-ga: {status}");
                return None;
            }
            assert!(
                std::time::Instant::now() < deadline,
                "qemu-ga does not listen"
            );
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Some(jail)
    }

    /// The socket, seen from outside.
    fn socket(&self) -> PathBuf {
        format!("/proc/{}/root/run/qga.sock", self.agent.id()).into()
    }

    /// A command that acts on the file system of that name.
    fn fsfreeze(&self, option: &'static str, name: &'static str) -> impl Fn() -> bool + use<> {
        let process = self.agent.id().to_string();
        let point = self.root.join("mnt").join(name);
        move || {
            Command::new("nsenter")
                .args(["-t", &process, "-m", "fsfreeze", option])
                .arg(&point)
                .stderr(Stdio::null())
                .status()
                .unwrap()
                .success()
        }
    }

    /// Nobody may be left with a frozen file system, least of all by a test that failed. Freezing does not nest.
    fn is_frozen(&self, name: &'static str) -> bool {
        if !self.fsfreeze("-f", name)() {
            return true;
        }
        assert!(self.fsfreeze("-u", name)());
        false
    }

    fn world(&self) -> World {
        let mut world = World::new();
        world.address = AgentAddress::Qga(self.socket());
        world
    }
}

impl Drop for Jail {
    fn drop(&mut self) {
        for name in ["a", "b"] {
            self.fsfreeze("-u", name)();
        }
        self.agent.kill().ok();
        self.agent.wait().ok();
    }
}

fn filesystem() -> CreateRequest {
    CreateRequest {
        level: Level::Filesystem,
        ..CreateRequest::default()
    }
}

#[tokio::test]
async fn file_systems_are_frozen_from_the_freeze_to_the_thaw_and_the_set_is_kept() {
    let Some(jail) = Jail::start() else { return };
    let world = jail.world();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (again_a, again_b, note) = (
        jail.fsfreeze("-f", "a"),
        jail.fsfreeze("-f", "b"),
        Arc::clone(&seen),
    );
    // Frozen once more would succeed if they were not frozen.
    let look = move || note.lock().unwrap().extend([again_a(), again_b()]);
    world.storages[0]
        .peer
        .on("snapshot-set-commit", Fault::Meanwhile(Arc::new(look)));
    let document = world.create(filesystem()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert_eq!(document.level_reached, Some(Level::Filesystem));
    assert_eq!(*seen.lock().unwrap(), [false, false]);
    let said = document.qemu_guest_agent.as_ref().unwrap();
    assert_eq!((said.frozen, said.thawed), (Some(2), Some(2)));
    assert!(!jail.is_frozen("a") && !jail.is_frozen("b"));
    // Again, without one of them.
    let request = CreateRequest {
        exclude_filesystems: vec!["/mnt/b".to_owned()],
        ..filesystem()
    };
    world.storages[0].peer.heal();
    let document = world.create(request).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert_eq!(document.qemu_guest_agent.unwrap().frozen, Some(1));
}

#[tokio::test]
async fn a_file_system_that_somebody_else_thaws_refuses_the_set() {
    let Some(jail) = Jail::start() else { return };
    let world = jail.world();
    let thaw = jail.fsfreeze("-u", "b");
    let thaw = Fault::Meanwhile(Arc::new(move || assert!(thaw())));
    world.storages[0].peer.on("snapshot-set-commit", thaw);
    let document = world.create(filesystem()).await;
    assert_eq!(document.outcome, Outcome::Refused, "{document:#?}");
    assert_eq!(document.reason.unwrap().code, ReasonCode::HoldBroken);
    assert_eq!(document.witnesses.filesystems.value, Word::Disagrees);
    world.storages[0].peer.heal();
    // And one that somebody else has frozen: it is skipped and not counted.
    assert!(jail.fsfreeze("-f", "b")());
    let document = world.create(filesystem()).await;
    assert_eq!(document.outcome, Outcome::Refused, "{document:#?}");
    assert_eq!(document.witnesses.filesystems.value, Word::Disagrees);
}

#[tokio::test]
async fn what_a_dead_bridge_left_frozen_is_thawed_by_the_next() {
    let Some(jail) = Jail::start() else { return };
    let world = jail.world();
    let mut command = world.vmshadow_create(&["--level", "filesystem"]);
    command.env("VMSHADOW_STOP_AT", "marked");
    let mut bridge = command.spawn().unwrap();
    // Not by looking at the file systems: that freezes them for a moment.
    until("frozen", || {
        world
            .log()
            .contains(&"storage0 snapshot-set-mark".to_owned())
    })
    .await;
    bridge.kill().await.unwrap();
    assert!(jail.is_frozen("a"), "nothing in the guest thaws it");
    let ended = world.sets().recover().await.unwrap();
    assert_eq!(
        ended.first().unwrap().outcome,
        Outcome::Undone,
        "{ended:#?}"
    );
    assert!(!jail.is_frozen("a") && !jail.is_frozen("b"));
}
