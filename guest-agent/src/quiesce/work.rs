//! Work that the actor has done on a thread, and what it hears until that is over.
//!
//! Used by `filesystems` and `not_to_snapshot`. What hangs is left to itself and heard by nobody.

use super::actor::{Actor, Heard};
use super::cause::Cause;
use crate::clock::BootTime;
use crate::hold::message::Tell;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// Time to hear what is to be heard meanwhile.
const LISTEN: Duration = Duration::from_millis(20);

/// Work on a thread, since what it touches may hang. It is told to end when four fifths of the limit are over, with what it has by then.
pub(super) struct Work<T> {
    result: Receiver<T>,
    end: Instant,
}

impl<T: Send + 'static> Work<T> {
    /// `None`: the guest has no thread to spare.
    pub(super) fn start(
        name: &str,
        limit: Duration,
        work: impl FnOnce(Instant) -> T + Send + 'static,
    ) -> Option<Self> {
        let (sender, result) = mpsc::channel();
        let start = Instant::now();
        let until = start + limit * 4 / 5;
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || drop(sender.send(work(until))))
            .ok()?;
        let end = start + limit;
        Some(Self { result, end })
    }

    /// What came of it within `wait`, or by its end.
    pub(super) fn within(&self, wait: Duration) -> Option<T> {
        let left = self.end.saturating_duration_since(Instant::now());
        self.result.recv_timeout(wait.min(left)).ok()
    }
}

impl Actor {
    /// Waits for the end of a search; what else comes meanwhile is dealt with.
    pub(super) fn listening_to<T: Send + 'static>(
        &mut self,
        work: &Work<T>,
    ) -> Result<Option<T>, Cause> {
        loop {
            if let Some(found) = work.within(LISTEN) {
                return Ok(Some(found));
            }
            match self.wait(BootTime::now()) {
                Heard::Interrupted(cause) => return Err(cause),
                Heard::HelperDied => return Err(Cause::HelperDied),
                Heard::Late if Instant::now() >= work.end => return Ok(None),
                Heard::Helper(Tell::Ended { .. }, _) if self.set.hold_end.is_some() => {
                    let hold_ms = self.set.hold_ms;
                    return Err(Cause::DeadMan { hold_ms });
                }
                // Nothing is asked of writers and of the helper, so this is an answer that came too late.
                Heard::Late | Heard::Helper(..) | Heard::Writer(..) => {}
            }
        }
    }
}
