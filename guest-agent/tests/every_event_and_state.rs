//! What a connected writer is told at each event, and what becomes of each answer: kinds of backup and stamps, limits, order
//! of levels, states and codes of failure.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use rig::played::Played;
use rig::{Bridge, Rig, can_run, freeze_arguments, is_frozen, wait_until};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// What a writer may say of a failure, and whether it is worth another try.
const CODES: [(&str, bool); 8] = [
    ("INCONSISTENTSNAPSHOT", false),
    ("OUTOFRESOURCES", true),
    ("TIMEOUT", true),
    ("RETRYABLE", true),
    ("NONRETRYABLE", false),
    ("PARTIAL_FAILURE", true),
    ("RECOVERY_FAILED", false),
    ("STATUS_NOT_AVAILABLE", true),
];

fn returned(bridge: &mut Bridge) -> Value {
    let answer = bridge.next();
    assert!(answer.get("return").is_some(), "{answer:#}");
    answer["return"].clone()
}

fn failed(bridge: &mut Bridge) -> Value {
    let answer = bridge.next();
    assert!(answer.get("error").is_some(), "{answer:#}");
    answer["error"].clone()
}

fn refusal(code: &str) -> Value {
    json!({"ok": false, "code": code, "message": format!("why {code}")})
}

/// All are asked before any answers: a round that asked one after the other would not get here. Each hears an event of this
/// name and agrees.
fn agree_together(writers: &mut [Played], event: &str) -> Vec<Value> {
    let asked: Vec<Value> = writers.iter_mut().map(Played::event).collect();
    for (writer, asked) in writers.iter_mut().zip(&asked) {
        assert_eq!(asked["event"], event, "{asked}");
        writer.write(&json!({"seq": asked["seq"], "ok": true, "held": true, "evidence": 7}));
    }
    asked
}

fn prepare(bridge: &mut Bridge, writers: &mut [Played]) {
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    agree_together(writers, "prepare_backup");
    agree_together(writers, "prepare_snapshot");
    returned(bridge);
}

/// What the agent knows of the writer now.
fn info(bridge: &mut Bridge, name: &str) -> Value {
    let status = bridge.status();
    let writers = status["writers"].as_array().unwrap().iter();
    let mut named = writers.filter(|writer| writer["name"] == name);
    named.next().unwrap().clone()
}

/// From the prepared set to its end; both answers to the host.
fn finish(
    bridge: &mut Bridge,
    writer: &mut Played,
    post_snapshot: Value,
    backup_complete: Value,
) -> (Value, Value) {
    bridge.send("freeze", freeze_arguments(10_000));
    writer.agree("freeze");
    let generation = returned(bridge)["generation"].clone();
    bridge.send("thaw", json!({"set": "s", "generation": generation}));
    writer.answer("thaw", json!({"ok": true, "held": true, "evidence": 7}));
    assert_eq!(returned(bridge)["held"], true);
    bridge.send("post_snapshot", json!({"set": "s", "kept": true}));
    writer.answer("post_snapshot", post_snapshot);
    let posted = returned(bridge);
    bridge.send("backup_complete", json!({"set": "s", "succeeded": true}));
    writer.answer("backup_complete", backup_complete);
    (posted, returned(bridge))
}

