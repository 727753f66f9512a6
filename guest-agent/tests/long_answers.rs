//! Writers that say more than an answer to the host has room for: they fail, and nothing stays frozen for it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use rig::played::Played;
use rig::{Bridge, Rig, can_run, freeze_arguments, is_frozen, wait_until};
use serde_json::{Value, json};
use std::fs;

fn long(kib: usize) -> Value {
    json!("x".repeat(kib << 10))
}

fn prepared(bridge: &mut Bridge, writers: &mut [Played]) {
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    for event in ["prepare_backup", "prepare_snapshot"] {
        for writer in writers.iter_mut() {
            writer.agree(event);
        }
    }
    assert!(bridge.next()["return"].is_object());
}

fn registered(rig: &Rig, names: &[&str]) -> Vec<Played> {
    let register = |name: &&str| Played::registered(rig, name, "BACK_END", 30_000);
    names.iter().map(register).collect()
}

#[test]
fn evidence_without_end_is_a_veto_of_its_writer_and_nothing_stays_frozen() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writers = registered(&rig, &["a", "b"]);
    let mut bridge = rig.bridge();
    prepared(&mut bridge, &mut writers);
    bridge.send("freeze", freeze_arguments(10_000));
    for writer in &mut writers {
        writer.answer("freeze", json!({"ok": true, "evidence": long(600)}));
    }
    let mut reasons = writers.iter_mut().map(Played::expect_abort);
    assert!(reasons.all(|why| why.contains("have no room")));
    let error = bridge.next()["error"].clone();
    assert_eq!(error["code"], "WRITER_VETO", "{error:#}");
    let failures: Vec<&Value> = error["writers"].as_array().unwrap().iter().collect();
    assert!(
        failures
            .iter()
            .any(|report| report["failure"]["code"] == "OUTOFRESOURCES")
    );
    assert!(!is_frozen(&rig.mountpoint("a")));
}

#[test]
fn evidence_without_end_at_the_thaw_has_not_held() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writers = registered(&rig, &["a", "b"]);
    let mut bridge = rig.bridge();
    prepared(&mut bridge, &mut writers);
    bridge.send("freeze", freeze_arguments(10_000));
    for writer in &mut writers {
        writer.answer("freeze", json!({"ok": true, "evidence": 7}));
    }
    let generation = bridge.next()["return"]["generation"].clone();
    bridge.send("thaw", json!({"set": "s", "generation": generation}));
    for writer in &mut writers {
        let evidence = long(600);
        writer.answer(
            "thaw",
            json!({"ok": true, "held": true, "evidence": evidence}),
        );
    }
    let thawed = bridge.next();
    let report = &thawed["return"]["writers"][0];
    assert_eq!(
        thawed["return"]["held"],
        false,
        "{:.300}",
        thawed.to_string()
    );
    assert_eq!(report["failure"]["code"], "OUTOFRESOURCES");
    assert_eq!(report["state"], "FAILED_AT_THAW");
}

#[test]
fn what_all_writers_say_has_room_together_and_the_one_too_much_refuses_the_set() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writers = registered(&rig, &["a", "b", "c", "d"]);
    let mut bridge = rig.bridge();
    let component = json!([{"name": "all", "metadata": long(100)}]);
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    for writer in &mut writers {
        writer.answer(
            "prepare_backup",
            json!({"ok": true, "components": component}),
        );
    }
    for writer in &mut writers {
        writer.expect_abort();
    }
    let error = bridge.next()["error"].clone();
    assert_eq!(error["code"], "WRITER_VETO", "{:.300}", error.to_string());
    let failed = error["writers"].as_array().unwrap().iter();
    assert_eq!(
        failed
            .filter(|report| report["failure"].is_object())
            .count(),
        1
    );
    // Three of them have room, and what they said before stays theirs.
    drop(writers.pop());
    wait_until("the fourth is gone", || {
        bridge.status()["writers"].as_array().unwrap().len() == 3
    });
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    for writer in &mut writers {
        writer.answer(
            "prepare_backup",
            json!({"ok": true, "components": component}),
        );
    }
    for writer in &mut writers {
        writer.agree("prepare_snapshot");
    }
    assert!(bridge.next()["return"].is_object());
    bridge.send("freeze", freeze_arguments(10_000));
    for writer in &mut writers {
        writer.answer("freeze", json!({"ok": true, "evidence": long(20)}));
    }
    let frozen = bridge.next()["return"].clone();
    assert_eq!(frozen["writers"].as_array().unwrap().len(), 3);
}

#[test]
fn documents_that_were_given_one_after_the_other_do_not_make_the_status_too_long() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let names = ["a", "b", "c"];
    for name in names {
        let mut writer = registered(&rig, &[name]).remove(0);
        let mut bridge = rig.bridge();
        bridge.send("identify", json!({}));
        writer.answer(
            "identify",
            json!({"ok": true, "metadata": {"version": long(400)}}),
        );
        assert!(bridge.next()["return"].is_object());
        drop(writer);
        wait_until("it is gone", || bridge.status()["writers"] == json!([]));
    }
    let _writers = registered(&rig, &names);
    let status = rig.bridge().status();
    let writers = status["writers"].as_array().unwrap().iter();
    let known = writers.filter(|writer| writer["metadata"].is_object());
    assert_eq!(known.count(), 1);
}

#[test]
fn a_refusal_of_many_words_is_told_with_its_code_and_its_first_words() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writers = registered(&rig, &["a"]);
    let mut bridge = rig.bridge();
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    let veto = json!({"ok": false, "code": "NONRETRYABLE", "message": long(900)});
    writers[0].answer("prepare_backup", veto);
    let reason = writers[0].expect_abort();
    assert!(reason.len() < 2_000, "{}", reason.len());
    let error = bridge.next()["error"].clone();
    assert_eq!(error["writers"][0]["failure"]["code"], "NONRETRYABLE");
    assert!(error["message"].as_str().unwrap().contains("xxx"));
}

/// Script writers have names of any bytes and are not counted: whoever made them, the guest must not stay frozen.
#[test]
fn an_answer_that_is_too_long_whoever_is_to_blame_leaves_nothing_frozen() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let name = "\u{1}".repeat(240);
    for number in 0..300 {
        rig.script(&format!("{name}{number}"), "freeze", "printf '%01100d' 7");
    }
    let mut bridge = rig.bridge();
    let prepared = bridge.prepare();
    assert_eq!(prepared["writers"].as_array().unwrap().len(), 300);
    let error = bridge.error("freeze", freeze_arguments(10_000));
    assert_eq!(error["code"], "INTERNAL", "{:.300}", error.to_string());
    assert!(error["message"].as_str().unwrap().contains("too long"));
    assert!(!is_frozen(&rig.mountpoint("a")));

    fs::remove_dir_all(rig.path("writers")).unwrap();
    fs::create_dir(rig.path("writers")).unwrap();
    assert_eq!(bridge.status()["frozen"], false);
}
