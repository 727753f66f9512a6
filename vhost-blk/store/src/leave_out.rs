//! Leaving out: parts of the newest snapshot that nobody needs (VSS: `FilesNotToSnapshot`) are let go, ahead of the writes that
//! would have them kept.
//!
//! The daemon calls it through `Volume`, step by step, once a set is kept; guest writes go on beside it.
//! Invariants: only a version that the newest snapshot alone sees becomes zeroes; the live data is never touched; no write to a
//! block is planned between the choice of it and the round that makes LEAVE_OUT durable (I3).

use std::sync::MutexGuard;

use crate::error::{Result, StoreError};
use crate::index::Location;
use crate::journal::Record;
use crate::layout::MAX_RECORD_BLOCKS;
use crate::superblock::Superblock;
use crate::units::{BLOCK_BYTES, Block, ByteRange, Epoch, SnapshotId};
use crate::volume::{Core, Maintenance, Shared, Volume, lock};

/// Blocks that a step looks at, and lets writes wait for during one sync.
const STEP_BLOCKS: u64 = 16_384;
/// Records of a step.
const STEP_RECORDS: usize = 256;
/// Ranges that a step looks at: each is looked up in the index by itself, while writes wait.
const STEP_RANGES: usize = 64;

/// What is to be left out of a snapshot, and how far that is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaveOut {
    /// First block, and the one behind the last; the next one is at the end. None touches another.
    rest: Vec<(u64, u64)>,
    left_out_blocks: u64,
}

impl LeaveOut {
    /// Of the ranges only whole blocks count, each once.
    #[must_use]
    pub fn new(ranges: &[ByteRange]) -> LeaveOut {
        let mut rest: Vec<(u64, u64)> = ranges
            .iter()
            .map(|range| {
                let end = range.offset_bytes.saturating_add(range.length_bytes);
                (range.offset_bytes.div_ceil(BLOCK_BYTES), end / BLOCK_BYTES)
            })
            .filter(|(first, end)| first < end)
            .collect();
        rest.sort_unstable_by(|one, other| other.cmp(one));
        let mut apart: Vec<(u64, u64)> = Vec::new();
        while let Some((first, end)) = rest.pop() {
            match apart.last_mut() {
                Some((_, last)) if first <= *last => *last = end.max(*last),
                Some(_) | None => apart.push((first, end)),
            }
        }
        apart.reverse();
        LeaveOut {
            rest: apart,
            left_out_blocks: 0,
        }
    }

    /// Bytes that the snapshot does not keep, so far.
    #[must_use]
    pub fn left_out_bytes(&self) -> u64 {
        self.left_out_blocks * BLOCK_BYTES
    }

    /// The next blocks to look at, `most` at most: the first, and the one behind the last.
    fn take(&mut self, most: u64, end: Block) -> Option<(Block, Block)> {
        while most > 0
            && let Some((first, behind)) = self.rest.pop()
        {
            let behind = behind.min(end.0);
            if first >= behind {
                continue;
            }
            let here = behind.min(first.saturating_add(most));
            if here < behind {
                self.rest.push((here, behind));
            }
            return Some((Block(first), Block(here)));
        }
        None
    }
}

/// Whose versions must stay: the snapshot before the newest.
#[derive(Clone, Copy, Debug)]
struct Older {
    epoch: Epoch,
    end: Block,
}

impl Core {
    /// Neighbouring blocks of `first..end` whose version the newest snapshot alone needs, and that no write moves: first and count.
    fn leavable(
        &mut self,
        first: Block,
        end: Block,
        newest: Epoch,
        older: Option<Older>,
    ) -> Result<Vec<(Block, u32)>> {
        let last = Block(end.0 - 1);
        let states = self.state.index.states(first, last, Some(newest))?;
        let before = match older {
            Some(older) => self.state.index.states(first, last, Some(older.epoch))?,
            None => Vec::new(),
        };
        let mut runs: Vec<(Block, u32)> = Vec::new();
        for (place, state) in states.iter().enumerate() {
            let block = first.plus(place as u64);
            let is_alone = older.is_none_or(|older| {
                block >= older.end || before.get(place).is_some_and(|state| state.touched)
            });
            // What lives as zeroes costs nothing either way.
            let leaves = !state.touched
                && is_alone
                && state.live != Location::Zero
                && !self.is_busy(block.0, block.0);
            if !leaves {
                continue;
            }
            match runs.last_mut() {
                Some((start, count))
                    if start.plus(u64::from(*count)) == block && *count < MAX_RECORD_BLOCKS =>
                {
                    *count += 1;
                }
                Some(_) | None => runs.push((block, 1)),
            }
        }
        Ok(runs)
    }
}

