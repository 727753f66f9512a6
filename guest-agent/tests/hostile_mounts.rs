//! Mounts that would hang, hide or fill up an agent: dead FUSE, other name spaces, overlay, full disks, a thaw that hangs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use rig::{Probe, Rig, can_run, freeze_arguments, is_frozen, run, wait_until};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A process in a shell, killed at the end; what it mounted is unmounted.
struct Keeper {
    child: Child,
    unmount: Option<PathBuf>,
}

impl Keeper {
    /// Runs the script until it says `ready`; it should go on then.
    fn start(prefix: &[&str], script: &str, unmount: Option<&Path>) -> Self {
        let mut words = prefix.to_vec();
        words.extend(["bash", "-e", "-c", script]);
        let mut child = Command::new(words[0])
            .args(&words[1..])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.as_mut().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "{script}");
        Self {
            child,
            unmount: unmount.map(Path::to_owned),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.child.kill().unwrap_or(());
        self.child.wait().map(drop).unwrap_or(());
        if let Some(mountpoint) = &self.unmount {
            let mut command = Command::new("umount");
            command
                .arg("-l")
                .arg(mountpoint)
                .status()
                .map(drop)
                .unwrap_or(());
        }
    }
}

/// Mounts FUSE whose process never answers: whoever opens it hangs until this is dropped.
fn dead_fuse(mountpoint: &Path, fstype: &str, source: &str) -> Keeper {
    fs::create_dir_all(mountpoint).unwrap();
    let script = format!(
        "exec 7<>/dev/fuse; mount -i -t {fstype} -o fd=7,rootmode=40000,user_id=0,group_id=0 {source} {}; \
         echo ready; exec sleep 600",
        mountpoint.display()
    );
    Keeper::start(&[], &script, Some(mountpoint))
}

fn has_fuse() -> bool {
    let there = Path::new("/dev/fuse").exists();
    if !there {
        eprintln!("skipped: no /dev/fuse");
    }
    there
}

/// True while somebody waits for the dead file system.
fn hangs(mountpoint: &Path) -> bool {
    let mut stat = Command::new("stat")
        .arg("-f")
        .arg(mountpoint)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let state = format!("/proc/{}/stat", stat.id());
    wait_until("stat sleeps or ends", || {
        stat.try_wait().unwrap().is_some()
            || fs::read_to_string(&state).is_ok_and(|s| s.contains(") S ") || s.contains(") D "))
    });
    let hangs = stat.try_wait().unwrap().is_none();
    stat.kill().unwrap_or(());
    stat.wait().map(drop).unwrap_or(());
    hangs
}

#[test]
fn a_dead_fuse_mount_is_never_opened() {
    if !can_run(&[]) || !has_fuse() {
        return;
    }
    let rig = Rig::with("ext4");
    let dead = rig.mountpoint("dead");
    let _fuse = dead_fuse(&dead, "fuse", "nobody");
    assert!(hangs(&dead), "this mount is not dead");
    let mut bridge = rig.bridge();
    let identified = bridge.ok("identify", json!({}));
    assert_eq!(identified["filesystems"].as_array().unwrap().len(), 1);
    bridge.prepare();
    let frozen = bridge.freeze();
    assert_eq!(bridge.thaw(&frozen)["held"], true);
}

#[test]
fn a_dead_fuse_mount_on_a_disk_is_told_as_not_held_and_never_opened() {
    if !can_run(&[]) || !has_fuse() {
        return;
    }
    let rig = Rig::with("ext4");
    let image = rig.path("fuse.img");
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let output = Command::new("losetup")
        .args(["-f", "--show"])
        .arg(&image)
        .output()
        .unwrap();
    let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    let dead = rig.mountpoint("dead");
    let fuse = dead_fuse(&dead, "fuseblk", &device);
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    let of_fuse: Vec<&Value> = frozen["filesystems"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|fs| fs["fstype"] == "fuseblk")
        .collect();
    let thawed = bridge.thaw(&frozen);
    drop(fuse);
    run("losetup", &["-d", &device]);
    assert_eq!(of_fuse.len(), 1, "{frozen:#}");
    assert_eq!(of_fuse[0]["result"], "failed");
    assert_eq!(of_fuse[0]["errno"], 95);
    assert_eq!(thawed["held"], true);
}

