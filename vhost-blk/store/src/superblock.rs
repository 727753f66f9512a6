//! The superblock: two slots, the newer valid one says what is current.
//!
//! `open` reads it, `checkpoint` and `open` write it. It knows no journal and no index, only their numbers.
//! Invariant I7: a slot is rewritten only after the other one is durable; one that came out torn does not verify, and
//! the other one holds, with everything it names.
#![deny(clippy::indexing_slicing)]

use crate::error::{FileName, Result, StoreError};
use crate::index_room::table_pages;
use crate::io::BlockFile;
use crate::layout::{self, put, run, slot, u32_at, u64_at, uuid_at};
use crate::units::{
    BLOCK_BYTES, BootId, Epoch, Generation, Incarnation, SECTOR_BYTES, Sequence, VolumeId,
    in_memory,
};

/// Bytes of a slot.
const SLOT_BYTES: usize = in_memory(layout::SLOT_BYTES);

/// Modification time of the base, seconds and nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModifiedTime {
    /// Seconds.
    pub seconds: i64,
    /// Nanoseconds.
    pub nanoseconds: u32,
}

/// Where a run of the index is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RunPlace {
    /// Seeds the checksums of its pages; no two runs have the same.
    pub(crate) generation: Generation,
    /// In the index file.
    pub(crate) first_page: u64,
    pub(crate) pages: u64,
    /// Behind the pages.
    pub(crate) fence_pages: u64,
    pub(crate) records: u64,
}

/// A checked slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) generation: Generation,
    pub(crate) volume_id: VolumeId,
    pub(crate) size_bytes: u64,
    pub(crate) boot_id: BootId,
    pub(crate) incarnation: Incarnation,
    pub(crate) clean: bool,
    /// Epoch when the current index was written.
    pub(crate) epoch: Epoch,
    /// Runs of the index, newest first.
    pub(crate) runs: Vec<RunPlace>,
    /// Of the next run or table.
    pub(crate) next_generation: Generation,
    /// Where the snapshot table is in the index file.
    pub(crate) table_page: u64,
    pub(crate) table_generation: Generation,
    pub(crate) table_records: u64,
    /// First journal generation to replay onto the index.
    pub(crate) journal_generation: Generation,
    /// Sequence of that journal's START record.
    pub(crate) first_sequence: Sequence,
    /// Records up to this one are in the index already.
    pub(crate) applied_through: Sequence,
    /// Bytes of each of the two journal regions of the log.
    pub(crate) journal_region_bytes: u64,
    /// No log block at or above this one is named by the index.
    pub(crate) log_high_water: u64,
    /// Something may have been dropped that no sweep has freed.
    pub(crate) unswept: bool,
    /// A record of the snapshot table has a size.
    pub(crate) has_sizes: bool,
    /// The journal may hold LEAVE_OUT records.
    pub(crate) leaves_out: bool,
    /// The base may be as long as this, if it is not 0: what is behind `size_bytes` is to be cut off.
    pub(crate) base_bytes: u64,
    /// Set by a clean close, where the base can tell.
    pub(crate) base_modified: Option<ModifiedTime>,
}

/// Whether journal regions may be so long.
pub(crate) fn region_fits(region_bytes: u64) -> bool {
    (layout::MIN_JOURNAL_REGION_BYTES..=layout::MAX_JOURNAL_REGION_BYTES).contains(&region_bytes)
        && region_bytes.is_multiple_of(BLOCK_BYTES)
}

/// Bytes of a slot as read, before any check.
pub(crate) struct UnverifiedSuperblock(Box<[u8; SLOT_BYTES]>);

impl UnverifiedSuperblock {
    pub(crate) fn read(file: &dyn BlockFile, at: usize) -> Result<Self> {
        let mut bytes = Box::new([0; SLOT_BYTES]);
        let offset_bytes = layout::SLOT_BYTES * u64::from(at == 1);
        file.read_at(bytes.as_mut_slice(), offset_bytes)
            .map_err(|source| StoreError::Io {
                op: "read",
                file: FileName::Superblock,
                offset_bytes,
                source,
            })?;
        Ok(Self(bytes))
    }

    /// Whether the slot was never written.
    pub(crate) fn is_blank(&self) -> bool {
        self.0.iter().all(|byte| *byte == 0)
    }

