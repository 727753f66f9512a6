//! Every offset, size, limit and magic of the on-disk format, and the byte codecs over them.
//!
//! `superblock`, `journal` and `index` encode and decode with it. No other room holds a format number.
//! FORMAT.md is normative; `tests/format.rs` compares its tables with [`FIELDS`].
#![deny(clippy::indexing_slicing)]

use crate::units::{Generation, VolumeId};

/// First bytes of a superblock slot.
pub(crate) const MAGIC: [u8; 8] = *b"vmshadow";
/// Version of the format this program writes and reads.
pub(crate) const VERSION: u32 = 2;
/// Feature bit: a record of the snapshot table has a size.
pub(crate) const FEATURE_SIZES: u32 = 1;
/// Feature bit: the journal may hold LEAVE_OUT.
pub(crate) const FEATURE_LEAVES_OUT: u32 = 2;
/// Incompatible feature bits this program knows.
pub(crate) const KNOWN_FEATURES: u32 = FEATURE_SIZES | FEATURE_LEAVES_OUT;

/// Bytes of one superblock slot; slot A at 0, slot B behind it.
pub(crate) const SLOT_BYTES: u64 = 4096;
/// Bytes that the checksum of a version 1 slot covered.
pub(crate) const SLOT_V1_BYTES: usize = 512;
/// Bytes of a journal record. Eight fit a sector, so a record is never torn.
pub(crate) const RECORD_BYTES: usize = 64;
/// Bytes of an index page.
pub(crate) const PAGE_BYTES: usize = 4096;
/// Bytes of an index page's header.
pub(crate) const PAGE_HEADER_BYTES: usize = 16;
/// Records of an index page that are stored relative to each other; then it begins anew.
pub(crate) const GROUP_RECORDS: usize = 16;
/// No page of the index has this number, or a higher one.
pub(crate) const MAX_INDEX_PAGES: u64 = 1 << 48;
/// Most runs of an index.
pub(crate) const MAX_RUNS: usize = 64;
/// Bytes of a run's description in a slot.
pub(crate) const RUN_BYTES: usize = 40;

/// Death of a live version.
pub(crate) const LIVE: u32 = u32::MAX;
/// Largest epoch: the one below [`LIVE`] is never reached.
pub(crate) const MAX_EPOCH: u32 = u32::MAX - 2;
/// Most snapshots of one volume.
pub const MAX_SNAPSHOTS: usize = 1 << 16;
/// Most volumes of one set.
pub const MAX_SET_MEMBERS: usize = 256;
/// Largest volume, in bytes: 4 EiB.
pub(crate) const MAX_VOLUME_BYTES: u64 = 1 << 62;
/// Most blocks of a log.
pub(crate) const MAX_LOG_BLOCKS: u64 = 1 << 50;
/// Most blocks one record names: more than the longest request touches.
pub const MAX_RECORD_BLOCKS: u32 = 1 << 15;
/// Bytes of each of the two journal regions at the start of the log, unless adoption is told otherwise.
pub(crate) const JOURNAL_REGION_BYTES: u64 = 32 << 20;
/// Smallest journal region.
pub(crate) const MIN_JOURNAL_REGION_BYTES: u64 = 16 << 10;
/// Largest journal region.
pub(crate) const MAX_JOURNAL_REGION_BYTES: u64 = 1 << 30;
/// Most blocks that a sealed record names.
pub(crate) const MAX_SEALED_BLOCKS: u32 = 16;
/// Most blocks that the sealed records of a round name, if it is not ordered: what recovery may have to read.
pub(crate) const MAX_UNORDERED_BLOCKS: u64 = 4096;
/// Bytes written to each journal at adoption, so that appending allocates nothing.
pub(crate) const JOURNAL_PREWRITTEN_BYTES: u64 = 4 << 20;

/// Slot flag: the volume was closed in order.
pub(crate) const FLAG_CLEAN: u32 = 1;
/// Slot flag: the base's modification time is known.
pub(crate) const FLAG_BASE_TIME: u32 = 2;
/// Slot flag: something may have been dropped that no sweep has freed.
pub(crate) const FLAG_UNSWEPT: u32 = 4;
/// MAP flag: the old live version becomes history of the record's epoch.
pub(crate) const FLAG_HISTORY: u8 = 1;
/// MAP, PRESERVE flag: the record carries the checksum of the data it names.
pub(crate) const FLAG_SEALED: u8 = 2;
/// COMMIT flag: the data was synced before the COMMIT was appended.
pub(crate) const FLAG_ORDERED: u8 = 1;

