//! Snapshots that are on disk: listing, finding, deleting, reverting.
//!
//! Called by `control` and by the other rooms of `snapshot_set`. Knows open sets only to keep its hands off them.

use super::super::snapshot_state::Event;
use super::super::volume::VolumeEngine;
use super::error::{SetError, store_error};
use super::sets::SnapshotSets;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;
use vhost_blk_store as store;
use vhost_blk_wire::event::{DeletionReason, Event as WireEvent};
use vhost_blk_wire::types::{ByteRange, Method, SnapshotInfo, SnapshotState};

/// Longest time that leaving out may take: what is to be left out is a guest's word, and may be any number of places.
const LEAVE_OUT_MS_MAX: u64 = 60_000;

impl SnapshotSets {
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
                let info = volume.store().snapshot(id.into())?;
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
        let (volumes, deleted): (Vec<_>, Vec<_>) = stored
            .into_iter()
            .map(|(volume, snapshot)| (Arc::clone(volume), snapshot.snapshot))
            .unzip();
        let ids = deleted.clone();
        let results = self.crew.on_all(volumes.len(), move |place| {
            let (volume, id) = (volumes.get(place)?, ids.get(place)?);
            let result = volume.store().delete_snapshot((*id).into());
            Some(result.map_err(|error| store_error(volume, error)))
        });
        // Whatever could be deleted is, and is told.
        let (mut gone, mut failed) = (Vec::new(), None);
        for (id, result) in deleted.into_iter().zip(results) {
            match result.flatten() {
                Some(Ok(())) => gone.push(id),
                Some(Err(error)) => failed = failed.or(Some(error)),
                None => failed = failed.or(Some(SetError::NoSuchSnapshot(id))),
            }
        }
        if !gone.is_empty() {
            self.tell_deleted(gone, None);
        }
        failed.map_or(Ok(()), Err)
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
        self.tell_deleted(vec![id], None);
        Ok(())
    }

    fn tell_deleted(&self, snapshots: Vec<Uuid>, reason: Option<DeletionReason>) {
        self.tell(&WireEvent::SnapshotsDeleted { snapshots, reason });
    }

    /// Gives up the oldest snapshot by copy-on-write of a volume whose shadow storage is full; false if there is none. Kept ones
    /// first; an open set is undone.
    pub(in super::super) fn drop_for_room(&self, volume: &Arc<VolumeEngine>) -> bool {
        let stored = volume.store().snapshots();
        let of = |state| {
            let mut oldest_first = stored.iter();
            oldest_first.find(|snapshot| {
                snapshot.method == store::Method::CopyOnWrite && snapshot.state == state
            })
        };
        if let Some(oldest) = of(store::SnapshotState::Kept) {
            let id = oldest.snapshot_id.into();
            if let Err(error) = volume.store().delete_snapshot(oldest.snapshot_id) {
                tracing::error!(volume = %volume.settings.name, snapshot = %id, %error,
                    "a snapshot could not be dropped for room");
                return false;
            }
            tracing::warn!(volume = %volume.settings.name, snapshot = %id,
                "the oldest snapshot was dropped: shadow storage is full");
            self.tell_deleted(vec![id], Some(DeletionReason::NoRoom));
            return true;
        }
        let Some(open) = of(store::SnapshotState::Provisional) else {
            return false;
        };
        let why = format!(
            "the shadow storage of volume {:?} is full",
            volume.settings.name
        );
        // One that a restart has left has no coordinator here who could be told: it is not ours to drop.
        self.find(open.set_id.into())
            .and_then(|set| self.feed(&set, Event::Abort(why)))
            .is_ok()
    }

    /// `snapshot-revert`.
    ///
    /// # Errors
    /// See [`SetError`].
    pub fn revert(&self, id: Uuid) -> Result<(), SetError> {
        let (volume, target) = self.find_snapshot(id)?;
        let _changing = self.begin_change(volume)?;
        let newer: Vec<Uuid> = volume
            .store()
            .snapshots()
            .into_iter()
            .filter(|snapshot| snapshot.epoch.0 > target.epoch)
            .map(|snapshot| snapshot.snapshot_id.into())
            .collect();
        let reverted = volume.while_detached(|store| store.revert(id.into()));
        reverted
            .ok_or_else(|| {
                SetError::InvalidState("a front end is connected, or a revert goes on".to_owned())
            })?
            .map_err(|error| store_error(volume, error))?;
        if !newer.is_empty() {
            self.tell_deleted(newer, Some(DeletionReason::Reverted));
        }
        Ok(())
    }

    /// `snapshot-set-leave-out`: bytes left out by volume, in the order given.
    ///
    /// # Errors
    /// [`SetError::NoSuchSet`], [`SetError::NoSuchVolume`] for a volume that is not in it, [`SetError::InvalidState`] for a set that is not kept. That
    /// less could be left out than was wished, or in the time given, is none.
    pub fn leave_out(
        &self,
        id: Uuid,
        areas: &[(String, Vec<ByteRange>)],
        limit_ms: Option<u64>,
    ) -> Result<Vec<u64>, SetError> {
        let limit_ms = limit_ms.map_or(LEAVE_OUT_MS_MAX, |limit| limit.min(LEAVE_OUT_MS_MAX));
        let deadline = Instant::now() + Duration::from_millis(limit_ms);
        let stored = self.stored(id);
        if stored.is_empty() {
            return Err(SetError::NoSuchSet(id));
        }
        if stored
            .iter()
            .any(|(_, snapshot)| snapshot.state != SnapshotState::Kept)
        {
            return Err(SetError::InvalidState(format!("set {id} is not kept")));
        }
        let mut chosen = Vec::new();
        for (name, ranges) in areas {
            let (volume, snapshot) = stored
                .iter()
                .find(|(volume, _)| volume.settings.name == *name)
                .ok_or_else(|| SetError::NoSuchVolume(name.clone()))?;
            let ranges: Vec<store::ByteRange> = ranges
                .iter()
                .map(|range| store::ByteRange::new(range.offset_bytes, range.length_bytes))
                .collect();
            chosen.push((volume, snapshot.snapshot, store::LeaveOut::new(&ranges)));
        }
        // One volume after the other: they share the disk whose syncs this waits for.
        let mut left_out = Vec::new();
        for (volume, snapshot, mut wanted) in chosen {
            leave_out_until(deadline, volume, snapshot, &mut wanted);
            volume.tell_if_poisoned();
            left_out.push(wanted.left_out_bytes());
        }
        Ok(left_out)
    }

    /// What the stores know of a set.
    pub(super) fn stored(&self, id: Uuid) -> Vec<(&Arc<VolumeEngine>, SnapshotInfo)> {
        self.volumes
            .iter()
            .filter_map(|volume| {
                let info = volume.store().snapshot_of_set(id.into())?;
                Some((volume, wire_info(volume, &info)))
            })
            .collect()
    }
}

/// Leaves out step by step, for half of the time at most: the other half is for maintenance, which waits for the same lock.
fn leave_out_until(
    deadline: Instant,
    volume: &VolumeEngine,
    snapshot: Uuid,
    wanted: &mut store::LeaveOut,
) {
    loop {
        let began = Instant::now();
        if began >= deadline {
            tracing::warn!(volume = %volume.settings.name, %snapshot,
                "not all could be left out in the time given");
            return;
        }
        match volume.leave_out(snapshot.into(), wanted) {
            Some(Ok(true)) => {}
            Some(Ok(false)) | None => return,
            Some(Err(error)) => {
                tracing::warn!(volume = %volume.settings.name, %snapshot, %error,
                    "not all could be left out");
                return;
            }
        }
        std::thread::sleep(began.elapsed());
    }
}

/// A snapshot as the control socket tells of it.
pub(super) fn wire_info(volume: &VolumeEngine, info: &store::SnapshotInfo) -> SnapshotInfo {
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
        size_bytes: info.size_bytes,
    }
}
