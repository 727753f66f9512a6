//! What must hold whatever is slow: two connections at one set, and disks that take their time to sync, or fail to.

use super::super::snapshot_state::Event;
use super::super::testing::{volume, volume_over, wait_until};
use super::super::{Reason, VolumeEngine};
use super::{OwnerId, SetError, SnapshotSets};
use std::io;
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};
use uuid::Uuid;
use vhost_blk_store::{BlockFile, Method as StoreMethod, NewSnapshot, SnapshotState, View};
use vhost_blk_wire::event::Event as WireEvent;
use vhost_blk_wire::types::Method;

/// A base whose syncs wait as long as they are told to, and fail if they are told to.
#[derive(Debug)]
struct SlowSync {
    file: Arc<dyn BlockFile>,
    gate: Arc<Gate>,
}

#[derive(Debug, Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    is_closed: bool,
    waiting: usize,
    fails: bool,
}

impl Gate {
    fn close(&self) {
        self.state.lock().unwrap().is_closed = true;
    }

    fn open(&self, fails: bool) {
        let mut state = self.state.lock().unwrap();
        (state.is_closed, state.fails) = (false, fails);
        self.changed.notify_all();
    }

    fn waiting(&self) -> usize {
        self.state.lock().unwrap().waiting
    }
}

impl BlockFile for SlowSync {
    fn len_bytes(&self) -> io::Result<u64> {
        self.file.len_bytes()
    }

    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.file.read_at(buffer, offset_bytes)
    }

    fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.file.write_at(bytes, offset_bytes)
    }

    fn write_zeroes(&self, offset_bytes: u64, length_bytes: u64, unmap: bool) -> io::Result<()> {
        self.file.write_zeroes(offset_bytes, length_bytes, unmap)
    }

    fn allocate(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        self.file.allocate(offset_bytes, length_bytes)
    }

    fn release(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        self.file.release(offset_bytes, length_bytes)
    }

    fn set_len(&self, length_bytes: u64) -> io::Result<()> {
        self.file.set_len(length_bytes)
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.gate.state.lock().unwrap();
        state.waiting += 1;
        state = (self.gate.changed)
            .wait_while(state, |state| state.is_closed)
            .unwrap();
        state.waiting -= 1;
        if state.fails {
            return Err(io::Error::from_raw_os_error(5));
        }
        drop(state);
        self.file.sync_data()
    }
}

/// Two volumes "a" and "b" behind one gate, all zeroes, with a first write that no sync covers; prepared as a set.
struct Rig {
    sets: Arc<SnapshotSets>,
    gate: Arc<Gate>,
    told: Arc<Mutex<Vec<WireEvent>>>,
    set: Uuid,
    _directories: Vec<tempfile::TempDir>,
}

impl Rig {
    fn new() -> Self {
        let gate = Arc::new(Gate::default());
        let told = Arc::new(Mutex::new(Vec::new()));
        let mut volumes = Vec::new();
        let mut directories = Vec::new();
        for name in ["a", "b"] {
            let (gate, told) = (Arc::clone(&gate), Arc::clone(&told));
            let tell = move |event| told.lock().unwrap().push(event);
            let (volume, directory) = volume_over(
                name,
                4 << 20,
                |file| Arc::new(SlowSync { file, gate }),
                Arc::new(tell),
            );
            volumes.push(volume);
            directories.push(directory);
        }
        let sets = SnapshotSets::new(volumes);
        let set = Uuid::new_v4();
        sets.prepare(set, OwnerId(1), &["a".to_owned(), "b".to_owned()], None)
            .unwrap();
        for volume in sets.volumes() {
            volume.store().write_at(0, &[1; 4096]).unwrap();
        }
        Self {
            sets,
            gate,
            told,
            set,
            _directories: directories,
        }
    }

    /// Commits while no sync ends, does something once all of them are under way, and lets them end.
    fn commit_while_syncs_wait(
        &self,
        fails: bool,
        meanwhile: impl FnOnce(&[Arc<VolumeEngine>]),
    ) -> Result<(), SetError> {
        self.gate.close();
        std::thread::scope(|scope| {
            let commit = scope.spawn(|| self.sets.commit(self.set, 10_000).map(drop));
            wait_until("round on both volumes at once", || self.gate.waiting() == 2);
            meanwhile(self.sets.volumes());
            assert!(!commit.is_finished(), "answered before it was durable");
            self.gate.open(fails);
            commit.join().unwrap()
        })
    }
}

