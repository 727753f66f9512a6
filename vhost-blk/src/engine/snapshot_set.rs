//! Snapshot sets over the daemon's volumes: carries out what `snapshot_state` decides.
//!
//! Called by `control` on threads that may block. Knows nothing of connections but an [`OwnerId`], and nothing of QMP.
//!
//! The window of a commit, on all volumes of the set: hold writes, drain those in flight, one durable record each, look at
//! the clock and at the holds, read the witnesses, release. The look comes after the last record is durable and before
//! the first write may pass, so "in time" speaks of what is on disk. Deadlines count from the mark on `CLOCK_MONOTONIC`: a
//! daemon that was stopped meanwhile finds its hold broken and undoes the set.

use super::barrier::HoldId;
use super::snapshot_state::{Effect, Event, Reason, Refusal, State, step};
use super::volume::{QuietWindow, VolumeEngine};
use super::witness::{MarkId, Watched};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use uuid::Uuid;
use vhost_blk_store::{self as store, NewSnapshot, StoreError};
use vhost_blk_wire::event::Event as WireEvent;
use vhost_blk_wire::types::{ByteRange, Method, SnapshotInfo, SnapshotState, WriteCount};

/// Longest window, milliseconds (VSS: 10 s).
const LIMIT_MS_MAX: u64 = 10_000;
/// Most volumes of one set.
const VOLUMES_MAX: usize = 64;

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
    /// The durable records.
    pub record: Duration,
    /// From holding to releasing.
    pub hold: Duration,
    /// From the mark to the end.
    pub since_mark: Duration,
}

/// Why a command on sets or snapshots failed.
#[derive(Debug, thiserror::Error)]
pub enum SetError {
    /// No such volume.
    #[error("no volume {0:?}")]
    NoSuchVolume(String),
    /// No such set, or it was undone.
    #[error("no snapshot set {0}")]
    NoSuchSet(Uuid),
    /// No such snapshot.
    #[error("no snapshot {0}")]
    NoSuchSnapshot(Uuid),
    /// A set is open on one of the volumes.
    #[error("snapshot set {0} is open on volume {1:?}")]
    InProgress(Uuid, String),
    /// The command does not fit.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The command does not fit, for another reason.
    #[error("{0}")]
    InvalidState(String),
    /// Writes could not be held until the commit; the set is undone.
    #[error("writes could not be held until the commit: {0}; the set is undone")]
    HoldBroken(&'static str),
    /// The set was undone meanwhile.
    #[error("the set was undone: {0}")]
    Undone(Reason),
    /// Shadow storage is full.
    #[error("no room in the shadow storage of volume {0:?}")]
    NoSpace(String),
    /// A disk has failed.
    #[error("volume {0:?} is poisoned")]
    Poisoned(String),
    /// The arguments make no sense.
    #[error("{0}")]
    BadArgument(String),
    /// The store failed.
    #[error("volume {volume:?}: {error}")]
    Store {
        /// Volume by name.
        volume: String,
        /// What it said.
        #[source]
        error: StoreError,
    },
}

fn store_error(volume: &VolumeEngine, error: StoreError) -> SetError {
    let name = volume.settings.name.clone();
    if matches!(error, StoreError::NoSpace) {
        SetError::NoSpace(name)
    } else if matches!(error, StoreError::Poisoned) {
        SetError::Poisoned(name)
    } else if let StoreError::NoSuchSnapshot(id) = error {
        SetError::NoSuchSnapshot(id.into())
    } else {
        SetError::Store {
            volume: name,
            error,
        }
    }
}

/// All open sets, and the volumes they may be made of.
#[derive(Debug)]
pub struct SnapshotSets {
    volumes: Vec<Arc<VolumeEngine>>,
    sets: Mutex<HashMap<Uuid, Arc<Set>>>,
    /// Undone sets of which a disk error has left a provisional snapshot behind. Nothing may keep them; the next start
    /// discards them.
    undone: Mutex<HashSet<Uuid>>,
}

#[derive(Debug)]
struct Set {
    id: Uuid,
    owner: OwnerId,
    volumes: Vec<Arc<VolumeEngine>>,
    method: Option<Method>,
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug)]
struct Inner {
    state: State,
    marked_at: Option<Instant>,
    /// Exempt ranges of each volume, for the next count.
    exempt: Vec<Vec<ByteRange>>,
    /// One per volume, or none.
    marks: Vec<MarkId>,
    /// One per volume while writes are held.
    holds: Vec<HoldId>,
    hold_deadline: Option<Instant>,
    /// Keeps maintenance away between mark and commit.
    quiet: Vec<QuietWindow>,
    snapshots: Vec<SnapshotInfo>,
    undone_because: Option<Reason>,
}

