//! Bytes of a guest, cut into answers.
//!
//! Called by `guest`. The guest may be in anybody's hands: lines are bounded, and so is all that it may say in a conversation.
//! Invariant: the memory and the work that a guest can cause are bounded by the number of calls that were made to it.
#![deny(clippy::indexing_slicing)]

use crate::link::{Decode, Incoming};
use guest_agent_wire::MESSAGE_BYTES_MAX;
use guest_agent_wire::host::{Outcome, Response};

/// Byte that starts a new conversation: the agent forgets half a line that an earlier host may have left.
pub(super) const NEW_CONVERSATION: u8 = 0xff;

/// Lines that may come unasked: answers to an earlier bridge.
const STRAY_LINES: usize = 64;

/// Cuts what an agent says into lines. It gets as many as it was asked for, and some for what an earlier conversation has left in
/// the pipe: a guest that goes on talking costs the bridge no more than that.
#[derive(Debug)]
pub(super) struct Cutter {
    pending: Vec<u8>,
    lines_left: usize,
    bytes_left: usize,
}

impl Default for Cutter {
    fn default() -> Self {
        Self {
            pending: Vec::new(),
            lines_left: STRAY_LINES,
            bytes_left: MESSAGE_BYTES_MAX,
        }
    }
}

impl Cutter {
    /// One more answer is due.
    pub(super) fn asked(&mut self) {
        self.lines_left = self.lines_left.saturating_add(1);
        self.bytes_left = self.bytes_left.saturating_add(MESSAGE_BYTES_MAX);
    }

    /// Gives each line that is whole, with its end.
    ///
    /// # Errors
    /// A line is too long, or there are too many.
    pub(super) fn cut(&mut self, bytes: &[u8], mut line: impl FnMut(&[u8])) -> Result<(), String> {
        let more = || "the guest says more than it was asked".to_owned();
        self.bytes_left = self.bytes_left.checked_sub(bytes.len()).ok_or_else(more)?;
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.pending.len().saturating_add(piece.len()) > MESSAGE_BYTES_MAX {
                return Err(format!("a line is longer than {MESSAGE_BYTES_MAX} bytes"));
            }
            self.pending.extend_from_slice(piece);
            if piece.last() == Some(&b'\n') {
                self.lines_left = self.lines_left.checked_sub(1).ok_or_else(more)?;
                line(&self.pending);
                self.pending.clear();
            }
        }
        Ok(())
    }
}

/// Lines of our agent.
#[derive(Debug, Default)]
pub(super) struct LineDecoder(Cutter);

impl Decode for LineDecoder {
    fn asked(&mut self) {
        self.0.asked();
    }

    fn decode(&mut self, bytes: &[u8]) -> Result<Vec<Incoming>, String> {
        let mut messages = Vec::new();
        self.0.cut(bytes, |line| {
            // What stands before the marker belongs to an earlier conversation.
            let line = line.rsplit(|byte| *byte == NEW_CONVERSATION).next();
            messages.extend(parse(line.unwrap_or_default()));
        })?;
        Ok(messages)
    }
}

/// The message on a line; `None` for what is no answer (remains of an earlier conversation).
fn parse(line: &[u8]) -> Option<Incoming> {
    let response: Response = serde_json::from_slice(line).ok()?;
    let result = match response.outcome {
        Outcome::Return(value) => Ok(value),
        Outcome::Error(error) => Err(serde_json::to_value(error).ok()?),
    };
    Some(Incoming::Answer {
        id: response.id,
        result,
    })
}

/// The answers in these bytes, which come one chunk after the other from an agent that was asked once.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn answers(chunks: &[&[u8]]) -> Vec<Result<serde_json::Value, serde_json::Value>> {
    let mut decoder = LineDecoder::default();
    decoder.asked();
    let mut answers = Vec::new();
    for chunk in chunks {
        let Ok(messages) = decoder.decode(chunk) else {
            break;
        };
        answers.extend(messages.into_iter().filter_map(|message| match message {
            Incoming::Answer { result, .. } => Some(result),
            Incoming::Unasked(_) => None,
        }));
    }
    assert!(decoder.0.pending.len() <= MESSAGE_BYTES_MAX);
    answers
}
