//! Whether a queue's thread goes on looking before it sleeps.
//!
//! Used by `serving`, one for each queue. Knows nothing of rings.
//!
//! A sleep and a wake-up cost more than a fast disk or a waiting guest needs for its next word, but a thread that looks keeps a
//! processor from those it waits for. Which of the two weighs more depends on the machine and its load, so it is measured: how
//! many requests are done in a while when the thread looks, and how many when it sleeps at once. The habit with which more is done
//! is kept, and looking only if it is clearly more. From time to time, and when the load has changed, the other one is tried again.
//!
//! Invariants:
//! * A thread without work sleeps after at most the longest while, and looks no more until there was work.
//! * At most half of the processors look at a time, at least one thread may: the guest needs the others.
//! * A thread with many requests in flight sleeps: what it waits for comes anyway, and in one piece.
//! * A thread that finds that it was taken off its processor meanwhile stops looking at once: somebody needs it more.

use std::num::NonZero;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Requests that are judged together, at least.
const REQUESTS: u32 = 64;
/// And for so long: a shorter while shows what the scheduler did, not the habit.
const WHILE: Duration = Duration::from_millis(2);
/// Of so many judgements one is of the other habit, at first; twice as rarely whenever that has changed nothing.
const TRIAL_EVERY: u32 = 16;
/// Of so many in the end: a trial may cost, but so does a habit whose time is over.
const TRIAL_EVERY_MAX: u32 = 1024;
/// A longer gap is the guest's own pause, and what was counted before it says nothing.
const PAUSE: Duration = Duration::from_millis(10);
/// With more in flight there is no gap to shorten: who sleeps finds several done when it wakes.
const IN_FLIGHT_MAX: usize = 4;
/// A look takes less than this, unless the processor was given to somebody else in between.
const LOOK_MAX: Duration = Duration::from_micros(20);

/// About a microsecond.
const SPINS: u32 = 16;

/// Threads of this process that are looking.
static LOOKING: AtomicUsize = AtomicUsize::new(0);
/// How many of them there may be.
static LOOKING_MAX: LazyLock<usize> = LazyLock::new(|| {
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    (processors / 2).max(1)
});

/// What a thread does when there is nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Habit {
    Sleep,
    Look,
}

/// The habit of one queue.
#[derive(Debug)]
pub(super) struct Polling {
    longest: Duration,
    /// What it does now, be it a trial.
    current: Habit,
    /// Mean times of a request, as far as they are known.
    asleep: Option<Duration>,
    looking: Option<Duration>,
    /// Requests done since the beginning of this judgement.
    done: u32,
    begin: Option<Instant>,
    /// The habit that is kept, trials apart.
    better: Habit,
    /// Judgements since the last trial, and until the next.
    judgements: u32,
    trial_every: u32,
    /// Since when there is nothing to do.
    idle_since: Option<Instant>,
    last_look: Option<Instant>,
}

impl Polling {
    /// Looks for `longest` at most; zero: never.
    pub(super) fn new(longest: Duration) -> Self {
        Self {
            longest,
            current: Habit::Sleep,
            asleep: None,
            looking: None,
            done: 0,
            begin: None,
            better: Habit::Sleep,
            judgements: 0,
            trial_every: TRIAL_EVERY,
            idle_since: None,
            last_look: None,
        }
    }

    /// There was something to do; so many requests were done with it.
    pub(super) fn worked(&mut self, done: usize) {
        if self.longest.is_zero() {
            return;
        }
        let now = Instant::now();
        if let Some(since) = self.idle_since.take() {
            self.stop_looking();
            if now.duration_since(since) > PAUSE {
                self.begin = None;
            }
        }
        let Some(begin) = self.begin else {
            self.begin = Some(now);
            self.done = 0;
            return;
        };
        let done = u32::try_from(done).unwrap_or(u32::MAX);
        self.done = self.done.saturating_add(done);
        let spent = now.duration_since(begin);
        if self.done >= REQUESTS && spent >= WHILE {
            self.judge(spent / self.done);
            self.begin = Some(now);
            self.done = 0;
        }
    }

    /// There was nothing to do, with so many requests in flight. True: look again at once; false: sleep.
    pub(super) fn look_again(&mut self, in_flight: usize) -> bool {
        if self.longest.is_zero() {
            return false;
        }
        if in_flight > IN_FLIGHT_MAX {
            // Nobody looks here, so this is no measure of looking.
            self.begin = None;
            self.stop_looking();
            return false;
        }
        let now = Instant::now();
        let since = *self.idle_since.get_or_insert(now);
        let may_look = self.current == Habit::Look
            && now.duration_since(since) < self.longest
            && match self.last_look {
                None => self.start_looking(),
                Some(last) => now.duration_since(last) < LOOK_MAX,
            };
        if may_look {
            self.last_look = Some(now);
        } else {
            self.stop_looking();
        }
        may_look
    }

    /// Between two looks: whoever waits for this processor gets it.
    pub(super) fn pause() {
        for _ in 0..SPINS {
            std::hint::spin_loop();
        }
        rustix::thread::sched_yield();
    }

    fn start_looking(&mut self) -> bool {
        let started = LOOKING.fetch_add(1, Ordering::Relaxed) < *LOOKING_MAX;
        if !started {
            LOOKING.fetch_sub(1, Ordering::Relaxed);
            // It sleeps although it would look: that is no measure of either, and others may look for long.
            self.begin = None;
            self.current = Habit::Sleep;
        }
        started
    }

    fn stop_looking(&mut self) {
        if self.last_look.take().is_some() {
            LOOKING.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Requests took so long each with the current habit.
    fn judge(&mut self, now: Duration) {
        let (mean, other) = match self.current {
            Habit::Sleep => (&mut self.asleep, &mut self.looking),
            Habit::Look => (&mut self.looking, &mut self.asleep),
        };
        let changed = |before: Duration| now > before * 2 || now * 2 < before;
        if mean.is_some_and(changed) {
            // Another load: what was known of the other habit is of the old one.
            *mean = None;
            *other = None;
            self.trial_every = TRIAL_EVERY;
        }
        *mean = Some(mean.map_or(now, |before| (before * 3 + now) / 4));
        let better = match (self.asleep, self.looking) {
            (None, _) => Habit::Sleep,
            (Some(_), None) => Habit::Look,
            // The processor time has to be worth it.
            (Some(asleep), Some(looking)) if looking < asleep / 6 * 5 => Habit::Look,
            (Some(_), Some(_)) => Habit::Sleep,
        };
        if better != self.better {
            self.trial_every = TRIAL_EVERY;
        }
        self.better = better;
        self.judgements += 1;
        self.current = if self.judgements < self.trial_every {
            better
        } else {
            self.judgements = 0;
            self.trial_every = (self.trial_every * 2).min(TRIAL_EVERY_MAX);
            match better {
                Habit::Sleep => Habit::Look,
                Habit::Look => Habit::Sleep,
            }
        };
    }
}

impl Drop for Polling {
    fn drop(&mut self) {
        self.stop_looking();
    }
}

#[cfg(test)]
mod tests;
