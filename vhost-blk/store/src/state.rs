//! What the journal adds up to: the index, the snapshot table and the epoch; and how a record changes it.
//!
//! Writing and recovery both go through here, so that what was acknowledged and what is replayed can
//! never mean different things. It does no I/O: a record says all that its change needs.
//! Invariants: a record names only blocks of the volume, and the current epoch (I2, I5).
#![deny(clippy::indexing_slicing)]

use crate::error::{FileName, Result, StoreError};
use crate::index::{Index, Key, Location};
use crate::journal::Record;
use crate::layout::{self, MAX_EPOCH};
use crate::snapshot_table::{SnapshotInfo, SnapshotState, SnapshotTable};
use crate::units::{
    BLOCK_BYTES, Block, Epoch, LogBlock, SECTOR_BYTES, SetId, SnapshotId, VolumeId,
};

/// A snapshot whose description is not complete.
#[derive(Debug)]
struct Parts {
    snapshot_id: SnapshotId,
    set_id: SetId,
    created_unix_ms: u64,
    members: Vec<VolumeId>,
}

/// The state of a volume.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) index: Index,
    pub(crate) table: SnapshotTable,
    /// The epoch that is open.
    pub(crate) epoch: Epoch,
    size_bytes: u64,
    parts: Option<Parts>,
}

/// What records do to the index, in their order.
pub(crate) type Puts = Vec<(Key, Location)>;

fn broken(what: &'static str) -> StoreError {
    StoreError::Corrupted {
        file: FileName::Journal,
        offset_bytes: 0,
        what,
    }
}

impl State {
    pub(crate) fn new(index: Index, epoch: Epoch, size_bytes: u64) -> State {
        State {
            index,
            table: SnapshotTable::default(),
            epoch,
            size_bytes,
            parts: None,
        }
    }

    /// The volume has another size: a slot says so, or the base was resized while nothing depended on it.
    pub(crate) fn resize(&mut self, size_bytes: u64) {
        self.size_bytes = size_bytes;
    }

    /// First block that no snapshot sees.
    pub(crate) fn snapshots_end(&self) -> Block {
        let newest = self.table.newest().map_or(0, |newest| newest.size_bytes);
        Block(newest.div_ceil(BLOCK_BYTES))
    }

    /// Epoch of the newest snapshot.
    pub(crate) fn floor(&self) -> Option<Epoch> {
        self.table.newest().map(|snapshot| snapshot.epoch)
    }

    fn last_of(&self, block: Block, count: u32) -> Result<Block> {
        let few = count > 0 && count <= layout::MAX_RECORD_BLOCKS;
        let last = block.0.checked_add(u64::from(count)).filter(|_| few);
        match last {
            Some(behind) if behind <= self.size_bytes.div_ceil(BLOCK_BYTES) => {
                Ok(Block(behind - 1))
            }
            Some(_) | None => Err(broken(
                "a record names too many blocks, or some outside the volume (I2)",
            )),
        }
    }

    /// Adds what `record` will do to the index. All that can fail is here; [`State::apply`] cannot.
    pub(crate) fn puts(&self, record: &Record, puts: &mut Puts) -> Result<()> {
        match record {
            Record::Map {
                block,
                count,
                location,
                epoch,
                old,
                crc: _,
            } => {
                self.last_of(*block, *count)?;
                self.check_epoch(*epoch)?;
                if let Location::Log(start) = location {
                    check_log_run(*start, *count)?;
                }
                if *location == Location::Base {
                    return Err(broken("MAP to the base"));
                }
                if let Some(Location::Log(start)) = old {
                    check_log_run(*start, *count)?;
                }
                for place in 0..u64::from(*count) {
                    let block = block.plus(place);
                    if let Some(old) = old {
                        puts.push((Key::history(block, *epoch), old.plus(place)));
                    }
                    puts.push((Key::live(block), location.plus(place)));
                }
            }
            Record::Preserve {
                block,
                count,
                copy,
                epoch,
                crc: _,
            } => {
                self.last_of(*block, *count)?;
                self.check_epoch(*epoch)?;
                check_log_run(*copy, *count)?;
                for place in 0..u64::from(*count) {
                    let key = Key::history(block.plus(place), *epoch);
                    puts.push((key, Location::Log(copy.plus(place))));
                }
            }
            Record::LeaveOut {
                block,
                count,
                epoch,
            } => {
                self.last_of(*block, *count)?;
                self.check_epoch(*epoch)?;
                for place in 0..u64::from(*count) {
                    puts.push((Key::history(block.plus(place), *epoch), Location::Zero));
                }
            }
            Record::Settle { block, count } => {
                self.last_of(*block, *count)?;
                for place in 0..u64::from(*count) {
                    puts.push((Key::live(block.plus(place)), Location::Base));
                }
            }
            Record::Start { .. }
            | Record::SnapId { .. }
            | Record::SnapMembers { .. }
            | Record::Snap { .. }
            | Record::Keep { .. }
            | Record::Discard { .. }
            | Record::Delete { .. }
            | Record::Commit { .. }
            | Record::Restart { .. } => {}
        }
        Ok(())
    }

