//! Carries the requests of one queue from arrival to outcome: plan, prepare, move, complete.
//!
//! Owned by the device, one for each queue of a connection, and run on that queue's thread. Knows the store's plans and
//! the ring, but not the guest's ring: it names requests by [`Token`] and may finish them in any order.
//!
//! Invariants:
//! * A request that changes the disk holds a [`Ticket`] from before it is planned until its mapping is recorded, and at
//!   no other time; while it is parked it holds none, so a parked request never delays a snapshot.
//! * A plan is dropped only when none of its transfers is in flight.
//! * What cannot go on now is parked and tried again whenever the queue is woken; nothing is parked without somebody who
//!   will wake it: the barrier's release, another write's completion, or maintenance that made room.

use super::barrier::Ticket;
use super::blocking::{Inbox, Report, Task, perform};
use super::kick::Kick;
use super::request::{Op, Outcome, Request, Token};
use super::ring::{Direction, Ring, Span};
use super::volume::{EngineKind, VolumeEngine};
use super::witness::Arrival;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vhost_blk_store::{
    ByteRange, DataFile, Extent, ReadPlan, Source, StoreError, View, WriteKind, WritePlan,
};
use vhost_blk_wire::event::Event as WireEvent;

/// One queue's requests.
#[derive(Debug)]
pub struct Worker {
    volume: Arc<VolumeEngine>,
    kick: Arc<Kick>,
    inbox: Arc<Inbox>,
    mover: Mover,
    parked: Vec<Job>,
    running: HashMap<Token, Running>,
    done: Vec<(Token, Outcome)>,
    registered: Waiting,
}

/// How this queue moves data.
#[derive(Debug)]
enum Mover {
    /// Not decided yet: a ring has to be made on the thread that uses it.
    Undecided,
    Ring(Box<Ring>),
    Sync,
}

#[derive(Debug)]
struct Job {
    token: Token,
    request: Request,
    arrival: Arrival,
    /// The store had no room when its count of chances stood here; there is no use in trying before it has moved on.
    no_room_at: Option<u64>,
}

#[derive(Debug)]
struct Running {
    job: Job,
    ticket: Option<Ticket>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Reading {
        _plan: ReadPlan,
        moves: Moves,
    },
    /// The mover has the plan.
    Preparing,
    Writing {
        plan: WritePlan,
        moves: Moves,
    },
    /// A hand has the whole request.
    Whole,
    /// The request itself is done; with the write cache off its flush is not.
    Flushing,
}

/// Transfers of one request.
#[derive(Clone, Copy, Debug, Default)]
struct Moves {
    left: usize,
    failed: bool,
}

/// Parked requests that other threads have to know of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Waiting {
    overlapping: usize,
    without_room: usize,
}

/// What became of an attempt to start a request.
enum Started {
    Running,
    Finished(Outcome),
    Parked(Job, Parked),
}

enum Parked {
    Held,
    Overlapping,
    WithoutRoom,
}

/// What the worker does about an error of the store.
enum Remedy {
    Park(Parked),
    Fail,
}

fn remedy(error: &StoreError) -> Remedy {
    if matches!(error, StoreError::Overlaps | StoreError::Busy) {
        Remedy::Park(Parked::Overlapping)
    } else if matches!(error, StoreError::NoSpace) {
        Remedy::Park(Parked::WithoutRoom)
    } else {
        Remedy::Fail
    }
}

impl Worker {
    /// A worker whose news come to `kick`.
    #[must_use]
    pub fn new(volume: Arc<VolumeEngine>, kick: Arc<Kick>) -> Self {
        volume.add_queue(&kick);
        Self {
            inbox: Inbox::new(Arc::clone(&kick)),
            volume,
            kick,
            mover: Mover::Undecided,
            parked: Vec::new(),
            running: HashMap::new(),
            done: Vec::new(),
            registered: Waiting::default(),
        }
    }

    /// Takes a request over. It starts with the next [`Self::run`].
    pub fn submit(&mut self, token: Token, request: Request) {
        let arrival = self.volume.witness.arrived(request.op, request.range);
        self.parked.push(Job {
            token,
            request,
            arrival,
            no_room_at: None,
        });
    }

