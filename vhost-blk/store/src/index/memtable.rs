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

    /// A record of the same key is replaced.
    pub(crate) fn insert(&mut self, key: Key, location: Location) {
        self.records.insert(pack(key), words(location.encode()));
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
