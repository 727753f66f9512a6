//! The index: an ordered map from (block, death) to the location of that version.
//!
//! `state` changes and asks it. Layers, newest first: the memtable (records of the current journal), a frozen memtable
//! while a checkpoint writes it out, and the runs on disk. It knows neither snapshots nor when anything is durable.
//! Invariants: at most one record per (block, death) and layer, a newer layer wins (I1); the versions of a block in a newer
//! layer died later than those in an older one; a block without a live record lives in the base, so `Base` at `LIVE` and no
//! record mean the same.

mod fences;
mod memtable;
mod merge;
mod page;
mod page_cache;
mod run;
mod run_writer;

use std::collections::BTreeMap;
use std::sync::Arc;

pub(crate) use fences::Fences;
pub(crate) use memtable::Memtable;
pub(crate) use merge::{Merge, MergeRule};
pub(crate) use page_cache::PageCache;
pub(crate) use run::Run;
pub(crate) use run_writer::{Largest, RunWriter, most_pages};

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

/// Records of several layers, the newer ones' where they differ.
pub(crate) type Overlay = BTreeMap<Key, Location>;

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
            end.live = Some(location);
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
    file: Arc<dyn BlockFile>,
    memtable: Memtable,
    frozen: Option<Arc<Memtable>>,
    /// Newest first.
    runs: Vec<Arc<Run>>,
    cache: PageCache,
}

impl Index {
    pub(crate) fn new(file: Arc<dyn BlockFile>, runs: Vec<Arc<Run>>, cache_pages: usize) -> Index {
        Index {
            file,
            memtable: Memtable::default(),
            frozen: None,
            runs,
            cache: PageCache::new(cache_pages),
        }
    }

    /// Whether every block lives in the base and has no history.
    pub(crate) fn is_empty(&self) -> bool {
        self.memtable.is_empty() && self.frozen.is_none() && self.runs.is_empty()
    }

    pub(crate) fn memtable_records(&self) -> usize {
        self.memtable.len() + self.frozen.as_ref().map_or(0, |frozen| frozen.len())
    }

    /// Records of all layers.
    pub(crate) fn records(&self) -> u64 {
        let on_disk: u64 = self.runs.iter().map(|run| run.place.records).sum();
        on_disk + self.memtable_records() as u64
    }

    /// The runs, newest first.
    pub(crate) fn runs(&self) -> &[Arc<Run>] {
        &self.runs
    }

    /// Sets records in this order: of one key the last one stays.
    pub(crate) fn put_all(&mut self, records: Vec<(Key, Location)>) {
        self.memtable.insert_all(records);
    }

    /// The layers in memory, newest first.
    fn tables(&self) -> impl DoubleEndedIterator<Item = &Memtable> {
        std::iter::once(&self.memtable).chain(self.frozen.as_deref())
    }

    /// Where the live version of `block` is. However many versions it has, only the end of its history is
    /// looked at, and nothing is allocated.
    pub(crate) fn live(&mut self, block: Block) -> Result<Location> {
        let key = Key::live(block);
        if let Some(location) = self.tables().find_map(|table| table.get(key)) {
            return Ok(location);
        }
        for run in &self.runs {
            let end = run.end_of(&*self.file, &mut self.cache, block)?;
            if let Some(location) = end.live {
                return Ok(location);
            }
        }
        Ok(Location::Base)
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
        for run in &self.runs {
            if found.decides(floor) {
                break;
            }
            found.add_older(run.end_of(&*self.file, &mut self.cache, block)?);
        }
        Ok(BlockState {
            live: found.live.unwrap_or(Location::Base),
            touched: found.is_touched(floor),
        })
    }

    /// What the snapshot of `epoch` sees of one block.
    pub(crate) fn seen(&mut self, block: Block, epoch: Epoch) -> Result<Location> {
        let from = Key::history(block, Epoch(epoch.0.saturating_add(1)));
        let range = from..=Key::live(block);
        let mut best: Option<(Key, Location)> = None;
        let mut add_newer = |found: Option<(Key, Location)>| {
            if let Some((key, location)) = found
                && best.is_none_or(|(best, _)| key <= best)
            {
                best = Some((key, location));
            }
        };
        for run in self.runs.iter().rev() {
            add_newer(run.first_in(&*self.file, &mut self.cache, range.clone())?);
        }
        for table in self.tables().rev() {
            add_newer(table.range(range.clone()).next());
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
        for run in self.runs.iter().rev() {
            let mut skip = Skip::new(death);
            run.visit(
                &*self.file,
                &mut self.cache,
                &range,
                &mut |key, location| {
                    if key.death >= death {
                        found(key, location);
                    }
                    skip.step(key)
                },
            )?;
        }
        for table in self.tables().rev() {
            for (key, location) in table.range(range.clone()) {
                found(key, location);
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
    ) -> Result<(Overlay, Option<Block>)> {
        let range = Key::first_of(first)..=Key::live(Block(u64::MAX));
        let mut overlaid = Overlay::new();
        // A layer cut short knows nothing from its last block on.
        let mut end: Option<Block> = None;
        let mut cut = |last: Block| end = Some(end.map_or(last, |end| end.min(last)));
        for run in self.runs.iter().rev() {
            let mut taken = 0;
            run.visit(
                &*self.file,
                &mut self.cache,
                &range,
                &mut |key, location| {
                    taken += 1;
                    if taken > limit {
                        cut(key.block);
                        return Walk::End;
                    }
                    overlaid.insert(key, location);
                    Walk::On
                },
            )?;
        }
        for layer in self.tables().rev() {
            let mut layer_range = layer.range(range.clone());
            overlaid.extend(layer_range.by_ref().take(limit));
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
            drop(overlaid.split_off(&Key::first_of(end)));
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

    /// Puts what a checkpoint wrote in the place of the frozen memtable and of the runs merged with it.
    pub(crate) fn install(&mut self, runs: Vec<Arc<Run>>) {
        self.runs = runs;
        self.frozen = None;
    }

    /// The same for a merge of runs alone.
    pub(crate) fn install_merged(&mut self, runs: Vec<Arc<Run>>) {
        self.runs = runs;
    }
}
