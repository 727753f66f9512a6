//! The only room that knows vhost-user and virtio: from a socket and guest rings to the engine's requests and back.
//!
//! Called by the daemon, one [`serve`] per volume. It must not know the store: what a request does to the disk is the
//! engine's matter.
//!
//! * `listener`: one front end at a time on a socket that is kept; drains before it takes the next.
//! * `handler`: what a front end says on its connection.
//! * `back_channel`: where the device speaks first.
//! * `handover`: a session that moves to another daemon.
//! * `queue`: the handle of a queue's thread; `serving`: the thread itself.
//! * `polling`: how long a queue's thread goes on looking before it sleeps.
//! * `ring`, `chain`: a split virtqueue in guest memory, descriptor chains.
//! * `inflight`: what the front end keeps for us while we may die; `gate`: nothing new before that is done again.
//! * `dirty_log`: which pages the device has written, for live migration.
//! * `request`: descriptor chain to request; everything in it is hostile.
//! * `completion`: what the guest has not been told of, and in which order it is.
//! * `config_space`: what the guest reads as the disk's properties.

#![deny(clippy::indexing_slicing)]

mod back_channel;
mod chain;
mod completion;
mod config_space;
mod dirty_log;
mod gate;
mod handler;
mod handover;
mod inflight;
mod listener;
mod polling;
mod queue;
mod request;
mod ring;
mod serving;

pub use config_space::QUEUES_MAX;
pub use handover::{BadSession, Session, SessionState};
pub use listener::{Ending, Resumed, Served, Serving, SocketError, bind, serve};
