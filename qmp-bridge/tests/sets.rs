//! Whole sets against the fake peers: what is kept, what is refused, what is undone and in which order.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fakes;

use fakes::{Fault, World, short_limits};
use guest_agent_wire::host::NotToSnapshot;
use guest_agent_wire::types::{BackupType, DiskExtent, WriterFailure, WriterState};
use qmp_bridge::error::Error;
use qmp_bridge::sets::Sets;
use qmp_bridge::snapshot::document::{Copy, CreateRequest, Outcome, ReasonCode, SetDocument};
use qmp_bridge::snapshot::level::Level;
use qmp_bridge::snapshot::run::Limits;
use qmp_bridge::snapshot::step::{FaultPoint, Step};
use qmp_bridge::snapshot::witness::Word;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

fn application() -> CreateRequest {
    CreateRequest::default()
}

fn best_effort() -> CreateRequest {
    CreateRequest {
        best_effort: true,
        ..CreateRequest::default()
    }
}

fn at_level(level: Level) -> CreateRequest {
    CreateRequest {
        level,
        ..CreateRequest::default()
    }
}

fn code(document: &SetDocument) -> ReasonCode {
    document.reason.as_ref().unwrap().code
}

#[tokio::test]
async fn four_witnesses_agree_and_the_set_is_kept() {
    let world = World::new();
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert_eq!(document.level_reached, Some(Level::Application));
    for testimony in [
        &document.witnesses.filesystems,
        &document.witnesses.writers,
        &document.witnesses.time,
        &document.witnesses.host,
    ] {
        assert_eq!(testimony.value, Word::Agrees, "{testimony:?}");
    }
    assert!(document.finished);
    assert_eq!(document.copies.len(), 2);
    assert_eq!(world.storages[0].snapshots(), ["root Kept", "data Kept"]);
    assert!(world.log().contains(&"agent told kept".to_owned()));
    let order = world.positions(&[
        "agent prepare",
        "storage0 snapshot-set-prepare",
        "agent freeze",
        "storage0 snapshot-set-mark",
        "storage0 snapshot-set-commit",
        "agent thaw",
        "storage0 snapshot-set-keep",
        "agent post_snapshot",
        "agent told complete",
    ]);
    assert_eq!(document.backup_succeeded, Some(true));
    assert!(order.is_sorted(), "{:#?}", world.log());
    let steps: Vec<Step> = document.timings.steps.iter().map(|t| t.step).collect();
    assert_eq!(steps, Step::ALL);
    // What is on disk is what was answered.
    let stored = world.sets().find(&document.set.to_string()).unwrap();
    assert_eq!(stored.document(), document);
}

#[tokio::test]
async fn several_daemons_hold_all_before_any_commits_and_release_after_all() {
    let world = World::with_daemons(&[&["root"], &["data"]]);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    let log = world.log();
    let last = |what: &str| log.iter().rposition(|l| l.ends_with(what)).unwrap();
    let first = |what: &str| log.iter().position(|l| l.ends_with(what)).unwrap();
    assert!(last("set-hold") < first("set-commit"), "{log:#?}");
    assert!(last("set-commit") < first("set-release"), "{log:#?}");
    assert!(last("set-release") < first("agent thaw"), "{log:#?}");
    let controls: Vec<_> = document.copies.iter().map(|c| &c.control).collect();
    assert_ne!(controls[0], controls[1]);
}

/// A command that fails, in whatever way, at whatever step: nothing is left, and what was begun is undone in reverse.
#[tokio::test]
async fn every_failure_at_every_step_undoes_everything() {
    let failing = [
        ("qemu", "query-status", Step::Identified),
        ("qemu", "qom-get", Step::Identified),
        ("storage", "query-volumes", Step::Identified),
        ("agent", "hello", Step::Identified),
        ("agent", "identify", Step::Identified),
        ("agent", "prepare", Step::Prepared),
        ("storage", "snapshot-set-prepare", Step::StoragePrepared),
        ("agent", "freeze", Step::Frozen),
        ("storage", "snapshot-set-mark", Step::Marked),
        ("storage", "snapshot-set-hold", Step::Marked),
        ("storage", "snapshot-set-commit", Step::Committed),
        ("storage", "snapshot-set-release", Step::Committed),
        ("agent", "thaw", Step::Verdict),
        ("storage", "snapshot-set-keep", Step::Kept),
    ];
    for (peer, command, step) in failing {
        let refusal = match peer {
            "agent" => "INTERNAL",
            _ => "GenericError",
        };
        for fault in [Fault::Refuse(refusal), Fault::Hang, Fault::Close] {
            let world = World::with_daemons(&[&["root"], &["data"]]);
            let name = match &fault {
                Fault::Refuse(_) => "refused",
                Fault::Hang => "hanging",
                Fault::Close | Fault::Late(_) | Fault::Meanwhile(_) => "closed",
            };
            match peer {
                "qemu" => world.qemu.peer.on(command, fault),
                "agent" => world.agent.peer.on(command, fault),
                // The second daemon fails: the first has done its part already.
                _ => world.storages[1].peer.on(command, fault),
            }
            let document = world.create(application()).await;
            let what = format!("{peer} {command} {name}: {document:#?} {:#?}", world.log());
            assert!(
                matches!(document.outcome, Outcome::Refused | Outcome::Failed),
                "{what}"
            );
            assert_eq!(document.reason.as_ref().unwrap().step, step, "{what}");
            assert!(document.copies.is_empty(), "{what}");
            assert!(document.finished, "{what}");
            fakes::until(&what, || !world.agent.is_frozen() && !world.agent.has_set()).await;
            for storage in &world.storages {
                fakes::until(&what, || {
                    storage.snapshots().is_empty() && !storage.is_holding()
                })
                .await;
            }
            if step > Step::StoragePrepared && step < Step::Verdict && name == "refused" {
                let log = world.log();
                let abort = |peer: &str| {
                    log.iter()
                        .position(|l| l.starts_with(peer) && l.ends_with("abort"))
                        .unwrap_or_else(|| panic!("{what}"))
                };
                assert!(abort("storage1") < abort("storage0"), "{what}");
                assert!(abort("storage0") < abort("agent"), "{what}");
            }
        }
    }
}

