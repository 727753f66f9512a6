//! Whole sets of VMs whose guest has QEMU's own agent and none of ours: what level they reach, what is never claimed, and that
//! nobody is left frozen although that agent has no dead-man.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fakes;

use fakes::qga::{Guest, vssadmin};
use fakes::{Fault, World, until};
use qmp_bridge::snapshot::document::{CreateRequest, Outcome, ReasonCode, SetDocument};
use qmp_bridge::snapshot::level::Level;
use qmp_bridge::snapshot::step::Step;
use qmp_bridge::snapshot::witness::Word;
use std::time::Duration;

fn at_level(level: Level) -> CreateRequest {
    CreateRequest {
        level,
        ..CreateRequest::default()
    }
}

fn best_effort() -> CreateRequest {
    CreateRequest {
        best_effort: true,
        ..CreateRequest::default()
    }
}

fn refusal(document: &SetDocument) -> (ReasonCode, Step) {
    assert_ne!(document.outcome, Outcome::Kept, "{document:#?}");
    let reason = document.reason.as_ref().unwrap();
    (reason.code, reason.step)
}

fn words(document: &SetDocument) -> [Word; 4] {
    let witnesses = &document.witnesses;
    [
        witnesses.filesystems.value,
        witnesses.writers.value,
        witnesses.time.value,
        witnesses.host.value,
    ]
}

#[tokio::test]
async fn a_linux_guest_reaches_filesystem_and_its_document_says_what_is_missing() {
    let world = World::with_qga(Guest::linux());
    let document = world.create(at_level(Level::Filesystem)).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert_eq!(document.level_reached, Some(Level::Filesystem));
    let [agrees, not_heard] = [Word::Agrees, Word::NotHeard];
    assert_eq!(words(&document), [agrees, not_heard, agrees, agrees]);
    let said = document.qemu_guest_agent.as_ref().unwrap();
    assert_eq!((said.frozen, said.thawed), (Some(2), Some(2)));
    assert!(
        document
            .notes
            .iter()
            .any(|n| n.contains("no dead-man in the guest")),
        "{:?}",
        document.notes
    );
    let order = world.positions(&[
        "qga guest-sync-delimited",
        "storage0 snapshot-set-prepare",
        "qga guest-fsfreeze-freeze",
        "storage0 snapshot-set-mark",
        "storage0 snapshot-set-commit",
        "qga guest-fsfreeze-thaw",
        "storage0 snapshot-set-keep",
    ]);
    assert!(order.is_sorted(), "{:#?}", world.log());
    let stored = world.sets().find(&document.set.to_string()).unwrap();
    assert_eq!(stored.document(), document);
}

