//! Asks `filesystem` what need not be in the copies of a set: which files while it is prepared, where they lie when all is frozen.
//!
//! Called by the actor. Invariants: it costs a set at most [`FIND_MAX`] before the freeze and [`PLACE_MAX`] in it, whatever the
//! patterns name; work that hangs in a file system is left to itself and heard by nobody; an abort and `status` need not wait for a
//! search; nothing of it can keep the thaw waiting.

use super::actor::Actor;
use super::cause::Cause;
use super::work::Work;
use crate::clock::BootTime;
use crate::filesystem::devices::BlockDevices;
use crate::filesystem::not_to_snapshot::{
    Candidates, KeptOpen, Swap, Wish, find, place, read_directory,
};
use guest_agent_wire::host::NotToSnapshot;
use std::sync::Arc;
use std::time::Duration;

/// Longest time to look for files, before anything is frozen.
const FIND_MAX: Duration = Duration::from_secs(5);
/// Longest time to place them, while all is frozen. One takes some ten microseconds.
const PLACE_MAX: Duration = Duration::from_millis(300);
/// Of the time that is left to freeze and copy, placing may take this part.
const PLACE_PART: u32 = 10;
impl Actor {
    /// Patterns of the writers in scope and of the configuration, and swap. Remembered until the freeze.
    pub(super) fn find_not_to_snapshot(&mut self, until: BootTime) -> Result<(), Cause> {
        let (sets, wrong) = read_directory(&self.settings.not_to_snapshot_dir);
        let mut wishes: Vec<Wish> = sets
            .into_iter()
            .map(|set| Wish { set, owner: None })
            .collect();
        for participant in &self.set.participants {
            let uid = participant.writer.identity().uid;
            let owner = (uid != 0).then_some(uid);
            if let Some(metadata) = &participant.metadata {
                wishes.extend(metadata.exclude_from_snapshot.iter().map(|set| Wish {
                    set: set.clone(),
                    owner,
                }));
            }
        }
        let swap = self.swap();
        if wishes.is_empty() && wrong.is_empty() && swap == Swap::default() {
            return Ok(());
        }
        let patterns = u64::try_from(wishes.len()).unwrap_or(u64::MAX);
        let mounts = self.sources.mounts().unwrap_or_default();
        let devices = BlockDevices::new(&self.sources.sys);
        let disks = self.set.disks.clone();
        // The file systems are still to be written back.
        let limit = FIND_MAX.min(until.remaining() / 2);
        let work = Work::start("not-to-snapshot", limit, move |until| {
            find(&wishes, &swap.files, &mounts, &devices, &disks, until)
        });
        let found = match work {
            Some(work) => self.listening_to(&work)?,
            None => None,
        };
        let mut found = found.unwrap_or_else(|| {
            let why = format!("not found within {} ms", limit.as_millis());
            Candidates::none_of(patterns, why)
        });
        for why in wrong {
            found.unresolved(why);
        }
        self.set.not_to_snapshot = Some(Arc::new(found));
        Ok(())
    }

    /// Where that lies now that all is frozen; `None` if nothing was named.
    pub(super) fn place_not_to_snapshot(&mut self) -> Option<Box<NotToSnapshot>> {
        let candidates = Arc::clone(self.set.not_to_snapshot.as_ref()?);
        let frozen = self.frozen_devices();
        // As it is now: what was swap may be something else since then.
        let swap = self.swap();
        let devices = BlockDevices::new(&self.sources.sys);
        let disks = self.set.disks.clone();
        let left = self.set.hold_end.map(BootTime::remaining);
        let limit = PLACE_MAX.min(left.unwrap_or_default() / PLACE_PART);
        let known = Arc::clone(&candidates);
        let work = Work::start("not-to-snapshot", limit, move |until| {
            place(&known, &swap, &devices, &disks, &frozen, until)
        });
        let placed = work.and_then(|work| work.within(limit));
        let (found, open) = placed.unwrap_or_else(|| {
            let none = NotToSnapshot {
                unresolved: 1,
                reasons: vec![format!("not placed within {} ms", limit.as_millis())],
                ..NotToSnapshot::default()
            };
            (none, KeptOpen::default())
        });
        self.set.kept_open = open;
        Some(Box::new(found))
    }

    /// Swap in use, unless the administrator wants it in the copies.
    fn swap(&self) -> Swap {
        if self.settings.keep_swap {
            Swap::default()
        } else {
            self.sources.swap()
        }
    }
}
