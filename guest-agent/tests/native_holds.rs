//! The native protocol on real file systems: what is held, for how long, and who thaws when somebody dies.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use rig::{Bridge, Probe, Rig, can_run, freeze_arguments, is_frozen, kill_9, run, wait_until};
use serde_json::json;
use std::process::Command;
use std::time::{Duration, Instant};

#[test]
fn a_set_holds_every_kind_of_file_system_and_says_so() {
    if !can_run(&["mkfs.xfs", "mkfs.btrfs"]) {
        return;
    }
    for fstype in ["ext4", "xfs", "btrfs"] {
        let rig = Rig::with(fstype);
        let mut bridge = rig.bridge();
        let identified = bridge.ok("identify", json!({}));
        assert_eq!(identified["filesystems"][0]["fstype"], fstype);
        assert_eq!(identified["filesystems"][0]["freezable"], true);
        bridge.prepare();
        let frozen = bridge.freeze();
        assert_eq!(frozen["filesystems"][0]["result"], "frozen", "{fstype}");
        let mut probe = Probe::start(&rig.mountpoint("a"));
        probe.wait_blocked();
        let status = bridge.status();
        assert_eq!(status["frozen"], true);
        assert!(status["hold_left_ms"].as_u64().unwrap() > 0);
        let thawed = bridge.thaw(&frozen);
        assert_eq!(thawed["held"], true, "{thawed:#}");
        assert_eq!(thawed["filesystems"][0]["result"], "thawed");
        probe.wait_done();
        bridge.ok("post_snapshot", json!({"set": "s", "kept": true}));
        assert_eq!(bridge.status()["frozen"], false);
    }
}

#[test]
fn the_dead_man_thaws_at_the_limit_and_a_late_thaw_hears_of_it() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut bridge = rig.bridge();
    bridge.prepare();
    let start = Instant::now();
    let frozen = bridge.ok("freeze", freeze_arguments(700));
    let mut probe = Probe::start(&rig.mountpoint("a"));
    probe.wait_done();
    assert!(
        start.elapsed() >= Duration::from_millis(700),
        "thawed too early: {:?}",
        start.elapsed()
    );
    // A thaw that the agent reads before its helper's word of the end succeeds, and says that the hold did not.
    wait_until("the agent has heard of the end", || {
        bridge.status()["frozen"] == false
    });
    let generation = frozen["generation"].clone();
    let error = bridge.error("thaw", json!({"set": "s", "generation": generation}));
    assert_eq!(error["code"], "HOLD_BROKEN");
    assert_eq!(error["filesystems"][0]["result"], "thawed");
    assert_eq!(bridge.status()["frozen"], false);
    // The next set is as good as the first.
    bridge.prepare();
    let frozen = bridge.freeze();
    assert_eq!(bridge.thaw(&frozen)["held"], true);
}

#[test]
fn an_agent_that_is_killed_while_frozen_leaves_nothing_frozen() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::with("ext4");
    let mut bridge = rig.bridge();
    bridge.prepare();
    bridge.freeze();
    let mut probe = Probe::start(&rig.mountpoint("a"));
    probe.wait_blocked();
    let start = Instant::now();
    rig.kill_agent();
    probe.wait_done();
    assert!(
        start.elapsed() < Duration::from_secs(9),
        "only the dead-man thawed"
    );
    rig.start();
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    assert_eq!(bridge.thaw(&frozen)["held"], true);
}

#[test]
fn a_helper_that_is_killed_while_frozen_breaks_the_hold_and_another_takes_its_place() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    let mut probe = Probe::start(&rig.mountpoint("a"));
    probe.wait_blocked();
    let helper = rig.helper_pid();
    let start = Instant::now();
    kill_9(helper);
    probe.wait_done();
    assert!(
        start.elapsed() < Duration::from_secs(9),
        "only the dead-man thawed"
    );
    let generation = frozen["generation"].clone();
    let error = bridge.error("thaw", json!({"set": "s", "generation": generation}));
    assert_eq!(error["code"], "HOLD_BROKEN", "{error:#}");
    bridge.prepare();
    let frozen = bridge.freeze();
    assert_ne!(rig.helper_pid(), helper);
    assert_eq!(bridge.thaw(&frozen)["held"], true);
}

