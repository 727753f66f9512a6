//! Script writers and connected writers in real sets: vetoes, hangs, losses, order, trust.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use rig::played::Played;
use rig::{Bridge, Probe, Rig, can_run, freeze_arguments, is_frozen, wait_until};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

fn finish_prepare(bridge: &mut Bridge) {
    let answer = bridge.next();
    assert!(answer.get("return").is_some(), "{answer:#}");
}

fn send_prepare(bridge: &mut Bridge) {
    bridge.send("prepare", json!({"set": "s", "limit_ms": 20_000}));
}

#[test]
fn a_connected_writer_goes_through_a_whole_set() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    bridge.send("identify", json!({}));
    writer.answer(
        "identify",
        json!({"ok": true, "metadata": {"class_id": "somebody-else", "restore_method": {"method": "CUSTOM"},
            "components": [{"type": "database", "name": "orders"}]}}),
    );
    let identified = bridge.next();
    let info = &identified["return"]["writers"][0];
    assert_eq!(info["level"], "BACK_END");
    assert_eq!(info["metadata"]["components"][0]["name"], "orders");
    assert_eq!(info["metadata"]["class_id"], "test");
    send_prepare(&mut bridge);
    let event = writer.agree("prepare_backup");
    assert_eq!(event["backup_type"], "copy");
    writer.agree("prepare_snapshot");
    finish_prepare(&mut bridge);
    bridge.send("freeze", freeze_arguments(10_000));
    let event = writer.answer("freeze", json!({"ok": true, "evidence": 7}));
    assert!(event["hold_ms"].as_u64().unwrap() <= 5_000);
    let frozen = bridge.next()["return"].clone();
    assert_eq!(frozen["writers"][0]["state"], "WAITING_FOR_THAW");
    assert_eq!(frozen["writers"][0]["evidence"], 7);
    let generation = frozen["generation"].clone();
    bridge.send("thaw", json!({"set": "s", "generation": generation}));
    writer.answer("thaw", json!({"ok": true, "held": true, "evidence": 7}));
    let thawed = bridge.next()["return"].clone();
    assert_eq!(thawed["held"], true, "{thawed:#}");
    bridge.send("post_snapshot", json!({"set": "s", "kept": true}));
    writer.agree("post_snapshot");
    let said = bridge.next();
    let state = &said["return"]["writers"][0]["state"];
    assert_eq!(state, "WAITING_FOR_BACKUP_COMPLETE");
    bridge.send("backup_complete", json!({"set": "s", "succeeded": true}));
    assert_eq!(writer.agree("backup_complete")["succeeded"], true);
    assert_eq!(bridge.next()["return"]["writers"][0]["state"], "STABLE");
}

#[test]
fn a_writer_that_does_not_say_held_or_whose_evidence_changes_did_not_hold() {
    if !can_run(&[]) {
        return;
    }
    for reply in [
        json!({"ok": true}),
        json!({"ok": true, "held": false, "evidence": 7}),
        json!({"ok": true, "held": true, "evidence": 8}),
        json!({"ok": false, "code": "RETRYABLE", "message": "lost"}),
    ] {
        let rig = Rig::with("ext4");
        let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
        let mut bridge = rig.bridge();
        send_prepare(&mut bridge);
        writer.agree_to_prepare();
        finish_prepare(&mut bridge);
        bridge.send("freeze", freeze_arguments(10_000));
        writer.answer("freeze", json!({"ok": true, "evidence": 7}));
        let generation = bridge.next()["return"]["generation"].clone();
        bridge.send("thaw", json!({"set": "s", "generation": generation}));
        writer.answer("thaw", reply.clone());
        let thawed = bridge.next()["return"].clone();
        assert_eq!(thawed["held"], false, "{reply}");
        assert_eq!(thawed["writers"][0]["held"], false);
        assert_eq!(thawed["writers"][0]["state"], "FAILED_AT_THAW");
        assert_eq!(thawed["filesystems"][0]["result"], "thawed");
    }
}

