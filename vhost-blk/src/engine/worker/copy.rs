//! Old data to the log, before or beside the new: what a copy-on-write preserves, and what surrounds an unaligned redirect.
//!
//! Used by the worker. The copies of a whole pass are read at once and written at once (the ring joins neighbours in the
//! log); then all plans whose copies have landed go to a hand together, for one round of syncs. Requests that only read pass by.
//!
//! Invariants:
//! * A copy's bytes are summed in the buffer that is written, which nobody else sees.
//! * A plan whose copies have landed waits for those that were under way then, for no later ones: a round for the first alone would
//!   let all the others wait for two.

use super::super::blocking::Task;
use super::super::pool::PRIVATE_BYTES_MAX;
use super::super::ring::{Completed, Direction, Memory, Span};
use super::{Mover, Running, Stage, Worker};
use std::io::ErrorKind;
use std::time::Instant;
use vhost_blk_store::{BlockCopy, DataFile, Source, WritePlan};

/// Plans whose copies have landed, until they go to a hand.
#[derive(Debug, Default)]
pub(super) struct Landed {
    plans: Vec<(u32, WritePlan)>,
    /// Requests that copy now.
    under_way: usize,
    /// How many began to copy so far; tells the older from the younger.
    begun: u64,
    /// Who is waited for: those that had begun by then, and how many of them are left.
    awaited: Option<(u64, usize)>,
}

impl Landed {
    /// A request begins to copy; answers its number among all that did.
    pub(super) fn begin(&mut self) -> u64 {
        self.under_way += 1;
        self.begun += 1;
        self.begun
    }

    /// The request that was the `begun`th to copy does so no more; its plan waits for a hand if all is well.
    pub(super) fn end(&mut self, begun: u64, plan: Option<(u32, WritePlan)>) {
        self.under_way = self.under_way.saturating_sub(1);
        if let Some((youngest, left)) = &mut self.awaited
            && begun <= *youngest
        {
            *left = left.saturating_sub(1);
        }
        if let Some(plan) = plan {
            self.plans.push(plan);
            self.awaited.get_or_insert((self.begun, self.under_way));
        }
    }

    /// True if there are plans, and nobody is waited for.
    pub(super) fn is_due(&self) -> bool {
        matches!(self.awaited, Some((_, 0)))
    }

    pub(super) fn take(&mut self) -> Vec<(u32, WritePlan)> {
        self.awaited = None;
        std::mem::take(&mut self.plans)
    }
}

/// What the transfers of a request are numbered by: the request, and 0 for its data or one more than the place of a copy.
const COPY_SHIFT: u32 = 32;

fn number_of(request: u32, place: usize) -> u64 {
    u64::from(request) | (place as u64 + 1) << COPY_SHIFT
}

/// The request that a transfer belongs to, and the copy if it is one.
pub(super) fn owner(number: u64) -> (u32, Option<usize>) {
    let request = u32::try_from(number & u64::from(u32::MAX)).unwrap_or(u32::MAX);
    let place = usize::try_from(number >> COPY_SHIFT)
        .ok()
        .and_then(|place| place.checked_sub(1));
    (request, place)
}

impl Worker {
    /// True if all copies of the plan can be moved by the ring now.
    pub(super) fn can_copy(&self, plan: &WritePlan) -> bool {
        let fits = |copy: &BlockCopy| {
            copy.from.length_bytes.is_multiple_of(self.alignment_bytes)
                && copy.to_offset_bytes.is_multiple_of(self.alignment_bytes)
                && (copy.from.source == Source::Zero
                    || copy.from.offset_bytes.is_multiple_of(self.alignment_bytes))
        };
        plan.copies().iter().all(fits)
            && self.pool.has(
                plan.copies()
                    .iter()
                    .map(|copy| usize::try_from(copy.from.length_bytes).unwrap_or(usize::MAX)),
            )
    }

