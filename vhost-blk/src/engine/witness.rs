//! The host's witness: counts requests that change watched parts of a volume, from a mark on.
//!
//! Called by the device when a request arrives from the ring and when it is complete, and by `control` and
//! `snapshot_set` (mark, read). Knows nothing of what the requests do afterwards.
//!
//! What counts, and why: a request counts when it *arrives*, not when it is done, because a write that a guest sends while it
//! says that it is frozen is evidence against the guest whether or not the barrier lets it through. A request that
//! arrived before the mark and lands after it counts as well: it changes the disk inside the window. So nothing that
//! could differ between the mark and the snapshot escapes, and a request is counted once by each mark.
//!
//! Cost without a mark: two atomic loads when a request arrives, one when it is complete.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use vhost_blk_wire::types::{ByteRange, WriteCount};

use super::request::Op;

/// Names a mark of one volume; never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MarkId(u64);

/// Which bytes a mark watches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Watched {
    /// Only these ranges.
    Only(Vec<ByteRange>),
    /// All but these ranges.
    AllBut(Vec<ByteRange>),
}

impl Watched {
    /// True if a byte of the range is watched.
    #[must_use]
    pub fn touches(&self, range: ByteRange) -> bool {
        let (first, end) = bounds(range);
        match self {
            Self::Only(ranges) => ranges.iter().any(|watched| {
                let (from, to) = bounds(*watched);
                from < to && first < to && from < end
            }),
            Self::AllBut(ranges) => {
                // Walks over the exempt ranges from the first byte on: what no exempt range covers is watched.
                let mut exempt: Vec<_> = ranges.iter().map(|range| bounds(*range)).collect();
                exempt.sort_unstable();
                let mut at = first;
                for (from, to) in exempt {
                    if from > at {
                        break;
                    }
                    at = at.max(to);
                }
                at < end
            }
        }
    }
}

fn bounds(range: ByteRange) -> (u64, u64) {
    (
        range.offset_bytes,
        range.offset_bytes.saturating_add(range.length_bytes),
    )
}

/// When a request arrived, in terms of marks.
#[derive(Clone, Copy, Debug)]
pub struct Arrival(u64);

#[derive(Debug)]
struct Mark {
    watched: Watched,
    count: WriteCount,
}

/// Counters of one volume.
#[derive(Debug, Default)]
pub struct Witness {
    /// Number of marks that exist. Raised *before* `newest`, so that who sees a new `newest` sees this as well.
    active: AtomicU64,
    /// Number of the newest mark.
    newest: AtomicU64,
    marks: Mutex<BTreeMap<MarkId, Mark>>,
}

impl Witness {
    /// A request has come from the guest.
    pub fn arrived(&self, op: Op, range: ByteRange) -> Arrival {
        let newest = self.newest.load(Ordering::SeqCst);
        if self.active.load(Ordering::SeqCst) == 0 || !op.changes_disk() {
            return Arrival(newest);
        }
        let mut marks = self.lock();
        for mark in marks.values_mut() {
            mark.note(op, range);
        }
        Arrival(self.newest.load(Ordering::SeqCst))
    }

    /// A request has changed the disk, whole or in part: marks that were made after its arrival count it now. The answer
    /// stands for its arrival from now on, so that one which goes on later is counted once by each mark.
    pub fn landed(&self, op: Op, range: ByteRange, arrival: Arrival) -> Arrival {
        if self.newest.load(Ordering::SeqCst) == arrival.0 || !op.changes_disk() {
            return arrival;
        }
        let mut marks = self.lock();
        for (id, mark) in marks.iter_mut() {
            if id.0 > arrival.0 {
                mark.note(op, range);
            }
        }
        Arrival(self.newest.load(Ordering::SeqCst))
    }

    /// Counts from now on.
    pub fn mark(&self, watched: Watched) -> MarkId {
        let mut marks = self.lock();
        self.active.fetch_add(1, Ordering::SeqCst);
        let id = MarkId(self.newest.fetch_add(1, Ordering::SeqCst) + 1);
        marks.insert(
            id,
            Mark {
                watched,
                count: WriteCount::default(),
            },
        );
        id
    }

    /// What was counted so far; `None` if there is no such mark.
    #[must_use]
    pub fn read(&self, id: MarkId) -> Option<WriteCount> {
        self.lock().get(&id).map(|mark| mark.count.clone())
    }

    /// Removes a mark; false if there is no such mark.
    pub fn unmark(&self, id: MarkId) -> bool {
        let removed = self.lock().remove(&id).is_some();
        if removed {
            self.active.fetch_sub(1, Ordering::SeqCst);
        }
        removed
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<MarkId, Mark>> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mark {
    fn note(&mut self, op: Op, range: ByteRange) {
        if !self.watched.touches(range) {
            return;
        }
        match op {
            Op::Write => self.count.writes += 1,
            Op::Discard => self.count.discards += 1,
            Op::WriteZeroes { .. } => self.count.write_zeroes += 1,
            Op::Read | Op::Flush => return,
        }
        if self.count.first.is_none() {
            self.count.first = Some(range);
        }
    }
}

#[cfg(test)]
mod tests;
