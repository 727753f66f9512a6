//! The journal: records of 64 bytes, appended through the page cache.
//!
//! `commit`, `write_path`, `snapshot` and `settle` append; `recover` scans. It knows neither what a
//! record does to the index nor when a record is durable.
//! Invariants: sequence numbers are consecutive across both files, incarnations never decrease (I4);
//! a record is one sector's part, whole or absent.
#![deny(clippy::indexing_slicing)]

use uuid::Uuid;

use crate::error::{FileName, Result, StoreError};
use crate::index::Location;
use crate::io::BlockFile;
use crate::layout::{self, RECORD_BYTES, Seal, kind, put, record, u32_at, u64_at, uuid_at};
use crate::snapshot_table::Method;
use crate::units::{
    Block, Epoch, Generation, Incarnation, LogBlock, Sequence, SetId, SnapshotId, VolumeId,
    in_memory,
};

/// What one record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// First record of a journal generation.
    Start { generation: Generation },
    /// `count` blocks from `block` live at `location` onwards; with `history` their old live versions
    /// become history of `epoch`.
    Map {
        block: Block,
        count: u32,
        location: Location,
        epoch: Epoch,
        history: bool,
    },
    /// The old contents of `count` blocks were copied to `copy` onwards: history of `epoch`.
    Preserve {
        block: Block,
        count: u32,
        copy: LogBlock,
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
    },
    /// The set's snapshot is kept.
    Keep { set_id: SetId },
    /// The set's snapshot is dropped.
    Discard { set_id: SetId },
    /// The snapshot is dropped.
    Delete { snapshot_id: SnapshotId },
    /// Everything up to `through` is durable, data included. Names the superblock slot that was current,
    /// and the last record that had been synced, so that neither the loss of a slot nor of a record in the
    /// middle can pass for an older state.
    Commit {
        through: Sequence,
        superblock: Generation,
        synced: Sequence,
    },
    /// Recovery's word: up to `through` all holds, from there to this record nothing does.
    Restart { through: Sequence },
}

/// A record and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) sequence: Sequence,
    pub(crate) incarnation: Incarnation,
    pub(crate) record: Record,
}

/// Bytes of a record as read, before any check.
pub(crate) struct UnverifiedRecord<'a>(pub(crate) &'a [u8; RECORD_BYTES]);

impl UnverifiedRecord<'_> {
    /// The record, if its checksum and every field hold.
    pub(crate) fn verify(&self, volume: VolumeId, seal: Seal) -> Option<Entry> {
        let bytes = self.0.as_slice();
        let (head, body) = bytes.split_at_checked(record::KIND)?;
        if u32_at(head, record::CRC) != seal.crc(volume, body) {
            return None;
        }
        let count = u32_at(bytes, record::COUNT);
        let block = Block(u64_at(bytes, record::BLOCK));
        let epoch = Epoch(u32_at(bytes, record::EPOCH));
        let first_id = uuid_at(bytes, record::FIRST_ID);
        let second_id = uuid_at(bytes, record::SECOND_ID);
        let flags = layout::take::<1>(bytes, record::FLAGS);
        let record = match layout::take::<1>(bytes, record::KIND)[0] {
            kind::START => Record::Start {
                generation: Generation(u64_at(bytes, record::GENERATION)),
            },
            kind::MAP => Record::Map {
                block,
                count,
                location: Location::decode(u64_at(bytes, record::LOCATION))?,
                epoch,
                history: flags[0] & layout::FLAG_HISTORY != 0,
            },
            kind::PRESERVE => match Location::decode(u64_at(bytes, record::LOCATION))? {
                Location::Log(copy) => Record::Preserve {
                    block,
                    count,
                    copy,
                    epoch,
                },
                Location::Base | Location::Zero => return None,
            },
            kind::SETTLE => Record::Settle { block, count },
            kind::SNAP_ID => Record::SnapId {
                snapshot_id: SnapshotId(first_id),
                set_id: SetId(second_id),
                created_unix_ms: u64_at(bytes, record::CREATED_UNIX_MS),
            },
            kind::SNAP_MEMBERS => Record::SnapMembers {
                first: VolumeId(first_id),
                second: match count {
                    1 => None,
                    2 => Some(VolumeId(second_id)),
                    _ => return None,
                },
            },
            kind::SNAP => Record::Snap {
                epoch: Epoch(u32_at(bytes, record::SNAP_EPOCH)),
                method: Method::decode(u32_at(bytes, record::METHOD))?,
                members: count,
            },
            kind::KEEP => Record::Keep {
                set_id: SetId(first_id),
            },
            kind::DISCARD => Record::Discard {
                set_id: SetId(first_id),
            },
            kind::DELETE => Record::Delete {
                snapshot_id: SnapshotId(first_id),
            },
            kind::COMMIT => Record::Commit {
                through: Sequence(u64_at(bytes, record::THROUGH)),
                superblock: Generation(u64_at(bytes, record::SUPERBLOCK)),
                synced: Sequence(u64_at(bytes, record::SYNCED)),
            },
            kind::RESTART => Record::Restart {
                through: Sequence(u64_at(bytes, record::THROUGH)),
            },
            _ => return None,
        };
        Some(Entry {
            sequence: Sequence(u64_at(bytes, record::SEQUENCE)),
            incarnation: Incarnation(u32_at(bytes, record::INCARNATION)),
            record,
        })
    }
}

