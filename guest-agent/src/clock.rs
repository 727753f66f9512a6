//! Time by CLOCK_BOOTTIME, the only clock that counts a suspended guest.
//!
//! Called by every room that measures or limits a hold. Never the wall clock: a guest that was paused or had its time set
//! must not believe that a hold was shorter than it was.

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// A point in time: microseconds of CLOCK_BOOTTIME.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootTime(u64);

impl BootTime {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
        Self(seconds * 1_000_000 + nanoseconds / 1_000)
    }

    /// From a count of microseconds (as `helper` messages carry it).
    #[must_use]
    pub fn from_us(us: u64) -> Self {
        Self(us)
    }

    /// Microseconds since boot.
    #[must_use]
    pub fn as_us(self) -> u64 {
        self.0
    }

    /// This many milliseconds later.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms.saturating_mul(1_000)))
    }

    /// Microseconds from `earlier` to this point; 0 if it is not earlier.
    #[must_use]
    pub fn us_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// Milliseconds from `earlier` to this point; 0 if it is not earlier.
    #[must_use]
    pub fn ms_since(self, earlier: Self) -> u64 {
        self.us_since(earlier) / 1_000
    }

    /// Time from now until this point; zero if it is past.
    #[must_use]
    pub fn remaining(self) -> Duration {
        Duration::from_micros(self.us_since(Self::now()))
    }

    /// True once this point is reached.
    #[must_use]
    pub fn is_past(self) -> bool {
        Self::now() >= self
    }
}

/// A timerfd on CLOCK_BOOTTIME; readable once its time has come.
#[derive(Debug)]
pub struct Alarm(OwnedFd);

impl Alarm {
    /// A timer that is not set.
    pub fn new() -> rustix::io::Result<Self> {
        timerfd_create(
            TimerfdClockId::Boottime,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )
        .map(Self)
    }

    /// Fires at `at` (at once if that is past), or never if `None`. Allocates nothing.
    pub fn set(&self, at: Option<BootTime>) -> rustix::io::Result<()> {
        // A zero value would disarm the timer, hence the lower bound.
        let us = at.map_or(0, |at| at.as_us().max(1));
        let value = Timespec {
            tv_sec: i64::try_from(us / 1_000_000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(us % 1_000_000 * 1_000).unwrap_or(0),
        };
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let spec = Itimerspec {
            it_interval: zero,
            it_value: value,
        };
        timerfd_settime(&self.0, TimerfdTimerFlags::ABSTIME, &spec).map(drop)
    }
}

impl AsFd for Alarm {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