#[test]
fn a_file_system_of_another_name_space_is_told_as_not_held() {
    if !can_run(&["unshare", "mkfs.ext4"]) {
        return;
    }
    let mut rig = Rig::new();
    rig.mount("a", "ext4");
    let image = rig.path("hidden.img");
    fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    run("mkfs.ext4", &["-q", "-F", image.to_str().unwrap()]);
    let place = rig.mountpoint("hidden");
    fs::create_dir_all(&place).unwrap();
    let script = format!(
        "mount -o loop {} {}; echo ready; exec sleep 600",
        image.display(),
        place.display()
    );
    let _container = Keeper::start(
        &["unshare", "-m", "--propagation", "private"],
        &script,
        None,
    );
    rig.start();
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    let other = &frozen["filesystems"][1];
    assert_eq!(other["result"], "failed", "{frozen:#}");
    assert!(other["mountpoint"].as_str().unwrap().starts_with("/proc/"));
    assert!(other["message"].as_str().unwrap().contains("name space"));
    assert_eq!(bridge.thaw(&frozen)["held"], true);
}

#[test]
fn an_overlay_is_held_by_the_file_system_of_its_upper_layer() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::new();
    let a = rig.mount("a", "ext4");
    for name in ["lower", "upper", "work"] {
        fs::create_dir(a.join(name)).unwrap();
    }
    let top = a.display();
    let layers = format!("lowerdir={top}/lower,upperdir={top}/upper,workdir={top}/work");
    let over = rig.mount_with("over", &["-t", "overlay", "-o", &layers, "overlay"]);
    rig.start();
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    assert_eq!(frozen["filesystems"].as_array().unwrap().len(), 1);
    let mut probe = Probe::start(&over);
    probe.wait_blocked();
    assert_eq!(bridge.thaw(&frozen)["held"], true);
    probe.wait_done();
}

#[test]
fn a_log_on_a_frozen_file_system_keeps_nobody_waiting() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::new();
    let log = rig.mount("a", "ext4").join("agent.log");
    rig.start_by(&[], &log);
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.ok("freeze", freeze_arguments(5_000));
    // The helper's death is something that the agent logs; it thaws, and a write to its log before that would wait for ever.
    rig::kill_9(rig.helper_pid());
    let mut probe = Probe::start(&rig.mountpoint("a"));
    probe.wait_done();
    let generation = frozen["generation"].clone();
    let error = bridge.error("thaw", json!({"set": "s", "generation": generation}));
    assert_eq!(error["code"], "HOLD_BROKEN");
    // What could not be written then is written now.
    wait_until("the log is there", || {
        fs::read_to_string(&log).is_ok_and(|text| text.contains("without the helper"))
    });
}

#[test]
fn a_full_file_system_is_held_and_without_room_for_the_ledger_nothing_is_frozen() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let fill = |path: PathBuf| {
        let mut file = fs::File::create(path).unwrap();
        // Until nothing fits any more.
        while file.write_all(&[1; 4096]).is_ok() {}
        rustix::fs::fsync(&file).unwrap_or(());
    };
    fill(rig.mountpoint("a").join("full"));
    let mut bridge = rig.bridge();
    bridge.prepare();
    let state = rig.path("run");
    let ledgers = || {
        let entries = fs::read_dir(&state).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("hold.")).count()
    };
    let frozen = bridge.freeze();
    assert_eq!(ledgers(), 1);
    assert_eq!(bridge.thaw(&frozen)["held"], true);
    // Who hears of the thaw finds nothing of the set left; it would also make room below.
    assert_eq!(ledgers(), 0);
    bridge.ok("hello", json!({"versions": [1]}));

    run(
        "mount",
        &["-o", "remount,size=256k", state.to_str().unwrap()],
    );
    fill(state.join("full"));
    bridge.prepare();
    let error = bridge.error("freeze", freeze_arguments(5_000));
    assert!(
        error["message"].as_str().unwrap().contains("ledger"),
        "{error:#}"
    );
    assert!(!is_frozen(&rig.mountpoint("a")));
    assert_eq!(ledgers(), 0);
    fs::remove_file(state.join("full")).unwrap();
    bridge.prepare();
    let frozen = bridge.freeze();
    assert_eq!(bridge.thaw(&frozen)["held"], true);
}

#[test]
fn an_agent_that_may_not_freeze_says_so_and_for_which_file_system() {
    if !can_run(&["setpriv"]) {
        return;
    }
    let mut rig = Rig::new();
    let a = rig.mount("a", "ext4");
    let without = [
        "setpriv",
        "--bounding-set",
        "-sys_admin",
        "--inh-caps",
        "-sys_admin",
    ];
    let log = rig.path("run/log");
    rig.start_by(&without, &log);
    let mut bridge = rig.bridge();
    bridge.prepare();
    let error = bridge.error("freeze", freeze_arguments(5_000));
    assert_eq!(error["code"], "FREEZE_FAILED", "{error:#}");
    let of_a = &error["filesystems"][0];
    assert_eq!(
        (&of_a["errno"], &of_a["result"]),
        (&json!(1), &json!("failed"))
    );
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains(a.to_str().unwrap())
    );
}

