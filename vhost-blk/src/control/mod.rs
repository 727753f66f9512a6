//! The control socket: QMP framing in, engine commands out, events to every client.
//!
//! Called by the daemon. Knows the engine and the wire's messages; it must not know the frontend, nor how anything is done.
//!
//! * `server`: accepts, checks who is there, stops at a signal.
//! * `connection`: one client: stream of JSON values, descriptors that come with them, answers in order.
//! * `handler`: a command becomes calls of the engine, an error becomes a class.
//! * `export`: `snapshot-read`.
//! * `events`: what happened, to everybody who listens.

mod connection;
mod events;
mod export;
mod handler;
mod server;

pub use events::Events;
pub use handler::HAND_OVER_VERSION;
pub use server::{Ended, StopSignal, serve};
