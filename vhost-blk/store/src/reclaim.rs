//! Merging runs in the background: to keep them few, and to find what was dropped.
//!
//! `maintain` drives it in steps; checkpoints go on beside it, on newer runs. A merge of all runs ends a sweep: the log
//! blocks that it did not write into its output, and that nobody took or gave back since the sweep began, are free.
//! Invariants: the journal's part of the superblock stays what the last checkpoint made it; runs that are being merged or
//! scanned are in nobody else's merge.

use std::sync::Arc;

use crate::checkpoint::{Turn, rule};
use crate::error::{FileName, Result, StoreError};
use crate::index::{Merge, Run};
use crate::index_room::PageRange;
use crate::scan::{Bounds, Scan};
use crate::superblock::Superblock;
use crate::units::{BLOCK_BYTES, LogBlock};
use crate::volume::{Core, Maintenance, Shared, Sweep};

/// A run that is older may be this many times as large as what is merged into it.
pub(crate) const RATIO: u64 = 2;
/// From so many runs on, size does not matter.
pub(crate) const MANY_RUNS: usize = 12;

/// Merging of runs under way.
#[derive(Debug)]
pub(crate) struct Reclaim {
    merge: Merge,
    inputs: Vec<Arc<Run>>,
    room: PageRange,
    /// It ends the sweep.
    sweeps: bool,
}

/// Which neighbouring runs to merge, newest first in `sizes`: those that checkpoints, which merge up to `small` records,
/// leave to us.
fn choose(sizes: &[u64], small: u64) -> Option<std::ops::Range<usize>> {
    for first in 0..sizes.len() {
        let (mut behind, mut records) = (first, 0_u64);
        for size in sizes.iter().skip(first) {
            if behind > first && *size > records.saturating_mul(RATIO) {
                break;
            }
            records = records.saturating_add(*size);
            behind += 1;
        }
        if behind - first > 1 && records > small {
            return Some(first..behind);
        }
    }
    (sizes.len() > MANY_RUNS).then_some(0..sizes.len())
}

impl Maintenance {
    /// Those of `runs`, newest first, that are newer than all that is being merged or scanned.
    pub(crate) fn newer_runs<'a>(&self, runs: &'a [Arc<Run>]) -> &'a [Arc<Run>] {
        let is_held = |run: &Arc<Run>| {
            let merged = self.reclaim.as_ref();
            let scanned = self.scan.as_ref();
            merged.is_some_and(|merged| merged.inputs.iter().any(|input| Arc::ptr_eq(input, run)))
                || scanned.is_some_and(|scan| scan.holds(run))
        };
        let free = runs.iter().position(is_held).unwrap_or(runs.len());
        runs.get(..free).unwrap_or_default()
    }
}

impl Shared {
    /// Begins a merge of all runs that ends the sweep which began before, or of some if they are too many.
    /// `false` if there is nothing to do. None is under way, and no scan.
    pub(crate) fn begin_reclaim(&self, work: &mut Maintenance, sweeps: bool) -> Result<bool> {
        let mut core = self.core();
        let runs = core.state.index.runs().to_vec();
        let chosen = if sweeps {
            0..runs.len()
        } else {
            let sizes: Vec<u64> = runs.iter().map(|run| run.place.records).collect();
            match choose(&sizes, self.small_merge_records()) {
                Some(chosen) => chosen,
                None => return Ok(false),
            }
        };
        if runs.is_empty() {
            // Nothing is named: the sweep frees all.
            let generation = core.pins.close();
            core.sweep = Sweep::Waiting(generation);
            return Ok(true);
        }
        let to_the_bottom = chosen.end == runs.len();
        let rule = rule(&core.state.table.shared(), Turn::Keep, to_the_bottom);
        let inputs = runs.get(chosen).unwrap_or_default().to_vec();
        let (room, output) = self.new_run(work, &core, 0, &inputs);
        drop(core);
        work.reclaim = Some(Reclaim {
            merge: Merge::new(rule, None, &inputs, output),
            inputs,
            room,
            sweeps,
        });
        Ok(true)
    }