#[test]
fn every_kind_of_backup_is_told_and_stamps_go_to_the_host_and_come_back() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    let stamped =
        |stamp: &str| json!({"ok": true, "components": [{"name": "orders", "stamp": stamp}]});
    // What each builds on, and at which of the two events it is stamped; what is said at the second one counts.
    let mut full = Value::Null;
    let mut last = Value::Null;
    for kind in ["full", "copy", "incremental", "differential", "log"] {
        let previous = match kind {
            "incremental" | "log" => last.clone(),
            "differential" => full.clone(),
            _ => Value::Null,
        };
        let mut component = json!({"logical_path": "", "name": "orders"});
        if !previous.is_null() {
            component["previous_stamp"] = previous;
        }
        let picked = json!([{"writer": "db", "components": [component]}]);
        let arguments = json!({"set": "s", "limit_ms": 20_000, "backup_type": kind,
            "component_mode": true, "components": picked});
        bridge.send("prepare", arguments);
        let first = format!("{kind} before");
        let event = writer.answer("prepare_backup", stamped(&first));
        assert_eq!(event["backup_type"], kind);
        assert_eq!(event["components"], json!([component]), "{kind}");
        writer.agree("prepare_snapshot");
        let prepared = returned(&mut bridge);
        let said = |answer: &Value| answer["writers"][0]["components"].clone();
        assert_eq!(said(&prepared)[0]["stamp"], first);
        let (posted, completed) =
            finish(&mut bridge, &mut writer, stamped(kind), json!({"ok": true}));
        assert_eq!(said(&posted)[0]["stamp"], kind);
        assert_eq!(said(&completed)[0]["stamp"], kind);
        assert_eq!(said(&completed).as_array().unwrap().len(), 1);
        if kind == "full" {
            full = json!(kind);
        }
        if kind != "copy" {
            last = json!(kind);
        }
    }
}

#[test]
fn a_failure_before_the_thaw_ends_the_set_with_the_writers_code_and_its_state() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    let events = [
        ("prepare_backup", "FAILED_AT_PREPARE_BACKUP"),
        ("prepare_snapshot", "FAILED_AT_PREPARE_SNAPSHOT"),
        ("freeze", "FAILED_AT_FREEZE"),
    ];
    for (at, state) in events {
        for (code, is_retryable) in CODES {
            bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
            for (event, _) in events {
                if event == "freeze" {
                    returned(&mut bridge);
                    bridge.send("freeze", freeze_arguments(10_000));
                }
                if event == at {
                    writer.answer(event, refusal(code));
                    break;
                }
                writer.agree(event);
            }
            assert!(writer.expect_abort().contains(code));
            let error = failed(&mut bridge);
            // One that says itself that it was too late is as one that says nothing.
            let wanted = match code {
                "TIMEOUT" => "WRITER_NOT_RESPONDING",
                _ => "WRITER_VETO",
            };
            assert_eq!(error["code"], wanted, "{at}: {error:#}");
            assert_eq!(error["retryable"], is_retryable, "{at}: {error:#}");
            let report = &error["writers"][0];
            assert_eq!(report["state"], state, "{error:#}");
            assert_eq!(report["failure"]["code"], code, "{error:#}");
            assert_eq!(report["failure"]["message"], format!("why {code}"));
            let known = info(&mut bridge, "db");
            assert_eq!(known["state"], state);
            assert_eq!(known["last_failure"], report["failure"]);
        }
    }
    assert!(!is_frozen(&rig.mountpoint("a")));
}

#[test]
fn a_failure_after_the_thaw_stands_in_the_report_with_the_writers_code_and_its_state() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    let agrees = || json!({"ok": true});
    for (code, _) in CODES {
        prepare(&mut bridge, std::slice::from_mut(&mut writer));
        let (posted, completed) = finish(&mut bridge, &mut writer, refusal(code), agrees());
        // What is said later takes nothing back.
        for answer in [posted, completed] {
            let report = &answer["writers"][0];
            assert_eq!(report["state"], "FAILED_AT_POST_SNAPSHOT", "{answer:#}");
            assert_eq!(report["failure"]["code"], code);
        }
        assert_eq!(info(&mut bridge, "db")["state"], "FAILED_AT_POST_SNAPSHOT");
        prepare(&mut bridge, std::slice::from_mut(&mut writer));
        let (posted, completed) = finish(&mut bridge, &mut writer, agrees(), refusal(code));
        assert_eq!(posted["writers"][0].get("failure"), None);
        let report = &completed["writers"][0];
        assert_eq!(report["state"], "FAILED_AT_BACKUP_COMPLETE", "{report:#}");
        assert_eq!(report["failure"]["code"], code);
        let known = info(&mut bridge, "db");
        assert_eq!(known["state"], "FAILED_AT_BACKUP_COMPLETE");
        assert_eq!(known["last_failure"]["code"], code);
    }
}

