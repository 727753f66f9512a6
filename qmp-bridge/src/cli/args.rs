//! Options of `vmshadow`.
//!
//! Called by `cli`. Words follow vssadmin, diskshadow and virsh where they have one.

use crate::guest::AgentAddress;
use crate::sets::backup::parse_component;
use crate::snapshot::document::CreateRequest;
use crate::snapshot::level::Level;
use clap::{Args, Parser, Subcommand, ValueEnum};
use guest_agent_wire::components::ComponentOutcome;
use guest_agent_wire::host::{WriterComponents, WriterOutcomes};
use guest_agent_wire::types::BackupType;
use std::path::PathBuf;
use vhost_blk_wire::types::Method;

/// Snapshots of running VMs that their applications agreed to.
///
/// Exit codes: 0 ok, 1 failed, 2 usage, 3 the asked level was not reached (the set was deleted).
#[derive(Clone, Debug, Parser)]
#[command(name = "vmshadow", version)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of all commands.
#[derive(Clone, Debug, Args)]
pub(crate) struct Global {
    /// Answer in JSON on standard output.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Work through a qmp-bridge daemon.
    #[arg(long, global = true, value_name = "SOCKET", conflicts_with_all = ["config", "state_dir"])]
    pub(crate) bridge: Option<PathBuf>,
    /// File that names the VMs.
    #[arg(long, global = true, value_name = "FILE.toml")]
    pub(crate) config: Option<PathBuf>,
    /// Where records of sets are kept (default: the configuration's, or /var/lib/vmshadow).
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a snapshot set of a running VM.
    Create(Create),
    /// List sets, writers or volumes.
    List(List),
    /// Show the document of a set.
    Show {
        /// Set or snapshot, or the beginning of its id.
        id: String,
    },
    /// Delete sets or single snapshots.
    Delete {
        /// Sets or snapshots, or the beginnings of their ids.
        #[arg(required = true)]
        ids: Vec<String>,
        /// Remove the whole set's record even if a daemon cannot be reached; what it has of the set stays there.
        #[arg(long)]
        forget: bool,
    },
    /// Make the disks what they were; the VM must not run. Newer snapshots of them are deleted.
    Revert {
        /// Set or snapshot, or the beginning of its id.
        id: String,
    },
    /// Tell the writers of a set that its backup has been made; sets of all types but `copy` wait for that.
    Complete {
        /// Set, or the beginning of its id.
        id: String,
        /// It failed: writers keep their logs.
        #[arg(long)]
        failed: bool,
        /// This component alone is not in it, as WRITER=NAME or WRITER=PATH/NAME; may be repeated.
        #[arg(long = "failed-component", value_parser = failed_component, conflicts_with = "failed")]
        failed_components: Vec<WriterOutcomes>,
    },
    /// Run a command that restores from a set, between the writers' pre-restore and post-restore.
    Restore {
        /// Set, or the beginning of its id.
        id: String,
        /// Only these writers, by instance id, class id or name; all of the set if not given.
        #[arg(long = "writer", value_delimiter = ',')]
        writers: Vec<String>,
        /// Only this component, as WRITER=NAME or WRITER=PATH/NAME; may be repeated. What it depends on is told, not picked along.
        #[arg(long = "component", value_parser = parse_component)]
        components: Vec<WriterComponents>,
        /// A later backup is restored on top of this one: applications do not roll forward yet.
        #[arg(long)]
        additional_restores: bool,
        /// For the writers; what they make of it is theirs.
        #[arg(long, value_name = "TEXT", default_value = "")]
        options: String,
        /// The command; its exit status says whether the restore succeeded.
        #[arg(required = true, last = true)]
        command: Vec<std::ffi::OsString>,
    },
    /// Copy a snapshot's content to a file or pipe.
    Read(Read),
    /// Undo what a bridge that died has left. Every command does so first; this one says what it did.
    Recover,
}

fn percent(text: &str) -> Result<u8, String> {
    match text {
        "off" => Ok(0),
        number => match number.parse() {
            Ok(percent @ 0..=100) => Ok(percent),
            Ok(_) | Err(_) => Err("give `off`, or a number up to 100".to_owned()),
        },
    }
}

fn failed_component(text: &str) -> Result<WriterOutcomes, String> {
    let picked = parse_component(text)?;
    let components = picked.components.into_iter();
    Ok(WriterOutcomes {
        writer: picked.writer,
        components: components
            .map(|component| ComponentOutcome {
                logical_path: component.logical_path,
                name: component.name,
                succeeded: false,
            })
            .collect(),
    })
}

