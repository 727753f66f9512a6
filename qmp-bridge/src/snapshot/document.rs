//! The set document: everything that is known of a set, as JSON.
//!
//! Filled by `run`, stored by `intent`, shown by `vmshadow show`, handed to requesters. It is also the intent record: an
//! outcome of `open` says that somebody is (or was, when he died) at work on the set. The key names are stable.
//! Times are milliseconds on the host's monotonic clock unless a name says otherwise.

use super::level::Level;
use super::selection::{self, ComesWith};
use super::step::Step;
use super::witness::Witnesses;
use crate::guest::{AgentAddress, StockGuest};
use guest_agent_wire::components::{ComponentReply, SelectedComponent};
use guest_agent_wire::host::{
    FilesystemInfo, FilesystemReport, NotToSnapshot, WriterComponents, WriterInfo, WriterReport,
};
use guest_agent_wire::metadata::{Metadata, WriterRestoreEvents};
use guest_agent_wire::types::{BackupType, DiskExtent};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use uuid::Uuid;
use vhost_blk_wire::types::Method;

/// Version of the document's shape.
pub const DOCUMENT_FORMAT: u32 = 1;

/// How to reach a VM and its disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmTarget {
    /// Name for people.
    pub name: String,
    /// QEMU's QMP socket.
    pub qmp: PathBuf,
    /// Where the agent is reached; without it only `crash` can be reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentAddress>,
    /// Control sockets of the vhost-blk daemons that serve its disks.
    pub vhost_blk: Vec<PathBuf>,
}

/// What the requester asked.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
pub struct CreateRequest {
    /// The level that is attempted, and below which the set is deleted.
    pub level: Level,
    /// Keep the set at whatever level was reached.
    pub best_effort: bool,
    /// Method of the copies; each volume's own if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<Method>,
    /// What kind of backup the set is for; told to writers.
    pub backup_type: BackupType,
    /// Disks in the set, by volume, serial or QEMU device id; empty means all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<String>,
    /// Disks left out, by volume, serial, or QEMU device id.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude_disks: Vec<String>,
    /// Writers left out, by class id, instance id or name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude_writers: Vec<String>,
    /// Only these components are backed up (VSS: component mode); empty means the whole disks. Writers of which none is named
    /// are not asked to hold.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<WriterComponents>,
    /// Writers may name changed parts of files instead of whole files.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub partial_files: bool,
    /// The backup is to be able to start the system.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub bootable_system_state: bool,
    /// Mount points left out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude_filesystems: Vec<String>,
    /// Largest share of the disks of the set, in percent of their bytes, that may be left out of the copies by the guest's word that
    /// it need not be there; 0: nothing; 75 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leave_out_percent: Option<u8>,
    /// Longest hold of file systems, milliseconds; at most and by default 10,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hold_limit_ms: Option<u64>,
    /// Longest freeze of writers, milliseconds; at most and by default 60,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub writer_limit_ms: Option<u64>,
    /// Longest preparation, milliseconds; 600,000 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prepare_limit_ms: Option<u64>,
}

/// What became of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Being made, or its maker died: then the next start undoes it.
    Open,
    /// Kept.
    Kept,
    /// The asked level was not reached: the copies were deleted.
    Refused,
    /// Something else failed: the copies were deleted.
    Failed,
    /// Its maker died; it was undone by recovery.
    Undone,
}

impl Outcome {
    /// The word that people see.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Kept => "kept",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Undone => "undone",
        }
    }
}

