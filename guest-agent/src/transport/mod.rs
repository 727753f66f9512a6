//! Ways to the host: a virtio-serial port, vsock, or a listening Unix socket in their place (tests, containers).
//!
//! `native` and `qga` give [`serve`] what to do with a conversation. Nothing here knows what is said. Invariants: the end of
//! the host's side never ends the agent; a message for a conversation that is over reaches nobody; a host that does not read
//! never blocks a thread that others wait for.

mod endpoint;
mod outbox;
mod vsock;

pub use endpoint::{Connection, Endpoint, serve};
pub use outbox::Outbox;
