//! The real `vhost-blk`, started as a process and driven without a VM: as a vhost-user client (libblkio in Rust) and over
//! the control socket. One binary, since each would be linked for seconds.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that is wrong about these fails, as it should"
)]

mod control_socket;
mod data_integrity;
mod deletes;
mod full_storage;
mod growing;
mod harness;
mod hostile_guest;
mod in_flight;
mod kills;
mod leaving_out;
mod lifecycle;
mod messages;
mod ring_positions;
mod snapshot_sets;
