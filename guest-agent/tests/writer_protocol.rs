//! The whole writer protocol against the real agent: components, the end of a backup, restores, progress, early release.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use rig::played::Played;
use rig::{Bridge, Probe, Rig, can_run, freeze_arguments, is_frozen, wait_until};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

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

fn state(bridge: &mut Bridge, name: &str) -> Value {
    let status = bridge.status();
    let writers = status["writers"].as_array().unwrap().iter();
    let mut named = writers.filter(|writer| writer["name"] == name);
    named.next().unwrap()["state"].clone()
}

fn no_more(writer: &mut Played, bridge: &mut Bridge) {
    // Whatever was sent before this is there before it.
    bridge.send("identify", json!({}));
    writer.agree("identify");
    returned(bridge);
}

/// From the prepared set to the answer of `post_snapshot`.
fn take(bridge: &mut Bridge, writer: &mut Played, set: &str, post: Value) -> Value {
    bridge.send(
        "freeze",
        json!({"set": set, "hold_ms": 10_000, "writer_ms": 60_000}),
    );
    writer.agree("freeze");
    let generation = returned(bridge)["generation"].clone();
    bridge.send("thaw", json!({"set": set, "generation": generation}));
    writer.answer("thaw", json!({"ok": true, "held": true, "evidence": 7}));
    assert_eq!(returned(bridge)["held"], true);
    let mut arguments = json!({"set": set, "kept": true});
    arguments
        .as_object_mut()
        .unwrap()
        .extend(post.as_object().unwrap().clone());
    bridge.send("post_snapshot", arguments);
    let event = writer.agree("post_snapshot");
    returned(bridge);
    event
}

fn take_set(bridge: &mut Bridge, writer: &mut Played, set: &str, post: Value) -> Value {
    bridge.send("prepare", json!({"set": set, "limit_ms": 20_000}));
    writer.agree_to_prepare();
    returned(bridge);
    take(bridge, writer, set, post)
}

fn document(names: &[&str]) -> Value {
    let components: Vec<Value> = names
        .iter()
        .map(|name| json!({"type": "database", "logical_path": "main", "name": name}))
        .collect();
    json!({"ok": true, "metadata": {"restore_method": {"method": "CUSTOM"}, "components": components}})
}

#[test]
fn component_mode_asks_only_writers_of_picked_components_and_carries_what_they_say_of_them() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut other = Played::registered(&rig, "other", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    bridge.send("identify", json!({}));
    writer.answer("identify", document(&["orders", "people"]));
    other.agree("identify");
    returned(&mut bridge);
    let picked = json!([
        {"logical_path": "main", "name": "orders", "previous_stamp": "monday"},
        {"logical_path": "main", "name": "people"}
    ]);
    bridge.send(
        "prepare",
        json!({"set": "s", "backup_type": "incremental", "limit_ms": 20_000, "component_mode": true,
               "partial_files": true, "components": [{"writer": "db", "components": picked}]}),
    );
    let event = writer.answer(
        "prepare_backup",
        json!({"ok": true, "components": [
            {"logical_path": "main", "name": "orders", "stamp": "tuesday"}]}),
    );
    assert_eq!(event["components"], picked);
    assert_eq!(event["component_mode"], true);
    assert_eq!(event["backup_type"], "incremental");
    assert_eq!(event["partial_files"], true);
    // Its veto does not count: nothing of it is backed up.
    let event = other.answer(
        "prepare_backup",
        json!({"ok": false, "code": "NONRETRYABLE", "message": "never"}),
    );
    assert_eq!(event.get("components"), None);
    writer.agree("prepare_snapshot");
    let prepared = returned(&mut bridge);
    assert_eq!(prepared["writers"].as_array().unwrap().len(), 1);
    let left_out = &prepared["left_out"][0];
    assert_eq!(left_out["name"], "other");
    assert_eq!(left_out["state"], "FAILED_AT_PREPARE_BACKUP");
    take(&mut bridge, &mut writer, "s", json!({}));
    bridge.send(
        "backup_complete",
        json!({"set": "s", "succeeded": true, "components": [{"writer": "test", "components": [
            {"logical_path": "main", "name": "people", "succeeded": false}]}]}),
    );
    let event = writer.answer(
        "backup_complete",
        json!({"ok": true, "components": [
            {"logical_path": "main", "name": "orders", "metadata": {"label": 5}}]}),
    );
    assert_eq!(
        event["components"],
        json!([
            {"logical_path": "main", "name": "orders", "succeeded": true},
            {"logical_path": "main", "name": "people", "succeeded": false}
        ])
    );
    // What it said at both events is one report of the component.
    let said = &returned(&mut bridge)["writers"][0]["components"][0];
    assert_eq!(said["stamp"], "tuesday");
    assert_eq!(said["metadata"]["label"], 5);
    no_more_for(&mut other, &mut writer, &mut bridge);
}

