//! What the daemon tells unasked, to every connection that has negotiated.

use crate::types::SnapshotInfo;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Why snapshots were deleted that nobody asked to delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeletionReason {
    /// The shadow storage was full; these were the oldest by copy-on-write.
    NoRoom,
    /// The volume went back to a snapshot that is older.
    Reverted,
}

/// An event; its name on the wire is the variant in upper case with underscores.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    tag = "event",
    content = "data",
    rename_all = "SCREAMING_SNAKE_CASE",
    rename_all_fields = "kebab-case"
)]
pub enum Event {
    /// A front end has connected to the volume.
    VolumeConnected {
        /// Volume by name.
        volume: String,
    },
    /// The front end has gone; its socket takes another one.
    VolumeDisconnected {
        /// Volume by name.
        volume: String,
    },
    /// A front end was turned away: the volume has one already.
    FrontEndRefused {
        /// Volume by name.
        volume: String,
    },
    /// A queue is not served any more: its ring makes no sense, or its thread has died. It is served again when the front end
    /// starts it again.
    QueueFailed {
        /// Volume by name.
        volume: String,
        /// Queue by number.
        queue: u16,
        /// Why.
        reason: String,
    },
    /// Requests that a killed daemon had left in flight are not done again in time, so new ones are not kept waiting for them any
    /// more: a queue did not come back, or is held up. A repetition may now come after a newer request to the same sectors.
    RequestsOvertaken {
        /// Volume by name.
        volume: String,
        /// How many are left.
        requests: u32,
    },
    /// A volume has another size.
    VolumeResized {
        /// Volume by name.
        volume: String,
        /// Its size now, in bytes.
        size_bytes: u64,
    },
    /// A disk failed: the volume refuses everything until the daemon is restarted.
    VolumePoisoned {
        /// Volume by name.
        volume: String,
        /// What failed.
        reason: String,
    },
    /// Shadow storage, or the file system of a thin disk, is full: guest writes that need room are held until there is some.
    ShadowStorageFull {
        /// Volume by name.
        volume: String,
    },
    /// Every snapshot of a set is on disk, provisional.
    SnapshotSetCommitted {
        /// The set.
        set: Uuid,
        /// Its snapshots.
        snapshots: Vec<SnapshotInfo>,
    },
    /// A set was kept for good.
    SnapshotSetKept {
        /// The set.
        set: Uuid,
    },
    /// A set was undone.
    SnapshotSetAborted {
        /// The set.
        set: Uuid,
        /// Why.
        reason: String,
    },
    /// Snapshots were deleted.
    SnapshotsDeleted {
        /// Which.
        snapshots: Vec<Uuid>,
        /// Why, if nobody asked for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<DeletionReason>,
    },
    /// A long-running job has made progress or ended.
    JobProgress {
        /// Job by number.
        job: u64,
        /// Bytes done.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
}
