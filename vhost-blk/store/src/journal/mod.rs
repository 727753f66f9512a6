//! The journal: records of 64 bytes, appended through the page cache.
//!
//! `commit`, `write_path`, `snapshot` and `settle` append; `recover` scans. It knows neither what a
//! record does to the index nor when a record is durable.
//! Generations alternate between two regions at the start of the log.
//! Invariants: sequence numbers are consecutive across both regions, incarnations never decrease (I4);
//! a record is one sector's part, whole or absent; nothing is ever written behind a region's end.
#![deny(clippy::indexing_slicing)]

mod codec;

pub(crate) use codec::UnverifiedRecord;

use crate::error::{FileName, Result, StoreError};
use crate::index::Location;
use crate::io::BlockFile;
use crate::layout::{MAX_UNORDERED_BLOCKS, RECORD_BYTES, Seal};
use crate::snapshot_table::Method;
use crate::space::LogRun;
use crate::units::{
    Block, Epoch, Generation, Incarnation, LogBlock, Sequence, SetId, SnapshotId, VolumeId,
    in_memory,
};

/// What one record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// First record of a journal generation.
    Start { generation: Generation },
    /// `count` blocks from `block` live at `location` onwards; with `old` they lived there onwards until
    /// now, and those versions become history of `epoch`.
    Map {
        block: Block,
        count: u32,
        location: Location,
        epoch: Epoch,
        old: Option<Location>,
        /// CRC32C of the bytes at `location`: the record is sealed.
        crc: Option<u32>,
    },
    /// The old contents of `count` blocks were copied to `copy` onwards: history of `epoch`.
    Preserve {
        block: Block,
        count: u32,
        copy: LogBlock,
        epoch: Epoch,
        /// CRC32C of the bytes at `copy`: the record is sealed.
        crc: Option<u32>,
    },
    /// The newest snapshot does not keep its version of `count` blocks: zeroes are history of `epoch` instead.
    LeaveOut {
        block: Block,
        count: u32,
        epoch: Epoch,
    },
    /// `count` blocks are current in the base again.
    Settle { block: Block, count: u32 },
    /// Begins the description of a snapshot.
    SnapId {
        snapshot_id: SnapshotId,
        set_id: SetId,
        created_unix_ms: u64,
    },
    /// One or two members of its set.
    SnapMembers {
        first: VolumeId,
        second: Option<VolumeId>,
    },
    /// Ends the description and takes the snapshot: `epoch` is closed.
    Snap {
        epoch: Epoch,
        method: Method,
        members: u32,
        /// In the snapshot table, if it is not the volume's.
        size_bytes: Option<u64>,
    },
    /// The set's snapshot is kept.
    Keep { set_id: SetId },
    /// The set's snapshot is dropped.
    Discard { set_id: SetId },
    /// The snapshot is dropped.
    Delete { snapshot_id: SnapshotId },
    /// Everything up to `through` holds: if `ordered`, its data was synced before; if not, its sealed records
    /// have to verify. Names the superblock slot that was current, and the last record that had been synced,
    /// so that neither the loss of a slot nor of a record in the middle can pass for an older state.
    Commit {
        through: Sequence,
        superblock: Generation,
        synced: Sequence,
        ordered: bool,
    },
    /// Recovery's word: up to `through` all holds, from there to this record nothing does.
    Restart { through: Sequence },
}

impl Record {
    /// The blocks of the log whose data the record names, and its checksum.
    pub(crate) fn data(&self) -> Option<(LogRun, Option<u32>)> {
        let (start, count, crc) = match self {
            Record::Map {
                location: Location::Log(start),
                count,
                crc,
                ..
            } => (start, count, crc),
            Record::Preserve {
                copy, count, crc, ..
            } => (copy, count, crc),
            Record::Map {
                location: Location::Base | Location::Zero,
                ..
            }
            | Record::Start { .. }
            | Record::LeaveOut { .. }
            | Record::Settle { .. }
            | Record::SnapId { .. }
            | Record::SnapMembers { .. }
            | Record::Snap { .. }
            | Record::Keep { .. }
            | Record::Discard { .. }
            | Record::Delete { .. }
            | Record::Commit { .. }
            | Record::Restart { .. } => return None,
        };
        let run = LogRun {
            start: *start,
            count: u64::from(*count),
        };
        Some((run, *crc))
    }

    /// What the record says of those before it.
    pub(crate) fn closing(&self) -> Option<Closing> {
        match *self {
            Self::Commit {
                through,
                superblock,
                synced,
                ordered,
            } => Some(Closing::Commit {
                through,
                superblock,
                synced,
                ordered,
            }),
            Self::Restart { through } => Some(Closing::Restart { through }),
            Self::Start { .. }
            | Self::Map { .. }
            | Self::Preserve { .. }
            | Self::LeaveOut { .. }
            | Self::Settle { .. }
            | Self::SnapId { .. }
            | Self::SnapMembers { .. }
            | Self::Snap { .. }
            | Self::Keep { .. }
            | Self::Discard { .. }
            | Self::Delete { .. } => None,
        }
    }
}

