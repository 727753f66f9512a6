//! First writes of one pass, which go to the log as one: how many the kernel sees, and what becomes of each when it fails.

use super::{Queue, SIZE, head_bytes, snapshot_bytes, take_snapshot, volume};
use crate::engine::ring::Direction;
use crate::engine::worker::Mover;
use crate::engine::{Outcome, Token, VolumeEngine};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use vhost_blk_store::{DataFile, Method};
use vm_memory::{Bytes, GuestAddress};

/// Writes of a block each, none of which is a neighbour of another on the disk.
const WRITES: usize = 32;
const APART_BYTES: usize = 8192;
const IMAGE_BYTES: usize = WRITES * APART_BYTES;
const METHODS: [Method; 2] = [Method::RedirectOnWrite, Method::CopyOnWrite];

/// Where each page of guest memory is, and which block of the disk it goes to: not in order.
fn places() -> impl Iterator<Item = (u64, u64)> {
    (0..WRITES as u64).map(|page| {
        let region = if page < 16 { 0 } else { 0x10_0000 };
        (region + page % 16 * 4096, page * 7 % WRITES as u64)
    })
}

/// A queue on a volume full of zeroes with a snapshot, room in its log, and pages of guest memory that say where they go to.
fn prepared(method: Method) -> (Queue, Arc<VolumeEngine>, tempfile::TempDir) {
    let (volume, directory) = volume(SIZE);
    let mut queue = Queue::new(&volume);
    take_snapshot(&volume, method);
    let token = queue.start_write_from(0, SIZE / 2, 4096);
    assert_eq!(queue.wait(token), Outcome::Done);
    for (address, block) in places() {
        let page = [u8::try_from(block + 1).unwrap(); 4096];
        queue
            .memory
            .write_slice(&page, GuestAddress(address))
            .unwrap();
    }
    (queue, volume, directory)
}

/// What the disk holds when all have landed.
fn image() -> Vec<u8> {
    let mut image = vec![0; IMAGE_BYTES];
    for (number, pair) in image.chunks_mut(APART_BYTES).enumerate() {
        pair[..4096].fill(u8::try_from(number + 1).unwrap());
    }
    image
}

impl Queue {
    fn submit_all(&mut self) -> Vec<Token> {
        places()
            .map(|(address, block)| {
                self.submit_write_from(address, block * APART_BYTES as u64, 4096)
            })
            .collect()
    }

    /// Starts all of them in one pass, and has what they read first, if anything, end in one.
    fn start_all(&mut self, method: Method) -> Vec<Token> {
        let tokens = self.submit_all();
        self.worker.start_due();
        let deadline = Instant::now() + Duration::from_secs(30);
        while method == Method::CopyOnWrite && self.worker.completed.len() < WRITES {
            assert!(Instant::now() < deadline, "the old blocks are not read");
            self.worker.submit_transfers();
            if let Mover::Ring(ring) = &mut self.worker.mover {
                ring.take_completed(&mut self.worker.completed);
            }
        }
        tokens
    }

    fn wait_all(&mut self, tokens: Vec<Token>) -> Vec<Outcome> {
        self.pass();
        tokens.into_iter().map(|token| self.wait(token)).collect()
    }
}

/// Changes the kernel's answers for the writes to the log, which it counts.
fn meddle_with_log(
    queue: &mut Queue,
    mut answer: impl FnMut(usize, i32) -> i32 + Send + 'static,
) -> Option<Arc<AtomicUsize>> {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let meddled = queue.meddle(Box::new(move |file, direction, private, result| {
        if (file, direction, private) != (DataFile::Log, Direction::ToFile, true) {
            return result;
        }
        answer(counted.fetch_add(1, Ordering::SeqCst), result)
    }));
    meddled.then_some(count)
}