#[test]
fn a_failure_when_the_requester_has_gone_is_told_to_the_next_one() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    for (code, _) in CODES {
        prepare(&mut bridge, std::slice::from_mut(&mut writer));
        bridge.send("freeze", freeze_arguments(10_000));
        writer.agree("freeze");
        let generation = returned(&mut bridge)["generation"].clone();
        bridge.send("thaw", json!({"set": "s", "generation": generation}));
        writer.answer("thaw", json!({"ok": true, "held": true, "evidence": 7}));
        returned(&mut bridge);
        bridge.send("post_snapshot", json!({"set": "s", "kept": true}));
        writer.agree("post_snapshot");
        returned(&mut bridge);
        drop(bridge);
        writer.answer("backup_shutdown", refusal(code));
        bridge = rig.bridge();
        let mut known = Value::Null;
        wait_until("the answer is taken", || {
            known = info(&mut bridge, "db");
            known["state"] == "FAILED_AT_BACKUPSHUTDOWN"
        });
        assert_eq!(known["last_failure"]["code"], code);
        assert_eq!(bridge.status().get("incomplete"), None);
    }
}

#[test]
fn a_failed_component_is_told_beside_those_that_did_not_fail() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    prepare(&mut bridge, std::slice::from_mut(&mut writer));
    let failure = json!({"code": "OUTOFRESOURCES", "message": "too many"});
    let components =
        json!([{"name": "orders", "failure": failure}, {"name": "people", "stamp": "9"}]);
    let mut partial = refusal("PARTIAL_FAILURE");
    partial["components"] = components;
    let (posted, completed) = finish(&mut bridge, &mut writer, partial, json!({"ok": true}));
    for answer in [posted, completed] {
        let report = &answer["writers"][0];
        assert_eq!(report["failure"]["code"], "PARTIAL_FAILURE");
        assert_eq!(report["components"][0]["failure"], failure);
        assert_eq!(report["components"][1]["stamp"], "9");
        assert_eq!(report["components"][1].get("failure"), None);
    }
}

#[test]
fn a_writer_that_calls_a_failed_component_no_failure_has_failed_all_the_same() {
    if !can_run(&[]) {
        return;
    }
    let failure = json!({"code": "OUTOFRESOURCES", "message": "too many"});
    let partial = json!({"ok": true, "components": [{"name": "orders", "failure": failure}]});

    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    writer.answer("prepare_backup", partial.clone());
    writer.agree("abort");
    let refused = failed(&mut bridge);
    assert!(
        refused.to_string().contains("component orders: too many"),
        "{refused:#}"
    );

    prepare(&mut bridge, std::slice::from_mut(&mut writer));
    let (posted, _) = finish(&mut bridge, &mut writer, partial, json!({"ok": true}));
    let report = &posted["writers"][0];
    assert_eq!(report["state"], "FAILED_AT_POST_SNAPSHOT", "{posted:#}");
    assert_eq!(report["failure"]["code"], "PARTIAL_FAILURE");
    assert_eq!(report["components"][0]["failure"], failure);
}

#[test]
fn levels_are_asked_one_after_the_other_and_thawed_in_reverse_and_inside_a_level_all_at_once() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut levels = ["FRONT_END", "BACK_END", "SYSTEM"].map(|level| {
        ["one", "two"]
            .map(|name| Played::registered(&rig, &format!("{level} {name}"), level, 9_000))
    });
    let mut bridge = rig.bridge();
    let together = |levels: &mut [[Played; 2]; 3], event: &str| {
        agree_together(levels.as_flattened_mut(), event);
    };
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    together(&mut levels, "prepare_backup");
    together(&mut levels, "prepare_snapshot");
    returned(&mut bridge);
    bridge.send("freeze", freeze_arguments(10_000));
    one_level_after_the_other(&mut bridge, &mut levels, &[0, 1, 2], "freeze");
    let frozen = returned(&mut bridge);
    let generation = frozen["generation"].clone();
    bridge.send("thaw", json!({"set": "s", "generation": generation}));
    one_level_after_the_other(&mut bridge, &mut levels, &[2, 1, 0], "thaw");
    let thawed = returned(&mut bridge);
    assert_eq!(thawed["held"], true, "{thawed:#}");
    bridge.send("post_snapshot", json!({"set": "s", "kept": true}));
    together(&mut levels, "post_snapshot");
    returned(&mut bridge);
    bridge.send("backup_complete", json!({"set": "s", "succeeded": true}));
    together(&mut levels, "backup_complete");
    returned(&mut bridge);
}

