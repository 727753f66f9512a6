//! The memtable: records of the index that are in no run yet, in key order.
//!
//! `index` keeps one that grows and one that a checkpoint writes out. Keys and locations are stored in words of
//! 32 bits, because the map is the largest thing in memory: about 30 bytes a record instead of 45.

use std::collections::BTreeMap;
use std::ops::{Bound, RangeBounds};

use super::{Key, Location};
use crate::units::Block;

/// Block, high word first, then death: the order of keys.
type PackedKey = [u32; 3];

fn words(value: u64) -> [u32; 2] {
    let low = value & u64::from(u32::MAX);
    [
        u32::try_from(value >> 32).unwrap_or(u32::MAX),
        u32::try_from(low).unwrap_or(u32::MAX),
    ]
}

fn whole([high, low]: [u32; 2]) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

fn pack(key: Key) -> PackedKey {
    let [high, low] = words(key.block.0);
    [high, low, key.death]
}

fn unpack([high, low, death]: PackedKey) -> Key {
    Key {
        block: Block(whole([high, low])),
        death,
    }
}

fn location(packed: [u32; 2]) -> Location {
    // Only what `Location::encode` answered was put in.
    Location::decode(whole(packed)).unwrap_or(Location::Base)
}

/// The key as one number, of the same order: quicker to compare.
fn number([high, low, death]: PackedKey) -> u128 {
    u128::from(high) << 64 | u128::from(low) << 32 | u128::from(death)
}

/// Records in key order.
#[derive(Debug, Default)]
pub(crate) struct Memtable {
    records: BTreeMap<PackedKey, [u32; 2]>,
}

impl Memtable {
    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Sets records in this order: of one key the last one stays.
    pub(crate) fn insert_all(&mut self, records: Vec<(Key, Location)>) {
        if self.records.is_empty() {
            // Replay: a map that is built in order takes a fraction of the time, and less memory.
            let pack = |(key, location): (Key, Location)| (pack(key), words(location.encode()));
            let mut packed: Vec<_> = records.into_iter().map(pack).collect();
            packed.sort_by_key(|(key, _)| number(*key));
            packed.dedup_by(|later, earlier| {
                let same = later.0 == earlier.0;
                if same {
                    earlier.1 = later.1;
                }
                same
            });
            self.records = packed.into_iter().collect();
            return;
        }
        for (key, location) in records {
            self.records.insert(pack(key), words(location.encode()));
        }
    }

    pub(crate) fn get(&self, key: Key) -> Option<Location> {
        self.records.get(&pack(key)).map(|packed| location(*packed))
    }

    /// The records in `range`, in order.
    pub(crate) fn range(
        &self,
        range: impl RangeBounds<Key>,
    ) -> impl DoubleEndedIterator<Item = (Key, Location)> {
        let bound = |bound: Bound<&Key>| bound.map(|key| pack(*key));
        let range = (bound(range.start_bound()), bound(range.end_bound()));
        self.records
            .range(range)
            .map(|(key, packed)| (unpack(*key), location(*packed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::LogBlock;

    fn record(block: u64, at: u64) -> (Key, Location) {
        (Key::live(Block(block)), Location::Log(LogBlock(at)))
    }

    #[test]
    fn the_last_record_of_a_key_stays_however_they_came() {
        let records = [(7, 1), (1 << 40, 2), (7, 3), (3, 4), (7, 5), (3, 6)];
        let records: Vec<_> = records.map(|(block, at)| record(block, at)).into();
        let mut at_once = Memtable::default();
        at_once.insert_all(records.clone());
        let mut one_by_one = Memtable::default();
        records
            .into_iter()
            .for_each(|record| one_by_one.insert_all(vec![record]));
        let expected = vec![record(3, 6), record(7, 5), record(1 << 40, 2)];
        let all = |table: &Memtable| -> Vec<_> {
            table
                .range(Key::live(Block(0))..=Key::live(Block(u64::MAX)))
                .collect()
        };
        assert_eq!(all(&at_once), expected);
        assert_eq!(all(&one_by_one), expected);
    }
}
