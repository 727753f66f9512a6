//! The writer protocol: JSON lines on a Unix stream socket in the guest, one connection per writer.
//!
//! The writer connects to [`SOCKET_PATH`] and sends [`Registration`]. From then on the agent sends [`Event`]s and the writer
//! answers each with a [`Reply`] of the same `seq`. The connection is the registration: when it closes, the writer is gone;
//! between freeze and thaw that fails the set. Events are one to one with VSS's (CVssWriter).

use crate::types::{BackupType, Hold, Level, WriterFailure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Where the agent listens. `/run` is a tmpfs, so the socket never lies on a frozen file system.
pub const SOCKET_PATH: &str = "/run/vmshadow/writers.sock";

/// First line of a writer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Registration {
    /// Version of this protocol, 1.
    pub protocol: u32,
    /// Names what kind of writer it is; the same on every machine.
    pub class_id: String,
    /// Names this instance; unique in the guest.
    pub instance_id: String,
    /// For people.
    pub name: String,
    /// Freeze level.
    #[serde(default)]
    pub level: Level,
    /// Longest time it can stay frozen, milliseconds, at most 60,000.
    pub freeze_timeout_ms: u64,
    /// Who holds its writes while frozen.
    #[serde(default)]
    pub hold: Hold,
}

/// What the agent sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Numbers the events of a connection; echoed in the reply.
    pub seq: u64,
    /// Time in which the reply is expected, milliseconds.
    pub deadline_ms: u64,
    /// What happens.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// Registration was accepted, or refused with a reason (the connection is closed then). No reply.
    Welcome {
        /// Version of the conversation; absent if refused.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        protocol: Option<u32>,
        /// Why it was refused.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        refused: Option<String>,
    },
    /// OnIdentify: reply with the metadata document.
    Identify {},
    /// OnPrepareBackup: last chance to say no before any effect.
    PrepareBackup {
        /// The set.
        set: String,
        /// Kind of backup.
        backup_type: BackupType,
        /// Serials of the disks in the set.
        disks: Vec<String>,
    },
    /// OnPrepareSnapshot: complete transactions, roll logs, flush caches. Heavy work belongs here.
    PrepareSnapshot {
        /// The set.
        set: String,
    },
    /// OnFreeze: hold writes from the reply on, for at most `hold_ms`; resume by an own timer after it.
    Freeze {
        /// The set.
        set: String,
        /// Generation of this hold.
        generation: u64,
        /// Longest hold, milliseconds.
        hold_ms: u64,
    },
    /// OnThaw: resume. `held` in the reply tells whether writes were held all the time.
    Thaw {
        /// The set.
        set: String,
        /// Generation of the hold.
        generation: u64,
    },
    /// OnPostSnapshot.
    PostSnapshot {
        /// The set.
        set: String,
    },
    /// OnBackupComplete.
    BackupComplete {
        /// The set.
        set: String,
    },
    /// OnAbort: undo, in any state; may come more than once.
    Abort {
        /// The set.
        set: String,
        /// Why.
        reason: String,
    },
}

/// A writer's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The event's `seq`.
    pub seq: u64,
    /// False is a veto (before the freeze) or a failure.
    pub ok: bool,
    /// Code if not ok.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<WriterFailure>,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// To `thaw`: writes were held from the reply to `freeze` until now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<bool>,
    /// To `freeze` and `thaw`: what proves it (a position in a log, a transaction number).
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub evidence: Value,
    /// To `identify`: the metadata document.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub metadata: Value,
}
