//! Messages between the host's `qmp-bridge`, the guest agent and the writers in the guest.
//!
//! * [`host`]: the native protocol on the virtio-serial port [`host::PORT_NAME`]: JSON lines, requests by the bridge.
//! * [`writer`]: the writer protocol on the Unix socket [`writer::SOCKET_PATH`] in the guest: JSON lines, requests by the
//!   agent, one to one with VSS's writer events.
//! * [`metadata`]: a writer's metadata document.
//! * [`components`]: the requester's backup components document.
//! * [`types`]: VSS's levels, states and failure codes, and the nouns that both protocols share.
//! * [`lines`]: cuts a stream into messages.
//! * [`sdk`]: the writer library, for applications in Rust.
//!
//! PROTOCOL.md tells the sequences and deadlines. This room knows nothing of ports, file systems or the agent's inside; only
//! `sdk` knows a socket.

pub mod components;
pub mod host;
pub mod lines;
pub mod metadata;
pub mod sdk;
pub mod types;
pub mod writer;

/// Longest message of either protocol in bytes, its newline included. A longer one ends the connection.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;

#[cfg(test)]
mod tests;
