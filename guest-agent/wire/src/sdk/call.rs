//! What goes with every call of a writer's method: the time it has, and the wire to the agent meanwhile.
//!
//! Made by `session` for each event; a writer may also make one to call its own methods in tests.

use super::session::Wire;
use std::cell::Cell;
use std::fmt;
use std::time::{Duration, Instant};

/// Time between two words of progress that are sent: the agent hangs up on a writer that says too many.
const PROGRESS: Duration = Duration::from_millis(100);

/// A call of one method.
pub struct Call<'a> {
    limit: Duration,
    until: Cell<Instant>,
    told: Cell<Option<Instant>>,
    /// The wire, the event's number, and whether progress gives it more time.
    wire: Option<(&'a Wire<'a>, u64, bool)>,
}

impl fmt::Debug for Call<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Call")
            .field("remaining", &self.remaining())
            .finish_non_exhaustive()
    }
}

impl<'a> Call<'a> {
    /// Without an agent: never interrupted, heard by nobody.
    #[must_use]
    pub fn alone(limit: Duration) -> Self {
        Self {
            limit,
            until: Cell::new(Instant::now() + limit),
            told: Cell::new(None),
            wire: None,
        }
    }

    pub(super) fn new(limit: Duration, wire: &'a Wire<'a>, seq: u64, extends: bool) -> Self {
        Self {
            wire: Some((wire, seq, extends)),
            ..Self::alone(limit)
        }
    }

    /// Time that is left for the answer.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.until.get().saturating_duration_since(Instant::now())
    }

    /// Nobody waits for the answer any more: the time is over, or the agent has gone or has sent something else (an abort).
    /// A method that takes long asks now and then, and returns.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.remaining().is_zero() || self.wire.is_some_and(|(wire, ..)| wire.has_more())
    }

    /// Tells the agent that the work goes on. At `prepare_backup` and `prepare_snapshot` the time for the answer begins
    /// anew; at other events it does not. It may be called as often as one likes: one word in 100 ms is sent (in a quarter of
    /// the limit, where that is less).
    pub fn progress(&self, what: &str) {
        let Some((wire, seq, extends)) = self.wire else {
            return;
        };
        let now = Instant::now();
        let rest = PROGRESS.min(self.limit / 4);
        if self.told.get().is_some_and(|told| now < told + rest) {
            return;
        }
        self.told.set(Some(now));
        wire.progress(seq, what);
        if extends {
            self.until.set(now + self.limit);
        }
    }
}
