//! A set of log blocks, one bit each, in parts as long as a segment; an empty or full part costs no bits.
//!
//! `space` keeps what is allocated in it, what a sweep may free, and what a scan found; `check` looks for blocks
//! that are named twice. It knows nothing of what the blocks are for.

use crate::units::in_memory;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Part {
    #[default]
    Empty,
    Full,
    Mixed {
        count: u64,
        words: Box<[u64]>,
    },
}

/// The set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockSet {
    part_blocks: u64,
    parts: Vec<Part>,
}

impl BlockSet {
    /// An empty set in parts of `part_blocks` blocks.
    pub(crate) fn new(part_blocks: u64) -> BlockSet {
        BlockSet {
            part_blocks: part_blocks.max(1),
            parts: Vec::new(),
        }
    }

    /// All blocks of the first `parts` parts.
    pub(crate) fn full(part_blocks: u64, parts: usize) -> BlockSet {
        BlockSet {
            part_blocks: part_blocks.max(1),
            parts: vec![Part::Full; parts],
        }
    }

    pub(crate) fn contains(&self, block: u64) -> bool {
        let place = block % self.part_blocks;
        match self.parts.get(in_memory(block / self.part_blocks)) {
            None | Some(Part::Empty) => false,
            Some(Part::Full) => true,
            Some(Part::Mixed { words, .. }) => words
                .get(in_memory(place / 64))
                .is_some_and(|word| word >> (place % 64) & 1 == 1),
        }
    }

    /// Adds a block; `false` if it was there.
    pub(crate) fn insert(&mut self, block: u64) -> bool {
        let (number, place) = (
            in_memory(block / self.part_blocks),
            block % self.part_blocks,
        );
        if number >= self.parts.len() {
            self.parts.resize(number + 1, Part::Empty);
        }
        let length = in_memory(self.part_blocks.div_ceil(64));
        let Some(part) = self.parts.get_mut(number) else {
            return false;
        };
        if *part == Part::Empty {
            *part = Part::Mixed {
                count: 0,
                words: vec![0; length].into_boxed_slice(),
            };
        }
        let Part::Mixed { count, words } = part else {
            return false;
        };
        let Some(word) = words.get_mut(in_memory(place / 64)) else {
            return false;
        };
        let bit = 1 << (place % 64);
        if *word & bit != 0 {
            return false;
        }
        *word |= bit;
        *count += 1;
        if *count == self.part_blocks {
            *part = Part::Full;
        }
        true
    }

    /// Takes a block out; `false` if it was not there.
    pub(crate) fn remove(&mut self, block: u64) -> bool {
        let (number, place) = (
            in_memory(block / self.part_blocks),
            block % self.part_blocks,
        );
        let Some(part) = self.parts.get_mut(number) else {
            return false;
        };
        if *part == Part::Full {
            let mut words = vec![u64::MAX; in_memory(self.part_blocks.div_ceil(64))];
            let spare = self.part_blocks % 64;
            if spare != 0
                && let Some(last) = words.last_mut()
            {
                *last = (1 << spare) - 1;
            }
            *part = Part::Mixed {
                count: self.part_blocks,
                words: words.into_boxed_slice(),
            };
        }
        let Part::Mixed { count, words } = part else {
            return false;
        };
        let Some(word) = words.get_mut(in_memory(place / 64)) else {
            return false;
        };
        let bit = 1 << (place % 64);
        if *word & bit == 0 {
            return false;
        }
        *word &= !bit;
        *count -= 1;
        if *count == 0 {
            *part = Part::Empty;
        }
        true
    }

    /// Number of parts that may hold anything.
    pub(crate) fn parts(&self) -> u64 {
        self.parts.len() as u64
    }

    /// Number of blocks in a part.
    pub(crate) fn count_in(&self, number: u64) -> u64 {
        match self.parts.get(in_memory(number)) {
            None | Some(Part::Empty) => 0,
            Some(Part::Full) => self.part_blocks,
            Some(Part::Mixed { count, .. }) => *count,
        }
    }

    /// First block in `from..end` that is not in the set; all within one part.
    pub(crate) fn first_absent(&self, from: u64, end: u64) -> Option<u64> {
        let number = from / self.part_blocks;
        let words = match self.parts.get(in_memory(number)) {
            None | Some(Part::Empty) => return (from < end).then_some(from),
            Some(Part::Full) => return None,
            Some(Part::Mixed { words, .. }) => words,
        };
        let start = number * self.part_blocks;
        let mut block = from;
        while block < end {
            let place = block - start;
            let word = words.get(in_memory(place / 64)).copied().unwrap_or(0);
            let free = !word >> (place % 64);
            if free != 0 {
                let found = block + u64::from(free.trailing_zeros());
                return (found < end).then_some(found);
            }
            block = start + (place / 64 + 1) * 64;
        }
        None
    }

    /// The blocks of one part that are in `self` and in `other`, ascending.
    pub(crate) fn common_in(&self, other: &BlockSet, number: u64) -> Vec<u64> {
        let start = number * self.part_blocks;
        let mut found = Vec::new();
        let length = self.part_blocks.div_ceil(64);
        let word_of = |set: &BlockSet, place: u64| match set.parts.get(in_memory(number)) {
            None | Some(Part::Empty) => 0,
            Some(Part::Full) => u64::MAX,
            Some(Part::Mixed { words, .. }) => {
                words.get(in_memory(place)).copied().unwrap_or_default()
            }
        };
        if self.count_in(number) == 0 || other.count_in(number) == 0 {
            return found;
        }
        for place in 0..length {
            let mut both = word_of(self, place) & word_of(other, place);
            while both != 0 {
                let bit = place * 64 + u64::from(both.trailing_zeros());
                both &= both - 1;
                if bit < self.part_blocks {
                    found.push(start + bit);
                }
            }
        }
        found
    }

    /// The highest block of the set.
    pub(crate) fn last(&self) -> Option<u64> {
        for (number, part) in self.parts.iter().enumerate().rev() {
            let start = number as u64 * self.part_blocks;
            match part {
                Part::Empty => {}
                Part::Full => return Some(start + self.part_blocks - 1),
                Part::Mixed { words, .. } => {
                    let last = words.iter().enumerate().rev().find(|(_, word)| **word != 0);
                    if let Some((place, word)) = last {
                        let bit = 63 - u64::from(word.leading_zeros());
                        return Some(start + place as u64 * 64 + bit);
                    }
                }
            }
        }
        None
    }

    /// Puts a part of `other` in the place of ours; how many blocks fewer there are now.
    pub(crate) fn replace_part(&mut self, other: &mut BlockSet, number: u64) -> u64 {
        let before = self.count_in(number);
        let part = other.parts.get_mut(in_memory(number)).map(std::mem::take);
        if let Some(ours) = self.parts.get_mut(in_memory(number)) {
            *ours = part.unwrap_or_default();
        }
        before.saturating_sub(self.count_in(number))
    }
}