/// Which VM.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Vm {
    /// Name of the VM in the configuration, or to be given to one that is described by the next options.
    #[arg(long, value_name = "NAME")]
    pub(crate) vm: Option<String>,
    /// QEMU's QMP socket.
    #[arg(long, value_name = "SOCKET")]
    pub(crate) qmp: Option<PathBuf>,
    /// The agent: the socket behind its virtio-serial port, `vsock:CID[:PORT]`, `hybrid-vsock:SOCKET[:PORT]`,
    /// or, for a guest that has QEMU's agent alone, `qga:SOCKET`.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) agent: Option<AgentAddress>,
    /// Control socket of a vhost-blk daemon; may be repeated.
    #[arg(long, value_name = "SOCKET")]
    pub(crate) vhost_blk: Vec<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Create {
    #[command(flatten)]
    pub(crate) vm: Vm,
    /// The level that is attempted, and below which the set is deleted (exit code 3).
    #[arg(long, value_enum, default_value = "application")]
    pub(crate) level: Level,
    /// Keep the set at the level that is reached, and label it.
    #[arg(long)]
    pub(crate) best_effort: bool,
    /// How old content is kept; each volume's own method if not given.
    #[arg(long, value_enum)]
    pub(crate) method: Option<MethodName>,
    /// What the set is for; writers are told.
    #[arg(long = "type", value_enum, default_value = "copy")]
    pub(crate) backup_type: BackupTypeName,
    /// Only these disks, by volume, serial or QEMU device id.
    #[arg(long = "disk", value_delimiter = ',')]
    pub(crate) disks: Vec<String>,
    /// Not these disks.
    #[arg(long = "exclude-disk", value_delimiter = ',')]
    pub(crate) exclude_disks: Vec<String>,
    /// Not these writers, by class id, instance id or name.
    #[arg(long = "exclude-writer", value_delimiter = ',')]
    pub(crate) exclude_writers: Vec<String>,
    /// Back up only this component, as WRITER=NAME or WRITER=PATH/NAME; may be repeated. Other writers are not asked to hold.
    #[arg(long = "component", value_parser = parse_component)]
    pub(crate) components: Vec<WriterComponents>,
    /// The set that an incremental or differential one builds on: writers get the stamps of its components.
    #[arg(long, value_name = "SET", requires = "components")]
    pub(crate) since: Option<String>,
    /// Tell writers that changed parts of files are enough; they name them in the document.
    #[arg(long)]
    pub(crate) partial_files: bool,
    /// Tell writers that the backup is to be able to start the system.
    #[arg(long)]
    pub(crate) bootable_system_state: bool,
    /// Do not freeze these file systems, by mount point.
    #[arg(long = "exclude-filesystem", value_delimiter = ',')]
    pub(crate) exclude_filesystems: Vec<String>,
    /// Largest share of the disks that may be left out of the copies by the guest's word that it need not be there (files not to
    /// snapshot, swap), percent; if it names more, or with `off`, all is in them.
    #[arg(long, value_name = "off|PERCENT", value_parser = percent, default_value = "75")]
    pub(crate) leave_out: u8,
    /// Longest hold of file systems, milliseconds.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub(crate) hold_limit_ms: Option<u64>,
    /// Longest freeze of writers, milliseconds.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub(crate) writer_limit_ms: Option<u64>,
    /// Longest preparation, milliseconds.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) prepare_limit_ms: Option<u64>,
}

impl Create {
    /// What is asked, as the bridge knows it.
    pub(crate) fn request(&self) -> CreateRequest {
        CreateRequest {
            level: self.level,
            best_effort: self.best_effort,
            method: self.method.map(Into::into),
            backup_type: self.backup_type.into(),
            disks: self.disks.clone(),
            exclude_disks: self.exclude_disks.clone(),
            exclude_writers: self.exclude_writers.clone(),
            components: self.components.clone(),
            partial_files: self.partial_files,
            bootable_system_state: self.bootable_system_state,
            exclude_filesystems: self.exclude_filesystems.clone(),
            leave_out_percent: Some(self.leave_out),
            hold_limit_ms: self.hold_limit_ms,
            writer_limit_ms: self.writer_limit_ms,
            prepare_limit_ms: self.prepare_limit_ms,
        }
    }
}

#[derive(Clone, Debug, Args)]
pub(crate) struct List {
    /// What to list.
    #[arg(value_enum, default_value = "sets")]
    pub(crate) what: Listed,
    #[command(flatten)]
    pub(crate) vm: Vm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Listed {
    /// Snapshot sets.
    Sets,
    /// Writers in the guest.
    Writers,
    /// Volumes that vhost-blk serves.
    Volumes,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Read {
    /// Set or snapshot, or the beginning of its id.
    pub(crate) id: String,
    /// Which disk of a set, by volume or serial.
    #[arg(long)]
    pub(crate) disk: Option<String>,
    /// A new file, or `-` for standard output.
    #[arg(long, short, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Overwrite the file.
    #[arg(long)]
    pub(crate) force: bool,
}

/// Methods, as words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MethodName {
    /// Redirect-on-write.
    Row,
    /// Copy-on-write.
    Cow,
}

impl From<MethodName> for Method {
    fn from(name: MethodName) -> Self {
        match name {
            MethodName::Row => Self::Row,
            MethodName::Cow => Self::Cow,
        }
    }
}

/// Backup types, as words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackupTypeName {
    /// Everything; writers may truncate logs.
    Full,
    /// Everything; backup history is left alone.
    Copy,
    /// What changed since the last full or incremental backup.
    Incremental,
    /// What changed since the last full backup.
    Differential,
    /// Logs only.
    Log,
}

impl From<BackupTypeName> for BackupType {
    fn from(name: BackupTypeName) -> Self {
        match name {
            BackupTypeName::Full => Self::Full,
            BackupTypeName::Copy => Self::Copy,
            BackupTypeName::Incremental => Self::Incremental,
            BackupTypeName::Differential => Self::Differential,
            BackupTypeName::Log => Self::Log,
        }
    }
}