/// A virtio-serial port does not tell that the agent was killed and came back: what was asked of the old one has no answer.
#[tokio::test]
async fn an_agent_that_is_started_anew_while_it_is_waited_for_is_noticed() {
    for (command, step) in [("prepare", Step::Prepared), ("freeze", Step::Frozen)] {
        let world = World::new();
        let run = |name: &str| {
            let name = name.to_owned();
            world.agent.change(move |guest| guest.run = Some(name));
        };
        run("1");
        world.agent.peer.on(command, Fault::Hang);
        let agent = world.agent.clone();
        let another = move || agent.change(|guest| guest.run = Some("2".to_owned()));
        world
            .agent
            .peer
            .on("status", Fault::Meanwhile(Arc::new(another)));
        let limits = Limits {
            prepare: Duration::from_secs(600),
            writer_ms: 60_000,
            ..short_limits()
        };
        let sets = Sets::open(&world.state_dir(), limits, FaultPoint::default()).unwrap();
        let (progress, _steps) = mpsc::unbounded_channel();
        let (_keep, cancel) = watch::channel(false);
        let document = sets
            .create(world.target(), application(), progress, cancel)
            .await
            .unwrap();
        let reason = document.reason.as_ref().unwrap();
        assert_eq!(reason.code, ReasonCode::AgentUnreachable, "{reason:#?}");
        assert_eq!(reason.step, step);
        let text = format!("{reason:?}");
        assert!(text.contains("started anew"), "{text}");
        world.assert_nothing_left();
    }
}

/// An agent that is stopped and does not come back says nothing any more; QEMU says that it has let go of its port.
#[tokio::test]
async fn an_agent_that_lets_go_of_its_port_is_not_waited_for() {
    for (command, step, code) in [
        ("freeze", Step::Frozen, ReasonCode::AgentUnreachable),
        ("thaw", Step::Verdict, ReasonCode::HoldBroken),
        ("prepare", Step::Prepared, ReasonCode::AgentUnreachable),
    ] {
        let world = World::new();
        world.agent.peer.on(command, Fault::Hang);
        let limits = Limits {
            prepare: Duration::from_secs(60),
            writer_ms: 60_000,
            ..short_limits()
        };
        let sets = Sets::open(&world.state_dir(), limits, FaultPoint::default()).unwrap();
        let (progress, _steps) = mpsc::unbounded_channel();
        let (_keep, cancel) = watch::channel(false);
        let began = std::time::Instant::now();
        let stopping = async {
            let asked = format!("agent {command}");
            fakes::until(&asked, || world.log().contains(&asked)).await;
            world.qemu.emit_port("agent0", false);
        };
        let making = sets.create(world.target(), application(), progress, cancel);
        let (document, ()) = tokio::join!(making, stopping);
        let document = document.unwrap();
        assert_eq!(document.outcome, Outcome::Refused, "{document:#?}");
        let reason = document.reason.as_ref().unwrap();
        assert_eq!((reason.code, reason.step), (code, step), "{reason:?}");
        assert!(reason.message.contains("let go of its port"), "{reason:?}");
        assert!(began.elapsed() < Duration::from_secs(20), "{command}");
        world.assert_nothing_left();
    }
}

/// One that only takes its time is waited for, to the limit.
#[tokio::test]
async fn an_agent_that_is_still_the_same_is_waited_for() {
    let world = World::new();
    world.agent.change(|guest| guest.run = Some("1".to_owned()));
    let late = Duration::from_millis(4_500);
    world.agent.peer.on("prepare", Fault::Late(late));
    let limits = Limits {
        prepare: Duration::from_secs(60),
        ..short_limits()
    };
    let sets = Sets::open(&world.state_dir(), limits, FaultPoint::default()).unwrap();
    let (progress, _steps) = mpsc::unbounded_channel();
    let (_keep, cancel) = watch::channel(false);
    let document = sets
        .create(world.target(), application(), progress, cancel)
        .await
        .unwrap();
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
}

#[tokio::test]
async fn a_writer_that_did_not_hold_refuses_alone() {
    let world = World::new();
    world
        .agent
        .change(|guest| guest.not_held = vec!["db".to_owned()]);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Refused);
    assert_eq!(code(&document), ReasonCode::HoldBroken);
    assert_eq!(document.witnesses.writers.value, Word::Disagrees);
    assert_eq!(document.witnesses.filesystems.value, Word::Agrees);
    assert_eq!(document.witnesses.host.value, Word::Agrees);
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_writer_that_says_nothing_refuses_alone() {
    let world = World::new();
    world
        .agent
        .change(|guest| guest.silent = vec!["db".to_owned()]);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Refused);
    assert_eq!(document.witnesses.writers.value, Word::Disagrees);
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_writer_that_is_gone_before_it_is_asked_refuses_alone() {
    let writers = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    for (excluded, outcome) in [(false, Outcome::Refused), (true, Outcome::Kept)] {
        let world = World::new();
        world
            .agent
            .change(|guest| guest.writers = writers(&["db", "queue"]));
        let guest = Arc::clone(&world.agent.guest);
        let ends = move || guest.lock().unwrap().writers = writers(&["db"]);
        world
            .agent
            .peer
            .on("prepare", Fault::Meanwhile(Arc::new(ends)));
        let request = CreateRequest {
            exclude_writers: if excluded {
                writers(&["queue"])
            } else {
                Vec::new()
            },
            ..application()
        };
        let document = world.create(request).await;
        assert_eq!(document.outcome, outcome, "{document:#?}");
        if !excluded {
            assert_eq!(document.witnesses.writers.value, Word::Disagrees);
            assert!(document.witnesses.writers.evidence[0].contains("queue"));
            world.assert_nothing_left();
        }
    }
}