/// Why a set was not made. Names follow VSS where VSS has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ReasonCode {
    /// Another set is open on this VM, guest or volume.
    SnapshotSetInProgress,
    /// The request does not fit this VM.
    BadRequest,
    /// QEMU cannot be asked.
    HypervisorUnreachable,
    /// The VM does not run.
    VmNotRunning,
    /// The VM migrates.
    VmMigrating,
    /// The VM was paused, reset, shut down, migrated or lost a disk while it was frozen, or got one while the set was made.
    VmDisturbed,
    /// A disk of the VM is not served by vhost-blk.
    DiskNotCovered,
    /// The agent does not answer or was lost.
    AgentUnreachable,
    /// A writer said no.
    WriterVeto,
    /// A writer did not answer.
    WriterNotResponding,
    /// Data was not flushed in time.
    FlushWritesTimeout,
    /// A file system could not be frozen.
    FreezeFailed,
    /// The commit took longer than writes can be held.
    HoldWritesTimeout,
    /// Writes were not held until the thaw.
    HoldBroken,
    /// The witnesses do not support the level that was asked.
    LevelNotReached,
    /// vhost-blk does not answer or was lost.
    ProviderUnreachable,
    /// vhost-blk refused.
    ProviderVeto,
    /// Shadow storage has no room.
    InsufficientStorage,
    /// The agent failed in another way.
    AgentFailed,
    /// The requester cancelled or went away.
    Cancelled,
    /// The bridge died in the middle.
    BridgeDied,
    /// The state directory failed.
    StateDirectory,
}

impl ReasonCode {
    /// True if the set failed because the asked level could not be had: exit code 3. False if the machinery failed: 1.
    #[must_use]
    pub fn is_about_the_level(self) -> bool {
        match self {
            Self::VmNotRunning
            | Self::VmDisturbed
            | Self::DiskNotCovered
            | Self::AgentUnreachable
            | Self::WriterVeto
            | Self::WriterNotResponding
            | Self::FlushWritesTimeout
            | Self::FreezeFailed
            | Self::HoldWritesTimeout
            | Self::HoldBroken
            | Self::AgentFailed
            | Self::LevelNotReached => true,
            Self::SnapshotSetInProgress
            | Self::BadRequest
            | Self::HypervisorUnreachable
            | Self::VmMigrating
            | Self::ProviderUnreachable
            | Self::ProviderVeto
            | Self::InsufficientStorage
            | Self::Cancelled
            | Self::BridgeDied
            | Self::StateDirectory => false,
        }
    }

    /// The name on the wire.
    #[must_use]
    pub fn name(self) -> String {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::String(name)) => name,
            Ok(_) | Err(_) => format!("{self:?}"),
        }
    }
}

/// Why a set (or one attempt at it) failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Reason {
    /// For programs.
    pub code: ReasonCode,
    /// For people; names the writer, file system or daemon.
    pub message: String,
    /// The step that was not reached.
    pub step: Step,
    /// Another try may work (VSS advises 10 minutes later, at most 3 times).
    pub retryable: bool,
}

/// An attempt at a level that failed before the commit and was followed by one at a lower level.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Attempt {
    /// The level.
    pub level: Level,
    /// Why it failed.
    pub reason: Reason,
}

/// When a step was over.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StepTime {
    /// The step.
    pub step: Step,
    /// Since the set began.
    pub at_ms: f64,
    /// Since the step before.
    pub took_ms: f64,
}

/// Times of a set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Timings {
    /// Each step.
    pub steps: Vec<StepTime>,
    /// From sending `freeze` to the answer to `thaw`: no writer was held longer, by the host's clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub freeze_to_thaw_ms: Option<f64>,
    /// From the start of the file systems' freeze to the sending of `thaw`, by the host's clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hold_ms: Option<f64>,
    /// What the guest's own clock said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestTimes>,
    /// What each daemon's own clock said.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub storage: Vec<StorageTimes>,
}

/// Times by the guest's clock, milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct GuestTimes {
    /// Flush before the freeze.
    pub sync_ms: u64,
    /// Freeze, first writer to last.
    pub writers_ms: u64,
    /// Freeze, first file system to last.
    pub filesystems_ms: u64,
    /// First frozen file system to first thaw.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hold_ms: Option<u64>,
}

/// Times by a daemon's clock, microseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StorageTimes {
    /// Control socket of the daemon.
    pub control: PathBuf,
    /// From holding new writes until none was in flight.
    pub drain_us: u64,
    /// The durable records.
    pub record_us: u64,
    /// From holding to releasing.
    pub hold_us: u64,
    /// From the mark to the end of the commit.
    pub since_mark_us: u64,
}