#[test]
fn when_agent_and_helper_are_killed_the_next_start_thaws() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::with("ext4");
    let mut bridge = rig.bridge();
    bridge.prepare();
    bridge.freeze();
    let mut probe = Probe::start(&rig.mountpoint("a"));
    probe.wait_blocked();
    // The helper first, stopped, so that it cannot thaw when the agent goes.
    let helper = rig.helper_pid().to_string();
    run("kill", &["-STOP", &helper]);
    rig.kill_agent();
    run("kill", &["-9", &helper]);
    assert!(is_frozen(&rig.mountpoint("a")), "somebody thawed");
    rig.start();
    probe.wait_done();
    assert!(rig.log().contains("left frozen by a killed agent"));
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    assert_eq!(bridge.thaw(&frozen)["held"], true);
}

#[test]
fn leftovers_can_be_thawed_without_starting_the_agent() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::with("ext4");
    let mut bridge = rig.bridge();
    bridge.prepare();
    bridge.freeze();
    let helper = rig.helper_pid().to_string();
    run("kill", &["-STOP", &helper]);
    rig.kill_agent();
    run("kill", &["-9", &helper]);
    let status = rig.command().arg("--thaw-leftovers").status().unwrap();
    assert!(status.success());
    assert!(!is_frozen(&rig.mountpoint("a")));
}

#[test]
fn the_loss_of_the_host_thaws_at_once() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut bridge = rig.bridge();
    bridge.prepare();
    bridge.freeze();
    let mut probe = Probe::start(&rig.mountpoint("a"));
    probe.wait_blocked();
    let start = Instant::now();
    drop(bridge);
    probe.wait_done();
    assert!(
        start.elapsed() < Duration::from_secs(9),
        "only the dead-man thawed"
    );
    assert_eq!(rig.bridge().status()["frozen"], false);
}

#[test]
fn a_thaw_by_somebody_else_is_a_broken_hold() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    run("fsfreeze", &["-u", rig.mountpoint("a").to_str().unwrap()]);
    let thawed = bridge.thaw(&frozen);
    assert_eq!(thawed["held"], false);
    assert!(
        thawed["why_not"]
            .as_str()
            .unwrap()
            .contains("somebody else")
    );
    assert_eq!(thawed["filesystems"][0]["errno"], 22);
}

#[test]
fn what_another_tool_froze_is_refused_and_left_frozen() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::new();
    let a = rig.mount("a", "ext4");
    let b = rig.mount("b", "ext4");
    rig.start();
    let mut bridge = rig.bridge();
    bridge.prepare();
    run("fsfreeze", &["-f", b.to_str().unwrap()]);
    let error = bridge.error("freeze", freeze_arguments(5_000));
    assert_eq!(error["code"], "FREEZE_FAILED", "{error:#}");
    assert!(error["message"].as_str().unwrap().contains("somebody else"));
    assert!(!is_frozen(&a), "ours must be thawed");
    assert!(is_frozen(&b), "theirs must stay frozen");
    run("fsfreeze", &["-u", b.to_str().unwrap()]);
    assert_eq!(bridge.status()["set"], serde_json::Value::Null);
}

#[test]
fn an_inner_file_system_freezes_before_the_one_that_holds_its_file() {
    if !can_run(&["mkfs.xfs"]) {
        return;
    }
    let mut rig = Rig::new();
    // Named so that neither the alphabet nor the order of mounting gives the right answer.
    let outer = rig.mount("a-outer", "xfs");
    let image = outer.join("inner.img");
    rig.mount_image("b-inner", "ext4", &image);
    rig.start();
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    let names: Vec<&str> = frozen["filesystems"]
        .as_array()
        .unwrap()
        .iter()
        .map(|fs| fs["mountpoint"].as_str().unwrap())
        .collect();
    assert!(
        names[0].ends_with("b-inner") && names[1].ends_with("a-outer"),
        "{names:?}"
    );
    assert_eq!(frozen["filesystems"][0]["result"], "frozen");
    assert_eq!(frozen["filesystems"][1]["result"], "frozen");
    let thawed = bridge.thaw(&frozen);
    assert_eq!(thawed["held"], true, "{thawed:#}");
    let first = thawed["filesystems"][0]["mountpoint"].as_str().unwrap();
    assert!(first.ends_with("a-outer"));
}

