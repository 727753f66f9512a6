//! Which pages of the index file are free.
//!
//! `checkpoint` and `reclaim` take pages for the runs and snapshot tables they write. It does no I/O.
//! Invariant I7: no page is given out that the current or the previous superblock slot names.

use crate::layout::{PAGE_BYTES, RECORD_BYTES};
use crate::superblock::Superblock;

/// Neighbouring pages of the index file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PageRange {
    pub(crate) first: u64,
    pub(crate) count: u64,
}

impl PageRange {
    fn end(self) -> u64 {
        self.first.saturating_add(self.count)
    }
}

/// Pages of the snapshot table of `records` records.
pub(crate) fn table_pages(records: u64) -> u64 {
    records
        .saturating_mul(RECORD_BYTES as u64)
        .div_ceil(PAGE_BYTES as u64)
}

/// The pages that are in use.
#[derive(Debug)]
pub(crate) struct IndexRoom {
    current: Vec<PageRange>,
    previous: Vec<PageRange>,
    building: Vec<PageRange>,
}

fn named(superblock: &Superblock) -> Vec<PageRange> {
    let runs = superblock.runs.iter().map(|run| PageRange {
        first: run.first_page,
        count: run.pages + run.fence_pages,
    });
    let table = PageRange {
        first: superblock.table_page,
        count: table_pages(superblock.table_records),
    };
    runs.chain([table])
        .filter(|range| range.count > 0)
        .collect()
}

impl IndexRoom {
    /// What both slots name; `previous` if it verifies.
    pub(crate) fn new(current: &Superblock, previous: Option<&Superblock>) -> IndexRoom {
        IndexRoom {
            current: named(current),
            previous: previous.map(named).unwrap_or_default(),
            building: Vec::new(),
        }
    }

    /// The first `count` free pages in a row.
    pub(crate) fn take(&mut self, count: u64) -> PageRange {
        let mut used: Vec<PageRange> = [&self.current, &self.previous, &self.building]
            .into_iter()
            .flatten()
            .copied()
            .collect();
        used.sort_unstable();
        let mut first = 0;
        for range in used {
            if range.first >= first && range.first - first >= count {
                break;
            }
            first = first.max(range.end());
        }
        let taken = PageRange { first, count };
        self.building.push(taken);
        taken
    }

    /// Ends what [`IndexRoom::take`] began: a slot names what is needed of it, or nothing is.
    pub(crate) fn give_back(&mut self, range: PageRange) {
        if let Some(place) = self.building.iter().position(|taken| *taken == range) {
            self.building.swap_remove(place);
        }
    }

    /// A new slot is durable in the place of the previous one: the pages that no slot names any more.
    pub(crate) fn slot_written(&mut self, superblock: &Superblock) -> Vec<PageRange> {
        let current = std::mem::replace(&mut self.current, named(superblock));
        let mut gone = std::mem::replace(&mut self.previous, current);
        gone.retain(|range| !self.current.contains(range) && !self.previous.contains(range));
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::superblock::RunPlace;
    use crate::units::Generation;

    fn superblock(runs: &[(u64, u64)]) -> Superblock {
        let runs = runs.iter().map(|(first_page, pages)| RunPlace {
            generation: Generation(1),
            first_page: *first_page,
            pages: pages - 1,
            fence_pages: 1,
            records: 1,
        });
        Superblock {
            runs: runs.collect(),
            ..Superblock::empty(crate::VolumeId(uuid::Uuid::nil()), 4096, 1 << 20)
        }
    }

    #[test]
    fn pages_of_both_slots_and_of_what_is_built_are_never_given() {
        let current = superblock(&[(10, 5)]);
        let mut room = IndexRoom::new(&current, Some(&superblock(&[(2, 3)])));
        let taken: Vec<u64> = [2, 5, 6, 1].map(|count| room.take(count).first).into();
        assert_eq!(taken, [0, 5, 15, 21]);
        room.give_back(PageRange { first: 5, count: 5 });
        assert_eq!(room.take(4).first, 5);
        let next = superblock(&[(15, 3), (10, 5)]);
        assert_eq!(room.slot_written(&next), [PageRange { first: 2, count: 3 }]);
        assert_eq!(room.take(3).first, 2);
        assert_eq!(room.slot_written(&superblock(&[(15, 3)])), []);
        let gone = room.slot_written(&superblock(&[(15, 3)]));
        assert_eq!(
            gone,
            [PageRange {
                first: 10,
                count: 5
            }]
        );
    }
}
