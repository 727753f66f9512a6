//! A hold that a writer lost stays lost, whatever it says afterwards and whoever comes in its place.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use rig::played::Played;
use rig::{Bridge, Rig, can_run, freeze_arguments, is_frozen, wait_until};
use serde_json::{Value, json};

/// A set that these writers have frozen; its generation.
fn frozen(bridge: &mut Bridge, writers: &mut [&mut Played]) -> Value {
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    for event in ["prepare_backup", "prepare_snapshot"] {
        for writer in writers.iter_mut() {
            writer.agree(event);
        }
    }
    assert!(bridge.next()["return"].is_object());
    bridge.send("freeze", freeze_arguments(10_000));
    for writer in writers.iter_mut() {
        writer.answer("freeze", json!({"ok": true, "evidence": 7}));
    }
    bridge.next()["return"]["generation"].clone()
}

fn held() -> Value {
    json!({"ok": true, "held": true, "evidence": 7})
}

/// Connects under the name of one that has hung up, as soon as the agent has noticed.
fn come_back(rig: &Rig, name: &str) -> Played {
    let registration = json!({"protocol": 1, "class_id": "test", "instance_id": name, "name": name,
                              "level": "BACK_END", "freeze_timeout_ms": 30_000});
    let mut back = None;
    wait_until("the name is free", || {
        let mut played = Played::connect(rig, &registration);
        let is_welcome = played.event()["protocol"] == 1;
        back = is_welcome.then_some(played);
        is_welcome
    });
    back.unwrap()
}

#[test]
fn a_release_that_crosses_the_thaw_is_not_undone_by_the_answer_to_it() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 30_000);
    let mut bridge = rig.bridge();
    let generation = frozen(&mut bridge, &mut [&mut writer]);
    bridge.send("thaw", json!({"set": "s", "generation": generation}));
    let event = writer.event();
    assert_eq!(event["event"], "thaw");
    writer.write(&json!({"release": "my lock is gone", "generation": generation}));
    let mut answer = held();
    answer["seq"] = event["seq"].clone();
    writer.write(&answer);
    let thawed = bridge.next()["return"].clone();
    assert_eq!(thawed["held"], false, "{thawed:#}");
    assert!(
        thawed["why_not"]
            .as_str()
            .unwrap()
            .contains("my lock is gone")
    );
    assert_eq!(thawed["writers"][0]["held"], false);
    assert_eq!(thawed["writers"][0]["state"], "FAILED_AT_THAW");
}

#[test]
fn a_writer_that_lets_go_while_another_thaws_is_told_as_failed_to_the_end_of_the_set() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "a", "FRONT_END", 30_000);
    let mut other = Played::registered(&rig, "b", "SYSTEM", 30_000);
    let mut bridge = rig.bridge();
    let generation = frozen(&mut bridge, &mut [&mut writer, &mut other]);
    bridge.send("thaw", json!({"set": "s", "generation": generation}));
    let event = other.event();
    assert_eq!(event["event"], "thaw");
    writer.write(&json!({"release": "my lock is gone", "generation": generation}));
    let state = |bridge: &mut Bridge| bridge.status()["writers"][0]["state"].clone();
    wait_until("it is told as lost", || {
        state(&mut bridge) == "FAILED_AT_THAW"
    });
    let mut answer = held();
    answer["seq"] = event["seq"].clone();
    other.write(&answer);
    writer.answer("thaw", held());
    let thawed = bridge.next()["return"].clone();
    assert_eq!(thawed["held"], false, "{thawed:#}");
    assert_eq!(thawed["writers"][0]["held"], true);
    let report = &thawed["writers"][1];
    assert_eq!(report["held"], false);
    assert_eq!(report["failure"]["message"], "my lock is gone");
    // A host that keeps the copies all the same goes on reading of it.
    bridge.send("post_snapshot", json!({"set": "s", "kept": true}));
    writer.agree("post_snapshot");
    other.agree("post_snapshot");
    let said = bridge.next()["return"].clone();
    assert_eq!(said["writers"][0]["state"], "FAILED_AT_THAW", "{said:#}");
    assert_eq!(said["writers"][1]["state"], "WAITING_FOR_BACKUP_COMPLETE");
}

#[test]
fn a_writer_that_hangs_up_behind_its_freeze_does_not_come_back_into_the_hold() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 30_000);
    let mut bridge = rig.bridge();
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    writer.agree_to_prepare();
    assert!(bridge.next()["return"].is_object());
    bridge.send("freeze", freeze_arguments(10_000));
    writer.answer("freeze", json!({"ok": true, "evidence": 7}));
    drop(writer);
    let mut back = come_back(&rig, "db");
    let mut answer = bridge.next();
    if answer["error"].is_null() {
        let generation = &answer["return"]["generation"];
        bridge.send("thaw", json!({"set": "s", "generation": generation}));
        answer = bridge.next();
    }
    let error = &answer["error"];
    assert_eq!(error["code"], "HOLD_BROKEN", "{answer:#}");
    assert_eq!(error["writers"][0]["held"], false);
    assert_eq!(error["writers"][0]["state"], "FAILED_AT_THAW");
    assert!(!is_frozen(&rig.mountpoint("a")));
    // It hears of the next set first.
    frozen(&mut bridge, &mut [&mut back]);
}

#[test]
fn a_writer_that_hangs_up_at_its_thaw_has_not_held_whoever_comes_back() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 30_000);
    let mut bridge = rig.bridge();
    let generation = frozen(&mut bridge, &mut [&mut writer]);
    bridge.send("thaw", json!({"set": "s", "generation": generation}));
    let event = writer.event();
    assert_eq!(event["event"], "thaw");
    drop(writer);
    let mut back = come_back(&rig, "db");
    let mut answer = held();
    answer["seq"] = event["seq"].clone();
    back.write(&answer);
    let thawed = bridge.next()["return"].clone();
    assert_eq!(thawed["held"], false, "{thawed:#}");
    assert_eq!(thawed["writers"][0]["state"], "FAILED_AT_THAW");
}

#[test]
fn a_client_of_qemus_protocol_hears_of_a_writer_that_was_lost_and_came_back() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 30_000);
    let mut qga = rig.qga();
    qga.write("{\"execute\":\"guest-fsfreeze-freeze\"}");
    writer.agree_to_prepare();
    writer.answer("freeze", json!({"ok": true, "evidence": 7}));
    assert_eq!(qga.line(), b"{\"return\":1}\n");
    drop(writer);
    let _back = come_back(&rig, "db");
    assert!(is_frozen(&rig.mountpoint("a")));
    let answer = qga.ask("{\"execute\":\"guest-fsfreeze-thaw\"}");
    assert!(
        answer.contains("writer db was lost while frozen: it hung up"),
        "{answer}"
    );
    assert!(!is_frozen(&rig.mountpoint("a")));
}
