//! A run: the sorted, immutable part of the index, in pages of one index file.
//!
//! `index` reads it, `merge` writes the next one. Fence keys lead to the page; there are never more
//! than a fixed number of them, the last steps go over the pages themselves.
//! Invariant: keys are strictly ascending across the whole run (I1).
#![deny(clippy::indexing_slicing)]

use std::ops::RangeInclusive;

use super::page_cache::Page;
use super::{EndOfHistory, Key, Location, PageCache, Walk};
use crate::error::{FileName, Result, StoreError};
use crate::io::BlockFile;
use crate::layout::{self, ENTRIES_PER_PAGE, ENTRY_BYTES, LIVE, PAGE_BYTES, Seal, page, put};
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

    /// The last page that begins at or before `key`; the first page if none does.
    fn page_of(&self, file: &dyn BlockFile, cache: &mut PageCache, key: Key) -> Result<u64> {
        let (mut first, mut behind) = self.fences.span(key);
        while behind - first > 1 {
            let middle = first + (behind - first) / 2;
            let page = self.page(file, cache, middle)?;
            if page.first().is_some_and(|(start, _)| *start <= key) {
                first = middle;
            } else {
                behind = middle;
            }
        }
        Ok(first)
    }

    /// The live version of `block`, and the last one before it.
    pub(crate) fn end_of(
        &self,
        file: &dyn BlockFile,
        cache: &mut PageCache,
        block: Block,
    ) -> Result<EndOfHistory> {
        let mut end = EndOfHistory::default();
        if self.pages == 0 {
            return Ok(end);
        }
        let mut number = self.page_of(file, cache, Key::live(block))?;
        loop {
            let page = self.page(file, cache, number)?;
            let behind = page.partition_point(|(key, _)| *key <= Key::live(block));
            for (key, location) in page.iter().take(behind).rev() {
                if key.block != block {
                    return Ok(end);
                }
                if key.death != LIVE {
                    end.last_death = Some(key.death);
                    return Ok(end);
                }
                end.live = Some(*location);
            }
            if number == 0 {
                return Ok(end);
            }
            number -= 1;
        }
    }

    /// The first record at or behind `key`.
    pub(crate) fn first_at_or_after(
        &self,
        file: &dyn BlockFile,
        cache: &mut PageCache,
        key: Key,
    ) -> Result<Option<(Key, Location)>> {
        let mut first = None;
        let range = key..=Key::live(Block(u64::MAX));
        self.visit(file, cache, &range, &mut |key, location| {
            first = Some((key, location));
            Walk::End
        })?;
        Ok(first)
    }

    /// Calls `found` with the records in `range`, in order, and goes where it says.
    pub(crate) fn visit(
        &self,
        file: &dyn BlockFile,
        cache: &mut PageCache,
        range: &RangeInclusive<Key>,
        found: &mut dyn FnMut(Key, Location) -> Walk,
    ) -> Result<()> {
        let mut from = *range.start();
        if self.pages == 0 {
            return Ok(());
        }
        let mut number = self.page_of(file, cache, from)?;
        while number < self.pages {
            let page = self.page(file, cache, number)?;
            let mut place = page.partition_point(|(key, _)| *key < from);
            while let Some((key, location)) = page.get(place) {
                if key > range.end() {
                    return Ok(());
                }
                match found(*key, *location) {
                    Walk::On => place += 1,
                    Walk::To(target) => {
                        from = target;
                        place += page
                            .get(place..)
                            .map_or(0, |rest| rest.partition_point(|(key, _)| *key < target));
                    }
                    Walk::End => return Ok(()),
                }
            }
            number += 1;
            // A leap may go over many pages.
            if page.last().is_some_and(|(last, _)| *last < from) {
                number = number.max(self.page_of(file, cache, from)?);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