impl SnapshotSets {
    /// No open sets over these volumes.
    #[must_use]
    pub fn new(volumes: Vec<Arc<VolumeEngine>>) -> Arc<Self> {
        Arc::new(Self {
            volumes,
            sets: Mutex::new(HashMap::new()),
            undone: Mutex::new(HashSet::new()),
        })
    }

    /// The daemon's volumes.
    #[must_use]
    pub fn volumes(&self) -> &[Arc<VolumeEngine>] {
        &self.volumes
    }

    /// A volume by name.
    ///
    /// # Errors
    /// [`SetError::NoSuchVolume`].
    pub fn volume(&self, name: &str) -> Result<&Arc<VolumeEngine>, SetError> {
        self.volumes
            .iter()
            .find(|volume| volume.settings.name == name)
            .ok_or_else(|| SetError::NoSuchVolume(name.to_owned()))
    }

    /// `snapshot-set-prepare`.
    ///
    /// # Errors
    /// See [`SetError`]; nothing of the set is left then.
    pub fn prepare(
        &self,
        id: Uuid,
        owner: OwnerId,
        names: &[String],
        method: Option<Method>,
    ) -> Result<(), SetError> {
        if names.is_empty() || names.len() > VOLUMES_MAX {
            return Err(SetError::BadArgument(format!(
                "a set has 1 to {VOLUMES_MAX} volumes"
            )));
        }
        let mut volumes = Vec::new();
        for (index, name) in names.iter().enumerate() {
            if names.iter().take(index).any(|other| other == name) {
                return Err(SetError::BadArgument(format!(
                    "volume {name:?} is named twice"
                )));
            }
            volumes.push(Arc::clone(self.volume(name)?));
        }
        let set = Arc::new(Set {
            id,
            owner,
            inner: Mutex::new(Inner {
                state: State::Preparing { doomed: None },
                marked_at: None,
                exempt: vec![Vec::new(); volumes.len()],
                marks: Vec::new(),
                holds: Vec::new(),
                hold_deadline: None,
                quiet: Vec::new(),
                snapshots: Vec::new(),
                undone_because: None,
            }),
            volumes,
            method,
            changed: Condvar::new(),
        });
        {
            let mut sets = self.lock();
            if sets.contains_key(&id) || !self.stored(id).is_empty() {
                return Err(SetError::InvalidState(format!(
                    "there is a set {id} already"
                )));
            }
            for other in sets.values() {
                if let Some(shared) = set.volumes.iter().find(|volume| other.has(volume)) {
                    return Err(SetError::InProgress(other.id, shared.settings.name.clone()));
                }
            }
            sets.insert(id, Arc::clone(&set));
        }
        let prepared = set.on_all(|volume, _| volume.store().prepare_snapshot());
        match prepared {
            Ok(_) => self.feed(&set, Event::Prepared)?,
            Err(error) => {
                self.feed(&set, Event::PrepareFailed(error.to_string()))?;
                return Err(error);
            }
        }
        set.ensure_not_undone()
    }

