//! The disk seam: one trait, `BlockFile`, and its file.
//!
//! Every room that touches bytes uses the trait; the simulated files of `sim` implement it too. It
//! knows nothing of the format.

mod aligned_buffer;
mod file;

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;

pub use aligned_buffer::AlignedBuffer;
pub use file::{Access, DiskFile};

use crate::superblock::ModifiedTime;

/// A file or block device, addressed in bytes, shared by threads.
///
/// All operations are whole: they do all of it or answer an error. Nothing is durable before
/// `sync_data` returned, and everything completed before it began is durable when it did.
pub trait BlockFile: Send + Sync + Debug {
    /// Length in bytes.
    fn len_bytes(&self) -> io::Result<u64>;

    /// Fills `buffer` from `offset_bytes`. What lies behind the end reads as zeroes.
    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()>;

    /// Writes `bytes` at `offset_bytes`, growing a file where needed.
    fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()>;

    /// Makes a range read as zeroes; gives the space back if `may_unmap`.
    fn write_zeroes(&self, offset_bytes: u64, length_bytes: u64, may_unmap: bool)
    -> io::Result<()>;

    /// Sets space aside for a range, growing a file where needed; contents stay.
    fn allocate(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()>;

    /// Gives the space of a range back. What it reads as afterwards is of no interest.
    fn release(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()>;

    /// Makes a file exactly so long; what is new reads as zeroes. A device stays as it is: an error if it is shorter.
    fn set_len(&self, _length_bytes: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Whether its length is not ours to change: a block device.
    fn is_device(&self) -> bool {
        false
    }

    /// Makes everything completed before this call durable (fdatasync).
    fn sync_data(&self) -> io::Result<()>;

    /// Makes the modification time durable as well (fsync).
    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()
    }

    /// Descriptor for an engine that issues I/O by itself.
    fn raw_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Alignment that I/O through [`BlockFile::raw_fd`] needs for offsets, lengths and memory, in bytes.
    fn alignment_bytes(&self) -> u64 {
        1
    }

    /// Modification time, where the file can tell.
    fn modified(&self) -> io::Result<Option<ModifiedTime>> {
        Ok(None)
    }
}