/// Offsets in a superblock slot.
pub(crate) mod slot {
    pub(crate) const MAGIC: usize = 0;
    pub(crate) const CRC: usize = 8;
    pub(crate) const VERSION: usize = 12;
    pub(crate) const GENERATION: usize = 16;
    pub(crate) const FEATURES: usize = 24;
    pub(crate) const BLOCK_BYTES: usize = 28;
    pub(crate) const VOLUME_ID: usize = 32;
    pub(crate) const SIZE_BYTES: usize = 48;
    pub(crate) const BOOT_ID: usize = 56;
    pub(crate) const INCARNATION: usize = 72;
    pub(crate) const FLAGS: usize = 76;
    pub(crate) const EPOCH: usize = 80;
    pub(crate) const RUN_COUNT: usize = 84;
    pub(crate) const NEXT_GENERATION: usize = 88;
    pub(crate) const TABLE_PAGE: usize = 96;
    pub(crate) const TABLE_GENERATION: usize = 104;
    pub(crate) const TABLE_RECORDS: usize = 112;
    pub(crate) const JOURNAL_GENERATION: usize = 120;
    pub(crate) const FIRST_SEQUENCE: usize = 128;
    pub(crate) const BASE_SECONDS: usize = 136;
    pub(crate) const BASE_NANOSECONDS: usize = 144;
    pub(crate) const APPLIED_THROUGH: usize = 152;
    pub(crate) const JOURNAL_REGION_BYTES: usize = 160;
    pub(crate) const LOG_HIGH_WATER: usize = 168;
    pub(crate) const BASE_BYTES: usize = 176;
    /// Descriptions of the runs, newest first.
    pub(crate) const RUNS: usize = 512;
}

/// Offsets in the description of a run.
pub(crate) mod run {
    pub(crate) const GENERATION: usize = 0;
    pub(crate) const FIRST_PAGE: usize = 8;
    pub(crate) const PAGES: usize = 16;
    pub(crate) const FENCE_PAGES: usize = 24;
    pub(crate) const RECORDS: usize = 32;
}

/// Offsets in a journal record.
pub(crate) mod record {
    pub(crate) const CRC: usize = 0;
    pub(crate) const KIND: usize = 4;
    pub(crate) const FLAGS: usize = 5;
    pub(crate) const RESERVED: usize = 6;
    pub(crate) const INCARNATION: usize = 8;
    pub(crate) const COUNT: usize = 12;
    pub(crate) const SEQUENCE: usize = 16;
    pub(crate) const PAYLOAD: usize = 24;
    /// MAP, PRESERVE, SETTLE, LEAVE_OUT.
    pub(crate) const BLOCK: usize = 24;
    /// MAP, PRESERVE.
    pub(crate) const LOCATION: usize = 32;
    /// MAP, PRESERVE.
    pub(crate) const EPOCH: usize = 40;
    /// MAP, PRESERVE, sealed.
    pub(crate) const DATA_CRC: usize = 44;
    /// MAP with history.
    pub(crate) const OLD_LOCATION: usize = 48;
    /// COMMIT, RESTART.
    pub(crate) const THROUGH: usize = 24;
    /// COMMIT.
    pub(crate) const SUPERBLOCK: usize = 32;
    /// COMMIT.
    pub(crate) const SYNCED: usize = 40;
    /// START.
    pub(crate) const GENERATION: usize = 24;
    /// SNAP_ID, DELETE: snapshot; KEEP, DISCARD: set; SNAP_MEMBERS: first member.
    pub(crate) const FIRST_ID: usize = 24;
    /// SNAP_ID: set; SNAP_MEMBERS: second member.
    pub(crate) const SECOND_ID: usize = 40;
    /// SNAP_ID.
    pub(crate) const CREATED_UNIX_MS: usize = 56;
    /// SNAP.
    pub(crate) const SNAP_EPOCH: usize = 24;
    /// SNAP.
    pub(crate) const METHOD: usize = 28;
    /// SNAP in the snapshot table.
    pub(crate) const SIZE_BYTES: usize = 32;
}

