//! Which blocks of the log are free.
//!
//! `plan` allocates, `checkpoint` frees, `open` rebuilds it. The log is an endless row of segments,
//! each backed by preallocated space or not; allocation in a segment that is not backed makes the
//! write prepare it first. It does no I/O.
//! Invariant I6: a freed block is allocated again only after the checkpoint that dropped it is durable
//! and every I/O planned before is over.

use std::collections::BTreeSet;

use crate::units::{BLOCK_BYTES, LogBlock, in_memory};

/// A growing set of bits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bitmap {
    words: Vec<u64>,
}

impl Bitmap {
    pub(crate) fn get(&self, bit: u64) -> bool {
        self.words
            .get(in_memory(bit / 64))
            .is_some_and(|word| word >> (bit % 64) & 1 == 1)
    }

    pub(crate) fn set(&mut self, bit: u64) {
        let place = in_memory(bit / 64);
        if place >= self.words.len() {
            self.words.resize(place + 1, 0);
        }
        if let Some(word) = self.words.get_mut(place) {
            *word |= 1 << (bit % 64);
        }
    }

    pub(crate) fn clear(&mut self, bit: u64) {
        if let Some(word) = self.words.get_mut(in_memory(bit / 64)) {
            *word &= !(1 << (bit % 64));
        }
    }

    /// Clears every bit that is set in `other`.
    pub(crate) fn remove(&mut self, other: &Bitmap) {
        for (word, gone) in self.words.iter_mut().zip(&other.words) {
            *word &= !gone;
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Bits that are set here and not in `other`.
    pub(crate) fn minus(&self, other: &Bitmap) -> Bitmap {
        let words = self
            .words
            .iter()
            .enumerate()
            .map(|(place, word)| word & !other.words.get(place).copied().unwrap_or(0))
            .collect();
        Bitmap { words }
    }

    pub(crate) fn ones(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().enumerate().flat_map(|(place, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                (rest != 0).then(|| {
                    let bit = u64::from(rest.trailing_zeros());
                    rest &= rest - 1;
                    place as u64 * 64 + bit
                })
            })
        })
    }

    /// First clear bit in `from..end`.
    fn first_clear(&self, from: u64, end: u64) -> Option<u64> {
        let mut bit = from;
        while bit < end {
            let word = self.words.get(in_memory(bit / 64)).copied().unwrap_or(0);
            let free = !word >> (bit % 64);
            if free != 0 {
                let found = bit + u64::from(free.trailing_zeros());
                return (found < end).then_some(found);
            }
            bit = (bit / 64 + 1) * 64;
        }
        None
    }
}

/// Neighbouring blocks of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LogRun {
    pub(crate) start: LogBlock,
    pub(crate) count: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Segment {
    used_blocks: u64,
    backed: bool,
}

/// The allocator.
#[derive(Debug)]
pub(crate) struct Space {
    segment_blocks: u64,
    limit_blocks: u64,
    allocated: Bitmap,
    used_blocks: u64,
    segments: Vec<Segment>,
    /// Segments with free blocks, by whether they are backed: backed ones are used first.
    open_backed: BTreeSet<u64>,
    open_bare: BTreeSet<u64>,
}

impl Space {
    /// An empty log. `limit_bytes` bounds its length.
    pub(crate) fn new(segment_bytes: u64, limit_bytes: u64) -> Space {
        let segment_blocks = (segment_bytes / BLOCK_BYTES).max(1);
        let limit_blocks = (limit_bytes / BLOCK_BYTES).min(crate::layout::MAX_LOG_BLOCKS);
        Space {
            segment_blocks,
            limit_blocks,
            allocated: Bitmap::default(),
            used_blocks: 0,
            segments: Vec::new(),
            open_backed: BTreeSet::new(),
            open_bare: BTreeSet::new(),
        }
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
        backed * self.segment_blocks
    }

    pub(crate) fn allocated(&self) -> &Bitmap {
        &self.allocated
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
        if segment.used_blocks < self.capacity_of(number) {
            if segment.backed {
                self.open_backed.insert(number);
            } else {
                self.open_bare.insert(number);
            }
        }
    }

