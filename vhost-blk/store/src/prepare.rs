//! What has to be done before a write's data may move: space, old edges, preserved copies.
//!
//! `write_path` calls it for a batch of plans; one round of syncs serves all of them.
//! Invariant I3: when it returns, the old data of every block that will be overwritten in place is durable
//! in the log, and so is the record that says so.

use std::sync::atomic::Ordering;

use crate::error::{FileName, Result, StoreError};
use crate::index::Location;
use crate::io::AlignedBuffer;
use crate::journal::Record;
use crate::plan::{Work, WritePlan, push_extent};
use crate::units::{BLOCK_BYTES, LogBlock, in_memory};
use crate::volume::Shared;

impl Shared {
    /// Room, copies, PRESERVE: all that the plans need. After an error their blocks are free already.
    pub(crate) fn prepare_writes(&self, plans: &mut [WritePlan]) -> Result<()> {
        let result = self
            .make_room(plans)
            .and_then(|()| self.copy_old(plans))
            .and_then(|()| self.preserve_copied(plans));
        if result.is_err() {
            plans.iter_mut().for_each(WritePlan::abandon);
        }
        result
    }

    /// Appends PRESERVE for plans whose copies have landed, and makes them durable in one round.
    pub(crate) fn preserve(&self, plans: &mut [WritePlan]) -> Result<()> {
        let result = self.preserve_copied(plans);
        if result.is_err() {
            plans.iter_mut().for_each(WritePlan::abandon);
        }
        result
    }

    fn make_room(&self, plans: &mut [WritePlan]) -> Result<()> {
        self.check_writable()?;
        for work in plans.iter_mut().filter_map(|plan| plan.work.as_mut()) {
            for segment in std::mem::take(&mut work.bare_segments) {
                self.back_segment(segment)?;
            }
            if std::mem::take(&mut work.pressure) {
                self.relieve()?;
            }
            if std::mem::take(&mut work.confirm_first) {
                self.confirm_records()?;
            }
        }
        Ok(())
    }

    fn copy_old(&self, plans: &mut [WritePlan]) -> Result<()> {
        for plan in plans.iter_mut() {
            let longest = plan
                .copies()
                .iter()
                .map(|copy| copy.from.length_bytes)
                .max();
            let Some(longest) = longest else { continue };
            let mut buffer = AlignedBuffer::new(in_memory(longest));
            for place in 0..plan.copies().len() {
                let copy = plan.copies()[place];
                let bytes = &mut buffer[..in_memory(copy.from.length_bytes)];
                self.read_extent(&copy.from, bytes)?;
                self.write_log(bytes, copy.to_offset_bytes)?;
                if copy.wants_seal {
                    plan.seal_copy(place, crc32c::crc32c(bytes));
                }
            }
            plan.copies_landed();
        }
        Ok(())
    }

    fn preserve_copied(&self, plans: &mut [WritePlan]) -> Result<()> {
        self.check_writable()?;
        let ready = |plan: &WritePlan| !plan.needs_room() && plan.copies().is_empty();
        if !plans.iter().all(ready) {
            return Err(StoreError::NotPrepared);
        }
        if plans.iter().any(WritePlan::needs_preserve) {
            let mut core = self.core();
            let epoch = core.state.epoch;
            let records: Vec<Record> = plans
                .iter()
                .filter(|plan| plan.needs_preserve())
                .filter_map(|plan| plan.work.as_ref())
                .flat_map(|work| &work.preserves)
                .map(|run| Record::Preserve {
                    block: run.block,
                    count: u32::try_from(run.count).unwrap_or(u32::MAX),
                    copy: run.copy,
                    epoch,
                    crc: run.crc,
                })
                .collect();
            self.gate.log_dirty.store(true, Ordering::SeqCst);
            core.record(self, &records)?;
            for plan in plans.iter_mut() {
                if let Some(work) = plan.work.as_mut().filter(|work| !work.prepared) {
                    work.forget_preserved(&mut core);
                }
            }
            drop(core);
            // Nothing is overwritten before the copies and their records are durable (I3).
            if !self.options.relaxed_order {
                self.commit_records()?;
            }
            // From here on their blocks are overwritten by whoever wants to, as touched ones always are.
            let mut core = self.core();
            for work in plans.iter_mut().filter_map(|plan| plan.work.as_mut()) {
                for (first, _) in std::mem::take(&mut work.preserving) {
                    core.busy.remove(&first);
                }
            }
        }
        for work in plans.iter_mut().filter_map(|plan| plan.work.as_mut()) {
            work.prepared = true;
        }
        Ok(())
    }

    /// Sets space aside for a segment of the log.
    pub(crate) fn back_segment(&self, number: u64) -> Result<()> {
        if self.is_reserve_lent() {
            return Err(StoreError::NoSpace);
        }
        let (offset_bytes, length_bytes) = self.core().space.segment_bytes(number);
        match self.files.log.allocate(offset_bytes, length_bytes) {
            Ok(()) => {
                self.core().space.set_backed(number);
                Ok(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => {
                Err(StoreError::NoSpace)
            }
            Err(source) => Err(StoreError::Io {
                op: "allocate",
                file: FileName::Log,
                offset_bytes,
                source,
            }),
        }
    }

    fn write_log(&self, bytes: &[u8], offset_bytes: u64) -> Result<()> {
        self.files
            .log
            .write_at(bytes, offset_bytes)
            .map_err(|source| StoreError::Io {
                op: "write",
                file: FileName::Log,
                offset_bytes,
                source,
            })
    }

    /// Reads whole blocks that are neighbours in one place; what lies behind the volume's end is zero.
    pub(crate) fn read_old(
        &self,
        block: crate::units::Block,
        old: Location,
        count: u64,
        buffer: &mut [u8],
    ) -> Result<()> {
        let length_bytes =
            (count * BLOCK_BYTES).min(self.size_bytes().saturating_sub(block.offset_bytes()));
        let (data, tail) = buffer.split_at_mut(in_memory(length_bytes));
        tail.fill(0);
        let mut extents = Vec::with_capacity(1);
        push_extent(&mut extents, block, old, 0, length_bytes);
        for extent in &extents {
            self.read_extent(extent, data)?;
        }
        Ok(())
    }
}

impl Work {
    /// After their records were appended the copies belong to the index.
    fn forget_preserved(&mut self, core: &mut crate::volume::Core) {
        let mut copies: Vec<LogBlock> = self
            .preserves
            .drain(..)
            .flat_map(|run| (0..run.count).map(move |place| run.copy.plus(place)))
            .collect();
        copies.sort();
        let mut rest = Vec::new();
        for run in self.reserved.drain(..) {
            core.reserved.remove(&run.start.0);
            for place in 0..run.count {
                let block = run.start.plus(place);
                if copies.binary_search(&block).is_err() {
                    rest.push(crate::space::LogRun {
                        start: block,
                        count: 1,
                    });
                    core.reserved.insert(block.0, 1);
                }
            }
        }
        self.reserved = rest;
    }
}
