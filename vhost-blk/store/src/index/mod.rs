//! The index: an ordered map from (block, death) to the location of that version.
//!
//! `state` changes and asks it. Three layers, newest first: the memtable (records of the current
//! journal), a frozen memtable while a checkpoint merges it, and the run on disk. It knows neither
//! snapshots nor when anything is durable.
//! Invariants: at most one record per (block, death) and layer, a newer layer wins (I1); a block
//! without a live record lives in the base, so `Base` at `LIVE` and no record mean the same.

mod merge;
mod page_cache;
mod run;

use std::collections::BTreeMap;
use std::sync::Arc;

pub(crate) use merge::{Merge, MergeRule, Merged};
pub(crate) use page_cache::PageCache;
pub(crate) use run::{Fences, Run, encode_page};

use crate::error::Result;
use crate::io::BlockFile;
use crate::layout::{LIVE, MAX_LOG_BLOCKS};
use crate::units::{Block, Epoch, LogBlock, in_memory};

/// Where a version of a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Location {
    /// At its own place in the base.
    Base,
    /// Nowhere: it reads as zeroes.
    Zero,
    /// In the log.
    Log(LogBlock),
}

impl Location {
    const KIND_SHIFT: u32 = 62;

    pub(crate) fn encode(self) -> u64 {
        match self {
            Location::Base => 0,
            Location::Zero => 1 << Self::KIND_SHIFT,
            Location::Log(block) => 2 << Self::KIND_SHIFT | block.0,
        }
    }

    pub(crate) fn decode(value: u64) -> Option<Location> {
        let number = value & ((1 << Self::KIND_SHIFT) - 1);
        match value >> Self::KIND_SHIFT {
            0 if number == 0 => Some(Location::Base),
            1 if number == 0 => Some(Location::Zero),
            2 if number < MAX_LOG_BLOCKS => Some(Location::Log(LogBlock(number))),
            _ => None,
        }
    }

    /// The location `blocks` further on, for runs of neighbouring blocks.
    pub(crate) fn plus(self, blocks: u64) -> Location {
        match self {
            Location::Base | Location::Zero => self,
            Location::Log(block) => Location::Log(block.plus(blocks)),
        }
    }
}

/// A version's place in the order: its block, and the epoch in which it was superseded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    pub(crate) block: Block,
    pub(crate) death: u32,
}

impl Key {
    pub(crate) fn live(block: Block) -> Key {
        Key { block, death: LIVE }
    }

    pub(crate) fn history(block: Block, epoch: Epoch) -> Key {
        Key {
            block,
            death: epoch.0,
        }
    }

    fn first_of(block: Block) -> Key {
        Key { block, death: 0 }
    }
}

/// One layer in memory.
pub(crate) type Memtable = BTreeMap<Key, Location>;

/// What the head needs to know of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockState {
    /// Where the live version is.
    pub(crate) live: Location,
    /// Whether it was superseded since the newest snapshot.
    pub(crate) touched: bool,
}

/// The layered map.
#[derive(Debug)]
pub(crate) struct Index {
    files: [Arc<dyn BlockFile>; 2],
    memtable: Memtable,
    frozen: Option<Arc<Memtable>>,
    run: Arc<Run>,
    cache: PageCache,
}

impl Index {
    pub(crate) fn new(files: [Arc<dyn BlockFile>; 2], run: Run, cache_pages: usize) -> Index {
        Index {
            files,
            memtable: Memtable::new(),
            frozen: None,
            run: Arc::new(run),
            cache: PageCache::new(cache_pages),
        }
    }

    /// Whether every block lives in the base and has no history.
    pub(crate) fn is_empty(&self) -> bool {
        self.memtable.is_empty() && self.frozen.is_none() && self.run.records == 0
    }

    pub(crate) fn memtable_records(&self) -> usize {
        self.memtable.len() + self.frozen.as_ref().map_or(0, |frozen| frozen.len())
    }

    pub(crate) fn run(&self) -> &Arc<Run> {
        &self.run
    }

    pub(crate) fn put(&mut self, key: Key, location: Location) {
        self.memtable.insert(key, location);
    }

