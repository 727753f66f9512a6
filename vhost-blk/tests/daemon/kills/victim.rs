//! A daemon that is going to be killed.
//!
//! Used by the kill campaign: whoever comes first kills it.

use crate::harness::Daemon;
use rustix::process::{Pid, Signal, kill_process};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The daemon's process.
pub(super) struct Victim {
    id: Pid,
    pub(super) killed: AtomicBool,
}

impl Victim {
    /// The process must not be reaped while this lives: its number could be another's then.
    pub(super) fn new(daemon: &Daemon) -> Self {
        let id = i32::try_from(daemon.id()).ok().and_then(Pid::from_raw);
        Self {
            id: id.unwrap(),
            killed: AtomicBool::new(false),
        }
    }

    pub(super) fn kill(&self) {
        kill_process(self.id, Signal::KILL).unwrap();
        self.killed.store(true, Ordering::SeqCst);
    }

    pub(super) fn kill_after(&self, time: Duration) {
        std::thread::sleep(time);
        self.kill();
    }

    pub(super) fn is_killed(&self) -> bool {
        self.killed.load(Ordering::SeqCst)
    }

    /// Kills it after a time unless somebody did it before.
    pub(super) fn kill_within(&self, time: Duration) {
        let deadline = Instant::now() + time;
        while !self.is_killed() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1).min(time));
        }
        self.kill();
    }
}