    /// Whether the blocks of a MAP with history live where it says. Asks the index: for debug builds alone.
    pub(crate) fn old_is_live(&mut self, record: &Record) -> bool {
        let Record::Map {
            block,
            count,
            old: Some(old),
            ..
        } = record
        else {
            return true;
        };
        let last = block.plus(u64::from(*count).saturating_sub(1));
        // A page that cannot be read proves nothing.
        self.index
            .states(*block, last, None)
            .map_or(true, |states| {
                (0..)
                    .zip(states)
                    .all(|(place, state)| state.live == old.plus(place))
            })
    }

    fn check_epoch(&self, epoch: Epoch) -> Result<()> {
        if epoch == self.epoch {
            Ok(())
        } else {
            Err(broken("a record of another epoch (I5)"))
        }
    }

    /// Makes the change to everything but the index.
    pub(crate) fn apply(&mut self, record: &Record) {
        match record {
            Record::SnapId {
                snapshot_id,
                set_id,
                created_unix_ms,
            } => {
                self.parts = Some(Parts {
                    snapshot_id: *snapshot_id,
                    set_id: *set_id,
                    created_unix_ms: *created_unix_ms,
                    members: Vec::new(),
                });
            }
            Record::SnapMembers { first, second } => {
                if let Some(parts) = &mut self.parts
                    && parts.members.len() < layout::MAX_SET_MEMBERS
                {
                    parts.members.push(*first);
                    parts.members.extend(*second);
                }
            }
            Record::Snap {
                epoch,
                method,
                members: _,
                size_bytes,
            } => {
                if let Some(parts) = self.parts.take() {
                    self.table.push(SnapshotInfo {
                        snapshot_id: parts.snapshot_id,
                        set_id: parts.set_id,
                        epoch: *epoch,
                        method: *method,
                        size_bytes: size_bytes.unwrap_or(self.size_bytes),
                        state: SnapshotState::Provisional,
                        created_unix_ms: parts.created_unix_ms,
                        members: parts.members,
                    });
                }
                self.epoch = Epoch(epoch.0.saturating_add(1).min(MAX_EPOCH));
            }
            Record::Keep { set_id } => self.table.keep_set(*set_id),
            Record::Discard { set_id } => self.table.remove_set(*set_id),
            Record::Delete { snapshot_id } => self.table.remove(*snapshot_id),
            Record::Restart { .. } => self.parts = None,
            Record::Start { .. }
            | Record::Map { .. }
            | Record::Preserve { .. }
            | Record::LeaveOut { .. }
            | Record::Settle { .. }
            | Record::Commit { .. } => {}
        }
    }

    /// Whether a SNAP record may follow now; recovery refuses one that may not.
    pub(crate) fn check_snap(&self, record: &Record) -> Result<()> {
        if let Record::Snap {
            epoch,
            members,
            size_bytes,
            method: _,
        } = record
        {
            let Some(parts) = &self.parts else {
                return Err(broken("SNAP without its ids"));
            };
            if u32::try_from(parts.members.len()) != Ok(*members) {
                return Err(broken("SNAP with other members than announced"));
            }
            if self.table.get(parts.snapshot_id).is_some()
                || self.table.of_set(parts.set_id).is_some()
            {
                return Err(broken("SNAP of a snapshot that exists"));
            }
            if epoch.0 == 0 || epoch.0 >= MAX_EPOCH || self.floor().is_some_and(|f| f >= *epoch) {
                return Err(broken("SNAP out of order (I5)"));
            }
            let size_bytes = size_bytes.unwrap_or(self.size_bytes);
            let least = self.table.newest().map_or(0, |newest| newest.size_bytes);
            if !size_bytes.is_multiple_of(SECTOR_BYTES)
                || size_bytes < least
                || size_bytes > self.size_bytes
            {
                return Err(broken("SNAP of a size that the volume did not have (I11)"));
            }
        }
        Ok(())
    }
}

fn check_log_run(start: LogBlock, count: u32) -> Result<()> {
    if start.0 + u64::from(count) <= layout::MAX_LOG_BLOCKS {
        Ok(())
    } else {
        Err(broken("a record names blocks outside the log"))
    }
}
