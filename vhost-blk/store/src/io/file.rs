//! `DiskFile`: a regular file or a block device behind `BlockFile`.
//!
//! `open` makes them. O_DIRECT where asked for and where the filesystem takes 512-byte alignment,
//! buffered otherwise. Invariant: with O_DIRECT every request handed to the kernel is aligned to the
//! device's own figures; others go through an aligned buffer.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags, StatxFlags};

use super::{AlignedBuffer, BlockFile};
use crate::superblock::ModifiedTime;
use crate::units::{SECTOR_BYTES, in_memory};

const BOUNCE_BYTES: usize = 1 << 20;
const ZEROES_BYTES: usize = 1 << 16;

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Ask for O_DIRECT; falls back to buffered I/O where it cannot be had.
    pub direct: bool,
    /// No writes.
    pub read_only: bool,
    /// Create the file if it is missing.
    pub create: bool,
}

/// An open file or block device.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    /// Offset alignment, when open with O_DIRECT.
    direct_alignment_bytes: Option<u64>,
    /// Block devices cannot grow and keep no modification time of their contents.
    is_device: bool,
}

impl DiskFile {
    /// Opens `path`.
    pub fn open(path: &Path, access: Access) -> io::Result<DiskFile> {
        let mut flags = OFlags::CLOEXEC;
        flags |= if access.read_only {
            OFlags::RDONLY
        } else {
            OFlags::RDWR
        };
        if access.create && !access.read_only {
            flags |= OFlags::CREATE;
        }
        let mode = Mode::RUSR | Mode::WUSR;
        if access.direct
            && let Ok(fd) = rustix::fs::open(path, flags | OFlags::DIRECT, mode)
            && let Some(alignment_bytes) = direct_alignment_bytes(&fd)
        {
            return DiskFile::new(File::from(fd), Some(alignment_bytes));
        }
        DiskFile::new(File::from(rustix::fs::open(path, flags, mode)?), None)
    }

