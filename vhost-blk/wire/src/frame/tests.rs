//! The stream is split where values end, however the bytes arrive.

use super::{FrameError, JsonStream, MESSAGE_BYTES_MAX};
use serde_json::json;

#[test]
fn values_without_newlines_are_split_where_they_end() {
    let mut stream = JsonStream::new();
    stream.push(br#"{"execute":"a"}{"execute":"b"} "#).unwrap();
    assert_eq!(stream.next_value().unwrap(), Some(json!({"execute": "a"})));
    assert_eq!(stream.next_value().unwrap(), Some(json!({"execute": "b"})));
    assert_eq!(stream.next_value().unwrap(), None);
}

#[test]
fn a_value_that_arrives_byte_by_byte_is_whole_at_its_last_byte() {
    let message = br#"{"execute":"snapshot-set-commit","arguments":{"set":"x"}}"#;
    let mut stream = JsonStream::new();
    for byte in &message[..message.len() - 1] {
        stream.push(std::slice::from_ref(byte)).unwrap();
        assert_eq!(stream.next_value().unwrap(), None);
    }
    stream.push(b"}").unwrap();
    assert!(stream.next_value().unwrap().is_some());
}

#[test]
fn garbage_is_refused() {
    let mut stream = JsonStream::new();
    stream.push(b"hello\n").unwrap();
    assert!(matches!(stream.next_value(), Err(FrameError::NotJson(_))));
}

#[test]
fn an_endless_value_is_refused_before_memory_is_taken() {
    let mut stream = JsonStream::new();
    stream.push(b"\"").unwrap();
    let block = [b'x'; 4096];
    let mut pushed = 1;
    loop {
        match stream.push(&block) {
            Ok(()) => pushed += block.len(),
            Err(error) => {
                assert!(matches!(error, FrameError::TooLong));
                break;
            }
        }
        assert!(pushed <= MESSAGE_BYTES_MAX);
    }
}