    /// Whether the checksum holds over the first `length` bytes.
    fn holds(&self, length: usize) -> bool {
        let mut summed = self.0.clone();
        put(&mut *summed, slot::CRC, &[0; 4]);
        let (summed, _) = summed.split_at_checked(length).unwrap_or_default();
        layout::checksum_holds(u32_at(&*self.0, slot::CRC), crc32c::crc32c(summed))
    }

    /// The slot if its magic and checksum hold; `Err` only for a format this program must not touch.
    pub(crate) fn verify(&self) -> Result<Option<Superblock>> {
        let bytes = self.0.as_slice();
        if layout::take::<8>(bytes, slot::MAGIC) != layout::MAGIC {
            return Ok(None);
        }
        let (version, features) = (u32_at(bytes, slot::VERSION), u32_at(bytes, slot::FEATURES));
        let whole = self.holds(SLOT_BYTES);
        if version != layout::VERSION && (whole || self.holds(layout::SLOT_V1_BYTES)) {
            return Err(StoreError::Unsupported { version, features });
        }
        if !whole {
            return Ok(None);
        }
        if version != layout::VERSION || features & !layout::KNOWN_FEATURES != 0 {
            return Err(StoreError::Unsupported { version, features });
        }
        let flags = u32_at(bytes, slot::FLAGS);
        let size_bytes = u64_at(bytes, slot::SIZE_BYTES);
        let run_count = in_memory(u64::from(u32_at(bytes, slot::RUN_COUNT)));
        if run_count > layout::MAX_RUNS {
            return Ok(None);
        }
        let described = bytes.get(slot::RUNS..).unwrap_or_default();
        let runs: Vec<RunPlace> = described
            .chunks_exact(layout::RUN_BYTES)
            .take(run_count)
            .map(|bytes| RunPlace {
                generation: Generation(u64_at(bytes, run::GENERATION)),
                first_page: u64_at(bytes, run::FIRST_PAGE),
                pages: u64_at(bytes, run::PAGES),
                fence_pages: u64_at(bytes, run::FENCE_PAGES),
                records: u64_at(bytes, run::RECORDS),
            })
            .collect();
        let table_page = u64_at(bytes, slot::TABLE_PAGE);
        let table_records = u64_at(bytes, slot::TABLE_RECORDS);
        let log_high_water = u64_at(bytes, slot::LOG_HIGH_WATER);
        // Sums and products of these cannot overflow.
        let sane = |pages: u64| pages < layout::MAX_INDEX_PAGES;
        let runs_are_sane = runs.iter().all(|run| {
            let few = sane(run.first_page) && sane(run.pages) && sane(run.fence_pages);
            // What is set aside for a merge goes by the records: no more of them than bytes.
            few && run.pages > 0 && run.records <= run.pages * layout::PAGE_BYTES as u64
        });
        let table_is_sane = sane(table_page) && sane(table_pages(table_records));
        if !runs_are_sane || !table_is_sane || log_high_water > layout::MAX_LOG_BLOCKS {
            return Ok(None);
        }
        if u64::from(u32_at(bytes, slot::BLOCK_BYTES)) != BLOCK_BYTES
            || size_bytes == 0
            || !size_bytes.is_multiple_of(SECTOR_BYTES)
            || size_bytes > layout::MAX_VOLUME_BYTES
            || !region_fits(u64_at(bytes, slot::JOURNAL_REGION_BYTES))
            || u32_at(bytes, slot::EPOCH) == 0
            || u32_at(bytes, slot::EPOCH) > layout::MAX_EPOCH
        {
            return Ok(None);
        }
        let base_modified = (flags & layout::FLAG_BASE_TIME != 0).then(|| ModifiedTime {
            seconds: i64::from_le_bytes(layout::take(bytes, slot::BASE_SECONDS)),
            nanoseconds: u32_at(bytes, slot::BASE_NANOSECONDS),
        });
        Ok(Some(Superblock {
            generation: Generation(u64_at(bytes, slot::GENERATION)),
            volume_id: VolumeId(uuid_at(bytes, slot::VOLUME_ID)),
            size_bytes,
            boot_id: BootId(layout::take(bytes, slot::BOOT_ID)),
            incarnation: Incarnation(u32_at(bytes, slot::INCARNATION)),
            clean: flags & layout::FLAG_CLEAN != 0,
            epoch: Epoch(u32_at(bytes, slot::EPOCH)),
            runs,
            next_generation: Generation(u64_at(bytes, slot::NEXT_GENERATION)),
            table_page,
            table_generation: Generation(u64_at(bytes, slot::TABLE_GENERATION)),
            table_records,
            journal_generation: Generation(u64_at(bytes, slot::JOURNAL_GENERATION)),
            first_sequence: Sequence(u64_at(bytes, slot::FIRST_SEQUENCE)),
            applied_through: Sequence(u64_at(bytes, slot::APPLIED_THROUGH)),
            journal_region_bytes: u64_at(bytes, slot::JOURNAL_REGION_BYTES),
            log_high_water,
            unswept: flags & layout::FLAG_UNSWEPT != 0,
            has_sizes: features & layout::FEATURE_SIZES != 0,
            leaves_out: features & layout::FEATURE_LEAVES_OUT != 0,
            base_bytes: u64_at(bytes, slot::BASE_BYTES),
            base_modified,
        }))
    }
}