#[test]
fn a_bind_mount_is_frozen_once_and_what_is_not_on_a_disk_is_left_alone() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::new();
    let a = rig.mount("a", "ext4");
    std::fs::create_dir(a.join("sub")).unwrap();
    let sub = a.join("sub").to_str().unwrap().to_owned();
    rig.mount_with("bind", &["--bind", &sub]);
    rig.mount_with("tmp", &["-t", "tmpfs", "tmpfs"]);
    for name in ["lower", "upper", "work"] {
        std::fs::create_dir(rig.mountpoint("tmp").join(name)).unwrap();
    }
    let tmp = rig.mountpoint_text("tmp");
    let layers = format!("lowerdir={tmp}/lower,upperdir={tmp}/upper,workdir={tmp}/work");
    rig.mount_with("over", &["-t", "overlay", "-o", &layers, "overlay"]);
    rig.start();
    let mut bridge = rig.bridge();
    let identified = bridge.ok("identify", json!({}));
    let filesystems = identified["filesystems"].as_array().unwrap();
    assert_eq!(filesystems.len(), 1, "{identified:#}");
    assert_eq!(filesystems[0]["mountpoint"], rig.mountpoint_text("a"));
    bridge.prepare();
    let frozen = bridge.freeze();
    assert_eq!(bridge.thaw(&frozen)["held"], true);
}

#[test]
fn file_systems_are_left_out_or_read_only_and_reported_so() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::new();
    let a = rig.mount("a", "ext4");
    let b = rig.mount("b", "ext4");
    rig.mount("c", "ext4");
    run("mount", &["-o", "remount,ro", b.to_str().unwrap()]);
    rig.start();
    let mut bridge = rig.bridge();
    bridge.prepare();
    let mut arguments = freeze_arguments(10_000);
    arguments["exclude_filesystems"] = json!([a.to_str().unwrap()]);
    let frozen = bridge.ok("freeze", arguments);
    let results: Vec<&str> = frozen["filesystems"]
        .as_array()
        .unwrap()
        .iter()
        .map(|fs| fs["result"].as_str().unwrap())
        .collect();
    assert_eq!(results, ["left-out", "read-only", "frozen"]);
    let mut probe = Probe::start(&a);
    probe.wait_done();
    assert_eq!(bridge.thaw(&frozen)["held"], true);
}

#[test]
fn abort_and_a_new_hello_end_a_frozen_set() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut bridge = rig.bridge();
    bridge.prepare();
    bridge.freeze();
    bridge.abort();
    bridge.abort();
    assert!(!is_frozen(&rig.mountpoint("a")));
    bridge.prepare();
    bridge.freeze();
    bridge.ok("hello", json!({"versions": [1]}));
    assert!(!is_frozen(&rig.mountpoint("a")));
    // The highest that both speak.
    let both = bridge.ok("hello", json!({"versions": [9, 1, 7]}));
    assert_eq!(both["version"], 1);
    let error = bridge.error("hello", json!({"versions": [7]}));
    assert_eq!(error["code"], "VERSION_MISMATCH");
}

#[test]
fn requests_out_of_order_and_limits_out_of_range_are_refused() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut bridge = rig.bridge();
    let error = bridge.error("freeze", freeze_arguments(1_000));
    assert_eq!(error["code"], "SET_NOT_FOUND");
    bridge.prepare();
    let error = bridge.error("prepare", json!({"set": "t", "limit_ms": 1_000}));
    assert_eq!(error["code"], "SNAPSHOT_SET_IN_PROGRESS");
    for hold_ms in [0, 10_001] {
        let error = bridge.error("freeze", freeze_arguments(hold_ms));
        assert_eq!(error["code"], "BAD_REQUEST");
    }
    let error = bridge.error("thaw", json!({"set": "s", "generation": 1}));
    assert_eq!(error["code"], "BAD_REQUEST");
    let frozen = bridge.freeze();
    let error = bridge.error("thaw", json!({"set": "s", "generation": 1}));
    assert_eq!(error["code"], "SET_NOT_FOUND");
    assert_eq!(bridge.thaw(&frozen)["held"], true);
}

