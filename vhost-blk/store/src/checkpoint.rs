//! The checkpoint: the memtable goes into a new run, the superblock flips, the old journal is free.
//!
//! `maintain` drives it in steps, `revert` and `close` in one go. Newer runs that are not much larger are merged with it,
//! all of them when it reverts; merging larger ones is left to `reclaim`.
//! Order (I7): freeze and switch journal; write run and snapshot table to pages that no slot names; sync them; commit round;
//! superblock; commit round under its name.

use std::sync::Arc;

use crate::error::{FileName, Result, StoreError};
use crate::index::{Largest, Merge, MergeRule, Run, RunWriter, most_pages};
use crate::index_room::{PageRange, table_pages};
use crate::journal::{Entry, Record};
use crate::layout::{MAX_EPOCH, MAX_RUNS, PAGE_BYTES, Seal};
use crate::reclaim::{MANY_RUNS, RATIO, no_space};
use crate::snapshot_table::{SnapshotInfo, table_records};
use crate::superblock::Superblock;
use crate::units::{BLOCK_BYTES, Block, Epoch, Generation, Incarnation, Sequence};
use crate::volume::{Core, Maintenance, Shared};

/// A checkpoint under way.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    merge: Merge,
    turn: Turn,
    /// Runs that are merged with the memtable: the newest.
    inputs: Vec<Arc<Run>>,
    room: PageRange,
    /// The snapshots that the new index is for.
    table: Vec<Arc<SnapshotInfo>>,
    epoch: Epoch,
    /// The volume's, in bytes.
    size_bytes: u64,
    journal_generation: Generation,
    first_sequence: Sequence,
    applied_through: Sequence,
}

/// What a checkpoint shall do besides merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Nothing: the state stays.
    Keep,
    /// What the snapshot of this epoch sees becomes the live state.
    Revert(Epoch),
    /// The volume gets this size in bytes: a larger one, or any if nothing depends on the base.
    Grow(u64),
}

/// What a merge keeps for these snapshots.
pub(crate) fn rule(table: &[Arc<SnapshotInfo>], turn: Turn, to_the_bottom: bool) -> MergeRule {
    MergeRule {
        epochs: table.iter().map(|snapshot| snapshot.epoch.0).collect(),
        revert_to: match turn {
            Turn::Keep | Turn::Grow(_) => None,
            Turn::Revert(target) => Some(target),
        },
        end: match (turn, table.last()) {
            (Turn::Revert(_), Some(target)) => Block(target.size_bytes.div_ceil(BLOCK_BYTES)),
            (Turn::Keep | Turn::Grow(_) | Turn::Revert(_), _) => Block(u64::MAX),
        },
        to_the_bottom,
    }
}

/// How many runs, newest first in `sizes`, a memtable of `records` is merged with: no more than `small` records, so that
/// writes never wait for long.
pub(crate) fn newest_to_merge(sizes: &[u64], records: u64, small: u64) -> usize {
    if sizes.len() > MANY_RUNS {
        return sizes.len();
    }
    let (mut count, mut merged) = (0, records);
    for size in sizes {
        if *size > merged.saturating_mul(RATIO) || merged + size > small {
            break;
        }
        merged += size;
        count += 1;
    }
    count
}

impl Shared {
    /// Records that a checkpoint merges at most, unless runs become too many.
    pub(crate) fn small_merge_records(&self) -> u64 {
        8 * self.options.memtable_records as u64
    }

    pub(crate) fn volume_blocks(&self) -> u64 {
        self.size_bytes().div_ceil(BLOCK_BYTES)
    }

    /// Sets pages aside for a run of `records` records and those of `inputs`.
    pub(crate) fn new_run(
        &self,
        work: &mut Maintenance,
        core: &Core,
        records: u64,
        inputs: &[Arc<Run>],
    ) -> (PageRange, RunWriter) {
        let records = records + inputs.iter().map(|run| run.place.records).sum::<u64>();
        let largest = Largest {
            block: self.volume_blocks(),
            epoch: core.state.epoch.0,
            log_block: core.space.high_water(),
        };
        let room = work.room.take(most_pages(records, largest));
        let generation = work.next_generation;
        work.next_generation = generation.next();
        let writer = RunWriter::new(self.id, generation, room.first, room.count);
        (room, writer)
    }

