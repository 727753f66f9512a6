//! The conversation as bytes.

use super::*;
use guest_agent_wire::MESSAGE_BYTES_MAX;
use std::sync::atomic::Ordering;

fn lines() -> Lines {
    let waiting = Arc::new(Waiting::default());
    waiting.sync.store(12, Ordering::Release);
    Lines {
        cutter: Cutter::default(),
        meaning: Meaning {
            waiting,
            first_sync: 10,
        },
    }
}

fn ids(lines: &mut Lines, bytes: &[u8]) -> Vec<u64> {
    let messages = lines.decode(bytes).unwrap();
    messages
        .into_iter()
        .map(|message| match message {
            Incoming::Answer { id, .. } => id,
            Incoming::Unasked(value) => panic!("{value}"),
        })
        .collect()
}

#[test]
fn nothing_is_an_answer_before_the_sync_is_echoed() {
    let mut lines = lines();
    lines.meaning.waiting.id.store(12, Ordering::Release);
    // An answer to another host, its sync, a complaint about half a command, and syncs that were sent again.
    let before = b"{\"return\": 1}\n\xff{\"return\": 9}\n{\"error\": {\"class\": \"GenericError\", \"desc\": \"\"}}\n";
    assert_eq!(ids(&mut lines, before), [0_u64; 0]);
    assert_eq!(ids(&mut lines, b"\xff{\"return\": 10}\n\xff{\"ret"), [10]);
    assert_eq!(ids(&mut lines, b"urn\": 12}\n"), [12]);
    lines.meaning.waiting.id.store(13, Ordering::Release);
    // An echo that comes late is no answer to what was asked since.
    assert_eq!(
        ids(
            &mut lines,
            b"\xff{\"return\": 11}\n{\"return\": \"thawed\"}\n"
        ),
        [13]
    );
}

#[test]
fn a_command_in_one_piece_with_the_sync_is_answered_by_what_follows_the_echo() {
    let mut lines = lines();
    lines.meaning.waiting.id.store(12, Ordering::Release);
    lines
        .meaning
        .waiting
        .command_follows
        .store(true, Ordering::Release);
    let bytes = b"{\"return\": 4}\n\xff{\"return\": 12}\n{\"return\": 2}\n";
    let messages = lines.decode(bytes).unwrap();
    let [Incoming::Answer { id: 12, result }] = messages.as_slice() else {
        panic!("{messages:?}");
    };
    assert_eq!(result, &Ok(json!(2)));
}

#[test]
fn a_line_without_end_is_given_up() {
    let mut lines = lines();
    for _ in 0..8 {
        lines.asked();
    }
    let much = vec![b'x'; MESSAGE_BYTES_MAX + 1];
    let why = lines.decode(&much).unwrap_err();
    assert!(why.contains("a line is longer"), "{why}");
}
