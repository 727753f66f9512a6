//! Room ahead of the writes: segments of the log that are not only set aside but written, with zeroes.
//!
//! `maintain` drives it, and so does the preparation of a snapshot. On a file system that keeps track of unwritten extents the
//! first write into one makes the next fdatasync commit the file system's journal, at twice the cost; so that is
//! paid here, in the background, and never by a guest's flush. A write that outruns it takes a segment that is only set aside.
//! Invariants: nothing is allocated in a segment while it is being written; its zeroes are synced before anything is.

use std::sync::atomic::Ordering;

use crate::error::{FileName, Result, StoreError};
use crate::io::AlignedBuffer;
use crate::units::{BLOCK_BYTES, in_memory};
use crate::volume::Shared;

/// Longest single write of zeroes.
const PIECE_BYTES: u64 = 256 << 10;

/// A segment being made ready.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    segment: Option<Making>,
}

#[derive(Debug)]
struct Making {
    number: u64,
    /// Where the next zeroes go.
    next_bytes: u64,
    end_bytes: u64,
}

impl Shared {
    /// Makes about `budget_blocks` blocks ready; `false` when there is enough room ahead, or none to be had: that is no
    /// error yet, writes are held when they really find none.
    pub(crate) fn step_ahead(&self, ahead: &mut Ahead, budget_blocks: u64) -> Result<bool> {
        if self.core().state.table.is_empty() && ahead.segment.is_none() {
            return Ok(false);
        }
        self.step_ahead_of(ahead, self.options.segments_ahead, budget_blocks)
    }

    /// Makes one segment's worth ready, the first snapshot's included.
    pub(crate) fn make_room_ahead(&self, ahead: &mut Ahead) -> Result<()> {
        while self.step_ahead_of(ahead, 1, self.options.segment_bytes / BLOCK_BYTES)? {}
        Ok(())
    }

    fn step_ahead_of(&self, ahead: &mut Ahead, segments: u64, budget_blocks: u64) -> Result<bool> {
        if ahead.segment.is_none() {
            if self.is_reserve_lent() {
                return Ok(false);
            }
            let taken = {
                let mut core = self.core();
                let number = core.space.take_bare_segment(segments);
                number.map(|number| (number, core.space.segment_bytes(number)))
            };
            let Some((number, (offset_bytes, length_bytes))) = taken else {
                return Ok(false);
            };
            if let Err(error) = self.files.log.allocate(offset_bytes, length_bytes) {
                return self.give_up_segment(number, "allocate", offset_bytes, error);
            }
            ahead.segment = Some(Making {
                number,
                next_bytes: offset_bytes,
                end_bytes: offset_bytes + length_bytes,
            });
        }
        let Some(making) = ahead.segment.as_mut() else {
            return Ok(false);
        };
        let written = self.options.segments_ahead > 0;
        if written {
            let budget_bytes = budget_blocks.max(1) * BLOCK_BYTES;
            let stop = making.end_bytes.min(making.next_bytes + budget_bytes);
            let zeroes = AlignedBuffer::new(in_memory(PIECE_BYTES));
            while making.next_bytes < stop {
                let part = (stop - making.next_bytes).min(PIECE_BYTES);
                let piece = zeroes.get(..in_memory(part)).unwrap_or_default();
                if let Err(error) = self.files.log.write_at(piece, making.next_bytes) {
                    let (number, offset_bytes) = (making.number, making.next_bytes);
                    ahead.segment = None;
                    return self.give_up_segment(number, "write", offset_bytes, error);
                }
                making.next_bytes += part;
                self.counters.ahead_bytes.fetch_add(part, Ordering::Relaxed);
            }
            if making.next_bytes < making.end_bytes {
                return Ok(true);
            }
        }
        let number = making.number;
        ahead.segment = None;
        if written {
            // What the file system has to note of the segment is on disk before a guest's flush could have to wait for it.
            // By the other handle: each is told of a failed write once, and this one must not hear it for a flush.
            self.sync(&*self.files.journal, FileName::Log)?;
        }
        self.core().space.ready(number);
        Ok(true)
    }

    fn give_up_segment(
        &self,
        number: u64,
        op: &'static str,
        offset_bytes: u64,
        source: std::io::Error,
    ) -> Result<bool> {
        // A part of it may have its space: given back, since a full file system needs it elsewhere.
        let released = self.release_segment(number);
        self.core().space.released(number);
        if source.kind() == std::io::ErrorKind::StorageFull && released.is_ok() {
            return Ok(false);
        }
        Err(StoreError::Io {
            op,
            file: FileName::Log,
            offset_bytes,
            source,
        })
    }
}
