//! The command `vmshadow` as a process: exit codes, tables, JSON, reading, and death at every step.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fakes;

use fakes::storage::content;
use fakes::{Fault, World, until};
use guest_agent_wire::types::{WriterFailure, WriterState};
use serde_json::Value;
use std::process::Output;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

async fn run(mut command: tokio::process::Command) -> Output {
    tokio::time::timeout(Duration::from_secs(30), command.output())
        .await
        .unwrap()
        .unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {} {}", stdout(output), stderr(output)))
}

#[tokio::test]
async fn create_exits_0_and_tells_steps_and_copies() {
    let world = World::new();
    let output = run(world.vmshadow_create(&["--vm", "db1"])).await;
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    for step in ["intent", "frozen", "committed", "thawed", "finished"] {
        assert!(stderr(&output).contains(step), "{}", stderr(&output));
    }
    let text = stdout(&output);
    assert!(
        text.contains("level      application (asked application)"),
        "{text}"
    );
    assert!(text.contains("writers    agrees: db: held"), "{text}");
    assert!(text.contains("applications without a writer are only as consistent as a crash"));
    let listed = run(world.vmshadow(&["list"])).await;
    let text = stdout(&listed);
    let mut lines = text.lines();
    assert!(lines.next().unwrap().starts_with("SET  "), "{text}");
    let row = lines.next().unwrap();
    assert!(row.contains("db1  ") && row.contains("  kept  "), "{text}");
    assert!(
        row.contains("  application  ") && row.contains("8.0 KiB"),
        "{text}"
    );
}

#[tokio::test]
async fn a_level_that_is_not_reached_exits_3_and_keeps_the_document() {
    let world = World::new();
    world.agent.peer.on("prepare", Fault::Refuse("WRITER_VETO"));
    let output = run(world.vmshadow_create(&["--json"])).await;
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    let document = json(&output);
    assert_eq!(document["outcome"], "refused");
    assert_eq!(document["reason"]["code"], "WRITER_VETO");
    assert_eq!(document["reason"]["step"], "prepared");
    world.assert_nothing_left();
    let id = document["set"].as_str().unwrap();
    let shown = run(world.vmshadow(&["show", &id[..8], "--json"])).await;
    assert_eq!(json(&shown), document);
    let shown = run(world.vmshadow(&["show", id])).await;
    assert!(stdout(&shown).contains("WRITER_VETO before prepared"));
}

/// Each of VSS's codes, at each step at which a writer may say it: the requester reads it in the document, and its exit code is 3.
#[tokio::test]
async fn the_code_of_a_writer_that_fails_reaches_the_requester() {
    use WriterFailure as F;
    use WriterState as S;
    let cases = [
        (S::FailedAtPrepareSnapshot, "prepare", "prepared"),
        (S::FailedAtFreeze, "freeze", "frozen"),
        (S::FailedAtThaw, "thaw", "verdict"),
        (S::FailedAtPostSnapshot, "post", "finished"),
    ];
    let codes = [
        (F::Inconsistentsnapshot, "INCONSISTENTSNAPSHOT", false),
        (F::PartialFailure, "PARTIAL_FAILURE", true),
        (F::StatusNotAvailable, "STATUS_NOT_AVAILABLE", true),
        (F::Timeout, "TIMEOUT", true),
    ];
    for (state, said_to, step) in cases {
        for (how, code, retryable) in codes {
            let world = World::new();
            world.agent.change(|guest| guest.fails = Some((state, how)));
            let output = run(world.vmshadow_create(&["--json"])).await;
            assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
            let document = json(&output);
            let what = format!("{state:?} {how:?}: {document:#}");
            let said = &document["writers"][0][said_to];
            assert_eq!(
                said["state"],
                serde_json::to_value(state).unwrap(),
                "{what}"
            );
            assert_eq!(said["failure"]["code"], code, "{what}");
            let reason = &document["reason"];
            assert_eq!(reason["step"], step, "{what}");
            let text = reason["message"].as_str().unwrap();
            assert!(text.contains("db could not"), "{what}");
            // By the thaw all that is known is that the hold was not what it was to be.
            let expected = match (state, how) {
                (S::FailedAtThaw, _) => ("HOLD_BROKEN", true),
                (S::FailedAtPostSnapshot, _) => ("WRITER_VETO", retryable),
                (_, F::Timeout) => ("WRITER_NOT_RESPONDING", true),
                _ => ("WRITER_VETO", retryable),
            };
            assert_eq!(reason["code"], expected.0, "{what}");
            assert_eq!(reason["retryable"], expected.1, "{what}");
            world.assert_nothing_left();
        }
    }
}

