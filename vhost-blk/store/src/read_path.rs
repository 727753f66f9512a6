//! The way of a read: look up, pin, and for the blocking driver move the bytes.
//!
//! The daemon calls it through `Volume`.
//! Invariant: a read of a snapshot counts only if its extents still hold when the bytes have arrived:
//! a copy-on-write may have overwritten a block it was reading. The head has no such rule, its reads
//! race with writes as on any disk.

use std::sync::atomic::Ordering;

use crate::error::{FileName, Result, StoreError};
use crate::index::Location;
use crate::plan::{
    Extent, Extents, MAX_REQUEST_BYTES, ReadPlan, Source, View, extent_at, push_extent,
};
use crate::units::{BLOCK_BYTES, ByteRange, SECTOR_BYTES, in_memory};
use crate::volume::{Shared, Volume};

impl Shared {
    /// Whether a request fits a view of `size_bytes`.
    pub(crate) fn check_range(range: ByteRange, size_bytes: u64) -> Result<()> {
        let fits = range
            .offset_bytes
            .checked_add(range.length_bytes)
            .is_some_and(|end| end <= size_bytes);
        if !fits
            || range.length_bytes == 0
            || !range.offset_bytes.is_multiple_of(SECTOR_BYTES)
            || !range.length_bytes.is_multiple_of(SECTOR_BYTES)
        {
            return Err(StoreError::OutOfRange {
                offset_bytes: range.offset_bytes,
                length_bytes: range.length_bytes,
            });
        }
        if range.length_bytes > MAX_REQUEST_BYTES {
            return Err(StoreError::Limit("a request is at most 64 MiB"));
        }
        Ok(())
    }

    fn read_extents(&self, view: View, range: ByteRange) -> Result<ReadPlan> {
        if view == View::Head {
            Self::check_range(range, self.size_bytes())?;
        }
        if view == View::Head && self.gate.plain.load(Ordering::SeqCst) {
            return Ok(ReadPlan {
                view,
                range,
                extents: Extents::base(range),
                _pin: None,
            });
        }
        let mut core = self.core();
        let core = &mut *core;
        let (first, last) = (range.first_block(), range.last_block());
        let epoch = match view {
            View::Head => None,
            View::Snapshot(id) => {
                let snapshot = core.state.table.get(id);
                let snapshot = snapshot.ok_or(StoreError::NoSuchSnapshot(id))?;
                Self::check_range(range, snapshot.size_bytes)?;
                Some(snapshot.epoch)
            }
        };
        let index = &mut core.state.index;
        let extents = if first == last {
            let location = match epoch {
                None => index.live(first),
                Some(epoch) => index.seen(first, epoch),
            };
            let location = self.heed(location)?;
            let skip_bytes = range.offset_bytes - first.offset_bytes();
            Extents::One(extent_at(first, location, skip_bytes, range.length_bytes))
        } else {
            let locations: Vec<Location> = match epoch {
                None => {
                    let states = self.heed(index.states(first, last, None))?;
                    states.into_iter().map(|state| state.live).collect()
                }
                Some(epoch) => self.heed(index.view(first, last, epoch))?,
            };
            let mut extents = Vec::with_capacity(1);
            let mut block = first;
            for location in locations {
                let from = range.offset_bytes.saturating_sub(block.offset_bytes());
                let to = (range.end_bytes() - block.offset_bytes()).min(BLOCK_BYTES);
                push_extent(&mut extents, block, location, from, to - from);
                block = block.plus(1);
            }
            Extents::Many(extents)
        };
        let pin = Some(core.pins.pin());
        Ok(ReadPlan {
            view,
            range,
            extents,
            _pin: pin,
        })
    }

    pub(crate) fn read_extent(&self, extent: &Extent, buffer: &mut [u8]) -> Result<()> {
        let (file, name) = match extent.source {
            Source::Base => (&self.files.base, FileName::Base),
            Source::Log => (&self.files.log, FileName::Log),
            Source::Zero => {
                buffer.fill(0);
                return Ok(());
            }
        };
        file.read_at(buffer, extent.offset_bytes)
            .map_err(|source| StoreError::Io {
                op: "read",
                file: name,
                offset_bytes: extent.offset_bytes,
                source,
            })
    }
}

impl Volume {
    /// Where the bytes of `range` are. Keep the plan until they have been read; after reading a
    /// snapshot ask [`Volume::read_is_current`].
    pub fn plan_read(&self, view: View, range: ByteRange) -> Result<ReadPlan> {
        self.shared.read_extents(view, range)
    }

    /// Whether what was read by `plan` is the snapshot's. If not, plan and read again. Always true for
    /// the head.
    pub fn read_is_current(&self, plan: &ReadPlan) -> Result<bool> {
        match plan.view {
            View::Head => Ok(true),
            View::Snapshot(_) => {
                let now = self.shared.read_extents(plan.view, plan.range)?;
                Ok(now.extents() == plan.extents())
            }
        }
    }

    /// Reads `buffer.len()` bytes. Blocking.
    pub fn read_at(&self, view: View, offset_bytes: u64, buffer: &mut [u8]) -> Result<()> {
        let mut at = offset_bytes;
        for part in buffer.chunks_mut(in_memory(MAX_REQUEST_BYTES)) {
            let range = ByteRange::new(at, part.len() as u64);
            loop {
                let plan = self.plan_read(view, range)?;
                let mut rest = &mut *part;
                for extent in plan.extents() {
                    let (now, later) = rest.split_at_mut(in_memory(extent.length_bytes));
                    self.shared.read_extent(extent, now)?;
                    rest = later;
                }
                if self.read_is_current(&plan)? {
                    break;
                }
            }
            at += part.len() as u64;
        }
        Ok(())
    }
}