    /// Freezes the memtable and begins. No checkpoint is under way; for a revert nothing else is, either.
    pub(crate) fn begin_checkpoint(&self, work: &mut Maintenance, turn: Turn) -> Result<()> {
        let mut core = self.core();
        let core = &mut *core;
        // After a crash in a checkpoint two generations are in use: neither file is free, so the
        // younger goes on and the superblock will skip what the index holds of it.
        if work.superblock.journal_generation == core.journal.generation
            && let Err(error) = core.journal.switch(&*self.files.journal)
        {
            self.poison();
            return Err(error);
        }
        let (mut table, mut epoch) = (core.state.table.shared(), core.state.epoch);
        let mut size_bytes = self.size_bytes();
        match turn {
            Turn::Keep => {}
            Turn::Revert(target) => {
                table.retain(|snapshot| snapshot.epoch <= target);
                epoch = Epoch((epoch.0 + 1).min(MAX_EPOCH));
                size_bytes = table.last().map_or(size_bytes, |target| target.size_bytes);
            }
            Turn::Grow(wanted) => size_bytes = wanted,
        }
        let frozen = core.state.index.freeze();
        let runs = core.state.index.runs().to_vec();
        let count = match turn {
            Turn::Keep | Turn::Grow(_) => {
                // Those that are being merged or scanned are the oldest.
                let free = work.newer_runs(&runs);
                let sizes: Vec<u64> = free.iter().map(|run| run.place.records).collect();
                newest_to_merge(&sizes, frozen.len() as u64, self.small_merge_records())
            }
            Turn::Revert(_) => runs.len(),
        };
        let inputs = runs.get(..count).unwrap_or_default().to_vec();
        let (room, output) = self.new_run(work, core, frozen.len() as u64, &inputs);
        let rule = rule(&table, turn, count == runs.len());
        work.checkpoint = Some(Checkpoint {
            merge: Merge::new(rule, Some(frozen), &inputs, output),
            turn,
            inputs,
            room,
            table,
            epoch,
            size_bytes,
            journal_generation: core.journal.generation,
            first_sequence: core.journal.first,
            applied_through: core.journal.last(),
        });
        Ok(())
    }

    /// Goes on by about `budget_pages`; `true` when the checkpoint is durable.
    pub(crate) fn step_checkpoint(
        &self,
        work: &mut Maintenance,
        budget_pages: u64,
    ) -> Result<bool> {
        let Some(checkpoint) = work.checkpoint.as_mut() else {
            return Ok(true);
        };
        match checkpoint.merge.step(&*self.files.index, budget_pages) {
            Ok(None) => Ok(false),
            Ok(Some(merged)) => {
                let table = self.write_table(work);
                let Some(table) = self.restart_on_error(work, table)? else {
                    return Ok(false);
                };
                self.finish_checkpoint(work, merged, table)?;
                Ok(true)
            }
            Err(error) => {
                self.restart_on_error::<()>(work, Err(error))?;
                Ok(false)
            }
        }
    }

    /// Runs a checkpoint to its end. Blocking.
    pub(crate) fn run_checkpoint(&self, work: &mut Maintenance) -> Result<()> {
        while !self.step_checkpoint(work, 1024)? {}
        Ok(())
    }

