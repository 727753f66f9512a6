//! The native protocol: JSON lines from the bridge (guest-agent-wire::host), on any of its ports.
//!
//! Started by `main` on a thread of its own; hands requests to `quiesce::service` and knows nothing of how they are done.
//! Invariants: whatever ends a conversation ends the set that it had open, and no other; of several conversations the one
//! that said hello last is the bridge's.
#![deny(clippy::indexing_slicing)]

use crate::quiesce::actor::check_limits;
use crate::quiesce::cause::error;
use crate::quiesce::service::{self, Service};
use crate::transport::{Connection, Endpoint, Outbox, serve};
use guest_agent_wire::MESSAGE_BYTES_MAX;
use guest_agent_wire::host::{AgentError, Command, ErrorCode, Outcome, Request, Response};
use guest_agent_wire::lines::{Lines, Piece};
use serde_json::{Map, Value};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Which conversation is the bridge's: the one that said hello last, on whichever port. One that was lost without a word
/// (a vsock connection whose host end was killed) must stand in nobody's way.
#[derive(Debug, Default)]
pub struct Bridge {
    /// Number of that conversation, if it has not ended, and of the last one that began.
    current: Mutex<(Option<u64>, u64)>,
}

impl Bridge {
    fn lock(&self) -> MutexGuard<'_, (Option<u64>, u64)> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self) -> u64 {
        let mut current = self.lock();
        current.1 += 1;
        current.1
    }

    /// Ends the conversation, and the set if it is this conversation's.
    fn end(&self, conversation: u64, service: &Service) {
        let mut current = self.lock();
        if current.0 == Some(conversation) {
            current.0 = None;
            // Answered when the set is undone; nobody waits for it. Sent under the lock: no hello comes in between.
            service.ask(service::Request::HostGone, |_| {});
        }
    }
}

/// Serves the port for ever.
pub fn run(endpoint: &Endpoint, service: &Service, bridge: &Bridge) -> std::io::Error {
    serve(endpoint, |connection| {
        let conversation = bridge.begin();
        converse(connection, service, bridge, conversation);
        bridge.end(conversation, service);
    })
}

fn converse(connection: &Connection, service: &Service, bridge: &Bridge, conversation: u64) {
    let mut lines = Lines::default();
    let mut buffer = [0; 4096];
    while let Some(count) = connection.read(&mut buffer) {
        let mut over = false;
        lines.take(
            buffer.get(..count).unwrap_or_default(),
            |piece| match piece {
                Piece::Line(line) => {
                    // Held while asking, so that requests reach the actor in the order in which bridges took over.
                    let mut current = bridge.lock();
                    let mut greeted = current.0 == Some(conversation);
                    hear(&line, &mut greeted, service, &connection.outbox());
                    if greeted {
                        current.0 = Some(conversation);
                    }
                }
                Piece::Reset => bridge.end(conversation, service),
                Piece::TooLong => over = true,
            },
        );
        if over {
            return;
        }
    }
}

fn hear(line: &[u8], greeted: &mut bool, service: &Service, outbox: &Outbox) {
    let (id, command) = decode(line);
    let outbox = outbox.clone();
    let answer = move |outcome| outbox.send(encode(id, outcome));
    let request = match command.and_then(|command| admit(command, greeted)) {
        Ok(request) => request,
        Err(refused) => {
            answer(Err(refused));
            return;
        }
    };
    service.ask(request, answer);
}

/// Reads a request; the id as well as can be told.
pub fn decode(line: &[u8]) -> (u64, Result<Command, AgentError>) {
    let bad = |what: String| error(ErrorCode::BadRequest, what, false);
    let mut object: Map<String, Value> = match serde_json::from_slice(line) {
        Ok(object) => object,
        Err(error) => return (0, Err(bad(error.to_string()))),
    };
    let id = object.get("id").and_then(Value::as_u64).unwrap_or(0);
    object
        .entry("arguments")
        .or_insert_with(|| Value::Object(Map::new()));
    let request = serde_json::from_value::<Request>(Value::Object(object));
    (
        id,
        request
            .map(|request| request.command)
            .map_err(|error| bad(error.to_string())),
    )
}

fn admit(command: Command, greeted: &mut bool) -> Result<service::Request, AgentError> {
    if !*greeted && !matches!(command, Command::Hello { .. } | Command::Status {}) {
        return Err(error(
            ErrorCode::BadRequest,
            "hello opens a conversation".to_owned(),
            false,
        ));
    }
    Ok(match command {
        Command::Hello { versions } => {
            *greeted = true;
            service::Request::Hello { versions }
        }
        Command::Identify {} => service::Request::Identify,
        Command::Prepare(prepare) => service::Request::Prepare(prepare),
        Command::Freeze(freeze) => {
            check_limits(&freeze)?;
            service::Request::Freeze(freeze)
        }
        Command::Thaw { set, generation } => service::Request::Thaw { set, generation },
        Command::PostSnapshot(said) => service::Request::PostSnapshot(said),
        Command::BackupComplete(said) => service::Request::BackupComplete(said),
        Command::PreRestore(restore) => service::Request::PreRestore(restore),
        Command::PostRestore(restore) => service::Request::PostRestore(restore),
        Command::Abort { set, reason } => service::Request::Abort { set, reason },
        Command::Status {} => service::Request::Status,
    })
}