/// Record kinds.
pub(crate) mod kind {
    pub(crate) const START: u8 = 1;
    pub(crate) const MAP: u8 = 2;
    pub(crate) const PRESERVE: u8 = 3;
    pub(crate) const SETTLE: u8 = 4;
    pub(crate) const SNAP_ID: u8 = 5;
    pub(crate) const SNAP_MEMBERS: u8 = 6;
    pub(crate) const SNAP: u8 = 7;
    pub(crate) const KEEP: u8 = 8;
    pub(crate) const DISCARD: u8 = 9;
    pub(crate) const DELETE: u8 = 10;
    pub(crate) const COMMIT: u8 = 11;
    pub(crate) const RESTART: u8 = 12;
    pub(crate) const LEAVE_OUT: u8 = 13;
}

/// Offsets in an index page.
pub(crate) mod page {
    pub(crate) const CRC: usize = 0;
    pub(crate) const RECORDS: usize = 4;
    pub(crate) const GROUPS: usize = 6;
    pub(crate) const BODY_BYTES: usize = 8;
}

/// One row of a byte table: structure, field, offset, length in bytes.
pub type Field = (&'static str, &'static str, usize, usize);

/// The byte tables of the format, for the comparison with FORMAT.md.
pub const FIELDS: &[Field] = &[
    ("slot", "magic", slot::MAGIC, 8),
    ("slot", "crc", slot::CRC, 4),
    ("slot", "version", slot::VERSION, 4),
    ("slot", "generation", slot::GENERATION, 8),
    ("slot", "features", slot::FEATURES, 4),
    ("slot", "block_bytes", slot::BLOCK_BYTES, 4),
    ("slot", "volume_id", slot::VOLUME_ID, 16),
    ("slot", "size_bytes", slot::SIZE_BYTES, 8),
    ("slot", "boot_id", slot::BOOT_ID, 16),
    ("slot", "incarnation", slot::INCARNATION, 4),
    ("slot", "flags", slot::FLAGS, 4),
    ("slot", "epoch", slot::EPOCH, 4),
    ("slot", "run_count", slot::RUN_COUNT, 4),
    ("slot", "next_generation", slot::NEXT_GENERATION, 8),
    ("slot", "table_page", slot::TABLE_PAGE, 8),
    ("slot", "table_generation", slot::TABLE_GENERATION, 8),
    ("slot", "table_records", slot::TABLE_RECORDS, 8),
    ("slot", "journal_generation", slot::JOURNAL_GENERATION, 8),
    ("slot", "first_sequence", slot::FIRST_SEQUENCE, 8),
    ("slot", "base_seconds", slot::BASE_SECONDS, 8),
    ("slot", "base_nanoseconds", slot::BASE_NANOSECONDS, 4),
    ("slot", "applied_through", slot::APPLIED_THROUGH, 8),
    (
        "slot",
        "journal_region_bytes",
        slot::JOURNAL_REGION_BYTES,
        8,
    ),
    ("slot", "log_high_water", slot::LOG_HIGH_WATER, 8),
    ("slot", "base_bytes", slot::BASE_BYTES, 8),
    ("slot", "runs", slot::RUNS, MAX_RUNS * RUN_BYTES),
    ("run", "generation", run::GENERATION, 8),
    ("run", "first_page", run::FIRST_PAGE, 8),
    ("run", "pages", run::PAGES, 8),
    ("run", "fence_pages", run::FENCE_PAGES, 8),
    ("run", "records", run::RECORDS, 8),
    ("record", "crc", record::CRC, 4),
    ("record", "kind", record::KIND, 1),
    ("record", "flags", record::FLAGS, 1),
    ("record", "reserved", record::RESERVED, 2),
    ("record", "incarnation", record::INCARNATION, 4),
    ("record", "count", record::COUNT, 4),
    ("record", "sequence", record::SEQUENCE, 8),
    ("record", "payload", record::PAYLOAD, 40),
    ("payload", "map.block", record::BLOCK, 8),
    ("payload", "map.location", record::LOCATION, 8),
    ("payload", "map.epoch", record::EPOCH, 4),
    ("payload", "map.data_crc", record::DATA_CRC, 4),
    ("payload", "map.old_location", record::OLD_LOCATION, 8),
    ("payload", "commit.through", record::THROUGH, 8),
    ("payload", "commit.superblock", record::SUPERBLOCK, 8),
    ("payload", "commit.synced", record::SYNCED, 8),
    ("payload", "start.generation", record::GENERATION, 8),
    ("payload", "snap_id.snapshot_id", record::FIRST_ID, 16),
    ("payload", "snap_id.set_id", record::SECOND_ID, 16),
    (
        "payload",
        "snap_id.created_unix_ms",
        record::CREATED_UNIX_MS,
        8,
    ),
    ("payload", "snap.epoch", record::SNAP_EPOCH, 4),
    ("payload", "snap.method", record::METHOD, 4),
    ("payload", "snap.size_bytes", record::SIZE_BYTES, 8),
    ("page", "crc", page::CRC, 4),
    ("page", "records", page::RECORDS, 2),
    ("page", "groups", page::GROUPS, 2),
    ("page", "body_bytes", page::BODY_BYTES, 2),
];

