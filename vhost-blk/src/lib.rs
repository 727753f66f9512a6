//! `vhost-blk`: serves disks over vhost-user-blk and takes snapshots of them at one instant.
//!
//! The binary (`main.rs`) only parses arguments and maps the outcome to an exit code; everything else is here, so that
//! tests reach it.
//!
//! Rooms, from the guest to the disk; each may name only rooms below it (see `ARCHITECTURE.md`):
//! * [`daemon`]: puts the rooms together, stops them in order.
//! * [`handover`]: one daemon gives everything to the next.
//! * [`config`]: flags and file to a checked configuration.
//! * [`control`]: the QMP-framed control socket. Enters from the side.
//! * [`frontend`]: vhost-user and virtio.
//! * [`engine`]: what a request means now; snapshot sets.
//! * `vhost_blk_store` (its own crate): where every block lives, durably.

pub mod config;
pub mod control;
pub mod daemon;
pub mod engine;
pub mod frontend;
pub mod handover;
