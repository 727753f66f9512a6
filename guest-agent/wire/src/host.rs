//! The native protocol between `qmp-bridge` and the agent.
//!
//! JSON lines (one object, then `\n`) on the virtio-serial port [`PORT_NAME`]. The bridge sends requests
//! `{"id":N,"execute":NAME,"arguments":{..}}`; the agent answers `{"id":N,"return":{..}}` or `{"id":N,"error":{..}}` with
//! the same id, not necessarily in order: `status` is answered while a freeze is under way. A line that starts with byte
//! 0xFF, or the loss of the other side, starts a new conversation. When the host side goes away while a set is open, the
//! agent thaws and aborts that set at once.
//!
//! The life of a set: `hello`, `identify`, `prepare`, `freeze`, `thaw`, `post_snapshot`, and when the backup has been read
//! `backup_complete`; or at any step `abort`. That of a restore: `pre_restore`, `post_restore`, or `abort`.

use crate::components::{ComponentOutcome, ComponentReply, RestoreComponent, SelectedComponent};
use crate::metadata::Metadata;
use crate::types::{BackupType, DiskExtent, Hold, Level, WriterState};
use crate::writer::SnapshotOfDisk;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use crate::types::Failure;

/// Name of the virtio-serial port.
pub const PORT_NAME: &str = "org.vmshadow.agent.0";

/// Port of the agent on vsock. Below 1024, so that in the guest only a privileged process can take it.
pub const VSOCK_PORT: u32 = 867;

/// Version of this protocol. A bridge and an agent talk the highest version that both have.
pub const PROTOCOL_VERSION: u32 = 1;

/// Versions that a program of this build speaks.
pub const PROTOCOL_VERSIONS: &[u32] = &[PROTOCOL_VERSION];

/// The highest version that both have.
#[must_use]
pub fn common_version(theirs: &[u32]) -> Option<u32> {
    let common = PROTOCOL_VERSIONS.iter().filter(|v| theirs.contains(v));
    common.max().copied()
}

/// Longest time that file systems stay frozen, milliseconds (VSS: flush-and-hold).
pub const HOLD_MS_MAX: u64 = 10_000;

/// Longest time that a writer stays frozen, milliseconds (VSS: OnFreeze to OnThaw).
pub const WRITER_MS_MAX: u64 = 60_000;

/// How long the agent waits for the answer of a writer to post-snapshot, milliseconds. Its own comes after that: who asks it has to
/// wait for longer.
pub const POST_SNAPSHOT_MS: u64 = 600_000;

/// A request of the bridge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Request {
    /// Echoed in the answer.
    pub id: u64,
    /// What to do.
    #[serde(flatten)]
    pub command: Command,
}

/// What the bridge asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "execute", content = "arguments", rename_all = "snake_case")]
pub enum Command {
    /// Opens a conversation; ends (aborts) a set that an earlier one left open. Answer: [`Hello`].
    Hello {
        /// Versions that the bridge speaks.
        versions: Vec<u32>,
    },
    /// Asks for writers and file systems. Answer: [`Identified`].
    Identify {},
    /// prepare-backup and prepare-snapshot of all writers in scope; minutes are allowed. Flushes file systems at its end.
    /// Answer: [`Prepared`]. On error every prepared writer has been aborted.
    Prepare(Prepare),
    /// Freezes writers by level, then file systems, innermost first. Answer: [`Frozen`]. On error everything has been
    /// thawed and aborted.
    Freeze(Freeze),
    /// Thaws file systems, then writers, in reverse. Answer: [`Thawed`]. Answers `HOLD_BROKEN` if the hold ended earlier.
    Thaw {
        /// The set.
        set: String,
        /// Generation that `freeze` answered.
        generation: u64,
    },
    /// The verdict is known: post-snapshot of all writers. A set that is kept then waits for `backup_complete`, in no other
    /// set's way. Answer: [`WritersSaid`].
    PostSnapshot(PostSnapshot),
    /// The requester has read what it wanted of the copies: backup-complete of all writers. Answer: [`WritersSaid`].
    BackupComplete(BackupComplete),
    /// Opens a restore: pre-restore of the writers named. Files may be replaced after the answer. Answer: [`WritersSaid`]. On
    /// error every writer that heard of it has been aborted.
    PreRestore(Restore),
    /// Ends the restore: post-restore of the same writers. Answer: [`WritersSaid`].
    PostRestore(Restore),
    /// Undoes a set or a restore at any step; thaws what is frozen. Idempotent. Answer: an empty object.
    Abort {
        /// The set.
        set: String,
        /// Why, for writers and the log.
        reason: String,
    },
    /// What the agent is doing. Answered at once, also while frozen. Answer: [`Status`].
    Status {},
}