#[test]
fn writes_go_on_while_a_set_becomes_durable_and_are_not_in_it() {
    let rig = Rig::new();
    rig.commit_while_syncs_wait(false, |volumes| {
        for volume in volumes {
            let ticket = volume.barrier.enter();
            assert!(ticket.is_some(), "writes are held during a sync");
            volume.store().write_at(0, &[2; 4096]).unwrap();
            volume.store().write_at(8192, &[2; 4096]).unwrap();
        }
    })
    .unwrap();
    rig.sets.keep(rig.set).unwrap();
    for volume in rig.sets.volumes() {
        let snapshot = volume.store().snapshots()[0].snapshot_id;
        let mut seen = [9; 12288];
        let store = volume.store();
        store
            .read_at(View::Snapshot(snapshot), 0, &mut seen)
            .unwrap();
        assert!(seen[..4096].iter().all(|byte| *byte == 1));
        assert!(seen[4096..].iter().all(|byte| *byte == 0));
        store.read_at(View::Head, 0, &mut seen).unwrap();
        assert!(seen[..4096].iter().all(|byte| *byte == 2));
    }
}

#[test]
fn a_sync_that_fails_after_the_release_undoes_the_set_and_tells() {
    let rig = Rig::new();
    let error = rig.commit_while_syncs_wait(true, |_| {}).unwrap_err();
    assert!(matches!(error, SetError::Store { .. }), "{error:?}");
    let told = rig.told.lock().unwrap();
    assert!(
        told.iter().any(
            |event| matches!(event, WireEvent::SnapshotSetAborted { set, .. } if *set == rig.set)
        ),
        "{told:?}"
    );
    drop(told);
    assert!(rig.sets.volumes()[0].store().status().poisoned);
    assert!(matches!(
        rig.sets.keep(rig.set),
        Err(SetError::NoSuchSet(_))
    ));
}

#[test]
fn a_set_that_is_aborted_while_it_becomes_durable_is_undone_when_it_is() {
    let rig = Rig::new();
    let error = rig
        .commit_while_syncs_wait(false, |_| {
            rig.sets.owner_gone(OwnerId(1));
        })
        .unwrap_err();
    assert!(
        matches!(error, SetError::Undone(Reason::OwnerGone)),
        "{error:?}"
    );
    for volume in rig.sets.volumes() {
        assert!(volume.store().snapshots().is_empty());
    }
}

#[test]
fn a_hold_that_comes_after_its_set_was_undone_or_released_holds_nothing() {
    let (volume, _directory) = volume(4 << 20);
    let sets = SnapshotSets::new(vec![Arc::clone(&volume)]);
    for undone in [true, false] {
        let id = Uuid::new_v4();
        sets.prepare(id, OwnerId(1), &["vda".to_owned()], None)
            .unwrap();
        let set = sets.find(id).unwrap();
        // The state says "held", and the other connection is faster than the hold itself.
        set.step(Event::Hold).unwrap();
        if undone {
            sets.owner_gone(OwnerId(1));
        } else {
            sets.release(id).unwrap();
        }
        assert!(!set.hold_writes(Instant::now() + Duration::from_secs(60)));
        assert!(volume.barrier.enter().is_some(), "undone: {undone}");
    }
}

#[test]
fn no_set_is_opened_on_a_volume_while_it_grows() {
    let rig = Rig::new();
    let refused = rig.sets.resize("a", 8 << 20);
    assert!(matches!(refused, Err(SetError::InProgress(..))));
    rig.sets.abort(rig.set, "enough").unwrap();
    rig.gate.close();
    std::thread::scope(|scope| {
        let grows = scope.spawn(|| rig.sets.resize("a", 8 << 20));
        wait_until("the growth to wait for a sync", || rig.gate.waiting() == 1);
        let name = ["a".to_owned()];
        let prepared = rig.sets.prepare(Uuid::new_v4(), OwnerId(1), &name, None);
        assert!(matches!(prepared, Err(SetError::InvalidState(_))));
        let twice = rig.sets.resize("a", 16 << 20);
        assert!(matches!(twice, Err(SetError::InvalidState(_))));
        assert!(!grows.is_finished(), "answered before it was durable");
        rig.gate.open(false);
        assert_eq!(grows.join().unwrap().unwrap().size_bytes, 8 << 20);
    });
    let grown = |event: &WireEvent| matches!(event, WireEvent::VolumeResized { volume, size_bytes } if volume == "a" && *size_bytes == 8 << 20);
    assert!(rig.told.lock().unwrap().iter().any(grown));
    let set = Uuid::new_v4();
    rig.sets
        .prepare(set, OwnerId(1), &["a".to_owned()], None)
        .unwrap();
}

