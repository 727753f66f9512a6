//! In-flight tracking: memory that the front end keeps while we may die (vhost-user specification, "Inflight I/O tracking",
//! split virtqueues).
//!
//! `handler` makes or takes the shared region, `queue` records in its part of it which heads are in flight. A daemon that comes
//! after a killed one reads there what has to be done again. The front end, and by it the guest, can write anything into the
//! region at any time: every value is checked when it is read, at recovery, and nothing is read back otherwise.
//!
//! One part per queue, all of the same size, each a multiple of 64 bytes:
//!
//! | offset | field | meaning |
//! |---|---|---|
//! | 0 | features u64 | 0 |
//! | 8 | version u16 | 0: never used; 1: the rest is valid |
//! | 10 | desc_num u16 | entries |
//! | 12 | last_batch_head u16 | head that was put on the used ring last |
//! | 14 | used_idx u16 | used index up to which entries have been cleared |
//! | 16 + 16 n | entry n | inflight u8, 5 bytes nothing, next u16, counter u64 |
//!
//! # Why a kill at any instruction loses nothing and repeats nothing that was answered
//!
//! Only this thread writes, and a killed thread has done all stores before some instruction and none after it. So the
//! order of the program is what counts (the fences keep the compiler to it, and other processors of a machine with a weak order):
//!
//! 1. [`Tracker::mark`]: counter, then `inflight = 1`, before the request is parsed, let alone started. Killed before: the head lies
//!    behind the available position that recovery computes, so it is fetched from the ring again. After: it is resubmitted.
//! 2. [`Tracker::batch`] for each answer: `next` = the last head, `last_batch_head` = this one. Status byte and used entry are
//!    written. Killed here: the used index has not moved, all of the batch is still in flight, the guest has seen nothing.
//! 3. The used index is stored (release). From here on the guest may know.
//! 4. [`Tracker::clear`]: `inflight = 0` for each of the batch, then `used_idx` = used index. Killed between 3 and the end of 4:
//!    `used_idx` differs from the ring's by the length of the batch, and the list from `last_batch_head` names its heads;
//!    [`Tracker::recover`] clears them, and doing it twice is harmless. No new head is marked between 3 and 4, so none that the
//!    guest offers again at once can be cleared by mistake.
//!
//! The position in the available ring follows: used index + heads in flight.

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::volatile_memory::Error as AccessError;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use super::config_space::{QUEUE_SIZE_MAX, QUEUES_MAX};
use super::gate::Gate;

const VERSION: u16 = 1;
const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_INDEX_AT: usize = 14;
const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 16;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;
/// Parts start at multiples of this.
const ALIGNMENT_BYTES: usize = 64;

/// Why a region cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum BadRegion {
    /// More queues or longer rings than the device has, or none.
    #[error("in-flight memory for {queues} queues of {size} entries")]
    Shape {
        /// Queues.
        queues: u16,
        /// Entries of each.
        size: u16,
    },
    /// It, or the file, is shorter than it has to be: touching what is not there would kill this process.
    #[error("in-flight memory of {0} bytes is too short")]
    TooShort(u64),
    /// No memory for it, or it cannot be mapped.
    #[error("in-flight memory cannot be mapped")]
    Map(#[source] std::io::Error),
}

/// Why a queue cannot go on from what the region says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadTracking {
    /// The region has no part for this queue.
    #[error("in-flight memory has no part for the queue")]
    NoSuchQueue,
    /// Not version 1.
    #[error("in-flight memory of version {0}")]
    Version(u16),
    /// Not as many entries as the ring.
    #[error("in-flight memory has {entries} entries, the ring {size}")]
    Entries {
        /// Of the region.
        entries: u16,
        /// Of the ring.
        size: u16,
    },
    /// More was published since than the ring holds.
    #[error("in-flight memory is {0} answers behind the ring")]
    Behind(u16),
    /// A head that the table does not have.
    #[error("in-flight memory names descriptor {0}")]
    NoSuchHead(u16),
    /// It went away.
    #[error("in-flight memory cannot be reached")]
    NotThere,
}

impl From<AccessError> for BadTracking {
    fn from(_: AccessError) -> Self {
        Self::NotThere
    }
}

/// The mapped region of a connection.
#[derive(Debug)]
pub(super) struct Region {
    map: MmapRegion<()>,
    queues: u16,
    size: u16,
    /// Nothing new on any queue before all that the region named when it was mapped is done.
    pub(super) gate: Gate,
}

fn part_bytes(size: u16) -> usize {
    (HEADER_BYTES + usize::from(size) * ENTRY_BYTES).next_multiple_of(ALIGNMENT_BYTES)
}

