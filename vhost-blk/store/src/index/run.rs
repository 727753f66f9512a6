//! A run: a sorted, immutable part of the index, in neighbouring pages of the index file, with its fences behind.
//!
//! `index` reads it through the page cache, `merge` and `scan` read all of it past the cache. Opening reads the fences
//! alone: a page is checked when it is read, and one that does not verify is an error of whoever asked.
//! Invariant: keys are strictly ascending across the whole run (I1).
#![deny(clippy::indexing_slicing)]

use std::ops::RangeInclusive;

use super::page::{Broken, Page, Records, UnverifiedPage};
use super::{EndOfHistory, Fences, Key, Location, PageCache, Walk};
use crate::error::{FileName, Result, StoreError};
use crate::io::BlockFile;
use crate::layout::{LIVE, PAGE_BYTES, Seal};
use crate::superblock::RunPlace;
use crate::units::{Block, Generation, VolumeId, in_memory};

/// Pages read at a time by those who read all of them.
const STRIDE_PAGES: u64 = 16;

/// A run on disk.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) volume_id: VolumeId,
    pub(crate) place: RunPlace,
    pub(crate) fences: Fences,
}

fn page_offset(page: u64) -> u64 {
    page.saturating_mul(PAGE_BYTES as u64)
}

fn read(file: &dyn BlockFile, bytes: &mut [u8], page: u64) -> Result<()> {
    let offset_bytes = page_offset(page);
    file.read_at(bytes, offset_bytes)
        .map_err(|source| StoreError::Io {
            op: "read",
            file: FileName::Index,
            offset_bytes,
            source,
        })
}

impl Run {
    /// Reads the fences of a run, and nothing else of it.
    pub(crate) fn load(file: &dyn BlockFile, volume_id: VolumeId, place: RunPlace) -> Result<Run> {
        let mut run = Run {
            volume_id,
            place,
            fences: Fences::default(),
        };
        let (mut previous, mut fences, mut kept) = (None, 0, Fences::default());
        let first = place.first_page + place.pages;
        run.each_page(
            file,
            first,
            place.fence_pages,
            Seal::Fence,
            &mut |records| {
                for (key, _) in records.by_ref() {
                    if previous.is_some_and(|previous| previous >= key) {
                        return false;
                    }
                    previous = Some(key);
                    fences += 1;
                    if fences <= place.pages {
                        kept.push(key);
                    }
                }
                true
            },
        )?;
        if fences != place.pages {
            return Err(StoreError::Corrupted {
                file: FileName::Index,
                offset_bytes: page_offset(first),
                what: "another number of fences than pages",
            });
        }
        kept.shrink();
        run.fences = kept;
        Ok(run)
    }

    fn corrupted(&self, number: u64) -> StoreError {
        StoreError::Corrupted {
            file: FileName::Index,
            offset_bytes: page_offset(self.place.first_page + number),
            what: "page does not verify",
        }
    }