    /// `snapshot-set-mark`.
    ///
    /// # Errors
    /// See [`SetError`].
    pub fn mark(&self, id: Uuid, exempt: &[(String, Vec<ByteRange>)]) -> Result<(), SetError> {
        let set = self.find(id)?;
        let mut by_volume = vec![Vec::new(); set.volumes.len()];
        for (name, ranges) in exempt {
            let place = set
                .volumes
                .iter()
                .position(|volume| volume.settings.name == *name)
                .and_then(|place| by_volume.get_mut(place))
                .ok_or_else(|| SetError::NoSuchVolume(name.clone()))?;
            place.extend_from_slice(ranges);
        }
        set.lock().exempt = by_volume;
        self.feed(&set, Event::Mark)
    }

    /// `snapshot-set-hold`.
    ///
    /// # Errors
    /// See [`SetError`]; [`SetError::HoldBroken`] has undone the set.
    pub fn hold(self: &Arc<Self>, id: Uuid, limit_ms: u64) -> Result<(), SetError> {
        let limit = limit(limit_ms)?;
        let set = self.find(id)?;
        let deadline = Instant::now() + limit;
        set.lock().hold_deadline = Some(deadline);
        self.feed(&set, Event::Hold)?;
        self.expire_at(&set, deadline);
        let holds = set.lock().holds.clone();
        let drained = holds.len() == set.volumes.len()
            && set
                .volumes
                .iter()
                .zip(holds)
                .all(|(volume, hold)| volume.barrier.drain(hold));
        if !drained {
            self.feed(&set, Event::HoldExpired)?;
            return Err(SetError::HoldBroken("writes in flight did not end in time"));
        }
        set.ensure_not_undone()
    }

    /// `snapshot-set-release`.
    ///
    /// # Errors
    /// See [`SetError`].
    pub fn release(&self, id: Uuid) -> Result<(), SetError> {
        let set = self.find(id)?;
        self.feed(&set, Event::Release)
    }

    /// `snapshot-set-commit`.
    ///
    /// # Errors
    /// See [`SetError`]; whatever the error but for a refusal, the set is undone.
    pub fn commit(&self, id: Uuid, limit_ms: u64) -> Result<Committed, SetError> {
        let limit = limit(limit_ms)?;
        let set = self.find(id)?;
        self.feed(&set, Event::Commit)?;
        match set.take_snapshots(limit) {
            Ok(committed) => {
                set.lock().snapshots = committed
                    .volumes
                    .iter()
                    .map(|(snapshot, _)| snapshot.clone())
                    .collect();
                self.feed(&set, Event::Committed)?;
                set.ensure_not_undone()?;
                Ok(committed)
            }
            Err(error) => {
                let reason = if matches!(error, SetError::HoldBroken(_)) {
                    Reason::HoldBroken
                } else {
                    Reason::Failed(error.to_string())
                };
                self.feed(&set, Event::CommitFailed(reason))?;
                Err(error)
            }
        }
    }

