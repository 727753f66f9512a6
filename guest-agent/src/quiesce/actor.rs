//! The one thread that owns a set: takes requests, runs the steps, undoes them.
//!
//! Started by `main`; everybody else speaks to it through `service`. It never waits without an end, and answers `status` in
//! the middle of every step. Invariants: after any failure everything is thawed and every involved writer aborted before the
//! answer is given; nothing is said to have been held that a file system, a writer or the clock denies.

use super::cause::{Cause, error};
use super::filesystems::{Choice, GRACE_MS, Held};
use super::participant::Participant;
use super::qga_mark::QgaMark;
use super::service::{Answer, Request, Service, Signal};
use super::session::Incomplete;
use super::state::{Effect, Event, Machine, Owner, Phase, Refusal};
use super::step::Step;
use super::words;
use super::writers::{LEVELS, OnFailure};
use crate::clock::{Alarm, BootTime};
use crate::filesystem::not_to_snapshot::{Candidates, KeptOpen};
use crate::filesystem::plan::Sources;
use crate::hold::client::{FromHelper, Holder, Sink};
use crate::hold::ledger;
use crate::hold::message::Tell;
use crate::journal;
use crate::writer::registry::Registry;
use guest_agent_wire::MESSAGE_BYTES_MAX;
use guest_agent_wire::host::{
    AgentError, ErrorCode, Failure, Freeze, Frozen, HOLD_MS_MAX, Hello, Identified,
    PROTOCOL_VERSIONS, Prepare, Prepared, Status, Thawed, WRITER_MS_MAX, WriterInfo,
    common_version,
};
use guest_agent_wire::types::BackupType;
use guest_agent_wire::writer::{self, Reply};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// Name of the set that the QEMU guest agent protocol opens.
const QGA_SET: &str = "guest-fsfreeze";
/// Time for writers to prepare on that path, milliseconds: its clients wait a minute for the freeze.
const QGA_PREPARE_MS: u64 = 30_000;
/// Time for writers after the thaw on that path, milliseconds: the next freeze waits for it.
const QGA_FINISH_MS: u64 = 10_000;

/// Longest outcome: a message but for its envelope.
const ANSWER_BYTES_MAX: usize = MESSAGE_BYTES_MAX - 64;

/// What the administrator chose.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Mount points never frozen.
    pub exclude_filesystems: Vec<String>,
    /// Limit of a freeze by the QEMU guest agent protocol, milliseconds.
    pub qga_hold_ms: u64,
    /// Directory for state, on a tmpfs.
    pub state_dir: PathBuf,
    /// Directory of patterns of files that need not be in a copy.
    pub not_to_snapshot_dir: PathBuf,
    /// Swap is in the copies, too.
    pub keep_swap: bool,
}

/// What a step hears while it waits.
pub(super) enum Heard {
    Helper(Tell, Option<OwnedFd>),
    HelperDied,
    Writer(u64, Result<Reply, Failure>),
    /// The step must end.
    Interrupted(Cause),
    /// The wait is over.
    Late,
}

/// The open set.
#[derive(Default)]
pub(super) struct Set {
    pub(super) name: String,
    pub(super) disks: Vec<String>,
    pub(super) participants: Vec<Participant>,
    /// Component mode: writers of which no component was picked. They have heard prepare-backup.
    pub(super) left_out: Vec<Participant>,
    pub(super) filesystems: Vec<Held>,
    pub(super) hold_ms: u64,
    pub(super) writer_ms: u64,
    pub(super) hold_us: u64,
    pub(super) hold_end: Option<BootTime>,
    pub(super) freeze_asked: bool,
    /// Files that need not be in the copies.
    pub(super) not_to_snapshot: Option<Arc<Candidates>>,
    /// Those of them that were opened while all was frozen.
    pub(super) kept_open: KeptOpen,
    /// Why the hold is lost although it goes on.
    pub(super) broken: Option<Cause>,
}

