//! Which blocks of the log are free.
//!
//! `plan` allocates; `open` says how far the log reaches, `scan` which of it is in use; `reclaim` sweeps. The
//! log is an endless row of segments, each backed by preallocated space or not; allocation in a segment that is not
//! backed makes the write prepare it first. It does no I/O.
//!
//! After opening nobody knows which blocks below the high-water mark are free: all count as allocated, and the log only
//! grows, until the scan has gone through the index. A sweep begins with every block as a candidate; what is
//! allocated, freed or found in use meanwhile leaves it; what is left was dropped, and is freed once.
//! Invariant I6: a freed block is allocated again only after the checkpoint that dropped it is durable
//! and every I/O planned before is over.

mod block_set;

use std::collections::BTreeSet;

pub(crate) use block_set::BlockSet;

use crate::units::{BLOCK_BYTES, LogBlock, in_memory};

/// Neighbouring blocks of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LogRun {
    pub(crate) start: LogBlock,
    pub(crate) count: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Segment {
    backed: bool,
    /// Its hole is being punched, or it is being made ready, or it is in the reserve: nothing may be allocated in it.
    closed: bool,
}

/// What is not known yet after opening.
#[derive(Debug)]
struct Unknown {
    /// Blocks below this one.
    below: u64,
    /// Those of them that were found in use.
    named: BlockSet,
}

/// The allocator.
#[derive(Debug)]
pub(crate) struct Space {
    segment_blocks: u64,
    /// Blocks below this one are not for data.
    first_block: u64,
    limit_blocks: u64,
    allocated: BlockSet,
    used_blocks: u64,
    segments: Vec<Segment>,
    /// Segments with free blocks, by whether they are backed: backed ones are used first.
    open_backed: BTreeSet<u64>,
    open_bare: BTreeSet<u64>,
    unknown: Option<Unknown>,
    /// Blocks that the sweep under way will free, unless they turn out to be in use.
    candidates: Option<BlockSet>,
}

impl Space {
    /// An empty log, of which the blocks from `first_block` on are for data. `limit_bytes` bounds its length.
    pub(crate) fn new(segment_bytes: u64, limit_bytes: u64, first_block: u64) -> Space {
        let segment_blocks = (segment_bytes / BLOCK_BYTES).max(1);
        let limit_blocks = (limit_bytes / BLOCK_BYTES).min(crate::layout::MAX_LOG_BLOCKS);
        let mut space = Space {
            segment_blocks,
            first_block,
            limit_blocks,
            allocated: BlockSet::new(segment_blocks),
            used_blocks: 0,
            segments: Vec::new(),
            open_backed: BTreeSet::new(),
            open_bare: BTreeSet::new(),
            unknown: None,
            candidates: None,
        };
        space.fill_below(first_block);
        space
    }

    /// All blocks below `end` are allocated.
    fn fill_below(&mut self, end: u64) {
        let whole = end / self.segment_blocks;
        self.allocated = BlockSet::full(self.segment_blocks, in_memory(whole));
        (whole * self.segment_blocks..end).for_each(|block| {
            self.allocated.insert(block);
        });
        if end > 0 {
            self.reach((end - 1) / self.segment_blocks);
        }
        for number in 0..self.segments.len() as u64 {
            if let Some(segment) = self.segments.get_mut(in_memory(number)) {
                segment.backed = true;
            }
            self.note(number);
        }
    }

    /// A volume was opened whose log reaches up to `high_water`. Until [`Space::end_scan`] it only grows.
    pub(crate) fn begin_scan(&mut self, high_water: u64) {
        let below = high_water.max(self.first_block);
        self.fill_below(below);
        self.used_blocks = below - self.first_block;
        self.unknown = Some(Unknown {
            below,
            named: BlockSet::new(self.segment_blocks),
        });
    }

    /// Whether it is not known yet which blocks are free.
    pub(crate) fn is_scanning(&self) -> bool {
        self.unknown.is_some()
    }

    /// The index names `block`: the scan found it, or it leaves the sweep.
    pub(crate) fn note_named(&mut self, block: LogBlock) {
        if let Some(unknown) = &mut self.unknown
            && block.0 < unknown.below
        {
            unknown.named.insert(block.0);
        }
        if let Some(candidates) = &mut self.candidates {
            candidates.remove(block.0);
        }
    }

