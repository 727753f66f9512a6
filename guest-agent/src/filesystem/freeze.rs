//! FIFREEZE and FITHAW: with `trim` and `not_to_snapshot::blocks`, the only unsafe code of the agent.
//!
//! Called by the hold helper, by the agent when the helper died, and at start. Freeze and thaw allocate nothing.
//! A user-space freeze does not nest and has no owner: EBUSY means that somebody else froze, EINVAL at the thaw that
//! somebody else thawed.
#![allow(
    unsafe_code,
    reason = "no safe wrapper of these ioctls exists in rustix"
)]

use rustix::io::Errno;
use rustix::ioctl::{NoArg, Opcode, ioctl, opcode};
use std::os::fd::AsFd;

const FIFREEZE: Opcode = opcode::read_write::<i32>(b'X', 119);
const FITHAW: Opcode = opcode::read_write::<i32>(b'X', 120);

/// Freezes the file system that `fd` lies on. Returns once it is frozen; that can take any time and cannot be cancelled.
pub fn freeze(fd: impl AsFd) -> Result<(), Errno> {
    // SAFETY: FIFREEZE takes no argument (the kernel ignores it in fs/ioctl.c, ioctl_fsfreeze) and touches no user memory.
    let request = unsafe { NoArg::<FIFREEZE>::new() };
    // SAFETY: the opcode matches the pattern, see above; the descriptor is borrowed for the whole call.
    unsafe { ioctl(fd, request) }
}

/// Thaws the file system that `fd` lies on. EINVAL if it was not frozen.
pub fn thaw(fd: impl AsFd) -> Result<(), Errno> {
    // SAFETY: FITHAW takes no argument (ioctl_fsthaw) and touches no user memory.
    let request = unsafe { NoArg::<FITHAW>::new() };
    // SAFETY: the opcode matches the pattern, see above; the descriptor is borrowed for the whole call.
    unsafe { ioctl(fd, request) }
}
