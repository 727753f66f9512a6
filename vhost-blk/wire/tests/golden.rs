//! The bytes of every command, answer and event, frozen: one file each in `golden`.
//!
//! A difference here is a change of the protocol. Clients of an older version read the old bytes: add, never change.

#![allow(
    clippy::unwrap_used,
    reason = "a test may panic; clippy sees only its #[test] functions as one"
)]

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use vhost_blk_wire::command::{
    BlockResize, COMMAND_NAMES, Command, Getfd, HandOver, QmpCapabilities, QueryCommands,
    QuerySnapshots, QueryVersion, QueryVolumes, QueryWrites, SnapshotDelete, SnapshotRead,
    SnapshotRevert, SnapshotSetAbort, SnapshotSetCommit, SnapshotSetDelete, SnapshotSetHold,
    SnapshotSetKeep, SnapshotSetLeaveOut, SnapshotSetMark, SnapshotSetPrepare, SnapshotSetRelease,
    WriteMark, WriteUnmark,
};
use vhost_blk_wire::event::Event;

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn golden(name: &str) -> Value {
    let path = directory().join(format!("{name}.json"));
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

/// Reads the value as `T` and writes it again: nothing is lost, renamed or added.
fn survives<T: Serialize + DeserializeOwned>(name: &str, value: &Value) {
    let read: T = serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(&serde_json::to_value(&read).unwrap(), value, "{name}");
}

fn check<C: Command>(checked: &mut BTreeSet<&'static str>) {
    let message = golden(C::NAME);
    survives::<C>(C::NAME, &message["arguments"]);
    survives::<C::Return>(C::NAME, &message["return"]);
    checked.insert(C::NAME);
}

#[test]
fn every_command_and_its_answer_keep_their_bytes() {
    let mut checked = BTreeSet::new();
    check::<QmpCapabilities>(&mut checked);
    check::<QueryVersion>(&mut checked);
    check::<QueryCommands>(&mut checked);
    check::<QueryVolumes>(&mut checked);
    check::<QuerySnapshots>(&mut checked);
    check::<SnapshotSetPrepare>(&mut checked);
    check::<SnapshotSetMark>(&mut checked);
    check::<SnapshotSetHold>(&mut checked);
    check::<SnapshotSetCommit>(&mut checked);
    check::<SnapshotSetRelease>(&mut checked);
    check::<SnapshotSetKeep>(&mut checked);
    check::<SnapshotSetLeaveOut>(&mut checked);
    check::<SnapshotSetAbort>(&mut checked);
    check::<SnapshotSetDelete>(&mut checked);
    check::<SnapshotDelete>(&mut checked);
    check::<SnapshotRevert>(&mut checked);
    check::<BlockResize>(&mut checked);
    check::<Getfd>(&mut checked);
    check::<SnapshotRead>(&mut checked);
    check::<WriteMark>(&mut checked);
    check::<QueryWrites>(&mut checked);
    check::<WriteUnmark>(&mut checked);
    check::<HandOver>(&mut checked);
    assert_eq!(checked, COMMAND_NAMES.iter().copied().collect());
}

/// Has no `_`: a new event does not compile until it is named here, and then needs its file.
fn name(event: &Event) -> &'static str {
    match event {
        Event::VolumeConnected { .. } => "VOLUME_CONNECTED",
        Event::VolumeDisconnected { .. } => "VOLUME_DISCONNECTED",
        Event::FrontEndRefused { .. } => "FRONT_END_REFUSED",
        Event::QueueFailed { .. } => "QUEUE_FAILED",
        Event::RequestsOvertaken { .. } => "REQUESTS_OVERTAKEN",
        Event::VolumeResized { .. } => "VOLUME_RESIZED",
        Event::VolumePoisoned { .. } => "VOLUME_POISONED",
        Event::ShadowStorageFull { .. } => "SHADOW_STORAGE_FULL",
        Event::SnapshotSetCommitted { .. } => "SNAPSHOT_SET_COMMITTED",
        Event::SnapshotSetKept { .. } => "SNAPSHOT_SET_KEPT",
        Event::SnapshotSetAborted { .. } => "SNAPSHOT_SET_ABORTED",
        Event::SnapshotsDeleted { .. } => "SNAPSHOTS_DELETED",
        Event::JobProgress { .. } => "JOB_PROGRESS",
    }
}

#[test]
fn every_event_keeps_its_bytes() {
    let files = fs::read_dir(directory())
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut events = 0;
    for path in files {
        let file = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if COMMAND_NAMES.contains(&file.as_str()) {
            continue;
        }
        let message = golden(&file);
        survives::<Event>(&file, &message);
        assert_eq!(name(&serde_json::from_value(message).unwrap()), file);
        events += 1;
    }
    assert_eq!(events, 13, "an event has no file");
}