#[test]
fn a_thaw_that_hangs_keeps_no_other_file_system_frozen() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::new();
    // Beside `mnt`, so the agent does not know it.
    let outer_image = rig.path("outer.img");
    let outer = rig.mount_image("../outer", "ext4", &outer_image);
    let inner = rig.mount_image("inner", "ext4", &outer.join("inner.img"));
    let b = rig.mount("b", "ext4");
    rig.start();
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    // The thaw of the inner one writes to its disk, which somebody has just frozen.
    run("fsfreeze", &["-f", outer.to_str().unwrap()]);
    let thawed = bridge.thaw(&frozen);
    let mut probe = Probe::start(&b);
    probe.wait_done();
    run("fsfreeze", &["-u", outer.to_str().unwrap()]);
    let of = |place: &Path| {
        let all = thawed["filesystems"].as_array().unwrap();
        let name = place.to_str().unwrap();
        all.iter()
            .find(|fs| fs["mountpoint"] == name)
            .unwrap()
            .clone()
    };
    assert_eq!(of(&b)["result"], "thawed");
    assert_eq!(of(&inner)["errno"], 110, "{thawed:#}");
    assert_eq!(thawed["held"], false);
    let mut probe = Probe::start(&inner);
    probe.wait_done();
    wait_until("it is not frozen any more", || !is_frozen(&inner));
}

/// Kills agent and helper while all is frozen, so that nobody thaws.
fn kill_both_while_frozen(rig: &mut Rig) {
    let mut bridge = rig.bridge();
    bridge.prepare();
    bridge.freeze();
    let helper = rig.helper_pid().to_string();
    run("kill", &["-STOP", &helper]);
    rig.kill_agent();
    run("kill", &["-9", &helper]);
}

#[test]
fn what_a_killed_agent_left_is_thawed_though_its_mount_point_is_covered() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::with("ext4");
    kill_both_while_frozen(&mut rig);
    let a = rig.mountpoint("a");
    let other = rig.mount_with("other", &["--bind", a.to_str().unwrap()]);
    rig.mount_with("a", &["-t", "tmpfs", "tmpfs"]);
    assert!(is_frozen(&other), "somebody thawed");
    rig.start();
    Probe::start(&other).wait_done();
}

#[test]
fn what_a_killed_agent_left_is_thawed_though_only_another_name_space_sees_it() {
    if !can_run(&["unshare"]) {
        return;
    }
    let mut rig = Rig::with("ext4");
    let container = Keeper::start(
        &["unshare", "-m", "--propagation", "private"],
        "echo ready; exec sleep 600",
        None,
    );
    kill_both_while_frozen(&mut rig);
    let a = rig.mountpoint("a");
    // The helper may still be about to end.
    run("umount", &["-l", a.to_str().unwrap()]);
    let inside = PathBuf::from(format!("/proc/{}/root", container.child.id()));
    let inside = inside.join(a.strip_prefix("/").unwrap());
    assert!(is_frozen(&inside), "somebody thawed");
    rig.start();
    let is_thawed = !is_frozen(&inside);
    // Before the name space goes, with which nobody could reach it any more.
    run(
        "sh",
        &[
            "-c",
            "fsfreeze -u \"$0\" 2>&- || true",
            inside.to_str().unwrap(),
        ],
    );
    assert!(is_thawed);
}

#[test]
fn a_file_system_on_a_covered_mount_is_told_as_not_held_and_refuses_no_set() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::new();
    rig.mount("srv", "ext4");
    let image = rig.path("data.img");
    rig.mount_image("srv/data", "ext4", &image);
    let seen = rig.mount("seen", "ext4");
    // Now nobody can open the first two.
    let srv = rig.mountpoint("srv");
    run("mount", &["-t", "tmpfs", "tmpfs", srv.to_str().unwrap()]);
    rig.start();
    let mut bridge = rig.bridge();
    let prepared = bridge.ask("prepare", json!({"set": "s", "limit_ms": 20_000}));
    let frozen = prepared.get("return").is_some().then(|| bridge.freeze());
    let held = frozen.as_ref().map(|frozen| {
        let is_held = is_frozen(&seen);
        bridge.thaw(frozen);
        is_held
    });
    run("umount", &[srv.to_str().unwrap()]);
    assert_eq!(held, Some(true), "{prepared:#}");
    let frozen = frozen.unwrap();
    let hidden = frozen["filesystems"].as_array().unwrap().iter();
    let hidden: Vec<&Value> = hidden.filter(|fs| fs["result"] == "failed").collect();
    assert_eq!(hidden.len(), 2, "{frozen:#}");
    for filesystem in hidden {
        let why = filesystem["message"].as_str().unwrap();
        assert!(why.contains("hidden"), "{why}");
    }
}
