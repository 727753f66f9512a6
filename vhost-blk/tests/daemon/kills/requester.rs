//! Takes, reads back and deletes snapshots of a daemon that is killed at any moment, and sometimes kills it itself.
//!
//! Used by the kill campaign, on a thread beside the guest's. Knows of each snapshot whether it must exist, may exist or must be gone,
//! and what it may hold.

use super::oracle::{Instant, Oracle};
use super::victim::Victim;
use crate::harness::Control;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use uuid::Uuid;
use vhost_blk_wire::command::{
    QuerySnapshots, SnapshotDelete, SnapshotSetAbort, SnapshotSetCommit, SnapshotSetHold,
    SnapshotSetKeep, SnapshotSetMark, SnapshotSetPrepare,
};
use vhost_blk_wire::types::{Method, SnapshotState};

/// Snapshots that are kept at a time.
const KEPT_MAX: usize = 10;

/// What is known of a snapshot.
#[derive(Debug)]
struct Taken {
    instant: Instant,
    existence: Existence,
    method: Method,
    /// What it showed when it was first read: it must never show anything else.
    image: Option<Vec<u8>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Existence {
    /// Its keep was answered.
    Certain,
    /// The daemon died before it answered a commit, keep or delete.
    Open,
    /// The daemon died after an abort was asked for, or before keep was.
    Never,
}

/// What was done, for the summary.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub(super) taken: u32,
    pub(super) read: u32,
    pub(super) deleted: u32,
    pub(super) killed_in_hold: u32,
    pub(super) killed_after_cow: u32,
    pub(super) killed_after_delete: u32,
}

/// The requester.
pub(super) struct Requester {
    oracle: Arc<Mutex<Oracle>>,
    random: SmallRng,
    /// By set; each has one member.
    taken: HashMap<Uuid, Taken>,
    pub(super) tally: Tally,
}

impl Requester {
    pub(super) fn new(oracle: Arc<Mutex<Oracle>>, seed: u64) -> Self {
        Self {
            oracle,
            random: SmallRng::seed_from_u64(seed),
            taken: HashMap::new(),
            tally: Tally::default(),
        }
    }

    /// Does one thing after the other until the daemon is killed.
    pub(super) fn work(&mut self, socket: &Path, victim: &Victim) {
        let Some(mut control) = Control::try_connect(socket) else {
            return;
        };
        let mut done = self.compare_list(&mut control);
        while done.is_some() && !victim.is_killed() {
            let kept = self.taken.len();
            done = match self.random.random_range(0..10) {
                0..4 if kept < KEPT_MAX => self.take(&mut control, victim),
                0..6 if kept > 4 => self.delete(&mut control, victim),
                _ if kept > 0 => self.read_one(&mut control),
                _ => Some(()),
            };
            std::thread::sleep(Duration::from_micros(self.random.random_range(0..3000)));
        }
    }

    /// Reads all snapshots, from a daemon that is left alone.
    pub(super) fn read_all(&mut self, socket: &Path) -> Control {
        let mut control = Control::connect(socket);
        let mut done = self.compare_list(&mut control);
        let sets: Vec<Uuid> = self.taken.keys().copied().collect();
        for set in sets {
            done = done.and_then(|()| self.read(&mut control, set));
        }
        done.unwrap_or_else(|| panic!("no answer: {:?}", control.lost));
        control
    }

    /// The same, then deletes them.
    pub(super) fn end(&mut self, socket: &Path) {
        let mut control = self.read_all(socket);
        let sets: Vec<Uuid> = self.taken.keys().copied().collect();
        for set in sets {
            self.delete_set(&mut control, set).unwrap();
        }
        self.compare_list(&mut control).unwrap();
    }

    /// What must exist does, what must not does not. `None` from here on: the daemon is gone.
    fn compare_list(&mut self, control: &mut Control) -> Option<()> {
        let list = control.attempt(&QuerySnapshots::default())?.unwrap();
        for snapshot in &list {
            let known = self.taken.get_mut(&snapshot.set);
            let known = known.unwrap_or_else(|| panic!("{snapshot:?} should not be there"));
            assert_eq!(snapshot.state, SnapshotState::Kept, "{snapshot:?}");
            assert_eq!(snapshot.method, known.method);
            assert_ne!(known.existence, Existence::Never, "{snapshot:?}");
            known.existence = Existence::Certain;
        }
        self.taken.retain(|set, known| {
            let exists = list.iter().any(|snapshot| snapshot.set == *set);
            assert!(
                exists || known.existence != Existence::Certain,
                "set {set} is gone: {:?}",
                known.method
            );
            exists
        });
        Some(())
    }

