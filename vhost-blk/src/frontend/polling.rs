//! How long a queue's thread goes on looking before it sleeps.
//!
//! Used by `serving`, one for each queue. Knows nothing of rings.
//!
//! A sleep and a wake-up cost more than a fast disk or a waiting guest needs for its next word. So after work the thread looks for
//! a while, with kicks and signals switched off. The while is learned from the gaps between work: it doubles while gaps end soon
//! after it, and falls to a quarter, soon to nothing, when one outlasts the longest while, since then looking has not paid.
//!
//! Invariants:
//! * A thread without work sleeps after at most the longest while, and looks no more until there was work.
//! * At most half of the processors look at a time, at least one thread may: the guest needs the others.
//! * A thread that finds that it was taken off its processor meanwhile stops looking at once: somebody needs it more.

use std::num::NonZero;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// First while after sleeping at once.
const FIRST: Duration = Duration::from_micros(4);
/// Below this, looking is not worth its beginning.
const LEAST: Duration = Duration::from_micros(2);
/// A look takes less than this, unless the processor was given to somebody else in between.
const LOOK_MAX: Duration = Duration::from_micros(20);

/// Threads of this process that are looking.
static LOOKING: AtomicUsize = AtomicUsize::new(0);
/// How many of them there may be.
static LOOKING_MAX: LazyLock<usize> = LazyLock::new(|| {
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    (processors / 2).max(1)
});

/// The while of one queue.
#[derive(Debug)]
pub(super) struct Polling {
    longest: Duration,
    current: Duration,
    /// Since when there is nothing to do.
    idle_since: Option<Instant>,
    last_look: Option<Instant>,
}

impl Polling {
    /// Looks for `longest` at most; zero: never.
    pub(super) fn new(longest: Duration) -> Self {
        Self {
            longest,
            current: Duration::ZERO,
            idle_since: None,
            last_look: None,
        }
    }

    /// There was something to do.
    pub(super) fn worked(&mut self) {
        if let Some(since) = self.idle_since.take() {
            self.stop_looking();
            self.learn(since.elapsed());
        }
    }

    /// There was nothing to do. True: look again at once; false: sleep.
    pub(super) fn look_again(&mut self) -> bool {
        if self.longest.is_zero() {
            return false;
        }
        let now = Instant::now();
        let since = *self.idle_since.get_or_insert(now);
        let may_look = now.duration_since(since) < self.current
            && match self.last_look {
                None => start_looking(),
                Some(last) => now.duration_since(last) < LOOK_MAX,
            };
        if may_look {
            self.last_look = Some(now);
        } else {
            self.stop_looking();
        }
        may_look
    }

    fn stop_looking(&mut self) {
        if self.last_look.take().is_some() {
            LOOKING.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Work came after a gap.
    fn learn(&mut self, gap: Duration) {
        if gap > self.longest {
            self.current /= 4;
            if self.current < LEAST {
                self.current = Duration::ZERO;
            }
        } else if gap > self.current {
            self.current = (self.current * 2).clamp(FIRST.min(self.longest), self.longest);
        }
    }
}

impl Drop for Polling {
    fn drop(&mut self) {
        self.stop_looking();
    }
}

fn start_looking() -> bool {
    let started = LOOKING.fetch_add(1, Ordering::Relaxed) < *LOOKING_MAX;
    if !started {
        LOOKING.fetch_sub(1, Ordering::Relaxed);
    }
    started
}

#[cfg(test)]
mod tests;
