//! The document's shape is a promise to programs: it is compared with a frozen sample.

use super::super::witness::{Testimony, Word};
use super::*;
use std::path::PathBuf;

fn sample() -> SetDocument {
    let vm = VmTarget {
        name: "db1".to_owned(),
        qmp: PathBuf::from("/run/db1.qmp"),
        agent: Some("/run/db1.agent".parse().unwrap()),
        vhost_blk: vec![PathBuf::from("/run/blk.control")],
    };
    let request = CreateRequest {
        method: Some(Method::Row),
        exclude_writers: vec!["indexer".to_owned()],
        ..CreateRequest::default()
    };
    let set = Uuid::from_u128(1);
    let mut document = SetDocument::begin(set, vm, request, 1_795_338_307_000);
    document.outcome = Outcome::Refused;
    document.level_reached = Some(Level::Crash);
    document.reason = Some(Reason {
        code: ReasonCode::HoldBroken,
        message: "host: root: 1 writes".to_owned(),
        step: Step::Verdict,
        retryable: true,
    });
    document.attempts = vec![Attempt {
        level: Level::Application,
        reason: Reason {
            code: ReasonCode::WriterVeto,
            message: "db: no".to_owned(),
            step: Step::Prepared,
            retryable: false,
        },
    }];
    document.finished = true;
    document.timings = Timings {
        steps: vec![StepTime {
            step: Step::StoragePrepared,
            at_ms: 1.5,
            took_ms: 0.25,
        }],
        freeze_to_thaw_ms: Some(30.0),
        hold_ms: Some(20.0),
        guest: Some(GuestTimes {
            sync_ms: 1,
            writers_ms: 2,
            filesystems_ms: 3,
            hold_ms: Some(4),
        }),
        storage: vec![StorageTimes {
            control: PathBuf::from("/run/blk.control"),
            drain_us: 1,
            record_us: 2,
            hold_us: 3,
            since_mark_us: 4,
        }],
    };
    document.witnesses.host = Testimony {
        value: Word::Disagrees,
        evidence: vec!["root: 1 writes".to_owned()],
    };
    document.copies = vec![Copy {
        volume: "root".to_owned(),
        volume_id: Uuid::from_u128(2),
        serial: "ser".to_owned(),
        snapshot: Uuid::from_u128(3),
        control: PathBuf::from("/run/blk.control"),
        size_bytes: 4096,
        method: Method::Cow,
        created_unix_ms: 5,
        read_with: "vmshadow read ID --output FILE".to_owned(),
        left_out_bytes: 4096,
    }];
    document.uncovered_disks = vec![UncoveredDisk {
        device: "cd".to_owned(),
        why: "why".to_owned(),
        excluded: true,
    }];
    document.notes = vec!["note".to_owned()];
    document.undone = vec!["guest: aborted".to_owned()];
    if let Some(writer) = document.writer("i") {
        writer.in_scope = true;
    }
    if let Some(filesystem) = document.filesystem("/m") {
        filesystem.freeze = None;
    }
    document
}

#[test]
fn the_shape_is_frozen() {
    let text = serde_json::to_string_pretty(&sample()).unwrap() + "\n";
    let golden = include_str!("golden.json");
    if text != golden {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/set-document.json");
        std::fs::write(path, &text).unwrap();
        panic!("the document's shape has changed; what it is now is in {path}");
    }
    let back: SetDocument = serde_json::from_str(golden).unwrap();
    assert_eq!(back, sample());
}

#[test]
fn reasons_have_the_names_of_vss() {
    assert_eq!(
        ReasonCode::SnapshotSetInProgress.name(),
        "SNAPSHOT_SET_IN_PROGRESS"
    );
    assert_eq!(ReasonCode::HoldWritesTimeout.name(), "HOLD_WRITES_TIMEOUT");
    assert_eq!(
        ReasonCode::InsufficientStorage.name(),
        "INSUFFICIENT_STORAGE"
    );
}

#[test]
fn only_a_missed_level_exits_3() {
    assert!(ReasonCode::WriterVeto.is_about_the_level());
    assert!(ReasonCode::HoldBroken.is_about_the_level());
    assert!(!ReasonCode::InsufficientStorage.is_about_the_level());
    assert!(!ReasonCode::Cancelled.is_about_the_level());
}

#[test]
fn steps_have_stable_names() {
    for step in Step::ALL {
        assert_eq!(Step::from_name(step.as_str()), Some(step));
        assert_eq!(
            serde_json::to_value(step).unwrap(),
            serde_json::Value::String(step.as_str().to_owned())
        );
    }
    assert_eq!(Step::from_name("nowhere"), None);
}
