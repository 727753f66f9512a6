//! VSS's nouns: levels, states, failure codes, backup types (Microsoft's VSS API reference gives their meaning).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Freeze level of a writer: front-end writers freeze first and thaw last, system writers the other way round.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    Serialize,
    Deserialize,
    JsonSchema,
)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Level {
    /// Uses other applications' data (VSS_APP_FRONT_END, the default).
    #[default]
    FrontEnd,
    /// Databases (VSS_APP_BACK_END).
    BackEnd,
    /// Parts of the operating system (VSS_APP_SYSTEM).
    System,
}

/// State of a writer (VSS_WRITER_STATE without its prefix).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum WriterState {
    /// No session has reached it yet, or its answer is not known.
    Unknown,
    /// Ready for a session.
    #[default]
    Stable,
    /// Prepared.
    WaitingForFreeze,
    /// Frozen.
    WaitingForThaw,
    /// Thawed.
    WaitingForPostSnapshot,
    /// The snapshot is there, the backup is being copied.
    WaitingForBackupComplete,
    /// It failed when asked to identify itself.
    FailedAtIdentify,
    /// It vetoed, or failed, while preparing the backup.
    FailedAtPrepareBackup,
    /// It vetoed, or failed, while preparing the snapshot.
    FailedAtPrepareSnapshot,
    /// It vetoed, or failed, while freezing.
    FailedAtFreeze,
    /// It could not hold its writes, or failed while thawing.
    FailedAtThaw,
    /// It failed after the snapshot.
    FailedAtPostSnapshot,
    /// It failed when the backup was complete.
    FailedAtBackupComplete,
    /// It vetoed, or failed, before a restore.
    FailedAtPreRestore,
    /// It failed after a restore.
    FailedAtPostRestore,
    /// It failed when its requester had gone.
    FailedAtBackupshutdown,
}

/// Why a writer failed (VSS_E_WRITERERROR_* without the prefix).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum WriterFailure {
    /// The set holds only part of the volumes that the writer needs.
    Inconsistentsnapshot,
    /// Memory, connections or the like ran out.
    Outofresources,
    /// It did not finish in time.
    Timeout,
    /// It may work another time.
    Retryable,
    /// It will not work another time either.
    Nonretryable,
    /// Some of its components failed; `components` tells which.
    PartialFailure,
    /// It could not bring the copy to a consistent state.
    RecoveryFailed,
    /// It gave no answer (found by the agent, never sent by a writer).
    NotResponding,
    /// It is not there although it was asked for (found by the agent, never sent by a writer).
    StatusNotAvailable,
}

impl WriterFailure {
    /// Another try may work.
    #[must_use]
    pub fn is_retryable(self) -> bool {
        match self {
            Self::Nonretryable | Self::Inconsistentsnapshot | Self::RecoveryFailed => false,
            Self::Retryable
            | Self::Outofresources
            | Self::Timeout
            | Self::PartialFailure
            | Self::NotResponding
            | Self::StatusNotAvailable => true,
        }
    }
}

/// A failure of a writer, or of one of its components.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Failure {
    /// Code.
    pub code: WriterFailure,
    /// For people.
    #[serde(default)]
    pub message: String,
}

/// What kind of backup the set is for (VSS_BACKUP_TYPE).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BackupType {
    /// Everything, and backup history is updated (logs may be truncated at backup-complete).
    Full,
    /// Everything, and backup history is left alone (the default: safe when nobody copies the snapshot away).
    #[default]
    Copy,
    /// What changed since the last full or incremental backup.
    Incremental,
    /// What changed since the last full backup.
    Differential,
    /// Logs only.
    Log,
}

/// Who holds the writes of a writer while it is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Hold {
    /// The application itself (a lock that it holds, e.g. SQLite's `BEGIN IMMEDIATE`).
    #[default]
    App,
    /// The frozen file system under it.
    Filesystem,
}

/// A part of a disk of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskExtent {
    /// Serial of the disk as the guest reads it; empty if it has none.
    pub serial: String,
    /// Kernel name of the disk (`vda`), for people.
    pub disk: String,
    /// First byte on the disk.
    pub start_bytes: u64,
    /// Number of bytes.
    pub length_bytes: u64,
}
