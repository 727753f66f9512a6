//! Carries the requests of one queue from arrival to outcome: plan, prepare, move, complete.
//!
//! Owned by the device, one for each queue of a connection, and run on that queue's thread. Knows the store's plans and
//! the ring, but not the guest's ring: it names requests by [`Token`] and may finish them in any order.
//!
//! * here: the queue's passes; * `start`: a request becomes a plan and transfers; * `finish`: what became of them;
//! * `copy`: old data that has to be in the log first; `alone`: who makes it durable; * `parking`: what cannot go on now.
//!
//! Invariants:
//! * A request that changes the disk holds a [`Ticket`] from before it is planned until its mapping is recorded, and at
//!   no other time; while it is parked it holds none, so a parked request never delays a snapshot.
//! * A plan is dropped only when none of its transfers is in flight.
//! * What cannot go on now is parked and tried again when the volume has news; nothing is parked without somebody who
//!   will bring them: the barrier's release, another write's completion, or maintenance that made room.

mod alone;
mod copy;
mod finish;
mod parking;
mod start;

use super::barrier::Ticket;
use super::blocking::{Inbox, Task};
use super::kick::Kick;
use super::pool::Pool;
use super::request::{Outcome, Request, Token};
use super::ring::{Completed, Ring};
use super::slab::Slab;
use super::upkeep::Arrivals;
use super::volume::{EngineKind, News, VolumeEngine};
use super::witness::Arrival;
use alone::Alone;
use copy::Landed;
use parking::{Parked, Parking, Waits};
use std::sync::Arc;
use vhost_blk_store::{ByteRange, DataFile, FileName, ReadPlan, StoreError, WritePlan};

/// One queue's requests.
#[derive(Debug)]
pub struct Worker {
    volume: Arc<VolumeEngine>,
    arrivals: Arc<Arrivals>,
    kick: Arc<Kick>,
    inbox: Arc<Inbox>,
    mover: Mover,
    /// What the kernel takes as it is: whole multiples of this, in memory and in the files.
    alignment_bytes: u64,
    /// Requests that no attempt was made for yet.
    arrived: Vec<Job>,
    parking: Parking,
    running: Slab<Running>,
    /// Requests whose last transfer is over, or never began.
    moved: Vec<u32>,
    pool: Pool,
    /// Plans that have to be prepared by the store: handed over once a pass.
    to_prepare: Vec<(u32, WritePlan)>,
    /// Plans whose copies are done: handed over together, they share a round of syncs.
    landed: Landed,
    alone: Alone,
    /// Flushes, and writes that need one: handed over once a pass.
    to_flush: Vec<u32>,
    done: Vec<(Token, Outcome)>,
    /// Kept for its space.
    completed: Vec<Completed>,
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
    /// The volume's news before the last attempt.
    tried_at: News,
    /// Others know that it waits, until it has begun.
    waits: Option<Waits>,
    /// It has waited for room before.
    has_lacked_room: bool,
}

#[derive(Debug)]
struct Running {
    job: Job,
    ticket: Option<Ticket>,
    stage: Stage,
    moves: Moves,
}

#[derive(Debug)]
enum Stage {
    Reading {
        plan: ReadPlan,
    },
    /// A hand has the plan.
    Preparing,
    /// Old data goes to the log; after that a hand makes it durable.
    Copying {
        plan: WritePlan,
        begun: u64,
    },
    /// The guest's data is moved, and the old data beside it where it fills no whole blocks.
    Writing {
        plan: WritePlan,
    },
    /// A hand has the whole request.
    Whole,
    /// The request itself is done; a flush, or with the write cache off its flush, is not.
    Flushing,
}

/// Transfers of one request.
#[derive(Clone, Copy, Debug, Default)]
struct Moves {
    left: usize,
    /// One of them found no space in the file system of this file.
    without_room: Option<DataFile>,
    /// One of them failed for another reason.
    failed: bool,
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
    } else if let StoreError::Io { file, source, .. } = error
        && source.kind() == std::io::ErrorKind::StorageFull
    {
        Remedy::Park(if *file == FileName::Base {
            Parked::BaseWithoutRoom
        } else {
            Parked::WithoutRoom
        })
    } else {
        Remedy::Fail
    }
}

impl Worker {
    /// A worker whose news come to `kick`.
    #[must_use]
    pub fn new(volume: Arc<VolumeEngine>, kick: Arc<Kick>) -> Self {
        volume.add_queue(&kick);
        let alignment_bytes = [DataFile::Base, DataFile::Log]
            .map(|file| volume.store().data_file(file).alignment_bytes())
            .into_iter()
            .max()
            .unwrap_or(1);
        Self {
            arrivals: volume.count_arrivals(),
            inbox: Inbox::new(Arc::clone(&kick)),
            volume,
            kick,
            mover: Mover::Undecided,
            alignment_bytes,
            arrived: Vec::new(),
            parking: Parking::default(),
            running: Slab::default(),
            moved: Vec::new(),
            to_prepare: Vec::new(),
            landed: Landed::default(),
            alone: Alone::default(),
            pool: Pool::default(),
            to_flush: Vec::new(),
            done: Vec::new(),
            completed: Vec::new(),
        }
    }