fn no_more_for(other: &mut Played, writer: &mut Played, bridge: &mut Bridge) {
    bridge.send("identify", json!({}));
    other.agree("identify");
    writer.agree("identify");
    returned(bridge);
}

#[test]
fn a_component_or_a_writer_that_is_not_there_refuses_the_set_before_anybody_hears_of_it() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    bridge.send("identify", json!({}));
    writer.answer("identify", document(&["orders"]));
    returned(&mut bridge);
    let mut prepare = |name: &str, component: &str| {
        let picked = json!([{"logical_path": "main", "name": component}]);
        let arguments = json!({"set": "s", "limit_ms": 20_000, "component_mode": true,
            "components": [{"writer": name, "components": picked}]});
        bridge.error("prepare", arguments)
    };
    assert_eq!(prepare("db", "invoices")["code"], "BAD_REQUEST");
    let absent = prepare("queue", "orders");
    assert_eq!(absent["code"], "WRITER_VETO");
    assert!(absent["message"].as_str().unwrap().contains("queue"));
    no_more(&mut writer, &mut bridge);
}

#[test]
fn a_document_that_is_not_understood_fails_at_identify_and_is_kept_for_status() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    for (metadata, why) in [
        (json!({"components": [{"type": "table"}]}), "table"),
        (
            json!({"components": [{"type": "database", "name": "a"}]}),
            "restore_method",
        ),
        (json!("text"), "metadata"),
    ] {
        bridge.send("identify", json!({}));
        writer.answer("identify", json!({"ok": true, "metadata": metadata}));
        let info = returned(&mut bridge)["writers"][0].clone();
        assert_eq!(info["state"], "FAILED_AT_IDENTIFY");
        let message = info["last_failure"]["message"].as_str().unwrap().to_owned();
        assert!(message.contains(why), "{message}");
    }
    assert_eq!(state(&mut bridge, "db"), "FAILED_AT_IDENTIFY");
    bridge.send("identify", json!({}));
    writer.answer("identify", document(&["orders"]));
    returned(&mut bridge);
    assert_eq!(state(&mut bridge, "db"), "STABLE");
}

#[test]
fn a_document_without_end_costs_its_own_writer_and_no_other() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut long = Played::registered(&rig, "long", "BACK_END", 5_000);
    let mut writer = Played::registered(&rig, "other", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    bridge.send("identify", json!({}));
    let version = "x".repeat(900_000);
    long.answer(
        "identify",
        json!({"ok": true, "metadata": {"version": version}}),
    );
    writer.answer("identify", document(&["orders"]));
    let writers = returned(&mut bridge)["writers"].clone();
    assert_eq!(writers[0]["state"], "FAILED_AT_IDENTIFY");
    assert_eq!(writers[0]["last_failure"]["code"], "OUTOFRESOURCES");
    assert_eq!(writers[0].get("metadata"), None);
    assert_eq!(writers[1]["metadata"]["components"][0]["name"], "orders");
}