    /// All that was in use at opening has been noted: the rest is free.
    pub(crate) fn end_scan(&mut self) {
        let Some(mut unknown) = self.unknown.take() else {
            return;
        };
        (0..self.first_block).for_each(|block| {
            unknown.named.insert(block);
        });
        let whole = unknown.below / self.segment_blocks;
        for number in 0..whole {
            self.used_blocks -= self.allocated.replace_part(&mut unknown.named, number);
        }
        for block in (whole * self.segment_blocks)..unknown.below {
            if !unknown.named.contains(block) && self.allocated.remove(block) {
                self.used_blocks -= 1;
            }
        }
        for number in 0..self.segments.len() as u64 {
            // An empty one may have space of its own or not; asking for it again costs little.
            if self.allocated.count_in(number) == 0
                && let Some(segment) = self.segments.get_mut(in_memory(number))
            {
                segment.backed = false;
            }
            self.note(number);
        }
    }

    /// Begins a sweep: every block is a candidate. None is under way, and no scan.
    pub(crate) fn begin_sweep(&mut self) {
        debug_assert!(self.candidates.is_none() && self.unknown.is_none());
        let parts = in_memory(self.allocated.parts());
        let mut candidates = BlockSet::full(self.segment_blocks, parts);
        (0..self.first_block).for_each(|block| {
            candidates.remove(block);
        });
        self.candidates = Some(candidates);
    }

    /// Frees what is left of the sweep in the next segment behind `cursor` (I6 is the caller's); where to go on.
    pub(crate) fn sweep(&mut self, cursor: u64) -> Option<u64> {
        let candidates = self.candidates.take()?;
        let mut number = cursor;
        while number < candidates.parts() && candidates.count_in(number) == 0 {
            number += 1;
        }
        if number >= candidates.parts() {
            return None;
        }
        for block in candidates.common_in(&self.allocated, number) {
            self.allocated.remove(block);
            self.used_blocks -= 1;
        }
        self.note(number);
        self.candidates = Some(candidates);
        Some(number + 1)
    }

    /// Forgets the sweep: nothing is freed.
    pub(crate) fn abandon_sweep(&mut self) {
        self.candidates = None;
    }

    /// One block behind the highest that is allocated: the log reaches no further.
    pub(crate) fn high_water(&self) -> u64 {
        self.allocated.last().map_or(0, |last| last + 1)
    }

    pub(crate) fn used_blocks(&self) -> u64 {
        self.used_blocks
    }

    pub(crate) fn backed_blocks(&self) -> u64 {
        let backed = self
            .segments
            .iter()
            .filter(|segment| segment.backed)
            .count() as u64;
        (backed * self.segment_blocks).saturating_sub(self.first_block)
    }

    fn capacity_of(&self, number: u64) -> u64 {
        self.limit_blocks
            .saturating_sub(number * self.segment_blocks)
            .min(self.segment_blocks)
    }

    fn reach(&mut self, number: u64) {
        while self.segments.len() as u64 <= number {
            let fresh = self.segments.len() as u64;
            self.segments.push(Segment::default());
            if self.capacity_of(fresh) > 0 {
                self.open_bare.insert(fresh);
            }
        }
    }

    fn note(&mut self, number: u64) {
        let Some(segment) = self.segments.get(in_memory(number)).copied() else {
            return;
        };
        self.open_backed.remove(&number);
        self.open_bare.remove(&number);
        if !segment.closed && self.allocated.count_in(number) < self.capacity_of(number) {
            if segment.backed {
                self.open_backed.insert(number);
            } else {
                self.open_bare.insert(number);
            }
        }
    }

    /// Allocates `count` blocks in as few runs as are at hand; `None` when there is no room.
    pub(crate) fn allocate(&mut self, count: u64) -> Option<Vec<LogRun>> {
        let mut runs: Vec<LogRun> = Vec::new();
        let mut missing = count;
        while missing > 0 {
            let Some(run) = self.allocate_run(missing) else {
                for run in runs {
                    self.free(run);
                }
                return None;
            };
            missing -= run.count;
            match runs.last_mut() {
                Some(last) if last.start.plus(last.count) == run.start => last.count += run.count,
                Some(_) | None => runs.push(run),
            }
        }
        Some(runs)
    }

    fn allocate_run(&mut self, most: u64) -> Option<LogRun> {
        let number = match self.open_backed.first().or(self.open_bare.first()) {
            Some(number) => *number,
            None => {
                let fresh = self.segments.len() as u64;
                if self.capacity_of(fresh) == 0 {
                    return None;
                }
                self.reach(fresh);
                fresh
            }
        };
        let first = number * self.segment_blocks;
        let end = first + self.capacity_of(number);
        let start = self.allocated.first_absent(first, end)?;
        let mut count = 0;
        while count < most && start + count < end && self.allocated.insert(start + count) {
            if let Some(candidates) = &mut self.candidates {
                candidates.remove(start + count);
            }
            count += 1;
        }
        self.used_blocks += count;
        if self.allocated.count_in(number) >= self.capacity_of(number) {
            self.note(number);
        }
        Some(LogRun {
            start: LogBlock(start),
            count,
        })
    }

