//! The vocabulary which the device and the engine share: what a guest asks for, and what it is told.
//!
//! Written by `frontend`, read by the workers. Knows nothing of descriptors, and nothing of where data lies.

use super::buffers::GuestBuffers;
use vhost_blk_wire::types::ByteRange;

/// Longest read or write, in bytes: what the store plans at once.
pub const REQUEST_BYTES_MAX: u64 = vhost_blk_store::MAX_REQUEST_BYTES;

/// Names a request of one queue from its arrival to its completion. Given by the device; rises with each arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Disk to guest memory.
    Read,
    /// Guest memory to disk.
    Write,
    /// Makes all completed writes durable.
    Flush,
    /// The guest does not need the range any more.
    Discard,
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// Space may be given back.
        may_unmap: bool,
    },
}

impl Op {
    /// True if the request can change the disk.
    #[must_use]
    pub fn changes_disk(self) -> bool {
        match self {
            Self::Read | Self::Flush => false,
            Self::Write | Self::Discard | Self::WriteZeroes { .. } => true,
        }
    }
}

/// A request whose addresses, lengths and range have been checked.
#[derive(Clone, Debug)]
pub struct Request {
    /// What to do.
    pub op: Op,
    /// Where; whole sectors inside the disk. Empty for a flush.
    pub range: ByteRange,
    /// Guest memory of reads and writes, exactly as long as the range; empty otherwise.
    pub buffers: GuestBuffers,
}

/// What the guest is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Done,
    /// Failed (`VIRTIO_BLK_S_IOERR`).
    Failed,
    /// Not a request of this device (`VIRTIO_BLK_S_UNSUPP`).
    Unsupported,
}
