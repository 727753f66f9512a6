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
use crate::plan::{Edge, PreserveRun, Work, WritePlan, push_extent};
use crate::units::{BLOCK_BYTES, LogBlock, in_memory};
use crate::volume::Shared;

/// Blocks copied at a time when old data is preserved.
const COPY_BLOCKS: u64 = 64;

impl Shared {
    pub(crate) fn prepare_writes(&self, plans: &mut [WritePlan]) -> Result<()> {
        self.check_writable()?;
        let mut preserves = Vec::new();
        for plan in plans.iter_mut() {
            let Some(work) = plan.work.as_mut().filter(|work| work.needs_prepare()) else {
                continue;
            };
            for segment in std::mem::take(&mut work.bare_segments) {
                self.back_segment(segment)?;
            }
            for edge in &work.edges {
                self.fill_edge(edge)?;
            }
            for run in &work.preserves {
                self.copy_old(run)?;
            }
            if std::mem::take(&mut work.pressure) {
                self.relieve()?;
            }
            preserves.extend(work.preserves.iter().copied());
        }
        if !preserves.is_empty() {
            let mut core = self.core();
            let epoch = core.state.epoch;
            let records: Vec<Record> = preserves
                .iter()
                .map(|run| Record::Preserve {
                    block: run.block,
                    count: u32::try_from(run.count).unwrap_or(u32::MAX),
                    copy: run.copy,
                    epoch,
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
            self.commit_records()?;
        }
        for plan in plans {
            if let Some(work) = plan.work.as_mut() {
                work.prepared = true;
            }
        }
        Ok(())
    }

    /// Sets space aside for a segment of the log.
    pub(crate) fn back_segment(&self, number: u64) -> Result<()> {
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
            (count * BLOCK_BYTES).min(self.size_bytes.saturating_sub(block.offset_bytes()));
        let (data, tail) = buffer.split_at_mut(in_memory(length_bytes));
        tail.fill(0);
        let mut extents = Vec::with_capacity(1);
        push_extent(&mut extents, block, old, 0, length_bytes);
        for extent in &extents {
            self.read_extent(extent, data)?;
        }
        Ok(())
    }

    /// Brings the bytes beside a partial first write along.
    fn fill_edge(&self, edge: &Edge) -> Result<()> {
        let mut buffer = AlignedBuffer::new(in_memory(BLOCK_BYTES));
        self.read_old(edge.block, edge.old, 1, &mut buffer)?;
        let (from, to) = (in_memory(edge.from), in_memory(edge.to));
        let start = edge.new.offset_bytes();
        if from > 0 {
            self.write_log(&buffer[..from], start)?;
        }
        if to < buffer.len() {
            self.write_log(&buffer[to..], start + edge.to)?;
        }
        Ok(())
    }

    fn copy_old(&self, run: &PreserveRun) -> Result<()> {
        let mut buffer = AlignedBuffer::new(in_memory(COPY_BLOCKS.min(run.count) * BLOCK_BYTES));
        let mut done = 0;
        while done < run.count {
            let part = COPY_BLOCKS.min(run.count - done);
            let window = &mut buffer[..in_memory(part * BLOCK_BYTES)];
            self.read_old(run.block.plus(done), run.old.plus(done), part, window)?;
            self.write_log(window, run.copy.plus(done).offset_bytes())?;
            done += part;
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
