//! First writes after a snapshot, with the kernel's answers and the guest's memory changed under way.

mod joined;

use super::{Queue, SIZE, syncs, take_snapshot};
use crate::engine::ring::Direction;
use crate::engine::testing::volume;
use crate::engine::upkeep::Alarm;
use crate::engine::worker::Mover;
use crate::engine::{
    EngineKind, GuestBuffers, GuestRange, Op, Outcome, Request, Token, VolumeEngine, Watched,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use vhost_blk_store::{DataFile, Method, View, WriteKind};
use vhost_blk_wire::types::ByteRange;
use vm_memory::{Bytes, GuestAddress};

/// What a test does with an answer of the kernel: which file, which way, whether the memory is private, the answer.
type Hook = Box<dyn FnMut(DataFile, Direction, bool, i32) -> i32 + Send>;

impl Queue {
    /// Puts a hook between kernel and ring; answers false where there is no io_uring.
    fn meddle(&mut self, mut hook: Hook) -> bool {
        self.pass();
        let Mover::Ring(ring) = &mut self.worker.mover else {
            println!("skipped: no io_uring here");
            return false;
        };
        ring.fault.0 = Some(Box::new(move |transfer, result| {
            hook(
                transfer.file,
                transfer.span.direction,
                transfer.is_private(),
                result,
            )
        }));
        true
    }

    fn leave_alone(&mut self) {
        if let Mover::Ring(ring) = &mut self.worker.mover {
            ring.fault.0 = None;
        }
    }

    /// A write of guest memory from `address` on.
    fn start_write_from(&mut self, address: u64, offset_bytes: u64, length: u32) -> Token {
        let token = self.submit_write_from(address, offset_bytes, length);
        self.pass();
        token
    }

    /// The same, but the pass that starts it is the caller's.
    fn submit_write_from(&mut self, address: u64, offset_bytes: u64, length: u32) -> Token {
        let range = GuestRange {
            address,
            length_bytes: length,
        };
        let request = Request {
            op: Op::Write,
            range: ByteRange {
                offset_bytes,
                length_bytes: u64::from(length),
            },
            buffers: GuestBuffers::new(Arc::clone(&self.memory), &[range]).unwrap(),
        };
        let token = Token(self.next);
        self.next += 1;
        self.worker.submit(token, request);
        token
    }
}

pub(super) fn snapshot_bytes(volume: &VolumeEngine, offset_bytes: u64, length: usize) -> Vec<u8> {
    let id = volume.store().snapshots().last().unwrap().snapshot_id;
    let mut bytes = vec![0; length];
    let view = View::Snapshot(id);
    volume
        .store()
        .read_at(view, offset_bytes, &mut bytes)
        .unwrap();
    bytes
}

pub(super) fn head_bytes(volume: &VolumeEngine, offset_bytes: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    volume
        .store()
        .read_at(View::Head, offset_bytes, &mut bytes)
        .unwrap();
    bytes
}

#[test]
fn a_guest_that_changes_its_buffer_under_way_changes_nothing_of_a_sealed_write() {
    let (volume, _directory) = volume(SIZE);
    let mut queue = Queue::new(&volume);
    take_snapshot(&volume, Method::RedirectOnWrite);
    // Makes room: that is not what is asked here.
    assert_eq!(queue.run(Op::Write, 65536, 4096), Outcome::Done);
    assert_eq!(queue.run(Op::Flush, 0, 0), Outcome::Done);
    let before = syncs(&volume);
    queue.fill(1);
    let guest = Arc::clone(&queue.memory);
    let mut first = true;
    let meddled = queue.meddle(Box::new(move |file, _, private, result| {
        assert_eq!((file, private), (DataFile::Log, true));
        if !std::mem::take(&mut first) {
            return result;
        }
        // The rest is written again, from what the memory holds now.
        guest.write_slice(&[2; 8192], GuestAddress(0)).unwrap();
        512
    }));
    if !meddled {
        return;
    }
    assert_eq!(queue.run(Op::Write, 0, 8192), Outcome::Done);
    assert!(head_bytes(&volume, 0, 8192) == [1; 8192]);
    assert_eq!(queue.run(Op::Flush, 0, 0), Outcome::Done);
    assert_eq!(syncs(&volume), before + 1, "a sealed write and its record");
}

#[test]
fn copies_that_come_short_go_on_and_are_whole() {
    for method in [Method::CopyOnWrite, Method::RedirectOnWrite] {
        let (volume, _directory) = volume(SIZE);
        let mut queue = Queue::new(&volume);
        queue.fill(1);
        assert_eq!(queue.run(Op::Write, 0, 65536), Outcome::Done);
        take_snapshot(&volume, method);
        assert_eq!(queue.run(Op::Write, 65536, 4096), Outcome::Done);
        if !queue.meddle(Box::new(|_, _, _, result| result.min(512))) {
            return;
        }
        queue.fill(2);
        // In the middle of a block, and whole blocks behind it.
        assert_eq!(queue.run(Op::Write, 1024, 512), Outcome::Done);
        assert_eq!(queue.run(Op::Write, 8192, 12288), Outcome::Done);
        queue.leave_alone();
        let mut expected = vec![1; 65536];
        assert!(snapshot_bytes(&volume, 0, 65536) == expected, "{method:?}");
        expected[1024..1536].fill(2);
        expected[8192..20480].fill(2);
        assert!(head_bytes(&volume, 0, 65536) == expected, "{method:?}");
        assert_eq!(queue.run(Op::Flush, 0, 0), Outcome::Done);
    }
}

#[test]
fn a_copy_that_fails_fails_its_write_alone_and_frees_its_blocks_for_others() {
    for failing in [Direction::FromFile, Direction::ToFile] {
        let (volume, _directory) = volume(SIZE);
        let mut queue = Queue::new(&volume);
        let mut other = Queue::new(&volume);
        queue.fill(1);
        assert_eq!(queue.run(Op::Write, 0, 65536), Outcome::Done);
        take_snapshot(&volume, Method::CopyOnWrite);
        assert_eq!(queue.run(Op::Write, 65536, 4096), Outcome::Done);
        let mut first = true;
        let meddled = queue.meddle(Box::new(move |file, direction, private, result| {
            let copies = private
                && (direction == Direction::FromFile) == (file == DataFile::Base)
                && direction == failing;
            if copies && std::mem::take(&mut first) {
                return -libc::EIO;
            }
            result
        }));
        if !meddled {
            return;
        }
        queue.fill(2);
        other.fill(3);
        // Not neighbours in the log, or they could go as one and fail as one: another queue's copy lies between.
        let spoilt = queue.start(Op::Write, 0, 8192);
        let waiting = other.start(Op::Write, 4096, 8192);
        let between = other.start(Op::Write, 49152, 4096);
        let beside = queue.start(Op::Write, 32768, 4096);
        assert_eq!(queue.wait(spoilt), Outcome::Failed);
        assert_eq!(queue.wait(beside), Outcome::Done);
        // Woken by the failure, and by nothing else.
        assert_eq!(other.wait(waiting), Outcome::Done);
        assert_eq!(other.wait(between), Outcome::Done);
        assert!(snapshot_bytes(&volume, 0, 65536) == [1; 65536]);
        let mut expected = vec![1; 65536];
        expected[4096..12288].fill(3);
        expected[49152..53248].fill(3);
        expected[32768..36864].fill(2);
        assert!(head_bytes(&volume, 0, 65536) == expected);
        assert_eq!(volume.barrier.in_flight(), 0);
    }
}

#[test]
fn a_redirected_write_that_fails_at_the_disk_changes_nothing() {
    let (volume, _directory) = volume(SIZE);
    let mut queue = Queue::new(&volume);
    queue.fill(1);
    assert_eq!(queue.run(Op::Write, 0, 65536), Outcome::Done);
    take_snapshot(&volume, Method::RedirectOnWrite);
    if !queue.meddle(Box::new(|_, _, _, _| -libc::EIO)) {
        return;
    }
    queue.fill(2);
    assert_eq!(queue.run(Op::Write, 0, 8192), Outcome::Failed);
    assert_eq!(queue.run(Op::Read, 0, 4096), Outcome::Failed);
    queue.leave_alone();
    assert!(head_bytes(&volume, 0, 65536) == [1; 65536]);
    queue.fill(2);
    assert_eq!(queue.run(Op::Write, 0, 8192), Outcome::Done);
    assert!(head_bytes(&volume, 0, 8192) == [2; 8192]);
}

#[test]
fn a_hold_waits_for_copies_under_way_and_the_snapshot_has_their_write() {
    let (volume, _directory) = volume(SIZE);
    let mut queue = Queue::new(&volume);
    queue.fill(1);
    assert_eq!(queue.run(Op::Write, 0, 65536), Outcome::Done);
    for byte in 2..10 {
        take_snapshot(&volume, Method::CopyOnWrite);
        queue.fill(byte);
        // In one pass: what comes behind the end of one may wait for blocks that another takes along, and then for the hold.
        let tokens: Vec<_> = (0..8)
            .map(|block| queue.submit_write_from(0, block * 8192, 4096))
            .collect();
        queue.pass();
        let hold = volume
            .barrier
            .hold(Instant::now() + Duration::from_secs(60))
            .unwrap();
        let late = queue.start(Op::Write, 4096, 4096);
        let drained = std::thread::scope(|scope| {
            let drained = scope.spawn(|| volume.barrier.drain(hold));
            for token in tokens {
                assert_eq!(queue.wait(token), Outcome::Done);
            }
            drained.join().unwrap()
        });
        assert!(drained);
        take_snapshot(&volume, Method::CopyOnWrite);
        assert!(queue.done.iter().all(|(token, _)| *token != late));
        let image = snapshot_bytes(&volume, 0, 65536);
        assert!(image.chunks(8192).all(|pair| pair[..4096] == [byte; 4096]));
        assert!(image[4096..8192] == [byte - 1; 4096] || byte == 2);
        volume.barrier.release(hold);
        volume.wake_queues();
        assert_eq!(queue.wait(late), Outcome::Done);
        assert!(snapshot_bytes(&volume, 0, 65536) == image);
    }
}

#[test]
fn whole_requests_that_wait_for_another_write_are_tried_once_more_and_then_only_when_it_ends() {
    for engine in [EngineKind::Auto, EngineKind::Sync] {
        let (any, _directory) = volume(SIZE);
        let mut settings = any.settings.clone();
        settings.engine = engine;
        let store = Arc::clone(any.store());
        let volume = VolumeEngine::new(settings, store, Arc::new(|_| {})).unwrap();
        let mut queue = Queue::new(&volume);
        take_snapshot(&volume, Method::RedirectOnWrite);
        let blocks = vhost_blk_store::ByteRange::new(0, 8192);
        let in_the_way = volume.store().plan_write(blocks, WriteKind::Write).unwrap();
        let zeroes = Op::WriteZeroes { may_unmap: false };
        let tokens = [0, 4096].map(|offset| queue.start(zeroes, offset, 4096));
        let deadline = Instant::now() + Duration::from_secs(30);
        while !queue.worker.is_idle() {
            assert!(Instant::now() < deadline, "it goes round and round");
            queue.pass();
        }
        let news = volume.news();
        for _ in 0..100 {
            queue.pass();
            assert!(
                queue.worker.is_idle(),
                "nothing has changed, nothing is tried"
            );
        }
        assert_eq!(volume.news(), news);
        drop(in_the_way);
        volume.wake_queues();
        for token in tokens {
            assert_eq!(queue.wait(token), Outcome::Done);
        }
    }
}

/// A write longer than the pieces that the blocking path moves, whose second piece meets another write.
#[test]
fn what_was_done_of_a_request_that_is_parked_is_counted_at_once_and_only_once() {
    const LENGTH: u32 = 2 << 20;
    let (any, _directory) = volume(SIZE);
    let mut settings = any.settings.clone();
    settings.engine = EngineKind::Sync;
    let store = Arc::clone(any.store());
    let volume = VolumeEngine::new(settings, store, Arc::new(|_| {})).unwrap();
    let mut queue = Queue::new(&volume);
    take_snapshot(&volume, Method::RedirectOnWrite);
    let blocks = vhost_blk_store::ByteRange::new(1 << 20, 4096);
    let in_the_way = volume.store().plan_write(blocks, WriteKind::Write).unwrap();
    let whole = GuestRange {
        address: 0,
        length_bytes: 0x1_0000,
    };
    let ranges = vec![whole; LENGTH as usize / 0x1_0000];
    let request = Request {
        op: Op::Write,
        range: ByteRange {
            offset_bytes: 0,
            length_bytes: u64::from(LENGTH),
        },
        buffers: GuestBuffers::new(Arc::clone(&queue.memory), &ranges).unwrap(),
    };
    let token = Token(queue.next);
    queue.next += 1;
    queue.worker.submit(token, request);
    let mark = volume.witness.mark(Watched::AllBut(Vec::new()));
    assert_eq!(volume.witness.read(mark).unwrap().writes, 0);
    queue.pass();
    assert_eq!(queue.done, []);
    assert_eq!(
        volume.witness.read(mark).unwrap().writes,
        1,
        "its first piece is on the disk"
    );
    drop(in_the_way);
    volume.wake_queues();
    assert_eq!(queue.wait(token), Outcome::Done);
    assert_eq!(volume.witness.read(mark).unwrap().writes, 1);
}

#[test]
fn writes_at_odd_addresses_of_guest_memory_land_whole() {
    for method in [Method::CopyOnWrite, Method::RedirectOnWrite] {
        let (volume, _directory) = volume(SIZE);
        let mut queue = Queue::new(&volume);
        queue.fill(1);
        take_snapshot(&volume, method);
        for round in 0..2 {
            let token = queue.start_write_from(3 + round, 4096, 4096);
            assert_eq!(queue.wait(token), Outcome::Done);
        }
        assert!(head_bytes(&volume, 4096, 4096) == [1; 4096]);
        assert!(snapshot_bytes(&volume, 4096, 4096) == [0; 4096]);
    }
}

#[test]
fn a_write_that_the_file_system_has_no_room_for_waits_and_is_done_when_there_is() {
    for method in [
        None,
        Some(Method::RedirectOnWrite),
        Some(Method::CopyOnWrite),
    ] {
        let (volume, _directory) = volume(SIZE);
        let mut queue = Queue::new(&volume);
        if let Some(method) = method {
            take_snapshot(&volume, method);
            // Makes room: that is not what is asked here.
            assert_eq!(queue.run(Op::Write, 65536, 4096), Outcome::Done);
        }
        let full = Arc::new(AtomicBool::new(true));
        let still = Arc::clone(&full);
        let meddled = queue.meddle(Box::new(move |_, direction, _, result| {
            if direction == Direction::ToFile && still.load(Ordering::SeqCst) {
                -libc::ENOSPC
            } else {
                result
            }
        }));
        if !meddled {
            return;
        }
        queue.fill(7);
        let token = queue.start(Op::Write, 8192, 4096);
        let deadline = Instant::now() + Duration::from_secs(30);
        while !volume.lacks_room() {
            assert!(Instant::now() < deadline, "{method:?}: it does not wait");
            queue.pass();
        }
        for _ in 0..100 {
            queue.pass();
        }
        let answered = queue.done.iter().any(|(done, _)| *done == token);
        assert!(!answered, "{method:?}");
        assert!(queue.worker.is_idle(), "{method:?}: it keeps trying");
        full.store(false, Ordering::SeqCst);
        volume.try_room_again();
        assert_eq!(queue.wait(token), Outcome::Done, "{method:?}");
        assert!(!volume.lacks_room());
        assert!(head_bytes(&volume, 8192, 4096) == [7; 4096]);
        if method.is_some() {
            assert!(snapshot_bytes(&volume, 8192, 4096) == [0; 4096]);
        }
    }
}

#[test]
fn a_write_that_finds_no_room_again_calls_for_it_only_once() {
    let (volume, _directory) = volume(SIZE);
    let alarm = Arc::new(Alarm::default());
    volume.set_alarm(&alarm);
    let mut queue = Queue::new(&volume);
    let tries = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&tries);
    let meddled = queue.meddle(Box::new(move |_, _, _, _| {
        count.fetch_add(1, Ordering::SeqCst);
        -libc::ENOSPC
    }));
    if !meddled {
        return;
    }
    let token = queue.start(Op::Write, 8192, 4096);
    for round in 1..=3 {
        let deadline = Instant::now() + Duration::from_secs(30);
        while tries.load(Ordering::SeqCst) < round || !volume.lacks_room() {
            assert!(Instant::now() < deadline, "round {round}: it is not tried");
            queue.pass();
        }
        let rung = alarm.wait(Duration::ZERO);
        assert_eq!(rung, Some(round == 1), "round {round}");
        volume.try_room_again();
    }
    queue.leave_alone();
    volume.try_room_again();
    assert_eq!(queue.wait(token), Outcome::Done);
}