    /// Goes on by about `budget_pages`; what an error leaves is as if it had not begun.
    pub(crate) fn step_reclaim(&self, work: &mut Maintenance, budget_pages: u64) -> Result<()> {
        let Some(mut reclaim) = work.reclaim.take() else {
            return Ok(());
        };
        let stepped = reclaim.merge.step(&*self.files.index, budget_pages);
        if reclaim.sweeps {
            self.note_named(reclaim.merge.take_named());
        }
        match stepped {
            Ok(None) => {
                work.reclaim = Some(reclaim);
                Ok(())
            }
            Ok(Some(merged)) => {
                let result = self.finish_reclaim(work, &reclaim, merged);
                if result.is_err() {
                    // Which slot is durable is unknown, or the commit round failed.
                    self.poison();
                }
                work.room.give_back(reclaim.room);
                result
            }
            Err(error) => {
                work.reclaim = Some(reclaim);
                self.abandon_reclaim(work);
                Err(no_space(error))
            }
        }
    }

    /// Forgets the merge and its sweep: nothing has happened.
    pub(crate) fn abandon_reclaim(&self, work: &mut Maintenance) {
        if let Some(reclaim) = work.reclaim.take() {
            work.room.give_back(reclaim.room);
        }
        let mut core = self.core();
        if core.sweep == Sweep::Marking {
            core.space.abandon_sweep();
            core.sweep = Sweep::Idle;
            core.reclaim = true;
        }
        work.sweep_due = false;
    }

    /// Log blocks that are in use.
    pub(crate) fn note_named(&self, named: Vec<LogBlock>) {
        for part in named.chunks(1024) {
            let mut core = self.core();
            part.iter().for_each(|block| core.space.note_named(*block));
        }
    }

    fn finish_reclaim(
        &self,
        work: &mut Maintenance,
        reclaim: &Reclaim,
        merged: Option<Run>,
    ) -> Result<()> {
        let mut runs = self.core().state.index.runs().to_vec();
        let is_input = |run: &Arc<Run>| reclaim.inputs.iter().any(|input| Arc::ptr_eq(input, run));
        let place = runs.iter().position(is_input).unwrap_or(runs.len());
        runs.retain(|run| !is_input(run));
        if let Some(merged) = merged {
            runs.insert(place.min(runs.len()), Arc::new(merged));
        }
        let superblock = Superblock {
            runs: runs.iter().map(|run| run.place).collect(),
            ..work.superblock.clone()
        };
        self.flip(work, superblock)?;
        let mut core = self.core();
        let core = &mut *core;
        core.state.index.install_merged(runs);
        let generation = core.pins.close();
        if reclaim.sweeps {
            core.sweep = Sweep::Waiting(generation);
        }
        self.note_plain(core);
        work.settle.note_checkpoint();
        Ok(())
    }

    /// Begins a sweep: from now on every log block is a candidate, but those that plans have reserved. `true`: records name some that
    /// are in no run yet, so a checkpoint comes before the merge. That is seen under the same lock: what is recorded behind it
    /// was reserved before, or is allocated later.
    pub(crate) fn begin_sweep(core: &mut Core) -> bool {
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
        core.settled = false;
        core.state.index.memtable_records() > 0
    }

    /// Goes on with the scan by about `budget_pages`.
    pub(crate) fn step_scan(&self, work: &mut Maintenance, budget_pages: u64) -> Result<()> {
        let Some(mut scan) = work.scan.take() else {
            return Ok(());
        };
        let (mut done, mut named) = (0, Vec::new());
        while done < budget_pages.max(1) {
            let step = scan.step(&*self.files.index, budget_pages - done, &mut named);
            let pages = match self.heed(step) {
                Ok(pages) => pages,
                Err(error) => {
                    work.scan = Some(scan);
                    return Err(error);
                }
            };
            self.note_named(std::mem::take(&mut named));
            if pages == 0 {
                self.core().space.end_scan();
                return Ok(());
            }
            done += pages;
        }
        work.scan = Some(scan);
        Ok(())
    }

    /// Begins the scan anew, with the runs that are there now.
    pub(crate) fn restart_scan(&self, work: &mut Maintenance) {
        if work.scan.is_some() {
            let log_bytes = self.files.log.len_bytes().unwrap_or(u64::MAX);
            let core = self.core();
            let bounds = Bounds {
                volume_blocks: self.volume_blocks(),
                log_blocks: work.superblock.first_data_block()..log_bytes.div_ceil(BLOCK_BYTES),
                epoch: core.state.epoch.0,
            };
            work.scan = Some(Scan::new(core.state.index.runs(), bounds));
        }
    }

