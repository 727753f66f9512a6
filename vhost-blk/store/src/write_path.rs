//! The way of a write: plan, prepare, (the caller moves the data,) complete.
//!
//! The daemon calls it through `Volume`; the blocking drivers at the end go the same way.
//! Invariants: a MAP record is appended after its data landed and before the write is acknowledged; an
//! in-place write over preserved data is planned out only after PRESERVE is durable (I3).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::error::{FileName, Result, StoreError};
use crate::index::Location;
use crate::journal::Record;
use crate::plan::{
    DISTRICT_BLOCKS, Extent, Extents, MAX_REQUEST_BYTES, MapRun, NEIGHBOURHOOD_BLOCKS, Outline,
    Source, Work, WriteKind, WritePlan, follows, is_dense, outline,
};
use crate::snapshot_table::Method;
use crate::units::{Block, ByteRange, Epoch, in_memory};
use crate::volume::{Core, Shared, Volume};

impl WritePlan {
    /// A plan that counts as a write in flight from here to its drop.
    fn begin(shared: &Arc<Shared>, kind: WriteKind, extents: Extents) -> Result<WritePlan> {
        shared.gate.writes_in_flight.fetch_add(1, Ordering::SeqCst);
        let plan = WritePlan {
            shared: Arc::clone(shared),
            kind,
            extents,
            work: None,
            abandoned: false,
            _pin: None,
        };
        // After the count: whoever holds writes either sees this one or is seen here.
        if shared.gate.held.load(Ordering::SeqCst) {
            return Err(StoreError::Busy);
        }
        Ok(plan)
    }

    fn mark_dirty(&self) {
        let gate = &self.shared.gate;
        for extent in self.extents.as_slice() {
            let flag = match extent.source {
                Source::Base => &gate.base_dirty,
                Source::Log => &gate.log_dirty,
                Source::Zero => continue,
            };
            if !flag.load(Ordering::SeqCst) {
                flag.store(true, Ordering::SeqCst);
            }
        }
        // Edges and zero-fills go to the log as well, but so does the data beside them.
    }

    /// Gives back everything: its blocks stand in nobody's way any more. It cannot be completed.
    pub(crate) fn abandon(&mut self) {
        if let Some(work) = self.work.take() {
            self.abandoned = true;
            let mut core = self.shared.core();
            work.give_back(&mut core);
        }
    }
}

impl Work {
    fn give_back(&self, core: &mut Core) {
        for (first, _) in self.claims() {
            core.busy.remove(&first);
        }
        core.promised_records -= self.promised_records;
        for run in &self.reserved {
            core.reserved.remove(&run.start.0);
            core.space.free(*run);
        }
    }
}

impl Drop for WritePlan {
    fn drop(&mut self) {
        // A write that failed may have landed in part.
        self.mark_dirty();
        if let Some(work) = self.work.take() {
            let shared = Arc::clone(&self.shared);
            work.give_back(&mut shared.core());
        }
        self.shared
            .gate
            .writes_in_flight
            .fetch_sub(1, Ordering::SeqCst);
    }
}

/// Appends the records of a plan's runs; neighbours without a checksum share one.
fn push_map_records(records: &mut Vec<Record>, runs: &[MapRun], epoch: Epoch) {
    for run in runs {
        let blocks = u32::try_from(run.count).unwrap_or(u32::MAX);
        if let Some(Record::Map {
            block,
            count,
            location,
            epoch: _,
            old,
            crc: None,
        }) = records.last_mut()
            && run.crc.is_none()
            && follows(*old, u64::from(*count), run.old)
            && block.plus(u64::from(*count)) == run.block
            && location.plus(u64::from(*count)) == run.location
            && *count + blocks <= crate::layout::MAX_RECORD_BLOCKS
        {
            *count += blocks;
            continue;
        }
        records.push(Record::Map {
            block: run.block,
            count: blocks,
            location: run.location,
            epoch,
            old: run.old,
            crc: run.crc,
        });
    }
}

