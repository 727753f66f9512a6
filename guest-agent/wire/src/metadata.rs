//! A writer's metadata document: what its data is, where it lies, and how it is restored (VSS: writer metadata document).
//!
//! A writer gives it in answer to `identify`; from then on it is read-only. The agent passes it to the requester, who picks
//! components from it (`components`) and keeps it beside the backup: a restore is guided by it long after the writer has gone.

use crate::types::BackupType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeSet;

/// The document.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Metadata {
    /// The writer's class. Filled in by the agent from the registration, whatever the writer says here.
    pub class_id: String,
    /// The running instance that gave the document. Filled in by the agent.
    pub instance_id: String,
    /// The writer's name. Filled in by the agent.
    pub name: String,
    /// Version of the application, or of the writer, for people and for the writer's own comparison at a restore.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// What the data is to the machine.
    pub usage: Usage,
    /// What kind of source it is.
    pub source: Source,
    /// How its files are restored. A document with components must have it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restore_method: Option<Restoring>,
    /// Kinds of backup that the writer knows beside `full` and `copy`; for another kind it acts as for `full`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub backup_types: Vec<BackupType>,
    /// It gives a stamp for each component, and wants that of the earlier backup for an incremental one.
    pub stamps: bool,
    /// It can name the changed parts of a file, for a requester that supports that.
    pub partial_files: bool,
    /// Files that a backup leaves out although a component's file set has them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub excludes: Vec<FileSet>,
    /// Files that need not be in the copy at all, to save space; best effort (VSS: `FilesNotToSnapshot`).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude_from_snapshot: Vec<FileSet>,
    /// Where files go at a restore if they cannot go where they were.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub alternate_locations: Vec<AlternateLocation>,
    /// What can be backed up and restored.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<Component>,
}

/// What the data is to the machine (VSS_USAGE_TYPE).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Usage {
    /// Needed to boot.
    BootableSystemState,
    /// Of a system service.
    SystemService,
    /// Of users.
    #[default]
    UserData,
    /// Something else.
    Other,
}

/// What kind of source it is (VSS_SOURCE_TYPE).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Source {
    /// A database with transactions.
    TransactedDb,
    /// A database without.
    NontransactedDb,
    /// Something else.
    #[default]
    Other,
}

/// How a writer's files are restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Restoring {
    /// The method.
    pub method: RestoreMethod,
    /// Unit to stop and start, for the two methods that do so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Where a person finds the steps of a `CUSTOM` restore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub procedure: Option<String>,
    /// Whether the writer wants `pre_restore` and `post_restore`.
    #[serde(default)]
    pub writer_restore: WriterRestoreEvents,
    /// The machine must be booted afterwards.
    #[serde(default)]
    pub reboot_required: bool,
}

impl Restoring {
    /// By this method, with restore events, no service and no reboot.
    #[must_use]
    pub fn by(method: RestoreMethod) -> Self {
        Self {
            method,
            service: None,
            procedure: None,
            writer_restore: WriterRestoreEvents::default(),
            reboot_required: false,
        }
    }
}

/// Restore methods (VSS_RESTOREMETHOD_ENUM without its prefix).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum RestoreMethod {
    /// Only if none of the files is there.
    RestoreIfNotThere,
    /// If all files that are there can be replaced.
    RestoreIfCanReplace,
    /// Stop the service, restore, start the service.
    StopRestoreStart,
    /// To the alternate locations.
    RestoreToAlternateLocation,
    /// At the next boot.
    RestoreAtReboot,
    /// At the next boot, if a file cannot be replaced now.
    RestoreAtRebootIfCannotReplace,
    /// By the application's own means: see `procedure`.
    Custom,
    /// Restore, then stop and start the service.
    RestoreStopStart,
}

/// When a writer wants restore events (VSS_WRITERRESTORE_ENUM).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum WriterRestoreEvents {
    /// Never.
    Never,
    /// If a file cannot be replaced.
    IfReplaceFails,
    /// Always.
    #[default]
    Always,
}

/// Files by their place and names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FileSet {
    /// Directory, absolute.
    pub path: String,
    /// Names in it, with `*` and `?`.
    #[serde(default = "all_names")]
    pub spec: String,
    /// The directories below it as well.
    #[serde(default)]
    pub recursive: bool,
    /// Where a backup finds them instead (VSS: alternate path), if not in `path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alternate: Option<String>,
}

fn all_names() -> String {
    "*".to_owned()
}

impl FileSet {
    /// Names of this pattern in this directory.
    pub fn new(path: impl Into<String>, spec: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            spec: spec.into(),
            recursive: false,
            alternate: None,
        }
    }

    /// Everything below this directory.
    pub fn tree(path: impl Into<String>) -> Self {
        Self {
            recursive: true,
            ..Self::new(path, all_names())
        }
    }
}

/// Where files go if they cannot go where they were.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AlternateLocation {
    /// The files, as they were backed up.
    pub files: FileSet,
    /// Directory, absolute.
    pub to: String,
}