/// Whoever holds by itself must show something that can be compared; one that leans on the file system need not.
#[test]
fn an_application_that_holds_by_itself_without_evidence_refuses_the_set() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    for hold in ["app", "filesystem"] {
        let mut writer = Played::connect(
            &rig,
            &json!({"protocol": 1, "class_id": "test", "instance_id": hold, "name": hold,
                    "freeze_timeout_ms": 5_000, "hold": hold}),
        );
        assert_eq!(writer.event()["protocol"], 1);
        let mut bridge = rig.bridge();
        send_prepare(&mut bridge);
        writer.agree_to_prepare();
        finish_prepare(&mut bridge);
        bridge.send("freeze", freeze_arguments(10_000));
        writer.answer("freeze", json!({"ok": true}));
        if hold == "app" {
            assert!(writer.expect_abort().contains("no evidence"));
            let error = bridge.next()["error"].clone();
            assert_eq!(error["code"], "WRITER_VETO", "{error:#}");
            assert_eq!(error["retryable"], false);
        } else {
            let generation = bridge.next()["return"]["generation"].clone();
            bridge.send("thaw", json!({"set": "s", "generation": generation}));
            writer.answer("thaw", json!({"ok": true, "held": true}));
            assert_eq!(bridge.next()["return"]["held"], true);
        }
        drop((writer, bridge));
        wait_until("it is gone", || !rig.has_writer(hold));
    }
}

#[test]
fn a_veto_at_any_step_thaws_and_aborts_everybody() {
    if !can_run(&[]) {
        return;
    }
    for at in ["prepare_backup", "prepare_snapshot", "freeze"] {
        let rig = Rig::with("ext4");
        // The one that refuses comes last, so the other has done its step by then.
        let mut other = Played::registered(&rig, "a", "FRONT_END", 5_000);
        let mut writer = Played::registered(&rig, "b", "BACK_END", 5_000);
        let mut bridge = rig.bridge();
        send_prepare(&mut bridge);
        for event in ["prepare_backup", "prepare_snapshot", "freeze"] {
            other.agree(event);
            if event == at {
                let veto = json!({"ok": false, "code": "NONRETRYABLE", "message": "not today"});
                writer.answer(event, veto);
                break;
            }
            writer.agree(event);
            if event == "prepare_snapshot" {
                finish_prepare(&mut bridge);
                bridge.send("freeze", freeze_arguments(10_000));
            }
        }
        assert!(writer.expect_abort().contains("not today"));
        other.expect_abort();
        let error = bridge.next()["error"].clone();
        assert_eq!(error["code"], "WRITER_VETO", "{at}: {error:#}");
        assert_eq!(error["retryable"], false);
        assert!(error["message"].as_str().unwrap().contains("not today"));
        assert!(!is_frozen(&rig.mountpoint("a")));
        assert_eq!(bridge.status()["set"], Value::Null);
        let states: Vec<_> = bridge.status()["writers"].as_array().unwrap().clone();
        assert_eq!(states[1]["last_failure"]["code"], "NONRETRYABLE");
    }
}

#[test]
fn a_writer_that_hangs_fails_the_set_inside_its_own_limit() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut other = Played::registered(&rig, "a", "FRONT_END", 30_000);
    let mut writer = Played::registered(&rig, "b", "BACK_END", 400);
    let mut bridge = rig.bridge();
    send_prepare(&mut bridge);
    for writer in [&mut other, &mut writer] {
        writer.agree("prepare_backup");
    }
    for writer in [&mut other, &mut writer] {
        writer.agree("prepare_snapshot");
    }
    finish_prepare(&mut bridge);
    bridge.send("freeze", freeze_arguments(10_000));
    other.agree("freeze");
    let start = Instant::now();
    assert_eq!(writer.event()["event"], "freeze");
    writer.expect_abort();
    other.expect_abort();
    let error = bridge.next()["error"].clone();
    assert!(start.elapsed() < Duration::from_secs(10));
    assert_eq!(error["code"], "WRITER_NOT_RESPONDING");
    assert_eq!(error["writers"][1]["failure"]["code"], "NOT_RESPONDING");
    assert!(!is_frozen(&rig.mountpoint("a")));
}

