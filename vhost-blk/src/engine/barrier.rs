//! The snapshot instant of one volume: hold new writes, drain those in flight, release, with a deadline.
//!
//! Called by the workers (`enter` before a write is planned, the ticket is dropped when it is complete) and by
//! `snapshot_set`. Knows nothing of what a write is. Reads never come here.
//!
//! Invariants:
//! * While a hold is intact no write enters; once `drain` has answered `true`, none is in flight either.
//! * A hold ends by itself at its deadline on `CLOCK_MONOTONIC` (std's `Instant` on Linux): the first write that comes
//!   after it passes, and the hold can never be intact again. So a daemon that was stopped in the middle of a hold
//!   finds it broken, in whatever order its threads wake up.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Names one hold of one barrier; never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HoldId(u64);

#[derive(Debug, Default)]
struct State {
    in_flight: u64,
    hold: Option<Hold>,
    last_hold: u64,
}

#[derive(Debug)]
struct Hold {
    id: HoldId,
    deadline: Instant,
}

/// Gate for the writes of one volume.
#[derive(Debug, Default)]
pub struct Barrier {
    state: Mutex<State>,
    changed: Condvar,
}

/// A write in flight; it ends when this is dropped.
#[derive(Debug)]
pub struct Ticket {
    barrier: Arc<Barrier>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.barrier.lock();
        state.in_flight -= 1;
        // Only a hold waits for the last one; to tell nobody would cost a system call for every write that is alone.
        if state.in_flight == 0 && state.hold.is_some() {
            self.barrier.changed.notify_all();
        }
    }
}

impl Barrier {
    /// An open barrier.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Lets a write in, or answers `None` while writes are held.
    #[must_use]
    pub fn enter(self: &Arc<Self>) -> Option<Ticket> {
        let mut state = self.lock();
        if let Some(hold) = &state.hold {
            if Instant::now() < hold.deadline {
                return None;
            }
            state.hold = None;
            self.changed.notify_all();
        }
        state.in_flight += 1;
        Some(Ticket {
            barrier: Arc::clone(self),
        })
    }

    /// Holds new writes until released or until the deadline. `None` if they are held already.
    #[must_use]
    pub fn hold(&self, deadline: Instant) -> Option<HoldId> {
        let mut state = self.lock();
        if state.hold.is_some() {
            return None;
        }
        state.last_hold += 1;
        let id = HoldId(state.last_hold);
        state.hold = Some(Hold { id, deadline });
        Some(id)
    }

    /// Waits until no write is in flight. `false` if the hold broke before that.
    #[must_use]
    pub fn drain(&self, hold: HoldId) -> bool {
        let mut state = self.lock();
        loop {
            let Some(deadline) = state.intact(hold) else {
                return false;
            };
            if state.in_flight == 0 {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// True if the hold has been unbroken so far.
    #[must_use]
    pub fn is_intact(&self, hold: HoldId) -> bool {
        self.lock().intact(hold).is_some()
    }

    /// Ends the hold. True if it was unbroken up to now. The caller wakes the queues.
    pub fn release(&self, hold: HoldId) -> bool {
        let mut state = self.lock();
        let intact = state.intact(hold).is_some();
        if state.hold.as_ref().is_some_and(|held| held.id == hold) {
            state.hold = None;
        }
        self.changed.notify_all();
        intact
    }

    /// Writes in flight now.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.lock().in_flight
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The deadline of the hold, if it is this one and has not passed.
    fn intact(&self, hold: HoldId) -> Option<Instant> {
        self.hold
            .as_ref()
            .filter(|held| held.id == hold && Instant::now() < held.deadline)
            .map(|held| held.deadline)
    }
}

#[cfg(test)]
mod tests;