#[tokio::test]
async fn a_writer_whose_position_moved_refuses_alone() {
    let world = World::new();
    world.agent.change(|guest| guest.evidence_at_thaw = 2);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Refused);
    assert_eq!(document.witnesses.writers.value, Word::Disagrees);
    assert_eq!(document.witnesses.time.value, Word::Agrees);
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_file_system_thawed_by_somebody_else_refuses() {
    let world = World::new();
    world
        .agent
        .change(|guest| guest.thawed_by_others = vec!["/m1".to_owned()]);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Refused);
    assert_eq!(document.witnesses.filesystems.value, Word::Disagrees);
    assert_eq!(document.witnesses.host.value, Word::Agrees);
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_writable_file_system_that_nobody_froze_refuses_alone() {
    let world = World::new();
    world
        .agent
        .change(|guest| guest.unfreezable = vec!["/m1".to_owned()]);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Refused);
    assert_eq!(document.witnesses.filesystems.value, Word::Disagrees);
    assert_eq!(document.witnesses.writers.value, Word::Agrees);
    assert_eq!(document.witnesses.time.value, Word::Agrees);
    assert_eq!(document.witnesses.host.value, Word::Agrees);
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_guest_clock_over_the_limit_refuses_alone() {
    let world = World::new();
    world.agent.change(|guest| guest.hold_ms = 10_001);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Refused);
    assert_eq!(document.witnesses.time.value, Word::Disagrees);
    assert_eq!(document.witnesses.filesystems.value, Word::Agrees);
    world.assert_nothing_left();
}

#[tokio::test]
async fn writes_seen_by_the_host_refuse_alone() {
    let world = World::new();
    world.storages[0].write_in_window(1);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Refused);
    assert_eq!(document.witnesses.host.value, Word::Disagrees);
    for testimony in [
        &document.witnesses.filesystems,
        &document.witnesses.writers,
        &document.witnesses.time,
    ] {
        assert_eq!(testimony.value, Word::Agrees, "{testimony:?}");
    }
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_left_out_file_system_is_allowed_until_the_host_sees_a_write() {
    let request = CreateRequest {
        exclude_filesystems: vec!["/m1".to_owned()],
        ..CreateRequest::default()
    };
    let world = World::new();
    let document = world.create(request.clone()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert!(document.notes.iter().any(|note| note.contains("/m1")));
    let world = World::new();
    world.storages[0].write_in_window(3);
    let document = world.create(request).await;
    assert_eq!(document.outcome, Outcome::Refused);
    assert_eq!(document.witnesses.filesystems.value, Word::Agrees);
    assert_eq!(document.witnesses.host.value, Word::Disagrees);
}

#[tokio::test]
async fn swap_is_not_watched_but_a_frozen_file_system_cannot_be_hidden() {
    let extent = |start_bytes| DiskExtent {
        serial: "ser-data".to_owned(),
        disk: "vd1".to_owned(),
        start_bytes,
        length_bytes: 4096,
    };
    let world = World::new();
    world.agent.change(|guest| guest.exempt = vec![extent(0)]);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert_eq!(
        world.storages[0].exempt(),
        json!([{"volume": "data", "ranges": [{"offset-bytes": 0, "length-bytes": 4096}]}])
    );
    let world = World::new();
    world
        .agent
        .change(|guest| guest.exempt = vec![extent(1 << 20)]);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Refused);
    assert_eq!(document.witnesses.host.value, Word::Disagrees);
    world.assert_nothing_left();
}

fn not_to_snapshot() -> Option<Box<NotToSnapshot>> {
    Some(Box::new(NotToSnapshot {
        patterns: 1,
        files: 1,
        names: vec!["/var/cache/big".to_owned()],
        bytes: 2048,
        extents: vec![DiskExtent {
            serial: "ser-data".to_owned(),
            disk: "vd1".to_owned(),
            start_bytes: 512,
            length_bytes: 2048,
        }],
        ..NotToSnapshot::default()
    }))
}

#[tokio::test]
async fn what_need_not_be_in_a_copy_is_left_out_and_told() {
    let world = World::new();
    world
        .agent
        .change(|guest| guest.not_to_snapshot = not_to_snapshot());
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert_eq!(
        world.storages[0].left_out(),
        json!([{"volume": "data", "ranges": [{"offset-bytes": 512, "length-bytes": 2048}]}])
    );
    let left_out = |copy: &Copy| (copy.serial == "ser-data").then_some(copy.left_out_bytes);
    assert_eq!(document.copies.iter().find_map(left_out), Some(2048));
    let told = document.not_to_snapshot.as_ref().unwrap();
    assert_eq!((told.bytes, told.extents.len()), (2048, 0));
    assert!(
        document
            .notes
            .iter()
            .any(|note| note.contains("/var/cache/big"))
    );
}