/// An answer of the agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Response {
    /// The request's id.
    pub id: u64,
    /// Answer or error.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// Answer or error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The answer, by the command's own type.
    Return(Value),
    /// The failure.
    Error(AgentError),
}

/// A failed request. It tells, per writer and file system, what was said before it failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error, Serialize, Deserialize, JsonSchema)]
#[error("{message} ({code:?})")]
pub struct AgentError {
    /// What kind of failure.
    pub code: ErrorCode,
    /// For people; names the writer or file system that failed.
    pub message: String,
    /// Another try may work (VSS advises 10 minutes later, at most 3 times).
    pub retryable: bool,
    /// What each writer said.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub writers: Vec<WriterReport>,
    /// What each file system said.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub filesystems: Vec<FilesystemReport>,
}

/// Kinds of failure of a set in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ErrorCode {
    /// The request is not understood.
    BadRequest,
    /// No common version.
    VersionMismatch,
    /// Another set (or a freeze by the QEMU guest agent protocol) is open.
    SnapshotSetInProgress,
    /// The set is not open: never begun, or ended by abort, dead-man or restart.
    SetNotFound,
    /// A writer said no.
    WriterVeto,
    /// A writer did not answer in time or hung up.
    WriterNotResponding,
    /// A file system did not freeze in time.
    FlushWritesTimeout,
    /// A file system refused to freeze.
    FreezeFailed,
    /// Writes were not held until the thaw: the dead-man fired, or somebody else thawed.
    HoldBroken,
    /// Anything else.
    Internal,
}

/// Answer of `hello`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Hello {
    /// Version of the conversation.
    pub version: u32,
    /// Program and version.
    pub agent: String,
    /// The guest kernel's boot id.
    pub boot_id: String,
    /// Names this run of the agent: one that was started anew has forgotten the conversation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
}

/// Answer of `identify`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Identified {
    /// Writers, in freeze order.
    pub writers: Vec<WriterInfo>,
    /// Mounted file systems that are backed by a disk, in freeze order.
    pub filesystems: Vec<FilesystemInfo>,
    /// Areas that may be written while all is frozen: swap.
    pub exempt: Vec<DiskExtent>,
}

/// A writer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WriterInfo {
    /// Names what kind of writer it is (VSS: class id).
    pub class_id: String,
    /// Names this running instance.
    pub instance_id: String,
    /// For people.
    pub name: String,
    /// Freeze level.
    pub level: Level,
    /// Longest time it can stay frozen, milliseconds.
    pub freeze_timeout_ms: u64,
    /// Who holds its writes.
    pub hold: Hold,
    /// State.
    pub state: WriterState,
    /// Its last failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<Failure>,
    /// Its metadata document; absent until it has been identified. One that is not understood is left out when it is read.
    #[serde(
        default,
        deserialize_with = "if_understood",
        skip_serializing_if = "Option::is_none"
    )]
    pub metadata: Option<Box<Metadata>>,
}

