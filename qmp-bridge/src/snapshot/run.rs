//! Makes a set: executes the steps, watches the clocks and the VM, undoes in reverse when anything fails.
//!
//! Called by `sets::create`. Invariants: the record is durable before anything is touched; from the sending of `freeze`
//! until the answer to `thaw` nothing is written to disk or to a terminal here; whatever fails or is cancelled before
//! `keep`, nothing is kept; the outcome `kept` is durable before the writers are told, and a set that one of them then
//! objects to is kept under a lower name or deleted.

mod daemons;
mod ending;
mod failure;
mod left_out;
mod stock;
mod undoing;
mod watch;
mod window;

use super::document::{Attempt, Reason, ReasonCode, SetDocument, StepTime};
use super::intent::StateDirectory;
use super::level::Level;
use super::plan::{DaemonVolumes, Plan, PlanError, plan};
use super::step::{FaultPoint, Step};
use crate::guest::Guest;
use crate::storage::{StorageClient, StorageError};
use crate::vm::{Vm, VmError};
use daemons::Daemon;
pub(crate) use ending::record;
use failure::{Failure, can_go_lower, failure_is_of_writers, unreachable_or, vm_failure};
use guest_agent_wire::host::{HOLD_MS_MAX, POST_SNAPSHOT_MS, WRITER_MS_MAX};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch as channel};
use tokio::time::Instant;
use watch::Watch;
use window::Window;

/// Longest time of each kind of call. COORDINATION.md argues them.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// To connect to vhost-blk and QEMU, and for each QMP query.
    pub query: Duration,
    /// Until the agent answers `hello`.
    pub hello: Duration,
    /// The same when only its clean-up is at stake.
    pub hello_again: Duration,
    /// For `identify`.
    pub identify: Duration,
    /// For the preparation in the guest, and again at the stores.
    pub prepare: Duration,
    /// From the first frozen file system to the sending of `thaw`.
    pub hold_ms: u64,
    /// From the sending of `freeze` to the answer to `thaw`.
    pub writer_ms: u64,
    /// For `keep`.
    pub keep: Duration,
    /// For each part of an undoing.
    pub abort: Duration,
    /// For post-snapshot.
    pub post: Duration,
    /// For pre-restore and post-restore.
    pub restore: Duration,
}

/// For an agent to answer when the last of its writers has, or is late.
const ANSWER_MS: u64 = 30_000;

impl Default for Limits {
    fn default() -> Self {
        Self {
            query: Duration::from_secs(5),
            hello: Duration::from_secs(30),
            hello_again: Duration::from_secs(5),
            identify: Duration::from_secs(60),
            prepare: Duration::from_secs(600),
            hold_ms: HOLD_MS_MAX,
            writer_ms: WRITER_MS_MAX,
            keep: Duration::from_secs(60),
            abort: Duration::from_secs(10),
            post: Duration::from_millis(POST_SNAPSHOT_MS + ANSWER_MS),
            restore: Duration::from_secs(1_860),
        }
    }
}

impl Limits {
    /// With what a requester asks, which can only shorten the window.
    #[must_use]
    pub fn for_request(mut self, request: &super::document::CreateRequest) -> Self {
        if let Some(hold_ms) = request.hold_limit_ms {
            self.hold_ms = self.hold_ms.min(hold_ms);
        }
        if let Some(writer_ms) = request.writer_limit_ms {
            self.writer_ms = self.writer_ms.min(writer_ms);
        }
        if let Some(prepare_ms) = request.prepare_limit_ms {
            self.prepare = Duration::from_millis(prepare_ms);
        }
        self
    }
}

/// What surrounds a run.
#[derive(Debug)]
pub struct Surroundings {
    /// Limits.
    pub limits: Limits,
    /// Where a test wants to kill this process.
    pub faults: FaultPoint,
    /// Who wants to hear of each step. Never waited for.
    pub progress: mpsc::UnboundedSender<StepTime>,
    /// Turns true when the requester has gone or has cancelled.
    pub cancel: channel::Receiver<bool>,
}

/// Makes the set that `document` describes, and ends the record. The caller holds the VM's lock and has stored the
/// record as open.
pub async fn make(state: &StateDirectory, document: &mut SetDocument, around: Surroundings) {
    let mut run = Run {
        state,
        limits: around.limits.for_request(&document.request),
        doc: document,
        faults: around.faults,
        progress: around.progress,
        watch: Watch {
            cancel: around.cancel,
            events: None,
            disturbances: Vec::new(),
        },
        began: Instant::now(),
        last_step: Instant::now(),
        now_at: Step::Intent,
        plan: None,
        vm: None,
        daemons: Vec::new(),
        guest: None,
        guest_touched: false,
        storage_touched: false,
        storage_prepared: false,
        window: Window::default(),
    };
    run.passed(Step::Intent);
    let result = run.all().await;
    if let Err(failure) = result {
        run.fail(failure).await;
    }
}

struct Run<'a> {
    state: &'a StateDirectory,
    doc: &'a mut SetDocument,
    limits: Limits,
    faults: FaultPoint,
    progress: mpsc::UnboundedSender<StepTime>,
    watch: Watch,
    began: Instant,
    last_step: Instant,
    /// The step that is under way.
    now_at: Step,
    plan: Option<Plan>,
    vm: Option<Vm>,
    daemons: Vec<Daemon>,
    guest: Option<Arc<Guest>>,
    guest_touched: bool,
    storage_touched: bool,
    storage_prepared: bool,
    window: Window,
}

