//! The steps from identify to thaw.
//!
//! Called by `run`. Invariant: from the sending of `freeze` until the answer to `thaw` nothing here writes to disk or
//! waits for anything but the peers, each within what is left of the window.

use super::super::document::{ReasonCode, StorageTimes};
use super::super::level::Level;
use super::super::plan::Plan;
use super::super::step::Step;
use super::super::witness::DaemonCommit;
use super::Run;
use super::daemons::{all, exempt_of};
use super::failure::{Failure, guest_failure, internal, vm_failure};
use super::left_out::without_places;
use super::watch::end_with_port;
use crate::guest::{AgentAddress, Guest};
use guest_agent_wire::host::{
    Freeze, Frozen, Identified, Prepare, Prepared, Thawed, WRITER_MS_MAX, WriterComponents,
};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use vhost_blk_wire::command::{
    SnapshotSetCommit, SnapshotSetCommitted, SnapshotSetHold, SnapshotSetMark, SnapshotSetPrepare,
    SnapshotSetRelease,
};

/// What was said and measured inside the window.
#[derive(Default)]
pub(super) struct Window {
    pub(super) identified: Option<Identified>,
    pub(super) prepared: Option<Prepared>,
    pub(super) frozen: Option<Frozen>,
    pub(super) thawed: Option<Thawed>,
    pub(super) thaw_failure: Option<String>,
    /// What the failure of the thaw means; a broken hold if nothing else is known.
    pub(super) thaw_code: Option<ReasonCode>,
    /// QEMU's own agent froze the guest.
    pub(super) stock_frozen: bool,
    pub(super) freeze_sent: Option<Instant>,
    pub(super) hold_start: Option<Instant>,
    /// What was left of the hold when the mark was sent.
    pub(super) left_at_mark: Duration,
    pub(super) thaw_sent: Option<Instant>,
    pub(super) thaw_answered: Option<Instant>,
    pub(super) commits: Vec<DaemonCommit>,
}

impl Window {
    /// The guest was frozen by its agent's word.
    pub(super) fn was_frozen(&self) -> bool {
        self.frozen.is_some() || self.stock_frozen
    }
}

