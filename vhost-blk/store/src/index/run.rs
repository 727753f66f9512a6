//! A run: the sorted, immutable part of the index, in pages of one index file.
//!
//! `index` reads it, `merge` writes the next one. Fence keys lead to the page; there are never more
//! than a fixed number of them, the last steps go over the pages themselves.
//! Invariant: keys are strictly ascending across the whole run (I1).
#![deny(clippy::indexing_slicing)]

use std::ops::RangeInclusive;

use super::page_cache::Page;
use super::{Key, Location, PageCache};
use crate::error::{FileName, Result, StoreError};
use crate::io::BlockFile;
use crate::layout::{self, ENTRIES_PER_PAGE, ENTRY_BYTES, PAGE_BYTES, Seal, page, put};
use crate::units::{Block, Generation, VolumeId, in_memory};

/// Most fence keys in memory: 1 MiB.
const MAX_FENCES: usize = 1 << 16;

/// Bytes of a page as read, before any check.
pub(crate) struct UnverifiedPage<'a>(pub(crate) &'a [u8; PAGE_BYTES]);

impl UnverifiedPage<'_> {
    /// The records, if checksum, number, count, order and every location hold.
    pub(crate) fn verify(
        &self,
        volume: VolumeId,
        generation: Generation,
        number: u64,
    ) -> Option<Vec<(Key, Location)>> {
        let bytes = self.0.as_slice();
        let (head, body) = bytes.split_at_checked(page::ENTRY_COUNT)?;
        let crc = Seal::Page(generation, number).crc(volume, body);
        let count = in_memory(u64::from(layout::u32_at(bytes, page::ENTRY_COUNT)));
        if !layout::checksum_holds(layout::u32_at(head, page::CRC), crc)
            || layout::u64_at(bytes, page::PAGE_NUMBER) != number
            || count == 0
            || count > ENTRIES_PER_PAGE
        {
            return None;
        }
        let mut records: Vec<(Key, Location)> = Vec::with_capacity(count);
        for entry in bytes
            .get(layout::PAGE_HEADER_BYTES..)?
            .chunks_exact(ENTRY_BYTES)
            .take(count)
        {
            let key = Key {
                block: Block(layout::u64_at(entry, page::ENTRY_BLOCK)),
                death: layout::u32_at(entry, page::ENTRY_DEATH),
            };
            let location = Location::decode(layout::u64_at(entry, page::ENTRY_LOCATION))?;
            if records.last().is_some_and(|(last, _)| *last >= key) {
                return None;
            }
            records.push((key, location));
        }
        Some(records)
    }
}

/// The bytes of page `number`.
pub(crate) fn encode_page(
    volume: VolumeId,
    generation: Generation,
    number: u64,
    records: &[(Key, Location)],
) -> [u8; PAGE_BYTES] {
    let mut bytes = [0; PAGE_BYTES];
    let count = u32::try_from(records.len()).unwrap_or(u32::MAX);
    put(&mut bytes, page::ENTRY_COUNT, &count.to_le_bytes());
    put(&mut bytes, page::PAGE_NUMBER, &number.to_le_bytes());
    for (place, (key, location)) in records.iter().enumerate() {
        let at = layout::PAGE_HEADER_BYTES + place * ENTRY_BYTES;
        put(
            &mut bytes,
            at + page::ENTRY_BLOCK,
            &key.block.0.to_le_bytes(),
        );
        put(&mut bytes, at + page::ENTRY_DEATH, &key.death.to_le_bytes());
        put(
            &mut bytes,
            at + page::ENTRY_LOCATION,
            &location.encode().to_le_bytes(),
        );
    }
    let body = bytes.get(page::ENTRY_COUNT..).unwrap_or_default();
    let crc = Seal::Page(generation, number).crc(volume, body);
    put(&mut bytes, page::CRC, &crc.to_le_bytes());
    bytes
}

/// First keys of every `stride`-th page.
#[derive(Debug)]
pub(crate) struct Fences {
    most: usize,
    keys: Vec<Key>,
    stride: u64,
    pages: u64,
}

impl Default for Fences {
    fn default() -> Self {
        Fences::new(MAX_FENCES)
    }
}

impl Fences {
    /// No fences yet, and never as many as `most`.
    fn new(most: usize) -> Fences {
        Fences {
            most,
            keys: Vec::new(),
            stride: 1,
            pages: 0,
        }
    }

    /// Notes the first key of the next page.
    pub(crate) fn push(&mut self, first: Key) {
        if self.pages.is_multiple_of(self.stride) {
            self.keys.push(first);
        }
        self.pages += 1;
        if self.keys.len() >= self.most {
            let mut place = 0;
            self.keys.retain(|_| {
                place += 1;
                place % 2 == 1
            });
            self.stride *= 2;
        }
    }

    /// Pages among which the last one that begins at or before `key` is: first and one behind the last.
    fn span(&self, key: Key) -> (u64, u64) {
        let after = self.keys.partition_point(|fence| *fence <= key) as u64;
        let first = after.saturating_sub(1) * self.stride;
        (first, (after * self.stride).min(self.pages))
    }
}

/// A run on disk.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) volume_id: VolumeId,
    /// Which index file holds it.
    pub(crate) slot: usize,
    pub(crate) generation: Generation,
    pub(crate) pages: u64,
    pub(crate) records: u64,
    pub(crate) fences: Fences,
}

impl Run {
    /// Reads and checks page `number`, past the cache.
    pub(crate) fn read_page(
        &self,
        file: &dyn BlockFile,
        number: u64,
    ) -> Result<Vec<(Key, Location)>> {
        let offset_bytes = number * PAGE_BYTES as u64;
        let mut bytes = [0; PAGE_BYTES];
        file.read_at(&mut bytes, offset_bytes)
            .map_err(|source| StoreError::Io {
                op: "read",
                file: FileName::Index,
                offset_bytes,
                source,
            })?;
        UnverifiedPage(&bytes)
            .verify(self.volume_id, self.generation, number)
            .ok_or(StoreError::Corrupted {
                file: FileName::Index,
                offset_bytes,
                what: "page does not verify",
            })
    }

    fn page(&self, file: &dyn BlockFile, cache: &mut PageCache, number: u64) -> Result<Page> {
        if let Some(page) = cache.get(number) {
            return Ok(page);
        }
        let page: Page = self.read_page(file, number)?.into();
        cache.insert(number, Page::clone(&page));
        Ok(page)
    }

    /// Calls `found` with every record in `range`, in order, until it answers `false`.
    pub(crate) fn visit(
        &self,
        file: &dyn BlockFile,
        cache: &mut PageCache,
        range: &RangeInclusive<Key>,
        found: &mut dyn FnMut(Key, Location) -> bool,
    ) -> Result<()> {
        if self.pages == 0 {
            return Ok(());
        }
        let (mut first, mut behind) = self.fences.span(*range.start());
        while behind - first > 1 {
            let middle = first + (behind - first) / 2;
            let page = self.page(file, cache, middle)?;
            if page.first().is_some_and(|(key, _)| key <= range.start()) {
                first = middle;
            } else {
                behind = middle;
            }
        }
        for number in first..self.pages {
            let page = self.page(file, cache, number)?;
            let start = page.partition_point(|(key, _)| key < range.start());
            for (key, location) in page.iter().skip(start) {
                if key > range.end() || !found(*key, *location) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
