//! Which data in the log must not change yet: what sealed records name until they are confirmed, and what was
//! superseded meanwhile.
//!
//! `write_path` asks it before a write goes in place and tells it what it superseded; `commit` tells it
//! what a round confirmed. It knows no files and no index.
//! Invariants: the bytes that a sealed record names do not change before it is confirmed (I10); a superseded
//! block is free only when the record that superseded it is confirmed and older I/O is over (I6).

use std::collections::{BTreeMap, VecDeque};

use crate::pins::{PinGeneration, Pins};
use crate::space::LogRun;
use crate::units::{LogBlock, Sequence};

/// Sealed data of the open journal that no round has confirmed.
#[derive(Debug, Default)]
pub(crate) struct Unconfirmed {
    /// Runs that sealed MAPs name: first block to length.
    sealed: BTreeMap<u64, u64>,
    /// The same in the order of their records.
    order: VecDeque<(Sequence, u64)>,
    /// Runs nobody lives in any more, since this record.
    superseded: VecDeque<(Sequence, LogRun)>,
    /// Confirmed, and waiting for I/O that was planned before.
    waiting: VecDeque<(PinGeneration, Vec<LogRun>)>,
    /// A write found no room, and a confirmation would make some.
    pub(crate) wanted: bool,
}

impl Unconfirmed {
    /// Whether a round has something to confirm.
    pub(crate) fn is_empty(&self) -> bool {
        self.order.is_empty() && self.superseded.is_empty()
    }

    /// A sealed MAP was appended.
    pub(crate) fn note_sealed(&mut self, run: LogRun, record: Sequence) {
        self.sealed.insert(run.start.0, run.count);
        self.order.push_back((record, run.start.0));
    }

    /// Whether a sealed record that is not confirmed names `block`.
    pub(crate) fn names(&self, block: LogBlock) -> bool {
        self.sealed
            .range(..=block.0)
            .next_back()
            .is_some_and(|(start, count)| block.0 - start < *count)
    }

    /// `run` held live blocks until `record` moved them.
    pub(crate) fn supersede(&mut self, run: LogRun, record: Sequence) {
        self.superseded.push_back((record, run));
    }

    /// Everything up to `through` is confirmed.
    pub(crate) fn confirm(&mut self, through: Sequence, pins: &mut Pins) {
        while let Some((_, start)) = self.order.pop_front_if(|(record, _)| *record <= through) {
            self.sealed.remove(&start);
        }
        let mut runs = Vec::new();
        while let Some((_, run)) = self
            .superseded
            .pop_front_if(|(record, _)| *record <= through)
        {
            runs.push(run);
        }
        if !runs.is_empty() {
            // Plans made before the record that superseded them are pinned in this generation or before.
            self.waiting.push_back((pins.close(), runs));
        }
    }

    /// Runs that are free now.
    pub(crate) fn take_free(&mut self, pins: &mut Pins) -> Vec<LogRun> {
        let mut free = Vec::new();
        while let Some((_, mut runs)) = self
            .waiting
            .pop_front_if(|(generation, _)| pins.is_over(*generation))
        {
            free.append(&mut runs);
        }
        free
    }

    /// Runs that will be free, and that nothing else may free.
    pub(crate) fn superseded(&self) -> impl Iterator<Item = LogRun> + '_ {
        let waiting = self.waiting.iter().flat_map(|(_, runs)| runs);
        let pending = self.superseded.iter().map(|(_, run)| run);
        waiting.chain(pending).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, count: u64) -> LogRun {
        LogRun {
            start: LogBlock(start),
            count,
        }
    }

    #[test]
    fn blocks_are_in_doubt_until_their_record_is_confirmed() {
        let (mut unconfirmed, mut pins) = (Unconfirmed::default(), Pins::default());
        unconfirmed.note_sealed(run(10, 4), Sequence(5));
        unconfirmed.note_sealed(run(2, 1), Sequence(6));
        for (block, named) in [(1, false), (2, true), (3, false), (10, true), (13, true)] {
            assert_eq!(unconfirmed.names(LogBlock(block)), named, "block {block}");
        }
        assert!(!unconfirmed.names(LogBlock(14)));
        unconfirmed.confirm(Sequence(5), &mut pins);
        assert!(!unconfirmed.names(LogBlock(10)) && unconfirmed.names(LogBlock(2)));
        unconfirmed.confirm(Sequence(6), &mut pins);
        assert!(unconfirmed.is_empty());
    }

    #[test]
    fn superseded_block_is_free_after_confirmation_and_after_older_reads() {
        let (mut unconfirmed, mut pins) = (Unconfirmed::default(), Pins::default());
        let reader = pins.pin();
        unconfirmed.supersede(run(7, 1), Sequence(9));
        unconfirmed.confirm(Sequence(8), &mut pins);
        assert_eq!(unconfirmed.take_free(&mut pins), []);
        unconfirmed.confirm(Sequence(9), &mut pins);
        assert_eq!(unconfirmed.take_free(&mut pins), [], "a read is under way");
        assert_eq!(unconfirmed.superseded().collect::<Vec<_>>(), [run(7, 1)]);
        drop(reader);
        assert_eq!(unconfirmed.take_free(&mut pins), [run(7, 1)]);
        assert_eq!(unconfirmed.superseded().count(), 0);
    }
}
