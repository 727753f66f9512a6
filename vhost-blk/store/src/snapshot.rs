//! A snapshot's life: prepare, take, keep or discard, delete, revert.
//!
//! The daemon calls it through `Volume`. It knows nothing of other volumes; `sets` does.
//! Invariants: a snapshot is taken with no write in flight, and its SNAP record is durable only after all
//! data of its epoch (I5); every change of the table is durable when its call returns.

use std::sync::atomic::Ordering;

use crate::checkpoint::Turn;
use crate::error::{Result, StoreError};
use crate::journal::Record;
use crate::layout::{MAX_EPOCH, MAX_SET_MEMBERS, MAX_SNAPSHOTS};
use crate::snapshot_table::{SnapshotInfo, SnapshotState, snap_records};
use crate::units::{SetId, SnapshotId};
use crate::volume::{NewSnapshot, Shared, Volume, lock};

/// Writes are refused while it lives.
pub(crate) struct Hold<'a>(&'a Shared);

impl<'a> Hold<'a> {
    /// Refuses new writes; `Busy` if one is in flight, or if somebody else holds them.
    pub(crate) fn begin(shared: &'a Shared) -> Result<Hold<'a>> {
        if shared.gate.held.swap(true, Ordering::SeqCst) {
            return Err(StoreError::Busy);
        }
        let hold = Hold(shared);
        if shared.gate.writes_in_flight.load(Ordering::SeqCst) != 0 {
            return Err(StoreError::Busy);
        }
        Ok(hold)
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.0.gate.held.store(false, Ordering::SeqCst);
    }
}

impl Shared {
    /// Appends and commits records of the table, then makes their changes: what a snapshot sees is spared until its deletion is durable,
    /// or after a power cut it could be there again without its blocks (I3). The caller holds `maintenance`, so no checkpoint begins in
    /// between.
    fn change_table(&self, records: &[Record]) -> Result<()> {
        self.core().append(self, records)?;
        self.commit_records()?;
        let mut core = self.core();
        records.iter().for_each(|record| core.state.apply(record));
        Ok(())
    }
}

impl Volume {
    /// What can be done before the freeze: flush, space for the first writes after the snapshot.
    /// Blocking.
    pub fn prepare_snapshot(&self) -> Result<()> {
        let shared = &self.shared;
        shared.check_writable()?;
        if shared.core().is_over_bounds(&shared.options, 2) {
            shared.relieve()?;
        }
        shared.make_ready(&mut lock(&shared.maintenance))?;
        shared.flush()
    }

    /// Takes a provisional snapshot of the volume as it is now, durably: [`Volume::begin_snapshot`] and
    /// [`Volume::flush`]. Blocking: one sync of the data, one of the journal.
    pub fn take_snapshot(&self, new: NewSnapshot) -> Result<SnapshotInfo> {
        let info = self.begin_snapshot(new)?;
        // The round syncs the data first and commits SNAP after it (I5).
        self.shared.flush()?;
        Ok(info)
    }

    /// Fixes the contents of a provisional snapshot. The caller has held all writes and none is in flight;
    /// `Busy` otherwise. When this returns, writes may go on: they do not change what the snapshot sees. It
    /// is durable only when a [`Volume::flush`] that was called afterwards has returned; a set is kept
    /// only after that, on all its members. No I/O but an append to the page cache; waits for no
    /// maintenance.
    pub fn begin_snapshot(&self, new: NewSnapshot) -> Result<SnapshotInfo> {
        let shared = &self.shared;
        shared.check_writable()?;
        let _hold = Hold::begin(shared)?;
        let info = {
            let mut core = shared.core();
            let table = &core.state.table;
            if table.get(new.snapshot_id).is_some() || table.of_set(new.set_id).is_some() {
                return Err(StoreError::SnapshotExists(new.snapshot_id));
            }
            if table.len() >= MAX_SNAPSHOTS {
                return Err(StoreError::Limit("snapshots of one volume"));
            }
            if new.members.is_empty() || new.members.len() > MAX_SET_MEMBERS {
                return Err(StoreError::Limit("volumes of one set"));
            }
            if core.state.epoch.0 >= MAX_EPOCH - 1 {
                return Err(StoreError::Limit("epochs of one volume"));
            }
            let info = SnapshotInfo {
                snapshot_id: new.snapshot_id,
                set_id: new.set_id,
                epoch: core.state.epoch,
                method: new.method,
                size_bytes: shared.size_bytes(),
                state: SnapshotState::Provisional,
                created_unix_ms: new.created_unix_ms,
                members: new.members,
            };
            core.record(shared, &snap_records(&info, info.size_bytes))?;
            shared.note_plain(&core);
            info
        };
        Ok(info)
    }

