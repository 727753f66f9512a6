//! The verdict and what follows: keep, tell the writers.
//!
//! Called by `run`. Invariants: the outcome `kept` is durable before any writer is told; a writer that fails when it is told leaves no
//! set behind that is called `application`.

use super::super::document::{Copy, GuestTimes, Outcome, ReasonCode, SetDocument, WriterRecord};
use super::super::level::Level;
use super::super::plan::Plan;
use super::super::step::Step;
use super::super::witness::{self, HostClock, Observations, Word};
use super::daemons::{all, copies};
use super::failure::{Failure, chain, internal};
use super::watch::cancelled;
use super::{Run, milliseconds};
use crate::guest::{Guest, GuestClient, GuestError, StockSystem};
use guest_agent_wire::host::{BackupComplete, PostSnapshot, WriterReport, WritersSaid};
use guest_agent_wire::types::BackupType;
use guest_agent_wire::writer::SnapshotOfDisk;
use tokio::time::Instant;
use vhost_blk_wire::command::SnapshotSetKeep;

impl Run<'_> {
    /// Hears the witnesses.
    pub(super) async fn verdict(&mut self) -> Result<(), Failure> {
        if self.window.was_frozen()
            && let Some(vm) = &self.vm
        {
            // The answers stand behind every event that came before them.
            let state = async {
                vm.running().await?;
                vm.not_migrating().await?;
                vm.disks().await
            };
            match (state.await, &mut self.plan) {
                (Ok(disks), Some(plan)) => {
                    plan.add_plugged(&self.doc.request, &disks);
                    self.doc.uncovered_disks.clone_from(&plan.uncovered);
                }
                (Ok(_), None) => {}
                (Err(error), _) => self.watch.disturbances.push(error.to_string()),
            }
            self.watch.drain();
        }
        self.watch.events = None;
        let window = &self.window;
        let clock = self.host_clock();
        self.doc.timings.hold_ms = clock.map(|clock| clock.hold_ms);
        self.doc.timings.freeze_to_thaw_ms = clock.map(|clock| clock.writers_ms);
        self.doc.timings.guest = window.frozen.as_ref().map(|frozen| GuestTimes {
            sync_ms: window.prepared.as_ref().map_or(0, |p| p.sync_ms),
            writers_ms: frozen.writers_ms,
            filesystems_ms: frozen.filesystems_ms,
            hold_ms: window.thawed.as_ref().map(|thawed| thawed.hold_ms),
        });
        let witnesses = witness::hear(&Observations {
            serials: self.plan.as_ref().map(Plan::serials).unwrap_or_default(),
            identified: window.identified.as_ref(),
            prepared: window.prepared.as_ref(),
            frozen: window.frozen.as_ref(),
            thawed: window.thawed.as_ref(),
            thaw_failure: window.thaw_failure.as_deref(),
            clock,
            disturbances: &self.watch.disturbances,
            commits: &window.commits,
            stock: self
                .doc
                .qemu_guest_agent
                .as_ref()
                .filter(|_| window.stock_frozen),
            left_out: &self.doc.request.exclude_filesystems,
            excluded_writers: &self.doc.request.exclude_writers,
        });
        self.doc.witnesses = witnesses;
        let reached = self.level_reached();
        self.doc.level_reached = Some(reached);
        self.note_level(reached);
        self.note_scope();
        if self.watch.cancelled() {
            return Err(cancelled());
        }
        if reached >= self.doc.level_asked || self.doc.request.best_effort {
            return Ok(());
        }
        Err(self.below(reached))
    }

    /// What the witnesses support, as they stand.
    fn level_reached(&self) -> Level {
        // VSS's writers are those that its list shows.
        let of_vss = self.doc.qemu_guest_agent.as_ref();
        let of_vss = of_vss.filter(|_| self.window.stock_frozen);
        let of_vss = of_vss.and_then(|said| said.vss_writers.as_ref());
        let of_ours = self.window.prepared.as_ref().map_or(0, |p| p.writers.len());
        let writers = of_ours + of_vss.map_or(0, Vec::len);
        let every_disk = self.plan.as_ref().is_some_and(Plan::every_disk);
        witness::level_reached(&self.doc.witnesses, writers, every_disk)
    }

    pub(super) fn host_clock(&self) -> Option<HostClock> {
        let window = &self.window;
        let ms = |from: Option<Instant>, to: Option<Instant>| {
            Some(milliseconds(to?.saturating_duration_since(from?)))
        };
        Some(HostClock {
            hold_ms: ms(window.hold_start, window.thaw_sent)?,
            writers_ms: ms(window.freeze_sent, window.thaw_answered)?,
            hold_limit_ms: self.limits.hold_ms,
            writer_limit_ms: self.limits.writer_ms,
        })
    }

    /// Why the level that was reached is not enough.
    pub(super) fn below(&self, reached: Level) -> Failure {
        let witnesses = &self.doc.witnesses;
        let mut broken = false;
        let mut lines = Vec::new();
        if let Some(why) = &self.window.thaw_failure {
            // Three witnesses object for this one cause.
            let asked = self.doc.level_asked;
            let text = format!("reached {reached}, asked {asked}: thaw: {why}");
            let code = self.window.thaw_code.unwrap_or(ReasonCode::HoldBroken);
            return Failure::new(code, text).retryable();
        }
        for (name, testimony) in [
            ("filesystems", &witnesses.filesystems),
            ("writers", &witnesses.writers),
            ("time", &witnesses.time),
            ("host", &witnesses.host),
        ] {
            match testimony.value {
                Word::Agrees => {}
                Word::Disagrees => {
                    broken = true;
                    let first = testimony.evidence.first().cloned().unwrap_or_default();
                    lines.push(format!("{name}: {first}"));
                }
                Word::NotHeard => {
                    let first = testimony.evidence.first().cloned().unwrap_or_default();
                    lines.push(format!("{name}: {first}"));
                }
            }
        }
        // One that was there before the set refuses it before anything is touched.
        let plugged = self.doc.uncovered_disks.iter().find(|disk| !disk.excluded);
        if let Some(disk) = plugged {
            lines.push(format!("{}: {}", disk.device, disk.why));
        }
        // By VSS's list a writer failed; that everything else agrees says that writes were held without it.
        let others = [&witnesses.filesystems, &witnesses.time, &witnesses.host];
        let vetoed = self.window.stock_frozen
            && others.iter().all(|other| other.value == Word::Agrees)
            && witnesses.writers.value == Word::Disagrees;
        let code = if vetoed {
            ReasonCode::WriterVeto
        } else if broken {
            ReasonCode::HoldBroken
        } else if plugged.is_some() {
            ReasonCode::VmDisturbed
        } else {
            ReasonCode::LevelNotReached
        };
        let asked = self.doc.level_asked;
        let text = format!("reached {reached}, asked {asked}: {}", lines.join("; "));
        let failure = Failure::new(code, text);
        if broken || plugged.is_some() {
            failure.retryable()
        } else {
            failure
        }
    }

    /// What its level means for the reader of a copy.
    fn note_level(&mut self, reached: Level) {
        const MEANINGS: [(Level, &str); 3] = [
            (
                Level::Application,
                "applications without a writer are only as consistent as a crash; so are writers that were left out",
            ),
            (
                Level::Filesystem,
                "file systems are consistent; all applications are only as consistent as a crash",
            ),
            (
                Level::Crash,
                "everything is only as consistent as after a power cut",
            ),
        ];
        let notes = &mut self.doc.notes;
        for (level, means) in MEANINGS {
            // Of a level that it was lowered from, too.
            notes.retain(|note| note != means);
            if level == reached {
                notes.push(means.to_owned());
            }
        }
    }

    /// What the reader of a copy has to know about its scope.
    fn note_scope(&mut self) {
        let notes = &mut self.doc.notes;
        if !self.doc.request.components.is_empty() {
            notes.push(
                "only the components that were picked are in it; their writers alone were asked to hold"
                    .to_owned(),
            );
        }
        if let Some(said) = self.doc.qemu_guest_agent.as_ref()
            && self.window.stock_frozen
        {
            notes.push(match said.system {
                StockSystem::Unix => "frozen by QEMU's own agent: no writers, no word of single file systems, no clock and no dead-man in the guest"
                    .to_owned(),
                StockSystem::Windows => "frozen by QEMU's own agent through VSS: VSS's writers say by their state after the thaw that they took part, not what they held; they heard of the backup's end at the thaw, before this verdict"
                    .to_owned(),
            });
        }
        for record in self.doc.writers.iter().filter(|record| record.in_scope) {
            let components = record.metadata().into_iter().flat_map(|m| &m.components);
            for component in components.filter(|component| component.backup_recovery) {
                notes.push(format!(
                    "{} of writer {} asks to be recovered in the copy, which is read-only: it recovers where the copy is started",
                    component.name, record.instance_id
                ));
            }
        }
        let covered = self.plan.as_ref().map(Plan::serials).unwrap_or_default();
        for record in &self.doc.filesystems {
            let extents = record.identify.iter().flat_map(|info| &info.extents);
            let (inside, outside): (Vec<_>, Vec<_>) =
                extents.partition(|extent| covered.contains(&extent.serial));
            // A logical volume, or btrfs, of several disks.
            if let (Some(_), Some(other)) = (inside.first(), outside.first()) {
                let other = if other.serial.is_empty() {
                    &other.disk
                } else {
                    &other.serial
                };
                notes.push(format!(
                    "{} lies on disk {other}, too, which is not in the set: what the copies have of it is not whole",
                    record.mountpoint
                ));
            }
        }
        for mountpoint in &self.doc.request.exclude_filesystems {
            notes.push(format!(
                "{mountpoint} was left out by the requester: its content is only as consistent as a crash"
            ));
        }
    }

    pub(super) async fn keep(&mut self) -> Result<(), Failure> {
        let set = self.doc.set;
        // From the first `keep` on the requester's wish comes too late; only a failure undoes.
        let kept = all(&self.daemons, self.limits.keep, |_| SnapshotSetKeep { set }).await;
        kept?;
        let Some(plan) = &self.plan else {
            return Err(internal("no plan"));
        };
        self.doc.copies = copies(plan, &self.window.commits);
        self.doc.outcome = Outcome::Kept;
        if let Err(error) = self.state.store(self.doc) {
            self.doc.copies.clear();
            self.doc.outcome = Outcome::Open;
            return Err(Failure::new(ReasonCode::StateDirectory, chain(&error)));
        }
        // Not said before: recovery undoes what the stores keep without a record of it.
        self.passed(Step::Kept);
        Ok(())
    }

    /// Tells the writers and completes the record.
    pub(super) async fn finish(&mut self) -> Result<(), Failure> {
        if self.window.frozen.is_some()
            && let Some(guest) = self.guest.clone()
            && let Guest::Native(guest) = guest.as_ref()
        {
            self.tell_writers(guest).await?;
        }
        self.doc.finished = true;
        self.passed(Step::Finished);
        if let Err(error) = self.state.store(self.doc) {
            // The durable record says kept; only what writers said afterwards is missing there.
            let text = format!("the record lacks post-snapshot: {}", chain(&error));
            self.doc.notes.push(text);
        }
        Ok(())
    }

    /// The set is kept if they cannot be told; one that answers that it failed lowers the level.
    async fn tell_writers(&mut self, guest: &GuestClient) -> Result<(), Failure> {
        // Only an application-consistent copy may let a writer believe that it was backed up (and truncate logs).
        let kept = self.doc.level_reached == Some(Level::Application);
        // With any other type a writer may truncate its logs once the backup is complete. That is for the requester to
        // say, who has not read a byte yet.
        let waits = kept && self.doc.request.backup_type != BackupType::Copy;
        let post = PostSnapshot {
            set: self.doc.set.to_string(),
            kept,
            snapshots: self.doc.copies.iter().map(snapshot_of_disk).collect(),
            mount: None,
            detached: waits,
        };
        let said = match guest.post_snapshot(post, self.limits.post).await {
            Ok(said) => said,
            // Writers were asked, and nobody knows what they said.
            Err(GuestError::Refused(error)) if kept => {
                return self
                    .lower(guest, vec![error.to_string()], error.retryable)
                    .await;
            }
            Err(error) => {
                let text = format!("writers were not told that the set is kept: {error}");
                self.doc.notes.push(text);
                // Or they were, and their answer is lost: then they wait for the end of the backup.
                self.doc.awaits_backup = waits;
                return Ok(());
            }
        };
        let failed: Vec<WriterReport> = said
            .writers
            .iter()
            .filter(|report| witness::failed_at_post_snapshot(report) && self.is_in_scope(report))
            .cloned()
            .collect();
        record(self.doc, said, |record, said| record.post = Some(said));
        if !kept {
            // They heard `abort`: nothing is called consistent for their sake.
            return Ok(());
        }
        if !failed.is_empty() {
            let mut failures = failed.iter().filter_map(|report| report.failure.as_ref());
            let retryable = failures.all(|failure| failure.code.is_retryable());
            let objections = failed.iter().map(witness::objection_after_snapshot);
            return self.lower(guest, objections.collect(), retryable).await;
        }
        if waits {
            self.doc.awaits_backup = true;
            return Ok(());
        }
        let outcome = BackupComplete {
            set: self.doc.set.to_string(),
            succeeded: true,
            ..BackupComplete::default()
        };
        match guest.backup_complete(outcome, self.limits.post).await {
            Ok(said) => {
                record(self.doc, said, |record, said| record.complete = Some(said));
                self.doc.backup_succeeded = Some(true);
            }
            Err(error) => self.doc.notes.push(format!(
                "writers were not told that the backup is complete: {error}"
            )),
        }
        Ok(())
    }

    fn is_in_scope(&self, report: &WriterReport) -> bool {
        let mut writers = self.doc.writers.iter();
        writers.any(|record| record.in_scope && record.instance_id == report.instance_id)
    }

    /// Writers failed after the set was kept, or may have. It goes on under the name that is left, or ends; either way no writer is told any more
    /// that it was backed up.
    async fn lower(
        &mut self,
        guest: &GuestClient,
        objections: Vec<String>,
        retryable: bool,
    ) -> Result<(), Failure> {
        self.doc.witnesses.hear_post_snapshot(objections);
        let reached = self.level_reached();
        self.doc.level_reached = Some(reached);
        self.note_level(reached);
        let failure = self.below(reached);
        if self.doc.request.best_effort {
            // Before the guest is waited for: a bridge that dies meanwhile must not leave the higher level behind.
            if let Err(error) = self.state.store(self.doc) {
                self.doc.outcome = Outcome::Open;
                return Err(Failure::new(ReasonCode::StateDirectory, chain(&error)));
            }
            let set = self.doc.set.to_string();
            let aborted = guest.abort(set, failure.message, self.limits.abort).await;
            if let Err(error) = aborted {
                let text = format!("writers were not told that the level was lowered: {error}");
                self.doc.notes.push(text);
            }
            return Ok(());
        }
        let failure = Failure {
            code: ReasonCode::WriterVeto,
            retryable,
            ..failure
        };
        // Before anything is deleted: the record of a bridge that dies in between must not say `kept`.
        self.doc.outcome = Outcome::Open;
        self.doc.reason = Some(self.reason(&failure));
        if let Err(error) = self.state.store(self.doc) {
            let text = format!("the record still says kept: {}", chain(&error));
            self.doc.notes.push(text);
        }
        Err(failure)
    }
}

fn snapshot_of_disk(copy: &Copy) -> SnapshotOfDisk {
    SnapshotOfDisk {
        serial: copy.serial.clone(),
        snapshot: copy.snapshot.to_string(),
    }
}

/// Keeps what writers said after the snapshot; what failed is noted too.
pub(crate) fn record(
    document: &mut SetDocument,
    said: WritersSaid,
    mut keep: impl FnMut(&mut WriterRecord, WriterReport),
) {
    for report in said.writers {
        if let Some(failure) = &report.failure {
            let text = format!(
                "writer {} failed after the snapshot: {}",
                report.name, failure.message
            );
            if !document.notes.contains(&text) {
                document.notes.push(text);
            }
        }
        if let Some(record) = document.writer(&report.instance_id) {
            keep(record, report);
        }
    }
}
