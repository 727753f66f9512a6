//! Bytes of a host and of a writer, as the agent hears them: both protocols of the host, and a writer's lines.
#![no_main]

use guest_agent::native;
use guest_agent::qga::stream::{Objects, Piece as Object};
use guest_agent_wire::MESSAGE_BYTES_MAX;
use guest_agent_wire::lines::{Lines, Piece};
use guest_agent_wire::metadata::Metadata;
use guest_agent_wire::writer::{FromWriter, Registration};

fn line(line: &[u8]) {
    drop(native::decode(line));
    drop(serde_json::from_slice::<Registration>(line));
    // Either a document comes in an answer, or these bytes are one.
    let metadata = match serde_json::from_slice::<FromWriter>(line) {
        Ok(FromWriter::Reply(reply)) => serde_json::from_value(reply.metadata).ok(),
        Ok(FromWriter::Progress(_) | FromWriter::Release(_)) => None,
        Err(_) => serde_json::from_slice::<Metadata>(line).ok(),
    };
    if let Some(metadata) = metadata {
        drop(metadata.check());
    }
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let (head, tail) = input.split_at(input.len() / 2);
    let (mut lines, mut objects) = (Lines::default(), Objects::default());
    for chunk in [head, tail] {
        lines.take(chunk, |piece| match piece {
            Piece::Line(bytes) => {
                assert!(bytes.len() < MESSAGE_BYTES_MAX && !bytes.contains(&0xff));
                line(&bytes);
            }
            Piece::Reset | Piece::TooLong => {}
        });
        objects.take(chunk, |piece| match piece {
            Object::Object(bytes) => {
                assert!(bytes.starts_with(b"{"));
                drop(serde_json::from_slice::<serde_json::Value>(&bytes));
            }
            Object::TooLong => {}
        });
    }
    // Without the cutters in its way, and what has become of a golden message, which has the request inside.
    line(input);
    if let Ok(message) = serde_json::from_slice::<serde_json::Value>(input)
        && let Some(request) = message.get("request")
    {
        line(request.to_string().as_bytes());
    }
});
