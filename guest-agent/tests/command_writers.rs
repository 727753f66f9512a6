//! `vmshadow-writer` beside the real agent: commands, scripts and sessions in sets that succeed, fail and lose their writer.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use rig::{Rig, can_run, freeze_arguments, is_frozen, wait_until};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;

fn lines(rig: &Rig) -> Vec<String> {
    let text = fs::read_to_string(rig.path("run/order")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// A shell command that writes this line into the rig's list.
fn note(rig: &Rig, line: &str) -> String {
    format!("echo {line} >> {}", rig.path("run/order").display())
}

#[test]
fn a_command_per_event_goes_through_a_set_and_a_restore() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let names = [
        "prepare-backup",
        "prepare",
        "freeze",
        "thaw",
        "post-snapshot",
        "backup-complete",
        "abort",
        "pre-restore",
        "post-restore",
    ];
    let mut words = vec!["--level".to_owned(), "BACK_END".to_owned()];
    for name in names {
        words.push(format!("--{name}"));
        words.push(note(&rig, "$VSS_EVENT $VSS_SET $VSS_TYPE"));
    }
    words.push("--identify".to_owned());
    words.push(
        r#"echo '{"restore_method":{"method":"CUSTOM"},"components":[{"type":"database","name":"x"}]}'"#
            .to_owned(),
    );
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let _writer = rig.writer("db", &words);
    let mut bridge = rig.bridge();
    let identified = bridge.ok("identify", json!({}));
    assert_eq!(identified["writers"][0]["level"], "BACK_END");
    assert_eq!(
        identified["writers"][0]["metadata"]["components"][0]["name"],
        "x"
    );
    bridge.ok(
        "prepare",
        json!({"set": "s", "backup_type": "full", "limit_ms": 20_000}),
    );
    let frozen = bridge.freeze();
    assert!(is_frozen(&rig.mountpoint("a")));
    assert_eq!(bridge.thaw(&frozen)["held"], true);
    bridge.ok("post_snapshot", json!({"set": "s", "kept": true}));
    bridge.ok("backup_complete", json!({"set": "s", "succeeded": true}));
    let restore = json!({"set": "r", "writers": [{"writer": "db"}]});
    bridge.ok("pre_restore", restore.clone());
    bridge.ok("post_restore", restore);
    let expected = [
        "prepare-backup s full",
        "prepare s full",
        "freeze s full",
        "thaw s full",
        "post-snapshot s full",
        "backup-complete s full",
        "pre-restore r full",
        "post-restore r full",
    ];
    assert_eq!(lines(&rig), expected);
}

#[test]
fn a_command_that_fails_is_a_veto_and_its_freeze_is_undone() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let freeze = format!("{}; echo busy >&2; exit 4", note(&rig, "freeze"));
    let thaw = note(&rig, "thaw");
    let _writer = rig.writer("db", &["--freeze", &freeze, "--thaw", &thaw]);
    let mut bridge = rig.bridge();
    bridge.prepare();
    let error = bridge.error("freeze", freeze_arguments(10_000));
    assert_eq!(error["code"], "WRITER_VETO");
    assert!(error["message"].as_str().unwrap().contains("busy"));
    assert_eq!(lines(&rig), ["freeze", "thaw"]);
    assert!(!is_frozen(&rig.mountpoint("a")));
}

#[test]
fn scripts_that_hang_are_killed_with_what_they_started_when_the_set_is_given_up() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let child = rig.path("run/child");
    let directory = rig.path("scripts");
    fs::create_dir(&directory).unwrap();
    let hang = format!("sleep 600 & echo $! > {}; wait", child.display());
    for (event, text) in [("freeze", hang), ("thaw", note(&rig, "thaw"))] {
        let file = directory.join(event);
        fs::write(&file, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
    let scripts = directory.to_str().unwrap();
    let _writer = rig.writer("db", &["--scripts", scripts, "--freeze-timeout-ms", "800"]);
    let mut bridge = rig.bridge();
    bridge.prepare();
    let error = bridge.error("freeze", freeze_arguments(10_000));
    assert_eq!(error["code"], "WRITER_NOT_RESPONDING");
    assert_eq!(lines(&rig), ["thaw"]);
    let pid = fs::read_to_string(&child).unwrap();
    let stat = format!("/proc/{}/stat", pid.trim());
    wait_until("the child is killed", || {
        fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z"))
    });
}

#[test]
fn a_writer_that_is_killed_or_stopped_while_frozen_lets_its_application_go() {
    if !can_run(&[]) {
        return;
    }
    for is_killed in [true, false] {
        let rig = Rig::with("ext4");
        let (freeze, thaw) = (note(&rig, "freeze"), note(&rig, "thaw"));
        let mut writer = rig.writer("db", &["--freeze", &freeze, "--thaw", &thaw]);
        let mut bridge = rig.bridge();
        bridge.prepare();
        let frozen = bridge.freeze();
        assert_eq!(lines(&rig), ["freeze"]);
        if is_killed {
            writer.kill();
        } else {
            writer.terminate();
        }
        wait_until("the application goes on", || {
            lines(&rig) == ["freeze", "thaw"]
        });
        let generation = frozen["generation"].clone();
        let error = bridge.error("thaw", json!({"set": "s", "generation": generation}));
        assert_eq!(error["code"], "HOLD_BROKEN");
    }
}

#[test]
fn an_agent_that_is_killed_lets_the_application_go_and_once_ends_the_writer() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::with("ext4");
    let (freeze, thaw) = (note(&rig, "freeze"), note(&rig, "thaw"));
    let mut writer = rig.writer("db", &["--once", "--freeze", &freeze, "--thaw", &thaw]);
    let mut bridge = rig.bridge();
    bridge.prepare();
    bridge.freeze();
    rig.kill_agent();
    assert_eq!(writer.exit_code(), Some(0));
    assert_eq!(lines(&rig), ["freeze", "thaw"]);
}