/// A writer and what it said at each step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct WriterRecord {
    /// Names the running instance.
    pub instance_id: String,
    /// It took part in the set.
    pub in_scope: bool,
    /// To `identify`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identify: Option<WriterInfo>,
    /// To `prepare`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepare: Option<WriterReport>,
    /// To `freeze`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze: Option<WriterReport>,
    /// To `thaw`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thaw: Option<WriterReport>,
    /// To `post_snapshot`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post: Option<WriterReport>,
    /// To `backup_complete`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub complete: Option<WriterReport>,
}

impl WriterRecord {
    /// What it said last of each of its components; a report has all that was said before it in the same set.
    #[must_use]
    pub fn components(&self) -> &[ComponentReply] {
        let reports = [&self.complete, &self.post, &self.thaw, &self.prepare];
        reports
            .into_iter()
            .flatten()
            .map(|report| report.components.as_slice())
            .find(|components| !components.is_empty())
            .unwrap_or_default()
    }

    /// Its metadata document.
    #[must_use]
    pub fn metadata(&self) -> Option<&Metadata> {
        self.identify.as_ref()?.metadata.as_deref()
    }

    /// What must come with the components that were picked, if any of them are its own.
    ///
    /// # Errors
    /// One of its own cannot be picked.
    pub fn must_come(
        &self,
        picked: &[WriterComponents],
    ) -> Result<Vec<SelectedComponent>, ComesWith> {
        let own: Vec<_> = self.picked_of(picked).collect();
        match self.metadata() {
            Some(metadata) if !own.is_empty() => selection::must_come(&metadata.components, &own),
            Some(_) | None => Ok(Vec::new()),
        }
    }

    /// Those of it among components that were picked.
    pub fn picked_of<'a>(
        &'a self,
        picked: &'a [WriterComponents],
    ) -> impl Iterator<Item = &'a SelectedComponent> {
        let own = picked
            .iter()
            .filter(|picked| self.is_called(&picked.writer));
        own.flat_map(|picked| &picked.components)
    }

    /// It is to hear of a restore of its files.
    #[must_use]
    pub fn wants_restore_events(&self) -> bool {
        let restoring = self.metadata().and_then(|m| m.restore_method.as_ref());
        restoring.is_none_or(|restoring| restoring.writer_restore != WriterRestoreEvents::Never)
    }

    /// A requester calls it so.
    #[must_use]
    pub fn is_called(&self, name: &str) -> bool {
        self.instance_id == name
            || self
                .identify
                .as_ref()
                .is_some_and(|info| info.class_id == name || info.name == name)
    }
}

/// A file system and what it said at each step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FilesystemRecord {
    /// Where it is mounted.
    pub mountpoint: String,
    /// To `identify`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identify: Option<FilesystemInfo>,
    /// To `freeze`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze: Option<FilesystemReport>,
    /// To `thaw`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thaw: Option<FilesystemReport>,
}

/// Where a copy is and how to read it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Copy {
    /// Volume by its name in the daemon.
    pub volume: String,
    /// The volume's identity.
    pub volume_id: Uuid,
    /// Serial that the guest reads.
    pub serial: String,
    /// The snapshot.
    pub snapshot: Uuid,
    /// Control socket of the daemon that holds it.
    pub control: PathBuf,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Method.
    pub method: Method,
    /// Host time of the commit, milliseconds since the epoch.
    pub created_unix_ms: u64,
    /// The command that reads it.
    pub read_with: String,
    /// Bytes of files that need not be in a copy (VSS: FilesNotToSnapshot) and of swap that are not in it: they read as zeroes.
    /// At most this many, where a note says that the stores have not answered.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub left_out_bytes: u64,
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// A disk of the VM that is not in the set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct UncoveredDisk {
    /// QEMU device id, or its QOM path if it has none.
    pub device: String,
    /// Why it is not in the set.
    pub why: String,
    /// The requester left it out; if false it lowers the level.
    pub excluded: bool,
}