    /// `snapshot-set-keep`. Also keeps what a restart left provisional, and is content with what is kept already.
    ///
    /// # Errors
    /// See [`SetError`].
    pub fn keep(&self, id: Uuid) -> Result<(), SetError> {
        if let Ok(set) = self.find(id) {
            self.feed(&set, Event::Keep)?;
            return set.ensure_kept();
        }
        let stored = self.stored(id);
        let undone = self
            .undone
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&id);
        if stored.is_empty() || undone {
            return Err(SetError::NoSuchSet(id));
        }
        for (volume, snapshot) in stored {
            if snapshot.state == SnapshotState::Provisional {
                volume
                    .store()
                    .keep_set(id.into())
                    .map_err(|error| store_error(volume, error))?;
            }
        }
        Ok(())
    }

    /// `snapshot-set-abort`. Also drops what a restart left provisional.
    ///
    /// # Errors
    /// [`SetError::NoSuchSet`] if nothing of the set is left; see [`SetError`].
    pub fn abort(&self, id: Uuid, reason: &str) -> Result<(), SetError> {
        if let Ok(set) = self.find(id) {
            self.feed(&set, Event::Abort(reason.to_owned()))?;
            // Another thread may be in the middle of it; the answer says that it is over.
            set.wait_until_gone();
            return Ok(());
        }
        let stored = self.stored(id);
        if stored.is_empty() {
            return Err(SetError::NoSuchSet(id));
        }
        if stored
            .iter()
            .any(|(_, snapshot)| snapshot.state == SnapshotState::Kept)
        {
            return Err(SetError::InvalidState(format!(
                "set {id} is kept: delete it"
            )));
        }
        for (volume, _) in stored {
            volume
                .store()
                .discard_set(id.into())
                .map_err(|error| store_error(volume, error))?;
        }
        Ok(())
    }

    /// A connection has closed: its open sets are undone.
    pub fn owner_gone(&self, owner: OwnerId) {
        let orphans: Vec<_> = self
            .lock()
            .values()
            .filter(|set| set.owner == owner)
            .map(Arc::clone)
            .collect();
        for set in orphans {
            if let Err(error) = self.feed(&set, Event::OwnerGone) {
                tracing::warn!(set = %set.id, %error, "cannot undo a set whose owner has gone");
            }
        }
    }

    /// The daemon stops: all open sets are undone.
    pub fn undo_all(&self) {
        let owners: HashSet<_> = self.lock().values().map(|set| set.owner).collect();
        for owner in owners {
            self.owner_gone(owner);
        }
    }

    /// All snapshots of a volume, or of all, oldest first.
    ///
    /// # Errors
    /// [`SetError::NoSuchVolume`].
    pub fn snapshots(&self, volume: Option<&str>) -> Result<Vec<SnapshotInfo>, SetError> {
        let chosen = match volume {
            Some(name) => std::slice::from_ref(self.volume(name)?),
            None => &self.volumes,
        };
        let mut found: Vec<_> = chosen
            .iter()
            .flat_map(|volume| {
                volume
                    .store()
                    .snapshots()
                    .into_iter()
                    .map(|info| wire_info(volume, &info))
            })
            .collect();
        found.sort_by_key(|snapshot| snapshot.created_unix_ms);
        Ok(found)
    }

    /// The volume of a snapshot.
    ///
    /// # Errors
    /// [`SetError::NoSuchSnapshot`].
    pub fn find_snapshot(&self, id: Uuid) -> Result<(&Arc<VolumeEngine>, SnapshotInfo), SetError> {
        self.volumes
            .iter()
            .find_map(|volume| {
                let found = volume.store().snapshots().into_iter();
                let info = found
                    .into_iter()
                    .find(|info| Uuid::from(info.snapshot_id) == id)?;
                Some((volume, wire_info(volume, &info)))
            })
            .ok_or(SetError::NoSuchSnapshot(id))
    }

    /// `snapshot-set-delete`.
    ///
    /// # Errors
    /// See [`SetError`].
    pub fn delete_set(&self, id: Uuid) -> Result<(), SetError> {
        if self.find(id).is_ok() {
            return Err(SetError::InvalidState(format!(
                "set {id} is open: abort it"
            )));
        }
        let stored = self.stored(id);
        if stored.is_empty() {
            return Err(SetError::NoSuchSet(id));
        }
        let mut deleted = Vec::new();
        for (volume, snapshot) in stored {
            volume
                .store()
                .delete_snapshot(snapshot.snapshot.into())
                .map_err(|error| store_error(volume, error))?;
            deleted.push(snapshot.snapshot);
        }
        self.tell(&WireEvent::SnapshotsDeleted { snapshots: deleted });
        Ok(())
    }

    /// `snapshot-delete`.
    ///
    /// # Errors
    /// See [`SetError`].
    pub fn delete_snapshot(&self, id: Uuid) -> Result<(), SetError> {
        let (volume, snapshot) = self.find_snapshot(id)?;
        if self.find(snapshot.set).is_ok() {
            return Err(SetError::InvalidState(format!(
                "set {} is open",
                snapshot.set
            )));
        }
        volume
            .store()
            .delete_snapshot(id.into())
            .map_err(|error| store_error(volume, error))?;
        self.tell(&WireEvent::SnapshotsDeleted {
            snapshots: vec![id],
        });
        Ok(())
    }

    /// `snapshot-revert`.
    ///
    /// # Errors
    /// See [`SetError`].
    pub fn revert(&self, id: Uuid) -> Result<(), SetError> {
        let (volume, _) = self.find_snapshot(id)?;
        if self.lock().values().any(|set| set.has(volume)) {
            return Err(SetError::InvalidState(
                "a set is open on this volume".to_owned(),
            ));
        }
        let reverted = volume.while_detached(|store| store.revert(id.into()));
        reverted
            .ok_or_else(|| SetError::InvalidState("a front end is connected".to_owned()))?
            .map_err(|error| store_error(volume, error))
    }

    /// Ends a set that is held by command when its hold has lasted too long.
    fn expire_at(self: &Arc<Self>, set: &Arc<Set>, deadline: Instant) {
        let (sets, set) = (Arc::clone(self), Arc::clone(set));
        let watch = move || {
            if set.held_until(deadline)
                && let Err(error) = sets.feed(&set, Event::HoldExpired)
            {
                tracing::debug!(set = %set.id, %error, "a hold expired too late to matter");
            }
        };
        let started = std::thread::Builder::new()
            .name("hold limit".to_owned())
            .spawn(watch);
        if let Err(error) = started {
            tracing::error!(%error, "cannot start the thread that ends a hold");
        }
    }

    fn find(&self, id: Uuid) -> Result<Arc<Set>, SetError> {
        self.lock()
            .get(&id)
            .map(Arc::clone)
            .ok_or(SetError::NoSuchSet(id))
    }

    /// What the stores know of a set.
    fn stored(&self, id: Uuid) -> Vec<(&Arc<VolumeEngine>, SnapshotInfo)> {
        self.volumes
            .iter()
            .flat_map(|volume| {
                volume
                    .store()
                    .snapshots()
                    .into_iter()
                    .filter(move |info| Uuid::from(info.set_id) == id)
                    .map(move |info| (volume, wire_info(volume, &info)))
            })
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Arc<Set>>> {
        self.sets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: &WireEvent) {
        if let Some(volume) = self.volumes.first() {
            volume.tell(event.clone());
        }
    }

    /// Takes an event into account and carries out what follows from it.
    fn feed(&self, set: &Arc<Set>, event: Event) -> Result<(), SetError> {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            tracing::debug!(set = %set.id, ?event, "set");
            let effects = set.step(event)?;
            for effect in effects {
                events.extend(self.carry_out(set, effect));
            }
        }
        Ok(())
    }

    /// Carries one effect out; the answer is what it leads to.
    fn carry_out(&self, set: &Arc<Set>, effect: Effect) -> Option<Event> {
        match effect {
            Effect::StartCounting => set.start_counting(),
            Effect::HoldWrites => {
                let deadline = set.lock().hold_deadline.unwrap_or_else(Instant::now);
                if !set.hold_writes(deadline) {
                    return Some(Event::HoldExpired);
                }
            }
            // The commit itself runs in `commit`, which reports its end.
            Effect::TakeSnapshots => {}
            Effect::ReleaseWrites => {
                set.release_writes();
            }
            Effect::KeepSnapshots => {
                let kept = set.on_all(|volume, _| volume.store().keep_set(set.id.into()));
                return Some(match kept {
                    Ok(_) => Event::Kept,
                    Err(error) => {
                        tracing::error!(set = %set.id, %error, "a volume could not keep its snapshot");
                        Event::KeepFailed
                    }
                });
            }
            Effect::DropSnapshots(reason) => {
                tracing::info!(set = %set.id, %reason, "the set is undone");
                if !set.drop_snapshots() {
                    let mut undone = self.undone.lock().unwrap_or_else(PoisonError::into_inner);
                    undone.insert(set.id);
                }
                self.tell(&WireEvent::SnapshotSetAborted {
                    set: set.id,
                    reason: reason.to_string(),
                });
                set.lock().undone_because = Some(reason);
                return Some(Event::Undone);
            }
            Effect::TellCommitted => {
                let snapshots = set.lock().snapshots.clone();
                self.tell(&WireEvent::SnapshotSetCommitted {
                    set: set.id,
                    snapshots,
                });
            }
            Effect::TellKept => self.tell(&WireEvent::SnapshotSetKept { set: set.id }),
            Effect::Forget => {
                set.stop_counting();
                self.lock().remove(&set.id);
            }
        }
        None
    }
}

