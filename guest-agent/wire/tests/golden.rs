//! The bytes of every message of both protocols, frozen: one file each in `golden`.
//!
//! A difference here is a change of the protocol. Bridges, agents and writers of an older version read the old bytes: add,
//! never change. The `match`es have no `_`: a new message does not compile until it is named here.

#![allow(
    clippy::unwrap_used,
    reason = "a test may panic; clippy sees only its #[test] functions as one"
)]

use guest_agent_wire::host::{
    Command, Frozen, Hello, Identified, Outcome, Prepared, Request, Response, Status, Thawed,
    WritersSaid,
};
use guest_agent_wire::metadata::Metadata;
use guest_agent_wire::writer::{Event, EventKind, FromWriter, Registration};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn golden(name: &str) -> Value {
    let path = directory().join(format!("{name}.json"));
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

/// The names of the files that begin with `prefix`, without it.
fn named(prefix: &str) -> BTreeSet<String> {
    let files = fs::read_dir(directory())
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let names = files.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned());
    names
        .filter_map(|name| name.strip_prefix(prefix).map(str::to_owned))
        .collect()
}

/// Reads the value as `T` and writes it again: nothing is lost, renamed or added.
fn survives<T: Serialize + DeserializeOwned>(name: &str, value: &Value) -> T {
    let read: T = serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(&serde_json::to_value(&read).unwrap(), value, "{name}");
    read
}

#[test]
fn every_request_of_the_bridge_and_its_answer_keep_their_bytes() {
    let names = named("host-");
    for name in names.iter().filter(|name| *name != "error") {
        let message = golden(&format!("host-{name}"));
        let request: Request = survives(name, &message["request"]);
        survives::<Response>(name, &message["response"]);
        let answer = &message["response"]["return"];
        let expected = match request.command {
            Command::Hello { .. } => {
                survives::<Hello>(name, answer);
                "hello"
            }
            Command::Identify {} => {
                survives::<Identified>(name, answer);
                "identify"
            }
            Command::Prepare(_) => {
                survives::<Prepared>(name, answer);
                "prepare"
            }
            Command::Freeze(_) => {
                survives::<Frozen>(name, answer);
                "freeze"
            }
            Command::Thaw { .. } => {
                survives::<Thawed>(name, answer);
                "thaw"
            }
            Command::PostSnapshot(_) => {
                survives::<WritersSaid>(name, answer);
                "post_snapshot"
            }
            Command::BackupComplete(_) => {
                survives::<WritersSaid>(name, answer);
                "backup_complete"
            }
            Command::PreRestore(_) => {
                survives::<WritersSaid>(name, answer);
                "pre_restore"
            }
            Command::PostRestore(_) => {
                survives::<WritersSaid>(name, answer);
                "post_restore"
            }
            Command::Abort { .. } => {
                assert_eq!(answer, &json!({}));
                "abort"
            }
            Command::Status {} => {
                survives::<Status>(name, answer);
                "status"
            }
        };
        assert_eq!(name, expected);
    }
    assert_eq!(names.len(), 12, "a command has no file: {names:?}");
}

#[test]
fn a_failed_request_keeps_its_bytes() {
    let response: Response = survives("error", &golden("host-error")["response"]);
    assert!(matches!(response.outcome, Outcome::Error(_)));
}

#[test]
fn every_event_for_a_writer_keeps_its_bytes() {
    let names = named("writer-event-");
    for name in &names {
        let event: Event = survives(name, &golden(&format!("writer-event-{name}")));
        let expected = match event.kind {
            EventKind::Welcome(_) => "welcome",
            EventKind::Identify {} => "identify",
            EventKind::PrepareBackup(_) => "prepare_backup",
            EventKind::PrepareSnapshot(_) => "prepare_snapshot",
            EventKind::Freeze(_) => "freeze",
            EventKind::Thaw(_) => "thaw",
            EventKind::PostSnapshot(_) => "post_snapshot",
            EventKind::BackupComplete(_) => "backup_complete",
            EventKind::BackupShutdown(_) => "backup_shutdown",
            EventKind::Abort(_) => "abort",
            EventKind::PreRestore(_) => "pre_restore",
            EventKind::PostRestore(_) => "post_restore",
        };
        assert_eq!(name, expected);
    }
    assert_eq!(names.len(), 12, "an event has no file: {names:?}");
}

#[test]
fn what_a_writer_says_keeps_its_bytes() {
    survives::<Registration>("registration", &golden("writer-registration"));
    for name in ["reply", "progress", "release"] {
        let expected = match survives(name, &golden(&format!("writer-{name}"))) {
            FromWriter::Reply(_) => "reply",
            FromWriter::Progress(_) => "progress",
            FromWriter::Release(_) => "release",
        };
        assert_eq!(name, expected);
    }
    let document: Metadata = survives("metadata", &golden("writer-metadata"));
    assert_eq!(document.check(), Ok(()));
}