    /// Pages of the index file that no slot names any more give their space back. They are used again all the same, so an
    /// error costs nothing but space.
    pub(crate) fn release_pages(&self, ranges: &[PageRange]) {
        for range in ranges {
            let offset_bytes = range.first * crate::layout::PAGE_BYTES as u64;
            let length_bytes = range.count * crate::layout::PAGE_BYTES as u64;
            drop(self.files.index.release(offset_bytes, length_bytes));
        }
    }

    /// Damage found in the index: the volume takes no more writes, whoever asked for the page.
    pub(crate) fn heed<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(StoreError::Corrupted {
            file: FileName::Index,
            ..
        }) = &result
        {
            self.poison();
        }
        result
    }
}

/// A full file system is the shadow storage's.
pub(crate) fn no_space(error: StoreError) -> StoreError {
    if let StoreError::Io { source, .. } = &error
        && source.kind() == std::io::ErrorKind::StorageFull
    {
        return StoreError::NoSpace;
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{SetId, SnapshotId};
    use crate::{Method, NewSnapshot, OpenOptions, Volume};

    /// A volume of zeroes in memory, and a snapshot of it.
    fn volume_with_snapshot(blocks: u64, memtable_records: usize) -> Volume {
        let mut base = crate::sim::Image::default();
        base.set_len(blocks * BLOCK_BYTES);
        let options = OpenOptions {
            journal_prewritten_bytes: 0,
            segments_ahead: 0,
            memtable_records,
            ..OpenOptions::default()
        };
        let opened = Volume::open_files(crate::sim::memory_volume(vec![base]), &options);
        let volume = opened.map(|(volume, _)| volume).expect("a new volume");
        let new = NewSnapshot {
            snapshot_id: SnapshotId::from(uuid::Uuid::from_u128(1)),
            set_id: SetId::from(uuid::Uuid::from_u128(2)),
            members: vec![volume.id()],
            method: Method::RedirectOnWrite,
            created_unix_ms: 1,
        };
        volume.take_snapshot(new).expect("a snapshot");
        volume
    }

    /// That a pin may be dropped in the middle of a maintenance step no history can force.
    #[test]
    fn sweep_leaves_superseded_blocks_to_the_round_that_confirms_them() {
        let volume = volume_with_snapshot(64, OpenOptions::default().memtable_records);
        for value in [1, 2] {
            let bytes = [value; 4096];
            volume.write_at(BLOCK_BYTES, &bytes).expect("a write");
        }
        let mut core = volume.shared.core();
        let superseded: Vec<_> = core.unconfirmed.superseded().collect();
        assert_eq!(superseded.len(), 1);
        let used_blocks = core.space.used_blocks();
        // Nothing is marked: all is swept but that.
        Shared::begin_sweep(&mut core);
        let mut cursor = 0;
        while let Some(next) = core.space.sweep(cursor) {
            cursor = next;
        }
        core.sweep = Sweep::Idle;
        assert!(used_blocks > superseded[0].count);
        assert_eq!(core.space.used_blocks(), superseded[0].count);
        let taken = core.space.allocate(64).expect("room");
        let held = superseded[0].start.0;
        let holds =
            |run: &crate::space::LogRun| run.start.0 <= held && held < run.start.0 + run.count;
        assert!(!taken.iter().any(holds), "{taken:?}");
        // From now on it is nobody's.
        let last = core.journal.last();
        core.confirm(last);
        assert_eq!(core.space.used_blocks(), 64);
    }

    /// A write may be recorded at any moment of the step that begins a sweep: its block stays in use. The moment that matters is short,
    /// so it is tried often.
    #[test]
    fn sweep_frees_nothing_that_is_recorded_while_it_begins() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let volume = volume_with_snapshot(64, OpenOptions::default().memtable_records);
        let shared = &volume.shared;
        let settled =
            || while volume.maintain(1024).expect("a step") == crate::Maintenance::More {};
        for (times, number) in (0..64).cycle().take(4096).enumerate() {
            let range = crate::ByteRange::new(number * BLOCK_BYTES, BLOCK_BYTES);
            volume.discard_at(range).expect("a discard");
            {
                let mut work = crate::volume::lock(&shared.maintenance);
                shared
                    .begin_checkpoint(&mut work, Turn::Keep)
                    .expect("begun");
                shared.run_checkpoint(&mut work).expect("a checkpoint");
            }
            shared.core().reclaim = true;
            let (ready, go) = (AtomicBool::new(false), AtomicBool::new(false));
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    ready.store(true, Ordering::SeqCst);
                    while !go.load(Ordering::SeqCst) {
                        std::hint::spin_loop();
                    }
                    let written = volume.write_at(range.offset_bytes, &[7; 4096]);
                    written.expect("a write");
                });
                while !ready.load(Ordering::SeqCst) {
                    std::hint::spin_loop();
                }
                go.store(true, Ordering::SeqCst);
                // Earlier or later than the write's record.
                (0..times % 512).for_each(|_| std::hint::spin_loop());
                settled();
            });
            settled();
            let mut core = shared.core();
            let live = core
                .state
                .index
                .live(crate::units::Block(number))
                .expect("known");
            let crate::index::Location::Log(at) = live else {
                panic!("{live:?}");
            };
            let free = core.space.allocate(64).expect("room");
            let is_free =
                |run: &crate::space::LogRun| run.start <= at && at < run.start.plus(run.count);
            assert!(!free.iter().any(is_free), "{at:?} is in use and free");
            free.into_iter().for_each(|run| core.space.free(run));
        }
    }

    /// Which runs are merged hangs on their sizes: a merge that leaves an older one alone is made here on purpose.
    #[test]
    fn settled_blocks_stay_settled_when_older_runs_are_not_merged() {
        let volume = volume_with_snapshot(256, 1);
        let written = vec![1; 256 * 4096];
        volume.write_at(0, &written).expect("a write");
        let shared = &volume.shared;
        let mut work = crate::volume::lock(&shared.maintenance);
        let checkpoint = |work: &mut Maintenance| {
            shared.begin_checkpoint(work, Turn::Keep).expect("begun");
            shared.run_checkpoint(work).expect("a checkpoint");
        };
        checkpoint(&mut work);
        // Two small runs above the large one: their blocks are in the base again, which holds zeroes.
        for first in [0, 20] {
            let settle = crate::journal::Record::Settle {
                block: crate::units::Block(first),
                count: 20,
            };
            shared.core().record(shared, &[settle]).expect("a record");
            checkpoint(&mut work);
        }
        let runs = || shared.core().state.index.runs().len();
        assert_eq!(runs(), 3);
        assert!(shared.begin_reclaim(&mut work, false).expect("begun"));
        let merged = work.reclaim.as_ref().map(|reclaim| reclaim.inputs.len());
        assert_eq!(merged, Some(2), "the oldest is not among them");
        while work.reclaim.is_some() {
            shared.step_reclaim(&mut work, 1024).expect("a step");
        }
        drop(work);
        let mut block = [0; 4096];
        for number in 0..256 {
            volume
                .read_at(crate::View::Head, number * BLOCK_BYTES, &mut block)
                .expect("a read");
            let expected = u8::from(number >= 40);
            assert!(block.iter().all(|byte| *byte == expected), "{number}");
        }
    }

    #[test]
    fn runs_are_merged_when_the_older_is_not_much_larger() {
        assert_eq!(choose(&[], 10), None);
        assert_eq!(choose(&[100], 10), None);
        assert_eq!(choose(&[100, 1000], 10), None);
        assert_eq!(choose(&[5, 5], 10), None, "a checkpoint does that");
        assert_eq!(choose(&[100, 150, 1000], 10), Some(0..2));
        assert_eq!(choose(&[1, 100, 150, 500, 5000], 10), Some(1..4));
        assert_eq!(choose(&[1; 13], 1000), Some(0..13));
    }

    #[test]
    fn runs_stay_few_and_each_record_is_rewritten_a_few_times() {
        // What checkpoints and merges do to 10,000 memtables of one record each, if each keeps up with the other.
        let (mut sizes, mut written) = (Vec::<u64>::new(), 0);
        for _ in 0..10_000 {
            let count = crate::checkpoint::newest_to_merge(&sizes, 1, 8);
            let merged = 1 + sizes.drain(..count).sum::<u64>();
            sizes.insert(0, merged);
            written += merged;
            if let Some(chosen) = choose(&sizes, 8) {
                let first = chosen.start;
                let merged = sizes.drain(chosen).sum::<u64>();
                sizes.insert(first, merged);
                written += merged;
            }
            assert!(sizes.len() <= 10, "{sizes:?}");
        }
        assert!(written < 12 * 10_000, "{written}");
    }
}
