//! The merge: old run and frozen memtable become the next run, in bounded steps.
//!
//! `checkpoint` drives it. It drops the versions that no snapshot and not the head can see, and for a
//! revert turns what a snapshot sees into the live state. It writes only the index file that is not
//! current, so that until the superblock names it nothing has happened (I7).

use std::ops::Bound;
use std::sync::Arc;

use super::{Fences, Key, Location, Memtable, Run, encode_page};
use crate::error::{FileName, Result, StoreError};
use crate::io::BlockFile;
use crate::layout::{ENTRIES_PER_PAGE, LIVE, PAGE_BYTES};
use crate::units::{Block, Epoch, Generation, LogBlock};

/// What a merge keeps.
#[derive(Clone, Debug)]
pub(crate) struct MergeRule {
    /// Epochs of the snapshots that exist, ascending.
    pub(crate) epochs: Vec<u32>,
    /// The epoch whose view becomes the live state.
    pub(crate) revert_to: Option<Epoch>,
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
                if *location != Location::Base {
                    kept(LIVE, *location);
                }
            } else if self.is_visible(previous, *death) {
                kept(*death, *location);
            }
            previous = *death;
        }
    }
}

/// A finished merge.
#[derive(Debug)]
pub(crate) struct Merged {
    pub(crate) run: Run,
}

/// A merge under way.
#[derive(Debug)]
pub(crate) struct Merge {
    rule: MergeRule,
    source: Arc<Run>,
    frozen: Arc<Memtable>,
    /// Page of the old run to read next.
    source_page: u64,
    /// Records of the old run read and not taken, in reverse order.
    ahead: Vec<(Key, Location)>,
    /// Key of the frozen memtable taken last.
    taken: Bound<Key>,
    block: Option<Block>,
    versions: Vec<(u32, Location)>,
    page: Vec<(Key, Location)>,
    output: Run,
    /// Log blocks that the output names, since they were asked for last.
    named: Vec<LogBlock>,
}

impl Merge {
    pub(crate) fn new(rule: MergeRule, source: Arc<Run>, frozen: Arc<Memtable>) -> Merge {
        let output = Run {
            volume_id: source.volume_id,
            slot: 1 - source.slot,
            generation: Generation(source.generation.0 + 1),
            pages: 0,
            records: 0,
            fences: Fences::default(),
        };
        Merge {
            rule,
            source,
            frozen,
            source_page: 0,
            ahead: Vec::new(),
            taken: Bound::Unbounded,
            block: None,
            versions: Vec::new(),
            page: Vec::with_capacity(ENTRIES_PER_PAGE),
            output,
            named: Vec::new(),
        }
    }

    /// Log blocks that were written into the output since the last call: they are in use.
    pub(crate) fn take_named(&mut self) -> Vec<LogBlock> {
        std::mem::take(&mut self.named)
    }

    /// Goes on for about `budget_pages` of output; the result when all is written (not yet synced).
    pub(crate) fn step(
        &mut self,
        files: &[Arc<dyn BlockFile>; 2],
        budget_pages: u64,
    ) -> Result<Option<Merged>> {
        let (from, to) = match self.source.slot {
            0 => (&*files[0], &*files[1]),
            _ => (&*files[1], &*files[0]),
        };
        let mut budget_records = budget_pages.max(1) * ENTRIES_PER_PAGE as u64;
        while budget_records > 0 {
            budget_records -= 1;
            let next = self.next(from)?;
            if self.block.is_some() && next.map(|(key, _)| key.block) != self.block {
                self.close_block(to)?;
            }
            let Some((key, location)) = next else {
                self.write_page(to)?;
                let done = std::mem::replace(
                    &mut self.output,
                    Run {
                        volume_id: self.source.volume_id,
                        slot: self.source.slot,
                        generation: self.source.generation,
                        pages: 0,
                        records: 0,
                        fences: Fences::default(),
                    },
                );
                return Ok(Some(Merged { run: done }));
            };
            self.block = Some(key.block);
            self.versions.push((key.death, location));
        }
        Ok(None)
    }

    /// The next record in key order; the frozen memtable's wins over the run's.
    fn next(&mut self, from: &dyn BlockFile) -> Result<Option<(Key, Location)>> {
        if self.ahead.is_empty() && self.source_page < self.source.pages {
            self.ahead = self.source.read_page(from, self.source_page)?;
            self.ahead.reverse();
            self.source_page += 1;
        }
        let old = self.ahead.last().copied();
        let new = self
            .frozen
            .range((self.taken, Bound::Unbounded))
            .next()
            .map(|(key, location)| (*key, *location));
        let take_new = match (old, new) {
            (None, None) => return Ok(None),
            (Some(_), None) => false,
            (None, Some(_)) => true,
            (Some((old, _)), Some((new, _))) => {
                if old == new {
                    self.ahead.pop();
                }
                new <= old
            }
        };
        if take_new {
            if let Some((key, _)) = new {
                self.taken = Bound::Excluded(key);
            }
            return Ok(new);
        }
        self.ahead.pop();
        Ok(old)
    }

    /// Sends what is kept of the collected block to the output.
    fn close_block(&mut self, to: &dyn BlockFile) -> Result<()> {
        let Some(block) = self.block.take() else {
            return Ok(());
        };
        let versions = std::mem::take(&mut self.versions);
        let mut kept = Vec::with_capacity(versions.len());
        self.rule.keep(&versions, |death, location| {
            kept.push((Key { block, death }, location))
        });
        for (key, location) in kept {
            if let Location::Log(at) = location {
                self.named.push(at);
            }
            self.page.push((key, location));
            if self.page.len() == ENTRIES_PER_PAGE {
                self.write_page(to)?;
            }
        }
        self.versions = versions;
        self.versions.clear();
        Ok(())
    }

    fn write_page(&mut self, to: &dyn BlockFile) -> Result<()> {
        let Some((first, _)) = self.page.first().copied() else {
            return Ok(());
        };
        let number = self.output.pages;
        let bytes = encode_page(
            self.output.volume_id,
            self.output.generation,
            number,
            &self.page,
        );
        let offset_bytes = number * PAGE_BYTES as u64;
        to.write_at(&bytes, offset_bytes)
            .map_err(|source| StoreError::Io {
                op: "write",
                file: FileName::Index,
                offset_bytes,
                source,
            })?;
        self.output.fences.push(first);
        self.output.pages += 1;
        self.output.records += self.page.len() as u64;
        self.page.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