impl Set {
    /// When the helper must have ended the hold by itself, with some grace.
    pub(super) fn silence_end(&self) -> Option<BootTime> {
        self.hold_end.map(|end| end.plus_ms(GRACE_MS))
    }
}

/// See the file's head.
pub struct Actor {
    pub(super) service: Service,
    signals: Receiver<Signal>,
    /// Names this run of the agent.
    run: String,
    later: VecDeque<(Request, Answer)>,
    pub(super) machine: Machine,
    qga_mark: QgaMark,
    pub(super) registry: Arc<Registry>,
    pub(super) sources: Sources,
    pub(super) settings: Settings,
    pub(super) holder: Holder,
    pub(super) helper_died: bool,
    pub(super) alarm: Arc<Alarm>,
    pub(super) set: Set,
    pub(super) memory: BTreeMap<String, WriterInfo>,
    /// Sets that are kept and wait for their backup to be complete, oldest first.
    pub(super) incomplete: Vec<Incomplete>,
    /// Those whose requester has gone.
    pub(super) orphans: Vec<Incomplete>,
    interrupt: Option<Cause>,
    pub(super) interruptible: bool,
    pub(super) next_event: u64,
    pub(super) pending: BTreeMap<u64, usize>,
    /// What was told about the last set that was undone.
    last_error: Option<AgentError>,
}

impl std::fmt::Debug for Actor {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Actor")
            .field("machine", &self.machine)
            .finish_non_exhaustive()
    }
}

/// Sends what a helper tells to the actor.
#[must_use]
pub fn sink(service: &Service) -> Sink {
    let service = service.clone();
    Box::new(move |message| service.send(Signal::Helper(message)))
}

impl Actor {
    /// Nothing is open yet. `alarm` must be watched by a thread that sends [`Signal::WindowOver`].
    #[must_use]
    pub fn new(
        service: Service,
        signals: Receiver<Signal>,
        registry: Arc<Registry>,
        sources: Sources,
        settings: Settings,
        holder: Holder,
        alarm: Arc<Alarm>,
    ) -> Self {
        let start_us = BootTime::now().as_us();
        // Larger than any generation of an agent that ran earlier in this boot, and exact in a JSON number.
        let mut machine = Machine::new(start_us);
        let qga_mark = QgaMark::find(&settings.state_dir);
        if qga_mark.is_set() {
            machine.begin_broken(Owner::Qga, QGA_SET, "the agent was killed while it held");
        }
        Self {
            service,
            signals,
            run: format!("{}-{start_us}", std::process::id()),
            later: VecDeque::new(),
            machine,
            qga_mark,
            registry,
            sources,
            settings,
            holder,
            helper_died: false,
            alarm,
            set: Set::default(),
            memory: BTreeMap::new(),
            incomplete: Vec::new(),
            orphans: Vec::new(),
            interrupt: None,
            interruptible: false,
            next_event: 0,
            pending: BTreeMap::new(),
            last_error: None,
        }
    }

    /// Runs as long as the process.
    pub fn run(mut self) {
        loop {
            self.shut_down_orphans();
            let signal = match self.later.pop_front() {
                Some((request, answer)) => Signal::Request(request, answer),
                None => match self.signals.recv() {
                    Ok(signal) => signal,
                    Err(_) => return,
                },
            };
            match signal {
                Signal::Request(request, answer) => self.request(request, answer),
                Signal::Helper(FromHelper::Told(Tell::Ended { generation }, _))
                    if generation == self.machine.generation() =>
                {
                    let hold_ms = self.set.hold_ms;
                    self.broke(Cause::DeadMan { hold_ms }, false);
                }
                Signal::Helper(FromHelper::Died(number)) if number == self.holder.number() => {
                    self.helper_died = true;
                    self.broke(Cause::HelperDied, false);
                    self.revive_helper();
                }
                Signal::WriterGone { instance_id, why } => {
                    if let Some(cause) = self.gone_cause(&instance_id, why) {
                        self.broke(cause, true);
                    }
                }
                Signal::WindowOver => {
                    if self.set.silence_end().is_some_and(BootTime::is_past) {
                        self.broke(Cause::HelperDied, false);
                        self.revive_helper();
                    } else if let Some(cause) = self.window_cause() {
                        self.broke(cause, true);
                    }
                }
                Signal::WriterReleased {
                    instance_id,
                    generation,
                    why,
                } => {
                    if let Some(cause) = self.released_cause(&instance_id, generation, why) {
                        self.broke(cause, true);
                    }
                }
                // Answers that came too late for anybody.
                Signal::Helper(_) | Signal::Writer(..) | Signal::WriterProgress { .. } => {}
            }
        }
    }

