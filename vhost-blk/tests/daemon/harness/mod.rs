//! Starts the real `vhost-blk` and drives it: as a vhost-user client without a VM, and over the control socket.
//!
//! Used by every test of this directory.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary uses a part of the harness"
)]

mod control;
mod daemon;
mod disk;
mod raw_front_end;
mod workload;

pub(crate) use control::Control;
pub(crate) use daemon::{Daemon, PATIENCE, Scratch, Served, serve, serve_disk, wait_until};
pub(crate) use disk::{Disk, Queue};
pub(crate) use raw_front_end::{Descriptor, InFlightMemory, RawFrontEnd, SharedRam};
pub(crate) use workload::{SLOT_BYTES, Workload, assert_shows_one_instant};
