//! An index page: records in key order, packed, and searched where they are.
//!
//! `run` reads pages through the cache, `run_writer` builds them, for records and for fences alike. A record is stored
//! as its differences from the one before; every sixteenth begins anew, so that a look-up unpacks a few at most.
//! Bytes from a disk become a page only through `UnverifiedPage`; that the records in it are whole and ascend is
//! checked as they are unpacked.
#![deny(clippy::indexing_slicing)]

use super::{Key, Location};
use crate::layout::{self, GROUP_RECORDS, LIVE, MAX_LOG_BLOCKS, PAGE_BYTES, Seal, page, put};
use crate::units::{Block, LogBlock, VolumeId};

/// Where the records begin.
const BODY: usize = layout::PAGE_HEADER_BYTES;
/// Low bits of a record's first number: what kind of location follows, and whether the version is live.
const KIND_BASE: u64 = 0;
const KIND_ZERO: u64 = 1;
const KIND_LOG: u64 = 2;
const KIND_MASK: u64 = 3;
const LIVE_BIT: u64 = 4;
const BLOCK_SHIFT: u32 = 3;

/// Seven bits a byte, the low ones first; the high bit says that there is more.
fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(layout::low_byte(value) | 0x80);
        value >>= 7;
    }
    bytes.push(layout::low_byte(value));
}

/// Bytes that [`put_varint`] takes.
pub(crate) fn varint_bytes(value: u64) -> u64 {
    u64::from((64 - (value | 1).leading_zeros()).div_ceil(7))
}

fn zigzag(difference: i64) -> u64 {
    (difference << 1 ^ difference >> 63).cast_unsigned()
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
}

/// What the next record is stored relative to.
#[derive(Clone, Copy, Debug, Default)]
struct Context {
    block: u64,
    death: u32,
    log: u64,
}

impl Context {
    fn pack(&mut self, key: Key, location: Location, bytes: &mut Vec<u8>) {
        let kind = match location {
            Location::Base => KIND_BASE,
            Location::Zero => KIND_ZERO,
            Location::Log(_) => KIND_LOG,
        };
        let live = if key.death == LIVE { LIVE_BIT } else { 0 };
        let step = key.block.0.wrapping_sub(self.block);
        put_varint(bytes, step << BLOCK_SHIFT | live | kind);
        self.block = key.block.0;
        if key.death != LIVE {
            let difference = i64::from(key.death) - i64::from(self.death);
            put_varint(bytes, zigzag(difference));
            self.death = key.death;
        }
        if let Location::Log(at) = location {
            let difference = at.0.wrapping_sub(self.log).cast_signed();
            put_varint(bytes, zigzag(difference));
            self.log = at.0;
        }
    }
}

/// Collects records for one page.
#[derive(Debug, Default)]
pub(crate) struct PageBuilder {
    body: Vec<u8>,
    groups: Vec<u16>,
    records: u16,
    context: Context,
    /// The packed form of one record, before it is known whether it fits.
    packed: Vec<u8>,
}

impl PageBuilder {
    pub(crate) fn records(&self) -> u64 {
        u64::from(self.records)
    }

    /// Adds a record; `false` if the page is full.
    pub(crate) fn push(&mut self, key: Key, location: Location) -> bool {
        let begins = usize::from(self.records).is_multiple_of(GROUP_RECORDS);
        let mut context = if begins {
            Context::default()
        } else {
            self.context
        };
        self.packed.clear();
        context.pack(key, location, &mut self.packed);
        let table = (self.groups.len() + usize::from(begins)) * 2;
        if BODY + self.body.len() + self.packed.len() + table > PAGE_BYTES {
            return false;
        }
        if begins {
            let at = u16::try_from(BODY + self.body.len()).unwrap_or(u16::MAX);
            self.groups.push(at);
        }
        self.body.extend_from_slice(&self.packed);
        self.context = context;
        self.records += 1;
        true
    }

    /// The page's bytes; the next page begins empty.
    pub(crate) fn finish(&mut self, volume: VolumeId, seal: Seal) -> [u8; PAGE_BYTES] {
        let mut bytes = [0; PAGE_BYTES];
        put(&mut bytes, page::RECORDS, &self.records.to_le_bytes());
        let groups = u16::try_from(self.groups.len()).unwrap_or(u16::MAX);
        put(&mut bytes, page::GROUPS, &groups.to_le_bytes());
        let length = u16::try_from(self.body.len()).unwrap_or(u16::MAX);
        put(&mut bytes, page::BODY_BYTES, &length.to_le_bytes());
        put(&mut bytes, BODY, &self.body);
        for (place, at) in self.groups.iter().enumerate() {
            put(&mut bytes, PAGE_BYTES - 2 * (place + 1), &at.to_le_bytes());
        }
        let body = bytes.get(page::RECORDS..).unwrap_or_default();
        let crc = seal.crc(volume, body);
        put(&mut bytes, page::CRC, &crc.to_le_bytes());
        self.body.clear();
        self.groups.clear();
        self.records = 0;
        bytes
    }
}

/// Bytes of a page as read, before any check.
pub(crate) struct UnverifiedPage<'a>(pub(crate) &'a [u8; PAGE_BYTES]);

