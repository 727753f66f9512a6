//! Settling: redirected blocks whose old place no snapshot needs go back into the base.
//!
//! `maintain` drives it in batches. Guest writes are never held: a write to a block takes it out of the
//! batch, and the batch waits for I/O that was planned before it was chosen.
//! Invariants: a block is settled only if no version of it, visible or not, is in the base (I3); the base
//! is synced before the SETTLE record is appended (I4).

use std::sync::atomic::Ordering;

use crate::error::{FileName, Result, StoreError};
use crate::index::{Location, Overlay};
use crate::io::AlignedBuffer;
use crate::journal::Record;
use crate::layout::{LIVE, MAX_RECORD_BLOCKS};
use crate::pins::PinGeneration;
use crate::units::{BLOCK_BYTES, Block, in_memory};
use crate::volume::{Core, Shared, Sweep};

#[derive(Debug)]
struct Batch {
    planned_before: PinGeneration,
    blocks: Vec<(Block, Location)>,
}

/// Where settling stands.
#[derive(Debug, Default)]
pub(crate) struct Settle {
    /// The pass goes on here; `None` between passes.
    cursor: Option<Block>,
    batch: Option<Batch>,
    /// A checkpoint may have made blocks free to settle.
    due: bool,
    /// Changes of the index seen by the last pass.
    seen_changes: u64,
    settled_in_pass: u64,
}

/// What a settling step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SettleStep {
    /// Nothing to do now.
    Idle,
    /// There is more.
    More,
}

impl Settle {
    pub(crate) fn note_checkpoint(&mut self) {
        self.due = true;
    }

    /// Forgets the batch: what it chose is about to change.
    pub(crate) fn abandon(&mut self, core: &mut Core) {
        self.batch = None;
        self.cursor = None;
        core.settling.clear();
        self.due = true;
    }
}

/// Blocks of which everything is outside the base.
fn candidates(records: &Overlay) -> Vec<(Block, Location)> {
    let mut found = Vec::new();
    let mut in_base: Option<Block> = None;
    for (key, location) in records {
        if *location == Location::Base {
            in_base = Some(key.block);
        } else if key.death == LIVE && in_base != Some(key.block) {
            found.push((key.block, *location));
        }
    }
    found
}

impl Shared {
    /// One step over about `budget_blocks` blocks.
    pub(crate) fn step_settle(
        &self,
        settle: &mut Settle,
        budget_blocks: u64,
    ) -> Result<SettleStep> {
        if settle.batch.is_some() {
            return self.settle_batch(settle);
        }
        let mut core = self.core();
        // A dropped version may still be read until older I/O is over.
        if core.sweep != Sweep::Idle || core.state.index.is_empty() {
            return Ok(SettleStep::Idle);
        }
        let changed = core.state.table.is_empty() && core.changes != settle.seen_changes;
        if settle.cursor.is_none() {
            if !settle.due && !changed {
                return Ok(SettleStep::Idle);
            }
            settle.due = false;
            settle.seen_changes = core.changes;
            settle.settled_in_pass = 0;
            settle.cursor = Some(Block(0));
        }
        let Some(cursor) = settle.cursor else {
            return Ok(SettleStep::Idle);
        };
        let (records, next) = core
            .state
            .index
            .page_through(cursor, in_memory(budget_blocks.max(1)))?;
        settle.cursor = next;
        let mut blocks = candidates(&records);
        blocks.retain(|(block, _)| !core.is_busy(block.0, block.0));
        if blocks.is_empty() {
            if next.is_none() {
                // The base holds what the log held: a checkpoint gives the log's space back.
                core.reclaim |= settle.settled_in_pass > 0;
                let idle = settle.settled_in_pass == 0 && !settle.due;
                return Ok(if idle {
                    SettleStep::Idle
                } else {
                    SettleStep::More
                });
            }
            return Ok(SettleStep::More);
        }
        core.settling
            .extend(blocks.iter().map(|(block, _)| block.0));
        let planned_before = core.pins.close();
        settle.batch = Some(Batch {
            planned_before,
            blocks,
        });
        Ok(SettleStep::More)
    }

    fn settle_batch(&self, settle: &mut Settle) -> Result<SettleStep> {
        let Some(batch) = settle.batch.take() else {
            return Ok(SettleStep::Idle);
        };
        if !self.core().pins.is_over(batch.planned_before) {
            settle.batch = Some(batch);
            return Ok(SettleStep::Idle);
        }
        let mut buffer = AlignedBuffer::new(in_memory(BLOCK_BYTES));
        for (block, location) in &batch.blocks {
            if self.core().settling.contains(&block.0)
                && let Err(error) = self.copy_to_base(*block, *location, &mut buffer)
            {
                settle.abandon(&mut self.core());
                return Err(error);
            }
        }
        // Not through the shared round: this sync must cover the copies, and only they are waited for.
        self.sync(&*self.files.base, FileName::Base)?;
        let mut core = self.core();
        let mut records: Vec<Record> = Vec::new();
        for (block, _) in &batch.blocks {
            if !core.settling.remove(&block.0) {
                // A write took it out: another pass comes for it.
                settle.due = true;
                continue;
            }
            settle.settled_in_pass += 1;
            match records.last_mut() {
                Some(Record::Settle {
                    block: first,
                    count,
                }) if first.0 + u64::from(*count) == block.0 && *count < MAX_RECORD_BLOCKS => {
                    *count += 1;
                }
                Some(_) | None => records.push(Record::Settle {
                    block: *block,
                    count: 1,
                }),
            }
        }
        let before = core.changes;
        if !records.is_empty() {
            core.settled = true;
            core.record(self, &records)?;
        }
        // Its own alone: what writes changed meanwhile may be behind the cursor.
        settle.seen_changes += core.changes - before;
        if settle.cursor.is_none() {
            core.reclaim |= settle.settled_in_pass > 0;
        }
        Ok(SettleStep::More)
    }

    fn copy_to_base(&self, block: Block, location: Location, buffer: &mut [u8]) -> Result<()> {
        let offset_bytes = block.offset_bytes();
        let length_bytes = self.block_length_bytes(offset_bytes);
        self.gate.base_dirty.store(true, Ordering::SeqCst);
        let io = |source| StoreError::Io {
            op: "settle",
            file: FileName::Base,
            offset_bytes,
            source,
        };
        if location == Location::Zero {
            return self
                .files
                .base
                .write_zeroes(offset_bytes, length_bytes, true)
                .map_err(io);
        }
        self.read_old(block, location, 1, buffer)?;
        let data = buffer.get(..in_memory(length_bytes)).unwrap_or_default();
        self.files.base.write_at(data, offset_bytes).map_err(io)
    }
}