    /// One pass: takes what is complete, starts what can start. Never waits for a disk in the io_uring engine.
    pub fn run(&mut self) {
        self.decide_mover();
        loop {
            self.collect();
            self.start_parked();
            self.submit_transfers();
            if !self.collect() {
                return;
            }
        }
    }

    /// Requests that are over since the last call, in any order.
    pub fn take_done(&mut self) -> Vec<(Token, Outcome)> {
        std::mem::take(&mut self.done)
    }

    /// Waits until nothing is running. Parked requests stay parked.
    pub fn settle(&mut self) {
        loop {
            self.collect();
            self.submit_transfers();
            if self.running.is_empty() {
                return;
            }
            let mut wait = [rustix::event::PollFd::new(
                &self.kick,
                rustix::event::PollFlags::IN,
            )];
            if let Err(error) = rustix::event::poll(&mut wait, None)
                && error != rustix::io::Errno::INTR
            {
                tracing::error!(%error, "cannot wait for I/O in flight");
            }
            self.kick.clear();
        }
    }

    /// Forgets parked requests: they have done nothing yet. The device gives them back to the guest's ring.
    pub fn forget_parked(&mut self) {
        self.parked.clear();
        self.register(Waiting::default());
    }

    fn decide_mover(&mut self) {
        if !matches!(self.mover, Mover::Undecided) {
            return;
        }
        let kind = self.volume.settings.engine;
        let files = [DataFile::Base, DataFile::Log].map(|file| self.volume.store().data_file(file));
        let have_descriptors = files.iter().all(|file| file.raw_fd().is_some());
        self.mover = if kind == EngineKind::Sync || !have_descriptors {
            Mover::Sync
        } else {
            match Ring::new(Arc::clone(&self.kick)) {
                Ok(ring) => Mover::Ring(Box::new(ring)),
                Err(error) => {
                    // With `--engine uring` the daemon has tried this at start and would not be here.
                    tracing::warn!(%error, "falling back to plain system calls");
                    Mover::Sync
                }
            }
        };
    }

    fn submit_transfers(&mut self) {
        if let Mover::Ring(ring) = &mut self.mover
            && let Err(error) = ring.submit()
        {
            tracing::error!(%error, "io_uring refuses to submit");
        }
    }

    /// Tries every parked request once. A second time if requests have just been registered as overlapping, since the
    /// write they wait for may have ended before its queue could know of them.
    fn start_parked(&mut self) {
        loop {
            let chance = self.volume.chances_of_room();
            let mut waiting = Waiting::default();
            for job in std::mem::take(&mut self.parked) {
                let token = job.token;
                match self.start(job) {
                    Started::Running => {}
                    Started::Finished(outcome) => self.done.push((token, outcome)),
                    Started::Parked(mut job, why) => {
                        match why {
                            Parked::Held => {}
                            Parked::Overlapping => waiting.overlapping += 1,
                            Parked::WithoutRoom => {
                                waiting.without_room += 1;
                                job.no_room_at = Some(chance);
                            }
                        }
                        self.parked.push(job);
                    }
                }
            }
            let again = waiting.overlapping > self.registered.overlapping;
            self.register(waiting);
            if !again {
                return;
            }
        }
    }

    fn register(&mut self, waiting: Waiting) {
        let move_to = |counter: &std::sync::atomic::AtomicUsize, from: usize, to: usize| {
            let before = counter.fetch_add(to, Ordering::SeqCst);
            counter.fetch_sub(from, Ordering::SeqCst);
            before == 0 && to > 0
        };
        let old = std::mem::replace(&mut self.registered, waiting);
        move_to(
            &self.volume.overlapping,
            old.overlapping,
            waiting.overlapping,
        );
        if move_to(
            &self.volume.without_room,
            old.without_room,
            waiting.without_room,
        ) {
            tracing::warn!(volume = %self.volume.settings.name, "shadow storage is full: writes wait");
            self.volume.tell(WireEvent::ShadowStorageFull {
                volume: self.volume.settings.name.clone(),
            });
        }
    }

