//! Background work, one bounded step per call.
//!
//! The daemon's background thread calls it. It decides only what comes next; the work is in
//! `ahead`, `checkpoint`, `reserve`, `settle` and `space`.

use crate::checkpoint::Turn;
use crate::error::{Result, StoreError};
use crate::settle::SettleStep;
use crate::units::{BLOCK_BYTES, in_memory};
use crate::volume::{Maintenance as Work, Shared, Sweep, Volume, lock};

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Maintenance {
    /// Nothing to do now; call again after a while, or after a snapshot was deleted.
    Idle,
    /// Call again soon.
    More,
    /// There is only room to be made ahead, and still enough of it: no hurry while the guest is at work.
    Ahead,
}

impl Volume {
    /// One bounded step of checkpoint, space reclaim, preallocation or settling: about `budget_blocks`
    /// blocks, or index pages, of I/O. Blocking, but guest I/O goes on beside it.
    pub fn maintain(&self, budget_blocks: u64) -> Result<Maintenance> {
        if self.shared.options.read_only {
            return Ok(Maintenance::Idle);
        }
        self.shared.check_writable()?;
        let mut work = lock(&self.shared.maintenance);
        self.shared.maintain(&mut work, budget_blocks)
    }

    /// Whether writes would soon have to wait for a checkpoint, or outrun the room that is ready for them, so that maintenance should
    /// not be slow now.
    pub fn is_pressed(&self) -> bool {
        let options = &self.shared.options;
        let core = self.shared.core();
        let ready_bytes = core.space.ready_blocks() * BLOCK_BYTES;
        let is_short = !core.state.table.is_empty()
            && options.segments_ahead > 0
            && ready_bytes < options.segment_bytes;
        is_short || core.is_over_bounds(options, 2)
    }

    /// Whether maintenance is on its way to give back space that nobody needs.
    pub fn is_reclaiming(&self) -> bool {
        let core = self.shared.core();
        core.reclaim || core.sweep != Sweep::Idle || core.space.is_scanning()
    }
}

impl Shared {
    /// Two things at most, half the budget each: room ahead, which writes may run out of while the other goes on for long; and the
    /// first of the rest that is due.
    fn maintain(&self, work: &mut Work, budget_blocks: u64) -> Result<Maintenance> {
        let confirm = {
            let mut core = self.core();
            core.free_superseded();
            std::mem::take(&mut core.unconfirmed.wanted)
        };
        if confirm {
            // Writes that wait for room get what was superseded and is not confirmed yet.
            self.confirm_records()?;
            return Ok(Maintenance::More);
        }
        if self.free_dropped()? {
            return Ok(Maintenance::More);
        }
        let budget_blocks = (budget_blocks / 2).max(1);
        let ahead = self.step_ahead(&mut work.ahead, budget_blocks)?;
        let rest = match self.maintain_index(work, budget_blocks) {
            Err(StoreError::NoSpace) if self.lend_reserve(&work.reserve)? => Maintenance::More,
            rest => rest?,
        };
        if work.checkpoint.is_none() && self.core().sweep == Sweep::Idle {
            self.keep_reserve(&mut work.reserve)?;
        }
        Ok(if ahead && rest == Maintenance::Idle {
            self.urgency_of_room()
        } else {
            rest
        })
    }

    /// Writing room ahead beside a guest that writes costs it bandwidth, so more than half of the room is used up first.
    fn urgency_of_room(&self) -> Maintenance {
        let ready_bytes = self.core().space.ready_blocks() * BLOCK_BYTES;
        if ready_bytes >= self.options.segment_bytes / 2 * 3 {
            Maintenance::Ahead
        } else {
            Maintenance::More
        }
    }

    fn maintain_index(&self, work: &mut Work, budget_blocks: u64) -> Result<Maintenance> {
        if work.checkpoint.is_some() {
            self.step_checkpoint(work, budget_blocks)?;
            return Ok(Maintenance::More);
        }
        if std::mem::take(&mut work.sweep_due) {
            self.begin_reclaim(work, true)?;
            return Ok(Maintenance::More);
        }
        let (full, garbage) = {
            let core = self.core();
            let discarded = core.discarded_blocks * BLOCK_BYTES;
            let garbage = core.reclaim || discarded > self.options.segment_bytes / 4;
            (
                core.is_over_bounds(&self.options, 1),
                garbage && core.sweep == Sweep::Idle,
            )
        };
        if full {
            self.begin_checkpoint(work, Turn::Keep)?;
            return Ok(Maintenance::More);
        }
        if work.scan.is_some() {
            self.step_scan(work, budget_blocks)?;
            return Ok(Maintenance::More);
        }
        if work.reclaim.is_some() {
            self.step_reclaim(work, budget_blocks)?;
            return Ok(Maintenance::More);
        }
        if garbage {
            let unmerged = Shared::begin_sweep(&mut self.core());
            work.sweep_due = true;
            if unmerged {
                self.begin_checkpoint(work, Turn::Keep)?;
            }
            return Ok(Maintenance::More);
        }
        if self.begin_reclaim(work, false)? {
            return Ok(Maintenance::More);
        }
        Ok(match self.step_settle(&mut work.settle, budget_blocks)? {
            SettleStep::Idle => Maintenance::Idle,
            SettleStep::More => Maintenance::More,
        })
    }

    /// What would otherwise be due soon after a snapshot, done before it: room for the first writes, and a checkpoint if the memtable
    /// or the journal is half full, so that no write of the window has to wait for one.
    pub(crate) fn make_ready(&self, work: &mut Work) -> Result<()> {
        if self.core().is_over_bounds(&self.options, 2) {
            self.run_checkpoint(work)?;
            self.begin_checkpoint(work, Turn::Keep)?;
            self.run_checkpoint(work)?;
        }
        self.make_room_ahead(&mut work.ahead)?;
        self.keep_reserve(&mut work.reserve)
    }

    /// Frees what a durable checkpoint dropped and no older I/O reads (I6); gives idle segments back.
    fn free_dropped(&self) -> Result<bool> {
        let segment = {
            let mut core = self.core();
            let core = &mut *core;
            match core.sweep {
                Sweep::Idle | Sweep::Marking => {}
                Sweep::Waiting(generation) => {
                    if core.pins.is_over(generation) {
                        core.sweep = Sweep::Freeing(0);
                    }
                }
                Sweep::Freeing(cursor) => {
                    core.sweep = core.space.sweep(cursor).map_or(Sweep::Idle, Sweep::Freeing);
                }
            }
            if matches!(core.sweep, Sweep::Freeing(_)) {
                return Ok(true);
            }
            // What came free is used again, being written already; twice what is kept ready, so that deleting one snapshot for each
            // one taken neither gives back nor writes anything. Without snapshots once as much stays, for the next ones.
            let spare = match core.state.table.is_empty() {
                true => in_memory(self.options.segments_ahead),
                false => in_memory(2 * self.options.segments_ahead.max(1)),
            };
            core.space.take_idle_segment(spare)
        };
        let Some(number) = segment else {
            return Ok(false);
        };
        let released = self.release_segment(number);
        self.core().space.released(number);
        released.map(|()| true)
    }
}
