//! The only room that knows vhost-user and virtio: from a socket and guest rings to the engine's requests and back.
//!
//! Called by the daemon, one [`serve`] per volume. It must not know the store: what a request does to the disk is the
//! engine's matter.
//!
//! * `listener`: one front end at a time on a socket that is kept; drains before it takes the next.
//! * `device`: features, the thread of each queue, stopping a ring.
//! * `config_space`: what the guest reads as the disk's properties.
//! * `request`: descriptor chain to request; everything in it is hostile.
//! * `completion`: outcomes to the used ring, in the order of arrival.

#![deny(clippy::indexing_slicing)]

mod completion;
mod config_space;
mod device;
mod listener;
mod request;

pub use config_space::QUEUES_MAX;
pub use listener::{Served, SocketError, bind, serve};