impl Core {
    /// Lets a preserving request take the rest of its neighbourhoods along, or of its district, where writing is dense,
    /// as far as the newest snapshot sees: before `end`.
    fn look_ahead(&mut self, steps: &mut Outline, floor: Option<Epoch>, end: Block) -> Result<()> {
        for first in steps.neighbourhoods() {
            let last = Block(first.plus(NEIGHBOURHOOD_BLOCKS).0.min(end.0) - 1);
            let states = self.state.index.states(first, last, floor)?;
            if !states.iter().any(|state| state.touched) {
                continue;
            }
            let is_free = |core: &Core, block: Block| !core.is_busy(block.0, block.0);
            let district = Block(first.0 - first.0 % DISTRICT_BLOCKS);
            let last = Block(district.plus(DISTRICT_BLOCKS).0.min(end.0) - 1);
            let around = self.state.index.states(district, last, floor)?;
            if is_dense(&around) {
                steps.preserve_ahead(district, &around, |block| is_free(self, block));
            } else {
                steps.preserve_ahead(first, &states, |block| is_free(self, block));
            }
        }
        Ok(())
    }
}

impl Shared {
    fn plan_write(self: &Arc<Self>, range: ByteRange, kind: WriteKind) -> Result<WritePlan> {
        self.check_writable()?;
        let mut plan = WritePlan::begin(self, kind, Extents::base(range))?;
        // As long as the plan lives, the size stays.
        let size_bytes = self.size_bytes();
        Shared::check_range(range, size_bytes)?;
        if self.gate.plain.load(Ordering::SeqCst) {
            return Ok(plan);
        }
        plan.extents = Extents::Many(Vec::new());
        let mut core = self.core();
        let (first, last) = (range.first_block(), range.last_block());
        if core.is_busy(first.0, last.0) {
            drop(core);
            return Err(StoreError::Overlaps);
        }
        let floor = core.state.floor();
        let method = core.state.table.newest().map(|snapshot| snapshot.method);
        let (mut one, mut many);
        let states = if first == last {
            one = [self.heed(core.state.index.state(first, floor))?];
            &mut one[..]
        } else {
            many = self.heed(core.state.index.states(first, last, floor))?;
            &mut many[..]
        };
        let end = core.state.snapshots_end();
        if last >= end {
            // Nothing has to be kept of what no snapshot sees.
            let seen = in_memory(end.0.saturating_sub(first.0));
            for state in states.iter_mut().skip(seen) {
                state.touched = true;
            }
        }
        let states = &*states;
        let in_doubt = |block| core.unconfirmed.names(block);
        let mut steps = outline(kind, range, size_bytes, states, method, in_doubt);
        if method == Some(Method::CopyOnWrite) {
            core.look_ahead(&mut steps, floor, end)?;
        }
        let mut found = core.space.allocate(steps.log_blocks);
        if found.is_none() && steps.forget_ahead() {
            found = core.space.allocate(steps.log_blocks);
        }
        let confirm_first = found.is_none() && steps.in_doubt;
        if confirm_first {
            // Without room for another place the old one will do, after a round that confirms it.
            steps = outline(kind, range, size_bytes, states, method, |_| false);
            found = core.space.allocate(steps.log_blocks);
        }
        let runs = match found {
            Some(runs) => runs,
            None => {
                core.reclaim |= core.discarded_blocks > 0;
                core.unconfirmed.wanted |= !core.unconfirmed.is_empty();
                drop(core);
                return Err(StoreError::NoSpace);
            }
        };
        let (extents, mut work) = steps.place(kind, range, size_bytes, &runs);
        let fits = core
            .journal
            .has_room(core.promised_records + work.promised_records);
        let claims_some = work.claims().next().is_some();
        if claims_some && !fits && core.promised_records > 0 {
            // Those in flight end, or a checkpoint makes room.
            runs.iter().for_each(|run| core.space.free(*run));
            drop(core);
            return Err(StoreError::Busy);
        }
        for run in &runs {
            core.reserved.insert(run.start.0, run.count);
            work.bare_segments.extend(core.space.bare_segments(*run));
        }
        core.busy.extend(work.claims());
        let settled: Vec<u64> = core.settling.range(first.0..=last.0).copied().collect();
        for block in settled {
            core.settling.remove(&block);
        }
        if claims_some {
            work.pressure = !fits || core.is_over_bounds(&self.options, 4);
            core.promised_records += work.promised_records;
        } else {
            work.promised_records = 0;
        }
        plan._pin = Some(core.pins.pin());
        drop(core);
        plan.extents = Extents::Many(extents);
        work.confirm_first = confirm_first;
        if claims_some || confirm_first {
            plan.work = Some(Box::new(work));
        }
        Ok(plan)
    }

