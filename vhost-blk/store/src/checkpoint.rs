//! The checkpoint: the memtable goes into a new run, the superblock flips, the old journal is free.
//!
//! `maintain` drives it in steps, `revert` and `close` in one go.
//! Order (I7): freeze and switch journal; write the other index file; sync it; commit round; superblock;
//! only then drop the old run, and free log blocks when older I/O is over (I6).

use std::sync::Arc;

use crate::error::{FileName, Result, StoreError};
use crate::index::{Merge, MergeRule, Merged};
use crate::journal::Entry;
use crate::layout::{MAX_EPOCH, PAGE_BYTES, Seal};
use crate::snapshot_table::{SnapshotInfo, table_records};
use crate::superblock::Superblock;
use crate::units::{Epoch, Generation, Incarnation, LogBlock, Sequence};
use crate::volume::{Core, Maintenance, Shared, Sweep};

/// A checkpoint under way.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    merge: Merge,
    rule: MergeRule,
    /// The snapshots that the new index is for.
    table: Vec<Arc<SnapshotInfo>>,
    epoch: Epoch,
    journal_generation: Generation,
    first_sequence: Sequence,
    applied_through: Sequence,
    /// It frees what it drops.
    sweeps: bool,
}

/// What a checkpoint shall do besides merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Nothing: the state stays.
    Keep,
    /// What the snapshot of this epoch sees becomes the live state.
    Revert(Epoch),
}

fn epochs(table: &[Arc<SnapshotInfo>]) -> Vec<u32> {
    table.iter().map(|snapshot| snapshot.epoch.0).collect()
}

impl Shared {
    /// Freezes the memtable and begins. No checkpoint is under way.
    pub(crate) fn begin_checkpoint(&self, maintenance: &mut Maintenance, turn: Turn) -> Result<()> {
        let mut core = self.core();
        let core = &mut *core;
        // After a crash in a checkpoint two generations are in use: neither file is free, so the
        // younger goes on and the superblock will skip what the index holds of it.
        if maintenance.superblock.journal_generation == core.journal.generation
            && let Err(error) = core.journal.switch(&*self.files.journal)
        {
            self.poison();
            return Err(error);
        }
        // One sweep at a time: what this checkpoint drops is found by the next one otherwise.
        let sweeps = core.sweep == Sweep::Idle && !core.space.is_scanning();
        if sweeps {
            core.sweep = Sweep::Marking;
            core.space.begin_sweep();
            for (start, count) in &core.reserved {
                for block in *start..start + count {
                    core.space.note_named(LogBlock(block));
                }
            }
            for run in core.unconfirmed.superseded() {
                for place in 0..run.count {
                    core.space.note_named(run.start.plus(place));
                }
            }
            core.reclaim = false;
            core.discarded_blocks = 0;
        }
        let (mut table, mut epoch) = (core.state.table.shared(), core.state.epoch);
        let mut revert_to = None;
        match turn {
            Turn::Keep => {}
            Turn::Revert(target) => {
                table.retain(|snapshot| snapshot.epoch <= target);
                epoch = Epoch((epoch.0 + 1).min(MAX_EPOCH));
                revert_to = Some(target);
            }
        }
        let rule = MergeRule {
            epochs: epochs(&table),
            revert_to,
        };
        let frozen = core.state.index.freeze();
        let run = Arc::clone(core.state.index.run());
        maintenance.checkpoint = Some(Checkpoint {
            merge: Merge::new(rule.clone(), run, frozen),
            rule,
            table,
            epoch,
            journal_generation: core.journal.generation,
            first_sequence: core.journal.first,
            applied_through: core.journal.last(),
            sweeps,
        });
        Ok(())
    }

    /// Goes on by about `budget_pages`; `true` when the checkpoint is durable.
    pub(crate) fn step_checkpoint(
        &self,
        maintenance: &mut Maintenance,
        budget_pages: u64,
    ) -> Result<bool> {
        let Some(checkpoint) = maintenance.checkpoint.as_mut() else {
            return Ok(true);
        };
        let stepped = checkpoint.merge.step(&self.files.index, budget_pages);
        let named = checkpoint.merge.take_named();
        if checkpoint.sweeps {
            for part in named.chunks(1024) {
                let mut core = self.core();
                part.iter().for_each(|block| core.space.note_named(*block));
            }
        }
        match stepped {
            Ok(None) => Ok(false),
            Ok(Some(merged)) => {
                let result = self.write_table(checkpoint, &merged);
                self.restart_on_error(maintenance, result)?;
                self.finish_checkpoint(maintenance, merged)?;
                Ok(true)
            }
            Err(error) => self
                .restart_on_error(maintenance, Err(error))
                .map(|()| false),
        }
    }

    /// Runs a checkpoint to its end. Blocking.
    pub(crate) fn run_checkpoint(&self, maintenance: &mut Maintenance) -> Result<()> {
        while !self.step_checkpoint(maintenance, 1024)? {}
        Ok(())
    }

