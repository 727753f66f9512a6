//! The bytes of both protocols are what PROTOCOL.md shows.

use crate::host::{Command, Outcome, Request, Response};
use crate::writer::{Event, EventKind, Freeze, FromWriter};
use serde_json::json;

#[test]
fn a_request_is_one_flat_object() {
    let request = Request {
        id: 7,
        command: Command::Thaw {
            set: "s".into(),
            generation: 3,
        },
    };
    let bytes = json!({"id": 7, "execute": "thaw", "arguments": {"set": "s", "generation": 3}});
    assert_eq!(serde_json::to_value(&request).unwrap(), bytes);
    assert_eq!(serde_json::from_value::<Request>(bytes).unwrap(), request);
}

#[test]
fn an_answer_is_one_flat_object() {
    let response = Response {
        id: 7,
        outcome: Outcome::Return(json!({})),
    };
    let bytes = json!({"id": 7, "return": {}});
    assert_eq!(serde_json::to_value(&response).unwrap(), bytes);
    assert_eq!(serde_json::from_value::<Response>(bytes).unwrap(), response);
}

#[test]
fn an_event_is_one_flat_object() {
    let event = Event {
        seq: 4,
        deadline_ms: 100,
        kind: EventKind::Freeze(Freeze {
            set: "s".into(),
            generation: 1,
            hold_ms: 10_000,
        }),
    };
    let bytes = json!({"seq": 4, "deadline_ms": 100, "event": "freeze", "set": "s", "generation": 1, "hold_ms": 10_000});
    assert_eq!(serde_json::to_value(&event).unwrap(), bytes);
    assert_eq!(serde_json::from_value::<Event>(bytes).unwrap(), event);
}

#[test]
fn a_writers_three_kinds_of_line_are_told_apart_and_a_fourth_is_not_understood() {
    let heard = |value| serde_json::from_value::<FromWriter>(value).ok();
    assert!(matches!(
        heard(json!({"seq": 1, "ok": true, "progress": "of no meaning here"})),
        Some(FromWriter::Reply(_))
    ));
    assert!(matches!(
        heard(json!({"seq": 1, "progress": "checkpoint"})),
        Some(FromWriter::Progress(_))
    ));
    assert!(matches!(
        heard(json!({"release": "its lock is gone", "generation": 7})),
        Some(FromWriter::Release(_))
    ));
    assert_eq!(heard(json!({"seq": 1})), None);
}

#[test]
fn a_metadata_document_of_another_version_does_not_hide_the_writer() {
    let info = json!({"class_id": "c", "instance_id": "i", "name": "n", "level": "BACK_END", "freeze_timeout_ms": 1,
        "hold": "app", "state": "STABLE", "metadata": {"components": [{"type": "table"}], "restore_method": 4}});
    let info: crate::host::WriterInfo = serde_json::from_value(info).unwrap();
    assert_eq!(info.name, "n");
    assert_eq!(info.metadata, None);
}