/// Documents of another version, in a record on a disk or from another agent, must not make all of it unreadable.
fn if_understood<'de, D: serde::Deserializer<'de>>(
    from: D,
) -> Result<Option<Box<Metadata>>, D::Error> {
    let value = Option::<Value>::deserialize(from)?;
    Ok(value.and_then(|value| serde_json::from_value(value).ok()))
}

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FilesystemInfo {
    /// Where it is mounted (one place, if several).
    pub mountpoint: String,
    /// Type, as in mountinfo.
    pub fstype: String,
    /// Device, as in mountinfo.
    pub device: String,
    /// Mounted read-only: nothing to freeze.
    pub read_only: bool,
    /// It can be frozen; if false, `why_not` tells.
    pub freezable: bool,
    /// Why it cannot be frozen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why_not: Option<String>,
    /// Where it lies.
    pub extents: Vec<DiskExtent>,
}

/// Arguments of `prepare`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Prepare {
    /// Identity of the set.
    pub set: String,
    /// Kind of backup.
    #[serde(default)]
    pub backup_type: BackupType,
    /// Serials of the disks in the set; empty means all disks.
    #[serde(default)]
    pub disks: Vec<String>,
    /// Writers left out, by class id, instance id or name (VSS: DisableWriterClasses).
    #[serde(default)]
    pub exclude_writers: Vec<String>,
    /// Only what `components` names is backed up (VSS: component mode). Writers that none is named of take no part after
    /// prepare-backup, and their veto there does not count.
    #[serde(default)]
    pub component_mode: bool,
    /// The components, by writer; each must be in its writer's metadata document.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<WriterComponents>,
    /// The requester can back up parts of files.
    #[serde(default)]
    pub partial_files: bool,
    /// The requester backs up what is needed to boot.
    #[serde(default)]
    pub bootable_system_state: bool,
    /// Longest time for all of it, milliseconds.
    pub limit_ms: u64,
}

/// Components of a writer that a requester picked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WriterComponents {
    /// Its instance id, class id or name.
    pub writer: String,
    /// The components.
    pub components: Vec<SelectedComponent>,
}

/// Answer of `prepare`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Prepared {
    /// What each writer in scope said.
    pub writers: Vec<WriterReport>,
    /// Component mode: what each writer said of which no component was picked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<WriterReport>,
    /// Time of the flush of all file systems (`syncfs`), milliseconds.
    pub sync_ms: u64,
}

/// Files that need not be in the copies, and where they lie while all is frozen (VSS: `FilesNotToSnapshot`). Best effort.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NotToSnapshot {
    /// Patterns, of writers' `exclude_from_snapshot` and of the agent's own configuration.
    pub patterns: u64,
    /// Files that were placed.
    pub files: u64,
    /// Patterns and files that could not be placed for certain.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unresolved: u64,
    /// Why, for the first of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
    /// The largest of the files, and swap devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// Bytes on the disks of the set, all extents together, also those that are not told.
    pub bytes: u64,
    /// Where they lie, the largest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extents: Vec<DiskExtent>,
    /// Extents that would have been too many to tell.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub extents_not_told: u64,
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// Arguments of `freeze`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Freeze {
    /// The set.
    pub set: String,
    /// Longest time from the first frozen file system to the thaw, milliseconds; at most [`HOLD_MS_MAX`].
    pub hold_ms: u64,
    /// Longest time from the first frozen writer to its thaw, milliseconds; at most [`WRITER_MS_MAX`].
    pub writer_ms: u64,
    /// Mount points left out.
    #[serde(default)]
    pub exclude_filesystems: Vec<String>,
}

/// Answer of `freeze`: everything is held from now on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Frozen {
    /// Generation of this hold, to be given back to `thaw`.
    pub generation: u64,
    /// What each writer in scope said, in freeze order.
    pub writers: Vec<WriterReport>,
    /// What each file system said, in freeze order.
    pub filesystems: Vec<FilesystemReport>,
    /// Areas of the disks that may still be written.
    pub exempt: Vec<DiskExtent>,
    /// What need not be in the copies; absent if nothing is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_to_snapshot: Option<Box<NotToSnapshot>>,
    /// Milliseconds from the first writer to the last.
    pub writers_ms: u64,
    /// Milliseconds from the first file system to the last.
    pub filesystems_ms: u64,
}

