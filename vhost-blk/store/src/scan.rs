//! The scan: after opening, goes through the index once, to learn which blocks of the log are in use.
//!
//! `maintain` drives it in steps while I/O goes on; `check` runs one to its end. It is also where damage of a page that
//! nobody asks for is found. It reads past the page cache and writes nothing.
#![deny(clippy::indexing_slicing)]

use std::ops::Range;
use std::sync::Arc;

use crate::error::{FileName, Result, StoreError};
use crate::index::{Key, Location, Run};
use crate::io::BlockFile;
use crate::layout::{LIVE, PAGE_BYTES};
use crate::units::LogBlock;

/// Pages read at a time.
const PART_PAGES: u64 = 64;

/// What the records of a volume can name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    pub(crate) volume_blocks: u64,
    /// Behind the journals, before the log's end. Not the high-water mark: a version that a newer run or the journal
    /// overrides names a block that was given back, and the mark may have come down since.
    pub(crate) log_blocks: Range<u64>,
    /// The open epoch.
    pub(crate) epoch: u32,
}

/// A scan under way.
#[derive(Debug)]
pub(crate) struct Scan {
    /// Runs still to be gone through; the last one is being read.
    runs: Vec<Arc<Run>>,
    bounds: Bounds,
    next_page: u64,
    records: u64,
    last: Option<Key>,
    buffer: Vec<(Key, Location)>,
}

impl Scan {
    /// Goes through these runs.
    pub(crate) fn new(runs: &[Arc<Run>], bounds: Bounds) -> Scan {
        Scan {
            runs: runs.to_vec(),
            bounds,
            next_page: 0,
            records: 0,
            last: None,
            buffer: Vec::new(),
        }
    }

    /// Whether it still has to read this run.
    pub(crate) fn holds(&self, run: &Arc<Run>) -> bool {
        self.runs.iter().any(|held| Arc::ptr_eq(held, run))
    }

    /// Reads the next pages, at most `most_pages`, and adds the log blocks they name to `named`; how many it were, 0 at the
    /// end. `Corrupted` names the first thing that contradicts the format.
    pub(crate) fn step(
        &mut self,
        file: &dyn BlockFile,
        most_pages: u64,
        named: &mut Vec<LogBlock>,
    ) -> Result<u64> {
        let Some(run) = self.runs.last() else {
            return Ok(0);
        };
        self.buffer.clear();
        let most_pages = most_pages.clamp(1, PART_PAGES);
        let pages = run.read_pages(file, self.next_page, most_pages, &mut self.buffer)?;
        let offset_bytes = (run.place.first_page + self.next_page) * PAGE_BYTES as u64;
        let broken = |what| StoreError::Corrupted {
            file: FileName::Index,
            offset_bytes,
            what,
        };
        for (key, location) in &self.buffer {
            if self.last.is_some_and(|last| last >= *key) {
                return Err(broken("keys of a run are not ascending (I1)"));
            }
            if key.block.0 >= self.bounds.volume_blocks {
                return Err(broken("a record names a block outside the volume (I2)"));
            }
            if key.death == 0 || (key.death != LIVE && key.death > self.bounds.epoch) {
                return Err(broken("a version died in an epoch that has not been (I5)"));
            }
            if let Location::Log(at) = location {
                if !self.bounds.log_blocks.contains(&at.0) {
                    return Err(broken("a record names a block outside the log (I2)"));
                }
                named.push(*at);
            }
            self.last = Some(*key);
        }
        self.records += self.buffer.len() as u64;
        self.next_page += pages;
        if self.next_page >= run.place.pages {
            if self.records != run.place.records {
                return Err(broken("another number of records than announced"));
            }
            self.runs.pop();
            (self.next_page, self.records, self.last) = (0, 0, None);
        }
        Ok(pages)
    }
}
