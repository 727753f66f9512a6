//! What became of transfers and of the hands' work, up to the guest's outcome.
//!
//! Called at both ends of a pass. Everything that ended since the last look is taken together, so that the records of all
//! its writes are appended at once.

use super::super::blocking::{Performed, Report, same};
use super::super::request::Outcome;
use super::super::ring::{Completed, Memory};
use super::copy::owner;
use super::parking::Parked;
use super::{Job, Mover, Moves, Remedy, Running, Stage, Worker, remedy};
use std::io::ErrorKind;
use std::sync::atomic::Ordering;
use vhost_blk_store::{DataFile, StoreError, WritePlan};

impl Worker {
    /// Takes news from the ring and the hands.
    pub(super) fn collect(&mut self) {
        let mut completed = std::mem::take(&mut self.completed);
        if let Mover::Ring(ring) = &mut self.mover {
            ring.take_completed(&mut completed);
        }
        for transfer in completed.drain(..) {
            self.transfer_over(transfer);
        }
        self.completed = completed;
        let mut preserved = false;
        for report in self.inbox.take() {
            match report {
                Report::Prepared(number, plan) => {
                    preserved |= plan.is_ok();
                    self.prepared(number, plan);
                }
                Report::Performed(number, performed) => self.performed(number, performed),
                Report::Flushed(number, result) => self.flushed(number, result),
            }
        }
        if preserved {
            // What was preserved is written in place from now on, the blocks beside these requests' own, too.
            self.wake_overlapping();
        }
        self.moves_over();
    }

    fn transfer_over(&mut self, mut transfer: Completed) {
        if self.go_on_copying(&mut transfer) {
            return;
        }
        if let Memory::Private(buffer) = transfer.memory {
            self.pool.give_back(buffer);
        }
        let (number, _) = owner(transfer.number);
        let Some(running) = self.running.get_mut(number) else {
            return;
        };
        running.moves.left = running.moves.left.saturating_sub(1);
        if let Err(error) = &transfer.outcome
            && error.kind() == ErrorKind::StorageFull
            && running.job.request.op.changes_disk()
        {
            running.moves.without_room = Some(transfer.file);
        } else if let Err(error) = transfer.outcome {
            tracing::warn!(volume = %self.volume.settings.name, request = ?running.job.request.op,
                range = ?running.job.request.range, %error, "I/O failed");
            running.moves.failed = true;
        }
        if running.moves.left == 0 {
            self.moved.push(number);
        }
    }

    /// Ends requests all of whose transfers are over, or brings them to their next stage.
    pub(super) fn moves_over(&mut self) {
        if self.moved.is_empty() {
            return;
        }
        let mut moved = std::mem::take(&mut self.moved);
        let mut plans = Vec::new();
        let mut written = Vec::new();
        for number in moved.drain(..) {
            let Some(running) = self.running.get_mut(number) else {
                continue;
            };
            let Moves {
                failed,
                without_room,
                ..
            } = running.moves;
            let incomplete = failed || without_room.is_some();
            // Another failure outweighs the lack of room.
            let without_room = without_room.filter(|_| !failed);
            match std::mem::replace(&mut running.stage, Stage::Preparing) {
                Stage::Reading { .. } => {
                    let token = running.job.token;
                    self.running.remove(number);
                    let outcome = if failed {
                        Outcome::Failed
                    } else {
                        Outcome::Done
                    };
                    self.done.push((token, outcome));
                }
                Stage::Copying { plan, begun } if incomplete => {
                    // Its blocks are free again before others are told.
                    drop(plan);
                    self.landed.end(begun, None);
                    self.write_failed(number, without_room);
                }
                Stage::Copying { mut plan, begun } => {
                    plan.copies_landed();
                    self.landed.end(begun, Some((number, plan)));
                }
                Stage::Writing { plan } if incomplete => {
                    drop(plan);
                    self.write_failed(number, without_room);
                }
                Stage::Writing { mut plan } => {
                    if !plan.copies().is_empty() {
                        plan.copies_landed();
                    }
                    plans.push(plan);
                    written.push(number);
                }
                stage @ (Stage::Preparing | Stage::Whole | Stage::Flushing) => {
                    running.stage = stage;
                }
            }
        }
        self.moved = moved;
        if !plans.is_empty() {
            let result = self.volume.store().complete_writes(plans);
            for number in written {
                let result = result
                    .as_ref()
                    .map_or_else(|error| Err(same(error)), |()| Ok(()));
                self.write_over(number, Some(result));
            }
        }
    }

