//! Golden messages with anything in any place: refused, or believed and said again as they were understood.
//!
//! `make fuzz` goes on from here, in `qmp-bridge/fuzz`.

#![allow(
    clippy::unwrap_used,
    reason = "a test may panic; clippy sees only its #[test] functions as one"
)]

use guest_agent_wire::host::{
    Frozen, Hello, Identified, Prepared, Request, Response, Status, Thawed, WritersSaid,
};
use guest_agent_wire::metadata::Metadata;
use guest_agent_wire::writer::{Event, FromWriter, Registration};
use proptest::prelude::*;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use std::path::Path;

fn golden() -> Vec<Value> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut paths: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    // A failing case is the same one everywhere.
    paths.sort();
    let read = |path| serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    paths.iter().map(read).collect()
}

/// Every place in a value, as JSON pointers.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                let name = name.replace('~', "~0").replace('/', "~1");
                places(member, &format!("{at}/{name}"), found);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                places(item, &format!("{at}/{index}"), found);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn anything() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        Just(Value::from(u64::MAX)),
        any::<f64>().prop_map(Value::from),
        ".{0,40}".prop_map(Value::from),
        Just(json!([[], {}, [{"a": 1}]])),
        Just(json!({"": null})),
    ]
}

/// How many were believed: 0 or 1.
fn hear<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(said: &Value) -> usize {
    let Ok(understood) = serde_json::from_value::<T>(said.clone()) else {
        return 0;
    };
    let again = serde_json::from_value(serde_json::to_value(&understood).unwrap());
    assert_eq!(understood, again.unwrap());
    1
}

fn hear_all(said: &Value) -> usize {
    if let Ok(metadata) = serde_json::from_value::<Metadata>(said.clone()) {
        drop(metadata.check());
    }
    [
        hear::<Request>,
        hear::<Response>,
        hear::<Hello>,
        hear::<Identified>,
        hear::<Prepared>,
        hear::<Frozen>,
        hear::<Thawed>,
        hear::<WritersSaid>,
        hear::<Status>,
        hear::<Registration>,
        hear::<Event>,
        hear::<FromWriter>,
        hear::<Metadata>,
    ]
    .iter()
    .map(|hear| hear(said))
    .sum()
}

#[test]
fn every_golden_message_is_understood() {
    for message in golden() {
        let mut found = Vec::new();
        places(&message, "", &mut found);
        let parts = found.iter().filter_map(|at| message.pointer(at));
        assert!(parts.map(hear_all).sum::<usize>() > 0, "{message:#}");
    }
}

proptest! {
    #[test]
    fn a_message_with_anything_in_any_place_is_refused_or_understood(
        message in any::<proptest::sample::Index>(), place in any::<proptest::sample::Index>(), lie in anything()
    ) {
        let mut message = message.get(&golden()).clone();
        let mut found = Vec::new();
        places(&message, "", &mut found);
        *message.pointer_mut(place.get(&found).as_str()).unwrap() = lie;
        let mut found = Vec::new();
        places(&message, "", &mut found);
        for part in found.iter().filter_map(|at| message.pointer(at)) {
            hear_all(part);
        }
    }
}
