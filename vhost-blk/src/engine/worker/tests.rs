//! The worker against a real store on a temporary file, on the test's own thread.

mod copies;
mod faults;

use super::Worker;
use crate::engine::testing::{memory, volume};
use crate::engine::{GuestBuffers, GuestRange, Kick, Op, Outcome, Request, Token, VolumeEngine};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost_blk_store::{Method, NewSnapshot};
use vhost_blk_wire::types::ByteRange;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const SIZE: u64 = 4 << 20;

struct Queue {
    worker: Worker,
    kick: Arc<Kick>,
    memory: Arc<GuestMemoryMmap>,
    next: u64,
    done: Vec<(Token, Outcome)>,
}

impl Queue {
    fn new(volume: &Arc<VolumeEngine>) -> Self {
        let kick = Arc::new(Kick::new().unwrap());
        Self {
            worker: Worker::new(Arc::clone(volume), Arc::clone(&kick)),
            kick,
            memory: memory(),
            next: 0,
            done: Vec::new(),
        }
    }

    /// Starts a request over `length` bytes of guest memory from address 0 on.
    fn start(&mut self, op: Op, offset_bytes: u64, length: u32) -> Token {
        let buffers = match op {
            Op::Read | Op::Write => {
                let range = GuestRange {
                    address: 0,
                    length_bytes: length,
                };
                GuestBuffers::new(Arc::clone(&self.memory), &[range]).unwrap()
            }
            Op::Flush | Op::Discard | Op::WriteZeroes { .. } => {
                GuestBuffers::empty(Arc::clone(&self.memory))
            }
        };
        let range = ByteRange {
            offset_bytes,
            length_bytes: u64::from(length),
        };
        let token = Token(self.next);
        self.next += 1;
        self.worker.submit(token, Request { op, range, buffers });
        self.pass();
        token
    }

    fn pass(&mut self) {
        self.kick.clear();
        self.worker.run();
        self.done.extend(self.worker.take_done());
    }

    fn wait(&mut self, token: Token) -> Outcome {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some((_, outcome)) = self.done.iter().find(|(done, _)| *done == token) {
                return *outcome;
            }
            assert!(Instant::now() < deadline, "the request does not end");
            let mut wait = [rustix::event::PollFd::new(
                &*self.kick,
                rustix::event::PollFlags::IN,
            )];
            let time = rustix::event::Timespec {
                tv_sec: 10,
                tv_nsec: 0,
            };
            // Only a wake-up may make it go on: a pass by the clock would hide one that is missing.
            let woken = rustix::event::poll(&mut wait, Some(&time)).unwrap();
            assert_eq!(woken, 1, "nobody has woken the queue");
            self.pass();
        }
    }

    fn run(&mut self, op: Op, offset_bytes: u64, length: u32) -> Outcome {
        let token = self.start(op, offset_bytes, length);
        self.wait(token)
    }

    fn fill(&self, byte: u8) {
        self.memory
            .write_slice(&[byte; 0x1_0000], GuestAddress(0))
            .unwrap();
    }

    fn first_byte(&self) -> u8 {
        self.memory.read_obj(GuestAddress(0)).unwrap()
    }
}

fn take_snapshot(volume: &VolumeEngine, method: Method) {
    let set_id = uuid::Uuid::new_v4().into();
    let new = NewSnapshot {
        snapshot_id: uuid::Uuid::new_v4().into(),
        set_id,
        members: vec![volume.store().id()],
        method,
        created_unix_ms: 1,
    };
    volume.store().take_snapshot(new).unwrap();
    volume.store().keep_set(set_id).unwrap();
}

fn syncs(volume: &VolumeEngine) -> u64 {
    let syncs = volume.store().status().syncs;
    syncs.base + syncs.log
}

#[test]
fn with_the_write_cache_off_a_write_is_durable_when_it_is_answered() {
    let (volume, _directory) = volume(SIZE);
    let mut queue = Queue::new(&volume);
    assert_eq!(queue.run(Op::Write, 0, 4096), Outcome::Done);
    let before = syncs(&volume);
    assert_eq!(queue.run(Op::Write, 0, 4096), Outcome::Done);
    assert_eq!(syncs(&volume), before, "the cache is on");
    volume.set_write_cache(false);
    assert_eq!(queue.run(Op::Write, 4096, 4096), Outcome::Done);
    assert!(syncs(&volume) > before);
    volume.set_write_cache(true);
    volume.set_driver_flushes(false);
    let before = syncs(&volume);
    assert_eq!(
        queue.run(Op::WriteZeroes { may_unmap: false }, 8192, 4096),
        Outcome::Done
    );
    assert!(syncs(&volume) > before, "a driver that cannot flush");
}

#[test]
fn a_flush_of_a_clean_disk_costs_nothing_and_of_a_written_one_a_sync() {
    let (volume, _directory) = volume(SIZE);
    let mut queue = Queue::new(&volume);
    assert_eq!(queue.run(Op::Flush, 0, 0), Outcome::Done);
    let before = syncs(&volume);
    assert_eq!(queue.run(Op::Flush, 0, 0), Outcome::Done);
    assert_eq!(syncs(&volume), before);
    assert_eq!(queue.run(Op::Write, 0, 4096), Outcome::Done);
    assert_eq!(queue.run(Op::Flush, 0, 0), Outcome::Done);
    assert_eq!(syncs(&volume), before + 1);
}