#[test]
fn no_set_is_opened_on_a_volume_while_it_is_reverted() {
    let rig = Rig::new();
    rig.sets.abort(rig.set, "enough").unwrap();
    let (set, other, name) = (Uuid::new_v4(), Uuid::new_v4(), ["a".to_owned()]);
    rig.sets
        .prepare(set, OwnerId(1), &name, Some(Method::Cow))
        .unwrap();
    rig.sets.commit(set, 10_000).unwrap();
    rig.sets.keep(set).unwrap();
    let store = rig.sets.volumes()[0].store();
    let snapshot = store.snapshots()[0].snapshot_id.into();
    // In place: the revert begins with a sync of the base.
    store.write_at(0, &[2; 4096]).unwrap();
    rig.gate.close();
    std::thread::scope(|scope| {
        let reverts = scope.spawn(|| rig.sets.revert(snapshot));
        wait_until("the revert to wait for a sync", || rig.gate.waiting() == 1);
        let prepares = scope.spawn(|| rig.sets.prepare(other, OwnerId(1), &name, None));
        wait_until("an answer, or an open set", || {
            prepares.is_finished() || rig.sets.any_open()
        });
        let is_refused = !rig.sets.any_open();
        let grows = is_refused.then(|| rig.sets.resize("a", 8 << 20));
        assert!(!reverts.is_finished(), "answered before it was durable");
        rig.gate.open(false);
        reverts.join().unwrap().unwrap();
        let prepared = prepares.join().unwrap();
        assert!(
            matches!(prepared, Err(SetError::InvalidState(_))),
            "{prepared:?}"
        );
        assert!(matches!(grows, Some(Err(SetError::InvalidState(_)))));
    });
    rig.sets.prepare(other, OwnerId(1), &name, None).unwrap();
    let refused = rig.sets.revert(snapshot);
    assert!(matches!(refused, Err(SetError::InProgress(..))));
}

/// Two clients at a set that a restart has left provisional.
#[test]
fn a_set_that_is_being_kept_is_not_aborted_by_another_client() {
    let rig = Rig::new();
    rig.sets.abort(rig.set, "enough").unwrap();
    let left = Uuid::new_v4();
    let members: Vec<_> = (rig.sets.volumes().iter())
        .map(|volume| volume.store().id())
        .collect();
    for volume in rig.sets.volumes() {
        let new = NewSnapshot {
            snapshot_id: Uuid::new_v4().into(),
            set_id: left.into(),
            members: members.clone(),
            method: StoreMethod::RedirectOnWrite,
            created_unix_ms: 1,
        };
        // Not flushed: keeping it does that, and waits for the base.
        volume.store().write_at(0, &[2; 4096]).unwrap();
        volume.store().begin_snapshot(new).unwrap();
    }
    rig.gate.close();
    std::thread::scope(|scope| {
        let keeps = scope.spawn(|| rig.sets.keep(left));
        wait_until("the verdict to wait for a sync", || rig.gate.waiting() == 1);
        let (answer, answered) = mpsc::channel();
        let rig = &rig;
        scope.spawn(move || answer.send(rig.sets.abort(left, "another client")));
        // It has time to look at the set; what it sees must not be what it goes by.
        let early = answered.recv_timeout(Duration::from_millis(100)).ok();
        rig.gate.open(false);
        keeps.join().unwrap().unwrap();
        assert!(early.is_none(), "{early:?}");
        let aborted = answered.recv().unwrap();
        assert!(
            matches!(aborted, Err(SetError::InvalidState(_))),
            "{aborted:?}"
        );
    });
    for volume in rig.sets.volumes() {
        let snapshots = volume.store().snapshots();
        assert_eq!(snapshots.len(), 1);
        assert_eq!(snapshots[0].state, SnapshotState::Kept);
    }
}
