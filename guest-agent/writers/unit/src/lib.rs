//! A snapshot writer for a service that knows nothing of snapshots: it stands still meanwhile, so that it writes nothing.
//!
//! Called through the writer library (`guest_agent_wire::sdk`). From the answer to `freeze` until `thaw` (`hold: app`) either
//!
//! * all processes of the unit are frozen: the copy is of one instant between two of their steps, which is what the service would
//!   find after it was killed there. It must stand that, as it must stand a power cut; no request that it has answered is lost,
//!   and what its clients see is a pause. Evidence is which processes they are; or
//! * the service is stopped, as late as can be, and started again at the thaw: the copy is what it leaves behind when it ends
//!   in order. Its clients lose it meanwhile. Evidence is when it was stopped. That it is up again is told after the snapshot.
//!
//! Neither ends with the one who began it. So the writer starts a second process of itself (`watch`), outside of the
//! unit, that lets go when the time is over or the writer is gone.

pub mod group;
pub mod service;
pub mod still;
pub mod watch;

use database_writer::{Disks, Identity};
use group::Group;
use guest_agent_wire::components::ComponentReply;
use guest_agent_wire::metadata::{Component, FileSet, Metadata, Source};
use guest_agent_wire::sdk::{Call, Held, Veto, Writer};
use guest_agent_wire::types::Hold;
use guest_agent_wire::writer::{
    BackupShutdown, Freeze, PostSnapshot, PrepareBackup, Registration, Thaw,
};
use serde_json::Value;
use service::Service;
use std::path::PathBuf;
use std::time::Duration;
use still::Still;
use watch::Watch;

/// Class of this writer; allow files name it.
pub const CLASS_ID: &str = "unit";

/// The writer.
#[derive(Debug)]
pub struct UnitWriter {
    identity: Identity,
    /// Name for people, and of the unit that a restore stops and starts.
    unit: String,
    way: Way,
    /// Where the service keeps its files.
    files: Vec<PathBuf>,
    disks: Disks,
    watch: Watch,
    /// From before it is made to stand still until it is let go.
    still: Option<Still>,
}

/// How a service is made to stand still.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// The control group of the unit is frozen: systemd is asked which, for it may be another after each start.
    FreezeUnit,
    /// The control group in this directory is frozen.
    FreezeGroup(PathBuf),
    /// The unit is stopped and started.
    StopUnit,
}

impl UnitWriter {
    /// For this unit. `watch` lets go when this process cannot.
    #[must_use]
    pub fn new(
        identity: Identity,
        unit: String,
        way: Way,
        files: Vec<PathBuf>,
        disks: Disks,
        watch: Watch,
    ) -> Self {
        Self {
            identity,
            unit,
            way,
            files,
            disks,
            watch,
            still: None,
        }
    }

    /// What is to stand still, found anew; it does not yet.
    fn find(&self) -> Result<Still, Veto> {
        match &self.way {
            Way::FreezeUnit => Group::of_unit(&self.unit).map(Still::Frozen),
            Way::FreezeGroup(path) => Group::at(path).map(Still::Frozen),
            Way::StopUnit => {
                let service = Service::named(&self.unit)?;
                service.may_be_stopped()?;
                Ok(Still::Stopped(service))
            }
        }
    }

    fn let_go(&mut self) -> Result<(), Veto> {
        let Some(still) = self.still.take() else {
            return Ok(());
        };
        let let_go = still.let_go();
        if let_go.is_ok() {
            // Only after it: a watch that is told early could not let go any more. After a failure it tries in its turn.
            self.watch.forget();
        }
        let_go
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
        // A unit that is not running, is no unit, or may not be stopped, is refused before any effect.
        self.find()?;
        match self.disks.not_held(&backup.disks, &self.files) {
            Some(why) => Err(Veto::inconsistent(why)),
            None => Ok(Vec::new()),
        }
    }

    fn freeze(&mut self, call: &Call<'_>, hold: &Freeze) -> Result<Value, Veto> {
        // What an earlier set left is not this one's.
        self.let_go()?;
        let still = self.find()?;
        self.watch
            .keep(&still, Duration::from_millis(hold.hold_ms))?;
        let stands = still.make(call).and_then(|()| still.evidence());
        self.still = Some(still);
        if stands.is_err() {
            self.let_go()?;
        }
        stands
    }

    fn thaw(&mut self, _: &Call<'_>, _: &Thaw) -> Result<Held, Veto> {
        let Some(still) = &self.still else {
            return Err(Veto::retryable("it does not stand still"));
        };
        // Asked for before it goes on.
        let held = still.is();
        let evidence = still.evidence();
        self.let_go()?;
        Ok(Held {
            held: held?,
            evidence: evidence?,
        })
    }

    fn post_snapshot(
        &mut self,
        call: &Call<'_>,
        _: &PostSnapshot,
    ) -> Result<Vec<ComponentReply>, Veto> {
        if self.way == Way::StopUnit {
            // A start takes longer than a thaw may.
            Service::named(&self.unit)?.wait_until_up(call)?;
        }
        Ok(Vec::new())
    }

    fn backup_shutdown(&mut self, _: &BackupShutdown) -> Result<(), Veto> {
        self.let_go()
    }

    fn abort(&mut self, _: &str, _: &str) {
        // If it fails, the watch tries.
        drop(self.let_go());
    }
}
