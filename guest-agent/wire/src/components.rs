//! The requester's side of a backup: which components are in it, what writers added to them, what became of them (VSS: backup
//! components document).
//!
//! The requester owns the document and keeps it beside the backup. Its parts travel with the events that need them.

use crate::metadata::FileSet;
use crate::types::Failure;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A component that a requester has picked for a backup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SelectedComponent {
    /// As in the writer's metadata document.
    #[serde(default)]
    pub logical_path: String,
    /// As in the writer's metadata document.
    pub name: String,
    /// The stamp that the writer gave this component in the backup that an incremental or differential one builds on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous_stamp: Option<String>,
}

/// What a writer says of one component, in its answer to an event. All but the name may be left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ComponentReply {
    /// As in the writer's metadata document.
    #[serde(default)]
    pub logical_path: String,
    /// As in the writer's metadata document.
    pub name: String,
    /// Names this backup of the component to the writer; comes back as `previous_stamp` (prepare_backup, post_snapshot).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stamp: Option<String>,
    /// What the writer wants to find again at a restore; comes back in `pre_restore` (prepare_backup, post_snapshot).
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub metadata: Value,
    /// Parts of files that are enough for this backup (prepare_backup, post_snapshot).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub partial_files: Vec<PartialFile>,
    /// Files of which an incremental backup needs only what changed since then (prepare_backup, post_snapshot).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub differenced_files: Vec<DifferencedFiles>,
    /// Where the requester shall restore it to (pre_restore).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<RestoreTarget>,
    /// It failed, though others did not: a partial failure of its writer, whatever else the answer says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

/// Parts of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PartialFile {
    /// The file, absolute.
    pub path: String,
    /// The parts.
    pub ranges: Vec<ByteRange>,
    /// What the writer wants to find again at a restore.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub metadata: String,
}

/// Bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ByteRange {
    /// First byte.
    pub start_bytes: u64,
    /// Number of bytes.
    pub length_bytes: u64,
}

/// Files that changed since a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DifferencedFiles {
    /// The files.
    pub files: FileSet,
    /// Those changed after this wall-clock time, milliseconds since the epoch; all if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_after_unix_ms: Option<u64>,
}

/// What became of a component in a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ComponentOutcome {
    /// As in the writer's metadata document.
    #[serde(default)]
    pub logical_path: String,
    /// As in the writer's metadata document.
    pub name: String,
    /// It is in the backup.
    pub succeeded: bool,
}

/// A component in a restore.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RestoreComponent {
    /// As in the writer's metadata document.
    #[serde(default)]
    pub logical_path: String,
    /// As in the writer's metadata document.
    pub name: String,
    /// Only these parts of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subcomponents: Vec<String>,
    /// The stamp that the writer gave in the backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stamp: Option<String>,
    /// What the writer stored in the backup.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub metadata: Value,
    /// Where files go if not where they were.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub targets: Vec<NewTarget>,
    /// Another backup is restored on top of this one: do not roll forward yet.
    #[serde(default)]
    pub additional_restores: bool,
    /// Between requester and writer alone.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub options: String,
    /// How it went; absent before the restore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored: Option<FilesRestored>,
}

/// Where files go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NewTarget {
    /// The files, as they were backed up.
    pub files: FileSet,
    /// Directory, absolute.
    pub to: String,
}

/// Where a writer wants a component restored to (VSS_RESTORE_TARGET).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum RestoreTarget {
    /// As the metadata document says.
    Original,
    /// To the alternate locations of the document.
    Alternate,
    /// Where the files were, and nowhere else.
    OriginalLocation,
}

/// How the restore of a component went (VSS_FILE_RESTORE_STATUS).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum FilesRestored {
    /// Nothing was restored; what was there is whole.
    None,
    /// All of it.
    All,
    /// Some of it; the component is broken.
    Failed,
}
