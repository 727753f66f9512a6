//! The QEMU guest agent protocol with the very bytes that libvirt and Proxmox write.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use rig::{Probe, Rig, can_run, freeze_arguments, is_frozen, run, wait_until};
use serde_json::{Value, json};

fn json_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn libvirts_quiesced_snapshot_works() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut qga = rig.qga();
    let sync = "{\"execute\":\"guest-sync\", \"arguments\":{\"id\":1795328126191}}\n";
    assert_eq!(qga.ask(sync), "{\"return\":1795328126191}\n");
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-freeze\"}\n"),
        "{\"return\":1}\n"
    );
    let mut probe = Probe::start(&rig.mountpoint("a"));
    probe.wait_blocked();
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-status\"}\n"),
        "{\"return\":\"frozen\"}\n"
    );
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-freeze\"}\n"),
        "{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"Command guest-fsfreeze-freeze has been disabled: the agent is in frozen state\"}}\n"
    );
    let info = json_of(&qga.ask("{\"execute\":\"guest-info\"}\n"));
    let enabled = |name: &str| {
        let commands = info["return"]["supported_commands"].as_array().unwrap();
        commands.iter().find(|c| c["name"] == name).unwrap()["enabled"] == true
    };
    assert!(enabled("guest-fsfreeze-thaw") && !enabled("guest-get-fsinfo"));
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-thaw\"}\n"),
        "{\"return\":1}\n"
    );
    probe.wait_done();
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-thaw\"}\n"),
        "{\"return\":0}\n"
    );
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-status\"}\n"),
        "{\"return\":\"thawed\"}\n"
    );
}

#[test]
fn libvirts_list_of_mount_points_freezes_only_those() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::new();
    let a = rig.mount("a", "ext4");
    let b = rig.mount("b", "ext4");
    rig.start();
    let mut qga = rig.qga();
    let list = json!({"execute": "guest-fsfreeze-freeze-list", "arguments": {"mountpoints": [b]}});
    assert_eq!(qga.ask(&list.to_string()), "{\"return\":1}\n");
    let mut probe = Probe::start(&a);
    probe.wait_done();
    assert!(is_frozen(&b));
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-thaw\"}"),
        "{\"return\":1}\n"
    );
}

#[test]
fn proxmox_writes_two_commands_at_once_and_connects_anew_for_each() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let call = |id: u64, command: &str| {
        let mut qga = rig.qga();
        qga.write(&format!(
            "{{\"execute\":\"guest-sync-delimited\",\"arguments\":{{\"id\":{id}}}}}\n{{\"execute\":\"{command}\",\"arguments\":{{}}}}\n"
        ));
        let mut expected = vec![0xff];
        expected.extend_from_slice(format!("{{\"return\":{id}}}\n").as_bytes());
        assert_eq!(qga.line(), expected);
        String::from_utf8(qga.line()).unwrap()
    };
    assert_eq!(call(11, "guest-ping"), "{\"return\":{}}\n");
    assert_eq!(call(12, "guest-fsfreeze-freeze"), "{\"return\":1}\n");
    // The connection that froze is gone: that must not thaw.
    assert_eq!(
        call(13, "guest-fsfreeze-status"),
        "{\"return\":\"frozen\"}\n"
    );
    assert!(is_frozen(&rig.mountpoint("a")));
    assert_eq!(call(14, "guest-fsfreeze-thaw"), "{\"return\":1}\n");
}

#[test]
fn after_its_dead_man_the_first_thaw_is_an_error_and_the_next_is_zero() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::new();
    rig.mount("a", "ext4");
    rig.option("--qga-hold-ms", "400");
    rig.start();
    let mut qga = rig.qga();
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-freeze\"}"),
        "{\"return\":1}\n"
    );
    let mut probe = Probe::start(&rig.mountpoint("a"));
    probe.wait_done();
    let error = json_of(&qga.ask("{\"execute\":\"guest-fsfreeze-thaw\"}"));
    assert_eq!(error["error"]["class"], "GenericError");
    assert!(
        error["error"]["desc"]
            .as_str()
            .unwrap()
            .starts_with("couldn't hold writes")
    );
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-thaw\"}"),
        "{\"return\":0}\n"
    );
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-freeze\"}"),
        "{\"return\":1}\n"
    );
}