/// A record about the records before it: as the kinds of [`Record`] with these names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Closing {
    Commit {
        through: Sequence,
        superblock: Generation,
        synced: Sequence,
        ordered: bool,
    },
    Restart {
        through: Sequence,
    },
}

/// A record and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) sequence: Sequence,
    pub(crate) incarnation: Incarnation,
    pub(crate) record: Record,
}

/// Where a generation stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) generation: Generation,
    /// Sequence of its START record.
    pub(crate) first: Sequence,
    /// Sequence of the next record.
    pub(crate) next: Sequence,
    /// Where the next record goes in its region, in bytes.
    pub(crate) end_bytes: u64,
}

/// The write end.
#[derive(Debug)]
pub(crate) struct Journal {
    pub(crate) volume_id: VolumeId,
    pub(crate) region_bytes: u64,
    pub(crate) generation: Generation,
    pub(crate) incarnation: Incarnation,
    /// Generation of the superblock slot that is current.
    pub(crate) superblock: Generation,
    /// No COMMIT names that generation yet, and one has to.
    pub(crate) superblock_unnamed: bool,
    /// Sequence of the START record of this generation.
    pub(crate) first: Sequence,
    /// Sequence of the next record.
    pub(crate) next: Sequence,
    /// Everything below this is durable by a COMMIT or RESTART.
    pub(crate) committed: Sequence,
    /// The watermark: last record that a returned sync of the journal covered.
    pub(crate) synced: Sequence,
    /// Where the next record goes in its region, in bytes.
    pub(crate) end_bytes: u64,
    /// The last SNAP appended.
    last_snap: Option<Sequence>,
    /// The last record appended whose data must be synced before the COMMIT.
    last_unsealed: Option<Sequence>,
    /// Blocks that sealed records name, since the journal was opened.
    pub(crate) sealed_blocks: u64,
    /// The same when the last COMMIT's records were counted.
    pub(crate) sealed_blocks_committed: u64,
    /// It holds bytes that no sync has covered.
    pub(crate) unsynced: bool,
}

impl Journal {
    /// A journal in which all that is there is durable.
    pub(crate) fn new(
        volume_id: VolumeId,
        region_bytes: u64,
        superblock: Generation,
        incarnation: Incarnation,
        place: Place,
    ) -> Journal {
        let last = Sequence(place.next.0.wrapping_sub(1));
        Journal {
            volume_id,
            region_bytes,
            generation: place.generation,
            incarnation,
            superblock,
            superblock_unnamed: false,
            first: place.first,
            next: place.next,
            committed: place.next,
            synced: last,
            end_bytes: place.end_bytes,
            last_snap: None,
            last_unsealed: None,
            sealed_blocks: 0,
            sealed_blocks_committed: 0,
            unsynced: false,
        }
    }

    /// Sequence of the last record appended.
    pub(crate) fn last(&self) -> Sequence {
        Sequence(self.next.0.wrapping_sub(1))
    }

    /// Records that no COMMIT covers.
    pub(crate) fn pending_records(&self) -> u64 {
        self.next.0.wrapping_sub(self.committed.0)
    }

    /// RESTART was synced, and with it everything before.
    pub(crate) fn all_is_durable(&mut self) {
        (self.committed, self.synced) = (self.next, self.last());
        self.unsynced = false;
    }

    /// Whether a snapshot waits for the round that makes it durable.
    pub(crate) fn snap_pending(&self) -> bool {
        self.last_snap.is_some_and(|last| last >= self.committed)
    }

    /// Whether the next round must sync the data before it appends its COMMIT.
    pub(crate) fn needs_order(&self) -> bool {
        self.snap_pending()
            || self
                .last_unsealed
                .is_some_and(|last| last >= self.committed)
            || self.sealed_blocks - self.sealed_blocks_committed > MAX_UNORDERED_BLOCKS
    }

    /// Whether `records` more fit the region. The last part of it is for COMMITs.
    pub(crate) fn has_room(&self, records: u64) -> bool {
        let bytes = records.saturating_mul(RECORD_BYTES as u64);
        self.end_bytes.saturating_add(bytes) <= self.region_bytes - self.region_bytes / 16
    }