impl Run<'_> {
    async fn all(&mut self) -> Result<(), Failure> {
        self.now_at = Step::Identified;
        let attempts = self.find_disks().await?;
        let mut left = attempts.into_iter().peekable();
        while let Some(level) = left.next() {
            match self.attempt(level).await {
                Ok(()) => break,
                Err(failure)
                    if left.peek().is_some()
                        && self.now_at <= Step::Frozen
                        && self.now_at != Step::StoragePrepared
                        && can_go_lower(failure.code) =>
                {
                    self.leave_guest(&failure.message).await;
                    self.doc.attempts.push(Attempt {
                        level,
                        reason: self.reason(&failure),
                    });
                    // A failure of the writers alone leaves the file systems to be frozen; anything else in the guest, or the
                    // guest itself, leaves what needs no guest.
                    if level == Level::Application && !failure_is_of_writers(failure.code) {
                        left.next_if_eq(&Level::Filesystem);
                    }
                }
                Err(failure) => return Err(failure),
            }
        }
        self.now_at = Step::Verdict;
        self.verdict().await?;
        self.passed(Step::Verdict);
        self.now_at = Step::Kept;
        self.keep().await?;
        self.leave_out().await;
        self.now_at = Step::Finished;
        self.finish().await
    }

    /// Connects to the stores and to QEMU, and makes the plan.
    async fn find_disks(&mut self) -> Result<Vec<Level>, Failure> {
        let mut found = Vec::new();
        let mut clients = Vec::new();
        for control in self.doc.vm.vhost_blk.clone() {
            let limit = self.limits.query;
            let connecting = async {
                let client = StorageClient::connect(&control, limit).await?;
                let volumes = client.volumes(limit).await?;
                Ok((client, volumes))
            };
            let (client, volumes) = self
                .watch
                .race(connecting)
                .await?
                .map_err(|e: StorageError| unreachable_or(&e, ReasonCode::ProviderUnreachable))?;
            clients.push(Arc::new(client));
            found.push(DaemonVolumes { control, volumes });
        }
        let qmp = self.doc.vm.qmp.clone();
        let limit = self.limits.query;
        let asking = async {
            let vm = Vm::connect(&qmp, limit).await?;
            vm.not_migrating().await?;
            let disks = vm.disks().await?;
            Ok((vm, disks))
        };
        let (vm, disks) = self
            .watch
            .race(asking)
            .await?
            .map_err(|e: VmError| vm_failure(&e))?;
        self.vm = Some(vm);
        let plan = plan(&self.doc.request, &disks, &found).map_err(|error| {
            let code = match error {
                PlanError::NotCovered { .. } => ReasonCode::DiskNotCovered,
                PlanError::Poisoned(_) => ReasonCode::ProviderVeto,
                PlanError::NoSuchDisk(_)
                | PlanError::NoDisks
                | PlanError::TooMany(_)
                | PlanError::SameSerial(_) => ReasonCode::BadRequest,
            };
            Failure::new(code, error.to_string())
        })?;
        for part in &plan.parts {
            for client in &clients {
                if client.control() == part.control {
                    self.daemons.push(Daemon {
                        client: Arc::clone(client),
                        part: part.clone(),
                    });
                }
            }
        }
        self.doc.uncovered_disks = plan.uncovered.clone();
        if let Some(why) = &plan.lowered_by {
            self.doc
                .notes
                .push(format!("application level is out of reach: {why}"));
        }
        let attempts = plan.attempts.clone();
        self.plan = Some(plan);
        Ok(attempts)
    }

    /// One try at a level, up to the thaw.
    async fn attempt(&mut self, level: Level) -> Result<(), Failure> {
        self.window = Window::default();
        self.now_at = Step::Identified;
        match level {
            Level::Crash => self.passed(Step::Identified),
            Level::Application | Level::Filesystem => {
                self.identify().await?;
                self.passed(Step::Identified);
                self.now_at = Step::Prepared;
                self.prepare_guest(level).await?;
                self.passed(Step::Prepared);
            }
        }
        self.now_at = Step::StoragePrepared;
        self.prepare_storage().await?;
        self.passed(Step::StoragePrepared);
        if level > Level::Crash {
            self.now_at = Step::Frozen;
            self.freeze().await?;
            self.passed(Step::Frozen);
        }
        self.now_at = Step::Marked;
        self.mark().await?;
        self.passed(Step::Marked);
        self.now_at = Step::Committed;
        self.commit().await?;
        self.passed(Step::Committed);
        if level > Level::Crash {
            self.now_at = Step::Thawed;
            self.thaw().await;
            self.passed(Step::Thawed);
        }
        Ok(())
    }

    /// Records and announces that a step is over.
    fn passed(&mut self, step: Step) {
        let now = Instant::now();
        let time = StepTime {
            step,
            at_ms: milliseconds(now.saturating_duration_since(self.began)),
            took_ms: milliseconds(now.saturating_duration_since(self.last_step)),
        };
        self.last_step = now;
        self.doc.timings.steps.push(time);
        // Nobody has to be listening.
        self.progress.send(time).ok();
        self.faults.passed(step);
    }

    fn reason(&self, failure: &Failure) -> Reason {
        Reason {
            code: failure.code,
            message: failure.message.clone(),
            step: self.now_at,
            retryable: failure.retryable,
        }
    }
}

fn milliseconds(duration: Duration) -> f64 {
    // To the microsecond: what is below says nothing here.
    #[allow(
        clippy::cast_precision_loss,
        reason = "exact below 2^52 microseconds, 142 years"
    )]
    let microseconds = duration.as_micros() as f64;
    microseconds / 1000.0
}