impl Region {
    /// New memory for so many queues of so many entries, with the file that the front end keeps.
    pub(super) fn create(
        wanted: &VhostUserInflight,
    ) -> Result<(Arc<Self>, VhostUserInflight, File), BadRegion> {
        let bytes = Self::needed_bytes(wanted)?;
        let os = |error: rustix::io::Errno| BadRegion::Map(error.into());
        let memory = memfd_create(
            "vhost-blk in flight",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )
        .map_err(os)?;
        ftruncate(&memory, bytes as u64).map_err(os)?;
        fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW).map_err(os)?;
        let file = File::from(memory);
        let answer = VhostUserInflight::new(bytes as u64, 0, wanted.num_queues, wanted.queue_size);
        let kept = file.try_clone().map_err(BadRegion::Map)?;
        Ok((Self::map(&answer, file)?, answer, kept))
    }

    /// Memory that the front end has kept, or got from elsewhere.
    pub(super) fn map(given: &VhostUserInflight, file: File) -> Result<Arc<Self>, BadRegion> {
        let bytes = Self::needed_bytes(given)?;
        if given.mmap_size < bytes as u64 {
            return Err(BadRegion::TooShort(given.mmap_size));
        }
        let end_bytes = given.mmap_offset.checked_add(bytes as u64);
        let file_bytes = file.metadata().map_err(BadRegion::Map)?.len();
        if end_bytes.is_none_or(|end_bytes| end_bytes > file_bytes) {
            return Err(BadRegion::TooShort(file_bytes));
        }
        // A file that shrinks under its mapping would kill this process, with the disks of others.
        let sealed = fcntl_add_seals(&file, SealFlags::SHRINK).is_ok()
            || fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        if !sealed {
            tracing::warn!("in-flight memory that the front end can take away");
        }
        let map = MmapRegion::from_file(FileOffset::new(file, given.mmap_offset), bytes)
            .map_err(|error| BadRegion::Map(std::io::Error::other(error)))?;
        let (queues, size) = (given.num_queues, given.queue_size);
        let left = unanswered(&map.as_volatile_slice(), queues, size)
            .map_err(|error| BadRegion::Map(std::io::Error::other(error)))?;
        Ok(Arc::new(Self {
            map,
            queues,
            size,
            gate: Gate::new(left),
        }))
    }

    /// Queues that it has a part for.
    pub(super) fn queues(&self) -> usize {
        usize::from(self.queues)
    }

    /// Its shape, and a copy of its file.
    pub(super) fn give(&self) -> std::io::Result<Option<(VhostUserInflight, File)>> {
        let Some(place) = self.map.file_offset() else {
            return Ok(None);
        };
        let bytes = self.map.size() as u64;
        let shape = VhostUserInflight::new(bytes, place.start(), self.queues, self.size);
        Ok(Some((shape, place.file().try_clone()?)))
    }

    fn needed_bytes(shape: &VhostUserInflight) -> Result<usize, BadRegion> {
        let (queues, size) = (shape.num_queues, shape.queue_size);
        if !(1..=QUEUES_MAX).contains(&queues) || !(1..=QUEUE_SIZE_MAX).contains(&usize::from(size))
        {
            return Err(BadRegion::Shape { queues, size });
        }
        Ok(usize::from(queues) * part_bytes(size))
    }
}

/// Requests that each queue's part names. Some of them may have been answered by a daemon that died before it cleared them: only
/// [`Tracker::recover`] knows, when the ring is there.
fn unanswered(
    memory: &VolatileSlice<'_>,
    queues: u16,
    size: u16,
) -> Result<Vec<usize>, AccessError> {
    let mut left = Vec::new();
    for queue in 0..usize::from(queues) {
        let start = queue * part_bytes(size);
        let version: u16 = memory.load(start + VERSION_AT, Ordering::Acquire)?;
        let mut count = 0;
        if u16::from_le(version) == VERSION {
            for entry in 0..usize::from(size) {
                let place = start + HEADER_BYTES + entry * ENTRY_BYTES;
                let inflight: u8 = memory.load(place, Ordering::Acquire)?;
                count += usize::from(inflight != 0);
            }
        }
        left.push(count);
    }
    Ok(left)
}

/// What is to be done after the daemon before this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Recovered {
    /// The region was never used: nothing is in flight.
    Fresh,
    /// These heads are in flight, in the order in which they were fetched.
    InFlight(Vec<u16>),
}

/// The part of one queue.
#[derive(Debug)]
pub(super) struct Tracker {
    region: Arc<Region>,
    /// First byte of the part in the region.
    start: usize,
    counter: u64,
    last_batch_head: u16,
}

impl Tracker {
    /// The part of queue number `queue`, for a ring of `size` entries.
    pub(super) fn new(region: Arc<Region>, queue: usize, size: u16) -> Result<Self, BadTracking> {
        if queue >= usize::from(region.queues) {
            return Err(BadTracking::NoSuchQueue);
        }
        if size > region.size {
            return Err(BadTracking::Entries {
                entries: region.size,
                size,
            });
        }
        Ok(Self {
            start: queue * part_bytes(region.size),
            region,
            counter: 0,
            last_batch_head: 0,
        })
    }

    /// Says when new requests may be taken.
    pub(super) fn gate(&self) -> &Gate {
        &self.region.gate
    }