    /// Waits for one of the things that a step may be waiting for; deals with everything else.
    pub(super) fn wait(&mut self, until: BootTime) -> Heard {
        loop {
            if self.interruptible
                && let Some(cause) = self.interrupt.take()
            {
                return Heard::Interrupted(cause);
            }
            let signal = match self.signals.recv_timeout(until.remaining()) {
                Ok(signal) => signal,
                // The channel's clock does not count a suspended guest, so ask ours.
                Err(RecvTimeoutError::Timeout) if !until.is_past() => continue,
                Err(_) => return Heard::Late,
            };
            match signal {
                Signal::Request(request, answer) => self.request_while_busy(request, answer),
                Signal::Helper(FromHelper::Told(tell, fd)) => return Heard::Helper(tell, fd),
                Signal::Helper(FromHelper::Died(number)) => {
                    if number == self.holder.number() {
                        self.helper_died = true;
                        return Heard::HelperDied;
                    }
                }
                Signal::Writer(number, answer) => return Heard::Writer(number, answer),
                Signal::WriterGone { instance_id, why } => {
                    let cause = self.gone_cause(&instance_id, why);
                    self.interrupt = self.interrupt.take().or(cause);
                }
                Signal::WriterReleased {
                    instance_id,
                    generation,
                    why,
                } => {
                    let cause = self.released_cause(&instance_id, generation, why);
                    self.interrupt = self.interrupt.take().or(cause);
                }
                Signal::WriterProgress { instance_id } => self.progressed(&instance_id),
                Signal::WindowOver => {
                    let cause = self.window_cause();
                    self.interrupt = self.interrupt.take().or(cause);
                }
            }
        }
    }

    fn request_while_busy(&mut self, request: Request, answer: Answer) {
        if matches!(request, Request::QgaThaw) {
            self.give_up_waiting_freezes();
        }
        self.orphan_if_gone(&request);
        let event = match self.event_of(&request) {
            Some(event) => event,
            None => {
                answer(self.reply(&self.status()));
                return;
            }
        };
        match self.step(&event) {
            Ok(Effect::Interrupt) => {
                let cause = match &request {
                    Request::HostGone => Cause::HostGone,
                    Request::Abort { reason, .. } => Cause::Aborted(reason.clone()),
                    Request::Hello { .. } => Cause::Aborted("a new conversation".to_owned()),
                    Request::Identify
                    | Request::Prepare(_)
                    | Request::Freeze(_)
                    | Request::Thaw { .. }
                    | Request::PostSnapshot(_)
                    | Request::BackupComplete(_)
                    | Request::PreRestore(_)
                    | Request::PostRestore(_)
                    | Request::Status
                    | Request::QgaFreeze { .. }
                    | Request::QgaThaw => Cause::Aborted("thawed before it was frozen".to_owned()),
                };
                self.interrupt.get_or_insert(cause);
                self.later.push_back((request, answer));
            }
            Ok(Effect::Later) => self.later.push_back((request, answer)),
            Ok(Effect::Nothing) => {
                if let Request::Hello { versions } = request {
                    answer(self.hello(&versions));
                } else {
                    answer(Ok(json!({})));
                }
            }
            // The machine never starts anything while an operation runs (state/tests.rs).
            Ok(Effect::Run | Effect::Unwind | Effect::Mark) => {
                answer(Err(internal("the agent is busy")));
            }
            Err(Refusal::NotFound) if matches!(request, Request::QgaThaw) => answer(Ok(json!(0))),
            Err(refusal) => answer(Err(self.refused(&refusal))),
        }
    }

