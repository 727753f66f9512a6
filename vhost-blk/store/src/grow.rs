//! Growing a volume while it is served, and cutting its base off where it is longer than the volume.
//!
//! The daemon calls it through `Volume`; `open` and `snapshot` cut the base off with it. The size itself changes with the slot of a
//! checkpoint (`checkpoint`).
//! Invariant I11: the base is at least as long as the volume, at every moment; it is extended, durably, before the slot that says so,
//! and cut off after it. What a slot does not announce as `base_bytes` is never cut off.

use std::sync::atomic::Ordering;

use crate::checkpoint::Turn;
use crate::error::{FileName, Result, StoreError};
use crate::index::Location;
use crate::layout::MAX_VOLUME_BYTES;
use crate::snapshot::Hold;
use crate::superblock::Superblock;
use crate::units::{BLOCK_BYTES, ByteRange, SECTOR_BYTES, in_memory};
use crate::volume::{Maintenance, Shared, Volume, lock};

fn base_error(op: &'static str, offset_bytes: u64) -> impl Fn(std::io::Error) -> StoreError {
    move |source| StoreError::Io {
        op,
        file: FileName::Base,
        offset_bytes,
        source,
    }
}

impl Shared {
    /// Whether the volume may get this size; `false` if it has it.
    fn check_growth(&self, wanted_bytes: u64) -> Result<bool> {
        self.check_writable()?;
        let refused = |why| StoreError::BadSize { wanted_bytes, why };
        if !wanted_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(refused("it is not a multiple of 512"));
        }
        if wanted_bytes > MAX_VOLUME_BYTES {
            return Err(refused("the format ends at 4 EiB"));
        }
        if wanted_bytes < self.size_bytes() {
            return Err(refused("a volume does not shrink"));
        }
        Ok(wanted_bytes > self.size_bytes())
    }

    /// Makes the base long enough, durably. The volume has its old size still: what fails leaves at most a base that is longer, which
    /// a slot announces.
    fn extend_base(&self, work: &mut Maintenance, wanted_bytes: u64) -> Result<()> {
        let base = &self.files.base;
        let length_bytes = base.len_bytes().map_err(base_error("measure", 0))?;
        if base.is_device() {
            if length_bytes < wanted_bytes {
                return Err(StoreError::BadSize {
                    wanted_bytes,
                    why: "the block device under it is shorter",
                });
            }
            return Ok(());
        }
        if work.extended_bytes == wanted_bytes && length_bytes == wanted_bytes {
            return Ok(());
        }
        let announced = Superblock {
            base_bytes: wanted_bytes.max(length_bytes),
            ..work.superblock.clone()
        };
        self.flip(work, announced).inspect_err(|_| self.poison())?;
        let size_bytes = self.size_bytes();
        let set_len = |length_bytes| {
            let done = base.set_len(length_bytes);
            done.map_err(base_error("resize", length_bytes))
        };
        let extended = match length_bytes > size_bytes {
            // Left by one that failed: whatever is there is nobody's.
            true => set_len(size_bytes),
            false => Ok(()),
        };
        let extended = extended.and_then(|()| set_len(wanted_bytes));
        if extended.is_err() {
            drop(self.cut_base(work));
        }
        extended?;
        self.sync(&**base, FileName::Base)?;
        work.extended_bytes = wanted_bytes;
        Ok(())
    }

    /// The base was resized while nothing depended on it, and the volume was not open: it has that size from now on. By a checkpoint
    /// (I11): the table and the journal that the slot names may know snapshots that were dropped, of sizes that are none any more.
    pub(crate) fn follow_base(&self, size_bytes: u64) -> Result<()> {
        let mut work = lock(&self.maintenance);
        self.begin_checkpoint(&mut work, Turn::Grow(size_bytes))?;
        self.run_checkpoint(&mut work)
    }

    /// Cuts the base off behind the volume's end, where a slot has announced that it may be longer. The next slot announces nothing.
    pub(crate) fn cut_base(&self, work: &mut Maintenance) -> Result<()> {
        let base = &self.files.base;
        work.extended_bytes = 0;
        if work.superblock.base_bytes == 0 {
            return Ok(());
        }
        let size_bytes = self.size_bytes();
        let length_bytes = base.len_bytes().map_err(base_error("measure", 0))?;
        if !base.is_device() && length_bytes > size_bytes {
            base.set_len(size_bytes)
                .map_err(base_error("cut", size_bytes))?;
            self.sync(&**base, FileName::Base)?;
        }
        work.superblock.base_bytes = 0;
        Ok(())
    }

    /// What the last block gets by the growth reads as zeroes, where it lives in the log: nothing there was written, or it was and
    /// given up by a revert. In the base it is as the base has it. No record's checksum and no snapshot goes so far (I3, I10).
    fn clear_last_block(&self) -> Result<()> {
        let size_bytes = self.size_bytes();
        let skip_bytes = size_bytes % BLOCK_BYTES;
        if skip_bytes == 0 {
            return Ok(());
        }
        let last = ByteRange::new(size_bytes - skip_bytes, skip_bytes).first_block();
        let live = self.core().state.index.live(last);
        let Location::Log(at) = self.heed(live)? else {
            return Ok(());
        };
        let offset_bytes = at.offset_bytes() + skip_bytes;
        let zeroes = vec![0; in_memory(BLOCK_BYTES - skip_bytes)];
        let written = self.files.log.write_at(&zeroes, offset_bytes);
        written.map_err(|source| StoreError::Io {
            op: "write",
            file: FileName::Log,
            offset_bytes,
            source,
        })?;
        // Behind the write: a round beside it takes the flag away, and its sync may have begun before.
        self.gate.log_dirty.store(true, Ordering::SeqCst);
        Ok(())
    }
}