#[test]
fn a_writer_that_hangs_up_while_frozen_ends_the_hold_at_once() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 30_000);
    let mut bridge = rig.bridge();
    send_prepare(&mut bridge);
    writer.agree_to_prepare();
    finish_prepare(&mut bridge);
    bridge.send("freeze", freeze_arguments(10_000));
    writer.agree("freeze");
    let generation = bridge.next()["return"]["generation"].clone();
    let mut probe = Probe::start(&rig.mountpoint("a"));
    probe.wait_blocked();
    let start = Instant::now();
    drop(writer);
    probe.wait_done();
    assert!(
        start.elapsed() < Duration::from_secs(9),
        "only the dead-man thawed"
    );
    let error = bridge.error("thaw", json!({"set": "s", "generation": generation}));
    assert_eq!(error["code"], "HOLD_BROKEN");
    assert!(error["message"].as_str().unwrap().contains("db"));
    assert_eq!(error["writers"][0]["held"], false);
}

#[test]
fn a_writers_own_window_ends_the_hold_before_the_file_systems_limit() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 600);
    let mut bridge = rig.bridge();
    send_prepare(&mut bridge);
    writer.agree_to_prepare();
    finish_prepare(&mut bridge);
    bridge.send("freeze", freeze_arguments(10_000));
    writer.agree("freeze");
    let generation = bridge.next()["return"]["generation"].clone();
    let start = Instant::now();
    assert!(writer.expect_abort().contains("db"));
    assert!(
        start.elapsed() < Duration::from_secs(9),
        "that was the file systems' limit"
    );
    wait_until("all is thawed", || bridge.status()["frozen"] == false);
    assert!(!is_frozen(&rig.mountpoint("a")));
    let error = bridge.error("thaw", json!({"set": "s", "generation": generation}));
    assert_eq!(error["code"], "HOLD_BROKEN");
}

#[test]
fn levels_freeze_in_order_and_thaw_in_reverse() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let order = rig.path("run/order");
    for (name, level) in [("a", "SYSTEM"), ("b", "BACK_END"), ("c", "FRONT_END")] {
        for event in ["prepare", "freeze", "thaw", "post-snapshot"] {
            rig.script(
                name,
                event,
                &format!("echo {name}.{event} >> {}", order.display()),
            );
        }
        let settings = json!({ "level": level }).to_string();
        rig.file(&format!("writers/{name}/writer.json"), &settings);
    }
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    assert_eq!(bridge.thaw(&frozen)["held"], true);
    bridge.ok("post_snapshot", json!({"set": "s", "kept": true}));
    let text = fs::read_to_string(order).unwrap();
    let steps: Vec<&str> = text
        .lines()
        .filter(|line| line.ends_with("freeze") || line.ends_with("thaw"))
        .collect();
    assert_eq!(
        steps,
        [
            "c.freeze", "b.freeze", "a.freeze", "a.thaw", "b.thaw", "c.thaw"
        ]
    );
    assert_eq!(text.matches("post-snapshot").count(), 3);
}

#[test]
fn a_script_sees_its_set_and_its_standard_error_is_the_veto() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let seen = rig.path("run/seen");
    rig.script(
        "db",
        "prepare",
        &format!("echo $VSS_SET $VSS_TYPE > {}", seen.display()),
    );
    rig.script("db", "freeze", "echo the queue is not empty >&2; exit 7");
    rig.script(
        "db",
        "abort",
        &format!("echo aborted >> {}", seen.display()),
    );
    let mut bridge = rig.bridge();
    bridge.ok(
        "prepare",
        json!({"set": "s", "backup_type": "full", "limit_ms": 20_000}),
    );
    let error = bridge.error("freeze", freeze_arguments(10_000));
    assert_eq!(error["code"], "WRITER_VETO");
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("the queue is not empty")
    );
    assert_eq!(fs::read_to_string(seen).unwrap(), "s full\naborted\n");
    assert!(!is_frozen(&rig.mountpoint("a")));
}