/// Something that is backed up and restored as one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Component {
    /// What it is.
    #[serde(rename = "type")]
    pub component_type: ComponentType,
    /// Where it stands among the components, parts separated by `/`; empty at the top.
    #[serde(default)]
    pub logical_path: String,
    /// Its name, unique within its logical path.
    pub name: String,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub caption: String,
    /// A requester may pick it alone for a backup; if false it comes with the selectable one above it.
    #[serde(default = "yes")]
    pub selectable: bool,
    /// A requester may pick it alone for a restore.
    #[serde(default)]
    pub selectable_for_restore: bool,
    /// It wants `backup_complete`.
    #[serde(default = "yes")]
    pub notify_on_backup_complete: bool,
    /// It wants the copy writable for a while, to bring it to a consistent state (VSS: auto-recovery).
    #[serde(default)]
    pub backup_recovery: bool,
    /// Files of a file group.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileSet>,
    /// Data files of a database.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub database_files: Vec<FileSet>,
    /// Log files of a database.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log_files: Vec<FileSet>,
    /// Components of other writers that it cannot do without.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dependencies: Vec<Dependency>,
    /// What the writer itself wants to find here at a restore.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub info: Value,
}

fn yes() -> bool {
    true
}

impl Component {
    /// A database of this name, without files yet.
    pub fn database(logical_path: impl Into<String>, name: impl Into<String>) -> Self {
        Self::new(ComponentType::Database, logical_path.into(), name.into())
    }

    /// A group of files of this name, without files yet.
    pub fn file_group(logical_path: impl Into<String>, name: impl Into<String>) -> Self {
        Self::new(ComponentType::Filegroup, logical_path.into(), name.into())
    }

    fn new(component_type: ComponentType, logical_path: String, name: String) -> Self {
        Self {
            component_type,
            logical_path,
            name,
            caption: String::new(),
            selectable: true,
            selectable_for_restore: false,
            notify_on_backup_complete: true,
            backup_recovery: false,
            files: Vec::new(),
            database_files: Vec::new(),
            log_files: Vec::new(),
            dependencies: Vec::new(),
            info: Value::Null,
        }
    }

    /// All its file sets.
    pub fn file_sets(&self) -> impl Iterator<Item = &FileSet> {
        self.files
            .iter()
            .chain(&self.database_files)
            .chain(&self.log_files)
    }
}

/// Kinds of component (VSS_COMPONENT_TYPE).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ComponentType {
    /// A database: data files and log files.
    Database,
    /// Files.
    Filegroup,
}

/// A component of another writer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Dependency {
    /// Class of that writer.
    pub class_id: String,
    /// Logical path of the component.
    #[serde(default)]
    pub logical_path: String,
    /// Its name.
    pub name: String,
}

/// What is wrong with a document.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    /// It does not say how its components are restored (VSS: VSS_RME_UNDEFINED, a writer's bug).
    #[error("it has components but no restore_method")]
    NoRestoreMethod,
    /// A component has no name.
    #[error("a component has no name")]
    NoName,
    /// Two components of one logical path have one name.
    #[error("two components are called {0:?}")]
    Duplicate(String),
    /// A path from which nobody could tell where a file is.
    #[error("{0:?} is not an absolute path")]
    NotAbsolute(String),
    /// A database with plain files, or a group with data or log files.
    #[error("component {0:?} has files of another type than its own")]
    WrongFiles(String),
}

impl Metadata {
    /// Checks what the types cannot.
    ///
    /// # Errors
    /// What is wrong first.
    pub fn check(&self) -> Result<(), MetadataError> {
        if self.restore_method.is_none() && !self.components.is_empty() {
            return Err(MetadataError::NoRestoreMethod);
        }
        let mut names = BTreeSet::new();
        for component in &self.components {
            if component.name.is_empty() {
                return Err(MetadataError::NoName);
            }
            if !names.insert((&component.logical_path, &component.name)) {
                return Err(MetadataError::Duplicate(component.name.clone()));
            }
            let is_wrong = match component.component_type {
                ComponentType::Database => !component.files.is_empty(),
                ComponentType::Filegroup => {
                    !component.database_files.is_empty() || !component.log_files.is_empty()
                }
            };
            if is_wrong {
                return Err(MetadataError::WrongFiles(component.name.clone()));
            }
        }
        let alternate = self.alternate_locations.iter();
        let sets = self.excludes.iter().chain(&self.exclude_from_snapshot);
        let sets = sets.chain(alternate.clone().map(|location| &location.files));
        let sets = sets.chain(self.components.iter().flat_map(Component::file_sets));
        let paths = sets.flat_map(|set| [Some(&set.path), set.alternate.as_ref()]);
        let mut paths = paths
            .flatten()
            .chain(alternate.map(|location| &location.to));
        match paths.find(|path| !path.starts_with('/')) {
            Some(path) => Err(MetadataError::NotAbsolute(path.clone())),
            None => Ok(()),
        }
    }

    /// The component of this name.
    #[must_use]
    pub fn component(&self, logical_path: &str, name: &str) -> Option<&Component> {
        self.components
            .iter()
            .find(|component| component.logical_path == logical_path && component.name == name)
    }
}

#[cfg(test)]
mod tests;