/// A compromised guest could name all that it has, and nobody would notice before a restore.
#[tokio::test]
async fn no_more_is_left_out_than_the_requester_allows() {
    // Of two disks of 4096 bytes; pieces count once, and as far as the disk goes.
    let cases = [
        (None, 6144, true),
        (None, 6656, false),
        (Some(0), 512, false),
        (Some(100), 8192, true),
        (Some(10), 1024, false),
    ];
    for (percent, bytes, is_left_out) in cases {
        let world = World::new();
        let piece = |name: &str, start_bytes, length_bytes| DiskExtent {
            serial: format!("ser-{name}"),
            disk: String::new(),
            start_bytes,
            length_bytes,
        };
        let found = NotToSnapshot {
            extents: vec![
                piece("data", 0, bytes.min(3072)),
                piece("data", 0, 4096.min(bytes)),
                piece("root", 0, bytes.saturating_sub(4096)),
                piece("data", 4096, 1 << 40),
            ],
            ..NotToSnapshot::default()
        };
        let found = Some(Box::new(found));
        world.agent.change(|guest| guest.not_to_snapshot = found);
        let request = CreateRequest {
            leave_out_percent: percent,
            ..application()
        };
        let document = world.create(request).await;
        let what = format!("{percent:?} {bytes}: {document:#?}");
        assert_eq!(document.outcome, Outcome::Kept, "{what}");
        let told = |note: &String| note.contains("may be left out");
        assert_eq!(document.notes.iter().any(told), !is_left_out, "{what}");
        let refused = if is_left_out { 0 } else { bytes };
        assert_eq!(document.leave_out_refused_bytes, refused, "{what}");
        assert_eq!(world.storages[0].left_out() != Value::Null, is_left_out);
    }
}

#[tokio::test]
async fn nothing_is_left_out_of_a_copy_whose_file_systems_were_not_held() {
    let world = World::new();
    world.agent.change(|guest| {
        guest.not_to_snapshot = not_to_snapshot();
        guest.thawed_by_others = vec!["/m0".to_owned()];
    });
    let document = world.create(best_effort()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert_eq!(document.level_reached, Some(Level::Crash));
    assert_eq!(world.storages[0].left_out(), Value::Null);
    assert!(document.copies.iter().all(|copy| copy.left_out_bytes == 0));
}

#[tokio::test]
async fn a_store_that_does_not_say_what_it_left_out_has_left_out_all_that_it_was_told() {
    let world = World::new();
    world
        .agent
        .change(|guest| guest.not_to_snapshot = not_to_snapshot());
    world.storages[0]
        .peer
        .on("snapshot-set-leave-out", Fault::Refuse("CommandNotFound"));
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert!(document.finished);
    let left_out = |copy: &Copy| (copy.serial == "ser-data").then_some(copy.left_out_bytes);
    assert_eq!(document.copies.iter().find_map(left_out), Some(2048));
    for told in ["up to 2048 bytes", "how much went is not known"] {
        let is_told = |note: &String| note.contains(told);
        assert!(document.notes.iter().any(is_told), "{told}: {document:#?}");
    }
}

#[tokio::test]
async fn without_writers_a_set_is_never_called_application() {
    let world = World::new();
    world.agent.change(|guest| guest.writers.clear());
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Refused);
    assert_eq!(code(&document), ReasonCode::LevelNotReached);
    world.assert_nothing_left();
    let document = world.create(best_effort()).await;
    assert_eq!(document.outcome, Outcome::Kept);
    assert_eq!(document.level_reached, Some(Level::Filesystem));
    // Nobody may truncate logs for a copy that is not application-consistent.
    assert!(world.log().contains(&"agent told aborted".to_owned()));
}

#[tokio::test]
async fn the_filesystem_level_asks_no_writer() {
    let world = World::new();
    let document = world.create(at_level(Level::Filesystem)).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert_eq!(document.level_reached, Some(Level::Filesystem));
    assert_eq!(document.witnesses.writers.value, Word::NotHeard);
    assert!(document.writers.iter().all(|writer| !writer.in_scope));
}

#[tokio::test]
async fn the_crash_level_needs_no_agent() {
    let world = World::with_daemons(&[&["root"], &["data"]]);
    let document = world.create(at_level(Level::Crash)).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert_eq!(document.level_reached, Some(Level::Crash));
    assert!(!world.log().iter().any(|line| line.starts_with("agent")));
}