    fn start(&mut self, job: Job) -> Started {
        if job.no_room_at == Some(self.volume.chances_of_room()) {
            return Started::Parked(job, Parked::WithoutRoom);
        }
        let ticket = if job.request.op.changes_disk() {
            if self.volume.settings.read_only {
                return Started::Finished(Outcome::Failed);
            }
            match self.volume.barrier.enter() {
                Some(ticket) => Some(ticket),
                None => return Started::Parked(job, Parked::Held),
            }
        } else {
            None
        };
        match (&self.mover, job.request.op) {
            (Mover::Sync | Mover::Undecided, _) => self.do_whole_here(job, ticket),
            (Mover::Ring(_), Op::Flush) => {
                self.volume
                    .flusher
                    .order(Task::Flush, job.token, &self.inbox);
                self.keep(job, ticket, Stage::Flushing)
            }
            (Mover::Ring(_), Op::Discard | Op::WriteZeroes { .. }) => self.hand_over(job, ticket),
            (Mover::Ring(_), Op::Read) => self.start_read(job),
            (Mover::Ring(_), Op::Write) => self.start_write(job, ticket),
        }
    }

    fn keep(&mut self, job: Job, ticket: Option<Ticket>, stage: Stage) -> Started {
        self.running
            .insert(job.token, Running { job, ticket, stage });
        Started::Running
    }

    /// Keeps a request whose transfers have started. Without a single one (zeroes only, or none could start) it is over.
    fn keep_moving(
        &mut self,
        job: Job,
        ticket: Option<Ticket>,
        stage: Stage,
        moves: Moves,
    ) -> Started {
        let token = job.token;
        let started = self.keep(job, ticket, stage);
        if moves.left == 0 {
            self.moves_over(token);
        }
        started
    }

    fn hand_over(&mut self, job: Job, ticket: Option<Ticket>) -> Started {
        let task = Task::Whole(job.request.clone());
        self.volume.mover.order(task, job.token, &self.inbox);
        self.keep(job, ticket, Stage::Whole)
    }

    /// The synchronous engine: the queue's thread does all of it.
    fn do_whole_here(&mut self, job: Job, ticket: Option<Ticket>) -> Started {
        let store = self.volume.store();
        let changes = job.request.op.changes_disk();
        let mut result = perform(store, &job.request);
        if let Err(error) = &result
            && let Remedy::Park(why) = remedy(error)
        {
            return Started::Parked(job, why);
        }
        self.landed(&job);
        drop(ticket);
        if changes && result.is_ok() && !self.volume.may_cache_writes() {
            result = store.flush();
        }
        if changes {
            self.wake_overlapping();
        }
        Started::Finished(self.outcome(&job, result))
    }

    fn start_read(&mut self, job: Job) -> Started {
        let range = store_range(&job.request);
        let plan = match self.volume.store().plan_read(View::Head, range) {
            Ok(plan) => plan,
            Err(error) => return self.refused(job, None, &error),
        };
        if !self.moves_directly(&job.request, plan.extents()) {
            return self.hand_over(job, None);
        }
        let moves = self.start_transfers(&job, Direction::FromFile, plan.extents());
        self.keep_moving(job, None, Stage::Reading { _plan: plan, moves }, moves)
    }

    fn start_write(&mut self, job: Job, ticket: Option<Ticket>) -> Started {
        if !job.request.buffers.aligned_to(self.alignment_bytes()) {
            return self.hand_over(job, ticket);
        }
        let range = store_range(&job.request);
        let plan = match self.volume.store().plan_write(range, WriteKind::Write) {
            Ok(plan) => plan,
            Err(error) => return self.refused(job, ticket, &error),
        };
        if !self.moves_directly(&job.request, plan.extents()) {
            // The plan is dropped, the store's own driver makes another.
            drop(plan);
            return self.hand_over(job, ticket);
        }
        if plan.needs_prepare() {
            self.volume
                .mover
                .order(Task::Prepare(plan), job.token, &self.inbox);
            return self.keep(job, ticket, Stage::Preparing);
        }
        let moves = self.start_transfers(&job, Direction::ToFile, plan.extents());
        self.keep_moving(job, ticket, Stage::Writing { plan, moves }, moves)
    }