impl Superblock {
    /// First log block behind the journal regions: none below it holds data.
    pub(crate) fn first_data_block(&self) -> u64 {
        2 * self.journal_region_bytes / BLOCK_BYTES
    }

    /// Whether a base of this length is the volume's: as long, or longer where that is announced, or its owner's matter.
    pub(crate) fn base_fits(&self, length_bytes: u64, is_device: bool) -> bool {
        let longest = match is_device {
            true => u64::MAX,
            false => self.base_bytes.max(self.size_bytes),
        };
        (self.size_bytes..=longest).contains(&length_bytes)
    }

    /// What a volume is before anything was written to it.
    pub(crate) fn empty(
        volume_id: VolumeId,
        size_bytes: u64,
        journal_region_bytes: u64,
    ) -> Superblock {
        Superblock {
            generation: Generation(0),
            volume_id,
            size_bytes,
            boot_id: BootId([0; 16]),
            incarnation: Incarnation(0),
            clean: true,
            epoch: Epoch(1),
            runs: Vec::new(),
            next_generation: Generation(1),
            table_page: 0,
            table_generation: Generation(0),
            table_records: 0,
            journal_generation: Generation(0),
            first_sequence: Sequence(1),
            applied_through: Sequence(1),
            journal_region_bytes,
            log_high_water: 0,
            unswept: false,
            has_sizes: false,
            leaves_out: false,
            base_bytes: 0,
            base_modified: None,
        }
    }

    fn encode(&self) -> [u8; SLOT_BYTES] {
        let mut bytes = [0; SLOT_BYTES];
        let mut flags = 0;
        if self.clean {
            flags |= layout::FLAG_CLEAN;
        }
        if self.unswept {
            flags |= layout::FLAG_UNSWEPT;
        }
        if let Some(modified) = self.base_modified {
            flags |= layout::FLAG_BASE_TIME;
            put(
                &mut bytes,
                slot::BASE_SECONDS,
                &modified.seconds.to_le_bytes(),
            );
            put(
                &mut bytes,
                slot::BASE_NANOSECONDS,
                &modified.nanoseconds.to_le_bytes(),
            );
        }
        put(&mut bytes, slot::MAGIC, &layout::MAGIC);
        put(&mut bytes, slot::VERSION, &layout::VERSION.to_le_bytes());
        put(
            &mut bytes,
            slot::GENERATION,
            &self.generation.0.to_le_bytes(),
        );
        let block_bytes: [u8; 8] = BLOCK_BYTES.to_le_bytes();
        put(
            &mut bytes,
            slot::BLOCK_BYTES,
            &layout::take::<4>(&block_bytes, 0),
        );
        let sizes = u32::from(self.has_sizes) * layout::FEATURE_SIZES;
        let leaves_out = u32::from(self.leaves_out) * layout::FEATURE_LEAVES_OUT;
        let features = sizes | leaves_out;
        put(&mut bytes, slot::FEATURES, &features.to_le_bytes());
        put(&mut bytes, slot::BASE_BYTES, &self.base_bytes.to_le_bytes());
        put(&mut bytes, slot::VOLUME_ID, self.volume_id.0.as_bytes());
        put(&mut bytes, slot::SIZE_BYTES, &self.size_bytes.to_le_bytes());
        put(&mut bytes, slot::BOOT_ID, &self.boot_id.0);
        put(
            &mut bytes,
            slot::INCARNATION,
            &self.incarnation.0.to_le_bytes(),
        );
        put(&mut bytes, slot::FLAGS, &flags.to_le_bytes());
        put(&mut bytes, slot::EPOCH, &self.epoch.0.to_le_bytes());
        let run_count = u32::try_from(self.runs.len()).unwrap_or(u32::MAX);
        put(&mut bytes, slot::RUN_COUNT, &run_count.to_le_bytes());
        for (place, described) in self.runs.iter().enumerate() {
            for (field, value) in [
                (run::GENERATION, described.generation.0),
                (run::FIRST_PAGE, described.first_page),
                (run::PAGES, described.pages),
                (run::FENCE_PAGES, described.fence_pages),
                (run::RECORDS, described.records),
            ] {
                let at = slot::RUNS + place * layout::RUN_BYTES + field;
                put(&mut bytes, at, &value.to_le_bytes());
            }
        }
        put(
            &mut bytes,
            slot::NEXT_GENERATION,
            &self.next_generation.0.to_le_bytes(),
        );
        put(&mut bytes, slot::TABLE_PAGE, &self.table_page.to_le_bytes());
        put(
            &mut bytes,
            slot::TABLE_GENERATION,
            &self.table_generation.0.to_le_bytes(),
        );
        put(
            &mut bytes,
            slot::LOG_HIGH_WATER,
            &self.log_high_water.to_le_bytes(),
        );
        put(
            &mut bytes,
            slot::TABLE_RECORDS,
            &self.table_records.to_le_bytes(),
        );
        put(
            &mut bytes,
            slot::JOURNAL_GENERATION,
            &self.journal_generation.0.to_le_bytes(),
        );
        put(
            &mut bytes,
            slot::FIRST_SEQUENCE,
            &self.first_sequence.0.to_le_bytes(),
        );
        put(
            &mut bytes,
            slot::APPLIED_THROUGH,
            &self.applied_through.0.to_le_bytes(),
        );
        put(
            &mut bytes,
            slot::JOURNAL_REGION_BYTES,
            &self.journal_region_bytes.to_le_bytes(),
        );
        let crc = crc32c::crc32c(&bytes);
        put(&mut bytes, slot::CRC, &crc.to_le_bytes());
        bytes
    }