#[test]
fn a_held_write_waits_without_being_in_flight_and_goes_on_when_released() {
    let (volume, _directory) = volume(SIZE);
    let mut queue = Queue::new(&volume);
    let hold = volume
        .barrier
        .hold(Instant::now() + Duration::from_secs(60))
        .unwrap();
    queue.fill(5);
    let write = queue.start(Op::Write, 0, 4096);
    assert!(
        volume.barrier.drain(hold),
        "a parked write is not in flight"
    );
    queue.pass();
    assert_eq!(queue.done, []);
    volume.barrier.release(hold);
    volume.wake_queues();
    assert_eq!(queue.wait(write), Outcome::Done);
    queue.fill(0);
    assert_eq!(queue.run(Op::Read, 0, 4096), Outcome::Done);
    assert_eq!(queue.first_byte(), 5);
}

#[test]
fn parked_requests_can_be_forgotten_and_running_ones_are_waited_for() {
    let (volume, _directory) = volume(SIZE);
    let mut queue = Queue::new(&volume);
    for block in 0..16 {
        queue.start(Op::Write, block * 65536, 65536);
    }
    let hold = volume
        .barrier
        .hold(Instant::now() + Duration::from_secs(60))
        .unwrap();
    let held = queue.start(Op::Write, 0, 4096);
    queue.worker.settle();
    queue.done.extend(queue.worker.take_done());
    assert_eq!(queue.done.len(), 16);
    queue.worker.forget_parked();
    volume.barrier.release(hold);
    queue.pass();
    assert!(queue.done.iter().all(|(token, _)| *token != held));
}

#[test]
fn first_writes_of_both_methods_and_sub_block_writes_read_back() {
    for method in [Method::RedirectOnWrite, Method::CopyOnWrite] {
        let (volume, _directory) = volume(SIZE);
        let mut queue = Queue::new(&volume);
        queue.fill(1);
        assert_eq!(queue.run(Op::Write, 0, 65536), Outcome::Done);
        take_snapshot(&volume, method);
        queue.fill(2);
        assert_eq!(queue.run(Op::Write, 512, 512), Outcome::Done);
        assert_eq!(queue.run(Op::Write, 8192, 8192), Outcome::Done);
        assert_eq!(
            queue.run(Op::WriteZeroes { may_unmap: true }, 20480, 4096),
            Outcome::Done
        );
        assert_eq!(queue.run(Op::Read, 0, 65536), Outcome::Done);
        let mut read = vec![0; 65536];
        queue.memory.read_slice(&mut read, GuestAddress(0)).unwrap();
        let mut expected = vec![1; 65536];
        expected[512..1024].fill(2);
        expected[8192..16384].fill(2);
        expected[20480..24576].fill(0);
        assert!(read == expected, "{method:?}");
    }
}

#[test]
fn two_queues_that_move_the_same_block_at_once_both_end() {
    for method in [Method::RedirectOnWrite, Method::CopyOnWrite] {
        let (volume, _directory) = volume(SIZE);
        let mut queues = [Queue::new(&volume), Queue::new(&volume)];
        for round in 0..50 {
            if round % 5 == 0 {
                take_snapshot(&volume, method);
            }
            let tokens: Vec<_> = queues
                .iter_mut()
                .map(|queue| queue.start(Op::Write, 0, 16384))
                .collect();
            // Only one of them is run until it ends: the other has to be woken by it.
            for (queue, token) in queues.iter_mut().zip(tokens) {
                assert_eq!(queue.wait(token), Outcome::Done);
            }
        }
    }
}

#[test]
fn a_read_only_disk_refuses_changes_in_the_engine_too() {
    let (writable, _directory) = volume(SIZE);
    let mut settings = writable.settings.clone();
    settings.read_only = true;
    let volume =
        VolumeEngine::new(settings, Arc::clone(writable.store()), Arc::new(|_| {})).unwrap();
    let mut queue = Queue::new(&volume);
    assert_eq!(queue.run(Op::Write, 0, 4096), Outcome::Failed);
    assert_eq!(queue.run(Op::Discard, 0, 4096), Outcome::Failed);
    assert_eq!(queue.run(Op::Read, 0, 4096), Outcome::Done);
}

#[test]
fn a_request_done_whole_waits_for_an_overlapping_one_that_has_to_be_prepared() {
    for method in [Method::RedirectOnWrite, Method::CopyOnWrite] {
        let (volume, _directory) = volume(SIZE);
        let mut queue = Queue::new(&volume);
        assert_eq!(queue.run(Op::Write, 0, 65536), Outcome::Done);
        for _ in 0..50 {
            take_snapshot(&volume, method);
            // The mover gets them one by one: it may have begun one when the plan of the next is made.
            let mut tokens = Vec::new();
            for block in 0..8 {
                let at = block * 4096;
                tokens.push(queue.start(Op::WriteZeroes { may_unmap: true }, at, 512));
                tokens.push(queue.start(Op::Write, at + 1024, 512));
                tokens.push(queue.start(Op::WriteZeroes { may_unmap: true }, at + 2048, 512));
            }
            for token in tokens {
                assert_eq!(queue.wait(token), Outcome::Done);
            }
        }
    }
}

#[test]
fn a_read_of_nothing_but_zeroes_ends_in_the_pass_that_started_it() {
    let (volume, _directory) = volume(SIZE);
    let mut queue = Queue::new(&volume);
    take_snapshot(&volume, Method::RedirectOnWrite);
    queue.fill(3);
    assert_eq!(queue.run(Op::Write, 0, 8192), Outcome::Done);
    assert_eq!(queue.run(Op::Discard, 0, 8192), Outcome::Done);
    let read = queue.start(Op::Read, 0, 4096);
    assert_eq!(queue.done.last(), Some(&(read, Outcome::Done)));
    assert_eq!(queue.first_byte(), 0);
}
