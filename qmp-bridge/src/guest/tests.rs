//! A guest in somebody else's hands: whatever it says, the bridge goes on.

use super::lines::LineDecoder;
use super::*;
use crate::link::Decode as _;
use guest_agent_wire::MESSAGE_BYTES_MAX;
use proptest::prelude::*;
use serde_json::json;

fn asked(times: usize) -> LineDecoder {
    let mut decoder = LineDecoder::default();
    for _ in 0..times {
        decoder.asked();
    }
    decoder
}

#[test]
fn a_guest_that_talks_on_is_cut_off_after_what_it_was_asked_for() {
    let answer = b"{\"id\":1,\"return\":{}}\n";
    for calls in [0, 1, 5] {
        let mut decoder = asked(calls);
        let heard = (0..1000)
            .take_while(|_| decoder.decode(answer).is_ok())
            .count();
        assert_eq!(heard, 64 + calls);
    }
    // Blank lines and garbage count too.
    let mut decoder = asked(1);
    assert!(decoder.decode(&[b'\n'; 66]).is_err());
}

#[test]
fn a_line_without_end_and_a_flood_of_bytes_are_cut_off() {
    let mut decoder = asked(9);
    let whole = MESSAGE_BYTES_MAX / 4096;
    for _ in 0..whole {
        decoder.decode(&[b'x'; 4096]).unwrap();
    }
    assert!(decoder.decode(b"x").unwrap_err().contains("longer"));
    let mut decoder = asked(1);
    let line = [&[b'x'; 4095][..], b"\n"].concat();
    let heard = (0..10_000)
        .take_while(|_| decoder.decode(&line).is_ok())
        .count();
    assert!(heard * line.len() <= 2 * MESSAGE_BYTES_MAX, "{heard}");
}

#[test]
fn deep_nesting_is_no_answer_and_no_overflow_of_the_stack() {
    let deep = format!("{{\"id\":1,\"return\":{}}}\n", "[".repeat(500_000));
    assert_eq!(lines::answers(&[deep.as_bytes()]), []);
    let close = "[".repeat(100_000) + &"]".repeat(100_000);
    let deep = format!("{{\"id\":1,\"return\":{close}}}\n");
    assert_eq!(lines::answers(&[deep.as_bytes()]), []);
}

#[test]
fn an_agent_of_another_version_is_told_from_one_that_makes_no_sense() {
    // A newer agent that refuses the versions offered.
    let refusal = json!({"code": "VERSION_MISMATCH", "message": "this agent speaks versions [7]", "retryable": false});
    let error = dialling::greeted(Err(refusal)).unwrap_err().to_string();
    assert!(
        error.starts_with("VERSION_MISMATCH") && error.contains("[7]"),
        "{error}"
    );
    // One that answers a version that was not offered.
    let hello = json!({"version": 7, "agent": "agent 9", "boot_id": "b"});
    let error = dialling::greeted(Ok(hello)).unwrap_err().to_string();
    assert!(
        error.starts_with("VERSION_MISMATCH") && error.contains("agent 9"),
        "{error}"
    );
    // What an agent of a later version says beside is passed over.
    let hello = json!({"version": PROTOCOL_VERSIONS[0], "agent": "a", "boot_id": "b", "more": [1]});
    assert!(dialling::greeted(Ok(hello)).is_ok());
    assert!(matches!(
        dialling::greeted(Ok(json!("hello"))),
        Err(GuestError::BadAnswer { .. })
    ));
}

const SAMPLES: [&str; 4] = [
    include_str!("../../../guest-agent/wire/tests/golden/host-identify.json"),
    include_str!("../../../guest-agent/wire/tests/golden/host-freeze.json"),
    include_str!("../../../guest-agent/wire/tests/golden/host-thaw.json"),
    include_str!("../../../guest-agent/wire/tests/golden/host-error.json"),
];

/// A value of any kind in place of another.
fn anything() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        Just(Value::from(u64::MAX)),
        any::<f64>().prop_map(Value::from),
        ".{0,40}".prop_map(Value::from),
        "[\u{0}-\u{9f}\u{2028}\u{202e}]{0,20}".prop_map(Value::from),
        Just(json!([[], {}, [{"a": 1}]])),
    ]
}

/// Every place in a value, from the root on.
fn places(value: &Value, at: String, found: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                places(member, format!("{at}/{name}"), found);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                places(item, format!("{at}/{index}"), found);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
    found.push(at);
}

proptest! {
    #[test]
    fn no_bytes_of_a_guest_are_more_than_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400), cut in 0usize..400) {
        let (head, tail) = bytes.split_at(cut.min(bytes.len()));
        hear_anything(&[head, tail]);
    }

    #[test]
    fn an_answer_with_anything_in_any_place_is_believed_or_refused(sample in 0usize..4, place in any::<proptest::sample::Index>(), lie in anything()) {
        let samples: Value = serde_json::from_str(SAMPLES[sample]).unwrap();
        let mut found = Vec::new();
        places(&samples, String::new(), &mut found);
        let mut lying = samples.clone();
        *lying.pointer_mut(place.get(&found).as_str()).unwrap() = lie;
        let mut all = Vec::new();
        places(&lying, String::new(), &mut all);
        // Whatever shape the file of samples has: every part of it is tried as an answer.
        for part in all.iter().filter_map(|at| lying.pointer(at)) {
            let ok = json!({"id": 1, "return": part}).to_string() + "\n";
            let error = json!({"id": 1, "error": part}).to_string() + "\n";
            hear_anything(&[ok.as_bytes(), error.as_bytes()]);
        }
    }
}
