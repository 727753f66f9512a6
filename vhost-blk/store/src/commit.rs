//! The sync round: the only room that orders data, COMMIT and sync.
//!
//! Guest flushes, copy-on-write, snapshots and checkpoints all end here. Callers that come while a
//! round runs share the next one; where it fails without poisoning the volume (the journal has no room for its COMMIT), they
//! try again and hear their own error.
//! Invariants: an ordered COMMIT names only records whose data was synced before it was appended, any other
//! only records that are sealed or name no data (I4); data is confirmed only by a round that returned (I10);
//! what is acknowledged as durable was synced by a round that began after it was asked for; a failed sync
//! poisons the volume and is never retried (I8).

use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, PoisonError};

use crate::error::{FileName, Result, StoreError};
use crate::journal::{Journal, Record};
use crate::units::Sequence;
use crate::volume::{Core, Shared, Volume, lock};

/// Whose turn it is.
#[derive(Debug, Default)]
struct Turn {
    /// Rounds begun.
    begun: u64,
    /// The last one that did what was wanted of it, and of those before it that failed.
    succeeded: u64,
    running: bool,
    /// What those who wait for the next round want of it.
    next: Wanted,
}

/// What a round shall do besides making all records durable.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    /// What was written to the base in place becomes durable, too.
    base: bool,
    /// Everything is confirmed when it returns.
    confirmed: bool,
}

impl Wanted {
    fn add(&mut self, other: Wanted) {
        self.base |= other.base;
        self.confirmed |= other.confirmed;
    }
}

#[derive(Debug, Default)]
pub(crate) struct Rounds {
    turn: Mutex<Turn>,
    ended: Condvar,
}

impl Shared {
    /// Everything completed so far becomes durable: a guest's flush.
    pub(crate) fn flush(&self) -> Result<()> {
        self.share_round(Wanted {
            base: true,
            confirmed: false,
        })
    }

    /// Every record appended so far becomes durable, with the log data it names. What was written to the
    /// base in place does not, unless a snapshot needs it: no record vouches for it.
    pub(crate) fn commit_records(&self) -> Result<()> {
        self.share_round(Wanted::default())
    }

    /// The same, and all data that records name may change from then on.
    pub(crate) fn confirm_records(&self) -> Result<()> {
        self.share_round(Wanted {
            base: false,
            confirmed: true,
        })
    }

    fn share_round(&self, wanted: Wanted) -> Result<()> {
        let rounds = &self.rounds;
        let mut turn = lock(&rounds.turn);
        // The first round that begins after this call.
        let mine = turn.begun + 1;
        turn.next.add(wanted);
        loop {
            // One that failed tells only who led it: everybody else who waited for it leads another, or shares it.
            if turn.succeeded >= mine {
                drop(turn);
                return self.check_writable();
            }
            if !turn.running {
                break;
            }
            turn = rounds
                .ended
                .wait(turn)
                .unwrap_or_else(PoisonError::into_inner);
        }
        turn.begun += 1;
        turn.running = true;
        let (number, wanted) = (turn.begun, std::mem::take(&mut turn.next));
        drop(turn);
        let result = self.round(wanted);
        let mut turn = lock(&rounds.turn);
        turn.running = false;
        match &result {
            Ok(()) => turn.succeeded = number,
            // Others may have wanted it, too.
            Err(_) => turn.next.add(wanted),
        }
        drop(turn);
        rounds.ended.notify_all();
        result
    }

    fn round(&self, wanted: Wanted) -> Result<()> {
        self.check_writable()?;
        let mut core = self.core();
        // A snapshot holds what was written to the base in place, too.
        let syncs_base = wanted.base || core.journal.snap_pending();
        let unconfirmed = !core.unconfirmed.is_empty();
        if core.journal.needs_order() || (wanted.confirmed && unconfirmed) {
            let noted = Noted::of(&core.journal);
            drop(core);
            // Taken after the records were counted: data of a counted record set its flag before.
            self.sync_log_if(self.gate.log_dirty.swap(false, Ordering::SeqCst))?;
            self.sync_base_if(syncs_base)?;
            core = self.core();
            let committed = core.append_commit(self, noted, true)?;
            core.journal.unsynced = false;
            drop(core);
            self.sync_log_if(true)?;
            self.core().round_returned(&committed);
            return Ok(());
        }
        // One sync covers data and records: what it confirms is told by the next round's COMMIT.
        let dirty = self.gate.log_dirty.swap(false, Ordering::SeqCst);
        let due = core.journal.pending_records() > 0 || core.journal.superblock_unnamed;
        let committed = if due || (dirty && unconfirmed) {
            let noted = Noted::of(&core.journal);
            let appended = core.append_commit(self, noted, false);
            if appended.is_err() && dirty {
                self.gate.log_dirty.store(true, Ordering::SeqCst);
            }
            Some(appended?)
        } else {
            None
        };
        let unsynced = std::mem::take(&mut core.journal.unsynced);
        drop(core);
        self.sync_base_if(syncs_base)?;
        self.sync_log_if(dirty || unsynced)?;
        if let Some(committed) = committed {
            self.core().round_returned(&committed);
        }
        Ok(())
    }

    fn sync_log_if(&self, due: bool) -> Result<()> {
        if due {
            self.sync(&*self.files.log, FileName::Log)?;
        }
        Ok(())
    }

    fn sync_base_if(&self, wanted: bool) -> Result<()> {
        if wanted && self.gate.base_dirty.swap(false, Ordering::SeqCst) {
            self.sync(&*self.files.base, FileName::Base)?;
        }
        Ok(())
    }
}

/// The records that a round is about.
#[derive(Clone, Copy, Debug)]
struct Noted {
    through: Sequence,
    sealed_blocks: u64,
}

impl Noted {
    fn of(journal: &Journal) -> Noted {
        Noted {
            through: journal.last(),
            sealed_blocks: journal.sealed_blocks,
        }
    }
}

/// A COMMIT that was appended and waits for its sync.
#[derive(Debug)]
struct Committed {
    noted: Noted,
    commit: Sequence,
    /// What is confirmed when the sync has returned.
    confirms: Sequence,
}

impl Core {
    fn append_commit(&mut self, shared: &Shared, noted: Noted, ordered: bool) -> Result<Committed> {
        let journal = &self.journal;
        let (commit, superblock, synced) = (journal.next, journal.superblock, journal.synced);
        let record = Record::Commit {
            through: noted.through,
            superblock,
            synced,
            ordered,
        };
        self.append(shared, &[record])?;
        self.journal.superblock_unnamed = false;
        Ok(Committed {
            noted,
            commit,
            confirms: if ordered { noted.through } else { synced },
        })
    }

    /// The sync behind a COMMIT returned.
    fn round_returned(&mut self, committed: &Committed) {
        let (through, commit) = (committed.noted.through, committed.commit);
        // A COMMIT right behind what it names leaves nothing pending.
        self.journal.committed = if through.next() == commit {
            commit.next()
        } else {
            through.next()
        };
        self.journal.sealed_blocks_committed = committed.noted.sealed_blocks;
        self.journal.synced = commit;
        self.confirm(committed.confirms);
    }
}

impl Volume {
    /// Makes every write completed before this call durable. Blocking; concurrent callers share a
    /// round. `Poisoned` and `Io`: nothing is known to be durable, reopen the volume.
    pub fn flush(&self) -> Result<()> {
        if self.shared.options.read_only {
            return Err(StoreError::ReadOnly);
        }
        self.shared.flush()
    }
}

#[cfg(test)]
mod tests;