#[test]
fn the_state_of_a_failed_set_outlives_it_and_another_identify_until_the_next_set() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    writer.agree("prepare_backup");
    writer.answer(
        "prepare_snapshot",
        json!({"ok": false, "code": "OUTOFRESOURCES", "message": "no connection is left"}),
    );
    writer.expect_abort();
    failed(&mut bridge);
    no_more(&mut writer, &mut bridge);
    assert_eq!(state(&mut bridge, "db"), "FAILED_AT_PREPARE_SNAPSHOT");
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    writer.agree("prepare_backup");
    // It is asked for the snapshot when its answer has been taken; `status` is answered meanwhile.
    let asked = writer.event();
    assert_eq!(asked["event"], "prepare_snapshot", "{asked}");
    assert_eq!(state(&mut bridge, "db"), "STABLE");
    writer.write(&json!({"seq": asked["seq"], "ok": true}));
    returned(&mut bridge);
    assert_eq!(state(&mut bridge, "db"), "WAITING_FOR_FREEZE");
}

#[test]
fn the_copies_are_told_and_a_kept_set_waits_for_its_backup_in_no_other_sets_way() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    let snapshots = json!([{"serial": "data", "snapshot": "6a7c"}]);
    let post = json!({"snapshots": snapshots, "mount": "/copy"});
    let event = take_set(&mut bridge, &mut writer, "first", post);
    assert_eq!(event["snapshots"], snapshots);
    assert_eq!(event["mount"], "/copy");
    assert_eq!(state(&mut bridge, "db"), "WAITING_FOR_BACKUP_COMPLETE");
    take_set(&mut bridge, &mut writer, "second", json!({}));
    assert_eq!(bridge.status()["incomplete"], json!(["first", "second"]));
    let again = bridge.error("prepare", json!({"set": "first", "limit_ms": 20_000}));
    assert_eq!(again["code"], "BAD_REQUEST");
    for (set, succeeded) in [("first", false), ("second", true)] {
        bridge.send(
            "backup_complete",
            json!({"set": set, "succeeded": succeeded}),
        );
        let event = writer.agree("backup_complete");
        assert_eq!(event["set"], set);
        assert_eq!(event["succeeded"], succeeded);
        returned(&mut bridge);
    }
    assert_eq!(state(&mut bridge, "db"), "STABLE");
    let gone = bridge.error(
        "backup_complete",
        json!({"set": "first", "succeeded": true}),
    );
    assert_eq!(gone["code"], "SET_NOT_FOUND");
}

#[test]
fn a_requester_that_goes_shuts_its_backups_down_but_for_those_that_outlive_it() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    take_set(&mut bridge, &mut writer, "bound", json!({}));
    take_set(&mut bridge, &mut writer, "free", json!({"detached": true}));
    drop(bridge);
    assert_eq!(writer.agree("backup_shutdown")["set"], "bound");
    let mut bridge = rig.bridge();
    assert_eq!(bridge.status()["incomplete"], json!(["free"]));
    bridge.send("backup_complete", json!({"set": "free", "succeeded": true}));
    assert_eq!(writer.agree("backup_complete")["set"], "free");
    returned(&mut bridge);
}

#[test]
fn one_waiting_set_too_many_shuts_the_oldest_down() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    for number in 0..65 {
        let set = number.to_string();
        take_set(&mut bridge, &mut writer, &set, json!({"detached": true}));
    }
    assert_eq!(writer.agree("backup_shutdown")["set"], "0");
    let waiting = bridge.status()["incomplete"].as_array().unwrap().len();
    assert_eq!(waiting, 64);
}

#[test]
fn a_kept_set_can_still_be_given_up() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    take_set(&mut bridge, &mut writer, "s", json!({"detached": true}));
    bridge.send("abort", json!({"set": "s", "reason": "it was deleted"}));
    assert_eq!(writer.expect_abort(), "it was deleted");
    returned(&mut bridge);
    assert_eq!(bridge.status().get("incomplete"), None);
}

