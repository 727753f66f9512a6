//! `StoreError`: what can go wrong, one variant per decision its caller takes.
//!
//! Every room returns it. The daemon maps it to a virtio status or to a control error class.

use std::io;

use crate::units::{SetId, SnapshotId, VolumeId};

/// Which file of a volume an error or a finding speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FileName {
    /// The adopted file or block device.
    Base,
    /// `superblock`: two slots.
    Superblock,
    /// `log`: data blocks.
    Log,
    /// The journal regions of `log`.
    Journal,
    /// `index`: its runs, and the snapshot table.
    Index,
    /// The shadow storage directory itself.
    Directory,
}

impl std::fmt::Display for FileName {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            FileName::Base => "base",
            FileName::Superblock => "superblock",
            FileName::Log => "log",
            FileName::Journal => "journal",
            FileName::Index => "index",
            FileName::Directory => "shadow storage directory",
        })
    }
}

/// Why the store refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// One request failed at the disk; the volume goes on. The guest gets an I/O error.
    #[error("{op} failed on {file} at byte {offset_bytes}")]
    Io {
        /// What was tried: "read", "write", "sync", ...
        op: &'static str,
        /// On which file.
        file: FileName,
        /// Where, in bytes; 0 when the operation has no place.
        offset_bytes: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// An earlier sync or journal append failed: what is durable is unknown. Reopen the volume.
    #[error("an earlier sync or journal write failed; the volume refuses writes until reopened")]
    Poisoned,
    /// Bytes on disk contradict the format. Run `store-check`; do not write.
    #[error("{file} is corrupted at byte {offset_bytes}: {what}")]
    Corrupted {
        /// In which file.
        file: FileName,
        /// Where, in bytes.
        offset_bytes: u64,
        /// What was found.
        what: &'static str,
    },
    /// The base was changed by somebody else although snapshots or redirected blocks depend on it.
    #[error("the base was changed while its snapshots needed it unchanged: {what}")]
    BaseChanged {
        /// What differs.
        what: &'static str,
    },
    /// The volume, or its base, is open in another process, and was for as long as the options allow to wait.
    #[error("the shadow storage is in use by another process")]
    InUse,
    /// A write that moves one of these blocks is in flight: try again when it has completed.
    #[error("a write that moves one of these blocks is in flight")]
    Overlaps,
    /// Writes are in flight, or held for a snapshot: drain them, or try again when it is over.
    #[error("the volume is held, or writes are in flight")]
    Busy,
    /// No room in the shadow storage: hold the write and try again after [`crate::Volume::maintain`].
    #[error("no room in the shadow storage")]
    NoSpace,
    /// The request does not fit the volume, or is not aligned to 512 bytes.
    #[error("request of {length_bytes} bytes at byte {offset_bytes} is misaligned or out of range")]
    OutOfRange {
        /// First byte asked for.
        offset_bytes: u64,
        /// Bytes asked for.
        length_bytes: u64,
    },
    /// The volume was opened read-only.
    #[error("the volume is open read-only")]
    ReadOnly,
    /// No such snapshot on this volume.
    #[error("no snapshot {0}")]
    NoSuchSnapshot(SnapshotId),
    /// No snapshot of such a set on this volume.
    #[error("no snapshot of set {0}")]
    NoSuchSet(SetId),
    /// The set is kept: its snapshots go by being deleted, one by one, and by nothing else.
    #[error("set {0} is kept")]
    SetKept(SetId),
    /// A snapshot of this id exists already.
    #[error("snapshot {0} exists already")]
    SnapshotExists(SnapshotId),
    /// The volume cannot get this size. Nothing was changed.
    #[error("the volume cannot have {wanted_bytes} bytes: {why}")]
    BadSize {
        /// The size asked for.
        wanted_bytes: u64,
        /// What forbids it.
        why: &'static str,
    },
    /// A limit of the format or of the options would be passed.
    #[error("limit reached: {0}")]
    Limit(&'static str),
    /// The base cannot be adopted: empty, or not a multiple of 512 bytes.
    #[error("a base of {0} bytes cannot be adopted: it must be a non-zero multiple of 512")]
    BadBaseSize(u64),
    /// The superblock belongs to another volume than the caller asked for.
    #[error("the shadow storage belongs to volume {0}")]
    WrongVolume(VolumeId),
    /// The format is newer than this program, or uses a feature it does not know.
    #[error(
        "format version {version}, features {features:#x}: this program knows version {} only; nothing was changed",
        crate::layout::VERSION
    )]
    Unsupported {
        /// Version found.
        version: u32,
        /// Incompatible feature bits found.
        features: u32,
    },
    /// The volume was closed.
    #[error("the volume is closed")]
    Closed,
    /// A plan was completed without [`crate::Volume::prepare_writes`]: a defect of the caller.
    #[error("a write plan that needed preparing was completed without it")]
    NotPrepared,
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, StoreError>;