#[tokio::test]
async fn a_linux_guest_is_not_frozen_for_a_level_that_it_cannot_reach() {
    let world = World::with_qga(Guest::linux());
    let document = world.create(CreateRequest::default()).await;
    assert_eq!(
        refusal(&document),
        (ReasonCode::LevelNotReached, Step::Prepared)
    );
    assert!(!world.log().iter().any(|l| l.contains("fsfreeze-freeze")));
    world.assert_nothing_left();
    let document = world.create(best_effort()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert_eq!(document.level_reached, Some(Level::Filesystem));
    assert_eq!(document.attempts.len(), 1);
}

#[tokio::test]
async fn a_windows_guest_reaches_application_when_vss_and_each_of_its_writers_say_so() {
    let world = World::with_qga(Guest::windows());
    let document = world.create(CreateRequest::default()).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert_eq!(document.level_reached, Some(Level::Application));
    assert_eq!(words(&document), [Word::Agrees; 4]);
    let said = document.qemu_guest_agent.as_ref().unwrap();
    let writers = said.vss_writers.as_ref().unwrap();
    let names: Vec<&str> = writers.iter().map(|w| w.name.as_str()).collect();
    assert_eq!(names, ["Registry Writer", "SqlServerWriter"]);
    assert!(document.notes.iter().any(|n| n.contains("through VSS")));
    // The writers are asked when nothing is held any more.
    let order = world.positions(&["qga guest-fsfreeze-thaw", "qga guest-exec"]);
    assert!(order.is_sorted(), "{:#?}", world.log());
}

#[tokio::test]
async fn a_writer_that_failed_in_vss_vetoes_and_best_effort_tells_the_lower_level() {
    let world = World::with_qga(Guest::windows());
    let list = vssadmin(&[("Registry Writer", 1), ("SqlServerWriter", 9)]);
    world.qga().change(|guest| guest.vssadmin = Some(list));
    let document = world.create(CreateRequest::default()).await;
    assert_eq!(refusal(&document), (ReasonCode::WriterVeto, Step::Verdict));
    let message = &document.reason.as_ref().unwrap().message;
    assert!(
        message.contains("SqlServerWriter: FAILED_AT_FREEZE"),
        "{message}"
    );
    world.assert_nothing_left();
    let document = world.create(best_effort()).await;
    assert_eq!(document.level_reached, Some(Level::Filesystem));
}

#[tokio::test]
async fn without_a_word_of_its_writers_a_windows_set_is_no_application_set() {
    let world = World::with_qga(Guest::windows());
    for silence in [
        None,
        Some(vssadmin(&[])),
        Some("Error: Access denied".to_owned()),
    ] {
        world.qga().change(|guest| guest.vssadmin = silence);
        let document = world.create(CreateRequest::default()).await;
        assert_eq!(
            refusal(&document),
            (ReasonCode::LevelNotReached, Step::Verdict)
        );
        assert_eq!(document.witnesses.writers.value, Word::NotHeard);
        world.assert_nothing_left();
    }
}

#[tokio::test]
async fn writes_that_vss_could_not_hold_refuse_the_set_by_that_name() {
    let world = World::with_qga(Guest::windows());
    let desc = "couldn't hold writes: fsfreeze is limited up to 10 seconds: (error: 80042314)";
    world
        .qga()
        .peer
        .on("guest-fsfreeze-thaw", Fault::Refuse(desc));
    for level in [Level::Application, Level::Filesystem] {
        let document = world.create(at_level(level)).await;
        assert_eq!(refusal(&document), (ReasonCode::HoldBroken, Step::Verdict));
        assert!(document.reason.as_ref().unwrap().retryable);
        assert_eq!(document.level_reached, Some(Level::Crash));
        world.assert_nothing_left();
    }
}

#[tokio::test]
async fn other_failures_of_vss_have_their_own_names() {
    let cases = [
        (
            "failed to do snapshot set: 0x800423F4",
            ReasonCode::WriterVeto,
        ),
        (
            "couldn't receive Frozen event from VSS provider: Unspecified error",
            ReasonCode::FlushWritesTimeout,
        ),
        (
            "failed to add E:\\ to snapshot set: 0x8004230C",
            ReasonCode::FreezeFailed,
        ),
        (
            "failed to start snapshot set: 0x80042316",
            ReasonCode::SnapshotSetInProgress,
        ),
    ];
    for (desc, code) in cases {
        let world = World::with_qga(Guest::windows());
        world
            .qga()
            .peer
            .on("guest-fsfreeze-freeze", Fault::Refuse(desc));
        let document = world.create(CreateRequest::default()).await;
        assert_eq!(refusal(&document), (code, Step::Frozen), "{desc}");
        world.assert_nothing_left();
    }
}

#[tokio::test]
async fn a_guest_that_somebody_else_froze_is_left_as_it_is() {
    let world = World::with_qga(Guest::linux());
    world.qga().change(|guest| guest.frozen = Some(2));
    let document = world.create(at_level(Level::Filesystem)).await;
    assert_eq!(refusal(&document).0, ReasonCode::SnapshotSetInProgress);
    assert!(world.qga().is_frozen(), "{:#?}", world.log());
}

#[tokio::test]
async fn counts_that_do_not_fit_are_no_consistency() {
    let world = World::with_qga(Guest::linux());
    world.qga().change(|guest| guest.thawed_by_others = 1);
    let document = world.create(at_level(Level::Filesystem)).await;
    assert_eq!(refusal(&document).0, ReasonCode::HoldBroken);
    assert_eq!(document.witnesses.filesystems.value, Word::Disagrees);
    // A file system that is listed and was not frozen.
    let world = World::with_qga(Guest::linux());
    world
        .qga()
        .change(|guest| guest.filesystems.push(("vda2", "/boot/efi", "vfat")));
    let document = world.create(at_level(Level::Filesystem)).await;
    assert_eq!(
        document.witnesses.filesystems.value,
        Word::Disagrees,
        "{document:#?}"
    );
    world.assert_nothing_left();
    // Unless the requester left it out.
    let request = CreateRequest {
        exclude_filesystems: vec!["/boot/efi".to_owned()],
        ..at_level(Level::Filesystem)
    };
    let document = world.create(request).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
    assert!(
        world
            .log()
            .contains(&"qga guest-fsfreeze-freeze-list".to_owned())
    );
    // What has nothing to freeze is not missed.
    world.qga().change(|guest| {
        guest.filesystems.retain(|f| f.2 != "vfat");
        guest.filesystems.push(("loop0", "/snap/core", "squashfs"));
    });
    let document = world.create(at_level(Level::Filesystem)).await;
    assert_eq!(document.outcome, Outcome::Kept, "{document:#?}");
}

#[tokio::test]
async fn a_write_in_the_window_is_seen_whatever_the_agent_says() {
    let world = World::with_qga(Guest::windows());
    world.storages[0].write_in_window(1);
    let document = world.create(CreateRequest::default()).await;
    assert_eq!(refusal(&document).0, ReasonCode::HoldBroken);
    assert_eq!(document.witnesses.host.value, Word::Disagrees);
}

#[tokio::test]
async fn a_freeze_that_comes_late_is_thawed_by_the_command_that_waits_behind_it() {
    let world = World::with_qga(Guest::linux());
    // Longer than the hold's limit and the margin of these tests together, and than a new connection is given.
    let late = Fault::Late(Duration::from_millis(3000));
    world.qga().peer.on("guest-fsfreeze-freeze", late);
    let document = world.create(at_level(Level::Filesystem)).await;
    assert_eq!(refusal(&document).1, Step::Frozen);
    // Nobody heard of a thaw yet.
    assert_eq!(document.outcome, Outcome::Open, "{document:#?}");
    until("the guest was thawed", || {
        world.log().contains(&"qga guest-fsfreeze-thaw".to_owned())
    })
    .await;
    assert!(!world.qga().is_frozen());
    let ended = world.sets().recover().await.unwrap();
    assert_eq!(ended.len(), 1);
}

#[tokio::test]
async fn a_bridge_that_dies_while_the_guest_is_frozen_is_followed_by_one_that_thaws_it() {
    let world = World::with_qga(Guest::linux());
    let mut command = world.vmshadow_create(&["--level", "filesystem"]);
    command.env("VMSHADOW_STOP_AT", "committed");
    let mut bridge = command.spawn().unwrap();
    until("frozen", || {
        world
            .log()
            .contains(&"storage0 snapshot-set-commit".to_owned())
    })
    .await;
    bridge.kill().await.unwrap();
    assert!(world.qga().is_frozen());
    // While the agent does not answer, the record stays open.
    world.qga().peer.on("guest-sync-delimited", Fault::Hang);
    world.qga().peer.on("guest-fsfreeze-thaw", Fault::Hang);
    assert!(world.sets().recover().await.unwrap().is_empty());
    world.qga().peer.heal();
    let ended = world.sets().recover().await.unwrap();
    assert_eq!(ended.first().unwrap().outcome, Outcome::Undone);
    world.assert_nothing_left();
    // A VM that is gone is not frozen either.
    assert!(world.sets().recover().await.unwrap().is_empty());
}