    /// A write could not be moved. Where only room was missing (a thin file, a file system without a reserve), it waits for room as one
    /// does that the store has none for, and is done again whole.
    fn write_failed(&mut self, number: u32, without_room: Option<DataFile>) {
        let why = match without_room {
            None => return self.write_over(number, None),
            Some(DataFile::Base) => Parked::BaseWithoutRoom,
            Some(DataFile::Log) => Parked::WithoutRoom,
        };
        if let Some(Running {
            mut job, ticket, ..
        }) = self.running.remove(number)
        {
            // A part of it may be there.
            self.landed(&mut job);
            drop(ticket);
            self.wake_overlapping();
            self.park_for_room(job, why);
        }
    }

    /// A request that changes the disk has done so, or failed (`None`: it was told already why).
    fn write_over(&mut self, number: u32, result: Option<Result<(), StoreError>>) {
        let Some(Running {
            mut job, ticket, ..
        }) = self.running.remove(number)
        else {
            return;
        };
        self.landed(&mut job);
        drop(ticket);
        self.wake_overlapping();
        let outcome = result.map_or(Outcome::Failed, |result| self.outcome(&job, result));
        if outcome == Outcome::Done && !self.volume.may_cache_writes() {
            let number = self.running.insert(Running {
                job,
                ticket: None,
                stage: Stage::Flushing,
                moves: Moves::default(),
            });
            self.to_flush.push(number);
        } else {
            self.done.push((job.token, outcome));
        }
    }

    /// A write is through, or has given its blocks up: requests of other queues may wait for them.
    pub(super) fn wake_overlapping(&self) {
        if self.volume.overlapping.load(Ordering::SeqCst) > 0 {
            self.volume.wake_queues();
        }
    }

    /// A plan is ready for its data, or was given up.
    pub(super) fn prepared(&mut self, number: u32, plan: Result<WritePlan, StoreError>) {
        match plan {
            Ok(plan) => {
                if let Some(running) = self.running.get_mut(number) {
                    running.stage = Stage::Writing { plan };
                    self.start_writing(number);
                }
            }
            // The plan was dropped, and with it the claim on its blocks.
            Err(error) => match remedy(&error) {
                Remedy::Park(why) => self.park_again(number, why, true),
                Remedy::Fail => self.write_over(number, Some(Err(error))),
            },
        }
    }

    fn performed(&mut self, number: u32, performed: Performed) {
        let Performed { result, touched } = performed;
        let Some(running) = self.running.get(number) else {
            return;
        };
        if let Err(error) = &result
            && let Remedy::Park(why) = remedy(error)
        {
            self.park_again(number, why, touched);
        } else if running.job.request.op.changes_disk() {
            self.write_over(number, Some(result));
        } else {
            self.flushed(number, result);
        }
    }

    fn flushed(&mut self, number: u32, result: Result<(), StoreError>) {
        if let Some(running) = self.running.remove(number) {
            let outcome = self.outcome(&running.job, result);
            self.done.push((running.job.token, outcome));
        }
    }

    /// What a hand could not do now waits for news, as what could not be planned does. `touched`: blocks were claimed, and some
    /// of them may have changed. If not, nobody is woken: two that wait for a third would wake each other for ever.
    fn park_again(&mut self, number: u32, why: Parked, touched: bool) {
        let Some(Running {
            mut job,
            ticket,
            stage,
            ..
        }) = self.running.remove(number)
        else {
            return;
        };
        if touched && matches!(stage, Stage::Whole) {
            // Marks that came meanwhile count what was done of it now.
            self.landed(&mut job);
        }
        drop(ticket);
        if touched {
            self.wake_overlapping();
        }
        self.park(job, why);
    }

    /// Before the ticket is dropped: a snapshot that waited for it reads the witness next.
    pub(super) fn landed(&self, job: &mut Job) {
        job.arrival = self
            .volume
            .witness
            .landed(job.request.op, job.request.range, job.arrival);
    }

    pub(super) fn outcome(&self, job: &Job, result: Result<(), StoreError>) -> Outcome {
        match result {
            Ok(()) => Outcome::Done,
            Err(error) => {
                self.log_failure(job, &error);
                Outcome::Failed
            }
        }
    }

    pub(super) fn log_failure(&self, job: &Job, error: &StoreError) {
        let cause = std::error::Error::source(error).map(ToString::to_string);
        tracing::warn!(volume = %self.volume.settings.name, request = ?job.request.op,
            range = ?job.request.range, %error, cause, "a request failed");
        self.volume.tell_if_poisoned();
    }
}
