//! FIEMAP: where a file's blocks lie on the device of its file system.
//!
//! Called by `not_to_snapshot`. Invariant: an extent whose address does not name blocks of this file alone is refused with the file.
#![allow(
    unsafe_code,
    reason = "no safe wrapper of these ioctls exists in rustix"
)]

use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, Updater, ioctl, opcode};
use std::os::fd::AsFd;

/// Extents by one call.
const AT_ONCE: u32 = 256;
/// Most extents of a file.
const EXTENTS_MAX: usize = super::PIECES_MAX;
/// The last one of the file (FIEMAP_EXTENT_LAST).
const LAST: u32 = 1;
/// FIEMAP_EXTENT_DELALLOC: room that is promised and not chosen, as XFS does behind a file's end. Nothing is on the disk.
const PROMISED: u32 = 0x4;
/// FIEMAP_EXTENT_ENCODED, DATA_ENCRYPTED, UNKNOWN: no place, or not a plain one.
const NO_PLACE: u32 = 0x2 | 0x8 | 0x80;
/// FIEMAP_EXTENT_NOT_ALIGNED, DATA_INLINE, DATA_TAIL: in a block with something else.
const IN_COMPANY: u32 = 0x100 | 0x200 | 0x400;
/// FIEMAP_EXTENT_SHARED: another file has them, too.
const SHARED: u32 = 0x2000;

/// The kernel's `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved_64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// The kernel's `struct fiemap`, with room for its answers.
#[repr(C)]
struct Map {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [Extent; AT_ONCE as usize],
}

/// The number is made with the size of the head alone.
const FIEMAP: Opcode = opcode::read_write::<[u64; 4]>(b'f', 11);

/// A piece of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where in the file.
    pub(super) logical_bytes: u64,
    /// Where on the device.
    pub(super) start_bytes: u64,
    pub(super) length_bytes: u64,
}

/// All that the file has on the disk. Nothing is written back for it.
pub(super) fn of(file: impl AsFd) -> Result<Vec<Piece>, String> {
    if is_realtime(&file) {
        return Err("lies on the realtime device".to_owned());
    }
    let mut found = Vec::new();
    let mut start = 0;
    loop {
        let mut map = Map {
            start,
            length: u64::MAX - start,
            flags: 0,
            mapped_extents: 0,
            extent_count: AT_ONCE,
            reserved: 0,
            extents: [Extent::default(); AT_ONCE as usize],
        };
        // SAFETY: FIEMAP reads the head of `struct fiemap` (linux/fiemap.h), which `Map` repeats field by field, and writes the
        // head and at most `extent_count` extents behind it, for which `extents` has room.
        let request = unsafe { Updater::<FIEMAP, Map>::new(&mut map) };
        // SAFETY: the opcode matches the pattern, see above; descriptor and map are borrowed for the whole call.
        unsafe { ioctl(&file, request) }.map_err(|errno| format!("FIEMAP: {errno}"))?;
        let mapped = usize::try_from(map.mapped_extents).unwrap_or(usize::MAX);
        let Some(extents) = map.extents.get(..mapped) else {
            return Err("FIEMAP answered more than asked".to_owned());
        };
        let mut last = extents.is_empty();
        for extent in extents {
            start = extent.logical.saturating_add(extent.length);
            last |= extent.flags & LAST != 0;
            if extent.flags & PROMISED != 0 {
                continue;
            }
            if extent.flags & NO_PLACE != 0 {
                return Err("has blocks without a plain place".to_owned());
            }
            if extent.flags & IN_COMPANY != 0 {
                return Err("shares a block with other data".to_owned());
            }
            if extent.flags & SHARED != 0 {
                return Err("shares blocks with another file".to_owned());
            }
            found.push(Piece {
                logical_bytes: extent.logical,
                start_bytes: extent.physical,
                length_bytes: extent.length,
            });
            if found.len() > EXTENTS_MAX {
                return Err(format!("has more than {EXTENTS_MAX} pieces"));
            }
        }
        if last || start == u64::MAX {
            return Ok(found);
        }
    }
}

/// FS_IOC_FSGETXATTR: `struct fsxattr`, whose first word are the flags.
const FSGETXATTR: Opcode = opcode::read::<[u32; 7]>(b'X', 31);
/// FS_XFLAG_REALTIME.
const REALTIME: u32 = 1;

/// Whether the file's addresses may be those of another device (XFS). A file system that does not know the question has no such device.
fn is_realtime(file: impl AsFd) -> bool {
    // SAFETY: FSGETXATTR writes one `struct fsxattr` (linux/fs.h), 28 bytes.
    let request = unsafe { Getter::<FSGETXATTR, [u32; 7]>::new() };
    // SAFETY: the opcode matches the pattern, see above; the descriptor is borrowed for the whole call.
    match unsafe { ioctl(file, request) } {
        Ok([flags, ..]) => flags & REALTIME != 0,
        Err(errno) => !matches!(errno, Errno::NOTTY | Errno::OPNOTSUPP),
    }
}
