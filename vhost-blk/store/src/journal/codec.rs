//! The 64 bytes of a journal record.
//!
//! `journal` and `recover` use it. Bytes from a disk become a record only through `UnverifiedRecord`.
#![deny(clippy::indexing_slicing)]

use uuid::Uuid;

use super::{Entry, Record};
use crate::index::Location;
use crate::layout::{self, RECORD_BYTES, Seal, kind, put, record, u32_at, u64_at, uuid_at};
use crate::snapshot_table::Method;
use crate::units::{Block, Epoch, Generation, Incarnation, Sequence, SetId, SnapshotId, VolumeId};

/// Bytes of a record as read, before any check.
pub(crate) struct UnverifiedRecord<'a>(pub(crate) &'a [u8; RECORD_BYTES]);

impl UnverifiedRecord<'_> {
    /// Where it says that it belongs.
    pub(crate) fn sequence(&self) -> Sequence {
        Sequence(u64_at(self.0, record::SEQUENCE))
    }

    /// The record, if its checksum and every field hold.
    pub(crate) fn verify(&self, volume: VolumeId, seal: Seal) -> Option<Entry> {
        let bytes = self.0.as_slice();
        let (head, body) = bytes.split_at_checked(record::KIND)?;
        if !layout::checksum_holds(u32_at(head, record::CRC), seal.crc(volume, body)) {
            return None;
        }
        let count = u32_at(bytes, record::COUNT);
        let block = Block(u64_at(bytes, record::BLOCK));
        let epoch = Epoch(u32_at(bytes, record::EPOCH));
        let first_id = uuid_at(bytes, record::FIRST_ID);
        let second_id = uuid_at(bytes, record::SECOND_ID);
        let [flags] = layout::take::<1>(bytes, record::FLAGS);
        let crc = (flags & layout::FLAG_SEALED != 0).then(|| u32_at(bytes, record::DATA_CRC));
        if crc.is_some() && !(1..=layout::MAX_SEALED_BLOCKS).contains(&count) {
            return None;
        }
        let record = match layout::take::<1>(bytes, record::KIND)[0] {
            kind::START => Record::Start {
                generation: Generation(u64_at(bytes, record::GENERATION)),
            },
            kind::MAP => Record::Map {
                block,
                count,
                location: Location::decode(u64_at(bytes, record::LOCATION))?,
                epoch,
                old: match flags & layout::FLAG_HISTORY {
                    0 => None,
                    _ => Some(Location::decode(u64_at(bytes, record::OLD_LOCATION))?),
                },
                crc,
            },
            kind::PRESERVE => match Location::decode(u64_at(bytes, record::LOCATION))? {
                Location::Log(copy) => Record::Preserve {
                    block,
                    count,
                    copy,
                    epoch,
                    crc,
                },
                Location::Base | Location::Zero => return None,
            },
            kind::SETTLE => Record::Settle { block, count },
            kind::LEAVE_OUT => Record::LeaveOut {
                block,
                count,
                epoch,
            },
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
                size_bytes: Some(u64_at(bytes, record::SIZE_BYTES)).filter(|size| *size != 0),
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
                ordered: flags & layout::FLAG_ORDERED != 0,
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
        let flags_and_crc = |bytes: &mut [u8; RECORD_BYTES], mut flags: u8, crc: Option<u32>| {
            if let Some(crc) = crc {
                flags |= layout::FLAG_SEALED;
                put(bytes, record::DATA_CRC, &crc.to_le_bytes());
            }
            put(bytes, record::FLAGS, &[flags]);
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
                old,
                crc,
            } => {
                number(&mut bytes, record::BLOCK, block.0);
                small(&mut bytes, record::COUNT, *count);
                number(&mut bytes, record::LOCATION, location.encode());
                small(&mut bytes, record::EPOCH, epoch.0);
                let mut flags = 0;
                if let Some(old) = old {
                    flags |= layout::FLAG_HISTORY;
                    number(&mut bytes, record::OLD_LOCATION, old.encode());
                }
                flags_and_crc(&mut bytes, flags, *crc);
                kind::MAP
            }
            Record::Preserve {
                block,
                count,
                copy,
                epoch,
                crc,
            } => {
                number(&mut bytes, record::BLOCK, block.0);
                small(&mut bytes, record::COUNT, *count);
                number(&mut bytes, record::LOCATION, Location::Log(*copy).encode());
                small(&mut bytes, record::EPOCH, epoch.0);
                flags_and_crc(&mut bytes, 0, *crc);
                kind::PRESERVE
            }
            Record::LeaveOut {
                block,
                count,
                epoch,
            } => {
                number(&mut bytes, record::BLOCK, block.0);
                small(&mut bytes, record::COUNT, *count);
                small(&mut bytes, record::EPOCH, epoch.0);
                kind::LEAVE_OUT
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
                size_bytes,
            } => {
                number(&mut bytes, record::SIZE_BYTES, size_bytes.unwrap_or(0));
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
                ordered,
            } => {
                if *ordered {
                    put(&mut bytes, record::FLAGS, &[layout::FLAG_ORDERED]);
                }
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