#[test]
fn progress_gives_a_preparing_writer_time_and_a_silent_one_is_taken_for_stuck() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let limit = Duration::from_millis(700);
    let mut writer = Played::connect(
        &rig,
        &json!({"protocol": 1, "class_id": "test", "instance_id": "db", "name": "db",
                "freeze_timeout_ms": 5_000, "prepare_timeout_ms": 700}),
    );
    assert_eq!(writer.event()["protocol"], 1);
    let mut bridge = rig.bridge();
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    writer.agree("prepare_backup");
    let event = writer.event();
    assert_eq!(event["event"], "prepare_snapshot");
    let start = Instant::now();
    while start.elapsed() < limit * 3 {
        writer.write(&json!({"seq": event["seq"], "progress": "checkpoint"}));
        std::thread::park_timeout(limit / 20);
    }
    writer.write(&json!({"seq": event["seq"], "ok": true}));
    returned(&mut bridge);
    bridge.send("abort", json!({"set": "s", "reason": "test"}));
    writer.expect_abort();
    returned(&mut bridge);
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    writer.agree("prepare_backup");
    assert_eq!(writer.event()["event"], "prepare_snapshot");
    // Progress on something else is none on this.
    writer.write(&json!({"seq": 1, "progress": "nothing"}));
    writer.expect_abort();
    assert_eq!(failed(&mut bridge)["code"], "WRITER_NOT_RESPONDING");
}

#[test]
fn progress_does_not_extend_the_requesters_limit_or_a_freeze() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 700);
    let mut bridge = rig.bridge();
    let stall = |bridge: &mut Bridge, writer: &mut Played, event: &Value| {
        // It is at work until the agent has had enough.
        let id = event["seq"].clone();
        let aborted = loop {
            writer.write(&json!({"seq": id, "progress": "still"}));
            if let Some(next) = writer.event_within(Duration::from_millis(20)) {
                break next;
            }
        };
        assert_eq!(aborted["event"], "abort", "{aborted}");
        writer.write(&json!({"seq": aborted["seq"], "ok": true}));
        assert_eq!(failed(bridge)["code"], "WRITER_NOT_RESPONDING");
    };
    bridge.send("prepare", json!({"set": "s", "limit_ms": 600}));
    let event = writer.event();
    assert_eq!(event["event"], "prepare_backup");
    stall(&mut bridge, &mut writer, &event);
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    writer.agree_to_prepare();
    returned(&mut bridge);
    bridge.send("freeze", freeze_arguments(10_000));
    let event = writer.event();
    assert_eq!(event["event"], "freeze");
    stall(&mut bridge, &mut writer, &event);
    assert!(!is_frozen(&rig.mountpoint("a")));
}

#[test]
fn a_writer_that_resumes_early_ends_the_hold_at_once() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 30_000);
    let mut bridge = rig.bridge();
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
    writer.agree_to_prepare();
    returned(&mut bridge);
    bridge.send("freeze", freeze_arguments(10_000));
    let event = writer.agree("freeze");
    let generation = returned(&mut bridge)["generation"].clone();
    let mut probe = Probe::start(&rig.mountpoint("a"));
    probe.wait_blocked();
    // One of an earlier hold says nothing about this one.
    let earlier = event["generation"].as_u64().unwrap() - 1;
    writer.write(&json!({"release": "long ago", "generation": earlier}));
    assert_eq!(bridge.status()["frozen"], true);
    writer.write(&json!({"release": "my lock is gone", "generation": event["generation"]}));
    assert!(writer.expect_abort().contains("my lock is gone"));
    probe.wait_done();
    wait_until("all is thawed", || bridge.status()["frozen"] == false);
    let error = bridge.error("thaw", json!({"set": "s", "generation": generation}));
    assert_eq!(error["code"], "HOLD_BROKEN");
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("my lock is gone")
    );
    assert_eq!(error["writers"][0]["held"], false);
    assert_eq!(error["writers"][0]["state"], "FAILED_AT_THAW");
}