/// A session in shell: it holds a lock in a variable, and answers each line by its event.
const SESSION: &str = r#"
locked=no
while read -r line; do
    seq=${line#*\"seq\":}; seq=${seq%%,*}
    case $line in
        *'"event":"freeze"'*) locked=yes; more=',"evidence":{"session":'$$'}' ;;
        *'"event":"thaw"'*) [ $locked = yes ] && held=true || held=false; locked=no
            more=',"held":'$held',"evidence":{"session":'$$'}' ;;
        *'"event":"abort"'*) locked=no; more= ;;
        *) more= ;;
    esac
    echo "$line" >> LINES
    FAULT
    echo "{\"seq\":$seq,\"ok\":true$more}"
done
echo "end $locked" >> LINES
"#;

fn session(rig: &Rig, fault: &str) -> String {
    let lines = rig.path("run/order");
    SESSION
        .replace("LINES", lines.to_str().unwrap())
        .replace("FAULT", fault)
}

/// Names of the events that the session has read, and what it said at its end.
fn events(rig: &Rig) -> Vec<String> {
    let name = |line: String| match serde_json::from_str::<Value>(&line) {
        Ok(event) => event["event"].as_str().unwrap().to_owned(),
        Err(_) => line,
    };
    lines(rig).into_iter().map(name).collect()
}

#[test]
fn a_session_is_one_process_from_prepare_to_thaw_and_its_evidence_counts() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let _writer = rig.writer("db", &["--hold", "app", "--session", &session(&rig, ":")]);
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    let thawed = bridge.thaw(&frozen);
    assert_eq!(thawed["held"], true, "{thawed:#}");
    let evidence = &thawed["writers"][0]["evidence"]["session"];
    assert_eq!(*evidence, frozen["writers"][0]["evidence"]["session"]);
    assert!(evidence.is_u64());
    bridge.ok("post_snapshot", json!({"set": "s", "kept": true}));
    let expected = [
        "prepare_backup",
        "prepare_snapshot",
        "freeze",
        "thaw",
        "post_snapshot",
    ];
    assert_eq!(events(&rig), expected);
}

#[test]
fn a_session_that_ends_while_frozen_fails_the_set_at_once() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let pid = rig.path("run/pid");
    let fault = format!("echo $$ > {}", pid.display());
    let _writer = rig.writer("db", &["--session", &session(&rig, &fault)]);
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    rig::kill_9(fs::read_to_string(&pid).unwrap().trim().parse().unwrap());
    wait_until("all is thawed", || bridge.status()["frozen"] == false);
    let generation = frozen["generation"].clone();
    let error = bridge.error("thaw", json!({"set": "s", "generation": generation}));
    assert_eq!(error["code"], "HOLD_BROKEN");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("the session has ended"), "{error:#}");
    assert_eq!(error["writers"][0]["held"], false);
    // The next set starts it anew.
    bridge.prepare();
    let frozen = bridge.freeze();
    assert_eq!(bridge.thaw(&frozen)["held"], true);
}

#[test]
fn a_session_reads_its_end_when_the_writer_dies() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let mut writer = rig.writer("db", &["--session", &session(&rig, ":")]);
    let mut bridge = rig.bridge();
    bridge.prepare();
    bridge.freeze();
    writer.kill();
    wait_until("the session lets go", || {
        events(&rig).last().is_some_and(|last| last == "end yes")
    });
}

#[test]
fn a_session_that_answers_nothing_any_more_is_killed() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let pid = rig.path("run/pid");
    let fault = format!(
        "case $line in *freeze*) echo $$ > {}; exec sleep 600 ;; esac",
        pid.display()
    );
    let session = session(&rig, &fault);
    let words = ["--freeze-timeout-ms", "700", "--session", &session];
    let _writer = rig.writer("stuck", &words);
    let mut bridge = rig.bridge();
    bridge.prepare();
    let error = bridge.error("freeze", freeze_arguments(10_000));
    assert_eq!(error["code"], "WRITER_NOT_RESPONDING");
    let stat = format!("/proc/{}/stat", fs::read_to_string(&pid).unwrap().trim());
    wait_until("it is killed", || {
        fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z"))
    });
}

