//! The snapshots of a volume, in order of their epochs.
//!
//! `state` changes it as records say; `first_write` and `index::merge` ask it what must be kept.
//! It knows no blocks. Invariant I5: epochs are strictly increasing and below the volume's epoch.
#![deny(clippy::indexing_slicing)]

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
    /// Whether its set's verdict is known.
    pub state: SnapshotState,
    /// When it was taken, milliseconds since 1970.
    pub created_unix_ms: u64,
    /// All volumes of its set, this one included.
    pub members: Vec<VolumeId>,
}

/// The snapshots that exist, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SnapshotTable {
    snapshots: Vec<SnapshotInfo>,
}

impl SnapshotTable {
    pub(crate) fn all(&self) -> &[SnapshotInfo] {
        &self.snapshots
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.snapshots.is_empty()
    }

    pub(crate) fn get(&self, id: SnapshotId) -> Option<&SnapshotInfo> {
        self.snapshots
            .iter()
            .find(|snapshot| snapshot.snapshot_id == id)
    }

    pub(crate) fn newest(&self) -> Option<&SnapshotInfo> {
        self.snapshots.last()
    }

    /// Epochs of all snapshots, ascending.
    pub(crate) fn epochs(&self) -> Vec<u32> {
        self.snapshots
            .iter()
            .map(|snapshot| snapshot.epoch.0)
            .collect()
    }

    /// Adds the newest snapshot; `false` if it breaks I5.
    pub(crate) fn push(&mut self, snapshot: SnapshotInfo) -> bool {
        let in_order = self
            .newest()
            .is_none_or(|newest| newest.epoch < snapshot.epoch);
        if in_order && self.get(snapshot.snapshot_id).is_none() {
            self.snapshots.push(snapshot);
            return true;
        }
        false
    }

    pub(crate) fn keep_set(&mut self, set_id: SetId) {
        for snapshot in self.snapshots.iter_mut().filter(|s| s.set_id == set_id) {
            snapshot.state = SnapshotState::Kept;
        }
    }

    pub(crate) fn remove_set(&mut self, set_id: SetId) {
        self.snapshots.retain(|snapshot| snapshot.set_id != set_id);
    }

    pub(crate) fn remove(&mut self, id: SnapshotId) {
        self.snapshots.retain(|snapshot| snapshot.snapshot_id != id);
    }

    /// Drops every snapshot newer than `epoch`.
    pub(crate) fn truncate(&mut self, epoch: Epoch) {
        self.snapshots.retain(|snapshot| snapshot.epoch <= epoch);
    }

    /// The records that rebuild this table from an empty one.
    pub(crate) fn to_records(&self) -> Vec<Record> {
        let mut records = Vec::new();
        for snapshot in &self.snapshots {
            records.extend(snap_records(snapshot));
            if snapshot.state == SnapshotState::Kept {
                records.push(Record::Keep {
                    set_id: snapshot.set_id,
                });
            }
        }
        records
    }
}

/// The records that take `snapshot`.
pub(crate) fn snap_records(snapshot: &SnapshotInfo) -> Vec<Record> {
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
    });
    records
}
