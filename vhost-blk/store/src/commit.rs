//! The sync round: the only room that orders data, COMMIT and journal.
//!
//! Guest flushes, copy-on-write, snapshots and checkpoints all end here. Callers that come while a
//! round runs share the next one.
//! Invariants: a COMMIT names only records whose data was synced before it was appended (I4); what is
//! acknowledged as durable was synced by a round that began after it was asked for; a failed sync
//! poisons the volume and is never retried (I8).

use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, PoisonError};

use crate::error::{FileName, Result, StoreError};
use crate::journal::Record;
use crate::volume::{Shared, Volume, lock};

/// Whose turn it is.
#[derive(Debug, Default)]
struct Turn {
    /// Rounds begun.
    begun: u64,
    running: bool,
    /// Somebody waits for the next round who needs the base synced, too.
    next_syncs_base: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Rounds {
    turn: Mutex<Turn>,
    ended: Condvar,
}

impl Shared {
    /// Everything completed so far becomes durable: a guest's flush.
    pub(crate) fn flush(&self) -> Result<()> {
        self.share_round(true)
    }

    /// Every record appended so far becomes durable, with the log data it names. What was written to the
    /// base in place does not: no record vouches for it.
    pub(crate) fn commit_records(&self) -> Result<()> {
        self.share_round(false)
    }

    fn share_round(&self, syncs_base: bool) -> Result<()> {
        let rounds = &self.rounds;
        let mut turn = lock(&rounds.turn);
        // The first round that begins after this call.
        let mine = turn.begun + 1;
        turn.next_syncs_base |= syncs_base;
        loop {
            let ended = turn.begun - u64::from(turn.running);
            if ended >= mine {
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
        let syncs_base = std::mem::take(&mut turn.next_syncs_base);
        drop(turn);
        let result = self.round(syncs_base);
        lock(&rounds.turn).running = false;
        rounds.ended.notify_all();
        result
    }

    fn round(&self, syncs_base: bool) -> Result<()> {
        self.check_writable()?;
        let (through, snap) = {
            let core = self.core();
            let due = core.journal.pending_records() > 0 || core.journal.superblock_unnamed;
            // A snapshot holds what was written to the base in place, too.
            let snap = core.journal.snap_pending();
            (due.then(|| core.journal.last()), snap)
        };
        // Taken after the records were counted: data of a counted record set its flag before.
        if self.gate.log_dirty.swap(false, Ordering::SeqCst) {
            self.sync(&*self.files.log, FileName::Log)?;
        }
        if (syncs_base || snap) && self.gate.base_dirty.swap(false, Ordering::SeqCst) {
            self.sync(&*self.files.base, FileName::Base)?;
        }
        let Some(through) = through else {
            return Ok(());
        };
        let (commit, unsynced) = {
            let mut core = self.core();
            let commit = core.journal.next;
            let (superblock, synced) = (core.journal.superblock, core.journal.synced);
            core.journal.superblock_unnamed = false;
            core.record(
                self,
                &[Record::Commit {
                    through,
                    superblock,
                    synced,
                }],
            )?;
            (commit, std::mem::take(&mut core.journal.unsynced))
        };
        for (file, unsynced) in self.files.journal.iter().zip(unsynced) {
            if unsynced {
                self.sync(&**file, FileName::Journal)?;
            }
        }
        // A COMMIT right behind what it names leaves nothing pending.
        let committed = if through.next() == commit {
            commit.next()
        } else {
            through.next()
        };
        let mut core = self.core();
        core.journal.committed = committed;
        core.journal.synced = commit;
        Ok(())
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
