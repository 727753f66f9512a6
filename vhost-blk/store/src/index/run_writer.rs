//! Writes a run: pages in key order, then its fences.
//!
//! `merge` feeds it. It writes only to pages that were set aside for it, which neither superblock slot names: until one
//! does, nothing has happened (I7). The caller syncs.

use super::page::{PageBuilder, varint_bytes};
use super::{Fences, Key, Location, Run};
use crate::error::{FileName, Result, StoreError};
use crate::io::BlockFile;
use crate::layout::{GROUP_RECORDS, PAGE_BYTES, PAGE_HEADER_BYTES, Seal};
use crate::superblock::RunPlace;
use crate::units::{Generation, VolumeId};

/// Pages collected before they are written.
const BATCH_PAGES: usize = 32;

/// How large the numbers in a run can be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Largest {
    pub(crate) block: u64,
    pub(crate) epoch: u32,
    pub(crate) log_block: u64,
}

/// Most pages, fences included, that a run of `records` records can take.
pub(crate) fn most_pages(records: u64, largest: Largest) -> u64 {
    let record_bytes = varint_bytes(largest.block.saturating_mul(8) | 7)
        + varint_bytes(u64::from(largest.epoch) * 2 + 1)
        + varint_bytes(largest.log_block.saturating_mul(2) | 1);
    let group_bytes = record_bytes * GROUP_RECORDS as u64 + 2;
    // What does not fit any more is left at a page's end.
    let room_bytes = PAGE_BYTES as u64 - PAGE_HEADER_BYTES as u64 - record_bytes - 2;
    let pages =
        |records: u64| (records.div_ceil(GROUP_RECORDS as u64) * group_bytes).div_ceil(room_bytes);
    let whole = pages(records);
    whole + pages(whole)
}

/// A run being written.
#[derive(Debug)]
pub(crate) struct RunWriter {
    volume_id: VolumeId,
    place: RunPlace,
    limit_pages: u64,
    fences: Fences,
    page: PageBuilder,
    first: Option<Key>,
    fence_page: PageBuilder,
    /// Finished fence pages; they go behind the run's pages.
    fence_bytes: Vec<u8>,
    /// Finished pages that are not written yet.
    bytes: Vec<u8>,
    written_pages: u64,
}

impl RunWriter {
    /// A run of this generation in the `limit_pages` pages from `first_page` on.
    pub(crate) fn new(
        volume_id: VolumeId,
        generation: Generation,
        first_page: u64,
        limit_pages: u64,
    ) -> RunWriter {
        RunWriter {
            volume_id,
            place: RunPlace {
                generation,
                first_page,
                pages: 0,
                fence_pages: 0,
                records: 0,
            },
            limit_pages,
            fences: Fences::default(),
            page: PageBuilder::default(),
            first: None,
            fence_page: PageBuilder::default(),
            fence_bytes: Vec::new(),
            bytes: Vec::new(),
            written_pages: 0,
        }
    }

    /// Adds the next record; keys ascend.
    pub(crate) fn push(
        &mut self,
        file: &dyn BlockFile,
        key: Key,
        location: Location,
    ) -> Result<()> {
        if !self.page.push(key, location) {
            self.end_page(file)?;
            self.page.push(key, location);
        }
        self.first.get_or_insert(key);
        Ok(())
    }

    fn end_page(&mut self, file: &dyn BlockFile) -> Result<()> {
        let Some(first) = self.first.take() else {
            return Ok(());
        };
        self.place.records += self.page.records();
        let seal = Seal::Page(self.place.generation, self.place.pages);
        let bytes = self.page.finish(self.volume_id, seal);
        self.bytes.extend_from_slice(&bytes);
        self.place.pages += 1;
        self.fences.push(first);
        if !self.fence_page.push(first, Location::Base) {
            self.end_fence_page();
            self.fence_page.push(first, Location::Base);
        }
        if self.bytes.len() >= BATCH_PAGES * PAGE_BYTES {
            self.write(file)?;
        }
        Ok(())
    }

    fn end_fence_page(&mut self) {
        let seal = Seal::Fence(self.place.generation, self.place.fence_pages);
        let bytes = self.fence_page.finish(self.volume_id, seal);
        self.fence_bytes.extend_from_slice(&bytes);
        self.place.fence_pages += 1;
    }

    fn write(&mut self, file: &dyn BlockFile) -> Result<()> {
        let pages = (self.bytes.len() / PAGE_BYTES) as u64;
        if self.written_pages + pages > self.limit_pages {
            return Err(StoreError::Limit("pages set aside for a run of the index"));
        }
        let offset_bytes = (self.place.first_page + self.written_pages) * PAGE_BYTES as u64;
        file.write_at(&self.bytes, offset_bytes)
            .map_err(|source| StoreError::Io {
                op: "write",
                file: FileName::Index,
                offset_bytes,
                source,
            })?;
        self.written_pages += pages;
        self.bytes.clear();
        Ok(())
    }

    /// Writes what is left; `None` if there was no record.
    pub(crate) fn finish(mut self, file: &dyn BlockFile) -> Result<Option<Run>> {
        self.end_page(file)?;
        if self.place.records == 0 {
            return Ok(None);
        }
        self.end_fence_page();
        self.bytes.append(&mut self.fence_bytes);
        self.write(file)?;
        self.fences.shrink();
        Ok(Some(Run {
            volume_id: self.volume_id,
            place: self.place,
            fences: self.fences,
        }))
    }
}