#[tokio::test]
async fn best_effort_goes_down_one_level_at_a_veto() {
    let world = World::new();
    world
        .agent
        .peer
        .on("freeze", Fault::Refuse("FREEZE_FAILED"));
    let document = world.create(best_effort()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert_eq!(document.level_reached, Some(Level::Crash));
    assert_eq!(document.attempts.len(), 1);
    let world = World::new();
    let agent = world.agent.peer.clone();
    let veto = Arc::new(move || agent.heal());
    world.agent.peer.on("prepare", Fault::Refuse("WRITER_VETO"));
    // The next identify heals the guest: the second attempt asks no writer.
    let peer = world.agent.peer.clone();
    world.agent.peer.on(
        "abort",
        Fault::Meanwhile(Arc::new(move || {
            veto();
            peer.note("healed");
        })),
    );
    let document = world.create(best_effort()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert_eq!(document.level_reached, Some(Level::Filesystem));
    assert_eq!(code_of_attempt(&document), ReasonCode::WriterVeto);
}

fn code_of_attempt(document: &SetDocument) -> ReasonCode {
    document.attempts[0].reason.code
}

#[tokio::test]
async fn best_effort_keeps_and_labels_what_the_witnesses_support() {
    let world = World::new();
    world.storages[0].write_in_window(1);
    let document = world.create(best_effort()).await;
    assert_eq!(document.outcome, Outcome::Kept);
    assert_eq!(document.level_reached, Some(Level::Crash));
    let world = World::new();
    world.agent.change(|guest| guest.evidence_at_thaw = 2);
    let document = world.create(best_effort()).await;
    assert_eq!(document.level_reached, Some(Level::Filesystem));
}

#[tokio::test]
async fn best_effort_takes_a_paused_vm_at_crash_level() {
    let world = World::new();
    world.qemu.set_running(false);
    let document = world.create(application()).await;
    assert_eq!(code(&document), ReasonCode::VmNotRunning);
    let document = world.create(best_effort()).await;
    assert_eq!(document.outcome, Outcome::Kept);
    assert_eq!(document.level_reached, Some(Level::Crash));
}

#[tokio::test]
async fn a_migrating_vm_is_refused_before_anything_is_touched() {
    let world = World::new();
    world.qemu.set_migration(Some("active"));
    let document = world.create(best_effort()).await;
    assert_eq!(document.outcome, Outcome::Failed);
    assert_eq!(code(&document), ReasonCode::VmMigrating);
    assert!(!world.log().iter().any(|line| line.starts_with("agent")));
    world.assert_nothing_left();
    world.qemu.set_migration(Some("completed"));
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Kept);
}

#[tokio::test]
async fn events_of_the_vm_between_freeze_and_commit_undo_at_once() {
    for event in ["STOP", "RESET", "SHUTDOWN", "DEVICE_DELETED", "MIGRATION"] {
        let world = World::new();
        let qemu = world.qemu.clone();
        let hit = Fault::Meanwhile(Arc::new(move || qemu.emit(event)));
        world.storages[0].peer.on("snapshot-set-mark", hit);
        // The commit would take longer than the test.
        world.storages[0]
            .peer
            .on("snapshot-set-commit", Fault::Hang);
        let began = std::time::Instant::now();
        let document = world.create(application()).await;
        assert_eq!(document.outcome, Outcome::Refused, "{event}: {document:#?}");
        assert_eq!(code(&document), ReasonCode::VmDisturbed, "{event}");
        assert!(began.elapsed() < Duration::from_secs(5));
        fakes::until("undone", || {
            !world.agent.is_frozen() && world.storages[0].snapshots().is_empty()
        })
        .await;
    }
}

#[tokio::test]
async fn events_of_the_vm_between_commit_and_verdict_reach_the_verdict() {
    let world = World::new();
    let qemu = world.qemu.clone();
    let hit = Fault::Meanwhile(Arc::new(move || {
        qemu.emit("STOP");
        qemu.emit("RESUME");
    }));
    world.agent.peer.on("thaw", hit);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Refused, "{document:#?}");
    assert_eq!(document.witnesses.time.value, Word::Disagrees);
    world.assert_nothing_left();
}

#[tokio::test]
async fn events_that_do_not_matter_are_passed_over() {
    let world = World::new();
    let qemu = world.qemu.clone();
    let hit = Fault::Meanwhile(Arc::new(move || {
        qemu.emit("RTC_CHANGE");
        qemu.emit_port("console0", false);
        qemu.emit_port("agent0", true);
        qemu.emit("AN_EVENT_OF_THE_YEAR_2040");
    }));
    world.agent.peer.on("thaw", hit);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
}

#[tokio::test]
async fn a_commit_that_takes_longer_than_the_hold_is_given_up() {
    let world = World::new();
    world.storages[0].peer.on(
        "snapshot-set-commit",
        Fault::Late(Duration::from_millis(1500)),
    );
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Refused);
    assert_eq!(code(&document), ReasonCode::HoldWritesTimeout);
    assert!(document.reason.as_ref().unwrap().retryable);
    fakes::until("undone", || {
        !world.agent.is_frozen() && world.storages[0].snapshots().is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_daemon_that_finds_the_hold_broken_refuses_the_set() {
    let world = World::new();
    world.storages[0]
        .peer
        .on("snapshot-set-commit", Fault::Refuse("HoldBroken"));
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Refused);
    assert_eq!(code(&document), ReasonCode::HoldWritesTimeout);
    world.assert_nothing_left();
}

#[tokio::test]
async fn time_spent_freezing_is_taken_from_the_commit() {
    let world = World::new();
    // The guest says that freezing took no time at all: its clock stood still.
    world
        .agent
        .peer
        .on("freeze", Fault::Late(Duration::from_millis(600)));
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    let limit = world.storages[0].commit_limit_ms();
    assert!(limit <= 400, "{limit} ms were left to the commit");
    assert!(document.timings.hold_ms.unwrap() >= 600.0);
}

#[tokio::test]
async fn the_dead_man_in_the_guest_is_believed() {
    let world = World::new();
    let agent = world.agent.clone();
    let hit = Fault::Meanwhile(Arc::new(move || agent.thaw_by_dead_man()));
    world.storages[0].peer.on("snapshot-set-commit", hit);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Refused, "{document:#?}");
    assert_eq!(code(&document), ReasonCode::HoldBroken);
    world.assert_nothing_left();
}