#[test]
fn first_writes_of_a_pass_are_one_write_to_the_log() {
    for method in METHODS {
        let (mut queue, volume, _directory) = prepared(method);
        let Some(count) = meddle_with_log(&mut queue, |_, result| result) else {
            return;
        };
        let tokens = queue.start_all(method);
        assert_eq!(queue.wait_all(tokens), [Outcome::Done; WRITES]);
        assert_eq!(count.load(Ordering::SeqCst), 1, "{method:?}");
        assert!(head_bytes(&volume, 0, IMAGE_BYTES) == image(), "{method:?}");
        assert!(snapshot_bytes(&volume, 0, IMAGE_BYTES) == vec![0; IMAGE_BYTES]);
        volume.store().flush().unwrap();
    }
}

#[test]
fn a_joined_write_that_comes_short_goes_on_across_its_shares() {
    for method in METHODS {
        let (mut queue, volume, _directory) = prepared(method);
        // In the middle of a share each time, and at last to its end.
        let Some(count) = meddle_with_log(&mut queue, |_, result| result.min(4096 * 5 + 512))
        else {
            return;
        };
        let tokens = queue.start_all(method);
        assert_eq!(queue.wait_all(tokens), [Outcome::Done; WRITES]);
        assert!(count.load(Ordering::SeqCst) > 6, "{method:?}");
        assert!(head_bytes(&volume, 0, IMAGE_BYTES) == image(), "{method:?}");
        assert!(snapshot_bytes(&volume, 0, IMAGE_BYTES) == vec![0; IMAGE_BYTES]);
    }
}

#[test]
fn a_joined_write_that_fails_fails_each_of_its_requests_and_changes_nothing() {
    for method in METHODS {
        // At once, and when a part was written.
        for failing in [0, 1] {
            let (mut queue, volume, _directory) = prepared(method);
            let meddled = meddle_with_log(&mut queue, move |number, result| {
                if number == failing {
                    return -libc::EIO;
                }
                result.min(8192)
            });
            if meddled.is_none() {
                return;
            }
            let tokens = queue.start_all(method);
            assert_eq!(queue.wait_all(tokens), [Outcome::Failed; WRITES]);
            assert_eq!(volume.barrier.in_flight(), 0);
            let nothing = vec![0; IMAGE_BYTES];
            assert!(head_bytes(&volume, 0, IMAGE_BYTES) == nothing, "{method:?}");
            queue.leave_alone();
            // All blocks, and all private memory, can be had again.
            for _ in 0..3 {
                let tokens = queue.submit_all();
                assert_eq!(queue.wait_all(tokens), [Outcome::Done; WRITES]);
            }
            assert!(head_bytes(&volume, 0, IMAGE_BYTES) == image(), "{method:?}");
            assert!(snapshot_bytes(&volume, 0, IMAGE_BYTES) == nothing);
        }
    }
}

#[test]
fn a_hold_waits_for_a_joined_write_under_way_and_the_snapshot_has_all_of_it() {
    for method in METHODS {
        let (mut queue, volume, _directory) = prepared(method);
        if meddle_with_log(&mut queue, |_, result| result.min(8192)).is_none() {
            return;
        }
        let tokens = queue.start_all(method);
        let hold = volume
            .barrier
            .hold(Instant::now() + Duration::from_secs(60))
            .unwrap();
        assert_eq!(volume.barrier.in_flight(), WRITES as u64);
        let drained = std::thread::scope(|scope| {
            let drained = scope.spawn(|| volume.barrier.drain(hold));
            assert_eq!(queue.wait_all(tokens), [Outcome::Done; WRITES]);
            drained.join().unwrap()
        });
        assert!(drained);
        take_snapshot(&volume, method);
        volume.barrier.release(hold);
        volume.wake_queues();
        queue.fill(99);
        let tokens = queue.submit_all();
        assert_eq!(queue.wait_all(tokens), [Outcome::Done; WRITES]);
        assert!(
            snapshot_bytes(&volume, 0, IMAGE_BYTES) == image(),
            "{method:?}"
        );
    }
}
