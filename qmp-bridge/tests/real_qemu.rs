//! The bridge's view of a VM against a real QEMU (no guest runs in it: the firmware is enough).
//!
//! Needs `qemu-system-x86_64` and `qemu-storage-daemon`, which stands in for vhost-blk's end of the vhost-user socket.
#![allow(clippy::unwrap_used, reason = "tests")]

use qmp_bridge::vm::{Backing, Vm, VmError, disturbance};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn has(program: &str) -> bool {
    let found = Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok();
    if !found {
        eprintln!("skipped: {program} is not installed");
    }
    found
}

fn start(program: &str, arguments: &[&str], directory: &Path, wait_for: &str) -> Process {
    let child = Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let process = Process(child);
    let deadline = Instant::now() + Duration::from_secs(20);
    while std::os::unix::net::UnixStream::connect(directory.join(wait_for)).is_err() {
        assert!(
            Instant::now() < deadline,
            "{program} does not listen on {wait_for}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    process
}

/// A QEMU with two vhost-user disks (one socket path is relative), a writable and a read-only disk of its own, an empty
/// CD drive, and two monitors.
fn qemu(directory: &Path) -> Vec<Process> {
    for name in ["a.raw", "b.raw", "c.raw", "d.raw"] {
        std::fs::File::create(directory.join(name))
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
    }
    let absolute = directory.join("a.sock").display().to_string();
    let export = |name: &str| {
        format!(
            "type=vhost-user-blk,id=e{name},node-name={name},addr.type=unix,addr.path={name}.sock,writable=on"
        )
    };
    let storage = start(
        "qemu-storage-daemon",
        &[
            "--blockdev",
            "driver=file,node-name=a,filename=a.raw",
            "--export",
            &export("a"),
            "--blockdev",
            "driver=file,node-name=b,filename=b.raw",
            "--export",
            &export("b"),
            // Its own monitor tells that it is ready: a look at the vhost-user sockets would use them up.
            "--chardev",
            "socket,id=m,path=storage.qmp,server=on,wait=off",
            "--monitor",
            "chardev=m",
        ],
        directory,
        "storage.qmp",
    );
    let first = format!("socket,id=chr-a,path={absolute},reconnect=1");
    let qemu = start(
        "qemu-system-x86_64",
        &[
            "-machine",
            "q35,accel=tcg",
            "-m",
            "64",
            "-nodefaults",
            "-display",
            "none",
            "-object",
            "memory-backend-memfd,id=mem,size=64M,share=on",
            "-numa",
            "node,memdev=mem",
            "-chardev",
            &first,
            "-device",
            "vhost-user-blk-pci,chardev=chr-a,num-queues=1,id=named",
            "-chardev",
            "socket,id=chr-b,path=b.sock,reconnect=1",
            "-device",
            "vhost-user-blk-pci,chardev=chr-b,num-queues=1",
            "-blockdev",
            "driver=raw,node-name=own,file.driver=file,file.filename=c.raw",
            "-device",
            "virtio-blk-pci,drive=own,id=own-disk",
            "-drive",
            "if=none,id=ro,file=d.raw,format=raw,readonly=on",
            "-device",
            "virtio-blk-pci,drive=ro",
            "-device",
            "ide-cd,id=tray",
            "-qmp",
            "unix:qmp,server=on,wait=off",
            "-qmp",
            "unix:qmp2,server=on,wait=off",
        ],
        directory,
        "qmp2",
    );
    vec![qemu, storage]
}

async fn vm(directory: &TempDir) -> Vm {
    Vm::connect(&directory.path().join("qmp"), Duration::from_secs(10))
        .await
        .unwrap()
}

#[tokio::test]
async fn disks_are_found_by_their_sockets_while_they_are_connected() {
    if !has("qemu-system-x86_64") || !has("qemu-storage-daemon") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let _running = qemu(directory.path());
    let vm = vm(&directory).await;
    let disks = vm.disks().await.unwrap();
    let socket = |name: &str| Backing::VhostUser {
        socket: directory.path().canonicalize().unwrap().join(name),
    };
    assert_eq!(disks.len(), 4, "{disks:#?}");
    assert_eq!(disks[0].device, "named");
    assert_eq!(
        disks[0].backing,
        Backing::VhostUser {
            socket: directory.path().join("a.sock")
        }
    );
    assert!(
        disks[1]
            .device
            .starts_with("/machine/peripheral-anon/device")
    );
    assert_eq!(
        disks[1].backing,
        socket("b.sock"),
        "relative to QEMU's directory"
    );
    let own = disks.iter().find(|disk| disk.device == "own-disk").unwrap();
    assert!(own.aliases.contains(&"own".to_owned()), "{own:?}");
    assert!(!own.backing.is_read_only());
    let read_only = disks.iter().filter(|disk| disk.backing.is_read_only());
    assert_eq!(read_only.count(), 1);
}

#[tokio::test]
async fn a_stop_is_seen_as_a_state_and_as_an_event() {
    if !has("qemu-system-x86_64") || !has("qemu-storage-daemon") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let _running = qemu(directory.path());
    let vm = vm(&directory).await;
    vm.running().await.unwrap();
    vm.not_migrating().await.unwrap();
    let mut events = vm.subscribe();
    let monitor = directory.path().join("qmp2");
    let limit = Duration::from_secs(10);
    let other = qmp_bridge::qmp::QmpClient::connect(&monitor, limit)
        .await
        .unwrap();
    other.qemu(&qapi::qmp::stop {}, limit).await.unwrap();
    assert!(matches!(
        vm.running().await,
        Err(VmError::NotRunning { .. })
    ));
    // The answer stands behind the event: it is here already.
    let seen = std::iter::from_fn(|| events.try_recv().ok());
    let seen: Vec<String> = seen.filter_map(|event| disturbance(&event)).collect();
    assert!(seen.iter().any(|what| what.contains("STOP")), "{seen:?}");
    other.qemu(&qapi::qmp::quit {}, limit).await.ok();
    let lost = tokio::time::timeout(limit, async { while events.recv().await.is_ok() {} });
    lost.await.unwrap();
    assert!(matches!(
        vm.running().await,
        Err(VmError::Unreachable { .. })
    ));
}