    /// A thaw overtakes freezes that wait for the end of something else: nobody would thaw them.
    fn give_up_waiting_freezes(&mut self) {
        let (freezes, others) = std::mem::take(&mut self.later)
            .into_iter()
            .partition(|(request, _)| matches!(request, Request::QgaFreeze { .. }));
        self.later = others;
        let freezes: VecDeque<(Request, Answer)> = freezes;
        for (_, answer) in freezes {
            let cause = Cause::Aborted("thawed before it was frozen".to_owned());
            answer(Err(cause.error()));
        }
    }

    /// Asks the machine, and tells everybody whether anything is frozen now.
    pub(super) fn step(&mut self, event: &Event) -> Result<Effect, Refusal> {
        let effect = self.machine.step(event);
        if !self.machine.owes_qga_a_word() {
            self.qga_mark.clear();
        }
        self.service.publish(self.machine.is_frozen());
        effect
    }

    fn request(&mut self, request: Request, answer: Answer) {
        self.orphan_if_gone(&request);
        let event = self.event_of(&request);
        let effect = match event.map(|event| self.step(&event)) {
            None => {
                answer(self.reply(&self.status()));
                return;
            }
            Some(Err(Refusal::NotFound)) if matches!(request, Request::QgaThaw) => {
                answer(Ok(json!(0)));
                return;
            }
            Some(Err(refusal)) => {
                answer(Err(self.refused(&refusal)));
                return;
            }
            Some(Ok(effect)) => effect,
        };
        match request {
            Request::Hello { versions } => {
                self.unwind_if(effect, || Cause::Aborted("a new conversation".to_owned()));
                answer(self.hello(&versions));
            }
            Request::HostGone => {
                self.unwind_if(effect, || Cause::HostGone);
                answer(Ok(json!({})));
            }
            Request::Abort { set, reason } => {
                if effect == Effect::Run {
                    self.give_up(&set, &reason);
                }
                self.unwind_if(effect, || Cause::Aborted(reason));
                answer(Ok(json!({})));
            }
            Request::Identify => {
                let identified = self.identify();
                self.settle(identified, answer);
            }
            Request::Prepare(prepare) => {
                let prepared = self.prepare(&prepare).and_then(tellable);
                self.settle(prepared, answer);
            }
            Request::Freeze(freeze) => {
                let frozen = self.freeze(&freeze, None).and_then(tellable);
                self.settle(frozen, answer);
            }
            Request::Thaw { .. } => {
                let thawed = self.thaw();
                self.settle(tellable(thawed), answer);
            }
            Request::PostSnapshot(post) => {
                let said = self.finish(&post);
                self.settle(Ok(said), answer);
            }
            Request::BackupComplete(outcome) => match self.complete(&outcome) {
                Some(said) => self.settle(Ok(said), answer),
                None => {
                    self.done();
                    answer(Err(self.refused(&Refusal::NotFound)));
                }
            },
            Request::PreRestore(restore) => {
                let said = self.pre_restore(&restore).and_then(tellable);
                self.settle(said, answer);
            }
            Request::PostRestore(restore) => {
                let said = self.post_restore(&restore);
                self.settle(Ok(said), answer);
            }
            Request::QgaFreeze { only } => self.qga_freeze(only, answer),
            Request::QgaThaw => self.qga_thaw(effect, answer),
            Request::Status => answer(self.reply(&self.status())),
        }
    }

