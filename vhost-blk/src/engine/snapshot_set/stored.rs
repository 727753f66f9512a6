//! Snapshots that are on disk: listing, finding, deleting, reverting.
//!
//! Called by `control` and by the other rooms of `snapshot_set`. Knows open sets only to keep its hands off them.

use super::super::volume::VolumeEngine;
use super::error::{SetError, store_error};
use super::sets::SnapshotSets;
use std::sync::Arc;
use uuid::Uuid;
use vhost_blk_store as store;
use vhost_blk_wire::event::Event as WireEvent;
use vhost_blk_wire::types::{Method, SnapshotInfo, SnapshotState};

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

    /// What the stores know of a set.
    pub(super) fn stored(&self, id: Uuid) -> Vec<(&Arc<VolumeEngine>, SnapshotInfo)> {
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
        size_bytes: volume.size_bytes(),
    }
}
