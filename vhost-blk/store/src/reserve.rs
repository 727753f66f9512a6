//! Space to give space back with: segments of the log that are set aside and never used, lent to the index when the file system is
//! full.
//!
//! `maintain` drives it. Giving back what a deleted snapshot held needs a checkpoint, which writes a new index before the old one is
//! free; on a full file system that would never succeed, and redirected writes would wait for ever. A log that is bounded to a few
//! segments keeps no reserve: there the bound leaves the file system its room.
//! Invariants: nothing is allocated in a segment of the reserve; while it is lent no write takes new space from the file system.

use std::sync::atomic::Ordering;

use crate::error::{FileName, Result, StoreError};
use crate::volume::Shared;

/// A log that cannot have this many segments keeps no reserve.
const SEGMENTS_MIN: u64 = 16;
/// Bytes of index for each record of it: packed ones take about five, and a segment more than that is kept.
const RECORD_BYTES: u64 = 6;

/// The reserve of a volume.
#[derive(Debug, Default)]
pub(crate) struct Reserve {
    segments: Vec<u64>,
}

impl Shared {
    pub(crate) fn is_reserve_lent(&self) -> bool {
        self.gate.reserve_lent.load(Ordering::SeqCst)
    }

    /// Takes or gives back segments until the reserve is as large as the index needs it: for a copy of all of it and a segment more.
    pub(crate) fn keep_reserve(&self, reserve: &mut Reserve) -> Result<()> {
        let wanted = {
            let core = self.core();
            let records = core.state.index.records();
            match core.state.table.is_empty() {
                true => 0,
                false => {
                    1 + records
                        .saturating_mul(RECORD_BYTES)
                        .div_ceil(self.options.segment_bytes)
                }
            }
        };
        if self.is_reserve_lent() {
            return self.take_back(reserve);
        }
        while reserve.segments.len() as u64 > wanted
            && let Some(number) = reserve.segments.pop()
        {
            let released = self.release_segment(number);
            self.core().space.released(number);
            released?;
        }
        while (reserve.segments.len() as u64) < wanted {
            let Some(number) = self.core().space.take_reserve(SEGMENTS_MIN) else {
                break;
            };
            if !self.set_aside(number)? {
                self.core().space.released(number);
                break;
            }
            reserve.segments.push(number);
        }
        Ok(())
    }

    /// Gives the reserve's space to the file system; `false` if there is none.
    pub(crate) fn lend_reserve(&self, reserve: &Reserve) -> Result<bool> {
        if reserve.segments.is_empty() || self.gate.reserve_lent.swap(true, Ordering::SeqCst) {
            return Ok(false);
        }
        for number in &reserve.segments {
            self.release_segment(*number)?;
        }
        Ok(true)
    }

    /// After what it was lent for: takes the space again, if there is that much.
    fn take_back(&self, reserve: &Reserve) -> Result<()> {
        for number in &reserve.segments {
            if !self.set_aside(*number)? {
                return Ok(());
            }
        }
        self.gate.reserve_lent.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// `false`: the file system is full.
    fn set_aside(&self, number: u64) -> Result<bool> {
        let (offset_bytes, length_bytes) = self.core().space.segment_bytes(number);
        match self.files.log.allocate(offset_bytes, length_bytes) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => {
                // It may have got a part.
                self.release_segment(number).map(|()| false)
            }
            Err(source) => Err(StoreError::Io {
                op: "allocate",
                file: FileName::Log,
                offset_bytes,
                source,
            }),
        }
    }

    /// Gives the space of a segment without used blocks back to the file system.
    pub(crate) fn release_segment(&self, number: u64) -> Result<()> {
        let (offset_bytes, length_bytes) = self.core().space.segment_bytes(number);
        self.files
            .log
            .release(offset_bytes, length_bytes)
            .map_err(|source| StoreError::Io {
                op: "release",
                file: FileName::Log,
                offset_bytes,
                source,
            })
    }
}
