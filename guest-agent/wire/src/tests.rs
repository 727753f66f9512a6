//! The bytes of both protocols are what PROTOCOL.md shows.

use crate::host::{Command, Outcome, Request, Response};
use crate::writer::{Event, EventKind};
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
        kind: EventKind::Freeze {
            set: "s".into(),
            generation: 1,
            hold_ms: 10_000,
        },
    };
    let bytes = json!({"seq": 4, "deadline_ms": 100, "event": "freeze", "set": "s", "generation": 1, "hold_ms": 10_000});
    assert_eq!(serde_json::to_value(&event).unwrap(), bytes);
    assert_eq!(serde_json::from_value::<Event>(bytes).unwrap(), event);
}