    fn complete_writes(&self, plans: Vec<WritePlan>) -> Result<()> {
        if plans
            .iter()
            .any(|plan| plan.abandoned || plan.needs_prepare())
        {
            return Err(StoreError::NotPrepared);
        }
        plans.iter().for_each(WritePlan::mark_dirty);
        let maps = |plan: &WritePlan| plan.work.as_ref().is_some_and(|w| !w.maps.is_empty());
        if !plans.iter().any(maps) {
            return Ok(());
        }
        self.check_writable()?;
        // Taken apart under one lock, dropped behind it: plans lock by themselves when they go.
        let mut works: Vec<Box<Work>> = Vec::with_capacity(plans.len());
        let mut plans = plans;
        works.extend(plans.iter_mut().filter_map(|plan| plan.work.take()));
        let mut core = self.core();
        let epoch = core.state.epoch;
        let mut records = Vec::with_capacity(works.len());
        for work in &works {
            push_map_records(&mut records, &work.maps, epoch);
        }
        let result = core.record(self, &records);
        for mut work in works {
            if result.is_ok() {
                for run in &work.maps {
                    if run.location == Location::Zero && run.old.is_none() {
                        core.discarded_blocks += run.count;
                    }
                }
                // Anything up to the last record is newer than what it superseded.
                let record = core.journal.last();
                for run in std::mem::take(&mut work.supersedes) {
                    core.supersede(run, record);
                }
                // Records name them from now on.
                for run in std::mem::take(&mut work.reserved) {
                    core.reserved.remove(&run.start.0);
                }
            }
            work.give_back(&mut core);
        }
        drop(core);
        result
    }

    /// Moves a driver's bytes: `data` for a write, zeroes in place otherwise.
    fn move_data(&self, plan: &WritePlan, data: Option<&[u8]>) -> Result<()> {
        let mut rest = data;
        for extent in plan.extents() {
            let (file, name) = match extent.source {
                Source::Base => (&self.files.base, FileName::Base),
                Source::Log | Source::Zero => (&self.files.log, FileName::Log),
            };
            let done = match (&mut rest, plan.kind) {
                (Some(data), _) => {
                    let (now, later) = data.split_at(in_memory(extent.length_bytes));
                    *data = later;
                    file.write_at(now, extent.offset_bytes)
                }
                (None, kind) => {
                    let may_unmap = extent.source == Source::Base
                        && match kind {
                            WriteKind::Write => false,
                            WriteKind::WriteZeroes { may_unmap } => may_unmap,
                            WriteKind::Discard => true,
                        };
                    file.write_zeroes(extent.offset_bytes, extent.length_bytes, may_unmap)
                }
            };
            done.map_err(|source| io_error("write", name, extent, source))?;
        }
        Ok(())
    }
}

fn io_error(
    op: &'static str,
    file: FileName,
    extent: &Extent,
    source: std::io::Error,
) -> StoreError {
    if source.kind() == std::io::ErrorKind::StorageFull && file == FileName::Log {
        return StoreError::NoSpace;
    }
    StoreError::Io {
        op,
        file,
        offset_bytes: extent.offset_bytes,
        source,
    }
}

