//! QMP envelopes: greeting, request, answer, event, error (QEMU `docs/interop/qmp-spec.rst`).
//!
//! Called by both ends of the control socket. Unknown keys are ignored, as QMP demands.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The first message on a connection, sent by the server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Greeting {
    /// The only member.
    #[serde(rename = "QMP")]
    pub qmp: GreetingBody,
}

/// What the greeting carries.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GreetingBody {
    /// Version of the server.
    pub version: VersionInfo,
    /// Capabilities which the client may enable; the daemon offers none.
    pub capabilities: Vec<String>,
}

/// Version in the shape that QMP clients read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VersionInfo {
    /// Numbers. Named `qemu` because clients look for that name.
    pub qemu: VersionTriple,
    /// Name and version of the program, as a text.
    pub package: String,
}

/// Three version numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionTriple {
    /// Incompatible changes.
    pub major: u32,
    /// Additions.
    pub minor: u32,
    /// Corrections.
    pub micro: u32,
}

/// A command as it comes over the socket; `arguments` is decoded by the command's own type.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    /// Name of the command.
    pub execute: String,
    /// Its arguments; an absent value means an empty object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arguments: Option<Value>,
    /// Echoed in the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<Value>,
}

/// What a server sends after the greeting.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ServerMessage {
    /// A command has succeeded.
    Return {
        /// The command's answer; an empty object if it has none.
        #[serde(rename = "return")]
        value: Value,
        /// The request's `id`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<Value>,
    },
    /// A command has failed.
    Error {
        /// Class for programs, text for people.
        error: QmpError,
        /// The request's `id`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<Value>,
    },
    /// Something happened.
    Event {
        /// Name of the event.
        event: String,
        /// Its data; an absent value means an empty object.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        data: Option<Value>,
        /// Host time of the event.
        timestamp: Timestamp,
    },
}

/// Host time of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timestamp {
    /// Seconds since the epoch, -1 if unknown.
    pub seconds: i64,
    /// Microseconds within the second, -1 if unknown.
    pub microseconds: i64,
}

/// A failed command.
#[derive(Clone, Debug, thiserror::Error, Serialize, Deserialize)]
#[error("{desc} ({class})")]
pub struct QmpError {
    /// Class, one of [`ErrorClass`]'s names if the server is ours.
    pub class: String,
    /// Text for people.
    pub desc: String,
}

/// Error classes of the daemon. The names are stable: clients decide by them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorClass {
    /// No better class: read the text.
    GenericError,
    /// No such command.
    CommandNotFound,
    /// No such volume (QMP's name for a device that is not there).
    DeviceNotFound,
    /// No such snapshot.
    SnapshotNotFound,
    /// No such snapshot set, or it was undone already.
    SetNotFound,
    /// A set is open on one of these volumes: one at a time (VSS: SNAPSHOT_SET_IN_PROGRESS).
    SetInProgress,
    /// The command does not fit the state of the set, volume or snapshot.
    InvalidState,
    /// Writes could not be held until the commit (VSS: HOLD_WRITES_TIMEOUT); the set is undone.
    HoldBroken,
    /// Data could not be flushed in time (VSS: FLUSH_WRITES_TIMEOUT); the set is undone.
    FlushTimeout,
    /// Shadow storage has no room (VSS: INSUFFICIENT_STORAGE).
    InsufficientStorage,
    /// A disk failed under the volume; it refuses everything until it is reopened.
    VolumePoisoned,
    /// The caller may not do this.
    AccessDenied,
}

impl ErrorClass {
    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotFound => "DeviceNotFound",
            Self::SnapshotNotFound => "SnapshotNotFound",
            Self::SetNotFound => "SetNotFound",
            Self::SetInProgress => "SetInProgress",
            Self::InvalidState => "InvalidState",
            Self::HoldBroken => "HoldBroken",
            Self::FlushTimeout => "FlushTimeout",
            Self::InsufficientStorage => "InsufficientStorage",
            Self::VolumePoisoned => "VolumePoisoned",
            Self::AccessDenied => "AccessDenied",
        }
    }
}

impl QmpError {
    /// An error of one of our classes.
    #[must_use]
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Self {
        Self {
            class: class.as_str().to_owned(),
            desc: desc.into(),
        }
    }

    /// True if the error is of this class.
    #[must_use]
    pub fn is(&self, class: ErrorClass) -> bool {
        self.class == class.as_str()
    }
}