#[tokio::test]
async fn best_effort_exits_0_with_a_label() {
    let world = World::new();
    world.storages[0].write_in_window(1);
    let output = run(world.vmshadow_create(&["--best-effort", "--json"])).await;
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(json(&output)["level-reached"], "crash");
}

#[tokio::test]
async fn machinery_that_fails_exits_1_and_nonsense_exits_2() {
    let world = World::new();
    world.storages[0]
        .peer
        .on("snapshot-set-prepare", Fault::Refuse("InsufficientStorage"));
    let output = run(world.vmshadow_create(&["--json"])).await;
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(json(&output)["reason"]["code"], "INSUFFICIENT_STORAGE");
    for nonsense in [
        &["create"][..],
        &["create", "--level", "perfect"],
        &["frobnicate"],
        &["show", "ab"],
        &["create", "--hold-limit-ms", "20000"],
    ] {
        let output = run(world.vmshadow(nonsense)).await;
        assert_eq!(output.status.code(), Some(2), "{nonsense:?}");
    }
    let output = run(world.vmshadow(&["show", "00000000-0000"])).await;
    assert_eq!(output.status.code(), Some(1));
}

#[tokio::test]
async fn read_copies_a_disk_and_overwrites_only_by_force() {
    let world = World::new();
    let document = json(&run(world.vmshadow_create(&["--json"])).await);
    let set = document["set"].as_str().unwrap().to_owned();
    let file = world.dir.path().join("out.raw");
    let file_text = file.display().to_string();
    let ambiguous = run(world.vmshadow(&["read", &set, "-o", &file_text])).await;
    assert_eq!(ambiguous.status.code(), Some(2));
    assert!(!file.exists());
    let one = ["read", &set, "--disk", "data", "--output", &file_text];
    let output = run(world.vmshadow(&one)).await;
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(std::fs::read(&file).unwrap(), content("data"));
    assert!(stdout(&output).contains("4.0 KiB of data, 4 B of them not zero"));
    let again = run(world.vmshadow(&one)).await;
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("--force"), "{}", stderr(&again));
    let root = document["copies"][0]["snapshot"].as_str().unwrap();
    let forced = run(world.vmshadow(&["read", root, "-o", &file_text, "--force"])).await;
    assert_eq!(forced.status.code(), Some(0), "{}", stderr(&forced));
    assert_eq!(std::fs::read(&file).unwrap(), content("root"));
    let piped = run(world.vmshadow(&["read", root, "-o", "-"])).await;
    assert_eq!(piped.stdout, content("root"));
    // Half a disk must not pass for one.
    world.storages[0]
        .peer
        .on("snapshot-read", Fault::Refuse("GenericError"));
    let broken = world.dir.path().join("broken.raw");
    let failed = run(world.vmshadow(&["read", root, "-o", &broken.display().to_string()])).await;
    assert_eq!(failed.status.code(), Some(1));
    assert!(!broken.exists());
}

