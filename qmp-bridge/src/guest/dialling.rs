//! The first words with an agent: dials, asks until it is answered, and dials again when the way is dead.
//!
//! Called by `guest` and `stock`. QEMU's socket behind a virtio-serial port serves one client after another, and for a moment
//! mixes them up: with the last one's end still under way it may hang up on the new one, drop his first bytes, or never carry
//! the guest's answers to him. What is asked here may be asked twice, so all of that is mended by asking again. Invariant:
//! whatever the agent does, it is over at the limit.

use super::lines::{LineDecoder, NEW_CONVERSATION};
use super::{AgentAddress, GuestError, decode, encode};
use crate::link::{Link, LinkError, Stream};
use guest_agent_wire::host::{Command, ErrorCode, Hello, PROTOCOL_VERSIONS};
use serde_json::Value;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

/// Pauses between one `hello` and the next; the last one stays. A lost one costs no more than a blink, and a guest that boots
/// is not flooded.
const HELLO_AGAIN: [Duration; 4] = [
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
];
/// A connection on which nothing came back for so long is given up for another.
const PATIENCE: Duration = Duration::from_secs(8);
/// Connections on which we are hung up that many times are an agent's will, not a socket's muddle.
const HANG_UPS: u32 = 5;
/// Between the end of a connection and the next dial.
const DIAL_AGAIN: Duration = Duration::from_millis(200);

/// What `ask` comes to on the first connection that carries its answer.
///
/// # Errors
/// Nobody listens, nobody answers within `limit`, or what answers is no agent that we understand.
pub(super) async fn until_answered<T>(
    address: &AgentAddress,
    limit: Duration,
    ask: impl AsyncFn(Stream) -> Result<T, GuestError>,
) -> Result<T, GuestError> {
    let end = Instant::now() + limit;
    let mut hung_up = 0;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let stream = address.connect(left).await?;
        let left = end.saturating_duration_since(Instant::now());
        let lost = match timeout(left.min(PATIENCE), ask(stream)).await {
            Ok(Err(GuestError::Link(lost @ LinkError::Closed { .. }))) => {
                hung_up += 1;
                lost
            }
            Ok(answered) => return answered,
            Err(_elapsed) => LinkError::Deadline {
                limit_ms: limit.as_millis(),
            },
        };
        // The next one would have no time to be answered.
        let is_over = Instant::now() + DIAL_AGAIN + PATIENCE / 8 >= end;
        if is_over || hung_up == HANG_UPS {
            return Err(lost.into());
        }
        sleep(DIAL_AGAIN).await;
    }
}

/// Says hello to our own agent until one is answered, which does not matter.
pub(super) async fn greet(stream: Stream) -> Result<(Link, Hello), GuestError> {
    // Answers to an earlier bridge may still be in the pipe: its numbers must not be ours.
    let first_id = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(1, |d| u64::try_from(d.as_micros()).unwrap_or(1));
    let (link, _unasked) = Link::new(stream, LineDecoder::default(), first_id);
    let link = Arc::new(link);
    let mut calls = JoinSet::new();
    let mut pauses = HELLO_AGAIN.into_iter();
    let mut pause = Duration::ZERO;
    let answer = loop {
        let versions = PROTOCOL_VERSIONS.to_vec();
        let link = Arc::clone(&link);
        calls.spawn(async move {
            let hello = |id| {
                let mut bytes = vec![NEW_CONVERSATION];
                bytes.extend(encode(id, Command::Hello { versions }));
                bytes
            };
            link.call(hello, None, None).await
        });
        pause = pauses.next().unwrap_or(pause);
        if let Ok(Some(Ok(answer))) = timeout(pause, calls.join_next()).await {
            break answer?;
        }
    };
    // The other calls' ends of the link go with them.
    calls.shutdown().await;
    let link = Arc::into_inner(link).ok_or_else(|| LinkError::Closed {
        why: "still in use".to_owned(),
    })?;
    greeted(answer).map(|hello| (link, hello))
}

/// What the answer to `hello` comes to. An agent that is newer or older says so in its own way: by an error, or by a version
/// that was not offered.
pub(super) fn greeted(answer: Result<Value, Value>) -> Result<Hello, GuestError> {
    match decode::<Hello>("hello", answer) {
        Ok(hello) if PROTOCOL_VERSIONS.contains(&hello.version) => Ok(hello),
        Ok(hello) => Err(GuestError::VersionMismatch {
            agent: format!("{} answers version {}", hello.agent, hello.version),
        }),
        Err(GuestError::Refused(refused)) if refused.code == ErrorCode::VersionMismatch => {
            let agent = refused.message;
            Err(GuestError::VersionMismatch { agent })
        }
        Err(error) => Err(error),
    }
}