    /// Calls `found` with every record of blocks `first..=last`, older layers first.
    fn visit(
        &mut self,
        first: Block,
        last: Block,
        mut found: impl FnMut(Key, Location),
    ) -> Result<()> {
        let range = Key::first_of(first)..=Key::live(last);
        let file = if self.run.slot == 0 {
            &self.files[0]
        } else {
            &self.files[1]
        };
        self.run
            .visit(&**file, &mut self.cache, &range, &mut |key, location| {
                found(key, location);
                true
            })?;
        for layer in self
            .frozen
            .iter()
            .map(|frozen| &**frozen)
            .chain([&self.memtable])
        {
            for (key, location) in layer.range(range.clone()) {
                found(*key, *location);
            }
        }
        Ok(())
    }

    /// The head's view of blocks `first..=last`; `floor` is the epoch of the newest snapshot.
    pub(crate) fn states(
        &mut self,
        first: Block,
        last: Block,
        floor: Option<Epoch>,
    ) -> Result<Vec<BlockState>> {
        let count = in_memory(last.0.saturating_sub(first.0) + 1);
        let none = BlockState {
            live: Location::Base,
            touched: floor.is_none(),
        };
        let mut states = vec![none; count];
        let floor = floor.map_or(0, |epoch| epoch.0);
        self.visit(first, last, |key, location| {
            if let Some(state) = states.get_mut(in_memory(key.block.0 - first.0)) {
                if key.death == LIVE {
                    state.live = location;
                } else if key.death > floor {
                    state.touched = true;
                }
            }
        })?;
        Ok(states)
    }

    /// What the snapshot of `epoch` sees of blocks `first..=last`: the first version that died later.
    pub(crate) fn view(
        &mut self,
        first: Block,
        last: Block,
        epoch: Epoch,
    ) -> Result<Vec<Location>> {
        let count = in_memory(last.0.saturating_sub(first.0) + 1);
        let mut seen = vec![(LIVE, Location::Base); count];
        self.visit(first, last, |key, location| {
            if let Some(best) = seen.get_mut(in_memory(key.block.0 - first.0))
                && key.death > epoch.0
                && key.death <= best.0
            {
                *best = (key.death, location);
            }
        })?;
        Ok(seen.into_iter().map(|(_, location)| location).collect())
    }

    /// Up to `limit` records per layer from `first` on, overlaid and in order, and the block to go on
    /// from; `None` at the end.
    pub(crate) fn page_through(
        &mut self,
        first: Block,
        limit: usize,
    ) -> Result<(Memtable, Option<Block>)> {
        let range = Key::first_of(first)..=Key::live(Block(u64::MAX));
        let mut overlaid = Memtable::new();
        // A layer cut short knows nothing from its last block on.
        let mut end: Option<Block> = None;
        let mut cut = |last: Block| end = Some(end.map_or(last, |end| end.min(last)));
        let mut taken = 0;
        let file = if self.run.slot == 0 {
            &self.files[0]
        } else {
            &self.files[1]
        };
        self.run
            .visit(&**file, &mut self.cache, &range, &mut |key, location| {
                taken += 1;
                if taken > limit {
                    cut(key.block);
                    return false;
                }
                overlaid.insert(key, location);
                true
            })?;
        for layer in self
            .frozen
            .iter()
            .map(|frozen| &**frozen)
            .chain([&self.memtable])
        {
            let mut layer_range = layer.range(range.clone());
            for (key, location) in layer_range.by_ref().take(limit) {
                overlaid.insert(*key, *location);
            }
            if let Some((key, _)) = layer_range.next() {
                cut(key.block);
            }
        }
        if let Some(end) = end {
            // A block with more records than the limit would stand still: take it whole.
            if end == first {
                overlaid.clear();
                self.visit(first, first, |key, location| {
                    overlaid.insert(key, location);
                })?;
                return Ok((overlaid, Some(first.plus(1))));
            }
            overlaid = {
                let mut kept = overlaid;
                drop(kept.split_off(&Key::first_of(end)));
                kept
            };
        }
        Ok((overlaid, end))
    }

    /// Sets the memtable aside for a merge; new records go to an empty one.
    pub(crate) fn freeze(&mut self) -> Arc<Memtable> {
        debug_assert!(self.frozen.is_none());
        let frozen = Arc::new(std::mem::take(&mut self.memtable));
        self.frozen = Some(Arc::clone(&frozen));
        frozen
    }

    /// The memtable that is set aside, if a checkpoint began and did not end.
    pub(crate) fn frozen(&self) -> Option<&Arc<Memtable>> {
        self.frozen.as_ref()
    }

    /// Puts the merged run in the place of the old one and of the frozen memtable.
    pub(crate) fn install(&mut self, run: Run) {
        self.run = Arc::new(run);
        self.frozen = None;
        self.cache.clear();
    }
}