#[test]
fn a_second_agent_on_the_same_state_directory_does_not_start() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let output = rig.command().output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("another guest-agent"));
    wait_until("the first goes on", || {
        rig.bridge().status()["frozen"] == false
    });
}

#[test]
fn a_helper_that_is_stopped_while_frozen_is_replaced_after_the_limit() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.ok("freeze", freeze_arguments(300));
    let helper = rig.helper_pid();
    run("kill", &["-STOP", &helper.to_string()]);
    let mut probe = Probe::start(&rig.mountpoint("a"));
    probe.wait_done();
    let generation = frozen["generation"].clone();
    let error = bridge.error("thaw", json!({"set": "s", "generation": generation}));
    assert_eq!(error["code"], "HOLD_BROKEN");
    wait_until("another helper runs", || {
        rig::children(rig.agent_pid())
            .iter()
            .any(|child| *child != helper)
    });
    bridge.prepare();
    let frozen = bridge.freeze();
    assert_eq!(bridge.thaw(&frozen)["held"], true);
}

/// A file system whose disk is a file on another one, which a third party froze: FIFREEZE does not come back.
/// It waits for the disk, or, `in_a_write`, for a writer that does.
fn with_a_freeze_that_hangs(in_a_write: bool, check: impl FnOnce(&mut Rig, &mut Bridge)) {
    let mut rig = Rig::new();
    // Beside `mnt`, so the agent does not know it.
    let outer_image = rig.path("outer.img");
    let outer = rig.mount_image("../outer", "ext4", &outer_image);
    let image = outer.join("inner.img");
    let inner = rig.mount_image("inner", "ext4", &image);
    rig.start();
    let mut bridge = rig.bridge();
    bridge.prepare();
    run("fsfreeze", &["-f", outer.to_str().unwrap()]);
    let mut write = None;
    if in_a_write {
        write
            .insert(Probe::start_synchronous(&inner))
            .wait_blocked();
    } else {
        std::fs::write(inner.join("dirty"), vec![1; 100_000]).unwrap();
    }
    let error = bridge.error("freeze", freeze_arguments(500));
    assert_eq!(error["code"], "FLUSH_WRITES_TIMEOUT", "{error:#}");
    check(&mut rig, &mut bridge);
    run("fsfreeze", &["-u", outer.to_str().unwrap()]);
    if let Some(write) = &mut write {
        write.wait_done();
    }
    let mut probe = Probe::start(&inner);
    probe.wait_done();
    wait_until("it is not frozen any more", || !is_frozen(&inner));
}

#[test]
fn a_freeze_that_hangs_is_given_up_and_thawed_when_it_comes_back() {
    if !can_run(&[]) {
        return;
    }
    with_a_freeze_that_hangs(false, |_, bridge| {
        // Until then that file system cannot be in another set.
        let error = bridge.error("prepare", json!({"set": "s", "limit_ms": 3_000}));
        assert_eq!(error["code"], "FREEZE_FAILED");
        assert_eq!(bridge.status()["frozen"], false);
    });
}

#[test]
fn a_freeze_that_hangs_is_thawed_when_it_comes_back_though_the_agent_was_killed() {
    if !can_run(&[]) {
        return;
    }
    with_a_freeze_that_hangs(false, |rig, _| rig.kill_agent());
}

#[test]
fn a_freeze_that_hangs_is_thawed_when_it_comes_back_though_agent_and_helper_were_killed() {
    if !can_run(&[]) {
        return;
    }
    let mut leftovers = None;
    with_a_freeze_that_hangs(true, |rig, _| {
        let helper = rig.helper_pid();
        rig.kill_agent();
        kill_9(helper);
        let mut command = rig.command();
        let mut child = command.arg("--thaw-leftovers").spawn().unwrap();
        let descriptors = format!("/proc/{}/fd", child.id());
        let is_waiting = || {
            let descriptors = std::fs::read_dir(&descriptors).into_iter().flatten();
            descriptors.flatten().any(|descriptor| {
                std::fs::read_link(descriptor.path())
                    .is_ok_and(|link| link.to_string_lossy().contains("pidfd"))
            })
        };
        wait_until("it waits for the helper's last thread", || {
            is_waiting() || child.try_wait().unwrap().is_some()
        });
        assert!(
            child.try_wait().unwrap().is_none(),
            "it left before FIFREEZE came back"
        );
        leftovers = Some(child);
    });
    assert!(leftovers.unwrap().wait().unwrap().success());
}