    fn take(&mut self, control: &mut Control, victim: &Victim) -> Option<()> {
        let set = Uuid::new_v4();
        let method = if self.random.random() {
            Method::Row
        } else {
            Method::Cow
        };
        let prepare = SnapshotSetPrepare {
            set,
            volumes: vec!["disk".to_owned()],
            method: Some(method),
        };
        control.attempt(&prepare)?.unwrap();
        let mark = SnapshotSetMark {
            set,
            exempt: Vec::new(),
        };
        control.attempt(&mark)?.unwrap();
        let limit_ms = 10_000;
        if self.random.random_bool(0.2) {
            control
                .attempt(&SnapshotSetHold { set, limit_ms })?
                .unwrap();
            if self.random.random_bool(0.3) {
                self.tally.killed_in_hold += 1;
                victim.kill();
                return None;
            }
        }
        let begun = self.oracle.lock().unwrap().begin_read();
        let committed = control.attempt(&SnapshotSetCommit { set, limit_ms });
        let instant = self.oracle.lock().unwrap().instant(begun);
        let taken = Taken {
            instant,
            existence: Existence::Never,
            method,
            image: None,
        };
        let known = self.taken.entry(set).or_insert(taken);
        committed?.unwrap();
        if self.random.random_bool(0.1) {
            let abort = SnapshotSetAbort {
                set,
                reason: "test".to_owned(),
            };
            control.attempt(&abort)?.unwrap();
            self.taken.remove(&set);
            return Some(());
        }
        if method == Method::Cow && self.random.random_bool(0.3) {
            // Every write from here on preserves first.
            self.tally.killed_after_cow += 1;
            known.existence = Existence::Open;
            drop(control.attempt(&SnapshotSetKeep { set })?);
            known.existence = Existence::Certain;
            self.tally.taken += 1;
            victim.kill_after(Duration::from_micros(self.random.random_range(0..6000)));
            return None;
        }
        known.existence = Existence::Open;
        control.attempt(&SnapshotSetKeep { set })?.unwrap();
        known.existence = Existence::Certain;
        self.tally.taken += 1;
        Some(())
    }

    /// Takes and keeps a set, and deletes one if there are many, of a daemon that is left alone.
    pub(super) fn take_one(&mut self, socket: &Path, method: Method) {
        let mut control = Control::connect(socket);
        if self.taken.len() >= KEPT_MAX {
            let set = self.any();
            self.delete_set(&mut control, set).unwrap();
        }
        let begun = self.oracle.lock().unwrap().begin_read();
        let committed = control.take_set(&["disk"], method);
        let instant = self.oracle.lock().unwrap().instant(begun);
        let taken = Taken {
            instant,
            existence: Existence::Certain,
            method,
            image: None,
        };
        self.taken.insert(committed.volumes[0].snapshot.set, taken);
        self.tally.taken += 1;
    }

    fn any(&mut self) -> Uuid {
        let place = self.random.random_range(0..self.taken.len());
        *self.taken.keys().nth(place).unwrap()
    }

    fn delete(&mut self, control: &mut Control, victim: &Victim) -> Option<()> {
        let set = self.any();
        self.delete_set(control, set)?;
        if self.random.random_bool(0.2) {
            // Reclaiming is about to begin, or has.
            self.tally.killed_after_delete += 1;
            victim.kill_after(Duration::from_micros(self.random.random_range(0..20_000)));
            return None;
        }
        Some(())
    }

    fn delete_set(&mut self, control: &mut Control, set: Uuid) -> Option<()> {
        let snapshot = Self::snapshot(control, set)?;
        self.taken.get_mut(&set).unwrap().existence = Existence::Open;
        control.attempt(&SnapshotDelete { snapshot })?.unwrap();
        self.taken.remove(&set);
        self.tally.deleted += 1;
        Some(())
    }

    fn snapshot(control: &mut Control, set: Uuid) -> Option<Uuid> {
        let list = control.attempt(&QuerySnapshots::default())?.unwrap();
        let found = list.iter().find(|snapshot| snapshot.set == set);
        Some(
            found
                .unwrap_or_else(|| panic!("set {set} is gone"))
                .snapshot,
        )
    }

    fn read_one(&mut self, control: &mut Control) -> Option<()> {
        let set = self.any();
        self.read(control, set)
    }

    fn read(&mut self, control: &mut Control, set: Uuid) -> Option<()> {
        let snapshot = Self::snapshot(control, set)?;
        let image = control.attempt_read(snapshot)?.unwrap();
        let known = self.taken.get_mut(&set).unwrap();
        let judged = self.oracle.lock().unwrap().judge(&known.instant, &image);
        judged.unwrap_or_else(|why| panic!("snapshot of set {set}, {:?}: {why}", known.method));
        if let Some(before) = &known.image {
            let changed = before.iter().zip(&image).position(|(old, new)| old != new);
            assert_eq!(changed, None, "set {set} has changed ({:?})", known.method);
        }
        known.image = Some(image);
        self.tally.read += 1;
        Some(())
    }
}
