//! FITRIM: tells a disk which blocks a file system does not use.
//!
//! Called by `qga` for `guest-fstrim`, never while anything is frozen.
#![allow(unsafe_code, reason = "no safe wrapper of this ioctl exists in rustix")]

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use std::os::fd::AsFd;

/// The kernel's `struct fstrim_range`.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
    minlen: u64,
}

const FITRIM: Opcode = opcode::read_write::<Range>(b'X', 121);

/// Trims the whole file system that `fd` lies on, in free ranges of at least `minimum_bytes`. Answers the bytes that were
/// trimmed and the minimum that the file system used. It can take minutes.
pub fn trim(fd: impl AsFd, minimum_bytes: u64) -> Result<(u64, u64), Errno> {
    let mut range = Range {
        start: 0,
        len: u64::MAX,
        minlen: minimum_bytes,
    };
    // SAFETY: FITRIM reads and writes one struct fstrim_range (linux/fs.h), which `Range` repeats field by field.
    let request = unsafe { Updater::<FITRIM, Range>::new(&mut range) };
    // SAFETY: the opcode matches the pattern, see above; descriptor and range are borrowed for the whole call.
    unsafe { ioctl(fd, request) }?;
    Ok((range.len, range.minlen))
}