/// Writers of a level are asked together, and those of the next only when both have answered.
fn one_level_after_the_other(
    bridge: &mut Bridge,
    levels: &mut [[Played; 2]; 3],
    order: &[usize],
    event: &str,
) {
    for (place, level) in order.iter().enumerate() {
        let asked: Vec<Value> = levels[*level].iter_mut().map(Played::event).collect();
        for (number, asked) in asked.iter().enumerate() {
            assert_eq!(asked["event"], event, "{asked}");
            // What the agent had sent by now would be there: it has answered something else since.
            bridge.status();
            for later in &order[place + 1..] {
                for writer in &mut levels[*later] {
                    let early = writer.event_within(Duration::from_millis(20));
                    assert_eq!(early, None, "level {later} beside {level}");
                }
            }
            levels[*level][number]
                .write(&json!({"seq": asked["seq"], "ok": true, "held": true, "evidence": 7}));
        }
    }
}

#[test]
fn a_level_that_refuses_leaves_the_later_ones_unfrozen() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writers = ["FRONT_END", "BACK_END", "SYSTEM"]
        .map(|level| Played::registered(&rig, level, level, 9_000));
    let mut bridge = rig.bridge();
    prepare(&mut bridge, &mut writers);
    bridge.send("freeze", freeze_arguments(10_000));
    let [front, back, system] = &mut writers;
    front.agree("freeze");
    back.answer("freeze", refusal("RETRYABLE"));
    // The next that it hears is the end; and all hear it in the order of a thaw.
    for writer in [system, back, front] {
        assert!(writer.expect_abort().contains("why RETRYABLE"));
    }
    let error = failed(&mut bridge);
    assert_eq!(error["code"], "WRITER_VETO");
    assert_eq!(error["writers"][1]["state"], "FAILED_AT_FREEZE");
    assert!(!is_frozen(&rig.mountpoint("a")));
}

/// In milliseconds.
fn deadline(event: &Value) -> u64 {
    event["deadline_ms"].as_u64().unwrap()
}