#[test]
fn a_thaw_by_somebody_else_is_an_error_of_the_thaw() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut qga = rig.qga();
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-freeze\"}"),
        "{\"return\":1}\n"
    );
    run("fsfreeze", &["-u", rig.mountpoint("a").to_str().unwrap()]);
    let error = json_of(&qga.ask("{\"execute\":\"guest-fsfreeze-thaw\"}"));
    assert!(
        error["error"]["desc"]
            .as_str()
            .unwrap()
            .contains("somebody else")
    );
}

#[test]
fn its_freeze_runs_writers_and_a_veto_is_an_error_that_leaves_nothing_frozen() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let order = rig.path("run/order");
    for event in ["prepare", "freeze", "thaw", "abort"] {
        rig.script("db", event, &format!("echo {event} >> {}", order.display()));
    }
    let mut qga = rig.qga();
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-freeze\"}"),
        "{\"return\":1}\n"
    );
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-thaw\"}"),
        "{\"return\":1}\n"
    );
    let told = std::fs::read_to_string(&order).unwrap();
    assert_eq!(told, "prepare\nfreeze\nthaw\n");
    rig.script("db", "freeze", "echo no >&2; exit 1");
    let error = json_of(&qga.ask("{\"execute\":\"guest-fsfreeze-freeze\"}"));
    assert_eq!(error["error"]["class"], "GenericError");
    assert!(error["error"]["desc"].as_str().unwrap().contains("no"));
    assert!(!is_frozen(&rig.mountpoint("a")));
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-thaw\"}"),
        "{\"return\":0}\n"
    );
    assert!(
        std::fs::read_to_string(&order)
            .unwrap()
            .ends_with("prepare\nabort\n")
    );
}

#[test]
fn status_and_ping_are_answered_while_a_freeze_waits_for_a_writer() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let go = rig.path("run/go");
    rig.script(
        "db",
        "freeze",
        &format!("while [ ! -e {} ]; do sleep 0.02; done", go.display()),
    );
    let mut qga = rig.qga();
    qga.write("{\"execute\":\"guest-fsfreeze-freeze\",\"id\":1}");
    wait_until("the freeze is under way", || {
        qga.ask("{\"execute\":\"guest-fsfreeze-status\",\"id\":2}")
            .contains("frozen")
    });
    assert_eq!(
        qga.ask("{\"execute\":\"guest-ping\",\"id\":3}"),
        "{\"id\":3,\"return\":{}}\n"
    );
    std::fs::write(go, "").unwrap();
    assert_eq!(
        String::from_utf8(qga.line()).unwrap(),
        "{\"id\":1,\"return\":1}\n"
    );
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-thaw\"}"),
        "{\"return\":1}\n"
    );
}

#[test]
fn the_two_protocols_do_not_touch_each_others_freeze() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let (mut qga, mut bridge) = (rig.qga(), rig.bridge());
    bridge.prepare();
    let frozen = bridge.freeze();
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-thaw\"}"),
        "{\"return\":0}\n"
    );
    assert!(
        qga.ask("{\"execute\":\"guest-fsfreeze-freeze\"}")
            .contains("CommandNotFound")
    );
    assert!(is_frozen(&rig.mountpoint("a")));
    assert_eq!(bridge.thaw(&frozen)["held"], true);
    bridge.ok("post_snapshot", json!({"set": "s", "kept": true}));
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-freeze\"}"),
        "{\"return\":1}\n"
    );
    assert_eq!(bridge.status()["frozen_by_qga"], true);
    let error = bridge.error("prepare", json!({"set": "s", "limit_ms": 1_000}));
    assert_eq!(error["code"], "SNAPSHOT_SET_IN_PROGRESS");
    let error = bridge.error("freeze", freeze_arguments(1_000));
    assert_eq!(error["code"], "SET_NOT_FOUND");
    // A bridge that comes and goes is none of its business either.
    drop(bridge);
    assert_eq!(rig.bridge().status()["frozen"], true);
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-thaw\"}"),
        "{\"return\":1}\n"
    );
}

#[test]
fn file_systems_are_described_as_clients_expect() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let reply = json_of(&rig.qga().ask("{\"execute\":\"guest-get-fsinfo\"}"));
    let all: Vec<qapi::qga::GuestFilesystemInfo> =
        serde_json::from_value(reply["return"].clone()).unwrap();
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].type_, "ext4");
    assert_eq!(all[0].mountpoint, rig.mountpoint_text("a"));
    // What a loop device lies on is a file, not a disk.
    assert!(all[0].disk.is_empty());
    assert!(all[0].name.starts_with("loop"));
    assert!(all[0].total_bytes.unwrap() > all[0].used_bytes.unwrap());
}