impl Volume {
    /// What of [`Volume::grow`] can be done before writes are held: refusals, the checkpoint of what is in memory, the base's new
    /// length. Blocking.
    pub fn prepare_grow(&self, new_size_bytes: u64) -> Result<()> {
        let shared = &self.shared;
        if !shared.check_growth(new_size_bytes)? {
            return Ok(());
        }
        let mut work = lock(&shared.maintenance);
        // It may have been closed, or reverted, meanwhile.
        if !shared.check_growth(new_size_bytes)? {
            return Ok(());
        }
        shared.run_checkpoint(&mut work)?;
        if shared.core().state.index.memtable_records() > 0 {
            shared.begin_checkpoint(&mut work, Turn::Keep)?;
            shared.run_checkpoint(&mut work)?;
        }
        shared.extend_base(&mut work, new_size_bytes)
    }

    /// Gives the volume this size, which is not smaller than the one it has; what is new reads as zeroes, or on a block device as what
    /// it holds there. Snapshots keep theirs. Durable when it returns. The caller has held all writes and none is in flight; `Busy`
    /// otherwise. Reads go on. Blocking: a few syncs, if [`Volume::prepare_grow`] came before.
    ///
    /// `BadSize` changes nothing. After another error the size is the old one, unless the volume is poisoned: then reopening tells.
    pub fn grow(&self, new_size_bytes: u64) -> Result<()> {
        let shared = &self.shared;
        if !shared.check_growth(new_size_bytes)? {
            return Ok(());
        }
        let mut work = lock(&shared.maintenance);
        let _hold = Hold::begin(shared)?;
        // As above.
        if !shared.check_growth(new_size_bytes)? {
            return Ok(());
        }
        shared.run_checkpoint(&mut work)?;
        shared.extend_base(&mut work, new_size_bytes)?;
        let grown = shared.clear_last_block().and_then(|()| {
            shared.begin_checkpoint(&mut work, Turn::Grow(new_size_bytes))?;
            shared.run_checkpoint(&mut work)
        });
        if grown.is_err() && shared.check_writable().is_ok() {
            drop(shared.cut_base(&mut work));
        }
        grown
    }
}

#[cfg(test)]
mod tests;
