//! Requests that the guest has not been told of, and the order in which it is told.
//!
//! Called by `queue` on the queue's thread. Knows nothing of what requests do, nor of the used ring.
//!
//! Requests *finish* in any order. With in-flight tracking they are *published* as they finish: what a killed daemon had not
//! answered is written down. Without it they are published in the order of arrival, so that the used index never passes one that
//! is unfinished: a front end that reconnects then starts again at the used index, and what lies behind it is exactly what was
//! never answered.
//!
//! Invariant: a head is in flight once at most. A guest that offers it again has broken its ring.

use super::request::Answer;
use crate::engine::{GuestRange, Outcome, Token};
use smallvec::SmallVec;
use std::collections::VecDeque;

/// When requests are published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// As they arrived.
    OfArrival,
    /// As they finish.
    OfCompletion,
}

/// The head is in flight already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AlreadyInFlight;

/// Requests of one ring.
#[derive(Debug)]
pub(super) struct InFlight {
    order: Order,
    /// By head.
    slots: Vec<Option<Slot>>,
    /// Heads: in the order of arrival, all of them; in the order of completion, only finished ones.
    line: VecDeque<u16>,
    count: usize,
    arrivals: u64,
}

/// Guest memory that a request writes, status apart. Almost always one piece.
pub(super) type Written = SmallVec<[GuestRange; 2]>;

#[derive(Clone, Debug)]
struct Slot {
    token: Token,
    /// Where the answer goes; without one the chain is given back as it is.
    answer: Option<Answer>,
    written: Written,
    outcome: Option<Outcome>,
}

/// A request that the guest can be told of.
#[derive(Clone, Debug)]
pub(super) struct Finished {
    /// Its head.
    pub(super) head: u16,
    /// Where the answer goes.
    pub(super) answer: Option<Answer>,
    /// What it has written.
    pub(super) written: Written,
    /// What became of it.
    pub(super) outcome: Outcome,
}

impl InFlight {
    /// For a ring of `size` entries.
    pub(super) fn new(size: u16, order: Order) -> Self {
        let size = usize::from(size);
        Self {
            order,
            slots: vec![None; size],
            line: VecDeque::with_capacity(size),
            count: 0,
            arrivals: 0,
        }
    }

    /// A head was fetched from the ring.
    pub(super) fn arrive(&mut self, head: u16) -> Result<Token, AlreadyInFlight> {
        let slot = self
            .slots
            .get_mut(usize::from(head))
            .ok_or(AlreadyInFlight)?;
        if slot.is_some() {
            return Err(AlreadyInFlight);
        }
        // The head says where to look, the rest that it is still the same request.
        let token = Token(self.arrivals << 16 | u64::from(head));
        *slot = Some(Slot {
            token,
            answer: None,
            written: Written::new(),
            outcome: None,
        });
        self.arrivals += 1;
        self.count += 1;
        if self.order == Order::OfArrival {
            self.line.push_back(head);
        }
        Ok(token)
    }

    /// Says where the answer of a request goes, and what it writes.
    pub(super) fn will_answer(&mut self, token: Token, answer: Answer, written: &[GuestRange]) {
        if let Some(slot) = self.slot(token) {
            slot.answer = Some(answer);
            if answer.data_bytes > 0 {
                slot.written.extend_from_slice(written);
            }
        }
    }

    /// A request is over. One that is not known any more was given back.
    pub(super) fn finish(&mut self, token: Token, outcome: Outcome) {
        let Some(slot) = self.slot(token) else {
            return;
        };
        let first_time = slot.outcome.is_none();
        slot.outcome = Some(outcome);
        if first_time && self.order == Order::OfCompletion {
            self.line.push_back(head_of(token));
        }
    }

    fn slot(&mut self, token: Token) -> Option<&mut Slot> {
        let slot = self.slots.get_mut(usize::from(head_of(token)))?.as_mut()?;
        (slot.token == token).then_some(slot)
    }

    /// Takes the next request that the guest can be told of.
    pub(super) fn next_finished(&mut self) -> Option<Finished> {
        let head = *self.line.front()?;
        let slot = self.slots.get_mut(usize::from(head))?;
        let outcome = slot.as_ref()?.outcome?;
        let Slot {
            answer, written, ..
        } = slot.take()?;
        self.line.pop_front();
        self.count -= 1;
        Some(Finished {
            head,
            answer,
            written,
            outcome,
        })
    }

    /// Number of requests that the guest has not been told of.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// True if there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }
}

fn head_of(token: Token) -> u16 {
    // The lower 16 bits are the head.
    u16::try_from(token.0 & u64::from(u16::MAX)).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests;