    /// After an error nothing has happened yet: the merge of the frozen memtable begins anew, as one
    /// that keeps the state, since whoever asked for a revert was told of the error.
    fn restart_on_error(&self, maintenance: &mut Maintenance, result: Result<()>) -> Result<()> {
        let Err(error) = result else { return Ok(()) };
        if let Some(checkpoint) = maintenance.checkpoint.as_mut() {
            let core = self.core();
            if checkpoint.rule.revert_to.take().is_some() {
                checkpoint.table = core.state.table.shared();
                checkpoint.epoch = core.state.epoch;
                checkpoint.rule.epochs = epochs(&checkpoint.table);
            }
            if let Some(frozen) = core.state.index.frozen() {
                let run = Arc::clone(core.state.index.run());
                checkpoint.merge = Merge::new(checkpoint.rule.clone(), run, Arc::clone(frozen));
            }
        }
        if let StoreError::Io { source, .. } = &error
            && source.kind() == std::io::ErrorKind::StorageFull
        {
            return Err(StoreError::NoSpace);
        }
        Err(error)
    }

    /// The snapshot table goes behind the pages, as journal records.
    fn write_table(&self, checkpoint: &Checkpoint, merged: &Merged) -> Result<()> {
        let mut bytes = Vec::new();
        for (place, record) in (1..).zip(table_records(&checkpoint.table)) {
            let entry = Entry {
                sequence: Sequence(place),
                incarnation: Incarnation(0),
                record,
            };
            bytes.extend_from_slice(&entry.encode(self.id, Seal::Table(merged.run.generation)));
        }
        let offset_bytes = merged.run.pages * PAGE_BYTES as u64;
        self.files.index[merged.run.slot]
            .write_at(&bytes, offset_bytes)
            .map_err(|source| StoreError::Io {
                op: "write",
                file: FileName::Index,
                offset_bytes,
                source,
            })
    }

    fn finish_checkpoint(&self, maintenance: &mut Maintenance, merged: Merged) -> Result<()> {
        let Some(checkpoint) = maintenance.checkpoint.take() else {
            return Ok(());
        };
        let result = self.flip(maintenance, &checkpoint, &merged);
        if result.is_err() {
            // Which superblock is durable is unknown, or the commit round failed.
            self.poison();
        }
        result?;
        let mut core = self.core();
        let core = &mut *core;
        core.state.index.install(merged.run);
        if let Some(target) = checkpoint.rule.revert_to {
            core.state.table.truncate(target);
            core.state.epoch = checkpoint.epoch;
        }
        let generation = core.pins.close();
        if checkpoint.sweeps {
            core.sweep = Sweep::Waiting(generation);
        }
        self.note_plain(core);
        maintenance.settle.note_checkpoint();
        Ok(())
    }

    /// Sync the index, commit, flip the superblock, commit again under its name.
    fn flip(
        &self,
        maintenance: &mut Maintenance,
        checkpoint: &Checkpoint,
        merged: &Merged,
    ) -> Result<()> {
        self.sync(&*self.files.index[merged.run.slot], FileName::Index)?;
        self.commit_records()?;
        let superblock = Superblock {
            generation: maintenance.superblock.generation.next(),
            epoch: checkpoint.epoch,
            index_slot: merged.run.slot,
            index_generation: merged.run.generation,
            index_pages: merged.run.pages,
            index_records: merged.run.records,
            table_records: table_records(&checkpoint.table).len() as u64,
            journal_generation: checkpoint.journal_generation,
            first_sequence: checkpoint.first_sequence,
            applied_through: checkpoint.applied_through,
            ..maintenance.superblock.clone()
        };
        superblock.store(&*self.files.superblock)?;
        maintenance.superblock = superblock;
        {
            // The next COMMIT names the new superblock, durably, before anything it freed is used
            // again: from now on the older slot alone is refused as stale.
            let mut core = self.core();
            core.journal.superblock = maintenance.superblock.generation;
            core.journal.superblock_unnamed = true;
        }
        self.commit_records()
    }

    /// Opens or closes the way past the index.
    pub(crate) fn note_plain(&self, core: &Core) {
        self.gate
            .plain
            .store(core.is_plain(), std::sync::atomic::Ordering::SeqCst);
    }

    /// Called by a write that found the memtable or the journal over its hard bound. Blocking.
    pub(crate) fn relieve(&self) -> Result<()> {
        let mut maintenance = crate::volume::lock(&self.maintenance);
        if maintenance.checkpoint.is_some() {
            self.run_checkpoint(&mut maintenance)?;
        }
        if self.core().is_over_bounds(&self.options, 1) {
            self.begin_checkpoint(&mut maintenance, Turn::Keep)?;
            self.run_checkpoint(&mut maintenance)?;
        }
        Ok(())
    }
}