impl Volume {
    /// Plans a write. No data I/O.
    ///
    /// `Overlaps` and `Busy`: try again when the write in flight, or the snapshot, is through.
    /// `NoSpace`: hold the write, call [`Volume::maintain`], try again.
    pub fn plan_write(&self, range: ByteRange, kind: WriteKind) -> Result<WritePlan> {
        self.shared.plan_write(range, kind)
    }

    /// Does what the plans need before their data may move, in one round for all of them. Blocking.
    /// On an error none of them may go on: their blocks have been given back already, so requests that
    /// were refused with `Overlaps` because of them may be tried again, and the plans are to be dropped.
    pub fn prepare_writes(&self, plans: &mut [WritePlan]) -> Result<()> {
        self.shared.prepare_writes(plans)
    }

    /// Makes old data durable for plans whose copies the caller has moved itself: appends their PRESERVE
    /// records and runs one round, shared with whoever else needs one. Blocking. Plans that have nothing to
    /// preserve pass through. Errors as [`Volume::prepare_writes`]; `NotPrepared` if a plan still needs room or
    /// its copies have not landed.
    pub fn preserve(&self, plans: &mut [WritePlan]) -> Result<()> {
        self.shared.preserve(plans)
    }

    /// Makes a write whose data landed part of the volume. Acknowledge it after `Ok`.
    pub fn complete_write(&self, plan: WritePlan) -> Result<()> {
        self.shared.complete_writes(vec![plan])
    }

    /// The same for several writes, with one append for all their records: all of them, or after an error
    /// none.
    pub fn complete_writes(&self, plans: Vec<WritePlan>) -> Result<()> {
        self.shared.complete_writes(plans)
    }

    fn drive(&self, range: ByteRange, kind: WriteKind, data: Option<&[u8]>) -> Result<()> {
        let mut done = 0;
        while done < range.length_bytes {
            let part = (range.length_bytes - done).min(MAX_REQUEST_BYTES);
            let now = ByteRange::new(range.offset_bytes + done, part);
            let plan = self.plan_write(now, kind)?;
            let mut plans = [plan];
            if plans.iter().any(WritePlan::needs_prepare) {
                self.prepare_writes(&mut plans)?;
            }
            let [mut plan] = plans;
            let data = data.map(|data| &data[in_memory(done)..in_memory(done + part)]);
            if let Some(data) = data {
                for place in 0..plan.seals().len() {
                    let part = plan.seals()[place];
                    let start = in_memory(part.offset_bytes);
                    let bytes = &data[start..start + in_memory(part.length_bytes)];
                    plan.seal(place, crc32c::crc32c(bytes));
                }
            }
            self.shared.move_data(&plan, data)?;
            self.complete_write(plan)?;
            done += part;
        }
        Ok(())
    }

    /// Writes `data`. Blocking. `Overlaps`: some of it may have been written; it is for the caller to try again, as
    /// the write in flight may need this very thread to go on.
    pub fn write_at(&self, offset_bytes: u64, data: &[u8]) -> Result<()> {
        let range = ByteRange::new(offset_bytes, data.len() as u64);
        self.drive(range, WriteKind::Write, Some(data))
    }

    /// Makes a range read as zeroes. Blocking. `Overlaps`: as [`Volume::write_at`].
    pub fn write_zeroes_at(&self, range: ByteRange, may_unmap: bool) -> Result<()> {
        self.drive(range, WriteKind::WriteZeroes { may_unmap }, None)
    }

    /// Discards a range: whole blocks may read as zeroes afterwards. Blocking. `Overlaps`: as
    /// [`Volume::write_at`].
    pub fn discard_at(&self, range: ByteRange) -> Result<()> {
        self.drive(range, WriteKind::Discard, None)
    }
}
