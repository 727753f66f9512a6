//! One open set: its volumes, its state, and the window in which its snapshots are taken.
//!
//! Driven by `sets`. The window, on all volumes of the set: hold writes, drain those in flight, append one record each (from
//! then on the content is fixed), look at the clock and at the holds, read the witnesses, release; then make the records
//! durable on all volumes at once, with the guest writing again, and answer.
//! The first look comes after the last record and before the first write may pass, so "at one instant" speaks of what the
//! snapshots hold; a second look comes after the last sync, so "in time" speaks of what is on disk. Deadlines count from the
//! mark on `CLOCK_MONOTONIC`: a daemon that was stopped meanwhile finds its hold broken.

use super::super::barrier::HoldId;
use super::super::crew::Crew;
use super::super::snapshot_state::{Effect, Event, Reason, Refusal, State, step};
use super::super::volume::{QuietWindow, VolumeEngine};
use super::super::witness::{MarkId, Watched};
use super::error::{SetError, store_error};
use super::stored::wire_info;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use uuid::Uuid;
use vhost_blk_store::{self as store, NewSnapshot, StoreError};
use vhost_blk_wire::types::{ByteRange, Method, SnapshotInfo, WriteCount};

/// The connection that prepared a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OwnerId(pub u64);

/// What a commit has reached.
#[derive(Clone, Debug)]
pub struct Committed {
    /// Snapshot and witness of each volume, in the order of prepare.
    pub volumes: Vec<(SnapshotInfo, WriteCount)>,
    /// From holding until nothing was in flight.
    pub drain: Duration,
    /// The records, and their syncs.
    pub record: Duration,
    /// From holding to releasing.
    pub hold: Duration,
    /// From the mark to the end.
    pub since_mark: Duration,
}

/// A set from prepare to its end.
#[derive(Debug)]
pub(super) struct Set {
    /// Its identity.
    pub(super) id: Uuid,
    pub(super) owner: OwnerId,
    pub(super) volumes: Vec<Arc<VolumeEngine>>,
    pub(super) method: Option<Method>,
    pub(super) crew: Arc<Crew>,
    pub(super) inner: Mutex<Inner>,
    pub(super) changed: Condvar,
}

/// What changes.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) state: State,
    pub(super) marked_at: Option<Instant>,
    /// Exempt ranges of each volume, for the next count.
    pub(super) exempt: Vec<Vec<ByteRange>>,
    /// One per volume, or none.
    pub(super) marks: Vec<MarkId>,
    /// One per volume while writes are held.
    pub(super) holds: Vec<HoldId>,
    pub(super) hold_deadline: Option<Instant>,
    /// Keeps maintenance away between mark and commit.
    pub(super) quiet: Vec<QuietWindow>,
    pub(super) snapshots: Vec<SnapshotInfo>,
    pub(super) undone_because: Option<Reason>,
}

impl Set {
    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn has(&self, volume: &Arc<VolumeEngine>) -> bool {
        self.volumes.iter().any(|own| Arc::ptr_eq(own, volume))
    }

    pub(super) fn step(&self, event: Event) -> Result<Vec<Effect>, Refusal> {
        let mut inner = self.lock();
        let (state, effects) = step(inner.state.clone(), event)?;
        inner.state = state;
        self.changed.notify_all();
        Ok(effects)
    }

    pub(super) fn wait_until_gone(&self) {
        let inner = self.lock();
        let over = self
            .changed
            .wait_while(inner, |inner| inner.state != State::Gone);
        drop(over);
    }

    pub(super) fn ensure_not_undone(&self) -> Result<(), SetError> {
        match &self.lock().undone_because {
            None => Ok(()),
            Some(Reason::HoldBroken) => Err(SetError::HoldBroken("the hold has ended by itself")),
            Some(reason) => Err(SetError::Undone(reason.clone())),
        }
    }

    pub(super) fn ensure_kept(&self) -> Result<(), SetError> {
        if self.lock().state == State::Gone {
            return Ok(());
        }
        Err(SetError::InvalidState(
            "the set could not be kept on all volumes: keep it again, or restart".to_owned(),
        ))
    }