    /// Reads what was in flight when the used index of the ring was `used_index`, and sets the region right. The ring has
    /// `size` entries.
    pub(super) fn recover(&mut self, used_index: u16, size: u16) -> Result<Recovered, BadTracking> {
        match self.load(VERSION_AT)? {
            0 => {
                self.forget()?;
                self.store(ENTRIES_AT, self.region.size)?;
                self.store(LAST_BATCH_HEAD_AT, 0)?;
                self.store(USED_INDEX_AT, used_index)?;
                fence(Ordering::Release);
                self.store(VERSION_AT, VERSION)?;
                return Ok(Recovered::Fresh);
            }
            VERSION => {}
            other => return Err(BadTracking::Version(other)),
        }
        let entries = self.load(ENTRIES_AT)?;
        if entries < size || entries > self.region.size {
            return Err(BadTracking::Entries { entries, size });
        }
        self.finish_last_batch(used_index, size)?;
        let mut found = Vec::new();
        for head in 0..entries {
            let inflight: u8 = self.memory().load(self.entry(head), Ordering::Acquire)?;
            if inflight == 0 {
                continue;
            }
            if head >= size {
                return Err(BadTracking::NoSuchHead(head));
            }
            let place = self.entry(head) + COUNTER_AT;
            let counter: u64 = self.memory().load(place, Ordering::Relaxed)?;
            found.push((u64::from_le(counter), head));
        }
        found.sort_unstable();
        // Wraps after 2^64 requests, or by a front end's hand; then only the order of resubmission suffers.
        self.counter = found.last().map_or(0, |(last, _)| last.wrapping_add(1));
        Ok(Recovered::InFlight(
            found.into_iter().map(|(_, head)| head).collect(),
        ))
    }

    /// Clears what had been published, but not cleared.
    fn finish_last_batch(&mut self, used_index: u16, size: u16) -> Result<(), BadTracking> {
        let published = used_index.wrapping_sub(self.load(USED_INDEX_AT)?);
        if published > size {
            return Err(BadTracking::Behind(published));
        }
        let mut head = self.load(LAST_BATCH_HEAD_AT)?;
        self.last_batch_head = head;
        // Bounded by the number of answers, so a list that goes round in a circle ends, too.
        for _ in 0..published {
            if head >= size {
                return Err(BadTracking::NoSuchHead(head));
            }
            self.set_in_flight(head, false)?;
            head = self.load_entry(head, NEXT_AT)?;
        }
        fence(Ordering::Release);
        self.store(USED_INDEX_AT, used_index)
    }

    /// A head was fetched from the available ring. Before anything is done about it.
    pub(super) fn mark(&mut self, head: u16) -> Result<(), BadTracking> {
        let place = self.entry(head) + COUNTER_AT;
        let counter = self.counter.to_le();
        self.memory().store(counter, place, Ordering::Relaxed)?;
        self.counter = self.counter.wrapping_add(1);
        self.set_in_flight(head, true)?;
        fence(Ordering::Release);
        Ok(())
    }

    /// A head is about to be published. Before the used index is stored.
    pub(super) fn batch(&mut self, head: u16) -> Result<(), BadTracking> {
        let next = self.last_batch_head.to_le();
        let place = self.entry(head) + NEXT_AT;
        self.memory().store(next, place, Ordering::Relaxed)?;
        self.last_batch_head = head;
        self.store(LAST_BATCH_HEAD_AT, head)
    }

    /// All of a batch was published by storing `used_index`.
    pub(super) fn clear(&mut self, heads: &[u16], used_index: u16) -> Result<(), BadTracking> {
        fence(Ordering::Release);
        for head in heads {
            self.set_in_flight(*head, false)?;
        }
        fence(Ordering::Release);
        self.store(USED_INDEX_AT, used_index)
    }

    /// Nothing is in flight any more: the device was reset.
    pub(super) fn forget(&mut self) -> Result<(), BadTracking> {
        self.store(VERSION_AT, 0)?;
        for head in 0..self.region.size {
            self.set_in_flight(head, false)?;
        }
        Ok(())
    }

    fn memory(&self) -> VolatileSlice<'_> {
        self.region.map.as_volatile_slice()
    }

    /// Place of the entry of a head, which is below the region's number of entries.
    fn entry(&self, head: u16) -> usize {
        self.start + HEADER_BYTES + usize::from(head) * ENTRY_BYTES
    }

    fn set_in_flight(&self, head: u16, in_flight: bool) -> Result<(), BadTracking> {
        let place = self.entry(head);
        self.memory()
            .store(u8::from(in_flight), place, Ordering::Release)?;
        Ok(())
    }

    fn load_entry(&self, head: u16, field: usize) -> Result<u16, BadTracking> {
        let value = self
            .memory()
            .load(self.entry(head) + field, Ordering::Relaxed)?;
        Ok(u16::from_le(value))
    }

    fn load(&self, field: usize) -> Result<u16, BadTracking> {
        let value = self.memory().load(self.start + field, Ordering::Acquire)?;
        Ok(u16::from_le(value))
    }

    fn store(&self, field: usize, value: u16) -> Result<(), BadTracking> {
        self.memory()
            .store(value.to_le(), self.start + field, Ordering::Relaxed)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