#[tokio::test]
async fn a_disk_that_is_not_ours_refuses_application_unless_excluded() {
    let world = World::new();
    *world.qemu.block.lock().unwrap() = vec![
        json!({"device": "", "qdev": "/machine/peripheral/other/virtio-backend",
            "inserted": {"ro": false, "file": "/o.qcow2", "node-name": "n"}, "type": "unknown"}),
        json!({"device": "cd", "qdev": "/machine/peripheral/cd",
            "inserted": {"ro": true, "file": "/cd.iso"}, "type": "unknown"}),
        json!({"device": "pflash1", "qdev": "/machine/system.flash1",
            "inserted": {"ro": false, "file": "/vars.fd"}, "type": "unknown"}),
        json!({"device": "tray", "qdev": "/machine/peripheral-anon/device[1]", "type": "unknown"}),
    ];
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Refused);
    assert_eq!(code(&document), ReasonCode::DiskNotCovered);
    assert!(!world.log().iter().any(|line| line.starts_with("agent")));
    let excluding = CreateRequest {
        exclude_disks: vec!["other".to_owned()],
        ..CreateRequest::default()
    };
    let document = world.create(excluding).await;
    assert_eq!(
        document.level_reached,
        Some(Level::Application),
        "{document:#?}"
    );
    assert_eq!(document.uncovered_disks.len(), 1);
    let document = world.create(best_effort()).await;
    assert_eq!(document.level_reached, Some(Level::Filesystem));
}

#[tokio::test]
async fn a_disk_that_is_plugged_in_while_the_set_is_made_rules_out_application() {
    // By the word of the agent it could have been mounted, and a writer's files on it, when `prepare` was answered.
    let plug_in = |world: &World| {
        let block = Arc::clone(&world.qemu.block);
        let entry = json!({"device": "", "qdev": "/machine/peripheral/late/virtio-backend",
            "inserted": {"ro": false, "file": "/l.qcow2", "node-name": "l"}, "type": "unknown"});
        let hit = Fault::Meanwhile(Arc::new(move || block.lock().unwrap().push(entry.clone())));
        world.agent.peer.on("prepare", hit);
    };
    let world = World::new();
    plug_in(&world);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Refused, "{document:#?}");
    assert_eq!(code(&document), ReasonCode::VmDisturbed);
    let reason = document.reason.as_ref().unwrap();
    assert!(reason.retryable && reason.message.contains("late: plugged in"));
    world.assert_nothing_left();

    let world = World::new();
    plug_in(&world);
    let document = world.create(best_effort()).await;
    assert_eq!(document.level_reached, Some(Level::Filesystem));
    assert_eq!(document.uncovered_disks.len(), 1, "{document:#?}");

    let world = World::new();
    plug_in(&world);
    let leaving_out = CreateRequest {
        exclude_disks: vec!["late".to_owned()],
        ..CreateRequest::default()
    };
    let document = world.create(leaving_out).await;
    assert_eq!(
        document.level_reached,
        Some(Level::Application),
        "{document:#?}"
    );
}

#[tokio::test]
async fn writers_that_cannot_be_told_do_not_undo_a_kept_set() {
    for fault in [Fault::Hang, Fault::Close] {
        let world = World::new();
        world.agent.peer.on("post_snapshot", fault);
        let document = world.create(application()).await;
        assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
        assert!(document.finished);
        assert!(document.notes.iter().any(|note| note.contains("not told")));
        assert_eq!(world.storages[0].snapshots().len(), 2);
    }
}

/// It has asked them, and nobody knows what they said.
#[tokio::test]
async fn an_agent_that_cannot_tell_what_writers_said_of_post_snapshot_ends_the_set() {
    let world = World::new();
    let fault = Fault::Refuse("INTERNAL");
    world.agent.peer.on("post_snapshot", fault);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Refused, "{document:#?}");
    assert_eq!(code(&document), ReasonCode::WriterVeto);
    world.assert_nothing_left();
}

#[test]
fn post_snapshot_is_waited_for_longer_than_the_agent_waits_for_a_writer() {
    let agents = Duration::from_millis(guest_agent_wire::host::POST_SNAPSHOT_MS);
    assert!(Limits::default().post > agents);
}

fn fail(world: &World, at: WriterState, how: WriterFailure) {
    world.agent.change(|guest| guest.fails = Some((at, how)));
}

/// What VSS says of it: FAILED_AT_POST_SNAPSHOT. No writer may believe any more that it was backed up, and truncate its logs.
#[tokio::test]
async fn a_writer_that_fails_at_post_snapshot_ends_the_set() {
    let at = WriterState::FailedAtPostSnapshot;
    for (how, retryable) in [
        (WriterFailure::Nonretryable, false),
        (WriterFailure::PartialFailure, true),
    ] {
        for backup_type in [BackupType::Copy, BackupType::Full] {
            let world = World::new();
            fail(&world, at, how);
            let request = CreateRequest {
                backup_type,
                ..application()
            };
            let document = world.create(request).await;
            assert_eq!(document.outcome, Outcome::Refused, "{document:#?}");
            let reason = document.reason.as_ref().unwrap();
            assert_eq!(reason.code, ReasonCode::WriterVeto);
            assert_eq!((reason.step, reason.retryable), (Step::Finished, retryable));
            assert!(reason.message.contains("db could not"), "{reason:?}");
            assert_eq!(document.level_reached, Some(Level::Filesystem));
            assert_eq!(document.witnesses.writers.value, Word::Disagrees);
            assert!(document.finished && document.copies.is_empty() && !document.awaits_backup);
            let post = document.writers[0].post.as_ref().unwrap();
            assert_eq!((post.state, post.failure.as_ref().unwrap().code), (at, how));
            world.assert_nothing_left();
            assert!(world.agent.guest.lock().unwrap().incomplete.is_empty());
            assert!(!world.log().contains(&"agent told complete".to_owned()));
            let stored = world.sets().find(&document.set.to_string()).unwrap();
            assert_eq!(stored.document(), document);
        }
    }
}

