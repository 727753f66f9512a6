//! A request becomes a plan, and the plan becomes transfers.
//!
//! Called by `parking` for every attempt. What cannot start now comes back as parked; nothing here waits, but in the
//! synchronous engine, which does the whole request at once.

use super::super::barrier::Ticket;
use super::super::blocking::{Task, perform};
use super::super::request::{Op, Outcome, Request};
use super::super::ring::{Direction, Span};
use super::parking::{Parked, Started};
use super::{Job, Mover, Moves, Remedy, Running, Stage, Worker, remedy, store_range};
use vhost_blk_store::{DataFile, Extent, Source, StoreError, View, WriteKind};

impl Worker {
    pub(super) fn start(&mut self, job: Job) -> Started {
        let ticket = if job.request.op.changes_disk() {
            if self.volume.settings.read_only {
                return Started::Finished(job.token, Outcome::Failed);
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
                let number = self.keep(job, ticket, Stage::Flushing);
                self.to_flush.push(number);
                Started::Running
            }
            (Mover::Ring(_), Op::Discard | Op::WriteZeroes { .. }) => self.hand_over(job, ticket),
            (Mover::Ring(_), Op::Read) => self.start_read(job),
            (Mover::Ring(_), Op::Write) => self.start_write(job, ticket),
        }
    }

    fn keep(&mut self, job: Job, ticket: Option<Ticket>, stage: Stage) -> u32 {
        self.running.insert(Running {
            job,
            ticket,
            stage,
            moves: Moves::default(),
        })
    }

    fn hand_over(&mut self, job: Job, ticket: Option<Ticket>) -> Started {
        let request = job.request.clone();
        let number = self.keep(job, ticket, Stage::Whole);
        self.volume
            .mover
            .order(Task::Whole(number, request), &self.inbox);
        Started::Running
    }

    /// The synchronous engine: the queue's thread does all of it.
    fn do_whole_here(&mut self, mut job: Job, ticket: Option<Ticket>) -> Started {
        let changes = job.request.op.changes_disk();
        let result = perform(self.volume.store(), &job.request);
        // A part may have been done before the rest was refused: the witness counts it now.
        self.landed(&mut job);
        drop(ticket);
        if changes {
            self.wake_overlapping();
        }
        if let Err(error) = &result
            && let Remedy::Park(why) = remedy(error)
        {
            return Started::Parked(job, why);
        }
        let outcome = self.outcome(&job, result);
        if changes && outcome == Outcome::Done && !self.volume.may_cache_writes() {
            // All writes of the pass share one flush.
            let number = self.keep(job, None, Stage::Flushing);
            self.to_flush.push(number);
            return Started::Running;
        }
        Started::Finished(job.token, outcome)
    }

    /// The synchronous engine's flush of all the writes of a pass, where the write cache is off.
    pub(super) fn flush_synchronous_writes(&mut self) {
        if self.to_flush.is_empty() || matches!(self.mover, Mover::Ring(_)) {
            return;
        }
        let result = self.volume.store().flush();
        for number in std::mem::take(&mut self.to_flush) {
            let Some(Running { job, .. }) = self.running.remove(number) else {
                continue;
            };
            let outcome = match &result {
                Ok(()) => Outcome::Done,
                Err(error) => {
                    self.log_failure(&job, error);
                    Outcome::Failed
                }
            };
            self.done.push((job.token, outcome));
        }
    }

    fn start_read(&mut self, job: Job) -> Started {
        let plan = match self
            .volume
            .store()
            .plan_read(View::Head, store_range(&job.request))
        {
            Ok(plan) => plan,
            Err(error) => return self.refused(job, None, &error),
        };
        if !self.moves_directly(&job.request, plan.extents()) {
            return self.hand_over(job, None);
        }
        let number = self.running.insert(Running {
            job,
            ticket: None,
            stage: Stage::Reading { plan },
            moves: Moves::default(),
        });
        self.start_transfers(number);
        Started::Running
    }

    fn start_write(&mut self, mut job: Job, ticket: Option<Ticket>) -> Started {
        if !job.request.buffers.aligned_to(self.alignment_bytes) {
            return self.hand_over(job, ticket);
        }
        let plan = match self
            .volume
            .store()
            .plan_write(store_range(&job.request), WriteKind::Write)
        {
            Ok(plan) => plan,
            Err(error) => return self.refused(job, ticket, &error),
        };
        if !self.moves_directly(&job.request, plan.extents()) {
            // The plan is dropped, the store's own driver makes another.
            drop(plan);
            return self.hand_over(job, ticket);
        }
        job.waits = None;
        if plan.needs_prepare() {
            let number = self.keep(job, ticket, Stage::Preparing);
            self.to_prepare.push((number, plan));
            return Started::Running;
        }
        let number = self.keep(job, ticket, Stage::Writing { plan });
        self.start_transfers(number);
        Started::Running
    }

    fn refused(&self, job: Job, ticket: Option<Ticket>, error: &StoreError) -> Started {
        drop(ticket);
        match remedy(error) {
            Remedy::Park(why) => Started::Parked(job, why),
            Remedy::Fail => {
                self.log_failure(&job, error);
                Started::Finished(job.token, Outcome::Failed)
            }
        }
    }

    /// True if the kernel takes the guest's memory and the places in the files as they are.
    fn moves_directly(&self, request: &Request, extents: &[Extent]) -> bool {
        request.buffers.aligned_to(self.alignment_bytes)
            && extents.iter().all(|extent| {
                extent.offset_bytes.is_multiple_of(self.alignment_bytes)
                    && extent.length_bytes.is_multiple_of(self.alignment_bytes)
            })
    }

    /// Queues the transfers between the guest's memory and the extents of a request's plan. Without a single one (zeroes only, or
    /// none could start) its moving is over.
    pub(super) fn start_transfers(&mut self, number: u32) {
        let Some(running) = self.running.get_mut(number) else {
            return;
        };
        let (direction, extents) = match &running.stage {
            Stage::Reading { plan } => (Direction::FromFile, plan.extents()),
            Stage::Writing { plan } => (Direction::ToFile, plan.extents()),
            Stage::Preparing | Stage::Whole | Stage::Flushing => return,
        };
        let buffers = &running.job.request.buffers;
        let mut moves = Moves::default();
        let mut done_bytes = 0;
        for extent in extents {
            let at = done_bytes;
            done_bytes += extent.length_bytes;
            let file = match extent.source {
                Source::Base => DataFile::Base,
                Source::Log => DataFile::Log,
                Source::Zero => {
                    // A write never goes to a zero extent; a read of one is done at once.
                    moves.failed |= direction == Direction::ToFile
                        || buffers.zero(at, extent.length_bytes).is_err();
                    continue;
                }
            };
            let span = Span {
                direction,
                file_offset_bytes: extent.offset_bytes,
                length_bytes: extent.length_bytes,
            };
            let started = match &mut self.mover {
                Mover::Ring(ring) => ring.start_guest(u64::from(number), file, buffers, at, span),
                Mover::Sync | Mover::Undecided => Err(std::io::ErrorKind::Unsupported.into()),
            };
            match started {
                Ok(()) => moves.left += 1,
                Err(error) => {
                    tracing::warn!(%error, "cannot start a transfer");
                    moves.failed = true;
                }
            }
        }
        running.moves = moves;
        if moves.left == 0 {
            self.moved.push(number);
        }
    }
}