impl Entry {
    pub(crate) fn encode(&self, volume: VolumeId, seal: Seal) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        let number = |bytes: &mut [u8; RECORD_BYTES], at, value: u64| {
            put(bytes, at, &value.to_le_bytes());
        };
        let small = |bytes: &mut [u8; RECORD_BYTES], at, value: u32| {
            put(bytes, at, &value.to_le_bytes());
        };
        let id = |bytes: &mut [u8; RECORD_BYTES], at, value: Uuid| put(bytes, at, value.as_bytes());
        let kind = match &self.record {
            Record::Start { generation } => {
                number(&mut bytes, record::GENERATION, generation.0);
                kind::START
            }
            Record::Map {
                block,
                count,
                location,
                epoch,
                history,
            } => {
                number(&mut bytes, record::BLOCK, block.0);
                small(&mut bytes, record::COUNT, *count);
                number(&mut bytes, record::LOCATION, location.encode());
                small(&mut bytes, record::EPOCH, epoch.0);
                if *history {
                    put(&mut bytes, record::FLAGS, &[layout::FLAG_HISTORY]);
                }
                kind::MAP
            }
            Record::Preserve {
                block,
                count,
                copy,
                epoch,
            } => {
                number(&mut bytes, record::BLOCK, block.0);
                small(&mut bytes, record::COUNT, *count);
                number(&mut bytes, record::LOCATION, Location::Log(*copy).encode());
                small(&mut bytes, record::EPOCH, epoch.0);
                kind::PRESERVE
            }
            Record::Settle { block, count } => {
                number(&mut bytes, record::BLOCK, block.0);
                small(&mut bytes, record::COUNT, *count);
                kind::SETTLE
            }
            Record::SnapId {
                snapshot_id,
                set_id,
                created_unix_ms,
            } => {
                id(&mut bytes, record::FIRST_ID, snapshot_id.0);
                id(&mut bytes, record::SECOND_ID, set_id.0);
                number(&mut bytes, record::CREATED_UNIX_MS, *created_unix_ms);
                kind::SNAP_ID
            }
            Record::SnapMembers { first, second } => {
                id(&mut bytes, record::FIRST_ID, first.0);
                let mut count = 1;
                if let Some(second) = second {
                    id(&mut bytes, record::SECOND_ID, second.0);
                    count = 2;
                }
                small(&mut bytes, record::COUNT, count);
                kind::SNAP_MEMBERS
            }
            Record::Snap {
                epoch,
                method,
                members,
            } => {
                small(&mut bytes, record::SNAP_EPOCH, epoch.0);
                small(&mut bytes, record::METHOD, method.encode());
                small(&mut bytes, record::COUNT, *members);
                kind::SNAP
            }
            Record::Keep { set_id } => {
                id(&mut bytes, record::FIRST_ID, set_id.0);
                kind::KEEP
            }
            Record::Discard { set_id } => {
                id(&mut bytes, record::FIRST_ID, set_id.0);
                kind::DISCARD
            }
            Record::Delete { snapshot_id } => {
                id(&mut bytes, record::FIRST_ID, snapshot_id.0);
                kind::DELETE
            }
            Record::Commit {
                through,
                superblock,
                synced,
            } => {
                number(&mut bytes, record::SYNCED, synced.0);
                number(&mut bytes, record::THROUGH, through.0);
                number(&mut bytes, record::SUPERBLOCK, superblock.0);
                kind::COMMIT
            }
            Record::Restart { through } => {
                number(&mut bytes, record::THROUGH, through.0);
                kind::RESTART
            }
        };
        put(&mut bytes, record::KIND, &[kind]);
        small(&mut bytes, record::INCARNATION, self.incarnation.0);
        number(&mut bytes, record::SEQUENCE, self.sequence.0);
        let crc = seal.crc(volume, bytes.get(record::KIND..).unwrap_or_default());
        put(&mut bytes, record::CRC, &crc.to_le_bytes());
        bytes
    }
}