#[tokio::test]
async fn best_effort_keeps_the_set_of_a_writer_that_fails_at_post_snapshot_under_another_name() {
    let world = World::new();
    let at = WriterState::FailedAtPostSnapshot;
    fail(&world, at, WriterFailure::Retryable);
    let request = CreateRequest {
        backup_type: BackupType::Full,
        ..best_effort()
    };
    let document = world.create(request).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert_eq!(document.level_reached, Some(Level::Filesystem));
    let says = |what| document.notes.iter().any(|note| note.contains(what));
    assert!(says("file systems are consistent") && !says("applications without a writer"));
    assert_eq!(document.copies.len(), 2);
    assert!(document.finished && !document.awaits_backup);
    assert!(world.agent.guest.lock().unwrap().incomplete.is_empty());
    let stored = world.sets().find(&document.set.to_string()).unwrap();
    assert_eq!(stored.document(), document);
}

/// A bridge that dies in between leaves a record that recovery undoes, and no copy that is called `application`.
#[tokio::test]
async fn a_set_that_a_writer_ended_is_not_called_kept_while_it_is_deleted() {
    let world = World::new();
    let at = WriterState::FailedAtPostSnapshot;
    fail(&world, at, WriterFailure::Nonretryable);
    let found = Arc::new(Mutex::new(Vec::new()));
    let (sets, seen) = (world.sets(), Arc::clone(&found));
    let look = move || {
        let documents = sets.documents().unwrap();
        let outcomes = documents.iter().map(|document| document.outcome);
        seen.lock().unwrap().extend(outcomes);
    };
    world.storages[0]
        .peer
        .on("snapshot-set-delete", Fault::Meanwhile(Arc::new(look)));
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Refused, "{document:#?}");
    assert_eq!(*found.lock().unwrap(), [Outcome::Open]);
}

/// Nor is it forgotten if a daemon cannot be asked.
#[tokio::test]
async fn a_set_that_a_writer_ended_is_deleted_when_its_daemon_answers_again() {
    let world = World::new();
    let at = WriterState::FailedAtPostSnapshot;
    fail(&world, at, WriterFailure::Nonretryable);
    world.storages[0].peer.on("query-snapshots", Fault::Hang);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Open, "{document:#?}");
    world.storages[0].peer.heal();
    let ended = world.sets().recover().await.unwrap();
    assert_eq!(ended[0].outcome, Outcome::Undone);
    assert_eq!(code(&ended[0]), ReasonCode::WriterVeto);
    world.assert_nothing_left();
}

/// The copy is what it was when the writers heard that it is kept.
#[tokio::test]
async fn a_writer_that_fails_at_backup_complete_is_told_of_and_costs_no_level() {
    let world = World::new();
    let at = WriterState::FailedAtBackupComplete;
    fail(&world, at, WriterFailure::Timeout);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert_eq!(document.level_reached, Some(Level::Application));
    let said = document.writers[0].complete.as_ref().unwrap();
    assert_eq!(said.state, at);
    let code = said.failure.as_ref().unwrap().code;
    assert_eq!(code, WriterFailure::Timeout);
    let noted = |note: &String| note.contains("db could not");
    assert!(document.notes.iter().any(noted), "{:#?}", document.notes);
}

/// The states of VSS, one after the other, as the set's document has them.
#[tokio::test]
async fn the_states_of_a_writer_stand_in_the_document_in_their_order() {
    let world = World::new();
    let shut_down = (
        WriterState::FailedAtBackupshutdown,
        Some(WriterFailure::Retryable),
    );
    world.agent.change(|guest| guest.found = shut_down);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    let writer = serde_json::to_value(&document.writers[0]).unwrap();
    let steps = ["identify", "prepare", "freeze", "thaw", "post", "complete"];
    let states = steps.map(|step| writer[step]["state"].as_str().unwrap());
    assert_eq!(
        states,
        [
            // What became of the backup before, whose requester went without a word.
            "FAILED_AT_BACKUPSHUTDOWN",
            "WAITING_FOR_FREEZE",
            "WAITING_FOR_THAW",
            "WAITING_FOR_POST_SNAPSHOT",
            "WAITING_FOR_BACKUP_COMPLETE",
            "STABLE",
        ]
    );
    assert_eq!(writer["identify"]["last_failure"]["code"], "RETRYABLE");
}

#[tokio::test]
async fn a_second_set_of_the_vm_is_refused_at_once() {
    let world = World::new();
    world
        .agent
        .peer
        .on("prepare", Fault::Late(Duration::from_millis(500)));
    let sets = world.sets();
    let (progress, mut steps) = mpsc::unbounded_channel();
    let (_keep, cancel) = watch::channel(false);
    let first = tokio::spawn({
        let (sets, target) = (sets.clone(), world.target());
        async move { sets.create(target, application(), progress, cancel).await }
    });
    steps.recv().await.unwrap();
    let (progress, _steps) = mpsc::unbounded_channel();
    let (_keep, cancel) = watch::channel(false);
    let began = std::time::Instant::now();
    let second = sets
        .create(world.target(), application(), progress, cancel)
        .await;
    assert!(matches!(second, Err(Error::SetInProgress { .. })));
    assert!(began.elapsed() < Duration::from_millis(300));
    // The first is untouched by it, also by the recovery that every command begins with.
    assert!(sets.recover().await.unwrap().is_empty());
    assert_eq!(first.await.unwrap().unwrap().outcome, Outcome::Kept);
}