impl<'a> UnverifiedPage<'a> {
    /// The page, if its checksum and its counts hold.
    pub(crate) fn verify(&self, volume: VolumeId, seal: Seal) -> Option<Page<'a>> {
        let (head, body) = self.0.split_at_checked(page::RECORDS)?;
        let crc = seal.crc(volume, body);
        if !layout::checksum_holds(layout::u32_at(head, page::CRC), crc) {
            return None;
        }
        let page = Page(self.0);
        let (records, groups) = (page.records(), page.groups());
        let fits = BODY + page.body_bytes() + 2 * groups <= PAGE_BYTES;
        (records > 0 && groups == records.div_ceil(GROUP_RECORDS) && fits).then_some(page)
    }
}

/// A page whose checksum held when it was read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page<'a>(pub(crate) &'a [u8; PAGE_BYTES]);

fn u16_at(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_le_bytes(layout::take(bytes, at)))
}

impl<'a> Page<'a> {
    pub(crate) fn records(self) -> usize {
        u16_at(self.0, page::RECORDS)
    }

    fn groups(self) -> usize {
        u16_at(self.0, page::GROUPS)
    }

    fn body_bytes(self) -> usize {
        u16_at(self.0, page::BODY_BYTES)
    }

    /// The records from group `number` on.
    fn records_of_group(self, number: usize) -> Records<'a> {
        let at = PAGE_BYTES
            .checked_sub(2 * (number + 1))
            .map_or(PAGE_BYTES, |place| u16_at(self.0, place));
        let end = BODY + self.body_bytes();
        Records {
            bytes: self.0.get(..end).unwrap_or_default(),
            at: at.max(BODY),
            number: number * GROUP_RECORDS,
            end: self.records(),
            context: Context::default(),
            broken: false,
        }
    }

    pub(crate) fn all(self) -> Records<'a> {
        self.records_of_group(0)
    }

    /// Group that holds the last record at or before `key`, if any does: the first one otherwise.
    fn group_of(self, key: Key) -> usize {
        let (mut first, mut behind) = (0, self.groups());
        while behind - first > 1 {
            let middle = first + (behind - first) / 2;
            let starts = self.records_of_group(middle).next();
            if starts.is_some_and(|(start, _)| start <= key) {
                first = middle;
            } else {
                behind = middle;
            }
        }
        first
    }

    /// The records from the group on that holds the last one at or before `key`: a few before it come, too.
    pub(crate) fn near(self, key: Key) -> Records<'a> {
        self.records_of_group(self.group_of(key))
    }

    /// The last two records at or before `key`, the later one first; `None` in place of those the page does not
    /// hold. `Err` if the page does not unpack.
    pub(crate) fn last_two(self, key: Key) -> Result<[Option<(Key, Location)>; 2], Broken> {
        let group = self.group_of(key);
        let mut found = [None; 2];
        let mut records = self.records_of_group(group);
        for (at, location) in records.by_ref().take_while(|(at, _)| *at <= key) {
            found = [Some((at, location)), found[0]];
        }
        if found[0].is_some() && found[1].is_none() && group > 0 {
            let mut before = self.records_of_group(group - 1);
            found[1] = before.by_ref().take(GROUP_RECORDS).last();
            before.check()?;
        }
        records.check()?;
        Ok(found)
    }
}

/// The page's bytes are not what a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Broken;

/// Unpacks the records of a page, in order.
#[derive(Debug)]
pub(crate) struct Records<'a> {
    bytes: &'a [u8],
    at: usize,
    number: usize,
    end: usize,
    context: Context,
    broken: bool,
}

impl Records<'_> {
    /// Whether everything so far could be unpacked.
    pub(crate) fn check(&self) -> Result<(), Broken> {
        if self.broken { Err(Broken) } else { Ok(()) }
    }

    fn varint(&mut self) -> Option<u64> {
        let first = *self.bytes.get(self.at)?;
        self.at += 1;
        if first < 0x80 {
            return Some(u64::from(first));
        }
        let mut value = u64::from(first & 0x7f);
        let mut shift = 7;
        loop {
            let byte = *self.bytes.get(self.at)?;
            self.at += 1;
            if shift > 63 {
                return None;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
            shift += 7;
        }
    }

    fn unpack(&mut self) -> Option<(Key, Location)> {
        if self.number.is_multiple_of(GROUP_RECORDS) {
            self.context = Context::default();
        }
        let head = self.varint()?;
        let block = self.context.block.checked_add(head >> BLOCK_SHIFT)?;
        self.context.block = block;
        let death = if head & LIVE_BIT != 0 {
            LIVE
        } else {
            let difference = unzigzag(self.varint()?);
            let death = i64::from(self.context.death).checked_add(difference)?;
            self.context.death = u32::try_from(death).ok().filter(|death| *death != LIVE)?;
            self.context.death
        };
        let location = match head & KIND_MASK {
            KIND_BASE => Location::Base,
            KIND_ZERO => Location::Zero,
            KIND_LOG => {
                let difference = unzigzag(self.varint()?).cast_unsigned();
                self.context.log = self.context.log.wrapping_add(difference);
                if self.context.log >= MAX_LOG_BLOCKS {
                    return None;
                }
                Location::Log(LogBlock(self.context.log))
            }
            _ => return None,
        };
        self.number += 1;
        let key = Key {
            block: Block(block),
            death,
        };
        Some((key, location))
    }
}

impl Iterator for Records<'_> {
    type Item = (Key, Location);

    fn next(&mut self) -> Option<(Key, Location)> {
        if self.broken || self.number >= self.end {
            return None;
        }
        let record = self.unpack();
        self.broken = record.is_none();
        record
    }
}

#[cfg(test)]
mod tests;
