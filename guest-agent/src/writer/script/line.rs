//! Scripts that freeze or undo take turns: in the order in which they were told, which `quiesce` makes ascending by name for
//! a freeze and descending for a thaw.
//!
//! Used by `script`. Invariant: a place that is dropped, wherever it stands, holds up nobody. After a refusal those that stand
//! behind it need not begin: the word of it is lost when nobody stands there any more.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The line; one for all script writers.
#[derive(Debug, Default)]
pub struct Line {
    standing: Mutex<Standing>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Standing {
    next: u64,
    places: VecDeque<u64>,
    /// One of those who stood here has refused.
    is_refused: bool,
}

/// A place in the line, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    line: Arc<Line>,
    number: u64,
}

impl Line {
    fn lock(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the last place.
    pub(super) fn join(self: &Arc<Self>) -> Place {
        let mut standing = self.lock();
        let number = standing.next;
        standing.next += 1;
        standing.places.push_back(number);
        drop(standing);
        Place {
            line: Arc::clone(self),
            number,
        }
    }
}

impl Place {
    /// Waits until it is the first one; returns whether one before it has refused.
    pub(super) fn wait(&self) -> bool {
        let mut standing = self.line.lock();
        while standing.places.front() != Some(&self.number) {
            standing = self
                .line
                .moved
                .wait(standing)
                .unwrap_or_else(PoisonError::into_inner);
        }
        standing.is_refused
    }

    /// Tells those behind it that it has refused.
    pub(super) fn refuse(&self) {
        self.line.lock().is_refused = true;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut standing = self.line.lock();
        standing.places.retain(|place| *place != self.number);
        standing.is_refused &= !standing.places.is_empty();
        drop(standing);
        self.line.moved.notify_all();
    }
}