    fn refused(&self, job: Job, ticket: Option<Ticket>, error: &StoreError) -> Started {
        drop(ticket);
        match remedy(error) {
            Remedy::Park(why) => Started::Parked(job, why),
            Remedy::Fail => {
                self.log_failure(&job, error);
                Started::Finished(Outcome::Failed)
            }
        }
    }

    fn alignment_bytes(&self) -> u64 {
        let store = self.volume.store();
        [DataFile::Base, DataFile::Log]
            .map(|file| store.data_file(file).alignment_bytes())
            .into_iter()
            .max()
            .unwrap_or(1)
    }

    /// True if the kernel takes the guest's memory and the places in the files as they are.
    fn moves_directly(&self, request: &Request, extents: &[Extent]) -> bool {
        let alignment_bytes = self.alignment_bytes();
        request.buffers.aligned_to(alignment_bytes)
            && extents.iter().all(|extent| {
                extent.offset_bytes.is_multiple_of(alignment_bytes)
                    && extent.length_bytes.is_multiple_of(alignment_bytes)
            })
    }

    fn start_transfers(&mut self, job: &Job, direction: Direction, extents: &[Extent]) -> Moves {
        let mut moves = Moves::default();
        let mut done_bytes = 0;
        let Mover::Ring(ring) = &mut self.mover else {
            return Moves {
                left: 0,
                failed: true,
            };
        };
        for extent in extents {
            let file = match extent.source {
                Source::Base => DataFile::Base,
                Source::Log => DataFile::Log,
                Source::Zero => {
                    // A write never goes to a zero extent; a read of one is done at once.
                    moves.failed |= direction == Direction::ToFile
                        || job
                            .request
                            .buffers
                            .zero(done_bytes, extent.length_bytes)
                            .is_err();
                    done_bytes += extent.length_bytes;
                    continue;
                }
            };
            let started = ring.start(
                job.token.0,
                self.volume.store().data_file(file),
                &job.request.buffers,
                Span {
                    direction,
                    file_offset_bytes: extent.offset_bytes,
                    buffer_offset_bytes: done_bytes,
                    length_bytes: extent.length_bytes,
                },
            );
            done_bytes += extent.length_bytes;
            match started {
                Ok(()) => moves.left += 1,
                Err(error) => {
                    tracing::warn!(%error, "cannot start a transfer");
                    moves.failed = true;
                }
            }
        }
        moves
    }

    /// Takes news from the ring and the hands; true if there were any.
    fn collect(&mut self) -> bool {
        let mut completed = Vec::new();
        if let Mover::Ring(ring) = &mut self.mover {
            ring.take_completed(&mut completed);
        }
        let reports = self.inbox.take();
        let any = !completed.is_empty() || !reports.is_empty();
        for (number, result) in completed {
            self.transfer_over(Token(number), result);
        }
        for report in reports {
            match report {
                Report::Prepared(token, plan) => self.prepared(token, plan),
                Report::Finished(token, result) => self.finished_by_hand(token, result),
            }
        }
        any
    }

    fn transfer_over(&mut self, token: Token, result: io::Result<()>) {
        let Some(running) = self.running.get_mut(&token) else {
            return;
        };
        let (Stage::Reading { moves, .. } | Stage::Writing { moves, .. }) = &mut running.stage
        else {
            return;
        };
        moves.left = moves.left.saturating_sub(1);
        if let Err(error) = result {
            tracing::warn!(volume = %self.volume.settings.name, request = ?running.job.request.op,
                range = ?running.job.request.range, %error, "I/O failed");
            moves.failed = true;
        }
        if moves.left == 0 {
            self.moves_over(token);
        }
    }

