//! Keeps new requests of a connection out until what a killed daemon has left in flight is done again, on all its queues.
//!
//! Made by `inflight` with the region that names what is left, looked at by the queues' threads (`serving`) before they take
//! from their rings, told by `handler` of queues that will not come. Knows nothing of rings or disks.
//!
//! Why: a request that is done again may have been seen done before. Another that the guest asks for after that, on any queue, must
//! not be overtaken by the repetition. Before the first new request is taken nobody can have asked for it in that knowledge and
//! been answered.
//!
//! Invariants:
//! * Open once is open for ever: one gate for each time the front end hands the region over.
//! * A queue that has nothing left, is stopped, or has failed keeps nobody out; one that does not come or does not get on keeps the
//!   others out for [`PATIENCE`], and who then opens is told so, once.
//! * Everybody who waits is woken when it opens, and knows until when to wait at most: no thread looks all the time.

use crate::engine::Kick;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Longest wait without any progress. Longer than any hold of writes, which ends by itself.
const PATIENCE: Duration = Duration::from_secs(15);

/// What a queue finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// New requests may be taken, from now on.
    Open,
    /// Not yet: look again when woken, or then.
    Closed {
        /// When patience ends.
        until: Instant,
    },
    /// Open because nothing got on for too long. Only one queue finds this.
    Overdue {
        /// Requests that are still not done again.
        left: usize,
    },
}

/// One for all queues of a connection.
#[derive(Debug)]
pub(super) struct Gate {
    patience: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// By queue: requests that are not done again yet.
    left: Vec<usize>,
    /// Of the queues that wait.
    wakes: Vec<Arc<Kick>>,
    /// When a queue came, or got on, last.
    moved: Option<Instant>,
    open: bool,
}

impl Gate {
    /// Closed if any of the queues has something `left`.
    pub(super) fn new(left: Vec<usize>) -> Self {
        Self::with_patience(left, PATIENCE)
    }

    fn with_patience(left: Vec<usize>, patience: Duration) -> Self {
        let mut state = State {
            left,
            wakes: Vec::new(),
            moved: None,
            open: false,
        };
        state.open_if_done();
        Self {
            patience,
            state: Mutex::new(state),
        }
    }

    /// A queue's ring starts; what it has `left` is known for certain now.
    pub(super) fn join(&self, queue: usize, left: usize, wake: &Arc<Kick>) {
        let mut state = self.state();
        if !state.open {
            state.wakes.push(Arc::clone(wake));
            state.moved = Some(Instant::now());
            state.set(queue, left);
        }
    }

    /// A queue that has so many `left` looks whether it may take new ones.
    pub(super) fn look(&self, queue: usize, left: usize) -> Look {
        let mut state = self.state();
        let now = Instant::now();
        if state.set(queue, left) {
            state.moved = Some(now);
        }
        if state.open {
            return Look::Open;
        }
        let until = *state.moved.get_or_insert(now) + self.patience;
        if now < until {
            return Look::Closed { until };
        }
        let left = state.left.iter().sum();
        state.open();
        Look::Overdue { left }
    }

    /// A queue is not going to do anything again.
    pub(super) fn leave(&self, queue: usize) {
        self.state().set(queue, 0);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// True if that was news.
    fn set(&mut self, queue: usize, left: usize) -> bool {
        let is_news = match self.left.get_mut(queue) {
            Some(known) => std::mem::replace(known, left) != left,
            None => false,
        };
        self.open_if_done();
        is_news
    }

    fn open_if_done(&mut self) {
        if self.left.iter().all(|left| *left == 0) {
            self.open();
        }
    }

    fn open(&mut self) {
        self.open = true;
        for wake in self.wakes.drain(..) {
            wake.wake();
        }
    }
}

#[cfg(test)]
mod tests;
