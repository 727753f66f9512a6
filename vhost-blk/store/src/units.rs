//! Addresses, counts and ids that cross room boundaries, each a type of its own.
//!
//! Every room uses these. They know nothing of files, formats or locks.
//! Invariant: a block is always [`BLOCK_BYTES`] long, except that the last block of a volume may be
//! shorter when the base is not a whole number of blocks.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Granularity of the index: one block, in bytes.
pub const BLOCK_BYTES: u64 = 4096;

/// Granularity of guest I/O and the unit a power cut cannot tear, in bytes.
pub const SECTOR_BYTES: u64 = 512;

const _: () = assert!(usize::BITS == 64, "offsets are u64 and index memory");

/// A block of the volume, counted from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Block(pub(crate) u64);

impl Block {
    pub(crate) fn offset_bytes(self) -> u64 {
        self.0.saturating_mul(BLOCK_BYTES)
    }

    pub(crate) fn plus(self, blocks: u64) -> Block {
        Block(self.0.saturating_add(blocks))
    }
}

/// A block of the log file, counted from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LogBlock(pub(crate) u64);

impl LogBlock {
    pub(crate) fn offset_bytes(self) -> u64 {
        self.0.saturating_mul(BLOCK_BYTES)
    }

    pub(crate) fn plus(self, blocks: u64) -> LogBlock {
        LogBlock(self.0.saturating_add(blocks))
    }
}

/// Number of an epoch: snapshot k is the state at the end of epoch k. Starts at 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u32);

/// Place of a record in the journal's endless sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Sequence(pub(crate) u64);

impl Sequence {
    pub(crate) fn next(self) -> Sequence {
        Sequence(self.0.wrapping_add(1))
    }
}

/// Generation of a journal, of an index or of a superblock slot: each is counted on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Generation(pub(crate) u64);

impl Generation {
    pub(crate) fn next(self) -> Generation {
        Generation(self.0.wrapping_add(1))
    }

    /// Which of two alternating files or slots this generation lives in.
    pub(crate) fn slot(self) -> usize {
        usize::from(self.0 % 2 == 1)
    }
}

/// Counts the openings of a volume; a record carries the one it was written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Incarnation(pub(crate) u32);

impl Incarnation {
    pub(crate) fn next(self) -> Incarnation {
        Incarnation(self.0.saturating_add(1))
    }
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl From<Uuid> for $name {
            fn from(id: Uuid) -> Self {
                Self(id)
            }
        }

        impl From<$name> for Uuid {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(out)
            }
        }
    };
}

uuid_id! {
    /// A volume, for as long as its shadow storage lives. Made at adoption.
    VolumeId
}
uuid_id! {
    /// One snapshot of one volume.
    SnapshotId
}
uuid_id! {
    /// A snapshot set: the snapshots of several volumes taken at one instant.
    SetId
}

/// The kernel's boot id: differs after every boot of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BootId(pub [u8; 16]);

/// A range of a volume in bytes; both ends are multiples of [`SECTOR_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// First byte.
    pub offset_bytes: u64,
    /// Number of bytes, not zero.
    pub length_bytes: u64,
}

impl ByteRange {
    /// The range of `length_bytes` bytes from `offset_bytes`.
    pub fn new(offset_bytes: u64, length_bytes: u64) -> ByteRange {
        ByteRange {
            offset_bytes,
            length_bytes,
        }
    }

    pub(crate) fn end_bytes(self) -> u64 {
        self.offset_bytes.saturating_add(self.length_bytes)
    }

    pub(crate) fn first_block(self) -> Block {
        Block(self.offset_bytes / BLOCK_BYTES)
    }

    /// Last block the range touches. The range must not be empty.
    pub(crate) fn last_block(self) -> Block {
        Block(self.end_bytes().saturating_sub(1) / BLOCK_BYTES)
    }
}

/// A length or an index into memory. Lossless: only 64-bit machines are supported.
#[allow(
    clippy::cast_possible_truncation,
    reason = "usize is 64 bits, asserted above"
)]
pub(crate) const fn in_memory(value: u64) -> usize {
    value as usize
}
