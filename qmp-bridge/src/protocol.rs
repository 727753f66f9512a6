//! Commands of the bridge daemon's socket, in QMP framing; each doc is the protocol reference.
//!
//! Spoken by `daemon` (server) and `cli` (client). The envelopes are those of `vhost_blk_wire::qmp`.
//!
//! Events: `SET_PROGRESS {"vm","step","at-ms","took-ms"}` to the connection whose `set-create` is under way. A connection that
//! closes cancels its `set-create`, and gives up the restore that it has open.

use crate::sets::ListedSet;
use crate::snapshot::document::{CreateRequest, SetDocument, VmTarget};
use guest_agent_wire::components::FilesRestored;
use guest_agent_wire::host::{Identified, WriterComponents, WriterOutcomes, WritersSaid};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use vhost_blk_wire::command::{Command, Empty, QmpCapabilities, QueryCommands, QueryVersion};
use vhost_blk_wire::types::VolumeInfo;

/// Names of all commands, for `query-commands`.
pub const COMMAND_NAMES: &[&str] = &[
    QmpCapabilities::NAME,
    QueryVersion::NAME,
    QueryCommands::NAME,
    QueryVms::NAME,
    QueryWriters::NAME,
    QueryVolumes::NAME,
    SetCreate::NAME,
    SetList::NAME,
    SetShow::NAME,
    SetDelete::NAME,
    SetRevert::NAME,
    SetComplete::NAME,
    SetPreRestore::NAME,
    SetPostRestore::NAME,
    SetRecover::NAME,
];

/// Name of the event that reports a step of a `set-create`.
pub const SET_PROGRESS: &str = "SET_PROGRESS";

macro_rules! command {
    ($name:literal, $type:ident, $return:ty) => {
        impl Command for $type {
            const NAME: &'static str = $name;
            type Return = $return;
        }
    };
}

/// The configured VMs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct QueryVms {}
command!("query-vms", QueryVms, Vec<VmTarget>);

/// Writers and file systems of a VM's guest.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct QueryWriters {
    /// The VM; may be absent if there is only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
}
command!("query-writers", QueryWriters, Identified);

/// Volumes of a VM's vhost-blk daemons.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct QueryVolumes {
    /// The VM; may be absent if there is only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
}
command!("query-volumes", QueryVolumes, Vec<ListedVolume>);

/// A volume and the daemon that serves it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ListedVolume {
    /// Control socket of the daemon.
    pub control: PathBuf,
    /// The volume.
    #[serde(flatten)]
    pub volume: VolumeInfo,
}

/// Makes a set. Answers with its document when all is over, also when the set was refused: see its `outcome`.
/// Fails with `SetInProgress` at once if one of this VM is being made.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SetCreate {
    /// The VM; may be absent if there is only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// What is asked.
    #[serde(default)]
    pub request: CreateRequest,
}
command!("set-create", SetCreate, SetDocument);

/// All sets, oldest first.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SetList {
    /// Only this VM's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
}
command!("set-list", SetList, Vec<ListedSet>);

/// The document of a set.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SetShow {
    /// Set or snapshot, or the unambiguous beginning of its id.
    pub id: String,
}
command!("set-show", SetShow, SetDocument);

/// Deletes a set, or one snapshot of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SetDelete {
    /// Set or snapshot, or the unambiguous beginning of its id.
    pub id: String,
    /// Remove the whole set's record even if a daemon cannot be reached; what it has of the set stays there.
    #[serde(default)]
    pub forget: bool,
}
command!("set-delete", SetDelete, Empty);

/// Makes the disks what they were. The VM must not run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SetRevert {
    /// Set or snapshot, or the unambiguous beginning of its id.
    pub id: String,
}
command!("set-revert", SetRevert, Empty);

/// Tells the writers of a set whether its backup succeeded. Sets of all types but `copy` wait for that. Answers with the document.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SetComplete {
    /// Set, or the unambiguous beginning of its id.
    pub id: String,
    /// It succeeded.
    pub succeeded: bool,
    /// Components that fared otherwise, by writer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<WriterOutcomes>,
}
command!("set-complete", SetComplete, SetDocument);

/// Tells writers that their files will be replaced by those of a set. The restore is open until `set-post-restore` on the same
/// connection, or the connection's end; nothing else goes on meanwhile on this VM but `set-revert`. Answers with what writers said,
/// and what else the restored components need.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SetPreRestore {
    /// Set, or the unambiguous beginning of its id.
    pub id: String,
    /// Only these, by instance id, class id or name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub writers: Vec<String>,
    /// Only these components of their writers; beside those of `writers`, which are restored whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<WriterComponents>,
    /// A later backup is restored on top of this one: applications do not roll forward yet.
    #[serde(default)]
    pub additional_restores: bool,
    /// For the writers.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub options: String,
}
command!("set-pre-restore", SetPreRestore, RestoreBegun);

/// A restore that writers agreed to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RestoreBegun {
    /// What they said.
    #[serde(flatten)]
    pub said: WritersSaid,
    /// What the restored components depend on that is not restored with them. As in VSS it is told, and not picked along.
    #[serde(default)]
    pub needs: Vec<Need>,
}

/// A component that is restored, and one that it depends on, which is not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Need {
    /// The component that is restored, as `WRITER=PATH/NAME`.
    pub component: String,
    /// The other, in the same form; the writer is its instance in the set, or its class if the set has none.
    pub needs: String,
    /// The set has it, so that it can be restored from the set, too.
    pub is_in_set: bool,
}

/// Tells the same writers how it went. Answers with what they said.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SetPostRestore {
    /// How it went.
    pub restored: FilesRestored,
}
command!("set-post-restore", SetPostRestore, WritersSaid);

/// Undoes what dead bridges left. Answers with the documents of the sets that were ended.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SetRecover {}
command!("set-recover", SetRecover, Vec<SetDocument>);
