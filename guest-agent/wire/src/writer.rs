//! The writer protocol: JSON lines on a Unix socket in the guest, one connection per writer.
//!
//! The writer connects to [`SOCKET_PATH`] and sends [`Registration`]. From then on the agent sends [`Event`]s and the writer
//! answers each with a [`Reply`] of the same `seq`; it may also send [`Progress`] and [`Release`]. The connection is the
//! registration: when it closes, the writer is gone; between freeze and thaw that fails the set. Events are one to one with
//! VSS's (CVssWriter); PROTOCOL.md tells their order.

use crate::components::{ComponentOutcome, ComponentReply, RestoreComponent, SelectedComponent};
use crate::types::{BackupType, Hold, Level, WriterFailure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Where the agent listens. `/run` is a tmpfs, so the socket never lies on a frozen file system.
pub const SOCKET_PATH: &str = "/run/vmshadow/writers.sock";

/// Version of this protocol.
pub const PROTOCOL: u32 = 1;

/// Longest time that a writer may be silent while it prepares, milliseconds.
pub const PREPARE_MS_MAX: u64 = 600_000;

/// Most that a writer may say in a set, bytes: `evidence` and `components` of its replies together, as JSON. A reply beyond
/// that counts as a failure (`OUTOFRESOURCES`); so does one for which the words of all writers leave no room.
pub const WORDS_BYTES_MAX: usize = 128 << 10;

/// First line of a writer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
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
    /// Longest time it can stay frozen, milliseconds, 1 to 60,000.
    pub freeze_timeout_ms: u64,
    /// After this time without an answer or a [`Progress`] it is taken for stuck while it prepares, milliseconds, 1 to
    /// 600,000.
    #[serde(default = "prepare_ms_max")]
    pub prepare_timeout_ms: u64,
    /// Who holds its writes while frozen.
    #[serde(default)]
    pub hold: Hold,
}

fn prepare_ms_max() -> u64 {
    PREPARE_MS_MAX
}

impl Registration {
    /// With the longest limits, at the default level, holding its own writes.
    pub fn new(
        class_id: impl Into<String>,
        instance_id: impl Into<String>,
        name: impl Into<String>,
    ) -> Self {
        Self {
            protocol: PROTOCOL,
            class_id: class_id.into(),
            instance_id: instance_id.into(),
            name: name.into(),
            level: Level::default(),
            freeze_timeout_ms: crate::host::WRITER_MS_MAX,
            prepare_timeout_ms: PREPARE_MS_MAX,
            hold: Hold::default(),
        }
    }
}

/// What the agent sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// Registration was accepted, or refused with a reason (the connection is closed then). No reply.
    Welcome(Welcome),
    /// OnIdentify: reply with the metadata document.
    Identify {},
    /// OnPrepareBackup: last chance to say no before any effect.
    PrepareBackup(PrepareBackup),
    /// OnPrepareSnapshot: complete transactions, roll logs, flush caches. Heavy work belongs here.
    PrepareSnapshot(PrepareSnapshot),
    /// OnFreeze: hold writes from the reply on, for at most `hold_ms`; resume by an own timer after it.
    Freeze(Freeze),
    /// OnThaw: resume. `held` in the reply tells whether writes were held all the time.
    Thaw(Thaw),
    /// OnPostSnapshot: the copies are there.
    PostSnapshot(PostSnapshot),
    /// OnBackupComplete: the requester has read what it wanted of the copies.
    BackupComplete(BackupComplete),
    /// OnBackupShutdown: the requester has gone without a word on the backup.
    BackupShutdown(BackupShutdown),
    /// OnAbort: undo, in any state; may come more than once.
    Abort(Abort),
    /// OnPreRestore: files are about to be replaced.
    PreRestore(Restore),
    /// OnPostRestore: files have been replaced, or not.
    PostRestore(Restore),
}

/// See [`EventKind::Welcome`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Welcome {
    /// Version of the conversation; absent if refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<u32>,
    /// Why it was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// See [`EventKind::PrepareBackup`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PrepareBackup {
    /// The set.
    pub set: String,
    /// Kind of backup.
    #[serde(default)]
    pub backup_type: BackupType,
    /// The requester picks components; if false it takes the whole disks.
    #[serde(default)]
    pub component_mode: bool,
    /// The components that it picked of this writer. In component mode a writer that none was picked of hears nothing more of
    /// the set.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<SelectedComponent>,
    /// The requester can back up parts of files.
    #[serde(default)]
    pub partial_files: bool,
    /// The requester backs up what is needed to boot.
    #[serde(default)]
    pub bootable_system_state: bool,
    /// Serials of the disks in the set; none means all.
    #[serde(default)]
    pub disks: Vec<String>,
}

/// See [`EventKind::PrepareSnapshot`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PrepareSnapshot {
    /// The set.
    pub set: String,
}

/// See [`EventKind::Freeze`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Freeze {
    /// The set.
    pub set: String,
    /// Generation of this hold.
    pub generation: u64,
    /// Longest hold, milliseconds.
    pub hold_ms: u64,
}

/// See [`EventKind::Thaw`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Thaw {
    /// The set.
    pub set: String,
    /// Generation of the hold.
    pub generation: u64,
}

/// See [`EventKind::PostSnapshot`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PostSnapshot {
    /// The set.
    pub set: String,
    /// The copies, as far as the requester names them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotOfDisk>,
    /// Directory at which the copy is mounted writable, for a writer that brings it to a consistent state; absent if it is
    /// not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount: Option<String>,
}

/// A copy of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SnapshotOfDisk {
    /// Serial of the disk as the guest reads it.
    pub serial: String,
    /// Names the copy on the host.
    pub snapshot: String,
}

/// See [`EventKind::BackupComplete`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BackupComplete {
    /// The set.
    pub set: String,
    /// The backup as a whole succeeded. Only then may logs be truncated, and only for a `full`, `incremental` or `log` one.
    pub succeeded: bool,
    /// In component mode: what became of each component.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<ComponentOutcome>,
}

/// See [`EventKind::BackupShutdown`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BackupShutdown {
    /// The set.
    pub set: String,
}

/// See [`EventKind::Abort`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Abort {
    /// The set.
    pub set: String,
    /// Why.
    pub reason: String,
}

/// See [`EventKind::PreRestore`] and [`EventKind::PostRestore`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Restore {
    /// Names the restore.
    pub set: String,
    /// The components of this writer that are restored; none means all that it has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<RestoreComponent>,
}

/// What a writer sends after its registration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum FromWriter {
    /// Its answer to an event.
    Reply(Reply),
    /// It is at work on an event.
    Progress(Progress),
    /// It has had to resume.
    Release(Release),
}

/// A writer's answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
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
    /// To `identify`: the metadata document ([`crate::metadata::Metadata`]).
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub metadata: Value,
    /// To `prepare_backup`, `post_snapshot`, `pre_restore` and `post_restore`: what it says of single components.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<ComponentReply>,
}

impl Reply {
    /// Agrees.
    #[must_use]
    pub fn agrees(seq: u64) -> Self {
        Self {
            seq,
            ok: true,
            ..Self::default()
        }
    }
}

/// A writer is at work on `prepare_backup` or `prepare_snapshot`: its `prepare_timeout_ms` begins anew. At other events it
/// changes nothing; the requester's limit for the whole preparation stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Progress {
    /// The event's `seq`.
    pub seq: u64,
    /// What it is doing, for people.
    pub progress: String,
}

/// A writer has resumed before the thaw: the set is lost. Its own timer has run out, or its lock was taken from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Release {
    /// Why, for people.
    pub release: String,
    /// Generation of the hold.
    pub generation: u64,
}
