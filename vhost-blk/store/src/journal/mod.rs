//! The journal: records of 64 bytes, appended through the page cache.
//!
//! `commit`, `write_path`, `snapshot` and `settle` append; `recover` scans. It knows neither what a
//! record does to the index nor when a record is durable.
//! Invariants: sequence numbers are consecutive across both files, incarnations never decrease (I4);
//! a record is one sector's part, whole or absent.
#![deny(clippy::indexing_slicing)]

mod codec;

pub(crate) use codec::UnverifiedRecord;

use crate::error::{FileName, Result, StoreError};
use crate::index::Location;
use crate::io::BlockFile;
use crate::layout::{RECORD_BYTES, Seal};
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
    /// The last SNAP appended.
    pub(crate) last_snap: Option<Sequence>,
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

    /// Whether a snapshot waits for the round that makes it durable.
    pub(crate) fn snap_pending(&self) -> bool {
        self.last_snap.is_some_and(|last| last >= self.committed)
    }

    /// Appends `records` with one write. They are in the page cache when it returns: a killed daemon
    /// keeps them, a power cut may not.
    pub(crate) fn append(
        &mut self,
        files: &[std::sync::Arc<dyn BlockFile>; 2],
        records: &[Record],
    ) -> Result<()> {
        let mut bytes = Vec::with_capacity(records.len() * RECORD_BYTES);
        let (mut sequence, mut last_snap) = (self.next, self.last_snap);
        for record in records {
            let entry = Entry {
                sequence,
                incarnation: self.incarnation,
                record: record.clone(),
            };
            bytes.extend_from_slice(&entry.encode(self.volume_id, Seal::Journal(self.generation)));
            if let Record::Snap { .. } = record {
                last_snap = Some(sequence);
            }
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
        (self.next, self.last_snap) = (sequence, last_snap);
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
