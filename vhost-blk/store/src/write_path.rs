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
    Extent, Extents, MAX_REQUEST_BYTES, MapRun, Source, WriteKind, WritePlan, outline,
};
use crate::units::{ByteRange, in_memory};
use crate::volume::{Shared, Volume};

impl WritePlan {
    /// A plan that counts as a write in flight from here to its drop.
    fn begin(shared: &Arc<Shared>, kind: WriteKind, extents: Extents) -> Result<WritePlan> {
        shared.gate.writes_in_flight.fetch_add(1, Ordering::SeqCst);
        let plan = WritePlan {
            shared: Arc::clone(shared),
            kind,
            extents,
            work: None,
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
}

impl Drop for WritePlan {
    fn drop(&mut self) {
        // A write that failed may have landed in part.
        self.mark_dirty();
        if let Some(work) = self.work.take() {
            let mut core = self.shared.core();
            for (first, _) in &work.busy {
                core.busy.remove(first);
            }
            for run in &work.reserved {
                core.reserved.remove(&run.start.0);
                core.space.free(*run);
            }
        }
        self.shared
            .gate
            .writes_in_flight
            .fetch_sub(1, Ordering::SeqCst);
    }
}

fn map_record(run: &MapRun, epoch: crate::units::Epoch) -> Record {
    Record::Map {
        block: run.block,
        count: u32::try_from(run.count).unwrap_or(u32::MAX),
        location: run.location,
        epoch,
        history: run.history,
    }
}

impl Shared {
    fn plan_write(self: &Arc<Self>, range: ByteRange, kind: WriteKind) -> Result<WritePlan> {
        self.check_range(range)?;
        self.check_writable()?;
        let mut plan = WritePlan::begin(self, kind, Extents::base(range))?;
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
        let (one, many);
        let states = if first == last {
            one = [core.state.index.state(first, floor)?];
            &one[..]
        } else {
            many = core.state.index.states(first, last, floor)?;
            &many[..]
        };
        let outline = outline(kind, range, self.size_bytes, states, method);
        let runs = match core.space.allocate(outline.log_blocks) {
            Some(runs) => runs,
            None => {
                core.reclaim |= core.discarded_blocks > 0;
                drop(core);
                return Err(StoreError::NoSpace);
            }
        };
        let (extents, mut work) = outline.place(range, self.size_bytes, &runs);
        for run in &runs {
            core.reserved.insert(run.start.0, run.count);
            work.bare_segments.extend(core.space.bare_segments(*run));
        }
        for (first, last) in &work.busy {
            core.busy.insert(*first, *last);
        }
        let settled: Vec<u64> = core.settling.range(first.0..=last.0).copied().collect();
        for block in settled {
            core.settling.remove(&block);
        }
        work.pressure = !work.busy.is_empty() && core.is_over_bounds(&self.options, 4);
        plan._pin = Some(core.pins.pin());
        drop(core);
        plan.extents = Extents::Many(extents);
        if !work.busy.is_empty() {
            plan.work = Some(Box::new(work));
        }
        Ok(plan)
    }

    fn complete_write(&self, mut plan: WritePlan) -> Result<()> {
        if plan.needs_prepare() {
            return Err(StoreError::NotPrepared);
        }
        plan.mark_dirty();
        let Some(work) = plan.work.as_mut() else {
            return Ok(());
        };
        if work.maps.is_empty() {
            return Ok(());
        }
        self.check_writable()?;
        let mut core = self.core();
        let epoch = core.state.epoch;
        let records: Vec<Record> = work.maps.iter().map(|run| map_record(run, epoch)).collect();
        core.record(self, &records)?;
        for run in &work.maps {
            if run.location == Location::Zero && !run.history {
                core.discarded_blocks += run.count;
            }
        }
        for run in std::mem::take(&mut work.reserved) {
            core.reserved.remove(&run.start.0);
        }
        Ok(())
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
    /// On an error drop the plans: none of them may go on.
    pub fn prepare_writes(&self, plans: &mut [WritePlan]) -> Result<()> {
        self.shared.prepare_writes(plans)
    }

    /// Makes a write whose data landed part of the volume. Acknowledge it after `Ok`.
    pub fn complete_write(&self, plan: WritePlan) -> Result<()> {
        self.shared.complete_write(plan)
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
            let [plan] = plans;
            let data = data.map(|data| &data[in_memory(done)..in_memory(done + part)]);
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
