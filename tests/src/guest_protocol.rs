//! What the rig's programs in the guest and the harness on the host say over virtio-serial ports.
//!
//! Used by `harness::{guest, load}` on the host and by the programs `guest-shell` and `guest-load`
//! in the guest. Both protocols are lines of JSON. A port reads end-of-file while the host's end
//! is closed, so the guest's side waits and goes on.

use serde::{Deserialize, Serialize};

/// The port of the command shell.
pub const SHELL_PORT: &str = "org.vmshadow.test.0";
/// The port on which the load program acknowledges its transactions.
pub const LOAD_PORT: &str = "org.vmshadow.load.0";
/// The port of the QEMU guest agent protocol.
pub const QGA_PORT: &str = "org.qemu.guest_agent.0";
/// The port of the agent's own protocol.
pub const AGENT_PORT: &str = "org.vmshadow.agent.0";

/// The most of a command's standard output, and of its standard error, that comes back, in bytes.
pub const OUTPUT_MAX_BYTES: u64 = 1 << 20;

/// Runs one command with `sh -c`. Commands run at the same time; answers come as they end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShellRequest {
    /// Chosen by the host, repeated in the answer.
    pub id: u64,
    /// The shell's words.
    pub command: String,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShellResponse {
    /// The request's number.
    pub id: u64,
    /// The exit status; 128 + n after signal n, as shells say it; 127 when it could not start.
    pub status: i32,
    /// The beginning of standard output, at most [`OUTPUT_MAX_BYTES`].
    pub stdout: String,
    /// The beginning of standard error, at most [`OUTPUT_MAX_BYTES`].
    pub stderr: String,
}

/// One transaction that SQLite has said is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// Which database, in the order of the load program's arguments.
    pub database: usize,
    /// The transaction's number: 1, 2, 3, ... without a gap in each database.
    pub id: u64,
    /// When it was begun, in microseconds of the guest's `CLOCK_BOOTTIME`.
    pub began_us: u64,
    /// When the commit had returned, on the same clock.
    pub acked_us: u64,
}