    /// Appends `records` with one write. They are in the page cache when it returns: a killed daemon
    /// keeps them, a power cut may not. `NoSpace`: they do not fit, and nothing happened.
    pub(crate) fn append(&mut self, file: &dyn BlockFile, records: &[Record]) -> Result<()> {
        let length_bytes = (records.len() * RECORD_BYTES) as u64;
        let is_commit = matches!(records, [Record::Commit { .. } | Record::Restart { .. }]);
        let fits = self.end_bytes + length_bytes <= self.region_bytes;
        if !fits || !(is_commit || self.has_room(records.len() as u64)) {
            return Err(StoreError::NoSpace);
        }
        let mut bytes = Vec::with_capacity(records.len() * RECORD_BYTES);
        let mut sequence = self.next;
        let (mut last_snap, mut last_unsealed) = (self.last_snap, self.last_unsealed);
        let mut sealed_blocks = 0;
        for record in records {
            match record.data() {
                Some((run, Some(_))) => sealed_blocks += run.count,
                Some((_, None)) => last_unsealed = Some(sequence),
                None => {}
            }
            if let Record::Snap { .. } = record {
                last_snap = Some(sequence);
            }
            let entry = Entry {
                sequence,
                incarnation: self.incarnation,
                record: record.clone(),
            };
            bytes.extend_from_slice(&entry.encode(self.volume_id, Seal::Journal(self.generation)));
            sequence = sequence.next();
        }
        let offset_bytes = region_start(self.region_bytes, self.generation) + self.end_bytes;
        file.write_at(&bytes, offset_bytes)
            .map_err(|source| StoreError::Io {
                op: "append",
                file: FileName::Journal,
                offset_bytes,
                source,
            })?;
        self.unsynced = true;
        (self.last_snap, self.last_unsealed) = (last_snap, last_unsealed);
        self.sealed_blocks += sealed_blocks;
        self.next = sequence;
        self.end_bytes += length_bytes;
        Ok(())
    }

    /// Begins the next generation in the other region. The caller knows that region to be free (I7).
    pub(crate) fn switch(&mut self, file: &dyn BlockFile) -> Result<()> {
        self.generation = self.generation.next();
        self.end_bytes = 0;
        self.first = self.next;
        self.append(
            file,
            &[Record::Start {
                generation: self.generation,
            }],
        )
    }
}

/// Where the region of a generation begins in the log, in bytes.
pub(crate) fn region_start(region_bytes: u64, generation: Generation) -> u64 {
    region_bytes * generation.slot() as u64
}

/// The valid chain found in one journal region.
#[derive(Debug)]
pub(crate) struct Scan {
    pub(crate) entries: Vec<Entry>,
    /// Where the chain ends in its region, in bytes.
    pub(crate) end_bytes: u64,
    /// Records behind a gap that are as young as the chain's end: what a power cut left of the last
    /// round, or the sign of damage.
    pub(crate) behind_gap: Vec<Entry>,
}

/// Reads the chain of `generation` from its region of `file`: it begins with START of sequence `first`, is
/// consecutive, and its incarnations do not decrease from `floor`. An absent chain has no entries.
pub(crate) fn scan(
    file: &dyn BlockFile,
    region_bytes: u64,
    volume: VolumeId,
    generation: Generation,
    first: Sequence,
    floor: Incarnation,
) -> Result<Scan> {
    const CHUNK_RECORDS: usize = 1024;
    // Opening does not read all of a large region to find out that it is empty.
    const GAP_BYTES: u64 = 4 << 20;
    let start_bytes = region_start(region_bytes, generation);
    let io = |source| StoreError::Io {
        op: "read",
        file: FileName::Journal,
        offset_bytes: start_bytes,
        source,
    };
    let length_bytes = file
        .len_bytes()
        .map_err(io)?
        .saturating_sub(start_bytes)
        .min(region_bytes);
    let mut found = Scan {
        entries: Vec::new(),
        end_bytes: 0,
        behind_gap: Vec::new(),
    };
    let (mut expected, mut incarnation, mut whole) = (first, floor, true);
    let mut chunk = vec![0; CHUNK_RECORDS * RECORD_BYTES];
    let mut at_bytes = 0;
    while at_bytes < length_bytes && at_bytes - found.end_bytes < GAP_BYTES {
        let part = in_memory((length_bytes - at_bytes).min(chunk.len() as u64));
        let Some(window) = chunk.get_mut(..part) else {
            break;
        };
        file.read_at(window, start_bytes + at_bytes).map_err(io)?;
        at_bytes += part as u64;
        for bytes in window.as_chunks::<RECORD_BYTES>().0 {
            // What an older generation left in the region is not worth a checksum.
            let raw = UnverifiedRecord(bytes);
            let entry = (raw.sequence() >= expected)
                .then(|| raw.verify(volume, Seal::Journal(generation)))
                .flatten()
                .filter(|entry| entry.incarnation >= incarnation);
            let starts = found.entries.is_empty();
            match entry {
                Some(entry)
                    if whole
                        && entry.sequence == expected
                        && starts == (entry.record == Record::Start { generation }) =>
                {
                    (expected, incarnation) = (expected.next(), entry.incarnation);
                    found.entries.push(entry);
                    found.end_bytes += RECORD_BYTES as u64;
                }
                Some(entry) => {
                    whole = false;
                    found.behind_gap.push(entry);
                }
                None => whole = false,
            }
        }
    }
    Ok(found)
}
