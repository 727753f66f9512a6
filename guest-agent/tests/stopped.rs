//! The agent killed, or stopped for good, at every step of a set: nothing stays frozen, and the next set is a good one.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use rig::{Bridge, Probe, Rig, can_run, freeze_arguments, run, wait_until};
use serde_json::json;
use std::fs;
use std::process::{Command, Stdio};

/// Steps in their order; at all but `frozen` a script writer keeps the agent waiting.
const STEPS: [&str; 5] = ["prepare", "freeze", "frozen", "thaw", "post-snapshot"];
/// Short, so that only this limit can be what thaws.
const HOLD_MS: u64 = 2_000;

/// A writer that waits at an event for as long as there is a file `wait-EVENT`.
fn patient_writer(rig: &Rig) {
    for event in STEPS.iter().filter(|step| **step != "frozen") {
        let (wait, at) = (
            rig.path(&format!("run/wait-{event}")),
            rig.path(&format!("run/at-{event}")),
        );
        let text = format!(
            "[ -e {0} ] || exit 0\ntouch {1}\nwhile [ -e {0} ]; do sleep 0.05; done",
            wait.display(),
            at.display()
        );
        rig.script("patient", event, &text);
    }
}

/// Begins a set and goes on until the agent is in the middle of `step`.
fn go_to(rig: &Rig, bridge: &mut Bridge, step: &str) {
    let wait = rig.path(&format!("run/wait-{step}"));
    let at = rig.path(&format!("run/at-{step}"));
    fs::remove_file(&at).unwrap_or(());
    fs::write(&wait, "").unwrap();
    let arrived = || wait_until(step, || at.exists());
    if step == "prepare" {
        bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
        return arrived();
    }
    bridge.prepare();
    if step == "freeze" {
        bridge.send("freeze", freeze_arguments(HOLD_MS));
        return arrived();
    }
    let frozen = bridge.ok("freeze", freeze_arguments(HOLD_MS));
    if step == "frozen" {
        return;
    }
    let thaw = json!({"set": "s", "generation": frozen["generation"]});
    if step == "thaw" {
        bridge.send("thaw", thaw);
        return arrived();
    }
    bridge.ok("thaw", thaw);
    bridge.send("post_snapshot", json!({"set": "s", "kept": true}));
    arrived();
}

fn good_set(rig: &Rig) {
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    let thawed = bridge.thaw(&frozen);
    assert_eq!(thawed["held"], true, "{thawed:#}");
}

#[test]
fn an_agent_killed_at_any_step_leaves_nothing_frozen_and_the_next_set_is_good() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::with("ext4");
    patient_writer(&rig);
    for step in STEPS {
        let mut bridge = rig.bridge();
        go_to(&rig, &mut bridge, step);
        rig.kill_agent();
        Probe::start(&rig.mountpoint("a")).wait_done();
        fs::remove_file(rig.path(&format!("run/wait-{step}"))).unwrap();
        rig.start();
        good_set(&rig);
    }
}

#[test]
fn an_agent_stopped_at_any_step_keeps_nothing_frozen_beyond_the_limit() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    patient_writer(&rig);
    let agent = rig.agent_pid().to_string();
    for step in STEPS {
        let mut bridge = rig.bridge();
        go_to(&rig, &mut bridge, step);
        run("kill", &["-STOP", &agent]);
        let stopped = std::time::Instant::now();
        // The agent stands still all the while: the helper alone can have thawed.
        Probe::start(&rig.mountpoint("a")).wait_done();
        // Its hold was for two seconds; the rest is a slow machine's.
        let held = stopped.elapsed();
        assert!(
            held < std::time::Duration::from_secs(10),
            "{step}: {held:?}"
        );
        fs::remove_file(rig.path(&format!("run/wait-{step}"))).unwrap();
        run("kill", &["-CONT", &agent]);
        drop(bridge);
        good_set(&rig);
    }
}

#[test]
fn a_thaw_after_the_agent_stood_still_hears_that_the_hold_is_broken() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let agent = rig.agent_pid().to_string();
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.ok("freeze", freeze_arguments(HOLD_MS));
    run("kill", &["-STOP", &agent]);
    Probe::start(&rig.mountpoint("a")).wait_done();
    run("kill", &["-CONT", &agent]);
    let thaw = json!({"set": "s", "generation": frozen["generation"]});
    // Which of the two depends on what the agent hears first when it goes on.
    let answer = bridge.ask("thaw", thaw);
    let broken = answer["error"]["code"] == "HOLD_BROKEN";
    assert!(broken || answer["return"]["held"] == false, "{answer:#}");
}

#[test]
fn agent_and_helper_stopped_together_thaw_as_soon_as_they_go_on() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    // The agent last: when it goes on it may take its helper for silent, and end it.
    let both = [rig.helper_pid().to_string(), rig.agent_pid().to_string()];
    let signal = |name: &str| run("kill", &[name, &both[0], &both[1]]);
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.ok("freeze", freeze_arguments(HOLD_MS));
    let start = std::time::Instant::now();
    signal("-STOP");
    let mut probe = Probe::start(&rig.mountpoint("a"));
    wait_until("the limit is past", || {
        start.elapsed().as_millis() > u128::from(HOLD_MS) + 1_000
    });
    let is_held = !probe.is_done();
    signal("-CONT");
    probe.wait_done();
    assert!(is_held, "somebody thawed: FAILURES.md says that nobody can");
    let thaw = json!({"set": "s", "generation": frozen["generation"]});
    let answer = bridge.ask("thaw", thaw);
    let broken = answer["error"]["code"] == "HOLD_BROKEN";
    assert!(broken || answer["return"]["held"] == false, "{answer:#}");
    drop(bridge);
    good_set(&rig);
}

#[test]
fn the_unit_wants_to_be_started_again_however_often_it_was_killed_and_is_bound_to_no_port() {
    let unit = include_str!("../systemd/vmshadow-guest-agent.service");
    let (head, service) = unit.split_once("[Service]").unwrap();
    assert!(head.contains("\nStartLimitIntervalSec=0\n"));
    assert!(service.contains("\nRestart=always\n"));
    assert!(service.contains("--thaw-leftovers\n"));
    for bound in ["BindsTo", "BindTo", "Requires", "PartOf"] {
        let is_bound = |line: &str| line.starts_with(bound);
        assert!(!unit.lines().any(is_bound), "{bound}");
    }
}

#[test]
fn agent_and_helper_are_locked_in_memory_and_the_last_to_be_killed_for_want_of_it() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let may_be_spared = Command::new("sh")
        .args(["-c", "echo -1000 >/proc/self/oom_score_adj"])
        .stderr(Stdio::null())
        .status()
        .unwrap()
        .success();
    if !may_be_spared {
        eprintln!("skipped in part: this machine lets nobody lower an oom_score_adj");
    }
    for (pid, score) in [(rig.agent_pid(), "-900\n"), (rig.helper_pid(), "-1000\n")] {
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
        wait_until("its memory is locked", || {
            let status = read("status");
            let kib = |name: &str| {
                let line = status.lines().find(|line| line.starts_with(name)).unwrap();
                let number = line.split_ascii_whitespace().nth(1).unwrap();
                number.parse::<u64>().unwrap()
            };
            // All of the program itself, at the least.
            kib("VmLck:") >= kib("VmExe:") && kib("VmSwap:") == 0
        });
        if may_be_spared {
            assert_eq!(read("oom_score_adj"), score);
        }
    }
}