fn encode(id: u64, outcome: Result<Value, AgentError>) -> Vec<u8> {
    let outcome = match outcome {
        Ok(value) => Outcome::Return(value),
        Err(error) => Outcome::Error(error),
    };
    let response = Response { id, outcome };
    let mut bytes = serde_json::to_vec(&response).unwrap_or_default();
    if bytes.len() >= MESSAGE_BYTES_MAX {
        bytes = serde_json::to_vec(&shortened(response)).unwrap_or_default();
    }
    bytes.push(b'\n');
    bytes
}

/// What is left of an answer that is too long: of an error all but its reports.
fn shortened(response: Response) -> Response {
    let short = match response.outcome {
        Outcome::Return(_) => {
            let why = "the answer is too long".to_owned();
            error(ErrorCode::Internal, why, false)
        }
        Outcome::Error(long) => error(long.code, long.message, long.retryable),
    };
    Response {
        id: response.id,
        outcome: Outcome::Error(short),
    }
}

#[cfg(test)]
mod tests {
    //! Bytes from the host are untrusted.
    use super::*;
    use guest_agent_wire::host::WriterReport;
    use guest_agent_wire::types::WriterState;
    use proptest::prelude::*;

    fn pieces(chunks: &[&[u8]]) -> Vec<Piece> {
        let mut lines = Lines::default();
        let mut found = Vec::new();
        for chunk in chunks {
            lines.take(chunk, |piece| found.push(piece));
        }
        found
    }

    #[test]
    fn lines_are_put_together_and_a_reset_forgets_the_partial_one() {
        assert_eq!(
            pieces(&[b"ab", b"c\n\n  \nd\nlost", b"\xffe\n"]),
            [
                Piece::Line(b"abc".to_vec()),
                Piece::Line(b"d".to_vec()),
                Piece::Reset,
                Piece::Line(b"e".to_vec())
            ]
        );
    }

    #[test]
    fn a_line_beyond_the_limit_ends_the_conversation() {
        let long = vec![b'x'; MESSAGE_BYTES_MAX];
        assert_eq!(pieces(&[&long]), [Piece::TooLong]);
    }

    #[test]
    fn a_request_without_arguments_is_understood() {
        let (id, command) = decode(br#"{"id":4,"execute":"status"}"#);
        assert_eq!((id, command.unwrap()), (4, Command::Status {}));
    }

    #[test]
    fn a_bad_request_is_answered_with_its_id() {
        let (id, command) = decode(br#"{"id":4,"execute":"fly"}"#);
        assert_eq!(id, 4);
        assert_eq!(command.unwrap_err().code, ErrorCode::BadRequest);
        assert_eq!(decode(b"nonsense").0, 0);
    }

    #[test]
    fn nothing_but_status_comes_before_hello() {
        let mut greeted = false;
        assert!(admit(Command::Identify {}, &mut greeted).is_err());
        assert!(admit(Command::Status {}, &mut greeted).is_ok());
        assert!(admit(Command::Hello { versions: vec![1] }, &mut greeted).is_ok());
        assert!(admit(Command::Identify {}, &mut greeted).is_ok());
    }

    #[test]
    fn an_error_whose_reports_are_too_long_keeps_its_code_and_message() {
        let mut broken = error(ErrorCode::HoldBroken, "writer db hung up".to_owned(), true);
        broken.writers = vec![WriterReport {
            instance_id: "x".repeat(MESSAGE_BYTES_MAX),
            name: String::new(),
            state: WriterState::Stable,
            held: None,
            evidence: Value::Null,
            components: Vec::new(),
            failure: None,
            took_ms: 0,
        }];
        let line = encode(3, Err(broken));
        let answer: Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(answer["id"], 3);
        assert_eq!(answer["error"]["code"], "HOLD_BROKEN");
        assert_eq!(answer["error"]["message"], "writer db hung up");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut lines = Lines::default();
            lines.take(&bytes, |piece| if let Piece::Line(line) = piece { drop(decode(&line)); });
        }

        #[test]
        fn damaged_requests_do_not_make_the_decoder_panic(at in 0usize..70, byte in any::<u8>()) {
            let mut line = br#"{"id":7,"execute":"thaw","arguments":{"set":"s","generation":3}}      "#.to_vec();
            line[at] = byte;
            drop(decode(&line));
        }
    }
}
