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

/// The newest of what is known of one block: its live version, and when it was last superseded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct EndOfHistory {
    pub(crate) live: Option<Location>,
    pub(crate) last_death: Option<u32>,
}

impl EndOfHistory {
    /// Adds what an older layer knows; newer ones win, and their deaths are later.
    fn add_older(&mut self, older: EndOfHistory) {
        self.live = self.live.or(older.live);
        self.last_death = self.last_death.max(older.last_death);
    }

    fn is_touched(&self, floor: Epoch) -> bool {
        self.last_death.is_some_and(|death| death > floor.0)
    }

    /// Whether no older layer can add anything that matters.
    fn decides(&self, floor: Epoch) -> bool {
        self.live.is_some() && self.is_touched(floor)
    }
}

fn table_end(table: &Memtable, block: Block) -> EndOfHistory {
    let mut versions = table.range(Key::first_of(block)..=Key::live(block));
    let mut end = EndOfHistory::default();
    while end.last_death.is_none()
        && let Some((key, location)) = versions.next_back()
    {
        if key.death == LIVE {
            end.live = Some(*location);
        } else {
            end.last_death = Some(key.death);
        }
    }
    end
}

/// What a walk over records does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Walk {
    /// The next record.
    On,
    /// The first record at or behind this key.
    To(Key),
    /// No more.
    End,
}

/// Leaps over versions that are too old to matter, when there are many of them.
#[derive(Debug)]
struct Skip {
    death: u32,
    block: Option<Block>,
    old: u32,
}

impl Skip {
    /// Old versions of a block that are walked over; a leap costs about as much.
    const PATIENCE: u32 = 8;

    fn new(death: u32) -> Skip {
        Skip {
            death,
            block: None,
            old: 0,
        }
    }

    fn step(&mut self, key: Key) -> Walk {
        if self.block != Some(key.block) {
            self.block = Some(key.block);
            self.old = 0;
        }
        self.old += u32::from(key.death < self.death);
        if self.old < Self::PATIENCE || key.death >= self.death {
            return Walk::On;
        }
        Walk::To(Key {
            block: key.block,
            death: self.death,
        })
    }
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

    fn file(&self) -> &Arc<dyn BlockFile> {
        let [first, second] = &self.files;
        if self.run.slot == 0 { first } else { second }
    }

    /// The layers in memory, newest first.
    fn tables(&self) -> impl DoubleEndedIterator<Item = &Memtable> {
        std::iter::once(&self.memtable).chain(self.frozen.as_deref())
    }

    /// Where the live version of `block` is. However many versions it has, only the end of its history is
    /// looked at, and nothing is allocated.
    pub(crate) fn live(&mut self, block: Block) -> Result<Location> {
        let key = Key::live(block);
        let in_memory = self.tables().find_map(|table| table.get(&key)).copied();
        if let Some(location) = in_memory {
            return Ok(location);
        }
        let file = Arc::clone(self.file());
        let end = self.run.end_of(&*file, &mut self.cache, block)?;
        Ok(end.live.unwrap_or(Location::Base))
    }

    /// The head's view of one block; `floor` is the epoch of the newest snapshot.
    pub(crate) fn state(&mut self, block: Block, floor: Option<Epoch>) -> Result<BlockState> {
        let Some(floor) = floor else {
            let live = self.live(block)?;
            return Ok(BlockState {
                live,
                touched: true,
            });
        };
        let mut found = EndOfHistory::default();
        for table in self.tables() {
            found.add_older(table_end(table, block));
        }
        if !found.decides(floor) {
            let file = Arc::clone(self.file());
            found.add_older(self.run.end_of(&*file, &mut self.cache, block)?);
        }
        Ok(BlockState {
            live: found.live.unwrap_or(Location::Base),
            touched: found.is_touched(floor),
        })
    }

    /// What the snapshot of `epoch` sees of one block.
    pub(crate) fn seen(&mut self, block: Block, epoch: Epoch) -> Result<Location> {
        let from = Key::history(block, Epoch(epoch.0.saturating_add(1)));
        let file = Arc::clone(self.file());
        let mut best = self
            .run
            .first_at_or_after(&*file, &mut self.cache, from)?
            .filter(|(key, _)| key.block == block);
        for table in self.tables().rev() {
            let next = table.range(from..=Key::live(block)).next();
            if let Some((key, location)) = next
                && best.is_none_or(|(best, _)| *key <= best)
            {
                best = Some((*key, *location));
            }
        }
        Ok(best.map_or(Location::Base, |(_, location)| location))
    }

    /// Calls `found` with the records of blocks `first..=last` that matter, older layers first: of each
    /// block those that died in `death` or later.
    fn visit(
        &mut self,
        first: Block,
        last: Block,
        death: u32,
        mut found: impl FnMut(Key, Location),
    ) -> Result<()> {
        let range = Key::first_of(first)..=Key::live(last);
        let file = Arc::clone(self.file());
        let mut skip = Skip::new(death);
        self.run
            .visit(&*file, &mut self.cache, &range, &mut |key, location| {
                if key.death >= death {
                    found(key, location);
                }
                skip.step(key)
            })?;
        for table in self.tables().rev() {
            for (key, location) in table.range(range.clone()) {
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
        let floor = floor.map_or(LIVE - 1, |epoch| epoch.0);
        self.visit(first, last, floor.saturating_add(1), |key, location| {
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
        self.visit(first, last, epoch.0.saturating_add(1), |key, location| {
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
        let file = Arc::clone(self.file());
        self.run
            .visit(&*file, &mut self.cache, &range, &mut |key, location| {
                taken += 1;
                if taken > limit {
                    cut(key.block);
                    return Walk::End;
                }
                overlaid.insert(key, location);
                Walk::On
            })?;
        for layer in self.tables().rev() {
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
                self.visit(first, first, 0, |key, location| {
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
