//! The merge: neighbouring layers of the index become one run, in bounded steps.
//!
//! `checkpoint` and `reclaim` drive it. It drops the versions that no snapshot and not the head can see, as far as its layers
//! tell, and for a revert turns what a snapshot sees into the live state.
//! Invariant: what it drops changes no view, whatever older layers hold: a version is taken for visible longer than it is
//! when the one before it is not among the layers, and `Base` hides what is below unless nothing is.

use std::collections::VecDeque;
use std::ops::Bound;
use std::sync::Arc;

use super::{Key, Location, Memtable, Run, RunWriter};
use crate::error::{FileName, Result, StoreError};
use crate::io::BlockFile;
use crate::layout::{LIVE, PAGE_BYTES};
use crate::units::{Block, Epoch, LogBlock};

/// What a merge keeps.
#[derive(Clone, Debug)]
pub(crate) struct MergeRule {
    /// Epochs of the snapshots that exist, ascending.
    pub(crate) epochs: Vec<u32>,
    /// The epoch whose view becomes the live state. All layers are merged.
    pub(crate) revert_to: Option<Epoch>,
    /// First block of which nothing is kept: for a revert, the end of what is reverted to.
    pub(crate) end: Block,
    /// No layer is older than those merged.
    pub(crate) to_the_bottom: bool,
}

impl MergeRule {
    /// Whether a snapshot sees the version that died in `death` when the one before died in `previous`.
    fn is_visible(&self, previous: u32, death: u32) -> bool {
        let place = self.epochs.partition_point(|epoch| *epoch < previous);
        self.epochs.get(place).is_some_and(|epoch| *epoch < death)
    }

    /// What of one block's versions, in order, goes on.
    fn keep(&self, versions: &[(u32, Location)], mut kept: impl FnMut(u32, Location)) {
        let mut previous = 0;
        for (death, location) in versions {
            if let Some(epoch) = self.revert_to
                && *death > epoch.0
            {
                if *location != Location::Base {
                    kept(LIVE, *location);
                }
                return;
            }
            if *death == LIVE {
                if *location != Location::Base || !self.to_the_bottom {
                    kept(LIVE, *location);
                }
            } else if self.is_visible(previous, *death) {
                kept(*death, *location);
            }
            previous = *death;
        }
    }
}

/// A layer that is read in key order.
#[derive(Debug)]
enum Layer {
    Table(Arc<Memtable>),
    Run { run: Arc<Run>, next_page: u64 },
}

#[derive(Debug)]
struct Source {
    layer: Layer,
    /// Records read and not taken.
    ahead: VecDeque<(Key, Location)>,
    /// Key read last.
    last: Option<Key>,
}

impl Source {
    fn new(layer: Layer) -> Source {
        Source {
            layer,
            ahead: VecDeque::new(),
            last: None,
        }
    }

    fn peek(&mut self, file: &dyn BlockFile) -> Result<Option<(Key, Location)>> {
        if self.ahead.is_empty() {
            match &mut self.layer {
                Layer::Table(table) => {
                    let from = self.last.map_or(Bound::Unbounded, Bound::Excluded);
                    let records = table.range((from, Bound::Unbounded));
                    self.ahead.extend(records.take(TABLE_BATCH));
                }
                Layer::Run { run, next_page } => {
                    *next_page += run.read_pages(file, *next_page, RUN_BATCH, &mut self.ahead)?;
                    let mut last = self.last;
                    let ascend = self.ahead.iter().all(|(key, _)| {
                        let holds = last.is_none_or(|last| last < *key);
                        last = Some(*key);
                        holds
                    });
                    if !ascend {
                        return Err(StoreError::Corrupted {
                            file: FileName::Index,
                            offset_bytes: run.place.first_page * PAGE_BYTES as u64,
                            what: "keys of a run are not ascending (I1)",
                        });
                    }
                }
            }
            self.last = self.ahead.back().map(|(key, _)| *key).or(self.last);
        }
        Ok(self.ahead.front().copied())
    }
}

/// Records of a memtable taken at a time.
const TABLE_BATCH: usize = 1024;
/// Pages of a run read at a time.
const RUN_BATCH: u64 = 8;
/// Records that count as one page of a step's budget.
const RECORDS_PER_PAGE: u64 = 256;

/// A merge under way.
#[derive(Debug)]
pub(crate) struct Merge {
    rule: MergeRule,
    /// Newest first.
    sources: Vec<Source>,
    block: Option<Block>,
    versions: Vec<(u32, Location)>,
    output: Option<RunWriter>,
    /// Log blocks that the output names, since they were asked for last.
    named: Vec<LogBlock>,
}

impl Merge {
    /// A merge of a memtable, if there is one, and of neighbouring runs, newest first.
    pub(crate) fn new(
        rule: MergeRule,
        frozen: Option<Arc<Memtable>>,
        runs: &[Arc<Run>],
        output: RunWriter,
    ) -> Merge {
        let runs = runs.iter().map(|run| Layer::Run {
            run: Arc::clone(run),
            next_page: 0,
        });
        Merge {
            rule,
            sources: frozen
                .map(Layer::Table)
                .into_iter()
                .chain(runs)
                .map(Source::new)
                .collect(),
            block: None,
            versions: Vec::new(),
            output: Some(output),
            named: Vec::new(),
        }
    }

    /// Log blocks that were written into the output since the last call: they are in use.
    pub(crate) fn take_named(&mut self) -> Vec<LogBlock> {
        std::mem::take(&mut self.named)
    }

    /// Goes on for about `budget_pages`. `Some` when all is written, not yet synced: the run, unless nothing is left.
    pub(crate) fn step(
        &mut self,
        file: &dyn BlockFile,
        budget_pages: u64,
    ) -> Result<Option<Option<Run>>> {
        for _ in 0..budget_pages.max(1).saturating_mul(RECORDS_PER_PAGE) {
            let next = self.next(file)?;
            if self.block.is_some() && next.map(|(key, _)| key.block) != self.block {
                self.close_block(file)?;
            }
            let Some((key, location)) = next else {
                let output = self.output.take();
                return match output {
                    Some(output) => output.finish(file).map(Some),
                    None => Ok(Some(None)),
                };
            };
            self.block = Some(key.block);
            self.versions.push((key.death, location));
        }
        Ok(None)
    }

    /// The next record in key order; that of the newest layer wins.
    fn next(&mut self, file: &dyn BlockFile) -> Result<Option<(Key, Location)>> {
        let mut best: Option<(Key, Location)> = None;
        for source in &mut self.sources {
            if let Some((key, location)) = source.peek(file)?
                && best.is_none_or(|(best, _)| key < best)
            {
                best = Some((key, location));
            }
        }
        if let Some((key, _)) = best {
            for source in &mut self.sources {
                source.ahead.pop_front_if(|(ahead, _)| *ahead == key);
            }
        }
        Ok(best)
    }

    /// Sends what is kept of the collected block to the output.
    fn close_block(&mut self, file: &dyn BlockFile) -> Result<()> {
        let (Some(block), Some(output)) = (self.block.take(), self.output.as_mut()) else {
            return Ok(());
        };
        if block >= self.rule.end {
            self.versions.clear();
            return Ok(());
        }
        let named = &mut self.named;
        let mut written = Ok(());
        self.rule.keep(&self.versions, |death, location| {
            if let Location::Log(at) = location {
                named.push(at);
            }
            if written.is_ok() {
                written = output.push(file, Key { block, death }, location);
            }
        });
        self.versions.clear();
        written
    }
}

#[cfg(test)]
mod tests;