    /// The operation is over: tells the machine, undoes it if it failed, and answers.
    fn settle<T: Serialize>(&mut self, outcome: Result<T, Cause>, answer: Answer) {
        match outcome {
            Ok(value) => {
                self.done();
                answer(self.reply(&value));
            }
            Err(cause) => {
                let failed = self.unwind(&cause);
                answer(Err(failed));
            }
        }
        self.revive_helper();
    }

    pub(super) fn done(&mut self) {
        self.interruptible = false;
        // An event that comes after the last wait of an operation finds the machine in its next phase.
        self.step(&Event::Done).map(drop).unwrap_or(());
        if self.machine.phase() == Phase::Idle {
            self.end_set();
        }
        if let Some(cause) = self.interrupt.take()
            && self.machine.phase() == Phase::Frozen
        {
            self.broke(cause, true);
        }
    }

    /// The hold ended, or lost a writer.
    fn broke(&mut self, cause: Cause, still_frozen: bool) {
        let event = Event::Broken {
            generation: self.machine.generation(),
            still_frozen,
        };
        match self.step(&event) {
            Ok(Effect::Unwind) => {
                self.unwind(&cause);
            }
            Ok(Effect::Mark) => {
                self.release_resident_writers(&cause.to_string());
                self.set.broken.get_or_insert(cause);
            }
            Ok(Effect::Run | Effect::Interrupt | Effect::Later | Effect::Nothing) | Err(_) => {}
        }
    }

    fn unwind_if(&mut self, effect: Effect, cause: impl FnOnce() -> Cause) {
        if effect == Effect::Unwind {
            self.unwind(&cause());
            self.revive_helper();
        }
    }

    /// Thaws and aborts everything; returns the error for the host.
    fn unwind(&mut self, cause: &Cause) -> AgentError {
        self.step(&Event::Unwinding).map(drop).unwrap_or(());
        self.interruptible = false;
        self.interrupt = None;
        self.pending.clear();
        let generation = self.machine.generation();
        self.thaw_filesystems(generation);
        self.abort_writers(&cause.to_string());
        let mut failed = cause.error();
        failed.writers = self.writer_reports(LEVELS.into_iter());
        failed.filesystems = self.reports_after_thaw();
        journal::note(format_args!("set {} undone: {cause}", self.set.name));
        self.last_error = Some(failed.clone());
        self.step(&Event::Unwound(cause.to_string()))
            .map(drop)
            .unwrap_or(());
        self.end_set();
        failed
    }

    fn end_set(&mut self) {
        self.close_filesystems();
        self.dismiss();
        self.set = Set::default();
        self.interrupt = None;
        self.alarm.set(None).unwrap_or(());
        journal::release();
    }

    /// Starts another helper if the last one died; there is nothing to hold in the meantime.
    fn revive_helper(&mut self) {
        if !self.helper_died || self.machine.is_frozen() {
            return;
        }
        match self.holder.restart(sink(&self.service)) {
            Ok(()) => {
                self.helper_died = false;
                // Its ledger names what has been thawed by hand meanwhile.
                ledger::recover(&self.settings.state_dir, &self.sources, Duration::ZERO)
                    .map(drop)
                    .unwrap_or(());
                journal::note(format_args!("started another helper"));
            }
            Err(error) => journal::note(format_args!("no helper: {error}")),
        }
    }

    fn identify(&mut self) -> Result<Identified, Cause> {
        self.interruptible = true;
        // A directory that is refused keeps no other writer from being asked; `prepare` is where it counts.
        self.enlist(&[]).unwrap_or(());
        let who = self.everyone();
        // A writer's failure stands in its own entry.
        if let Err(cause @ (Cause::HostGone | Cause::Aborted(_))) =
            self.round(&who, &Step::Identify, None, OnFailure::GoOn)
        {
            return Err(cause);
        }
        let mut room = words::DOCUMENTS_BYTES_MAX;
        for participant in &mut self.set.participants {
            room = participant.fit_document(room);
        }
        let filesystems = self.find_filesystems()?;
        Ok(Identified {
            writers: self
                .set
                .participants
                .iter()
                .map(Participant::info)
                .collect(),
            filesystems: filesystems.iter().map(|fs| fs.info()).collect(),
            exempt: self.sources.exempt(),
        })
    }

