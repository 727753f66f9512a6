//! The nouns which commands and events share.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// How a snapshot keeps the old content of a block that is written for the first time after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Redirect-on-write: new data goes to the shadow storage, the old stays where it was.
    Row,
    /// Copy-on-write: old data is copied to the shadow storage, the new goes where the old was.
    Cow,
}

/// A range of bytes of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ByteRange {
    /// First byte.
    pub offset_bytes: u64,
    /// Number of bytes.
    pub length_bytes: u64,
}

/// A disk that the daemon serves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VolumeInfo {
    /// Name within this daemon, as in its configuration; unique.
    pub volume: String,
    /// Identity that is kept in the shadow storage.
    pub id: Uuid,
    /// What the guest reads as the disk's serial (at most 20 bytes); unique within the daemon.
    pub serial: String,
    /// Base file or block device.
    pub base: String,
    /// Directory of the shadow storage.
    pub shadow_storage: String,
    /// vhost-user socket, absolute path. QEMU's `query-chardev` shows the same path.
    pub socket: String,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Method of new snapshots that do not ask for one.
    pub method: Method,
    /// The guest may not write.
    pub read_only: bool,
    /// A front end (QEMU) is connected.
    pub connected: bool,
    /// The volume was poisoned by a disk error and refuses everything.
    pub poisoned: bool,
    /// Number of snapshots, provisional ones included.
    pub snapshots: u32,
    /// Shadow storage in use by preserved or redirected blocks, in bytes.
    pub shadow_used_bytes: u64,
    /// Shadow storage allocated from its file system, in bytes.
    pub shadow_allocated_bytes: u64,
    /// Zeroes written to the shadow storage since the daemon's start, ahead of its use, in bytes: what it cost that first writes are cheap.
    #[serde(default)]
    pub shadow_ahead_bytes: u64,
    /// All data is in the base: it could be used without vmshadow.
    pub plain: bool,
}

/// State of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotState {
    /// Committed to disk, its verdict still open; dropped if nobody keeps it.
    Provisional,
    /// Kept.
    Kept,
}

/// A snapshot of one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    /// Identity of this snapshot.
    pub snapshot: Uuid,
    /// The set that it is part of.
    pub set: Uuid,
    /// Volume by name.
    pub volume: String,
    /// Epoch which it closed; orders the snapshots of a volume.
    pub epoch: u32,
    /// Method.
    pub method: Method,
    /// State.
    pub state: SnapshotState,
    /// Host time of the commit, milliseconds since the epoch.
    pub created_unix_ms: u64,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
}

/// Requests which changed a range of a volume since a mark: the host's witness.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct WriteCount {
    /// Write requests that touched a watched byte.
    pub writes: u64,
    /// Write-zeroes requests that touched a watched byte.
    pub write_zeroes: u64,
    /// Discard requests that touched a watched byte.
    pub discards: u64,
    /// Where the first of them was, for people who look for the culprit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first: Option<ByteRange>,
}

impl WriteCount {
    /// Sum of all requests that changed something.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.writes
            .saturating_add(self.write_zeroes)
            .saturating_add(self.discards)
    }
}