    /// Takes over the blocks found in use at open; their segments count as backed.
    pub(crate) fn load(&mut self, mapped: Bitmap) {
        for (number, count) in self.by_segment(mapped.ones()) {
            self.reach(number);
            self.used_blocks += count;
            if let Some(segment) = self.segments.get_mut(in_memory(number)) {
                segment.used_blocks += count;
                segment.backed = true;
            }
            self.note(number);
        }
        self.allocated = mapped;
    }

    /// How many of the ascending blocks fall into each segment.
    fn by_segment(&self, blocks: impl Iterator<Item = u64>) -> Vec<(u64, u64)> {
        let mut counts: Vec<(u64, u64)> = Vec::new();
        for block in blocks {
            let number = block / self.segment_blocks;
            match counts.last_mut() {
                Some((last, count)) if *last == number => *count += 1,
                Some(_) | None => counts.push((number, 1)),
            }
        }
        counts
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
        let start = self.allocated.first_clear(first, end)?;
        let mut count = 0;
        while count < most && start + count < end && !self.allocated.get(start + count) {
            self.allocated.set(start + count);
            count += 1;
        }
        self.used_blocks += count;
        if let Some(segment) = self.segments.get_mut(in_memory(number)) {
            segment.used_blocks += count;
        }
        self.note(number);
        Some(LogRun {
            start: LogBlock(start),
            count,
        })
    }

    /// Frees a run that no record names.
    pub(crate) fn free(&mut self, run: LogRun) {
        let blocks = run.start.0..run.start.0 + run.count;
        let counts = self.by_segment(blocks.clone().filter(|block| self.allocated.get(*block)));
        blocks.for_each(|block| self.allocated.clear(block));
        self.give_back(&counts);
    }

    /// Frees many blocks at once (I6 is the caller's).
    pub(crate) fn free_all(&mut self, bits: &Bitmap) {
        let counts = self.by_segment(bits.ones().filter(|block| self.allocated.get(*block)));
        self.allocated.remove(bits);
        self.give_back(&counts);
    }

    fn give_back(&mut self, counts: &[(u64, u64)]) {
        for (number, count) in counts {
            self.used_blocks -= count;
            if let Some(segment) = self.segments.get_mut(in_memory(*number)) {
                segment.used_blocks -= count;
            }
            self.note(*number);
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

    /// A segment to set space aside for, when fewer than half a segment's blocks are free and backed.
    pub(crate) fn segment_to_back(&mut self) -> Option<u64> {
        let free: u64 = self
            .open_backed
            .iter()
            .filter_map(|number| {
                let segment = self.segments.get(in_memory(*number))?;
                Some(self.capacity_of(*number) - segment.used_blocks)
            })
            .sum();
        if free > self.segment_blocks / 2 {
            return None;
        }
        if let Some(number) = self.open_bare.first() {
            return Some(*number);
        }
        let fresh = self.segments.len() as u64;
        (self.capacity_of(fresh) > 0).then_some(fresh)
    }

    /// A backed segment without a used block, when another one is left: its space can go back. It counts
    /// as bare from now on.
    pub(crate) fn take_idle_segment(&mut self, spare: usize) -> Option<u64> {
        let idle: Vec<u64> = self
            .open_backed
            .iter()
            .copied()
            .filter(|number| {
                self.segments
                    .get(in_memory(*number))
                    .is_some_and(|s| s.used_blocks == 0)
            })
            .collect();
        let number = *idle.get(spare..)?.last()?;
        if let Some(segment) = self.segments.get_mut(in_memory(number)) {
            segment.backed = false;
            // Closed while its hole is punched: nothing may be allocated in it meanwhile.
            segment.used_blocks = self.segment_blocks;
        }
        self.note(number);
        Some(number)
    }

    /// Ends what [`Space::take_idle_segment`] began.
    pub(crate) fn released(&mut self, number: u64) {
        if let Some(segment) = self.segments.get_mut(in_memory(number)) {
            segment.used_blocks = 0;
        }
        self.note(number);
    }
}

#[cfg(test)]
mod tests;