    fn prepare(&mut self, prepare: &Prepare) -> Result<Prepared, Cause> {
        self.interruptible = true;
        if self.is_incomplete(&prepare.set) {
            let why = "a set of this name waits for its backup to be complete";
            return Err(Cause::BadRequest(why.to_owned()));
        }
        let until = BootTime::now().plus_ms(prepare.limit_ms);
        self.set = Set {
            name: prepare.set.clone(),
            disks: prepare.disks.clone(),
            ..Set::default()
        };
        self.enlist(&prepare.exclude_writers)?;
        self.select(prepare)?;
        let step = Step::PrepareBackup(writer::PrepareBackup {
            set: prepare.set.clone(),
            backup_type: prepare.backup_type,
            component_mode: prepare.component_mode,
            components: Vec::new(),
            partial_files: prepare.partial_files,
            bootable_system_state: prepare.bootable_system_state,
            disks: prepare.disks.clone(),
        });
        self.round(&self.everyone(), &step, Some(until), OnFailure::Stop)?;
        self.leave_out();
        let who = self.everyone();
        self.round(&who, &Step::PrepareSnapshot, Some(until), OnFailure::Stop)?;
        // A client of QEMU's protocol could not be told, and waits for its freeze.
        if prepare.set != QGA_SET {
            // It may read much, and leave times of access to be written back.
            self.find_not_to_snapshot(until)?;
        }
        let start = BootTime::now();
        let all = Choice {
            exclude: &[],
            only: None,
        };
        self.open_filesystems(all)?;
        self.sync_filesystems(until)?;
        // Not kept open: nobody could unmount them until the freeze.
        self.close_filesystems();
        Ok(Prepared {
            writers: self.writer_reports(LEVELS.into_iter()),
            left_out: self.set.left_out.iter().map(Participant::report).collect(),
            sync_ms: BootTime::now().ms_since(start),
        })
    }

    fn freeze(&mut self, freeze: &Freeze, only: Option<&[String]>) -> Result<Frozen, Cause> {
        self.interruptible = true;
        let generation = self.machine.generation();
        self.set.hold_ms = freeze.hold_ms;
        self.set.writer_ms = freeze.writer_ms;
        let choice = Choice {
            exclude: &freeze.exclude_filesystems,
            only,
        };
        self.open_filesystems(choice)?;
        let exempt = self.sources.exempt();
        journal::hold();
        let start = BootTime::now();
        self.freeze_writers(generation)?;
        let writers_frozen = BootTime::now();
        self.freeze_filesystems(generation)?;
        self.find_missed(choice)?;
        let not_to_snapshot = self.place_not_to_snapshot();
        Ok(Frozen {
            generation,
            writers: self.writer_reports(LEVELS.into_iter()),
            filesystems: self.reports_after_freeze(),
            exempt,
            not_to_snapshot,
            writers_ms: writers_frozen.ms_since(start),
            filesystems_ms: BootTime::now().ms_since(writers_frozen),
        })
    }

    fn thaw(&mut self) -> Thawed {
        self.interruptible = false;
        let generation = self.machine.generation();
        self.thaw_filesystems(generation);
        self.set.kept_open = KeptOpen::default();
        // Open directories would keep people from unmounting.
        self.holder.close();
        let broken = self.set.broken.clone().or_else(|| self.window_cause());
        if let Some(broken) = &broken {
            // A writer that was let go stays told so; the others end their part by the same word.
            self.abort_writers(&broken.to_string());
        } else {
            self.thaw_writers(generation);
        }
        journal::release();
        let not_held = broken
            .map(|broken| broken.to_string())
            .or_else(|| self.filesystems_not_held())
            .or_else(|| self.writers_not_held());
        Thawed {
            held: not_held.is_none(),
            why_not: not_held.unwrap_or_default(),
            writers: self.writer_reports(LEVELS.into_iter().rev()),
            filesystems: self.reports_after_thaw(),
            hold_ms: self.set.hold_us / 1_000,
        }
    }

