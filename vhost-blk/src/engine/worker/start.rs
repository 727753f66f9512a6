//! A request becomes a plan, and the plan becomes transfers.
//!
//! Called by `parking` for every attempt. What cannot start now comes back as parked; nothing here waits, but in the
//! synchronous engine, which does the whole request at once.

use super::super::barrier::Ticket;
use super::super::blocking::{Performed, Task, perform};
use super::super::buffers::GuestBuffers;
use super::super::pool::{PRIVATE_BYTES_MAX, PrivateBuffer};
use super::super::request::{Op, Outcome, Request};
use super::super::ring::{Direction, Span};
use super::parking::{Parked, Started};
use super::{Job, Mover, Moves, Remedy, Running, Stage, Worker, remedy, store_range};
use std::io::ErrorKind;
use vhost_blk_store::{DataFile, Extent, Source, StoreError, View, WriteKind, WritePlan};

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
        let Performed { result, touched } = perform(self.volume.store(), &job.request);
        if touched {
            // Also what was done in part, before the rest was refused.
            self.landed(&mut job);
        }
        drop(ticket);
        if changes && touched {
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
        self.start_reading(number);
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
        if plan.needs_room() || !self.can_copy(&plan) {
            // Room is the store's to make, and what comes with it.
            let number = self.keep(job, ticket, Stage::Preparing);
            self.to_prepare.push((number, plan));
        } else if plan.needs_preserve() {
            let begun = self.landed.begin();
            let number = self.keep(job, ticket, Stage::Copying { plan, begun });
            self.start_copies(number);
            self.over_if_nothing_moves(number);
        } else {
            // Old bytes beside the guest's need not be there before them.
            let number = self.keep(job, ticket, Stage::Writing { plan });
            self.start_copies(number);
            self.start_writing(number);
        }
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

    /// Queues a read's transfers. Zeroes are there at once.
    fn start_reading(&mut self, number: u32) {
        let Some(Running {
            job,
            stage: Stage::Reading { plan },
            moves,
            ..
        }) = self.running.get_mut(number)
        else {
            return;
        };
        let buffers = &job.request.buffers;
        let mut at = 0;
        for extent in plan.extents() {
            let started = match data_file(extent.source) {
                None => {
                    moves.failed |= buffers.zero(at, extent.length_bytes).is_err();
                    at += extent.length_bytes;
                    continue;
                }
                Some(file) => {
                    let span = span(Direction::FromFile, extent);
                    match &mut self.mover {
                        Mover::Ring(ring) => {
                            ring.start_guest(u64::from(number), file, buffers, at, span)
                        }
                        Mover::Sync | Mover::Undecided => Err(ErrorKind::Unsupported.into()),
                    }
                }
            };
            moves.count(started);
            at += extent.length_bytes;
        }
        self.over_if_nothing_moves(number);
    }

    /// Queues a write's transfers: straight from the guest's memory, or, where the store wants to know what was written, from
    /// a private copy, which the guest cannot change between checksum and disk.
    pub(super) fn start_writing(&mut self, number: u32) {
        let Some(Running {
            job,
            stage: Stage::Writing { plan },
            moves,
            ..
        }) = self.running.get_mut(number)
        else {
            return;
        };
        let buffers = &job.request.buffers;
        let sealing =
            !plan.seals().is_empty() && job.request.range.length_bytes <= PRIVATE_BYTES_MAX as u64;
        let mut at = 0;
        for place in 0..plan.extents().len() {
            let Some(extent) = plan.extents().get(place).copied() else {
                break;
            };
            let started = match (&mut self.mover, data_file(extent.source)) {
                // A write never goes to a zero extent.
                (Mover::Ring(_), None) | (Mover::Sync | Mover::Undecided, _) => {
                    Err(ErrorKind::Unsupported.into())
                }
                (Mover::Ring(ring), Some(file)) => {
                    let span = span(Direction::ToFile, &extent);
                    let private = if sealing && extent.source == Source::Log {
                        usize::try_from(extent.length_bytes)
                            .ok()
                            .and_then(|length| self.pool.take(length))
                    } else {
                        None
                    };
                    match private {
                        Some(buffer) => seal(plan, buffers, at, extent.length_bytes, buffer)
                            .and_then(|buffer| {
                                ring.start_private(u64::from(number), file, buffer, span)
                            }),
                        None => ring.start_guest(u64::from(number), file, buffers, at, span),
                    }
                }
            };
            moves.count(started);
            at += extent.length_bytes;
        }
        self.over_if_nothing_moves(number);
    }

    /// A request none of whose transfers could start, or that needs none, is over already.
    pub(super) fn over_if_nothing_moves(&mut self, number: u32) {
        if let Some(running) = self.running.get(number)
            && running.moves.left == 0
        {
            self.moved.push(number);
        }
    }
}

impl Moves {
    pub(super) fn count(&mut self, started: std::io::Result<()>) {
        match started {
            Ok(()) => self.left += 1,
            Err(error) => {
                tracing::warn!(%error, "cannot start a transfer");
                self.failed = true;
            }
        }
    }
}

/// Copies a part of the guest's data and tells the plan the checksums of what it wants to know.
fn seal(
    plan: &mut WritePlan,
    buffers: &GuestBuffers,
    offset_bytes: u64,
    length_bytes: u64,
    mut buffer: PrivateBuffer,
) -> std::io::Result<PrivateBuffer> {
    let length = usize::try_from(length_bytes).unwrap_or(usize::MAX);
    let bytes = buffer
        .bytes_mut()
        .get_mut(..length)
        .ok_or(ErrorKind::InvalidInput)?;
    buffers
        .read_at(offset_bytes, bytes)
        .map_err(std::io::Error::other)?;
    for place in 0..plan.seals().len() {
        let Some(part) = plan.seals().get(place).copied() else {
            break;
        };
        let inside = part
            .offset_bytes
            .checked_sub(offset_bytes)
            .and_then(|start| usize::try_from(start).ok())
            .zip(usize::try_from(part.length_bytes).ok())
            .and_then(|(start, length)| bytes.get(start..start.checked_add(length)?));
        if let Some(inside) = inside {
            plan.seal(place, crc32c::crc32c(inside));
        }
    }
    Ok(buffer)
}

fn data_file(source: Source) -> Option<DataFile> {
    match source {
        Source::Base => Some(DataFile::Base),
        Source::Log => Some(DataFile::Log),
        Source::Zero => None,
    }
}

fn span(direction: Direction, extent: &Extent) -> Span {
    Span {
        direction,
        file_offset_bytes: extent.offset_bytes,
        length_bytes: extent.length_bytes,
    }
}
