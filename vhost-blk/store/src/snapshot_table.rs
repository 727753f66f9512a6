//! The snapshots of a volume, in order of their epochs.
//!
//! `state` changes it as records say; `first_write` and `index::merge` ask it what must be kept.
//! It knows no blocks. Invariant I5: epochs are strictly increasing and below the volume's epoch.
#![deny(clippy::indexing_slicing)]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::journal::Record;
use crate::units::{Epoch, SetId, SnapshotId, VolumeId};

/// What the first write to a block after a snapshot does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// The new data goes to the log; the old stays where it was.
    RedirectOnWrite,
    /// The old data is copied to the log; the new goes where the old was.
    CopyOnWrite,
}

impl Method {
    pub(crate) fn encode(self) -> u32 {
        match self {
            Method::RedirectOnWrite => 1,
            Method::CopyOnWrite => 2,
        }
    }

    pub(crate) fn decode(value: u32) -> Option<Method> {
        match value {
            1 => Some(Method::RedirectOnWrite),
            2 => Some(Method::CopyOnWrite),
            _ => None,
        }
    }
}

/// Whether the set's verdict is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotState {
    /// Taken; the set may still be discarded.
    Provisional,
    /// The whole set was taken and is kept.
    Kept,
}

/// One snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Its id.
    pub snapshot_id: SnapshotId,
    /// The set it belongs to.
    pub set_id: SetId,
    /// The epoch it closed.
    pub epoch: Epoch,
    /// Its method, valid while it is the newest snapshot.
    pub method: Method,
    /// Its size: what the volume had when it was taken, in bytes.
    pub size_bytes: u64,
    /// Whether its set's verdict is known.
    pub state: SnapshotState,
    /// When it was taken, milliseconds since 1970.
    pub created_unix_ms: u64,
    /// All volumes of its set, this one included.
    pub members: Vec<VolumeId>,
}

/// The snapshots that exist, in the order of their epochs.
///
/// Every step of taking one costs the same whether there are ten others or ten thousand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SnapshotTable {
    by_epoch: BTreeMap<Epoch, Arc<SnapshotInfo>>,
    by_id: HashMap<SnapshotId, Epoch>,
    /// A set has at most one snapshot of a volume.
    by_set: HashMap<SetId, Epoch>,
}

impl SnapshotTable {
    /// Oldest first.
    pub(crate) fn all(&self) -> impl Iterator<Item = &SnapshotInfo> {
        self.by_epoch.values().map(|snapshot| &**snapshot)
    }

    /// The same, to be read without the lock that guards the table.
    pub(crate) fn shared(&self) -> Vec<Arc<SnapshotInfo>> {
        self.by_epoch.values().cloned().collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.by_epoch.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_epoch.is_empty()
    }

    pub(crate) fn get(&self, id: SnapshotId) -> Option<&SnapshotInfo> {
        self.at(*self.by_id.get(&id)?)
    }

    /// The snapshot of a set.
    pub(crate) fn of_set(&self, set_id: SetId) -> Option<&SnapshotInfo> {
        self.at(*self.by_set.get(&set_id)?)
    }

    fn at(&self, epoch: Epoch) -> Option<&SnapshotInfo> {
        self.by_epoch.get(&epoch).map(|snapshot| &**snapshot)
    }

    pub(crate) fn newest(&self) -> Option<&SnapshotInfo> {
        self.by_epoch.values().next_back().map(|newest| &**newest)
    }

    /// Adds the newest snapshot; `false` if it breaks I5.
    pub(crate) fn push(&mut self, snapshot: SnapshotInfo) -> bool {
        let in_order = self
            .newest()
            .is_none_or(|newest| newest.epoch < snapshot.epoch);
        let known = self.by_id.contains_key(&snapshot.snapshot_id)
            || self.by_set.contains_key(&snapshot.set_id);
        if !in_order || known {
            return false;
        }
        self.by_id.insert(snapshot.snapshot_id, snapshot.epoch);
        self.by_set.insert(snapshot.set_id, snapshot.epoch);
        self.by_epoch.insert(snapshot.epoch, Arc::new(snapshot));
        true
    }

    pub(crate) fn keep_set(&mut self, set_id: SetId) {
        let epoch = self.by_set.get(&set_id);
        if let Some(snapshot) = epoch.and_then(|epoch| self.by_epoch.get_mut(epoch)) {
            Arc::make_mut(snapshot).state = SnapshotState::Kept;
        }
    }

    pub(crate) fn remove_set(&mut self, set_id: SetId) {
        if let Some(epoch) = self.by_set.get(&set_id).copied() {
            self.remove_epoch(epoch);
        }
    }

    pub(crate) fn remove(&mut self, id: SnapshotId) {
        if let Some(epoch) = self.by_id.get(&id).copied() {
            self.remove_epoch(epoch);
        }
    }

    fn remove_epoch(&mut self, epoch: Epoch) {
        if let Some(gone) = self.by_epoch.remove(&epoch) {
            self.by_id.remove(&gone.snapshot_id);
            self.by_set.remove(&gone.set_id);
        }
    }

    /// Drops every snapshot newer than `epoch`.
    pub(crate) fn truncate(&mut self, epoch: Epoch) {
        while let Some(newest) = self.newest().map(|newest| newest.epoch)
            && newest > epoch
        {
            self.remove_epoch(newest);
        }
    }
}

/// The records that rebuild a table of `snapshots` from an empty one, for a volume of `volume_bytes`.
pub(crate) fn table_records(snapshots: &[Arc<SnapshotInfo>], volume_bytes: u64) -> Vec<Record> {
    let mut records = Vec::new();
    for snapshot in snapshots {
        records.extend(snap_records(snapshot, volume_bytes));
        if snapshot.state == SnapshotState::Kept {
            records.push(Record::Keep {
                set_id: snapshot.set_id,
            });
        }
    }
    records
}

/// The records that take `snapshot` of a volume of `volume_bytes`.
pub(crate) fn snap_records(snapshot: &SnapshotInfo, volume_bytes: u64) -> Vec<Record> {
    let mut records = vec![Record::SnapId {
        snapshot_id: snapshot.snapshot_id,
        set_id: snapshot.set_id,
        created_unix_ms: snapshot.created_unix_ms,
    }];
    for pair in snapshot.members.chunks(2) {
        if let Some(first) = pair.first() {
            records.push(Record::SnapMembers {
                first: *first,
                second: pair.get(1).copied(),
            });
        }
    }
    records.push(Record::Snap {
        epoch: snapshot.epoch,
        method: snapshot.method,
        members: u32::try_from(snapshot.members.len()).unwrap_or(u32::MAX),
        size_bytes: (snapshot.size_bytes != volume_bytes).then_some(snapshot.size_bytes),
    });
    records
}
