//! Snapshots are deleted in any order under load, and at the end the base alone is the disk.

use crate::harness::{Control, Daemon, Disk, Scratch, wait_until};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vhost_blk_wire::command::{QuerySnapshots, QueryVolumes, SnapshotDelete};
use vhost_blk_wire::types::Method;

const BLOCKS: usize = 2048;
const BLOCK: usize = 4096;
const IN_FLIGHT: usize = 16;

/// A guest that writes whole blocks at random and remembers what is where.
struct Guest {
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<Vec<u32>>,
}

impl Guest {
    fn start(mut disk: Disk, seed: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let writes = Arc::new(AtomicU64::new(0));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&writes));
        let thread = std::thread::spawn(move || {
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut truth = vec![0_u32; BLOCKS];
            let mut value = 0_u32;
            while !stopped.load(Ordering::SeqCst) {
                let queue = disk.first();
                let start = rng.random_range(0..BLOCKS - IN_FLIGHT * 4);
                for place in 0..IN_FLIGHT {
                    value += 1;
                    // Apart, so that no two of them overlap.
                    let block = start + place * 4 + rng.random_range(0..4);
                    truth[block] = value;
                    queue
                        .memory
                        .fill(place * BLOCK, &value.to_le_bytes().repeat(BLOCK / 4));
                    queue.start_write((block * BLOCK) as u64, place * BLOCK, BLOCK, place);
                }
                let done = queue.complete(IN_FLIGHT);
                assert!(done.iter().all(|(_, result)| *result == 0));
                counted.fetch_add(IN_FLIGHT as u64, Ordering::SeqCst);
            }
            truth
        });
        Self {
            stop,
            writes,
            thread,
        }
    }

    fn writes_some(&self) {
        let before = self.writes.load(Ordering::SeqCst);
        wait_until("some writes", || {
            self.writes.load(Ordering::SeqCst) > before + 500
        });
    }

    fn stop(self) -> Vec<u32> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

fn delete_all_under_load(seed: u64, methods: &[Method]) {
    let scratch = Scratch::new();
    let base = scratch.disk("a.raw", (BLOCKS * BLOCK) as u64);
    let (socket, control) = (scratch.path("a.sock"), scratch.path("control"));
    let daemon = Daemon::start(&[
        "--disk",
        base.to_str().unwrap(),
        "--socket",
        socket.to_str().unwrap(),
        "--control",
        control.to_str().unwrap(),
    ]);
    let mut control = Control::connect(&control);
    let guest = Guest::start(Disk::attach(&socket, 1), seed);
    let mut rng = SmallRng::seed_from_u64(seed);
    // Ten are taken, with deletes of any of them in between; then the rest goes in any order.
    for round in 0..10 {
        control.take_set(&["a"], methods[round % methods.len()]);
        guest.writes_some();
        if round % 3 == 2 {
            delete_any(&mut control, &mut rng);
        }
    }
    while delete_any(&mut control, &mut rng) {
        guest.writes_some();
    }
    let truth = guest.stop();
    wait_until("the disk is plain", || {
        control.run(&QueryVolumes::default()).unwrap()[0].plain
    });
    assert!(daemon.terminate().success());
    let bytes = std::fs::read(&base).unwrap();
    for (block, (found, value)) in bytes.chunks(BLOCK).zip(&truth).enumerate() {
        assert!(
            found.chunks(4).all(|part| part == value.to_le_bytes()),
            "block {block} of the base is not what the guest wrote last"
        );
    }
}

fn delete_any(control: &mut Control, rng: &mut SmallRng) -> bool {
    let mut all = control.run(&QuerySnapshots::default()).unwrap();
    all.shuffle(rng);
    let Some(one) = all.first() else { return false };
    let snapshot = one.snapshot;
    control.run(&SnapshotDelete { snapshot }).unwrap();
    true
}

#[test]
fn redirected_blocks_are_settled_back_whatever_the_order_of_the_deletes() {
    delete_all_under_load(1, &[Method::Row]);
}

#[test]
fn preserved_blocks_are_dropped_whatever_the_order_of_the_deletes() {
    delete_all_under_load(2, &[Method::Cow]);
}

#[test]
fn a_mixture_of_methods_ends_as_a_plain_file_too() {
    delete_all_under_load(3, &[Method::Row, Method::Cow, Method::Cow, Method::Row]);
}