    /// All transfers of a request are over.
    fn moves_over(&mut self, token: Token) {
        let Some(Running { job, ticket, stage }) = self.running.remove(&token) else {
            return;
        };
        match stage {
            Stage::Reading { moves, .. } => {
                let outcome = if moves.failed {
                    Outcome::Failed
                } else {
                    Outcome::Done
                };
                self.done.push((token, outcome));
            }
            Stage::Writing { plan, moves } => {
                let result = if moves.failed {
                    drop(plan);
                    None
                } else {
                    Some(self.volume.store().complete_write(plan))
                };
                self.write_over(job, ticket, result);
            }
            Stage::Preparing | Stage::Whole | Stage::Flushing => {}
        }
    }

    /// A request that changes the disk has done so, or failed (`None`: it was told already why).
    fn write_over(
        &mut self,
        job: Job,
        ticket: Option<Ticket>,
        result: Option<Result<(), StoreError>>,
    ) {
        self.landed(&job);
        drop(ticket);
        self.wake_overlapping();
        let outcome = result.map_or(Outcome::Failed, |result| self.outcome(&job, result));
        if outcome == Outcome::Done && !self.volume.may_cache_writes() {
            self.volume
                .flusher
                .order(Task::Flush, job.token, &self.inbox);
            let _: Started = self.keep(job, None, Stage::Flushing);
        } else {
            self.done.push((job.token, outcome));
        }
    }

    /// A write is through: requests of other queues may wait for its blocks.
    fn wake_overlapping(&self) {
        if self.volume.overlapping.load(Ordering::SeqCst) > 0 {
            self.volume.wake_queues();
        }
    }

    fn prepared(&mut self, token: Token, plan: Result<WritePlan, StoreError>) {
        let Some(Running { job, ticket, .. }) = self.running.remove(&token) else {
            return;
        };
        match plan {
            Ok(plan) => {
                let moves = self.start_transfers(&job, Direction::ToFile, plan.extents());
                let _: Started =
                    self.keep_moving(job, ticket, Stage::Writing { plan, moves }, moves);
            }
            Err(error) => match remedy(&error) {
                Remedy::Park(why) => self.park_again(job, ticket, &why),
                Remedy::Fail => self.write_over(job, ticket, Some(Err(error))),
            },
        }
    }

    fn finished_by_hand(&mut self, token: Token, result: Result<(), StoreError>) {
        let Some(Running { job, ticket, stage }) = self.running.remove(&token) else {
            return;
        };
        if let Err(error) = &result
            && matches!(stage, Stage::Whole)
            && let Remedy::Park(why) = remedy(error)
        {
            self.park_again(job, ticket, &why);
            return;
        }
        if matches!(stage, Stage::Whole) && job.request.op.changes_disk() {
            self.write_over(job, ticket, Some(result));
        } else {
            let outcome = self.outcome(&job, result);
            self.done.push((token, outcome));
        }
    }

    /// What a hand could not do now is tried again by the pass that follows this news.
    fn park_again(&mut self, mut job: Job, ticket: Option<Ticket>, why: &Parked) {
        drop(ticket);
        job.no_room_at = match why {
            Parked::WithoutRoom => Some(self.volume.chances_of_room()),
            Parked::Held | Parked::Overlapping => None,
        };
        self.parked.push(job);
    }

    /// Before the ticket is dropped: a snapshot that waited for it reads the witness next.
    fn landed(&self, job: &Job) {
        self.volume
            .witness
            .landed(job.request.op, job.request.range, job.arrival);
    }

    fn outcome(&self, job: &Job, result: Result<(), StoreError>) -> Outcome {
        match result {
            Ok(()) => Outcome::Done,
            Err(error) => {
                self.log_failure(job, &error);
                Outcome::Failed
            }
        }
    }

    fn log_failure(&self, job: &Job, error: &StoreError) {
        let cause = std::error::Error::source(error).map(ToString::to_string);
        tracing::warn!(volume = %self.volume.settings.name, request = ?job.request.op,
            range = ?job.request.range, %error, cause, "a request failed");
        self.volume.tell_if_poisoned();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.register(Waiting::default());
    }
}

fn store_range(request: &Request) -> ByteRange {
    ByteRange::new(request.range.offset_bytes, request.range.length_bytes)
}

#[cfg(test)]
mod tests;