/// Answer of `thaw`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Thawed {
    /// True only if every file system and every writer held until now, inside the limits.
    pub held: bool,
    /// Why not, for people; empty if held.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why_not: String,
    /// What each writer said, in thaw order.
    pub writers: Vec<WriterReport>,
    /// What each file system said, in thaw order.
    pub filesystems: Vec<FilesystemReport>,
    /// From the first frozen file system to the first thaw by CLOCK_BOOTTIME, milliseconds.
    pub hold_ms: u64,
}

/// Arguments of `post_snapshot`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PostSnapshot {
    /// The set.
    pub set: String,
    /// The set is kept; if false the writers get abort instead and nothing follows.
    pub kept: bool,
    /// The copies, for writers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotOfDisk>,
    /// Where in the guest the copy is mounted writable, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount: Option<String>,
    /// The set waits for `backup_complete` also when this conversation has ended; if false writers get backup-shutdown then.
    #[serde(default)]
    pub detached: bool,
}

/// Arguments of `backup_complete`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BackupComplete {
    /// The set.
    pub set: String,
    /// The backup as a whole succeeded.
    pub succeeded: bool,
    /// Components that became something else than that, by writer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<WriterOutcomes>,
}

/// What became of components of a writer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WriterOutcomes {
    /// Its instance id, class id or name.
    pub writer: String,
    /// The components.
    pub components: Vec<ComponentOutcome>,
}

/// Arguments of `pre_restore` and `post_restore`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Restore {
    /// Names the restore; the same for both.
    pub set: String,
    /// What is restored. The writers named here by `pre_restore` hear of the restore, and no other; `post_restore` names
    /// them again to say how it went.
    pub writers: Vec<WriterRestore>,
    /// Longest time for all writers, milliseconds; 30 minutes if absent, and at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_ms: Option<u64>,
}

/// A writer in a restore.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WriterRestore {
    /// Its instance id, class id or name.
    pub writer: String,
    /// The components; none means all that it has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<RestoreComponent>,
}

/// Answer of `post_snapshot`, `backup_complete`, `pre_restore` and `post_restore`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WritersSaid {
    /// What each writer said.
    pub writers: Vec<WriterReport>,
}

/// What a writer said in one step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WriterReport {
    /// Instance id.
    pub instance_id: String,
    /// Name.
    pub name: String,
    /// State after the step.
    pub state: WriterState,
    /// It held its writes; known after the thaw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<bool>,
    /// What it gave as evidence (a position in a log, a transaction number).
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub evidence: Value,
    /// What it said of single components; to be kept with the backup and given back at the next one and at a restore.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<ComponentReply>,
    /// Its failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// Time it took, milliseconds.
    pub took_ms: u64,
}

/// What a file system said in one step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FilesystemReport {
    /// Where it is mounted.
    pub mountpoint: String,
    /// Type.
    pub fstype: String,
    /// `frozen`, `thawed`, `left-out` (the request excluded it), `read-only`, or `failed`.
    pub result: FilesystemResult,
    /// errno of FIFREEZE or FITHAW, 0 if it succeeded.
    pub errno: i32,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Where it lies.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extents: Vec<DiskExtent>,
    /// Time it took, microseconds.
    pub took_us: u64,
}

/// Outcome of one step for one file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FilesystemResult {
    /// FIFREEZE returned 0.
    Frozen,
    /// FITHAW returned 0: it had been frozen until then.
    Thawed,
    /// The request excluded it.
    LeftOut,
    /// Nothing to freeze.
    ReadOnly,
    /// See errno and message.
    Failed,
}

/// Answer of `status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Status {
    /// As in the answer to `hello`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// Open set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<String>,
    /// File systems or writers are frozen.
    pub frozen: bool,
    /// Frozen by the QEMU guest agent protocol rather than by a set.
    pub frozen_by_qga: bool,
    /// Time left until the dead-man thaws file systems, milliseconds; 0 if not frozen.
    pub hold_left_ms: u64,
    /// Sets that are kept and wait for `backup_complete`, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub incomplete: Vec<String>,
    /// Writers and their states.
    pub writers: Vec<WriterInfo>,
}