    /// Does something on all volumes at once.
    pub(super) fn on_all<T: Send + 'static>(
        &self,
        work: impl Fn(&VolumeEngine, usize) -> Result<T, StoreError> + Send + Sync + 'static,
    ) -> Result<Vec<T>, SetError> {
        let volumes = self.volumes.clone();
        let results = self.crew.on_all(volumes.len(), move |place| {
            volumes
                .get(place)
                .map(|volume| work(volume, place).map_err(|error| store_error(volume, error)))
        });
        results
            .into_iter()
            .zip(&self.volumes)
            .map(|(result, volume)| {
                let panicked = || Err(SetError::Poisoned(volume.settings.name.clone()));
                result.flatten().unwrap_or_else(panicked)
            })
            .collect()
    }

    pub(super) fn start_counting(&self) {
        self.stop_counting();
        let mut inner = self.lock();
        let exempt = inner.exempt.clone();
        inner.marked_at = Some(Instant::now());
        for (volume, exempt) in self.volumes.iter().zip(exempt) {
            inner
                .marks
                .push(volume.witness.mark(Watched::AllBut(exempt)));
            inner.quiet.push(volume.quiet_window());
        }
    }

    pub(super) fn stop_counting(&self) {
        let mut inner = self.lock();
        inner.quiet.clear();
        for (volume, mark) in self.volumes.iter().zip(std::mem::take(&mut inner.marks)) {
            volume.witness.unmark(mark);
        }
    }

    /// Holds writes on all volumes; false (and nothing held) if one is held already, or if the set was undone or released
    /// by another connection meanwhile: nobody would let them go.
    pub(super) fn hold_writes(self: &Arc<Self>, deadline: Instant) -> bool {
        let mut holds = Vec::with_capacity(self.volumes.len());
        for volume in &self.volumes {
            if let Some(hold) = volume.barrier.hold(deadline) {
                holds.push(hold);
            } else {
                for (volume, hold) in self.volumes.iter().zip(holds) {
                    volume.barrier.release(hold);
                }
                return false;
            }
        }
        let mut inner = self.lock();
        let is_wanted = inner.state.may_hold();
        inner.holds = holds;
        drop(inner);
        if !is_wanted {
            self.release_writes();
            return false;
        }
        self.wake_at(deadline);
        true
    }

    /// Lets writes go on; true if all holds were unbroken until now.
    pub(super) fn release_writes(&self) -> bool {
        let holds = std::mem::take(&mut self.lock().holds);
        let mut intact = holds.len() == self.volumes.len();
        for (volume, hold) in self.volumes.iter().zip(&holds) {
            intact &= volume.barrier.release(*hold);
        }
        self.changed.notify_all();
        for volume in &self.volumes {
            volume.wake_queues();
        }
        intact
    }

    /// Wakes parked writes at the deadline, even if the thread of the commit hangs in a disk.
    fn wake_at(self: &Arc<Self>, deadline: Instant) {
        let set = Arc::clone(self);
        self.crew.start(move || {
            if set.held_until(deadline) {
                for volume in &set.volumes {
                    volume.wake_queues();
                }
            }
        });
    }

    /// Waits; true if writes are still held at the deadline.
    pub(super) fn held_until(&self, deadline: Instant) -> bool {
        let mut inner = self.lock();
        while !inner.holds.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            inner = self
                .changed
                .wait_timeout(inner, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        false
    }

    /// Holds, drains, records, looks, releases, syncs.
    pub(super) fn take_snapshots(self: &Arc<Self>, limit: Duration) -> Result<Committed, SetError> {
        let (marked_at, held) = {
            let inner = self.lock();
            (
                inner.marked_at.unwrap_or_else(Instant::now),
                !inner.holds.is_empty(),
            )
        };
        let deadline = marked_at + limit;
        let start = Instant::now();
        if start >= deadline {
            return Err(SetError::HoldBroken(
                "the time was over before the commit began",
            ));
        }
        if !held && !self.hold_writes(deadline) {
            return Err(SetError::HoldBroken("writes are held already"));
        }
        let begun = self.begin_while_held(deadline);
        let late = Instant::now() >= deadline;
        let counts = self.counts();
        // The holds are asked at the very moment that ends them: nothing can have passed unseen.
        let intact = if held {
            self.holds_intact()
        } else {
            self.release_writes()
        };
        let released = Instant::now();
        // Nothing waits for a background step any more.
        self.lock().quiet.clear();
        let (drained, snapshots) = begun?;
        if late {
            return Err(SetError::HoldBroken(
                "the commit took longer than its limit",
            ));
        }
        if !intact {
            return Err(SetError::HoldBroken("the hold has ended by itself"));
        }
        // Whatever is written from here on goes beside what the snapshots hold, or behind its preserved copy.
        self.on_all(|volume, _| volume.store().flush())?;
        let end = Instant::now();
        if end >= deadline || (held && !self.holds_intact()) {
            return Err(SetError::HoldBroken(
                "the commit was durable after its limit",
            ));
        }
        tracing::debug!(set = %self.id, drain_us = (drained - start).as_micros(),
            hold_us = (released - start).as_micros(), sync_us = (end - released).as_micros(), "committed");
        Ok(Committed {
            volumes: snapshots.into_iter().zip(counts).collect(),
            drain: drained - start,
            record: end - drained,
            hold: if held { end } else { released } - start,
            since_mark: end - marked_at,
        })
    }

    /// Fixes what the snapshots hold. No sync: nothing here waits for a disk but for the writes in flight.
    fn begin_while_held(
        &self,
        deadline: Instant,
    ) -> Result<(Instant, Vec<SnapshotInfo>), SetError> {
        let holds = self.lock().holds.clone();
        for (volume, hold) in self.volumes.iter().zip(holds) {
            if !volume.barrier.drain(hold) {
                return Err(SetError::HoldBroken("writes in flight did not end in time"));
            }
        }
        let drained = Instant::now();
        if drained >= deadline {
            return Err(SetError::HoldBroken(
                "the time was over when no write was in flight",
            ));
        }
        let members: Vec<_> = self
            .volumes
            .iter()
            .map(|volume| volume.store().id())
            .collect();
        let created_unix_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
        let mut snapshots = Vec::with_capacity(self.volumes.len());
        for volume in &self.volumes {
            let info = volume.store().begin_snapshot(NewSnapshot {
                snapshot_id: Uuid::new_v4().into(),
                set_id: self.id.into(),
                members: members.clone(),
                method: store_method(self.method.unwrap_or(volume.settings.method)),
                created_unix_ms,
            });
            let info = info.map_err(|error| store_error(volume, error))?;
            snapshots.push(wire_info(volume, &info));
        }
        Ok((drained, snapshots))
    }

    pub(super) fn holds_intact(&self) -> bool {
        let holds = self.lock().holds.clone();
        holds.len() == self.volumes.len()
            && self
                .volumes
                .iter()
                .zip(holds)
                .all(|(volume, hold)| volume.barrier.is_intact(hold))
    }

    pub(super) fn counts(&self) -> Vec<WriteCount> {
        let marks = self.lock().marks.clone();
        self.volumes
            .iter()
            .zip(marks)
            .map(|(volume, mark)| volume.witness.read(mark).unwrap_or_default())
            .collect()
    }

    /// Drops what was taken; false if something of it is left.
    pub(super) fn drop_snapshots(&self) -> bool {
        let id = self.id;
        let dropped = self.on_all(move |volume, _| volume.store().discard_set(id.into()));
        if let Err(error) = &dropped {
            // It stays provisional, and the next start discards it, since nobody has kept it.
            tracing::error!(set = %id, %error, "a provisional snapshot could not be dropped");
        }
        dropped.is_ok()
    }
}

fn store_method(method: Method) -> store::Method {
    match method {
        Method::Row => store::Method::RedirectOnWrite,
        Method::Cow => store::Method::CopyOnWrite,
    }
}