/// What it may do there: nothing of it waits for a file system or for memory.
const CALLS_WHILE_FROZEN: [&str; 14] = [
    "clock_gettime",
    "futex",
    "ioctl",
    "poll",
    "ppoll",
    "pwrite64",
    "read",
    "recvfrom",
    "restart_syscall",
    "rt_sigprocmask",
    "sendmsg",
    "sendto",
    "timerfd_settime",
    "write",
];

#[test]
fn the_helper_opens_and_allocates_nothing_while_anything_is_frozen() {
    if !can_run(&["strace"]) {
        return;
    }
    let mut rig = Rig::with("ext4");
    rig.mount("b", "ext4");
    let mut bridge = rig.bridge();
    bridge.prepare();
    let (helper, log) = (rig.helper_pid(), rig.path("calls"));
    let mut strace = Command::new("strace")
        .args(["-f", "-qq", "-e", "signal=none", "-o"])
        .arg(&log)
        .args(["-p", &helper.to_string()])
        .spawn()
        .unwrap();
    let mut is_refused = false;
    wait_until("strace to be there", || {
        let tasks = std::fs::read_dir(format!("/proc/{helper}/task")).unwrap();
        let is_traced = tasks.flatten().all(|task| {
            let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
            !status.contains("TracerPid:\t0\n")
        });
        is_refused = strace.try_wait().unwrap().is_some();
        is_traced || is_refused
    });
    if is_refused {
        eprintln!("SKIPPED: strace may not look at processes here");
        return;
    }
    let frozen = bridge.freeze();
    assert_eq!(bridge.thaw(&frozen)["held"], true);
    run("kill", &["-INT", &strace.id().to_string()]);
    strace.wait().unwrap();
    let text = std::fs::read_to_string(&log).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let first = lines.iter().position(|line| line.contains("FIFREEZE"));
    let last = lines.iter().rposition(|line| line.contains("FITHAW"));
    let (first, last) = (first.expect(&text), last.expect(&text));
    assert_eq!(text.matches("FIFREEZE").count(), 2, "{text}");
    for line in &lines[first..=last] {
        let call = line.split_whitespace().nth(1).unwrap_or_default();
        // A call that is interrupted by another thread's line ends with `<... NAME resumed>`.
        let name = call.split('(').next().unwrap_or_default();
        assert!(
            CALLS_WHILE_FROZEN.contains(&name) || name == "<...",
            "{line}\n{text}"
        );
    }
}

#[test]
fn a_file_system_that_was_left_frozen_and_cannot_be_reached_is_told_and_keeps_no_agent_from_starting()
 {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::with("ext4");
    rig.kill_agent();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let ledger = format!("vmshadow-hold 1 {} 0\nF 999:9\n", boot.trim());
    let path = rig.path("run/hold.7");
    std::fs::write(&path, ledger).unwrap();
    let ended = rig.command().arg("--thaw-leftovers").output().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    let said = String::from_utf8(ended.stderr).unwrap();
    assert!(said.contains("file system 999:9"), "{said}");
    assert!(said.contains("cannot be reached"), "{said}");
    rig.start();
    assert_eq!(rig.bridge().status()["frozen"], false);
    assert!(path.exists(), "for another try");
}

#[test]
fn a_file_system_without_a_freeze_operation_is_reported_as_not_held() {
    if !can_run(&["mkfs.vfat"]) {
        return;
    }
    let known = std::fs::read_to_string("/proc/filesystems").unwrap();
    if !known.contains("vfat") {
        eprintln!("skipped: this kernel has no vfat");
        return;
    }
    let mut rig = Rig::new();
    rig.mount("a", "ext4");
    rig.mount("efi", "vfat");
    rig.start();
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    let efi = &frozen["filesystems"][1];
    assert_eq!(
        (&efi["result"], &efi["errno"]),
        (&json!("failed"), &json!(95))
    );
    assert_eq!(bridge.thaw(&frozen)["held"], true);
}
