//! How much background work a moment bears, by what the guest does in it.
//!
//! Called by `upkeep`. Pure but for the counters that the queues keep.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A volume is idle when no request has come for this long.
const QUIET: Duration = Duration::from_millis(100);
/// Blocks of a step while the guest is at work: a request waits behind few of them.
const BUSY_BLOCKS: u64 = 32;
/// Blocks of a step while it is not.
const IDLE_BLOCKS: u64 = 256;
/// Blocks of a step while writes wait for it.
const PRESSING_BLOCKS: u64 = 512;
/// Pause behind a step, in lengths of the step: work has a tenth of the time.
const PAUSE_STEPS: u32 = 9;
/// Shortest pause while the guest is at work.
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// So much longer is it where nothing hurries.
const LONG: u32 = 10;
/// Longest: even on a disk that is slow because it is busy, work goes on.
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// Counts the requests of one queue. One thread counts, any may read.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(in super::super) struct Arrivals(AtomicU64);

impl Arrivals {
    /// A request has come. Costs a load and a store of a line that nobody else writes.
    pub(in super::super) fn note(&self) {
        let count = self.0.load(Ordering::Relaxed);
        self.0.store(count.wrapping_add(1), Ordering::Relaxed);
    }

    /// Requests so far.
    pub(in super::super) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the moment is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Load {
    /// The guest lets the disk rest.
    Idle,
    /// Requests come.
    Busy,
    /// Requests wait for background work.
    Pressing,
}

impl Load {
    /// Blocks the next step may touch.
    pub(super) fn budget_blocks(self) -> u64 {
        match self {
            Self::Idle => IDLE_BLOCKS,
            Self::Busy => BUSY_BLOCKS,
            Self::Pressing => PRESSING_BLOCKS,
        }
    }

    /// The pause behind a step that took so long.
    pub(super) fn pause(self, took: Duration) -> Duration {
        match self {
            Self::Idle | Self::Pressing => Duration::ZERO,
            Self::Busy => took.saturating_mul(PAUSE_STEPS).clamp(PAUSE_MIN, PAUSE_MAX),
        }
    }

    /// The pause behind a step of work that has no hurry.
    pub(super) fn long_pause(self, took: Duration) -> Duration {
        self.pause(took).saturating_mul(LONG).min(PAUSE_MAX)
    }
}

/// What a volume's guest did lately.
#[derive(Debug)]
pub(super) struct Pace {
    arrivals: u64,
    last_arrival: Instant,
}

impl Pace {
    /// Of a volume whose daemon has just started: its guest may be on its way.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            arrivals: 0,
            last_arrival: now,
        }
    }

    /// Looks at the counters.
    pub(super) fn look(&mut self, now: Instant, arrivals: u64) -> Load {
        if arrivals != self.arrivals {
            self.arrivals = arrivals;
            self.last_arrival = now;
        }
        if now.saturating_duration_since(self.last_arrival) < QUIET {
            Load::Busy
        } else {
            Load::Idle
        }
    }
}

#[cfg(test)]
mod tests;