#[tokio::test]
async fn a_cancelled_set_is_undone() {
    let world = World::new();
    world.storages[0].peer.on(
        "snapshot-set-commit",
        Fault::Late(Duration::from_millis(800)),
    );
    let (progress, mut steps) = mpsc::unbounded_channel();
    let (cancel, cancelled) = watch::channel(false);
    let making = tokio::spawn({
        let (sets, target) = (world.sets(), world.target());
        async move {
            sets.create(target, application(), progress, cancelled)
                .await
        }
    });
    while steps.recv().await.unwrap().step != Step::Marked {}
    cancel.send(true).unwrap();
    let document = making.await.unwrap().unwrap();
    assert_eq!(document.outcome, Outcome::Failed);
    assert_eq!(code(&document), ReasonCode::Cancelled);
    fakes::until("undone", || {
        !world.agent.is_frozen() && world.storages[0].snapshots().is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_set_that_cannot_be_undone_stays_open_until_recovery_can() {
    let world = World::new();
    world.storages[0].write_in_window(1);
    world.storages[0].peer.on("snapshot-set-abort", Fault::Hang);
    world.storages[0].peer.on("query-snapshots", Fault::Hang);
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Open, "{document:#?}");
    assert!(world.sets().recover().await.unwrap().is_empty());
    let id = document.set.to_string();
    let deleted = world.sets().delete(&id, false).await;
    assert!(matches!(deleted, Err(Error::InvalidState(_))));
    world.storages[0].peer.heal();
    let ended = world.sets().recover().await.unwrap();
    assert_eq!(ended.len(), 1);
    assert_eq!(ended[0].outcome, Outcome::Undone);
    assert_eq!(code(&ended[0]), ReasonCode::HoldBroken);
    world.assert_nothing_left();
}

#[tokio::test]
async fn delete_takes_the_copies_and_the_record() {
    let world = World::new();
    let document = world.create(application()).await;
    let sets = world.sets();
    let snapshot = document.copies[0].snapshot.to_string();
    sets.delete(&snapshot, false).await.unwrap();
    assert_eq!(world.storages[0].snapshots(), ["data Kept"]);
    let prefix = &document.set.to_string()[..8];
    assert_eq!(sets.find(prefix).unwrap().copies().len(), 1);
    sets.delete(prefix, false).await.unwrap();
    assert!(world.storages[0].snapshots().is_empty());
    assert!(matches!(sets.find(prefix), Err(Error::NotFound(_))));
}

#[tokio::test]
async fn a_set_whose_daemon_is_gone_for_good_can_be_forgotten() {
    let world = World::new();
    let document = world.create(application()).await;
    std::fs::remove_file(&world.storages[0].control).unwrap();
    let (sets, id) = (world.sets(), document.set.to_string());
    assert!(matches!(
        sets.delete(&id, false).await,
        Err(Error::Storage(_))
    ));
    sets.delete(&id, true).await.unwrap();
    assert!(sets.documents().unwrap().is_empty());
}

#[tokio::test]
async fn a_bridge_that_stood_still_leaves_the_daemon_the_whole_limit_from_its_mark() {
    let world = World::new();
    // Between the mark and the commit 300 ms pass here: the daemon counts them itself.
    world.storages[0]
        .peer
        .on("snapshot-set-mark", Fault::Late(Duration::from_millis(300)));
    let document = world.create(application()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert!(world.storages[0].commit_limit_ms() > 900);
}

#[tokio::test]
async fn list_tells_which_copies_are_gone() {
    let world = World::new();
    world.create(application()).await;
    assert_eq!(
        world.sets().list(None).await.unwrap()[0].copies_found,
        Some(2)
    );
    world.storages[0].lose("data");
    assert_eq!(
        world.sets().list(None).await.unwrap()[0].copies_found,
        Some(1)
    );
    world.storages[0].peer.on("query-snapshots", Fault::Hang);
    assert_eq!(world.sets().list(None).await.unwrap()[0].copies_found, None);
    assert!(world.sets().list(Some("other")).await.unwrap().is_empty());
}

#[tokio::test]
async fn revert_is_refused_while_a_disk_is_in_use_and_forgets_newer_sets() {
    let world = World::new();
    let older = world.create(application()).await;
    let newer = world.create(application()).await;
    let sets = world.sets();
    let id = older.set.to_string();
    assert!(matches!(
        sets.revert(&id).await,
        Err(Error::InvalidState(_))
    ));
    assert!(!world.log().iter().any(|line| line.ends_with("revert")));
    // One that is let go a moment later is waited for.
    let asked = || {
        let log = world.log();
        log.iter()
            .filter(|line| line.ends_with("query-volumes"))
            .count()
    };
    let before = asked();
    let let_go = async {
        while asked() == before {
            tokio::task::yield_now().await;
        }
        world.storages[0].set_connected(false);
    };
    let (reverted, ()) = tokio::join!(sets.revert(&id), let_go);
    reverted.unwrap();
    let left: Vec<_> = sets.documents().unwrap().iter().map(|d| d.set).collect();
    assert_eq!(left, [older.set], "{} is gone", newer.set);
}

#[test]
fn the_limits_of_the_window_are_those_of_vss() {
    let limits = qmp_bridge::snapshot::run::Limits::default();
    assert_eq!((limits.hold_ms, limits.writer_ms), (10_000, 60_000));
    let request = CreateRequest {
        hold_limit_ms: Some(20_000),
        writer_limit_ms: Some(5),
        ..CreateRequest::default()
    };
    let limits = short_limits().for_request(&request);
    assert_eq!((limits.hold_ms, limits.writer_ms), (1000, 5));
}