/// Nor may half a disk that somebody stopped waiting for.
#[tokio::test]
async fn an_interrupted_read_leaves_no_file() {
    let world = World::new();
    let document = json(&run(world.vmshadow_create(&["--json"])).await);
    let root = document["copies"][0]["snapshot"].as_str().unwrap();
    world.storages[0].peer.on("snapshot-read", Fault::Hang);
    let file = world.dir.path().join("half.raw");
    let mut child = world
        .vmshadow(&["read", root, "-o", &file.display().to_string()])
        .stderr(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let read = "storage0 snapshot-read".to_owned();
    until("it reads", || world.log().contains(&read)).await;
    assert!(file.exists());
    let pid = rustix::process::Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(20), child.wait()).await;
    assert_eq!(ended.unwrap().unwrap().code(), Some(1));
    assert!(!file.exists());
}

#[tokio::test]
async fn writers_and_volumes_are_listed() {
    let world = World::new();
    let mut command = world.vmshadow(&["list", "writers"]);
    command.args(world.vm_options());
    let text = stdout(&run(command).await);
    assert!(
        text.contains("db      db        back-end  stable  20000 ms  no error"),
        "{text}"
    );
    assert!(text.contains("/m0"), "{text}");
    let mut command = world.vmshadow(&["list", "volumes"]);
    command.args(world.vm_options());
    let text = stdout(&run(command).await);
    assert!(text.contains("ser-data  4.0 KiB  row     yes"), "{text}");
}

#[tokio::test]
async fn delete_says_what_it_did() {
    let world = World::new();
    let document = json(&run(world.vmshadow_create(&["--json"])).await);
    let set = document["set"].as_str().unwrap();
    let output = run(world.vmshadow(&["delete", set])).await;
    assert_eq!(stdout(&output), format!("deleted {set}\n"));
    world.assert_nothing_left();
    assert_eq!(stdout(&run(world.vmshadow(&["list"])).await), "no sets\n");
}

/// Kills the command right after each step (the real dead bridge), and lets the next one find and undo what is left.
#[tokio::test]
async fn death_at_every_step_leaves_nothing_half_done() {
    let steps = [
        "intent",
        "identified",
        "prepared",
        "storage-prepared",
        "frozen",
        "marked",
        "committed",
        "thawed",
        "verdict",
        // Not a step: the stores have kept, and the record does not say so yet.
        "keep",
    ];
    for step in steps {
        let world = World::new();
        let between = step == "keep";
        let mut command = world.vmshadow_create(&[]);
        command
            .env("VMSHADOW_STOP_AT", if between { "verdict" } else { step })
            .stderr(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null());
        let mut child = command.spawn().unwrap();
        let pid = child.id().unwrap();
        until(step, || is_stopped(pid)).await;
        // As long as it lives, nobody takes its set for a dead one's.
        let living = run(world.vmshadow(&["recover"])).await;
        assert_eq!(living.status.code(), Some(1), "{step}: {}", stdout(&living));
        let busy = run(world.vmshadow_create(&[])).await;
        assert_eq!(busy.status.code(), Some(1), "{step}");
        assert!(stderr(&busy).contains("SNAPSHOT_SET_IN_PROGRESS"));
        if between {
            let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
            let kill = Fault::Meanwhile(std::sync::Arc::new(move || {
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            }));
            world.storages[0].peer.on("snapshot-set-keep", kill);
            rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
        } else {
            child.start_kill().unwrap();
        }
        child.wait().await.unwrap();
        world.storages[0].peer.heal();
        // The guest needs nobody to be thawed.
        until(step, || !world.agent.is_frozen() && !world.agent.has_set()).await;
        until(step, || !world.storages[0].is_holding()).await;
        let output = run(world.vmshadow(&["recover"])).await;
        assert_eq!(output.status.code(), Some(0), "{step}: {}", stderr(&output));
        assert!(
            stdout(&output).contains(": undone"),
            "{step}: {}",
            stdout(&output)
        );
        world.assert_nothing_left();
        let listed = json(&run(world.vmshadow(&["list", "--json"])).await);
        assert_eq!(listed[0]["outcome"], "undone", "{step}");
        assert_eq!(listed[0]["reason"]["code"], "BRIDGE_DIED", "{step}");
        let next = run(world.vmshadow_create(&[])).await;
        assert_eq!(next.status.code(), Some(0), "{step}: {}", stderr(&next));
    }
}