    /// Takes a request over. It starts with the next [`Self::run`] or [`Self::poll`].
    pub fn submit(&mut self, token: Token, request: Request) {
        self.arrivals.note();
        let arrival = self.volume.witness.arrived(request.op, request.range);
        self.arrived.push(Job {
            token,
            request,
            arrival,
            tried_at: News::default(),
            waits: None,
            has_lacked_room: false,
        });
    }

    /// One pass, after which completions wake the kick. For a loop that sleeps between its passes.
    pub fn run(&mut self) {
        loop {
            self.poll();
            if !self.arm() {
                return;
            }
        }
    }

    /// One pass: takes what is complete, starts what can start. Waits for no disk in the io_uring engine, but for the sync of a single copy
    /// where that has proved to be quick. Completions
    /// that come later do not wake the kick: before the thread sleeps it calls [`Self::arm`].
    pub fn poll(&mut self) {
        self.decide_mover();
        if let Mover::Ring(ring) = &mut self.mover {
            ring.disarm();
        }
        self.collect();
        loop {
            self.start_due();
            // Some need no transfer, or none of theirs could start.
            self.moves_over();
            self.hand_over_all();
            if !self.submit_transfers() {
                return;
            }
            // Much is complete as soon as it was submitted.
            self.collect();
            if !self.has_more_to_start() {
                return;
            }
        }
    }

    /// True if what was collected last has made work for this pass.
    fn has_more_to_start(&self) -> bool {
        let transfers = matches!(&self.mover, Mover::Ring(ring) if ring.has_waiting());
        transfers
            || !self.to_prepare.is_empty()
            || self.landed.is_due()
            || !self.to_flush.is_empty()
            || self.parking.is_due(self.volume.news())
    }

    /// From now on completions wake the kick. Answers true if there is something to do already: then do not sleep.
    #[must_use]
    pub fn arm(&mut self) -> bool {
        match &mut self.mover {
            Mover::Ring(ring) if !ring.is_idle() => ring.arm(),
            Mover::Ring(_) | Mover::Sync | Mover::Undecided => false,
        }
    }

    /// True if nothing is running: parked requests apart, only a new one can bring work.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.arrived.is_empty()
    }

    /// Requests that are over since the last call, in any order.
    pub fn take_done(&mut self) -> std::vec::Drain<'_, (Token, Outcome)> {
        self.done.drain(..)
    }

    /// Waits until nothing is running. Parked requests stay parked.
    pub fn settle(&mut self) {
        loop {
            self.kick.clear();
            self.collect();
            self.hand_over_all();
            self.submit_transfers();
            if self.running.is_empty() {
                return;
            }
            if self.arm() {
                continue;
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
        }
    }

    /// Forgets requests that wait: the device gives them back to the guest's ring.
    pub fn forget_parked(&mut self) {
        self.arrived.clear();
        self.parking.forget();
    }

    fn decide_mover(&mut self) {
        if !matches!(self.mover, Mover::Undecided) {
            return;
        }
        let kind = self.volume.settings.engine;
        let files = [DataFile::Base, DataFile::Log]
            .map(|file| Arc::clone(self.volume.store().data_file(file)));
        let have_descriptors = files.iter().all(|file| file.raw_fd().is_some());
        self.mover = if kind == EngineKind::Sync || !have_descriptors {
            Mover::Sync
        } else {
            match Ring::new(Arc::clone(&self.kick), files) {
                Ok(ring) => Mover::Ring(Box::new(ring)),
                Err(error) => {
                    // With `--engine uring` the daemon has tried this at start and would not be here.
                    tracing::warn!(%error, "falling back to plain system calls");
                    Mover::Sync
                }
            }
        };
    }

    /// Answers whether the kernel was given the chance to finish something.
    fn submit_transfers(&mut self) -> bool {
        let Mover::Ring(ring) = &mut self.mover else {
            return false;
        };
        match ring.submit() {
            Ok(entered) => entered,
            Err(error) => {
                tracing::error!(%error, "io_uring refuses to submit");
                false
            }
        }
    }

    /// Hands over what this pass has gathered for the hands, at once: they share a round.
    fn hand_over_all(&mut self) {
        if !self.to_prepare.is_empty() {
            let plans = std::mem::take(&mut self.to_prepare);
            self.volume.mover.order(Task::Prepare(plans), &self.inbox);
        }
        if self.landed.is_due() {
            let plans = self.landed.take();
            match <[_; 1]>::try_from(plans) {
                Ok([only]) if self.running.len() == 1 && self.alone.is_here() => {
                    self.preserve_here(only);
                }
                Ok(only) => self.preserve_by_hand(only.into()),
                Err(several) => self.preserve_by_hand(several),
            }
        }
        if !self.to_flush.is_empty() {
            let flushes = std::mem::take(&mut self.to_flush);
            self.volume.flusher.order(Task::Flush(flushes), &self.inbox);
        }
    }
}

fn store_range(request: &Request) -> ByteRange {
    ByteRange::new(request.range.offset_bytes, request.range.length_bytes)
}

#[cfg(test)]
mod tests;