/// Where cgroup v2 keeps the group of this process, which the agent and the writers of a rig are in too.
fn own_control_group() -> Option<PathBuf> {
    let top = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .map(PathBuf::from)
        .find(|top| top.join("cgroup.procs").exists())?;
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let group = top.join(own);
    // It may be another's to change.
    let probe = group.join(format!("probe-{}", std::process::id()));
    fs::create_dir(&probe).ok()?;
    fs::remove_dir(probe).unwrap();
    Some(group)
}

#[test]
fn a_session_is_killed_with_a_child_that_has_left_its_process_group() {
    if !can_run(&["setsid"]) {
        return;
    }
    if own_control_group().is_none() {
        eprintln!("skipped: no control group (v2) can be made here");
        return;
    }
    let rig = Rig::with("ext4");
    let pid = rig.path("run/pid");
    // Written in one step, by the child itself: what is there is whole.
    let fault = format!(
        "case $line in *freeze*) setsid sh -c 'echo $$ > {0}.new; mv {0}.new {0}; exec sleep 600' & while [ ! -e {0} ]; do sleep 0.02; done; exec sleep 600 ;; esac",
        pid.display()
    );
    let session = session(&rig, &fault);
    // Time for the child to begin; the limit comes all the same.
    let words = ["--freeze-timeout-ms", "5000", "--session", &session];
    let _writer = rig.writer("stuck", &words);
    let mut bridge = rig.bridge();
    bridge.prepare();
    let error = bridge.error("freeze", freeze_arguments(10_000));
    assert_eq!(error["code"], "WRITER_NOT_RESPONDING");
    let pid = fs::read_to_string(&pid).unwrap();
    wait_until("the child is killed", || {
        fs::read_to_string(format!("/proc/{}/stat", pid.trim()))
            .map_or(true, |stat| stat.contains(") Z"))
    });
}

#[test]
fn what_a_killed_agent_or_writer_left_of_control_groups_is_swept_at_the_next_start() {
    if !can_run(&[]) {
        return;
    }
    let Some(group) = own_control_group() else {
        eprintln!("skipped: no control group (v2) can be made here");
        return;
    };
    let mut gone = Command::new("true").spawn().unwrap();
    gone.wait().unwrap();
    let left = |number: u32| group.join(format!("vmshadow-session-{}-1-{number}", gone.id()));
    // Of somebody who is still there.
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let start = stat.split(' ').nth(21).unwrap();
    let other = group.join(format!(
        "vmshadow-session-{}-{start}-900",
        std::process::id()
    ));
    fs::create_dir(&other).unwrap();
    fs::create_dir(left(0)).unwrap();
    let rig = Rig::with("ext4");
    wait_until("the agent sweeps", || !left(0).exists());
    fs::create_dir(left(1)).unwrap();
    let _writer = rig.writer("db", &["--thaw", "true"]);
    wait_until("the writer sweeps", || !left(1).exists());
    let is_kept = other.exists();
    fs::remove_dir(&other).unwrap_or(());
    assert!(is_kept, "a group in use was removed");
}

#[test]
fn wrong_usage_a_missing_agent_and_a_refusal_have_exit_statuses_of_their_own() {
    let run = |words: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_vmshadow-writer"))
            .args(words)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), text, output.stdout)
    };
    let (code, text, _) = run(&["--name", "db", "--freeze", "true"]);
    assert_eq!(code, Some(2));
    assert!(
        text.contains("nothing would let the application go on"),
        "{text}"
    );
    let words = [
        "--name",
        "db",
        "--thaw",
        "true",
        "--socket",
        "/nowhere/at/all",
        "--once",
    ];
    let (code, text, _) = run(&words);
    assert_eq!(code, Some(3));
    assert!(text.contains("/nowhere/at/all"), "{text}");
    let (code, _, out) = run(&["--name", "db", "--thaw", "go", "--check", "--json"]);
    assert_eq!(code, Some(0));
    let said: Value = serde_json::from_slice(&out).unwrap();
    assert_eq!(said["commands"]["thaw"], "go");
    assert_eq!(said["registration"]["instance_id"], "command:db");

    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let _first = rig.writer("db", &["--thaw", "true"]);
    let socket = rig.path("run/writers.sock");
    let words = [
        "--name",
        "db",
        "--thaw",
        "true",
        "--socket",
        socket.to_str().unwrap(),
    ];
    let (code, text, _) = run(&words);
    assert_eq!(code, Some(1));
    assert!(text.contains("already connected"), "{text}");
}
