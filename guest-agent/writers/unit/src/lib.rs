//! A snapshot writer for a service that knows nothing of snapshots: its control group is frozen, so that it writes nothing.
//!
//! Called through the writer library (`guest_agent_wire::sdk`). All processes of the unit stand still from the answer to `freeze`
//! until `thaw` (`hold: app`); evidence is which they are. The copy is of one instant between two of their steps, which is what
//! the service would find after it was killed there: it must stand that, as it must stand a power cut, but no request that it
//! has answered is lost. What its clients see is a pause.
//!
//! A control group stays frozen when its freezer dies. So the writer starts a second process of itself (`watch`), outside of the
//! frozen group, that lets go when the time is over or the writer is gone.

pub mod group;
pub mod watch;

use database_writer::{Disks, Identity};
use group::Group;
use guest_agent_wire::components::ComponentReply;
use guest_agent_wire::metadata::{Component, FileSet, Metadata, Source};
use guest_agent_wire::sdk::{Call, Held, Veto, Writer};
use guest_agent_wire::types::Hold;
use guest_agent_wire::writer::{BackupShutdown, Freeze, PrepareBackup, Registration, Thaw};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;
use watch::Watch;

/// Class of this writer; allow files name it.
pub const CLASS_ID: &str = "unit";

/// The writer.
#[derive(Debug)]
pub struct UnitWriter {
    identity: Identity,
    /// Name for people, and of the unit that a restore stops and starts.
    unit: String,
    /// Finds the unit's control group: it may be another after each start of the unit.
    find: Find,
    /// Where the service keeps its files.
    files: Vec<PathBuf>,
    disks: Disks,
    watch: Watch,
    frozen: Option<Group>,
}

/// How a unit's control group is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Find {
    /// systemd is asked.
    Systemd,
    /// It is this directory.
    Directory(PathBuf),
}

impl UnitWriter {
    /// For this unit. `watch` lets go when this process cannot.
    #[must_use]
    pub fn new(
        identity: Identity,
        unit: String,
        find: Find,
        files: Vec<PathBuf>,
        disks: Disks,
        watch: Watch,
    ) -> Self {
        Self {
            identity,
            unit,
            find,
            files,
            disks,
            watch,
            frozen: None,
        }
    }

    fn group(&self) -> Result<Group, Veto> {
        match &self.find {
            Find::Systemd => Group::of_unit(&self.unit),
            Find::Directory(path) => Group::at(path),
        }
    }

    fn let_go(&mut self) -> Result<(), Veto> {
        let Some(group) = self.frozen.take() else {
            return Ok(());
        };
        let thawed = group.thaw();
        // Only after it: a watch that is told early could not let go any more.
        self.watch.forget();
        thawed
    }
}

impl Writer for UnitWriter {
    fn registration(&self) -> Registration {
        self.identity
            .registration(CLASS_ID, &self.unit, &self.unit, Hold::App)
    }

    fn identify(&mut self, _: &Call<'_>) -> Result<Metadata, Veto> {
        let mut files = Component::file_group("", &*self.unit);
        files.selectable_for_restore = true;
        files.files = self
            .files
            .iter()
            .map(|path| FileSet::tree(path.to_string_lossy()))
            .collect();
        Ok(Metadata {
            source: Source::Other,
            restore_method: Some(self.identity.restoring(&self.unit)),
            components: vec![files],
            ..Metadata::default()
        })
    }

    fn prepare_backup(
        &mut self,
        _: &Call<'_>,
        backup: &PrepareBackup,
    ) -> Result<Vec<ComponentReply>, Veto> {
        // A unit that is not running, or is no unit, is refused before any effect.
        self.group()?;
        match self.disks.not_held(&backup.disks, &self.files) {
            Some(why) => Err(Veto::inconsistent(why)),
            None => Ok(Vec::new()),
        }
    }

    fn freeze(&mut self, call: &Call<'_>, hold: &Freeze) -> Result<Value, Veto> {
        let group = self.group()?;
        self.watch
            .keep(&group, Duration::from_millis(hold.hold_ms))?;
        let frozen = group.freeze(call).and_then(|()| evidence(&group));
        self.frozen = Some(group);
        if frozen.is_err() {
            self.let_go()?;
        }
        frozen
    }

    fn thaw(&mut self, _: &Call<'_>, _: &Thaw) -> Result<Held, Veto> {
        let Some(group) = &self.frozen else {
            return Err(Veto::retryable("it was not frozen"));
        };
        // Asked for before it goes on.
        let held = group.is_frozen();
        let evidence = evidence(group);
        self.let_go()?;
        Ok(Held {
            held: held?,
            evidence: evidence?,
        })
    }

    fn backup_shutdown(&mut self, _: &BackupShutdown) -> Result<(), Veto> {
        self.let_go()
    }

    fn abort(&mut self, _: &str, _: &str) {
        // If it fails, the watch tries.
        drop(self.let_go());
    }
}

fn evidence(group: &Group) -> Result<Value, Veto> {
    Ok(json!({ "group": group.name(), "processes": group.processes()? }))
}
