//! Who hears of a round that failed without poisoning the volume.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::io::BlockFile;
use crate::units::{BLOCK_BYTES, SetId, SnapshotId};
use crate::{Method, NewSnapshot, OpenOptions};

/// A log whose syncs wait while the gate is closed.
#[derive(Debug)]
struct SlowSync {
    file: Arc<dyn BlockFile>,
    gate: Arc<Gate>,
}

#[derive(Debug, Default)]
struct Gate {
    /// Whether it is closed, and syncs that wait for it.
    state: Mutex<(bool, usize)>,
    changed: Condvar,
}

impl Gate {
    fn set_closed(&self, is_closed: bool) {
        lock(&self.state).0 = is_closed;
        self.changed.notify_all();
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
    fn sync_data(&self) -> io::Result<()> {
        let mut state = lock(&self.gate.state);
        state.1 += 1;
        while state.0 {
            state = (self.gate.changed)
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.1 -= 1;
        drop(state);
        self.file.sync_data()
    }
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "no {what} in a minute");
        std::thread::yield_now();
    }
}

#[test]
fn all_who_share_a_round_without_room_for_its_commit_hear_of_it() {
    let mut base = crate::sim::Image::default();
    base.set_len(8 * BLOCK_BYTES);
    let mut files = crate::sim::memory_volume(vec![base]);
    let gate = Arc::new(Gate::default());
    files.log = Arc::new(SlowSync {
        file: files.log,
        gate: Arc::clone(&gate),
    });
    let options = OpenOptions {
        journal_prewritten_bytes: 0,
        segments_ahead: 0,
        ..OpenOptions::default()
    };
    let (volume, _) = Volume::open_files(files, &options).expect("a new volume");
    let new = NewSnapshot {
        snapshot_id: SnapshotId::from(uuid::Uuid::from_u128(1)),
        set_id: SetId::from(uuid::Uuid::from_u128(2)),
        members: vec![volume.id()],
        method: Method::RedirectOnWrite,
        created_unix_ms: 1,
    };
    volume.take_snapshot(new).expect("a snapshot");
    volume.write_at(0, &[1; 4096]).expect("a write");
    let shared = &volume.shared;
    gate.set_closed(true);
    let (first, shares, end_bytes) = std::thread::scope(|scope| {
        let first = scope.spawn(|| shared.flush());
        wait_until("round", || lock(&gate.state).1 == 1);
        volume.write_at(BLOCK_BYTES, &[2; 4096]).expect("a write");
        let shares = [
            scope.spawn(|| shared.flush()),
            scope.spawn(|| shared.confirm_records()),
        ];
        wait_until("two who wait for the next round", || {
            let turn = lock(&shared.rounds.turn);
            turn.next.base && turn.next.confirmed
        });
        let end_bytes = {
            let mut core = shared.core();
            let full_bytes = core.journal.region_bytes;
            std::mem::replace(&mut core.journal.end_bytes, full_bytes)
        };
        gate.set_closed(false);
        let shares = shares.map(|share| share.join().expect("a thread"));
        (first.join().expect("a thread"), shares, end_bytes)
    });
    assert!(first.is_ok(), "{first:?}");
    for shared in &shares {
        assert!(matches!(shared, Err(StoreError::NoSpace)), "{shares:?}");
    }
    // With room again the next round does what was wanted of the one that failed.
    shared.core().journal.end_bytes = end_bytes;
    shared.gate.base_dirty.store(true, Ordering::SeqCst);
    shared.commit_records().expect("a round");
    assert!(!shared.gate.base_dirty.load(Ordering::SeqCst));
    assert_eq!(shared.core().journal.pending_records(), 0);
}