#[test]
fn a_script_that_hangs_is_killed_with_all_its_children_and_everybody_thaws() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let child = rig.path("run/child");
    // A session of its own escapes a process group, but no control group.
    let script = format!(
        "setsid sh -c 'echo $$ > {}; exec sleep 600' & sleep 600",
        child.display()
    );
    rig.script("db", "freeze", &script);
    rig.file("writers/db/writer.json", r#"{"freeze_timeout_ms": 700}"#);
    let mut bridge = rig.bridge();
    bridge.prepare();
    let start = Instant::now();
    let error = bridge.error("freeze", freeze_arguments(10_000));
    assert!(start.elapsed() < Duration::from_secs(15));
    assert_eq!(error["code"], "WRITER_NOT_RESPONDING");
    assert!(!is_frozen(&rig.mountpoint("a")));
    let pid = fs::read_to_string(&child).unwrap().trim().to_owned();
    let has_control_groups = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .iter()
        .any(|top| fs::metadata(format!("{top}/cgroup.procs")).is_ok());
    if !has_control_groups {
        eprintln!("skipped: without cgroup v2 a child in a session of its own is not found");
        rig::kill_9(pid.parse().unwrap());
        return;
    }
    wait_until("the child is killed", || {
        fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z"))
    });
}

#[test]
fn a_directory_that_others_can_change_refuses_the_set_unless_it_is_excluded() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let ran = rig.path("run/ran");
    let script = rig.script("db", "prepare", &format!("touch {}", ran.display()));
    fs::set_permissions(&script, fs::Permissions::from_mode(0o777)).unwrap();
    let mut bridge = rig.bridge();
    let error = bridge.error("prepare", json!({"set": "s", "limit_ms": 20_000}));
    assert_eq!(error["code"], "WRITER_VETO");
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("can be changed")
    );
    bridge.ok(
        "prepare",
        json!({"set": "s", "limit_ms": 20_000, "exclude_writers": ["db"]}),
    );
    bridge.abort();
    assert!(!ran.exists(), "it was run");
}

#[test]
fn a_script_writer_that_a_killed_agent_left_frozen_is_undone_at_the_next_start() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::with("ext4");
    let paused = rig.path("run/paused");
    rig.script("db", "freeze", &format!("touch {}", paused.display()));
    rig.script("db", "thaw", &format!("rm {}", paused.display()));
    let mut bridge = rig.bridge();
    bridge.prepare();
    bridge.freeze();
    assert!(paused.exists());
    rig.kill_agent();
    wait_until("the helper thawed", || !is_frozen(&rig.mountpoint("a")));
    assert!(paused.exists());
    rig.start();
    assert!(!paused.exists());
}

#[test]
fn excluded_writers_hear_nothing() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let _silent = Played::registered(&rig, "silent", "SYSTEM", 5_000);
    let mut bridge = rig.bridge();
    let arguments = json!({"set": "s", "limit_ms": 20_000, "exclude_writers": ["silent"]});
    bridge.ok("prepare", arguments);
    let frozen = bridge.freeze();
    assert_eq!(frozen["writers"], json!([]));
    assert_eq!(bridge.thaw(&frozen)["held"], true);
}

#[test]
fn registrations_that_are_wrong_or_taken_are_refused_with_a_reason() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let _first = Played::registered(&rig, "db", "BACK_END", 5_000);
    let good = json!({"protocol": 1, "class_id": "test", "instance_id": "db", "name": "n",
                      "freeze_timeout_ms": 5_000});
    let refusal = |registration: &Value| {
        let mut played = Played::connect(&rig, registration);
        let event = played.event();
        event["refused"].as_str().unwrap_or_default().to_owned()
    };
    assert!(refusal(&good).contains("already connected"));
    let with = |key: &str, value: Value| {
        let mut registration = good.clone();
        registration[key] = value;
        registration
    };
    assert!(refusal(&with("protocol", json!(9))).contains("protocol"));
    assert!(refusal(&with("freeze_timeout_ms", json!(60_001))).contains("60000"));
    assert!(refusal(&with("name", json!(""))).contains("bytes"));
    assert!(refusal(&json!({"hello": 1})).contains("registration"));
}