/// Who has heard of the step `kept` finds a kept set, though the bridge was killed at that moment: the record comes first.
#[tokio::test]
async fn death_right_after_the_step_kept_keeps_the_set() {
    let world = World::new();
    let mut child = world
        .vmshadow_create(&[])
        .env("VMSHADOW_STOP_AT", "kept")
        .stderr(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let pid = child.id().unwrap();
    until("kept", || is_stopped(pid)).await;
    // Its maker lives and would store its record once more.
    let listed = json(&run(world.vmshadow(&["list", "--json"])).await);
    assert_eq!(listed[0]["outcome"], "kept");
    let set = listed[0]["set"].as_str().unwrap().to_owned();
    let delete = run(world.vmshadow(&["delete", &set])).await;
    assert_eq!(delete.status.code(), Some(1));
    child.start_kill().unwrap();
    child.wait().await.unwrap();
    let recovered = json(&run(world.vmshadow(&["recover", "--json"])).await);
    assert_eq!(recovered[0]["outcome"], "kept");
    assert_eq!(world.storages[0].snapshots(), ["root Kept", "data Kept"]);
    let delete = run(world.vmshadow(&["delete", &set])).await;
    assert_eq!(delete.status.code(), Some(0), "{}", stderr(&delete));
    world.assert_nothing_left();
}

/// It may have told the writers that their backup is made.
#[tokio::test]
async fn a_set_whose_bridge_died_before_it_heard_of_its_writers_is_one_whose_backup_can_be_ended() {
    let world = World::new();
    let mut child = world
        .vmshadow_create(&["--type", "full"])
        .env("VMSHADOW_STOP_AT", "kept")
        .stderr(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let pid = child.id().unwrap();
    until("kept", || is_stopped(pid)).await;
    child.start_kill().unwrap();
    child.wait().await.unwrap();
    let recovered = json(&run(world.vmshadow(&["recover", "--json"])).await);
    assert_eq!(recovered[0]["awaits-backup"], true, "{recovered:#}");
    let set = recovered[0]["set"].as_str().unwrap();
    world
        .agent
        .change(|guest| guest.incomplete = vec![set.to_owned()]);
    let complete = run(world.vmshadow(&["complete", set])).await;
    assert_eq!(complete.status.code(), Some(0), "{}", stderr(&complete));
}

/// After the outcome is on disk the set is kept, whoever dies.
#[tokio::test]
async fn death_after_the_outcome_is_recorded_keeps_the_set() {
    let world = World::new();
    world.agent.peer.on("post_snapshot", Fault::Hang);
    let mut child = world
        .vmshadow_create(&[])
        .stderr(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    until("post_snapshot", || {
        world.log().contains(&"agent post_snapshot".to_owned())
    })
    .await;
    child.start_kill().unwrap();
    child.wait().await.unwrap();
    let recovered = json(&run(world.vmshadow(&["recover", "--json"])).await);
    assert_eq!(recovered[0]["outcome"], "kept");
    assert_eq!(recovered[0]["finished"], true);
    let notes = recovered[0]["notes"].to_string();
    assert!(notes.contains("the bridge died"), "{notes}");
    assert_eq!(world.storages[0].snapshots(), ["root Kept", "data Kept"]);
    assert!(!world.agent.has_set());
}

#[tokio::test]
async fn a_signal_undoes_the_set() {
    let world = World::new();
    world.storages[0]
        .peer
        .on("snapshot-set-commit", Fault::Hang);
    let mut child = world
        .vmshadow_create(&["--json"])
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    while !lines.next_line().await.unwrap().unwrap().contains("marked") {}
    let pid = rustix::process::Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(json(&output)["reason"]["code"], "CANCELLED");
    world.assert_nothing_left();
}

fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| rest.starts_with('T'))
}
