//! Background work, one bounded step per call.
//!
//! The daemon's background thread calls it. It decides only what comes next; the work is in
//! `checkpoint`, `settle` and `space`.

use crate::checkpoint::Turn;
use crate::error::{FileName, Result, StoreError};
use crate::settle::SettleStep;
use crate::volume::{Maintenance as Work, Shared, Sweep, Volume, lock};

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Maintenance {
    /// Nothing to do now; call again after a while, or after a snapshot was deleted.
    Idle,
    /// Call again soon.
    More,
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
}

impl Shared {
    fn maintain(&self, work: &mut Work, budget_blocks: u64) -> Result<Maintenance> {
        if self.free_dropped()? {
            return Ok(Maintenance::More);
        }
        if work.checkpoint.is_some() {
            self.step_checkpoint(work, budget_blocks)?;
            return Ok(Maintenance::More);
        }
        let (due, segment) = {
            let mut core = self.core();
            let discarded = core.discarded_blocks * crate::units::BLOCK_BYTES;
            let garbage = core.reclaim || discarded > self.options.segment_bytes / 4;
            let due =
                core.is_over_bounds(&self.options, 1) || (garbage && core.sweep == Sweep::Idle);
            let needs_log = !core.state.table.is_empty();
            (
                due,
                if needs_log {
                    core.space.segment_to_back()
                } else {
                    None
                },
            )
        };
        if due {
            self.begin_checkpoint(work, Turn::Keep)?;
            return Ok(Maintenance::More);
        }
        if let Some(number) = segment {
            match self.back_segment(number) {
                Ok(()) => return Ok(Maintenance::More),
                // Not an error yet: writes will be held when they really find no room.
                Err(StoreError::NoSpace) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(match self.step_settle(&mut work.settle, budget_blocks)? {
            SettleStep::Idle => Maintenance::Idle,
            SettleStep::More => Maintenance::More,
        })
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
            let spare = usize::from(!core.state.table.is_empty());
            core.space.take_idle_segment(spare)
        };
        let Some(number) = segment else {
            return Ok(false);
        };
        let (offset_bytes, length_bytes) = self.core().space.segment_bytes(number);
        let result = self.files.log.release(offset_bytes, length_bytes);
        self.core().space.released(number);
        result.map(|()| true).map_err(|source| StoreError::Io {
            op: "release",
            file: FileName::Log,
            offset_bytes,
            source,
        })
    }
}
