//! Outcomes to the used ring, in the order of arrival.
//!
//! Called by `device` on the queue's thread. Knows nothing of what requests do.
//!
//! Invariant: requests may *finish* in any order, but they are *published* in the order in which they arrived, so the
//! used index never passes one that is unfinished. A front end that reconnects after this daemon was killed starts again
//! at the used index: what lies behind it is exactly what was never answered, and repeating that is harmless. (In-flight
//! tracking, which allows publication out of order, is to come.)

use super::request::Answer;
use crate::engine::{Outcome, Token};
use std::collections::VecDeque;

/// Requests of one queue that the guest has not been told of.
#[derive(Debug, Default)]
pub(super) struct InOrder {
    /// Token of the first entry.
    first: u64,
    entries: VecDeque<Entry>,
}

#[derive(Debug)]
struct Entry {
    head: u16,
    answer: Option<Answer>,
    outcome: Option<Outcome>,
}

impl InOrder {
    /// A chain has arrived. Without an `answer` it is given back as it is.
    pub(super) fn arrive(&mut self, head: u16, answer: Option<Answer>) -> Token {
        let token = Token(self.first + self.entries.len() as u64);
        let outcome = if answer.is_some() {
            None
        } else {
            Some(Outcome::Failed)
        };
        self.entries.push_back(Entry {
            head,
            answer,
            outcome,
        });
        token
    }

    /// A request is over.
    pub(super) fn finish(&mut self, token: Token, outcome: Outcome) {
        let place = token
            .0
            .checked_sub(self.first)
            .and_then(|place| usize::try_from(place).ok());
        if let Some(entry) = place.and_then(|place| self.entries.get_mut(place)) {
            entry.outcome = Some(outcome);
        }
    }

    /// Writes the answers of what is over and has nothing unfinished before it; calls `used(head, length)` for each, in
    /// order. Answers how many there were.
    pub(super) fn publish(&mut self, mut used: impl FnMut(u16, u32)) -> usize {
        let mut count = 0;
        while let Some(Entry {
            head,
            answer,
            outcome: Some(outcome),
        }) = self.entries.front()
        {
            let length = answer.as_ref().map_or(0, |answer| answer.write(*outcome));
            used(*head, length);
            self.entries.pop_front();
            self.first += 1;
            count += 1;
        }
        count
    }

    /// Number of requests that the guest has not been told of.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Forgets all of them; answers how many, which is how far the ring has to be turned back.
    pub(super) fn give_back(&mut self) -> usize {
        let count = self.entries.len();
        self.first += count as u64;
        self.entries.clear();
        count
    }
}

#[cfg(test)]
mod tests;
