//! The background thread: steps of the stores' maintenance at a pace that leaves the disk to the guest, and room when there is none.
//!
//! Started by the daemon. Decides when and how much (`pace`) and what is given up for room (`room`); what a step does is the store's
//! business.
//!
//! Invariants: a volume without guest requests is maintained at full speed; one with them gets a small share of the time, but
//! always some; while writes wait for room nothing is spared. The thread has no lower priority than the queues: it takes locks that they
//! wait for.

mod pace;
mod room;

pub(super) use pace::Arrivals;

use super::snapshot_set::SnapshotSets;
use super::volume::VolumeEngine;
use pace::{Load, Pace};
use room::Shortage;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vhost_blk_store::{Maintenance, StoreError};

/// Pause of a volume that has nothing to do.
const IDLE: Duration = Duration::from_millis(250);

/// Wakes the thread before its time.
#[derive(Debug, Default)]
pub(super) struct Alarm {
    state: Mutex<AlarmState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct AlarmState {
    rung: bool,
    is_over: bool,
}

impl Alarm {
    fn lock(&self) -> MutexGuard<'_, AlarmState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes wait for room, or something was given up that background work gives back.
    pub(super) fn ring(&self) {
        self.lock().rung = true;
        self.changed.notify_all();
    }

    fn end(&self) {
        self.lock().is_over = true;
        self.changed.notify_all();
    }

    /// Waits; `None` if the thread has to end, else whether it was rung.
    pub(super) fn wait(&self, longest: Duration) -> Option<bool> {
        let state = self.lock();
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, longest, |state| !state.rung && !state.is_over)
            .unwrap_or_else(PoisonError::into_inner);
        (!state.is_over).then(|| std::mem::take(&mut state.rung))
    }
}

/// The thread that does the stores' background work. It ends when it is stopped.
#[derive(Debug)]
pub struct Upkeep {
    alarm: Arc<Alarm>,
    thread: JoinHandle<()>,
}

impl Upkeep {
    /// Starts the thread.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(sets: Arc<SnapshotSets>) -> io::Result<Self> {
        let alarm = Arc::new(Alarm::default());
        for volume in sets.volumes() {
            volume.set_alarm(&alarm);
        }
        let heard = Arc::clone(&alarm);
        let thread = std::thread::Builder::new()
            .name("upkeep".to_owned())
            .spawn(move || work(&sets, &heard))?;
        Ok(Self { alarm, thread })
    }

    /// Ends it after the step that is under way.
    pub fn stop(self) {
        self.alarm.end();
        if self.thread.join().is_err() {
            tracing::error!("the thread of background work has panicked");
        }
    }
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    More,
    /// More, that nobody will want soon.
    Ahead,
    Idle,
    Failed,
}

/// What is known of one volume.
struct Cared<'a> {
    volume: &'a Arc<VolumeEngine>,
    pace: Pace,
    shortage: Shortage,
    last: Outcome,
    due: Instant,
}

fn work(sets: &SnapshotSets, alarm: &Alarm) {
    let now = Instant::now();
    let mut all: Vec<_> = sets
        .volumes()
        .iter()
        .map(|volume| Cared {
            volume,
            pace: Pace::new(now),
            shortage: Shortage::default(),
            last: Outcome::Idle,
            due: now,
        })
        .collect();
    loop {
        for cared in &mut all {
            if cared.due <= Instant::now() {
                let pause = cared.step(sets);
                cared.due = Instant::now() + pause;
            }
        }
        let now = Instant::now();
        let next = all
            .iter()
            .map(|cared| cared.due.saturating_duration_since(now))
            .min()
            .unwrap_or(IDLE);
        match alarm.wait(next) {
            None => return,
            Some(false) => {}
            Some(true) => all.iter_mut().for_each(|cared| cared.due = now),
        }
    }
}

impl Cared<'_> {
    /// One step, and the pause behind it.
    fn step(&mut self, sets: &SnapshotSets) -> Duration {
        let volume = self.volume;
        let begun = Instant::now();
        let load = if volume.lacks_room() || volume.store().is_pressed() {
            Load::Pressing
        } else {
            self.pace.look(begun, volume.arrivals())
        };
        let Some(step) = volume.maintain(load.budget_blocks()) else {
            return load.pause(Duration::ZERO);
        };
        volume.tell_if_poisoned();
        let outcome = match step {
            Ok(Maintenance::More) => Outcome::More,
            Ok(Maintenance::Ahead) => Outcome::Ahead,
            Ok(Maintenance::Idle) => Outcome::Idle,
            Err(StoreError::Poisoned) => Outcome::Failed,
            Err(error) => {
                if self.last != Outcome::Failed {
                    tracing::warn!(volume = %volume.settings.name, %error, "a background step failed");
                }
                Outcome::Failed
            }
        };
        self.last = outcome;
        if volume.lacks_room() {
            return self.shortage.care(sets, volume, outcome);
        }
        self.shortage.look_past();
        match outcome {
            Outcome::More => load.pause(begun.elapsed()),
            Outcome::Ahead => load.long_pause(begun.elapsed()),
            Outcome::Idle | Outcome::Failed => IDLE,
        }
    }
}
