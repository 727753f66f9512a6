//! Writers: applications that are told of a set and may refuse it.
//!
//! `quiesce` sends events through [`Writer`]; it does not know how one is reached. [`registry`] knows them all; `script` runs
//! executables of a directory, `socket` talks to processes that are connected, whom `allow` and `places` admit
//! and `pace` bounds.

pub mod allow;
pub mod pace;
pub mod places;
pub mod registry;
pub mod script;
pub mod socket;

use guest_agent_wire::host::Failure;
use guest_agent_wire::types::{Hold, Level, WriterFailure};
use guest_agent_wire::writer::{EventKind, Reply};

/// Who a writer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// What kind of writer.
    pub class_id: String,
    /// Which one; unique in the guest.
    pub instance_id: String,
    /// For people.
    pub name: String,
    /// Freeze level.
    pub level: Level,
    /// Longest time it can stay frozen, milliseconds.
    pub freeze_timeout_ms: u64,
    /// Longest time it may be silent while it prepares, milliseconds.
    pub prepare_timeout_ms: u64,
    /// Who holds its writes.
    pub hold: Hold,
    /// The user it runs as.
    pub uid: u32,
}

/// Takes the answer to one event; called at most once, from any thread.
pub type Answer = Box<dyn FnOnce(Result<Reply, Failure>) + Send>;

/// An application that takes part in sets.
pub trait Writer: Send + Sync {
    /// Who it is.
    fn identity(&self) -> &Identity;

    /// Sends an event and returns at once. `answer` is called when the writer has answered or failed; the caller keeps the
    /// deadline, which is also told to the writer. An event that follows an unanswered one replaces it.
    fn begin(&self, event: EventKind, deadline_ms: u64, answer: Answer);

    /// It can be told something while file systems are frozen: that needs no new process.
    fn is_resident(&self) -> bool;
}

/// A failure found by the agent.
#[must_use]
pub fn failure(code: WriterFailure, message: impl Into<String>) -> Failure {
    Failure {
        code,
        message: message.into(),
    }
}