    /// After an error nothing has happened yet: the merge of the frozen memtable begins anew, as one
    /// that keeps the state, since whoever asked for a revert was told of the error.
    fn restart_on_error<T>(&self, work: &mut Maintenance, result: Result<T>) -> Result<T> {
        let error = match self.heed(result) {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if let Some(mut checkpoint) = work.checkpoint.take() {
            work.room.give_back(checkpoint.room);
            let core = self.core();
            if checkpoint.turn != Turn::Keep {
                checkpoint.turn = Turn::Keep;
                checkpoint.table = core.state.table.shared();
                checkpoint.epoch = core.state.epoch;
                checkpoint.size_bytes = self.size_bytes();
            }
            let frozen = core.state.index.frozen().cloned();
            let records = frozen.as_ref().map_or(0, |frozen| frozen.len() as u64);
            let (room, output) = self.new_run(work, &core, records, &checkpoint.inputs);
            let to_the_bottom = checkpoint.inputs.len() == core.state.index.runs().len();
            let rule = rule(&checkpoint.table, Turn::Keep, to_the_bottom);
            checkpoint.merge = Merge::new(rule, frozen, &checkpoint.inputs, output);
            checkpoint.room = room;
            work.checkpoint = Some(checkpoint);
        }
        Err(no_space(error))
    }

    /// The snapshot table goes to pages of its own, as journal records.
    fn write_table(&self, work: &mut Maintenance) -> Result<Option<Table>> {
        let Some(checkpoint) = &work.checkpoint else {
            return Ok(None);
        };
        let records = table_records(&checkpoint.table, checkpoint.size_bytes);
        let generation = work.next_generation;
        work.next_generation = generation.next();
        let table = Table {
            room: work.room.take(table_pages(records.len() as u64)),
            generation,
            records: records.len() as u64,
        };
        let written = self.write_table_records(&table, records);
        if written.is_err() {
            work.room.give_back(table.room);
        }
        written.map(|()| Some(table))
    }

    fn write_table_records(&self, table: &Table, records: Vec<Record>) -> Result<()> {
        let mut bytes = Vec::new();
        for (place, record) in (1..).zip(records) {
            let entry = Entry {
                sequence: Sequence(place),
                incarnation: Incarnation(0),
                record,
            };
            bytes.extend_from_slice(&entry.encode(self.id, Seal::Table(table.generation)));
        }
        let offset_bytes = table.room.first * PAGE_BYTES as u64;
        self.files
            .index
            .write_at(&bytes, offset_bytes)
            .map_err(|source| StoreError::Io {
                op: "write",
                file: FileName::Index,
                offset_bytes,
                source,
            })
    }

    fn finish_checkpoint(
        &self,
        work: &mut Maintenance,
        merged: Option<Run>,
        table: Table,
    ) -> Result<()> {
        let Some(checkpoint) = work.checkpoint.take() else {
            return Ok(());
        };
        let older = {
            let core = self.core();
            let runs = core.state.index.runs();
            runs.get(checkpoint.inputs.len()..)
                .unwrap_or_default()
                .to_vec()
        };
        let runs: Vec<Arc<Run>> = merged.map(Arc::new).into_iter().chain(older).collect();
        let size_bytes = checkpoint.size_bytes;
        let shrinks = size_bytes < self.size_bytes();
        let is_smaller = |snapshot: &Arc<SnapshotInfo>| snapshot.size_bytes != size_bytes;
        let superblock = Superblock {
            size_bytes,
            base_bytes: match (checkpoint.turn, shrinks) {
                (Turn::Grow(_), _) => 0,
                // What it gives up is there until this slot is durable.
                (Turn::Revert(_), true) => work.superblock.base_bytes.max(self.size_bytes()),
                (Turn::Keep | Turn::Revert(_), _) => work.superblock.base_bytes,
            },
            has_sizes: checkpoint.table.iter().any(is_smaller),
            epoch: checkpoint.epoch,
            runs: runs.iter().map(|run| run.place).collect(),
            table_page: table.room.first,
            table_generation: table.generation,
            table_records: table.records,
            journal_generation: checkpoint.journal_generation,
            first_sequence: checkpoint.first_sequence,
            applied_through: checkpoint.applied_through,
            ..work.superblock.clone()
        };
        let result = self.flip(work, superblock);
        work.room.give_back(checkpoint.room);
        work.room.give_back(table.room);
        if result.is_err() {
            // Which superblock is durable is unknown, or the commit round failed.
            self.poison();
        }
        result?;
        {
            let mut core = self.core();
            let core = &mut *core;
            core.state.index.install(runs);
            if let Turn::Revert(target) = checkpoint.turn {
                core.state.table.truncate(target);
                core.state.epoch = checkpoint.epoch;
            }
            core.state.resize(size_bytes);
            self.size_bytes
                .store(size_bytes, std::sync::atomic::Ordering::SeqCst);
            self.note_plain(core);
        }
        work.settle.note_checkpoint();
        // Only a revert takes runs from the scan, and so does what is left of one that failed: their pages may be written from now on.
        let is_scanned = |run| work.scan.as_ref().is_some_and(|scan| scan.holds(run));
        if checkpoint.inputs.iter().any(is_scanned) {
            self.restart_scan(work);
        }
        Ok(())
    }

    /// Sync the index, commit, flip the superblock, commit again under its name.
    pub(crate) fn flip(&self, work: &mut Maintenance, next: Superblock) -> Result<()> {
        if next.runs.len() > MAX_RUNS {
            return Err(StoreError::Limit("runs of an index"));
        }
        self.sync(&*self.files.index, FileName::Index)?;
        self.commit_records()?;
        let superblock = {
            let core = self.core();
            Superblock {
                generation: work.superblock.generation.next(),
                next_generation: work.next_generation,
                log_high_water: core.space.high_water(),
                unswept: core.is_unswept(),
                ..next
            }
        };
        superblock.store(&*self.files.superblock)?;
        work.superblock = superblock;
        {
            // The next COMMIT names the new superblock, durably, before anything it freed is used
            // again: from now on the older slot alone is refused as stale.
            let mut core = self.core();
            core.journal.superblock = work.superblock.generation;
            core.journal.superblock_unnamed = true;
        }
        self.commit_records()?;
        let gone = work.room.slot_written(&work.superblock);
        self.release_pages(&gone);
        Ok(())
    }

    /// Opens or closes the way past the index.
    pub(crate) fn note_plain(&self, core: &Core) {
        self.gate
            .plain
            .store(core.is_plain(), std::sync::atomic::Ordering::SeqCst);
    }

    /// Called by a write that found the memtable or the journal over its hard bound. Blocking.
    pub(crate) fn relieve(&self) -> Result<()> {
        let mut work = crate::volume::lock(&self.maintenance);
        if work.checkpoint.is_some() {
            self.run_checkpoint(&mut work)?;
        }
        if self.core().is_over_bounds(&self.options, 1) {
            self.begin_checkpoint(&mut work, Turn::Keep)?;
            self.run_checkpoint(&mut work)?;
        }
        Ok(())
    }
}

/// A snapshot table on disk.
#[derive(Debug)]
struct Table {
    room: PageRange,
    generation: Generation,
    records: u64,
}