    fn writers_not_held(&self) -> Option<String> {
        let mut participants = self.set.participants.iter();
        participants
            .find(|participant| participant.held != Some(true))
            .map(|participant| {
                let why = participant.failure.as_ref();
                let why = why.map_or("it did not say that it held", |failure| &failure.message);
                format!("writer {}: {why}", participant.name())
            })
    }

    fn qga_freeze(&mut self, only: Option<Vec<String>>, answer: Answer) {
        let prepare = Prepare {
            set: QGA_SET.to_owned(),
            backup_type: BackupType::Copy,
            limit_ms: QGA_PREPARE_MS,
            ..Prepare::default()
        };
        let freeze = Freeze {
            set: QGA_SET.to_owned(),
            hold_ms: self.settings.qga_hold_ms,
            writer_ms: WRITER_MS_MAX.min(self.settings.qga_hold_ms),
            exclude_filesystems: Vec::new(),
        };
        let frozen = self.prepare(&prepare).and_then(|_| {
            self.step(&Event::Done).map(drop).unwrap_or(());
            let event = Event::Freeze(Owner::Qga, QGA_SET.to_owned());
            match self.step(&event) {
                Ok(_) => {
                    let marked = self.qga_mark.set();
                    marked.map_err(|error| Cause::Internal(format!("state directory: {error}")))?;
                    self.freeze(&freeze, only.as_deref())
                }
                Err(refusal) => Err(Cause::Internal(format!("{refusal:?}"))),
            }
        });
        let count = self.set.filesystems.iter().filter(|held| held.is_frozen());
        let count = count.count();
        self.settle(frozen.map(|_| count), answer);
    }

    fn qga_thaw(&mut self, effect: Effect, answer: Answer) {
        if effect != Effect::Run {
            self.unwind_if(effect, || Cause::Aborted("thawed".to_owned()));
            answer(Ok(json!(0)));
            return;
        }
        let thawed = self.thaw();
        let count = self.set.filesystems.iter().filter(|held| held.is_frozen());
        let count = count.count();
        self.step(&Event::Done).map(drop).unwrap_or(());
        if thawed.held {
            answer(Ok(json!(count)));
            // Writers hear the rest after the client has its answer.
            let event = Event::Finish(Owner::Qga, QGA_SET.to_owned());
            if self.step(&event) == Ok(Effect::Run) {
                let until = BootTime::now().plus_ms(QGA_FINISH_MS);
                self.finish_without_requester(QGA_SET, until);
                self.done();
            }
        } else {
            let why = Cause::Internal(thawed.why_not.clone());
            answer(Err(error(ErrorCode::HoldBroken, thawed.why_not, true)));
            self.unwind(&why);
        }
        self.revive_helper();
    }

    fn status(&self) -> Status {
        let open = self.machine.open();
        let frozen = self.machine.is_frozen();
        let left = self.set.hold_end.map(BootTime::remaining);
        Status {
            run: Some(self.run.clone()),
            set: open.map(|(_, set)| set.to_owned()),
            frozen,
            frozen_by_qga: frozen && open.is_some_and(|(owner, _)| owner == Owner::Qga),
            hold_left_ms: left.map_or(0, |left| {
                u64::try_from(left.as_millis()).unwrap_or(u64::MAX)
            }),
            incomplete: self.incomplete.iter().map(|set| set.name.clone()).collect(),
            writers: self.writer_infos(),
        }
    }

