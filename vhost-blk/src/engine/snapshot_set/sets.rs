//! The commands of the life of a set: finds the set, feeds `snapshot_state`, carries its effects out.
//!
//! Called by `control` on threads that may block. Knows nothing of connections but an [`OwnerId`], and nothing of QMP.

use super::super::crew::Crew;
use super::super::snapshot_state::{Effect, Event, Reason, State};
use super::super::volume::VolumeEngine;
use super::error::{SetError, store_error};
use super::window::{Committed, Inner, OwnerId, Set};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use uuid::Uuid;
use vhost_blk_wire::event::Event as WireEvent;
use vhost_blk_wire::types::{ByteRange, Method, SnapshotState};

/// Longest window, milliseconds (VSS: 10 s).
const LIMIT_MS_MAX: u64 = 10_000;
/// Most volumes of one set.
const VOLUMES_MAX: usize = 64;

/// All open sets, and the volumes they may be made of.
#[derive(Debug)]
pub struct SnapshotSets {
    pub(super) volumes: Vec<Arc<VolumeEngine>>,
    sets: Mutex<HashMap<Uuid, Arc<Set>>>,
    pub(super) crew: Arc<Crew>,
    /// Undone sets of which a disk error has left a provisional snapshot behind. Nothing may keep them; the next start
    /// discards them. Locked while a set that a restart has left is kept or aborted: it is the one or the other, on all volumes.
    undone: Mutex<HashSet<Uuid>>,
}

impl SnapshotSets {
    /// No open sets over these volumes.
    #[must_use]
    pub fn new(volumes: Vec<Arc<VolumeEngine>>) -> Arc<Self> {
        Arc::new(Self {
            volumes,
            sets: Mutex::new(HashMap::new()),
            crew: Arc::new(Crew::default()),
            undone: Mutex::new(HashSet::new()),
        })
    }

    /// The daemon's volumes.
    #[must_use]
    pub fn volumes(&self) -> &[Arc<VolumeEngine>] {
        &self.volumes
    }

    /// True if a set is between `prepare` and its verdict.
    #[must_use]
    pub fn any_open(&self) -> bool {
        !self.lock().is_empty()
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
            crew: Arc::clone(&self.crew),
            changed: Condvar::new(),
        });
        {
            let mut sets = self.lock();
            if sets.contains_key(&id) || !self.stored(id).is_empty() {
                return Err(SetError::InvalidState(format!(
                    "there is a set {id} already"
                )));
            }
            if let Some(volume) = set.volumes.iter().find(|volume| volume.is_changing()) {
                return Err(SetError::InvalidState(format!(
                    "volume {:?} is being resized or reverted",
                    volume.settings.name
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
        let undone = self.undone.lock().unwrap_or_else(PoisonError::into_inner);
        let stored = self.stored(id);
        if stored.is_empty() || undone.contains(&id) {
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
        let mut undone = self.undone.lock().unwrap_or_else(PoisonError::into_inner);
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
            if let Err(error) = volume.store().discard_set(id.into()) {
                undone.insert(id);
                return Err(store_error(volume, error));
            }
        }
        undone.remove(&id);
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

    /// Ends a set that is held by command when its hold has lasted too long.
    fn expire_at(self: &Arc<Self>, set: &Arc<Set>, deadline: Instant) {
        let (sets, set) = (Arc::clone(self), Arc::clone(set));
        self.crew.start(move || {
            if set.held_until(deadline)
                && let Err(error) = sets.feed(&set, Event::HoldExpired)
            {
                tracing::debug!(set = %set.id, %error, "a hold expired too late to matter");
            }
        });
    }

    pub(super) fn find(&self, id: Uuid) -> Result<Arc<Set>, SetError> {
        self.lock()
            .get(&id)
            .map(Arc::clone)
            .ok_or(SetError::NoSuchSet(id))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Arc<Set>>> {
        self.sets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tell(&self, event: &WireEvent) {
        if let Some(volume) = self.volumes.first() {
            volume.tell(event.clone());
        }
    }

    /// Takes an event into account and carries out what follows from it.
    pub(super) fn feed(&self, set: &Arc<Set>, event: Event) -> Result<(), SetError> {
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
                let id = set.id;
                let kept = set.on_all(move |volume, _| volume.store().keep_set(id.into()));
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
                // Told last: who hears it may open the next set on these volumes.
                let undone_because = set.lock().undone_because.clone();
                if let Some(reason) = undone_because {
                    self.tell(&WireEvent::SnapshotSetAborted {
                        set: set.id,
                        reason: reason.to_string(),
                    });
                }
            }
        }
        None
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