    /// Frees a run that no record names.
    pub(crate) fn free(&mut self, run: LogRun) {
        let mut numbers = BTreeSet::new();
        for block in run.start.0..run.start.0 + run.count {
            if let Some(candidates) = &mut self.candidates {
                candidates.remove(block);
            }
            // What was allocated before opening stays until a sweep: the scan may have seen it.
            let is_old = self
                .unknown
                .as_ref()
                .is_some_and(|unknown| block < unknown.below);
            if !is_old && self.allocated.remove(block) {
                self.used_blocks -= 1;
                numbers.insert(block / self.segment_blocks);
            }
        }
        for number in numbers {
            self.note(number);
        }
    }

    /// Segments the run lies in that have no space of their own yet.
    pub(crate) fn bare_segments(&self, run: LogRun) -> Vec<u64> {
        if run.count == 0 {
            return Vec::new();
        }
        let first = run.start.0 / self.segment_blocks;
        let last = (run.start.0 + run.count - 1) / self.segment_blocks;
        (first..=last)
            .filter(|number| {
                self.segments
                    .get(in_memory(*number))
                    .is_some_and(|segment| !segment.backed)
            })
            .collect()
    }

    /// Byte range of a segment: offset and length.
    pub(crate) fn segment_bytes(&self, number: u64) -> (u64, u64) {
        (
            number * self.segment_blocks * BLOCK_BYTES,
            self.capacity_of(number) * BLOCK_BYTES,
        )
    }

    /// Notes that a segment has its space.
    pub(crate) fn set_backed(&mut self, number: u64) {
        self.reach(number);
        if let Some(segment) = self.segments.get_mut(in_memory(number)) {
            segment.backed = true;
        }
        self.note(number);
    }

    /// Free blocks that have their space.
    pub(crate) fn ready_blocks(&self) -> u64 {
        self.open_backed
            .iter()
            .map(|number| self.capacity_of(*number) - self.allocated.count_in(*number))
            .sum()
    }

    /// Takes a segment to make ready, when fewer than `ahead` segments' worth of blocks are free and backed, less a half.
    /// Nothing is allocated in it until [`Space::ready`] or [`Space::released`].
    pub(crate) fn take_bare_segment(&mut self, ahead: u64) -> Option<u64> {
        let free = self.ready_blocks();
        if free + self.segment_blocks / 2 >= ahead.max(1) * self.segment_blocks {
            return None;
        }
        self.close_bare()
    }

    /// Takes a segment for the reserve, if the log may have at least so many. Nothing is allocated in it until
    /// [`Space::released`].
    pub(crate) fn take_reserve(&mut self, segments_min: u64) -> Option<u64> {
        let is_large = self.limit_blocks / self.segment_blocks >= segments_min;
        is_large.then(|| self.close_bare()).flatten()
    }

    fn close_bare(&mut self) -> Option<u64> {
        let mut bare = self.open_bare.iter();
        let number = match bare.find(|number| self.allocated.count_in(**number) == 0) {
            Some(number) => *number,
            None => self.segments.len() as u64,
        };
        if self.capacity_of(number) == 0 {
            return None;
        }
        self.reach(number);
        if let Some(segment) = self.segments.get_mut(in_memory(number)) {
            segment.closed = true;
        }
        self.note(number);
        Some(number)
    }

    /// Ends what [`Space::take_bare_segment`] began: the segment has its space.
    pub(crate) fn ready(&mut self, number: u64) {
        if let Some(segment) = self.segments.get_mut(in_memory(number)) {
            segment.backed = true;
        }
        self.released(number);
    }

    /// A backed segment without a used block, when another one is left: its space can go back. It counts
    /// as bare from now on.
    pub(crate) fn take_idle_segment(&mut self, spare: usize) -> Option<u64> {
        let idle: Vec<u64> = self
            .open_backed
            .iter()
            .copied()
            .filter(|number| self.allocated.count_in(*number) == 0)
            .collect();
        let number = *idle.get(spare..)?.last()?;
        if let Some(segment) = self.segments.get_mut(in_memory(number)) {
            segment.backed = false;
            segment.closed = true;
        }
        self.note(number);
        Some(number)
    }

    /// Ends what [`Space::take_idle_segment`] began, or gives up what [`Space::take_bare_segment`] did.
    pub(crate) fn released(&mut self, number: u64) {
        if let Some(segment) = self.segments.get_mut(in_memory(number)) {
            segment.closed = false;
        }
        self.note(number);
    }
}

#[cfg(test)]
mod tests;
