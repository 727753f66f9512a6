//! A writer that floods the agent loses its connection and its part in the set, and harms nobody else.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use rig::played::Played;
use rig::{Bridge, Rig, can_run, freeze_arguments, is_frozen, wait_until};
use serde_json::{Value, json};

/// Far more than may wait anywhere.
const LINES: usize = 200_000;

fn send_prepare(bridge: &mut Bridge, writers: &mut [&mut Played]) {
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    for writer in writers {
        writer.agree("prepare_backup");
    }
}

fn freeze(bridge: &mut Bridge, writers: &mut [&mut Played]) -> Value {
    for writer in writers.iter_mut() {
        writer.agree("prepare_snapshot");
    }
    assert!(bridge.next()["return"].is_object());
    bridge.send("freeze", freeze_arguments(10_000));
    for writer in writers.iter_mut() {
        writer.answer("freeze", json!({"ok": true, "evidence": 7}));
    }
    bridge.next()["return"]["generation"].clone()
}

/// One that is left alone goes through a set as if nothing had been.
fn goes_on_alone(bridge: &mut Bridge, writer: &mut Played) {
    send_prepare(bridge, &mut [writer]);
    let generation = freeze(bridge, &mut [writer]);
    bridge.send("thaw", json!({"set": "s", "generation": generation}));
    writer.answer("thaw", json!({"ok": true, "held": true, "evidence": 7}));
    assert_eq!(bridge.next()["return"]["held"], true);
}

#[test]
fn releases_without_end_cost_the_hold_and_nothing_else() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut flood = Played::registered(&rig, "flood", "BACK_END", 30_000);
    let mut other = Played::registered(&rig, "other", "BACK_END", 30_000);
    let mut bridge = rig.bridge();
    send_prepare(&mut bridge, &mut [&mut flood, &mut other]);
    let generation = freeze(&mut bridge, &mut [&mut flood, &mut other]);
    assert!(flood.repeat(&json!({"release": "again", "generation": 1}), LINES) < LINES);
    assert!(other.expect_abort().contains("without being asked"));
    let thaw = json!({"set": "s", "generation": generation});
    let error = bridge.error("thaw", thaw);
    assert_eq!(error["code"], "HOLD_BROKEN", "{error:#}");
    let report = &error["writers"][0];
    assert_eq!(report["state"], "FAILED_AT_THAW");
    let why = report["failure"]["message"].as_str().unwrap();
    assert!(why.contains("without being asked"), "{why}");
    assert!(flood.event()["refused"].is_string());
    assert!(!is_frozen(&rig.mountpoint("a")));
    goes_on_alone(&mut bridge, &mut other);
}

#[test]
fn progress_or_answers_without_end_fail_the_set() {
    if !can_run(&[]) {
        return;
    }
    for line in [json!({"progress": "row"}), json!({"ok": true})] {
        let rig = Rig::with("ext4");
        let mut flood = Played::registered(&rig, "flood", "BACK_END", 30_000);
        let mut other = Played::registered(&rig, "other", "BACK_END", 30_000);
        let mut bridge = rig.bridge();
        send_prepare(&mut bridge, &mut [&mut flood, &mut other]);
        let asked = flood.event()["seq"].as_u64().unwrap();
        other.agree("prepare_snapshot");
        // Its answers are to the event before.
        let mut line = line;
        let is_answer = line["ok"].is_boolean();
        line["seq"] = json!(if is_answer { asked - 1 } else { asked });
        assert!(flood.repeat(&line, LINES) < LINES);
        assert!(other.expect_abort().contains("without being asked"));
        let error = bridge.next()["error"].clone();
        assert_eq!(error["code"], "WRITER_NOT_RESPONDING", "{error:#}");
        goes_on_alone(&mut bridge, &mut other);
    }
}

#[test]
fn a_long_answer_that_crosses_an_abort_is_no_flood() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut late = Played::registered(&rig, "late", "BACK_END", 30_000);
    let mut other = Played::registered(&rig, "other", "BACK_END", 30_000);
    let mut bridge = rig.bridge();
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    let asked = late.event();
    other.answer(
        "prepare_backup",
        json!({"ok": false, "failure": "RETRYABLE"}),
    );
    other.expect_abort();
    let long = "x".repeat(300 << 10);
    late.write(&json!({"seq": asked["seq"], "ok": true, "components": [{"name": "all", "metadata": long}]}));
    late.expect_abort();
    assert_eq!(bridge.next()["error"]["code"], "WRITER_VETO");
    drop(other);
    wait_until("the other is gone", || {
        bridge.status()["writers"].as_array().unwrap().len() == 1
    });
    goes_on_alone(&mut bridge, &mut late);
}