    fn new(file: File, direct_alignment_bytes: Option<u64>) -> io::Result<DiskFile> {
        let stat = rustix::fs::fstat(&file)?;
        let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
        let is_device = kind == rustix::fs::FileType::BlockDevice;
        if !is_device && kind != rustix::fs::FileType::RegularFile {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a regular file nor a block device",
            ));
        }
        Ok(DiskFile {
            file,
            direct_alignment_bytes,
            is_device,
        })
    }

    /// Takes the advisory lock that keeps a second process out; `false` when it is taken.
    pub fn try_lock(&self) -> io::Result<bool> {
        match rustix::fs::flock(
            &self.file,
            rustix::fs::FlockOperation::NonBlockingLockExclusive,
        ) {
            Ok(()) => Ok(true),
            Err(error) if error == rustix::io::Errno::WOULDBLOCK => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Asks for a page cache in single pages: no readahead through this handle, and so no large folios, each of which
    /// would be written back whole for one record in it. Advice: where it is not taken, nothing breaks.
    pub fn advise_random(&self) {
        rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::Random).ok();
    }

    /// Whether I/O goes past the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct_alignment_bytes.is_some()
    }

    /// Whether the kernel takes this request as it is.
    fn is_aligned(&self, memory: *const u8, length: usize, offset_bytes: u64) -> bool {
        let Some(alignment_bytes) = self.direct_alignment_bytes else {
            return true;
        };
        let alignment = in_memory(alignment_bytes);
        (memory as usize).is_multiple_of(alignment)
            && length.is_multiple_of(alignment)
            && offset_bytes.is_multiple_of(alignment_bytes)
    }

    fn read_whole(&self, mut buffer: &mut [u8], mut offset_bytes: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.file.read_at(buffer, offset_bytes) {
                Ok(0) => {
                    buffer.fill(0);
                    return Ok(());
                }
                Ok(count) => {
                    let unaligned_end = self
                        .direct_alignment_bytes
                        .is_some_and(|a| !(count as u64).is_multiple_of(a));
                    buffer = buffer.split_at_mut(count).1;
                    offset_bytes += count as u64;
                    if unaligned_end {
                        // A direct read ends unaligned only at the end of the file.
                        buffer.fill(0);
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn fill_zeroes(&self, mut offset_bytes: u64, mut length_bytes: u64) -> io::Result<()> {
        let zeroes = AlignedBuffer::new(ZEROES_BYTES);
        while length_bytes > 0 {
            let part = length_bytes.min(ZEROES_BYTES as u64);
            self.write_at(&zeroes[..in_memory(part)], offset_bytes)?;
            offset_bytes += part;
            length_bytes -= part;
        }
        Ok(())
    }
}

/// Offset alignment of O_DIRECT on this file, if 512-byte requests of the guest fit it.
fn direct_alignment_bytes(fd: &impl AsFd) -> Option<u64> {
    let found = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    if found.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        // Before Linux 6.1 nobody tells; 512 is what local filesystems and devices take. A device
        // that does not will refuse the probe below.
        let mut probe = AlignedBuffer::new(in_memory(SECTOR_BYTES));
        return rustix::io::pread(fd, &mut *probe, SECTOR_BYTES)
            .is_ok()
            .then_some(SECTOR_BYTES);
    }
    let alignment_bytes = u64::from(found.stx_dio_offset_align.max(found.stx_dio_mem_align));
    let offset_fits =
        found.stx_dio_offset_align != 0 && u64::from(found.stx_dio_offset_align) <= SECTOR_BYTES;
    (offset_fits && alignment_bytes <= SECTOR_BYTES).then_some(SECTOR_BYTES)
}

impl BlockFile for DiskFile {
    fn len_bytes(&self) -> io::Result<u64> {
        if self.is_device {
            return Ok(rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0))?);
        }
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        if self.is_aligned(buffer.as_ptr(), buffer.len(), offset_bytes) {
            return self.read_whole(buffer, offset_bytes);
        }
        let alignment = self.alignment_bytes();
        let mut bounce =
            AlignedBuffer::new(BOUNCE_BYTES.min(buffer.len() + 2 * in_memory(alignment)));
        let mut done = 0;
        while done < buffer.len() {
            let at = offset_bytes + done as u64;
            let start = at - at % alignment;
            let skip = in_memory(at - start);
            let part = (buffer.len() - done).min(bounce.len() - skip - in_memory(alignment));
            let window = (skip + part).next_multiple_of(in_memory(alignment));
            self.read_whole(&mut bounce[..window], start)?;
            buffer[done..done + part].copy_from_slice(&bounce[skip..skip + part]);
            done += part;
        }
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()> {
        if self.is_aligned(bytes.as_ptr(), bytes.len(), offset_bytes) {
            return self.file.write_all_at(bytes, offset_bytes);
        }
        let alignment = self.alignment_bytes();
        if !offset_bytes.is_multiple_of(alignment)
            || !(bytes.len() as u64).is_multiple_of(alignment)
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "misaligned direct write",
            ));
        }
        let mut bounce = AlignedBuffer::new(BOUNCE_BYTES.min(bytes.len()));
        for (number, part) in bytes.chunks(BOUNCE_BYTES).enumerate() {
            bounce[..part.len()].copy_from_slice(part);
            let at = offset_bytes + (number * BOUNCE_BYTES) as u64;
            self.file.write_all_at(&bounce[..part.len()], at)?;
        }
        Ok(())
    }

    fn write_zeroes(
        &self,
        offset_bytes: u64,
        length_bytes: u64,
        may_unmap: bool,
    ) -> io::Result<()> {
        let flags = if may_unmap {
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
        } else {
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
        };
        match rustix::fs::fallocate(&self.file, flags, offset_bytes, length_bytes) {
            Ok(()) => Ok(()),
            Err(error) if is_unsupported(error) => self.fill_zeroes(offset_bytes, length_bytes),
            Err(error) => Err(error.into()),
        }
    }

    fn allocate(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        match rustix::fs::fallocate(
            &self.file,
            FallocateFlags::empty(),
            offset_bytes,
            length_bytes,
        ) {
            Ok(()) => Ok(()),
            // No preallocation here: the length alone is set, space comes with the writes.
            Err(error) if is_unsupported(error) => {
                let end = offset_bytes + length_bytes;
                if self.len_bytes()? < end {
                    rustix::fs::ftruncate(&self.file, end)?;
                }
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn release(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, flags, offset_bytes, length_bytes) {
            Ok(()) => Ok(()),
            Err(error) if is_unsupported(error) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn set_len(&self, length_bytes: u64) -> io::Result<()> {
        if !self.is_device {
            return Ok(rustix::fs::ftruncate(&self.file, length_bytes)?);
        }
        if self.len_bytes()? < length_bytes {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the block device is shorter: enlarge it first",
            ));
        }
        Ok(())
    }

    fn is_device(&self) -> bool {
        self.is_device
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.file)?)
    }

    fn sync_all(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.file)?)
    }

    fn raw_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn alignment_bytes(&self) -> u64 {
        self.direct_alignment_bytes.unwrap_or(1)
    }

    fn modified(&self) -> io::Result<Option<ModifiedTime>> {
        if self.is_device {
            return Ok(None);
        }
        let found = rustix::fs::statx(&self.file, "", AtFlags::EMPTY_PATH, StatxFlags::MTIME)?;
        Ok(Some(ModifiedTime {
            seconds: found.stx_mtime.tv_sec,
            nanoseconds: found.stx_mtime.tv_nsec,
        }))
    }
}

fn is_unsupported(error: rustix::io::Errno) -> bool {
    error == rustix::io::Errno::OPNOTSUPP || error == rustix::io::Errno::NOSYS
}

#[cfg(test)]
mod tests;