#[test]
fn a_restore_tells_the_writers_named_before_and_after_with_what_they_had_stored() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut other = Played::registered(&rig, "other", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    let component = json!({"logical_path": "main", "name": "orders", "stamp": "tuesday",
        "metadata": {"label": 5}, "additional_restores": false});
    let mut restored = component.clone();
    restored["restored"] = json!("ALL");
    let restore = |component: &Value| json!({"set": "r", "writers": [{"writer": "db", "components": [component]}]});
    bridge.send("pre_restore", restore(&component));
    let event = writer.answer(
        "pre_restore",
        json!({"ok": true, "components": [
            {"logical_path": "main", "name": "orders", "target": "ALTERNATE"}]}),
    );
    assert_eq!(event["components"], json!([component]));
    let said = returned(&mut bridge);
    assert_eq!(said["writers"][0]["components"][0]["target"], "ALTERNATE");
    assert_eq!(bridge.status()["set"], "r");
    let busy = bridge.error("prepare", json!({"set": "s", "limit_ms": 20_000}));
    assert_eq!(busy["code"], "SNAPSHOT_SET_IN_PROGRESS");
    bridge.send("post_restore", restore(&restored));
    let event = writer.answer(
        "post_restore",
        json!({"ok": false, "code": "RECOVERY_FAILED", "message": "page 7"}),
    );
    assert_eq!(event["components"][0]["restored"], "ALL");
    let report = returned(&mut bridge)["writers"][0].clone();
    assert_eq!(report["state"], "FAILED_AT_POST_RESTORE");
    assert_eq!(report["failure"]["code"], "RECOVERY_FAILED");
    assert_eq!(bridge.status()["set"], Value::Null);
    no_more_for(&mut other, &mut writer, &mut bridge);
}

#[test]
fn a_restore_that_is_refused_or_that_the_host_leaves_is_aborted() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut second = Played::registered(&rig, "second", "SYSTEM", 5_000);
    let mut bridge = rig.bridge();
    let restore = json!({"set": "r", "writers": [{"writer": "test"}]});
    bridge.send("pre_restore", restore.clone());
    writer.agree("pre_restore");
    second.answer(
        "pre_restore",
        json!({"ok": false, "code": "RETRYABLE", "message": "people are at work"}),
    );
    for writer in [&mut writer, &mut second] {
        assert!(writer.expect_abort().contains("people are at work"));
    }
    assert_eq!(failed(&mut bridge)["code"], "WRITER_VETO");
    assert_eq!(state(&mut bridge, "second"), "FAILED_AT_PRE_RESTORE");
    let after = bridge.error("post_restore", restore.clone());
    assert_eq!(after["code"], "SET_NOT_FOUND");
    bridge.send("pre_restore", restore);
    writer.agree("pre_restore");
    second.agree("pre_restore");
    returned(&mut bridge);
    drop(bridge);
    for writer in [&mut writer, &mut second] {
        assert!(writer.expect_abort().contains("host"));
    }
    let nobody = json!({"set": "r", "writers": [{"writer": "nobody"}]});
    assert_eq!(
        rig.bridge().error("pre_restore", nobody)["code"],
        "WRITER_VETO"
    );
}

#[test]
fn scripts_hear_restores_and_the_end_of_a_backup_and_never_take_a_failed_one_for_complete() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let heard = rig.path("run/heard");
    for event in [
        "prepare-backup",
        "backup-complete",
        "backup-shutdown",
        "pre-restore",
        "post-restore",
    ] {
        let line = format!("echo {event} $VSS_SET >> {}", heard.display());
        rig.script("db", event, &line);
    }
    let mut bridge = rig.bridge();
    for (set, succeeded) in [("good", true), ("bad", false)] {
        bridge.ok("prepare", json!({"set": set, "limit_ms": 20_000}));
        let freeze = json!({"set": set, "hold_ms": 10_000, "writer_ms": 60_000});
        let frozen = bridge.ok("freeze", freeze);
        let generation = frozen["generation"].clone();
        bridge.ok("thaw", json!({"set": set, "generation": generation}));
        bridge.ok("post_snapshot", json!({"set": set, "kept": true}));
        bridge.ok(
            "backup_complete",
            json!({"set": set, "succeeded": succeeded}),
        );
    }
    let restore = json!({"set": "r", "writers": [{"writer": "script:db"}]});
    bridge.ok("pre_restore", restore.clone());
    bridge.ok("post_restore", restore);
    let heard = std::fs::read_to_string(heard).unwrap();
    assert_eq!(
        heard.lines().collect::<Vec<_>>(),
        [
            "prepare-backup good",
            "backup-complete good",
            "prepare-backup bad",
            "backup-shutdown bad",
            "pre-restore r",
            "post-restore r"
        ]
    );
}