#[test]
fn every_event_carries_the_limit_of_its_step() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let registration = json!({"protocol": 1, "class_id": "test", "instance_id": "db", "name": "db",
        "freeze_timeout_ms": 7_000, "prepare_timeout_ms": 9_000});
    let mut writer = Played::connect(&rig, &registration);
    writer.event();
    let mut bridge = rig.bridge();
    let limited = |event: &Value, limit_ms: u64| {
        // The event says what is left when it is sent, which is at once.
        assert!((1..=limit_ms).contains(&deadline(event)), "{event}");
        assert!(deadline(event) > limit_ms / 2, "{event}");
    };
    bridge.send("identify", json!({}));
    limited(&writer.agree("identify"), 30_000);
    returned(&mut bridge);
    bridge.send("prepare", json!({"set": "s", "limit_ms": 60_000}));
    limited(&writer.agree("prepare_backup"), 9_000);
    limited(&writer.agree("prepare_snapshot"), 9_000);
    returned(&mut bridge);
    bridge.send("freeze", freeze_arguments(10_000));
    let event = writer.agree("freeze");
    limited(&event, 7_000);
    assert!(event["hold_ms"].as_u64().unwrap() <= 7_000, "{event}");
    let generation = returned(&mut bridge)["generation"].clone();
    bridge.send("thaw", json!({"set": "s", "generation": generation}));
    limited(
        &writer.answer("thaw", json!({"ok": true, "held": true, "evidence": 7})),
        10_000,
    );
    returned(&mut bridge);
    bridge.send("post_snapshot", json!({"set": "s", "kept": true}));
    limited(&writer.agree("post_snapshot"), 600_000);
    returned(&mut bridge);
    bridge.send("backup_complete", json!({"set": "s", "succeeded": true}));
    limited(&writer.agree("backup_complete"), 60_000);
    returned(&mut bridge);
    let restore = json!({"set": "r", "limit_ms": 50_000, "writers": [{"writer": "db"}]});
    bridge.send("pre_restore", restore.clone());
    limited(&writer.agree("pre_restore"), 50_000);
    returned(&mut bridge);
    bridge.send("post_restore", restore);
    limited(&writer.agree("post_restore"), 50_000);
    returned(&mut bridge);
    // The host's own limits, where they are shorter; and the end of a set, whenever it comes.
    bridge.send("prepare", json!({"set": "s", "limit_ms": 8_000}));
    limited(&writer.agree("prepare_backup"), 8_000);
    limited(&writer.agree("prepare_snapshot"), 8_000);
    returned(&mut bridge);
    let freeze = json!({"set": "s", "hold_ms": 10_000, "writer_ms": 6_000});
    bridge.send("freeze", freeze);
    let event = writer.agree("freeze");
    limited(&event, 6_000);
    assert!(event["hold_ms"].as_u64().unwrap() <= 6_000, "{event}");
    returned(&mut bridge);
    drop(bridge);
    limited(&writer.agree("abort"), 10_000);
}

/// The time that one writer takes is gone from that of those that come after it.
#[test]
fn what_is_left_of_a_limit_is_less_for_those_that_are_asked_later() {
    if !can_run(&[]) {
        return;
    }
    let took = Duration::from_millis(400);
    let rig = Rig::with("ext4");
    let mut writers = ["FRONT_END", "BACK_END", "SYSTEM"]
        .map(|level| Played::registered(&rig, level, level, 60_000));
    let mut bridge = rig.bridge();
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    let asked = writers.each_mut().map(Played::event);
    lasts(took);
    for (writer, asked) in writers.iter_mut().zip(&asked) {
        writer.write(&json!({"seq": asked["seq"], "ok": true}));
    }
    let then = agree_together(&mut writers, "prepare_snapshot");
    for (before, after) in asked.iter().zip(&then) {
        assert!(is_less(before, after, took), "{before}, then {after}");
    }
    returned(&mut bridge);
    let freeze = json!({"set": "s", "hold_ms": 10_000, "writer_ms": 20_000});
    bridge.send("freeze", freeze);
    let mut before: Option<Value> = None;
    for writer in &mut writers {
        let event = writer.event();
        assert_eq!(event["event"], "freeze");
        if let Some(before) = before {
            assert!(is_less(&before, &event, took), "{before}, then {event}");
            let hold = |event: &Value| event["hold_ms"].as_u64().unwrap();
            assert!(hold(&event) < hold(&before), "{before}, then {event}");
        }
        lasts(took);
        writer.write(&json!({"seq": event["seq"], "ok": true, "evidence": 7}));
        before = Some(event);
    }
    returned(&mut bridge);
    bridge.send("abort", json!({"set": "s", "reason": "test"}));
    for writer in writers.iter_mut().rev() {
        writer.expect_abort();
    }
    returned(&mut bridge);
}

/// A writer is at work for so long.
fn lasts(time: Duration) {
    let end = Instant::now() + time;
    wait_until("its work is done", || Instant::now() >= end);
}

fn is_less(before: &Value, after: &Value, took: Duration) -> bool {
    // Each is cut to milliseconds.
    let took_ms = u64::try_from(took.as_millis()).unwrap() - 1;
    deadline(after) + took_ms <= deadline(before)
}