/// The write end.
#[derive(Debug)]
pub(crate) struct Journal {
    pub(crate) volume_id: VolumeId,
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
    /// Last record that a completed sync of the journal covered.
    pub(crate) synced: Sequence,
    /// Where the next record goes, in bytes.
    pub(crate) end_bytes: u64,
    /// Which of the two files hold bytes that no sync has covered.
    pub(crate) unsynced: [bool; 2],
}

impl Journal {
    /// Sequence of the last record appended.
    pub(crate) fn last(&self) -> Sequence {
        Sequence(self.next.0.wrapping_sub(1))
    }

    /// Records that no COMMIT covers.
    pub(crate) fn pending_records(&self) -> u64 {
        self.next.0.wrapping_sub(self.committed.0)
    }

    /// Appends `records` with one write. They are in the page cache when it returns: a killed daemon
    /// keeps them, a power cut may not.
    pub(crate) fn append(
        &mut self,
        files: &[std::sync::Arc<dyn BlockFile>; 2],
        records: &[Record],
    ) -> Result<()> {
        let mut bytes = Vec::with_capacity(records.len() * RECORD_BYTES);
        let mut sequence = self.next;
        for record in records {
            let entry = Entry {
                sequence,
                incarnation: self.incarnation,
                record: record.clone(),
            };
            bytes.extend_from_slice(&entry.encode(self.volume_id, Seal::Journal(self.generation)));
            sequence = sequence.next();
        }
        let [first, second] = files;
        let file = if self.generation.slot() == 0 {
            first
        } else {
            second
        };
        file.write_at(&bytes, self.end_bytes)
            .map_err(|source| StoreError::Io {
                op: "append",
                file: FileName::Journal,
                offset_bytes: self.end_bytes,
                source,
            })?;
        if let Some(unsynced) = self.unsynced.get_mut(self.generation.slot()) {
            *unsynced = true;
        }
        self.next = sequence;
        self.end_bytes += bytes.len() as u64;
        Ok(())
    }

    /// Begins the next generation in the other file. The caller knows that file to be free (I7).
    pub(crate) fn switch(&mut self, files: &[std::sync::Arc<dyn BlockFile>; 2]) -> Result<()> {
        self.generation = self.generation.next();
        self.end_bytes = 0;
        self.first = self.next;
        self.append(
            files,
            &[Record::Start {
                generation: self.generation,
            }],
        )
    }
}

/// The valid chain found in one journal file.
#[derive(Debug)]
pub(crate) struct Scan {
    pub(crate) entries: Vec<Entry>,
    /// Where the chain ends, in bytes.
    pub(crate) end_bytes: u64,
    /// Records behind a gap that are as young as the chain's end: what a power cut left of the last
    /// round, or the sign of damage.
    pub(crate) behind_gap: Vec<Entry>,
}

/// Reads the chain of `generation` from `file`: it begins with START of sequence `first`, is
/// consecutive, and its incarnations do not decrease from `floor`. An absent chain has no entries.
pub(crate) fn scan(
    file: &dyn BlockFile,
    volume: VolumeId,
    generation: Generation,
    first: Sequence,
    floor: Incarnation,
) -> Result<Scan> {
    const CHUNK_RECORDS: usize = 1024;
    let io = |source| StoreError::Io {
        op: "read",
        file: FileName::Journal,
        offset_bytes: 0,
        source,
    };
    let length_bytes = file.len_bytes().map_err(io)?;
    let mut found = Scan {
        entries: Vec::new(),
        end_bytes: 0,
        behind_gap: Vec::new(),
    };
    let (mut expected, mut incarnation, mut whole) = (first, floor, true);
    let mut chunk = vec![0; CHUNK_RECORDS * RECORD_BYTES];
    let mut at_bytes = 0;
    while at_bytes < length_bytes {
        let part = in_memory((length_bytes - at_bytes).min(chunk.len() as u64));
        let Some(window) = chunk.get_mut(..part) else {
            break;
        };
        file.read_at(window, at_bytes).map_err(io)?;
        at_bytes += part as u64;
        for bytes in window.as_chunks::<RECORD_BYTES>().0 {
            let entry = UnverifiedRecord(bytes)
                .verify(volume, Seal::Journal(generation))
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
                    if entry.sequence >= expected {
                        found.behind_gap.push(entry);
                    }
                }
                None => whole = false,
            }
        }
    }
    Ok(found)
}