impl Run<'_> {
    pub(super) async fn identify(&mut self) -> Result<(), Failure> {
        let Some(vm) = &self.vm else {
            return Err(internal("no monitor"));
        };
        self.watch
            .race(vm.running())
            .await?
            .map_err(|e| vm_failure(&e))?;
        let Some(agent) = self.doc.vm.agent.clone() else {
            let text = "no agent socket is known for this VM";
            return Err(Failure::new(ReasonCode::AgentUnreachable, text));
        };
        let limits = self.limits;
        if self.guest.is_none() {
            let port = match &agent {
                AgentAddress::Serial(socket) => self
                    .watch
                    .race(vm.port_behind(socket))
                    .await?
                    .map_err(|e| vm_failure(&e))?,
                AgentAddress::Vsock { .. }
                | AgentAddress::HybridVsock { .. }
                | AgentAddress::Qga(_) => None,
            };
            let guest = self
                .watch
                .race(Guest::connect(&agent, limits.hello))
                .await?
                .map_err(|e| guest_failure(&e))?;
            let guest = Arc::new(guest);
            if let Some(port) = port {
                end_with_port(vm.subscribe(), port, &guest);
            }
            self.guest = Some(guest);
        }
        let guest = match self.guest.clone() {
            Some(guest) => guest,
            None => return Err(internal("no agent")),
        };
        let guest = match guest.as_ref() {
            Guest::Native(guest) => guest,
            Guest::Stock(guest) => return self.identify_stock(guest).await,
        };
        let identified = self
            .watch
            .race(guest.identify(limits.identify))
            .await?
            .map_err(|e| guest_failure(&e))?;
        for info in &identified.writers {
            if let Some(record) = self.doc.writer(&info.instance_id) {
                record.identify = Some(info.clone());
            }
        }
        for info in &identified.filesystems {
            if let Some(record) = self.doc.filesystem(&info.mountpoint) {
                record.identify = Some(info.clone());
            }
        }
        self.window.identified = Some(identified);
        Ok(())
    }

    pub(super) async fn prepare_guest(&mut self, level: Level) -> Result<(), Failure> {
        let request = &self.doc.request;
        let mut exclude_writers = request.exclude_writers.clone();
        if level < Level::Application {
            // No writer is asked for a level that promises nothing about applications (VSS: NO_WRITERS).
            let writers = self.window.identified.iter().flat_map(|i| i.writers.iter());
            exclude_writers.extend(writers.map(|writer| writer.instance_id.clone()));
        }
        let components = if level < Level::Application {
            Vec::new()
        } else {
            self.components()?
        };
        let prepare = Prepare {
            set: self.doc.set.to_string(),
            backup_type: request.backup_type,
            disks: self.plan.as_ref().map(Plan::serials).unwrap_or_default(),
            exclude_writers,
            limit_ms: u64::try_from(self.limits.prepare.as_millis()).unwrap_or(u64::MAX),
            component_mode: !components.is_empty(),
            components,
            partial_files: request.partial_files,
            bootable_system_state: request.bootable_system_state,
        };
        let Some(guest) = self.guest.clone() else {
            return Err(internal("no agent"));
        };
        let guest = match guest.as_ref() {
            Guest::Native(guest) => guest,
            Guest::Stock(_) => return self.prepare_stock(level),
        };
        self.guest_touched = true;
        // The agent ends it at the limit; the margin lets its answer arrive and tell which writer it was.
        let limit = self.limits.prepare + self.limits.query;
        let result = self.watch.race(guest.prepare(prepare, limit)).await?;
        let prepared = match result {
            Ok(prepared) => prepared,
            Err(error) => {
                self.note_refusal(&error, Step::Prepared);
                return Err(guest_failure(&error));
            }
        };
        for record in &mut self.doc.writers {
            record.in_scope = false;
        }
        for report in &prepared.writers {
            if let Some(record) = self.doc.writer(&report.instance_id) {
                record.in_scope = true;
                record.prepare = Some(report.clone());
            }
        }
        for report in &prepared.left_out {
            if let Some(record) = self.doc.writer(&report.instance_id) {
                record.prepare = Some(report.clone());
            }
        }
        self.window.prepared = Some(prepared);
        Ok(())
    }

    /// The components that the requester picked, and those that must come with them.
    fn components(&self) -> Result<Vec<WriterComponents>, Failure> {
        let mut all = self.doc.request.components.clone();
        for record in &self.doc.writers {
            let added = record.must_come(&self.doc.request.components);
            let added = added.map_err(|error| {
                let text = format!("writer {}: {error}", record.instance_id);
                Failure::new(ReasonCode::BadRequest, text)
            })?;
            if !added.is_empty() {
                all.push(WriterComponents {
                    writer: record.instance_id.clone(),
                    components: added,
                });
            }
        }
        Ok(all)
    }

    pub(super) async fn prepare_storage(&mut self) -> Result<(), Failure> {
        if self.storage_prepared {
            return Ok(());
        }
        self.storage_touched = true;
        let (set, method) = (self.doc.set, self.doc.request.method);
        let limit = self.limits.prepare;
        let work = all(&self.daemons, limit, |part| SnapshotSetPrepare {
            set,
            volumes: part.volumes.iter().map(|v| v.volume.clone()).collect(),
            method,
        });
        self.watch.race(work).await??;
        self.storage_prepared = true;
        Ok(())
    }

    pub(super) async fn freeze(&mut self) -> Result<(), Failure> {
        let (Some(guest), Some(vm)) = (self.guest.clone(), &self.vm) else {
            return Err(internal("no agent"));
        };
        let freeze = Freeze {
            set: self.doc.set.to_string(),
            hold_ms: self.limits.hold_ms,
            writer_ms: self.limits.writer_ms,
            exclude_filesystems: self.doc.request.exclude_filesystems.clone(),
        };
        self.guest_touched = true;
        // Preparation may have taken minutes: ask again, on the connection whose events are watched from here on, so that
        // a stop before it is seen in the answer and one after it as an event.
        self.watch.events = Some(vm.subscribe());
        self.watch
            .race(async {
                vm.running().await?;
                vm.not_migrating().await
            })
            .await?
            .map_err(|e| vm_failure(&e))?;
        let guest = match guest.as_ref() {
            Guest::Native(guest) => guest,
            Guest::Stock(guest) => return self.freeze_stock(guest).await,
        };
        let sent = Instant::now();
        self.window.freeze_sent = Some(sent);
        // The agent gives up at the limit by its own clock; the margin lets its answer arrive and tell who was late.
        let limit = Duration::from_millis(self.limits.writer_ms) + self.limits.query;
        let result = self.watch.race(guest.freeze(freeze, limit)).await?;
        let answered = Instant::now();
        let frozen = match result {
            Ok(frozen) => frozen,
            Err(error) => {
                self.note_refusal(&error, Step::Frozen);
                return Err(guest_failure(&error));
            }
        };
        self.window.hold_start = Some(hold_start(sent, answered, &frozen));
        for report in &frozen.writers {
            if let Some(record) = self.doc.writer(&report.instance_id) {
                record.freeze = Some(report.clone());
            }
        }
        for report in &frozen.filesystems {
            if let Some(record) = self.doc.filesystem(&report.mountpoint) {
                record.freeze = Some(report.clone());
            }
        }
        self.doc.exempt.clone_from(&frozen.exempt);
        self.doc.not_to_snapshot = frozen.not_to_snapshot.as_deref().map(without_places);
        self.window.frozen = Some(frozen);
        self.hold_left().map(drop)
    }

    /// What is left of the host's hold, or the failure that it is used up.
    pub(super) fn hold_left(&self) -> Result<Duration, Failure> {
        let limit = Duration::from_millis(self.limits.hold_ms);
        let used = self
            .window
            .hold_start
            .map_or(Duration::ZERO, |start| start.elapsed());
        match limit.checked_sub(used) {
            Some(left) if left >= Duration::from_millis(1) => Ok(left),
            Some(_) | None => Err(Failure::new(
                ReasonCode::HoldWritesTimeout,
                format!(
                    "writes were held for {} ms before the commit",
                    used.as_millis()
                ),
            )
            .retryable()),
        }
    }

    pub(super) async fn mark(&mut self) -> Result<(), Failure> {
        let set = self.doc.set;
        let exempt = self
            .window
            .frozen
            .as_ref()
            .map_or(&[][..], |frozen| frozen.exempt.as_slice());
        let left = self.hold_left()?;
        // The daemons count from their mark, which comes after this moment.
        self.window.left_at_mark = left;
        let marking = all(&self.daemons, left, |part| SnapshotSetMark {
            set,
            exempt: exempt_of(part, exempt),
        });
        self.watch.race(marking).await??;
        if self.plan.as_ref().is_some_and(Plan::holds_across_daemons) {
            let left = self.hold_left()?;
            let limit_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
            let holding = all(&self.daemons, left, |_| SnapshotSetHold { set, limit_ms });
            self.watch.race(holding).await??;
        }
        Ok(())
    }

    pub(super) async fn commit(&mut self) -> Result<(), Failure> {
        let set = self.doc.set;
        let left = self.hold_left()?;
        let limit_ms = u64::try_from(self.window.left_at_mark.as_millis()).unwrap_or(u64::MAX);
        let committing = all(&self.daemons, left, |_| SnapshotSetCommit { set, limit_ms });
        let answers: Vec<SnapshotSetCommitted> = self.watch.race(committing).await??;
        self.hold_left()?;
        if self.plan.as_ref().is_some_and(Plan::holds_across_daemons) {
            let releasing = all(&self.daemons, left, |_| SnapshotSetRelease { set });
            self.watch.race(releasing).await??;
        }
        self.doc.timings.storage.clear();
        for (daemon, committed) in self.daemons.iter().zip(answers) {
            self.doc.timings.storage.push(StorageTimes {
                control: daemon.part.control.clone(),
                drain_us: committed.drain_us,
                record_us: committed.record_us,
                hold_us: committed.hold_us,
                since_mark_us: committed.since_mark_us,
            });
            self.window.commits.push(DaemonCommit {
                control: daemon.part.control.display().to_string(),
                volumes: daemon
                    .part
                    .volumes
                    .iter()
                    .map(|v| v.volume.clone())
                    .collect(),
                committed,
            });
        }
        Ok(())
    }

    /// Thaws. Never interrupted, and no failure: what the agent says, or that it says nothing, goes to the verdict.
    pub(super) async fn thaw(&mut self) {
        let Some(guest) = self.guest.clone() else {
            return;
        };
        let limit = Duration::from_millis(self.limits.writer_ms);
        let used = self
            .window
            .freeze_sent
            .map_or(Duration::ZERO, |start| start.elapsed());
        // A late answer refuses the set all the same, but it tells more than silence.
        let limit = limit.saturating_sub(used) + self.limits.query;
        let guest = match guest.as_ref() {
            Guest::Native(guest) => guest,
            Guest::Stock(guest) => return self.thaw_stock(guest, limit).await,
        };
        let Some(frozen) = &self.window.frozen else {
            return;
        };
        let set = self.doc.set.to_string();
        self.window.thaw_sent = Some(Instant::now());
        let result = guest.thaw(set, frozen.generation, limit).await;
        self.window.thaw_answered = Some(Instant::now());
        match result {
            Ok(thawed) => {
                for report in &thawed.writers {
                    if let Some(record) = self.doc.writer(&report.instance_id) {
                        record.thaw = Some(report.clone());
                    }
                }
                for report in &thawed.filesystems {
                    if let Some(record) = self.doc.filesystem(&report.mountpoint) {
                        record.thaw = Some(report.clone());
                    }
                }
                self.window.thawed = Some(thawed);
            }
            Err(error) => {
                self.note_refusal(&error, Step::Thawed);
                self.window.thaw_failure = Some(error.to_string());
            }
        }
    }
}

/// The latest moment at which the first file system can have been frozen, by the host's clock, is not known here; the
/// earliest is. The answer tells how long writers and file systems took by the guest's clock. Whatever the guest's clock did
/// not count (a pause, a slow port) is charged to the hold: it starts when the writers' share after the sending is over, and
/// never later than the file systems' share before the answer.
pub(super) fn hold_start(sent: Instant, answered: Instant, frozen: &Frozen) -> Instant {
    let after_writers = sent + Duration::from_millis(frozen.writers_ms.min(WRITER_MS_MAX));
    let before_answer = answered
        .checked_sub(Duration::from_millis(
            frozen.filesystems_ms.min(WRITER_MS_MAX),
        ))
        .unwrap_or(sent);
    after_writers.min(before_answer).max(sent)
}