    /// What the machine must decide about a request; `None` if it is always allowed.
    fn event_of(&self, request: &Request) -> Option<Event> {
        let qga = || QGA_SET.to_owned();
        let native = Owner::Native;
        Some(match request {
            Request::Hello { .. } | Request::HostGone => Event::AbortAll(native),
            Request::Identify => Event::Identify,
            Request::Prepare(prepare) => Event::Begin(native, prepare.set.clone()),
            Request::Freeze(freeze) => Event::Freeze(native, freeze.set.clone()),
            Request::Thaw { set, generation } => Event::Thaw(native, set.clone(), *generation),
            Request::PostSnapshot(post) => Event::Finish(native, post.set.clone()),
            Request::BackupComplete(_) => Event::Complete,
            Request::PreRestore(restore) => Event::Restore(restore.set.clone()),
            Request::PostRestore(restore) => Event::Restored(restore.set.clone()),
            Request::Abort { set, .. } if self.is_incomplete(set) => Event::Complete,
            Request::Abort { set, .. } => Event::Abort(native, set.clone()),
            Request::QgaFreeze { .. } => Event::Begin(Owner::Qga, qga()),
            Request::QgaThaw => Event::Thaw(Owner::Qga, qga(), 0),
            Request::Status => return None,
        })
    }

    fn hello(&self, versions: &[u32]) -> Result<Value, AgentError> {
        let Some(version) = common_version(versions) else {
            return Err(error(
                ErrorCode::VersionMismatch,
                format!(
                    "this agent speaks versions {PROTOCOL_VERSIONS:?}, the bridge {versions:?}"
                ),
                false,
            ));
        };
        let boot_id = ledger::boot_id().map_err(|error| internal(&error.to_string()))?;
        self.reply(&Hello {
            version,
            agent: format!("guest-agent {}", env!("CARGO_PKG_VERSION")),
            boot_id,
            run: Some(self.run.clone()),
        })
    }

    fn reply<T: Serialize>(&self, value: &T) -> Result<Value, AgentError> {
        serde_json::to_value(value).map_err(|error| internal(&error.to_string()))
    }

    fn refused(&self, refusal: &Refusal) -> AgentError {
        match refusal {
            Refusal::InProgress => error(
                ErrorCode::SnapshotSetInProgress,
                match self.machine.open() {
                    Some((_, set)) => format!("set {set} is open"),
                    None => "the agent is busy".to_owned(),
                },
                true,
            ),
            Refusal::NotFound => error(
                ErrorCode::SetNotFound,
                "no such set is open".to_owned(),
                false,
            ),
            Refusal::WrongStep(phase) => error(
                ErrorCode::BadRequest,
                format!("the set is {phase:?}"),
                false,
            ),
            Refusal::HoldBroken(why) => {
                let mut broken = error(ErrorCode::HoldBroken, why.clone(), true);
                if let Some(last) = &self.last_error {
                    broken.writers.clone_from(&last.writers);
                    broken.filesystems.clone_from(&last.filesystems);
                }
                broken
            }
        }
    }
}

/// Nobody must stay frozen because nobody can be told: an outcome that is too long for an answer is a failure.
fn tellable<T: Serialize>(outcome: T) -> Result<T, Cause> {
    let bytes = words::bytes(&outcome);
    if bytes < ANSWER_BYTES_MAX {
        return Ok(outcome);
    }
    let why = format!("the answer of {bytes} bytes is too long");
    Err(Cause::Internal(why))
}

fn internal(message: &str) -> AgentError {
    error(ErrorCode::Internal, message.to_owned(), false)
}

/// Checks a native `freeze` before the actor sees it: the limits are the protocol's.
pub fn check_limits(freeze: &Freeze) -> Result<(), AgentError> {
    let in_range = (1..=HOLD_MS_MAX).contains(&freeze.hold_ms)
        && (1..=WRITER_MS_MAX).contains(&freeze.writer_ms);
    if in_range {
        return Ok(());
    }
    let message = format!("hold_ms must be 1 to {HOLD_MS_MAX} and writer_ms 1 to {WRITER_MS_MAX}");
    Err(error(ErrorCode::BadRequest, message, false))
}
