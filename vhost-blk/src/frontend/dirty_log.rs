//! Which pages of guest memory the device has written, for live migration (vhost-user specification, "Migration").
//!
//! Mapped by `handler`, marked by `serving`. A bit for each guest page of 4 KiB, in memory of the front end, which clears bits as it
//! copies pages. It goes by guest-physical addresses only, so a change of the memory table does not touch it.
//!
//! Invariant: a page is marked after it was written and before the next message is answered. Who clears a bit and then
//! copies the page has what was written; who copied before finds the bit set.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use vhost::vhost_user::message::VhostUserLog;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// Bytes that a bit stands for (`VHOST_LOG_PAGE`).
const PAGE_BYTES: u64 = 4096;
/// Longest log: 256 TiB of guest memory.
const LOG_BYTES_MAX: u64 = 8 << 30;

/// A log of written pages.
#[derive(Debug)]
pub(super) struct DirtyLog {
    map: MmapRegion<()>,
}

impl DirtyLog {
    /// Maps the front end's log.
    pub(super) fn map(description: &VhostUserLog, file: File) -> io::Result<Arc<Self>> {
        let (offset_bytes, length_bytes) = (description.mmap_offset, description.mmap_size);
        let end_bytes = offset_bytes.checked_add(length_bytes);
        // Memory that the file does not have would kill this process when it is touched.
        let file_bytes = file.metadata()?.len();
        if length_bytes > LOG_BYTES_MAX || end_bytes.is_none_or(|end_bytes| end_bytes > file_bytes)
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let length = usize::try_from(length_bytes).map_err(io::Error::other)?;
        let map = MmapRegion::from_file(FileOffset::new(file, offset_bytes), length)
            .map_err(io::Error::other)?;
        Ok(Arc::new(Self { map }))
    }

    /// The device has written these bytes of guest memory. What the log is too short for is not guest memory.
    pub(super) fn mark(&self, address: u64, length_bytes: u64) {
        let Some(last) = length_bytes
            .checked_sub(1)
            .and_then(|more| address.checked_add(more))
        else {
            return;
        };
        for page in address / PAGE_BYTES..=last / PAGE_BYTES {
            let bit = 1_u8 << (page % 8);
            let byte = usize::try_from(page / 8)
                .ok()
                .and_then(|place| self.map.get_atomic_ref::<AtomicU8>(place).ok());
            let Some(byte) = byte else {
                return;
            };
            byte.fetch_or(bit, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests;