/// The kinds of journal records by name, for the comparison with FORMAT.md.
pub const KINDS: &[(&str, u8)] = &[
    ("START", kind::START),
    ("MAP", kind::MAP),
    ("PRESERVE", kind::PRESERVE),
    ("SETTLE", kind::SETTLE),
    ("SNAP_ID", kind::SNAP_ID),
    ("SNAP_MEMBERS", kind::SNAP_MEMBERS),
    ("SNAP", kind::SNAP),
    ("KEEP", kind::KEEP),
    ("DISCARD", kind::DISCARD),
    ("DELETE", kind::DELETE),
    ("COMMIT", kind::COMMIT),
    ("RESTART", kind::RESTART),
    ("LEAVE_OUT", kind::LEAVE_OUT),
];

/// What a checksum is seeded with, so that bytes of one place never pass in another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seal {
    /// A journal record of this generation.
    Journal(Generation),
    /// A page of the run of this generation.
    Page(Generation, u64),
    /// A page of its fences.
    Fence(Generation, u64),
    /// A record of the snapshot table of this generation.
    Table(Generation),
}

impl Seal {
    /// CRC32C of what the seal stands for and of `bytes`.
    pub(crate) fn crc(self, volume: VolumeId, bytes: &[u8]) -> u32 {
        let (tag, generation, number) = match self {
            Seal::Journal(generation) => (b'J', generation, 0),
            Seal::Page(generation, number) => (b'P', generation, number),
            Seal::Fence(generation, number) => (b'F', generation, number),
            Seal::Table(generation) => (b'T', generation, 0),
        };
        let mut seed = [0; 33];
        put(&mut seed, 0, &[tag]);
        put(&mut seed, 1, volume.0.as_bytes());
        put(&mut seed, 17, &generation.0.to_le_bytes());
        put(&mut seed, 25, &number.to_le_bytes());
        crc32c::crc32c_append(crc32c::crc32c(&seed), bytes)
    }
}

/// Whether a checksum of metadata that was read is the one that was computed. Every parser asks here, so that
/// fuzzing may get behind the checksums (feature `sim`).
pub(crate) fn checksum_holds(stored: u32, computed: u32) -> bool {
    #[cfg(feature = "sim")]
    if crate::sim::checksums_are_trusted() {
        return true;
    }
    stored == computed
}

/// Copies `source` to offset `at`; the offsets are constants above, so it always fits.
pub(crate) fn put(bytes: &mut [u8], at: usize, source: &[u8]) {
    debug_assert!(at + source.len() <= bytes.len());
    if let Some(target) = bytes.get_mut(at..at + source.len()) {
        target.copy_from_slice(source);
    }
}

/// `N` bytes at offset `at`, zeroes where `bytes` is too short.
pub(crate) fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    debug_assert!(at + N <= bytes.len());
    bytes
        .get(at..at + N)
        .and_then(|part| part.try_into().ok())
        .unwrap_or([0; N])
}

/// The lowest eight bits.
pub(crate) fn low_byte(value: u64) -> u8 {
    let [low, ..] = value.to_le_bytes();
    low
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(take(bytes, at))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(take(bytes, at))
}

pub(crate) fn uuid_at(bytes: &[u8], at: usize) -> uuid::Uuid {
    uuid::Uuid::from_bytes(take(bytes, at))
}