    /// Queues the first half of a request's copies: the reading.
    pub(super) fn start_copies(&mut self, number: u32) {
        let Some(Running {
            stage: Stage::Copying { plan, .. } | Stage::Writing { plan },
            moves,
            ..
        }) = self.running.get_mut(number)
        else {
            return;
        };
        for place in 0..plan.copies().len() {
            let Some(copy) = plan.copies().get(place).copied() else {
                break;
            };
            let length = usize::try_from(copy.from.length_bytes).unwrap_or(usize::MAX);
            let (Mover::Ring(ring), Some(mut buffer)) = (&mut self.mover, self.pool.take(length))
            else {
                moves.count(Err(ErrorKind::OutOfMemory.into()));
                continue;
            };
            let file = match copy.from.source {
                Source::Base => DataFile::Base,
                Source::Log => DataFile::Log,
                Source::Zero => {
                    let bytes = buffer.bytes_mut().get_mut(..length).unwrap_or_default();
                    bytes.fill(0);
                    if copy.wants_seal {
                        plan.seal_copy(place, crc32c::crc32c(bytes));
                    }
                    let span = landing(&copy);
                    let number = number_of(number, place);
                    moves.count(ring.start_private(number, DataFile::Log, buffer, span));
                    continue;
                }
            };
            let span = Span {
                direction: Direction::FromFile,
                file_offset_bytes: copy.from.offset_bytes,
                length_bytes: copy.from.length_bytes,
            };
            moves.count(ring.start_private(number_of(number, place), file, buffer, span));
        }
    }

    /// The second half: what was read is written. Answers false if that was the end of it.
    pub(super) fn go_on_copying(&mut self, transfer: &mut Completed) -> bool {
        let (number, Some(place)) = owner(transfer.number) else {
            return false;
        };
        if transfer.span.direction == Direction::ToFile || transfer.outcome.is_err() {
            return false;
        }
        let Some(Running {
            stage: Stage::Copying { plan, .. } | Stage::Writing { plan },
            moves,
            ..
        }) = self.running.get_mut(number)
        else {
            return false;
        };
        let Some(copy) = plan.copies().get(place).copied() else {
            return false;
        };
        let nothing = Memory::None;
        let (Memory::Private(buffer), Mover::Ring(ring)) = (
            std::mem::replace(&mut transfer.memory, nothing),
            &mut self.mover,
        ) else {
            return false;
        };
        if copy.wants_seal {
            let length = usize::try_from(copy.from.length_bytes).unwrap_or(PRIVATE_BYTES_MAX);
            let bytes = buffer.bytes().get(..length).unwrap_or_default();
            plan.seal_copy(place, crc32c::crc32c(bytes));
        }
        let started = ring.start_private(transfer.number, DataFile::Log, buffer, landing(&copy));
        let going_on = started.is_ok();
        if let Err(error) = started {
            tracing::warn!(%error, "cannot start a transfer");
            moves.failed = true;
        }
        going_on
    }

    /// Plans whose copies have landed are made durable in one round, while this queue goes on.
    pub(super) fn preserve_by_hand(&mut self, plans: Vec<(u32, WritePlan)>) {
        self.volume.mover.order(Task::Preserve(plans), &self.inbox);
    }

    /// The same for the only request of the queue, at once.
    pub(super) fn preserve_here(&mut self, (number, plan): (u32, WritePlan)) {
        let begin = Instant::now();
        let mut plans = [plan];
        let preserved = self.volume.store().preserve(&mut plans);
        self.alone.took(begin.elapsed());
        let [plan] = plans;
        match preserved {
            Ok(()) => {
                self.prepared(number, Ok(plan));
                // The blocks beside its own may be written in place, too.
                self.wake_overlapping();
            }
            Err(error) => {
                // Its blocks are free again before anybody is told.
                drop(plan);
                self.prepared(number, Err(error));
            }
        }
        self.moves_over();
    }
}

fn landing(copy: &BlockCopy) -> Span {
    Span {
        direction: Direction::ToFile,
        file_offset_bytes: copy.to_offset_bytes,
        length_bytes: copy.from.length_bytes,
    }
}