#[test]
fn a_user_who_is_not_allowed_is_refused_and_one_who_is_takes_part() {
    if !can_run(&["setpriv", "perl"]) {
        return;
    }
    let rig = Rig::with("ext4");
    // A stranger is hung up on before it has said anything.
    let script = r#"$SIG{PIPE} = 'IGNORE'; my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die $!;
        print $s "{\"protocol\":1,\"class_id\":\"web\",\"instance_id\":\"w\",\"name\":\"w\",\"freeze_timeout_ms\":9}\n";
        $s->flush; print scalar <$s>;"#;
    let register = || {
        let output = std::process::Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .args(["perl", "-MIO::Socket::UNIX", "-e", script])
            .arg(rig.path("run/writers.sock"))
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(register().contains("user 65534 is not allowed"));
    rig.file("allow/web.conf", "web = 65534\n");
    assert!(register().contains("\"protocol\":1"));
}

#[test]
fn a_host_that_goes_away_while_writers_prepare_aborts_them() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 5_000);
    let mut bridge = rig.bridge();
    send_prepare(&mut bridge);
    assert_eq!(writer.event()["event"], "prepare_backup");
    drop(bridge);
    assert!(writer.expect_abort().contains("host"));
    let mut bridge = rig.bridge();
    send_prepare(&mut bridge);
    writer.agree_to_prepare();
    finish_prepare(&mut bridge);
}

#[test]
fn status_and_abort_are_answered_while_a_writer_keeps_the_freeze_waiting() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = Played::registered(&rig, "db", "BACK_END", 30_000);
    let mut bridge = rig.bridge();
    send_prepare(&mut bridge);
    writer.agree_to_prepare();
    finish_prepare(&mut bridge);
    let freeze = bridge.send("freeze", freeze_arguments(10_000));
    assert_eq!(writer.event()["event"], "freeze");
    assert_eq!(bridge.status()["set"], "s");
    let abort = bridge.send("abort", json!({"set": "s", "reason": "enough"}));
    assert!(writer.expect_abort().contains("enough"));
    let (first, second) = (bridge.next(), bridge.next());
    assert_eq!(
        (&first["id"], &second["id"]),
        (&json!(freeze), &json!(abort))
    );
    assert!(first.get("error").is_some());
    assert!(second.get("return").is_some());
}

/// Writers take up to a minute: what is mounted meanwhile would be in the copy and not held.
#[test]
fn what_is_mounted_while_writers_freeze_refuses_the_set() {
    if !can_run(&[]) {
        return;
    }
    for remounted in [false, true] {
        let mut rig = Rig::new();
        let first = rig.mount("a", "ext4");
        let late = rig.mount("late", "ext4");
        let place = late.to_str().unwrap().to_owned();
        if remounted {
            rig::run("mount", &["-o", "remount,ro", &place]);
        } else {
            rig::run("umount", &[&place]);
        }
        rig.start();
        let mut writer = Played::registered(&rig, "db", "BACK_END", 20_000);
        let mut bridge = rig.bridge();
        bridge.send("prepare", json!({"set": "s", "limit_ms": 10_000}));
        writer.answer("prepare_backup", json!({"ok": true}));
        writer.answer("prepare_snapshot", json!({"ok": true}));
        assert!(bridge.next()["return"].is_object());
        bridge.send("freeze", freeze_arguments(10_000));
        let event = writer.event();
        assert_eq!(event["event"], "freeze");
        if remounted {
            rig::run("mount", &["-o", "remount,rw", &place]);
        } else {
            let image = rig.path("late.img");
            rig::run("mount", &["-o", "loop", image.to_str().unwrap(), &place]);
        }
        writer.write(&json!({"seq": event["seq"], "ok": true, "evidence": 7}));
        writer.answer("abort", json!({"ok": true}));
        let error = bridge.next()["error"].clone();
        assert_eq!(error["code"], "FREEZE_FAILED", "{error:#}");
        assert!(error.to_string().contains(&place), "{error:#}");
        assert!(!is_frozen(&first) && !is_frozen(&late));
    }
}