#[test]
fn garbage_and_half_objects_do_not_disturb_the_next_command() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut qga = rig.qga();
    assert!(qga.ask("{\"execute\":}").contains("JSON parse error"));
    assert!(
        qga.ask("{\"execute\":\"guest-sync\"}")
            .contains("'id' is missing")
    );
    qga.write("{\"execute\":\"guest-pi");
    qga.write_bytes(b"\xff{\"execute\":\"guest-ping\"}");
    assert_eq!(qga.line(), b"{\"return\":{}}\n");
}

#[test]
fn after_a_kill_while_frozen_the_first_thaw_is_an_error_and_the_next_is_zero() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::with("ext4");
    let freeze = "{\"execute\":\"guest-fsfreeze-freeze\"}";
    let thaw = "{\"execute\":\"guest-fsfreeze-thaw\"}";
    assert_eq!(rig.qga().ask(freeze), "{\"return\":1}\n");
    rig.kill_agent();
    Probe::start(&rig.mountpoint("a")).wait_done();
    rig.start();
    // A set of the bridge's takes nothing from that.
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    bridge.thaw(&frozen);
    bridge.ok("post_snapshot", json!({"set": "s", "kept": true}));
    let mut qga = rig.qga();
    let error = json_of(&qga.ask(thaw));
    let desc = error["error"]["desc"].as_str().unwrap();
    assert!(desc.starts_with("couldn't hold writes"), "{desc}");
    assert_eq!(qga.ask(thaw), "{\"return\":0}\n");
    // What was thawed is not told of, whenever the agent is killed.
    assert_eq!(qga.ask(freeze), "{\"return\":1}\n");
    assert_eq!(qga.ask(thaw), "{\"return\":1}\n");
    rig.kill_agent();
    rig.start();
    assert_eq!(rig.qga().ask(thaw), "{\"return\":0}\n");
}

#[test]
fn a_freeze_that_waits_for_the_bridge_and_is_thawed_meanwhile_freezes_nothing() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let (at, go) = (rig.path("run/at"), rig.path("run/go"));
    let text = format!(
        "touch {}; while [ ! -e {} ]; do sleep 0.02; done",
        at.display(),
        go.display()
    );
    rig.script("db", "identify", &text);
    let mut bridge = rig.bridge();
    bridge.send("identify", json!({}));
    wait_until("the bridge is first", || at.exists());
    let mut qga = rig.qga();
    qga.write("{\"execute\":\"guest-fsfreeze-freeze\",\"id\":1}");
    // Answered by the same thread of the agent, behind the freeze.
    let thaw = "{\"execute\":\"guest-fsfreeze-thaw\",\"id\":2}";
    let answers = [qga.ask(thaw), String::from_utf8(qga.line()).unwrap()];
    std::fs::write(go, "").unwrap();
    assert!(
        answers
            .iter()
            .any(|answer| answer.contains("\"error\"") && answer.contains("\"id\":1")),
        "{answers:?}"
    );
    assert!(
        answers.contains(&"{\"id\":2,\"return\":0}\n".to_owned()),
        "{answers:?}"
    );
    bridge.next();
    Probe::start(&rig.mountpoint("a")).wait_done();
}

#[test]
fn a_freeze_that_hangs_is_given_up_though_the_hold_may_last_minutes() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::new();
    let image = rig.path("outer.img");
    let outer = rig.mount_image("../outer", "ext4", &image);
    let inner = rig.mount_image("inner", "ext4", &outer.join("inner.img"));
    rig.start();
    let (at, go) = (rig.path("run/at"), rig.path("run/go"));
    let text = format!(
        "touch {}; while [ ! -e {} ]; do sleep 0.02; done",
        at.display(),
        go.display()
    );
    rig.script("db", "freeze", &text);
    let mut qga = rig.qga();
    qga.write("{\"execute\":\"guest-fsfreeze-freeze\"}");
    wait_until("all is written back", || at.exists());
    run("fsfreeze", &["-f", outer.to_str().unwrap()]);
    std::fs::write(inner.join("dirty"), vec![1; 100_000]).unwrap();
    std::fs::write(go, "").unwrap();
    let answer = qga.line();
    run("fsfreeze", &["-u", outer.to_str().unwrap()]);
    let error = json_of(&String::from_utf8(answer).unwrap());
    let desc = error["error"]["desc"].as_str().unwrap();
    assert!(desc.contains("within 10000 ms"), "{desc}");
    Probe::start(&inner).wait_done();
}