/// Everything that is known of a set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SetDocument {
    /// [`DOCUMENT_FORMAT`].
    pub format: u32,
    /// Program and version that made it.
    pub made_by: String,
    /// Identity.
    pub set: Uuid,
    /// The VM and how it was reached.
    pub vm: VmTarget,
    /// What was asked.
    pub request: CreateRequest,
    /// What became of it.
    pub outcome: Outcome,
    /// The level asked.
    pub level_asked: Level,
    /// The level reached; absent if nothing was committed.
    pub level_reached: Option<Level>,
    /// Why it is not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// Attempts at higher levels.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attempts: Vec<Attempt>,
    /// Writers have heard the outcome and the document is complete.
    pub finished: bool,
    /// Writers wait to hear whether the backup succeeded: `vmshadow complete` says so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub awaits_backup: bool,
    /// What they were told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup_succeeded: Option<bool>,
    /// Wall clock when it began, milliseconds since the epoch.
    pub started_unix_ms: u64,
    /// Times.
    pub timings: Timings,
    /// The four witnesses.
    pub witnesses: Witnesses,
    /// Where each copy is; empty unless kept.
    pub copies: Vec<Copy>,
    /// Writers.
    pub writers: Vec<WriterRecord>,
    /// File systems.
    pub filesystems: Vec<FilesystemRecord>,
    /// What QEMU's own agent said, in a VM that is asked through it: then `writers` and `filesystems` are empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu_guest_agent: Option<StockGuest>,
    /// Areas of the disks that the host's witness did not watch (swap).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exempt: Vec<DiskExtent>,
    /// What need not be in the copies by the guest's word, without its places. What came of it stands with each copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_to_snapshot: Option<Box<NotToSnapshot>>,
    /// Bytes that the guest named as not needed and that are in the copies all the same: it named more than the request allows.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub leave_out_refused_bytes: u64,
    /// Disks of the VM that are not in the set.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub uncovered_disks: Vec<UncoveredDisk>,
    /// What the reader of a copy has to know.
    pub notes: Vec<String>,
    /// What was undone, in the order in which it was.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub undone: Vec<String>,
}

impl SetDocument {
    /// A set that begins now.
    #[must_use]
    pub fn begin(set: Uuid, vm: VmTarget, request: CreateRequest, started_unix_ms: u64) -> Self {
        Self {
            format: DOCUMENT_FORMAT,
            made_by: concat!("qmp-bridge ", env!("CARGO_PKG_VERSION")).to_owned(),
            set,
            vm,
            outcome: Outcome::Open,
            level_asked: request.level,
            level_reached: None,
            request,
            reason: None,
            attempts: Vec::new(),
            finished: false,
            awaits_backup: false,
            backup_succeeded: None,
            started_unix_ms,
            timings: Timings::default(),
            witnesses: Witnesses::none_heard("the set did not come to the verdict"),
            copies: Vec::new(),
            writers: Vec::new(),
            filesystems: Vec::new(),
            qemu_guest_agent: None,
            exempt: Vec::new(),
            not_to_snapshot: None,
            leave_out_refused_bytes: 0,
            uncovered_disks: Vec::new(),
            notes: Vec::new(),
            undone: Vec::new(),
        }
    }

    /// The record of a writer, made if it is new.
    pub(super) fn writer(&mut self, instance_id: &str) -> Option<&mut WriterRecord> {
        if !self
            .writers
            .iter()
            .any(|writer| writer.instance_id == instance_id)
        {
            self.writers.push(WriterRecord {
                instance_id: instance_id.to_owned(),
                in_scope: false,
                identify: None,
                prepare: None,
                freeze: None,
                thaw: None,
                post: None,
                complete: None,
            });
        }
        self.writers
            .iter_mut()
            .find(|writer| writer.instance_id == instance_id)
    }

    /// The record of a file system, made if it is new.
    pub(super) fn filesystem(&mut self, mountpoint: &str) -> Option<&mut FilesystemRecord> {
        if !self
            .filesystems
            .iter()
            .any(|filesystem| filesystem.mountpoint == mountpoint)
        {
            self.filesystems.push(FilesystemRecord {
                mountpoint: mountpoint.to_owned(),
                identify: None,
                freeze: None,
                thaw: None,
            });
        }
        self.filesystems
            .iter_mut()
            .find(|filesystem| filesystem.mountpoint == mountpoint)
    }
}

#[cfg(test)]
mod tests;