    /// Keeps the snapshot of the set. Only after all members' snapshots are durable. Once it is kept, asking
    /// again changes nothing. Blocking.
    pub fn keep_set(&self, set_id: SetId) -> Result<()> {
        self.shared.check_writable()?;
        let mut work = lock(&self.shared.maintenance);
        let snapshot = self.snapshot_of_set(set_id);
        match snapshot.map(|snapshot| snapshot.state) {
            None => return Err(StoreError::NoSuchSet(set_id)),
            Some(SnapshotState::Kept) => return Ok(()),
            Some(SnapshotState::Provisional) => {}
        }
        // Whoever asks has made all members' snapshots durable; this one is at hand to be sure of.
        let snap_pending = self.shared.core().journal.snap_pending();
        if snap_pending {
            self.shared.flush()?;
        }
        // A first snapshot finds no reserve yet, and background work may come too late: the file system could be full by then, and
        // nothing of this snapshot could ever be given back.
        self.shared.keep_reserve(&mut work.reserve)?;
        self.shared.change_table(&[Record::Keep { set_id }])
    }

    /// Drops the provisional snapshot of the set, if there is one. `SetKept` if it was kept (I9): then only
    /// [`Volume::delete_snapshot`] drops it. Blocking.
    pub fn discard_set(&self, set_id: SetId) -> Result<()> {
        self.shared.check_writable()?;
        let _work = lock(&self.shared.maintenance);
        {
            let mut core = self.shared.core();
            let snapshot = core.state.table.of_set(set_id);
            match snapshot.map(|snapshot| snapshot.state) {
                None => return Ok(()),
                Some(SnapshotState::Kept) => return Err(StoreError::SetKept(set_id)),
                Some(SnapshotState::Provisional) => {}
            }
            core.reclaim = true;
        }
        self.shared.change_table(&[Record::Discard { set_id }])
    }

    /// Drops one snapshot. Its space comes back in the background. Blocking.
    pub fn delete_snapshot(&self, snapshot_id: SnapshotId) -> Result<()> {
        self.shared.check_writable()?;
        let _work = lock(&self.shared.maintenance);
        {
            let mut core = self.shared.core();
            core.state
                .table
                .get(snapshot_id)
                .ok_or(StoreError::NoSuchSnapshot(snapshot_id))?;
            core.reclaim = true;
        }
        self.shared.change_table(&[Record::Delete { snapshot_id }])
    }

    /// Makes the volume what it was when the snapshot was taken, its size included; newer snapshots are dropped, it stays.
    /// The caller has stopped the guest's writes; `Busy` otherwise. Blocking, as long as rewriting the
    /// index takes.
    pub fn revert(&self, snapshot_id: SnapshotId) -> Result<()> {
        let shared = &self.shared;
        shared.check_writable()?;
        let mut work = lock(&shared.maintenance);
        let _hold = Hold::begin(shared)?;
        shared.flush()?;
        // A checkpoint under way merges an older state: let it end first. What merges runs that are about to go begins anew, and so
        // does a scan of them when they are gone.
        shared.abandon_reclaim(&mut work);
        shared.run_checkpoint(&mut work)?;
        let epoch = {
            let mut core = shared.core();
            work.settle.abandon(&mut core);
            let table = &core.state.table;
            let snapshot = table
                .get(snapshot_id)
                .ok_or(StoreError::NoSuchSnapshot(snapshot_id))?;
            if core.state.epoch.0 >= MAX_EPOCH - 1 {
                return Err(StoreError::Limit("epochs of one volume"));
            }
            snapshot.epoch
        };
        shared.begin_checkpoint(&mut work, Turn::Revert(epoch))?;
        let reverted = shared.run_checkpoint(&mut work);
        shared.core().reclaim = true;
        reverted?;
        // It has happened: a base that stays too long is cut off later.
        drop(shared.cut_base(&mut work));
        Ok(())
    }
}