impl Set {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has(&self, volume: &Arc<VolumeEngine>) -> bool {
        self.volumes.iter().any(|own| Arc::ptr_eq(own, volume))
    }

    fn step(&self, event: Event) -> Result<Vec<Effect>, Refusal> {
        let mut inner = self.lock();
        let (state, effects) = step(inner.state.clone(), event)?;
        inner.state = state;
        self.changed.notify_all();
        Ok(effects)
    }

    fn wait_until_gone(&self) {
        let inner = self.lock();
        let over = self
            .changed
            .wait_while(inner, |inner| inner.state != State::Gone);
        drop(over);
    }

    fn ensure_not_undone(&self) -> Result<(), SetError> {
        match &self.lock().undone_because {
            None => Ok(()),
            Some(Reason::HoldBroken) => Err(SetError::HoldBroken("the hold has ended by itself")),
            Some(reason) => Err(SetError::Undone(reason.clone())),
        }
    }

    fn ensure_kept(&self) -> Result<(), SetError> {
        if self.lock().state == State::Gone {
            return Ok(());
        }
        Err(SetError::InvalidState(
            "the set could not be kept on all volumes: keep it again, or restart".to_owned(),
        ))
    }

    /// Does something on all volumes at once.
    fn on_all<T: Send>(
        &self,
        work: impl Fn(&VolumeEngine, usize) -> Result<T, StoreError> + Sync,
    ) -> Result<Vec<T>, SetError> {
        let run = |volume: &VolumeEngine, place| {
            work(volume, place).map_err(|error| store_error(volume, error))
        };
        if let [only] = self.volumes.as_slice() {
            return Ok(vec![run(only, 0)?]);
        }
        std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .volumes
                .iter()
                .enumerate()
                .map(|(place, volume)| scope.spawn(move || run(volume, place)))
                .collect();
            let mut results = Vec::new();
            for (thread, volume) in threads.into_iter().zip(&self.volumes) {
                results.push(
                    thread
                        .join()
                        .unwrap_or_else(|_| Err(SetError::Poisoned(volume.settings.name.clone()))),
                );
            }
            results.into_iter().collect()
        })
    }

    fn start_counting(&self) {
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

    fn stop_counting(&self) {
        let mut inner = self.lock();
        inner.quiet.clear();
        for (volume, mark) in self.volumes.iter().zip(std::mem::take(&mut inner.marks)) {
            volume.witness.unmark(mark);
        }
    }

    /// Holds writes on all volumes; false (and nothing held) if one is held already.
    fn hold_writes(self: &Arc<Self>, deadline: Instant) -> bool {
        let mut holds = Vec::new();
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
        self.lock().holds = holds;
        self.wake_at(deadline);
        true
    }

    /// Lets writes go on; true if all holds were unbroken until now.
    fn release_writes(&self) -> bool {
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
        let watch = move || {
            if set.held_until(deadline) {
                for volume in &set.volumes {
                    volume.wake_queues();
                }
            }
        };
        let started = std::thread::Builder::new()
            .name("hold deadline".to_owned())
            .spawn(watch);
        if let Err(error) = started {
            // The barrier itself still ends the hold with the first new write.
            tracing::error!(%error, "cannot start the thread that watches a hold");
        }
    }

    /// Waits; true if writes are still held at the deadline.
    fn held_until(&self, deadline: Instant) -> bool {
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

    /// Holds, drains, records, looks, releases.
    fn take_snapshots(self: &Arc<Self>, limit: Duration) -> Result<Committed, SetError> {
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
        let taken = self.take_while_held(start, deadline);
        let late = Instant::now() >= deadline;
        let counts = self.counts();
        // The holds are asked at the very moment that ends them: nothing can have passed unseen.
        let intact = if held {
            self.holds_intact()
        } else {
            self.release_writes()
        };
        let end = Instant::now();
        let (drained, recorded, snapshots) = taken?;
        if late {
            return Err(SetError::HoldBroken(
                "the commit took longer than its limit",
            ));
        }
        if !intact {
            return Err(SetError::HoldBroken("the hold has ended by itself"));
        }
        Ok(Committed {
            volumes: snapshots.into_iter().zip(counts).collect(),
            drain: drained - start,
            record: recorded - drained,
            hold: end - start,
            since_mark: end - marked_at,
        })
    }

    fn take_while_held(
        &self,
        start: Instant,
        deadline: Instant,
    ) -> Result<(Instant, Instant, Vec<SnapshotInfo>), SetError> {
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
        tracing::debug!(set = %self.id, drain_us = (drained - start).as_micros(), "drained");
        let members: Vec<_> = self
            .volumes
            .iter()
            .map(|volume| volume.store().id())
            .collect();
        let created_unix_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
        let snapshots = self.on_all(|volume, _| {
            let info = volume.store().take_snapshot(NewSnapshot {
                snapshot_id: Uuid::new_v4().into(),
                set_id: self.id.into(),
                members: members.clone(),
                method: store_method(self.method.unwrap_or(volume.settings.method)),
                created_unix_ms,
            })?;
            Ok(wire_info(volume, &info))
        })?;
        Ok((drained, Instant::now(), snapshots))
    }

    fn holds_intact(&self) -> bool {
        let holds = self.lock().holds.clone();
        holds.len() == self.volumes.len()
            && self
                .volumes
                .iter()
                .zip(holds)
                .all(|(volume, hold)| volume.barrier.is_intact(hold))
    }

    fn counts(&self) -> Vec<WriteCount> {
        let marks = self.lock().marks.clone();
        self.volumes
            .iter()
            .zip(marks)
            .map(|(volume, mark)| volume.witness.read(mark).unwrap_or_default())
            .collect()
    }

    /// Drops what was taken; false if something of it is left.
    fn drop_snapshots(&self) -> bool {
        let mut all = true;
        for volume in &self.volumes {
            let stored = volume.store().snapshots();
            if !stored.iter().any(|info| Uuid::from(info.set_id) == self.id) {
                continue;
            }
            if let Err(error) = volume.store().discard_set(self.id.into()) {
                // It stays provisional, and the next start discards it, since nobody has kept it.
                tracing::error!(set = %self.id, volume = %volume.settings.name, %error,
                    "a provisional snapshot could not be dropped");
                all = false;
            }
        }
        all
    }
}

fn limit(limit_ms: u64) -> Result<Duration, SetError> {
    if (1..=LIMIT_MS_MAX).contains(&limit_ms) {
        Ok(Duration::from_millis(limit_ms))
    } else {
        Err(SetError::BadArgument(format!(
            "limit-ms has to be 1 to {LIMIT_MS_MAX}"
        )))
    }
}

fn store_method(method: Method) -> store::Method {
    match method {
        Method::Row => store::Method::RedirectOnWrite,
        Method::Cow => store::Method::CopyOnWrite,
    }
}

fn wire_info(volume: &VolumeEngine, info: &store::SnapshotInfo) -> SnapshotInfo {
    SnapshotInfo {
        snapshot: info.snapshot_id.into(),
        set: info.set_id.into(),
        volume: volume.settings.name.clone(),
        epoch: info.epoch.0,
        method: match info.method {
            store::Method::RedirectOnWrite => Method::Row,
            store::Method::CopyOnWrite => Method::Cow,
        },
        state: match info.state {
            store::SnapshotState::Provisional => SnapshotState::Provisional,
            store::SnapshotState::Kept => SnapshotState::Kept,
        },
        created_unix_ms: info.created_unix_ms,
        size_bytes: volume.size_bytes(),
    }
}