    /// Writes the slot of this generation and makes it durable (I7).
    pub(crate) fn store(&self, file: &dyn BlockFile) -> Result<()> {
        let offset_bytes = layout::SLOT_BYTES * u64::from(self.generation.slot() == 1);
        let io = |op, source| StoreError::Io {
            op,
            file: FileName::Superblock,
            offset_bytes,
            source,
        };
        file.write_at(&self.encode(), offset_bytes)
            .map_err(|error| io("write", error))?;
        file.sync_data().map_err(|error| io("sync", error))
    }
}

/// What both slots together say.
pub(crate) enum SlotsFound {
    /// Never written: the adoption did not finish, or did not begin.
    Blank,
    /// The newer valid slot, and the other one if it is valid; `other_damaged` when that holds bytes that do not verify.
    Valid {
        current: Box<Superblock>,
        previous: Option<Box<Superblock>>,
        other_damaged: bool,
    },
}

/// Reads both slots and picks the newer valid one.
pub(crate) fn load(file: &dyn BlockFile) -> Result<SlotsFound> {
    let (a, b) = (
        UnverifiedSuperblock::read(file, 0)?,
        UnverifiedSuperblock::read(file, 1)?,
    );
    let misplaced = |found: Option<Superblock>, at| found.filter(|s| s.generation.slot() == at);
    match (misplaced(a.verify()?, 0), misplaced(b.verify()?, 1)) {
        (None, None) if a.is_blank() && b.is_blank() => Ok(SlotsFound::Blank),
        (None, None) => Err(StoreError::Corrupted {
            file: FileName::Superblock,
            offset_bytes: 0,
            what: "neither slot verifies",
        }),
        (Some(current), None) => Ok(SlotsFound::Valid {
            current: Box::new(current),
            previous: None,
            other_damaged: !b.is_blank(),
        }),
        (None, Some(current)) => Ok(SlotsFound::Valid {
            current: Box::new(current),
            previous: None,
            other_damaged: !a.is_blank(),
        }),
        (Some(first), Some(second)) => {
            let (current, previous) = if first.generation > second.generation {
                (first, second)
            } else {
                (second, first)
            };
            Ok(SlotsFound::Valid {
                current: Box::new(current),
                previous: Some(Box::new(previous)),
                other_damaged: false,
            })
        }
    }
}
