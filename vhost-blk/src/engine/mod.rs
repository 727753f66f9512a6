//! Decides what a request means now, and moves its data: the rooms between the device and the store.
//!
//! Called by `frontend` (requests) and by `control` (snapshot sets, marks). Knows the store and guest memory, but not
//! virtio, vhost-user or the control socket. Nouns that cross to the control socket come from `vhost_blk_wire::types`.

mod barrier;
mod blocking;
mod buffers;
mod crew;
mod kick;
#[allow(
    dead_code,
    reason = "sealed writes and copies, which use it, come next"
)]
mod pool;
mod request;
mod ring;
mod slab;
mod snapshot_set;
mod snapshot_state;
mod upkeep;
mod volume;
mod witness;
mod worker;

pub use barrier::{Barrier, HoldId, Ticket};
pub use buffers::{GuestBuffers, GuestRange, NotMapped};
pub use kick::Kick;
pub use request::{Op, Outcome, REQUEST_BYTES_MAX, Request, Token};
pub use ring::{Ring, RingUnavailable};
pub use snapshot_set::{Committed, OwnerId, Resized, SetError, SnapshotSets};
pub use snapshot_state::{Effect, Event, Reason, Refusal, State, step};
pub use upkeep::Upkeep;
pub use volume::{Attached, EngineKind, Notice, SizeWatcher, VolumeEngine, VolumeSettings};
pub use witness::{Arrival, MarkId, Watched, Witness};
pub use worker::Worker;

#[cfg(test)]
pub(crate) mod testing;