    /// Reads `count` pages of the file from `first` on, numbered from 0 in their seals, and hands the records of each to
    /// `found`, which answers whether they hold.
    fn each_page(
        &self,
        file: &dyn BlockFile,
        first: u64,
        count: u64,
        seal: impl Fn(Generation, u64) -> Seal,
        found: &mut dyn FnMut(&mut Records<'_>) -> bool,
    ) -> Result<()> {
        let mut bytes = vec![0; in_memory(STRIDE_PAGES.min(count)) * PAGE_BYTES];
        let mut number = 0;
        while number < count {
            let part = STRIDE_PAGES.min(count - number);
            let window = bytes
                .get_mut(..in_memory(part) * PAGE_BYTES)
                .unwrap_or_default();
            read(file, window, first + number)?;
            for page in window.as_chunks::<PAGE_BYTES>().0 {
                let seal = seal(self.place.generation, number);
                let holds = UnverifiedPage(page)
                    .verify(self.volume_id, seal)
                    .map(Page::all)
                    .is_some_and(|mut records| found(&mut records) && records.check().is_ok());
                if !holds {
                    return Err(self.corrupted(first + number - self.place.first_page));
                }
                number += 1;
            }
        }
        Ok(())
    }

    /// Reads pages `first` and on, at most `count`, past the cache: all their records, and how many pages it were.
    pub(crate) fn read_pages(
        &self,
        file: &dyn BlockFile,
        first: u64,
        count: u64,
        records: &mut impl Extend<(Key, Location)>,
    ) -> Result<u64> {
        let count = count.min(self.place.pages.saturating_sub(first));
        let seal = |generation, number| Seal::Page(generation, first + number);
        let start = self.place.first_page + first;
        self.each_page(file, start, count, seal, &mut |page| {
            records.extend(page.by_ref());
            true
        })?;
        Ok(count)
    }

    fn page<'a>(
        &self,
        file: &dyn BlockFile,
        cache: &'a mut PageCache,
        number: u64,
    ) -> Result<Page<'a>> {
        let generation = self.place.generation;
        let bytes = cache.fetch((generation.0, number), |bytes| {
            read(file, bytes, self.place.first_page + number)?;
            let verified = UnverifiedPage(bytes)
                .verify(self.volume_id, Seal::Page(generation, number))
                .is_some();
            if verified {
                Ok(())
            } else {
                Err(self.corrupted(number))
            }
        })?;
        Ok(Page(bytes))
    }

    /// The last page that begins at or before `key`; the first page if none does.
    fn page_of(&self, file: &dyn BlockFile, cache: &mut PageCache, key: Key) -> Result<u64> {
        let (mut first, mut behind) = self.fences.span(key);
        while behind - first > 1 {
            let middle = first + (behind - first) / 2;
            let start = self.page(file, cache, middle)?.all().next();
            let (start, _) = start.ok_or_else(|| self.corrupted(middle))?;
            if start <= key {
                first = middle;
            } else {
                behind = middle;
            }
        }
        Ok(first)
    }

    /// The live version of `block`, and when the one before it died. Two pages are looked at, at most.
    pub(crate) fn end_of(
        &self,
        file: &dyn BlockFile,
        cache: &mut PageCache,
        block: Block,
    ) -> Result<EndOfHistory> {
        let mut end = EndOfHistory::default();
        let key = Key::live(block);
        let number = self.page_of(file, cache, key)?;
        let broken = |_: Broken| self.corrupted(number);
        let [last, mut before] = self
            .page(file, cache, number)?
            .last_two(key)
            .map_err(broken)?;
        let Some((last, location)) = last.filter(|(last, _)| last.block == block) else {
            return Ok(end);
        };
        if last.death != LIVE {
            end.last_death = Some(last.death);
            return Ok(end);
        }
        end.live = Some(location);
        if before.is_none() && number > 0 {
            let page = self.page(file, cache, number - 1)?;
            [before, _] = page.last_two(key).map_err(broken)?;
        }
        end.last_death = before
            .filter(|(before, _)| before.block == block)
            .map(|(before, _)| before.death);
        Ok(end)
    }

    /// The first record in `range`.
    pub(crate) fn first_in(
        &self,
        file: &dyn BlockFile,
        cache: &mut PageCache,
        range: RangeInclusive<Key>,
    ) -> Result<Option<(Key, Location)>> {
        let mut first = None;
        self.visit(file, cache, &range, &mut |key, location| {
            first = Some((key, location));
            Walk::End
        })?;
        Ok(first)
    }

    /// Calls `found` with the records in `range`, in order, and goes where it says: never back.
    pub(crate) fn visit(
        &self,
        file: &dyn BlockFile,
        cache: &mut PageCache,
        range: &RangeInclusive<Key>,
        found: &mut dyn FnMut(Key, Location) -> Walk,
    ) -> Result<()> {
        let mut from = *range.start();
        let mut number = self.page_of(file, cache, from)?;
        while number < self.place.pages {
            let mut leap = false;
            let mut records = self.page(file, cache, number)?.near(from);
            for (key, location) in records.by_ref().skip_while(|(key, _)| *key < from) {
                if key > *range.end() {
                    return Ok(());
                }
                match found(key, location) {
                    Walk::On => {}
                    Walk::To(target) => {
                        leap = target > from;
                        from = from.max(target);
                        break;
                    }
                    Walk::End => return Ok(()),
                }
            }
            records.check().map_err(|_| self.corrupted(number))?;
            number = if leap {
                self.page_of(file, cache, from)?.max(number)
            } else {
                number + 1
            };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