impl Shared {
    /// A program that does not know LEAVE_OUT would take it for the journal's end: the slot says that it may be there, before it is.
    /// A revert makes another epoch of what it found when it began, so nothing is recorded beside it: it waits as long as the answer
    /// lives.
    fn announce_leave_out(&self) -> Result<MutexGuard<'_, Maintenance>> {
        let mut work = lock(&self.maintenance);
        self.check_writable()?;
        if work.superblock.leaves_out {
            return Ok(work);
        }
        let announced = Superblock {
            leaves_out: true,
            ..work.superblock.clone()
        };
        self.flip(&mut work, announced)
            .inspect_err(|_| self.poison())?;
        Ok(work)
    }

    fn step_leave_out(&self, id: SnapshotId, wanted: &mut LeaveOut) -> Result<bool> {
        self.check_writable()?;
        if self.core().is_over_bounds(&self.options, 1) {
            self.relieve()?;
        }
        let _work = self.announce_leave_out()?;
        let mut core = self.core();
        let Some((newest, older)) = self.newest_and_older(&core, id)? else {
            wanted.rest.clear();
            return Ok(false);
        };
        let end = core.state.snapshots_end();
        let mut most = STEP_BLOCKS.min(self.options.memtable_records as u64).max(1);
        let mut runs: Vec<(Block, u32)> = Vec::new();
        let mut looked_at = 0;
        while looked_at < STEP_RANGES
            && let Some((first, behind)) = wanted.take(most, end)
        {
            looked_at += 1;
            most -= behind.0 - first.0;
            let leavable = core.leavable(first, behind, newest, older);
            runs.extend(self.heed(leavable)?);
            if let Some((next, _)) = runs.get(STEP_RECORDS) {
                wanted.rest.push((next.0, behind.0));
                runs.truncate(STEP_RECORDS);
                break;
            }
        }
        if runs.is_empty() {
            return Ok(looked_at > 0);
        }
        // As a plan does: behind it come a COMMIT, and one that confirms it.
        let needed = core.promised_records + runs.len() as u64 + 3;
        if !core.journal.has_room(needed) {
            let again = runs.iter().rev();
            let again = again.map(|(first, count)| (first.0, first.0 + u64::from(*count)));
            wanted.rest.extend(again);
            return Err(StoreError::Busy);
        }
        let epoch = core.state.epoch;
        let records: Vec<Record> = runs
            .iter()
            .map(|(block, count)| Record::LeaveOut {
                block: *block,
                count: *count,
                epoch,
            })
            .collect();
        core.record(self, &records)?;
        for (block, count) in &runs {
            let last = block.plus(u64::from(*count) - 1);
            core.busy.insert(block.0, last.0);
        }
        drop(core);
        let committed = self.commit_records();
        // Whatever came of it: after a failed sync nothing is written any more.
        let mut core = self.core();
        for (block, _) in &runs {
            core.busy.remove(&block.0);
        }
        drop(core);
        committed?;
        let blocks: u64 = runs.iter().map(|(_, count)| u64::from(*count)).sum();
        wanted.left_out_blocks += blocks;
        Ok(true)
    }

    /// The epoch of the snapshot and the one before it; `None` if it is not the newest.
    fn newest_and_older(
        &self,
        core: &Core,
        id: SnapshotId,
    ) -> Result<Option<(Epoch, Option<Older>)>> {
        let table = &core.state.table;
        let snapshot = table.get(id).ok_or(StoreError::NoSuchSnapshot(id))?;
        let is_newest = table
            .newest()
            .is_some_and(|newest| newest.snapshot_id == id);
        let older = table
            .all()
            .filter(|other| other.epoch < snapshot.epoch)
            .last()
            .map(|older| Older {
                epoch: older.epoch,
                end: Block(older.size_bytes.div_ceil(BLOCK_BYTES)),
            });
        Ok(is_newest.then_some((snapshot.epoch, older)))
    }
}

impl Volume {
    /// Goes on leaving `wanted` out of a snapshot: a step of some blocks and one round; `false` when nothing is left to do. What was
    /// left out reads as zeroes from the snapshot, durably; writes there are not redirected and preserve nothing. Left in is what
    /// an older snapshot sees, too, or a write came to first; all of it once there is a newer snapshot. Requests that were refused
    /// with `Overlaps` meanwhile may be tried again after each step. Blocking.
    ///
    /// `Busy`: writes in flight have taken all room of the journal; it may be called again.
    pub fn leave_out(&self, snapshot_id: SnapshotId, wanted: &mut LeaveOut) -> Result<bool> {
        self.shared.step_leave_out(snapshot_id, wanted)
    }
}
