//! First touches by copy-on-write: how many rounds of syncs they cost.

use super::super::alone::Alone;
use super::super::copy::Landed;
use super::faults::{head_bytes, snapshot_bytes};
use super::{Method, Op, Outcome, Queue, Request, SIZE, Token, syncs, take_snapshot, volume};
use crate::engine::{GuestBuffers, GuestRange};
use std::sync::Arc;
use vhost_blk_store::{ByteRange, WriteKind};

#[test]
fn first_touches_that_arrive_together_share_one_sync() {
    let (volume, _directory) = volume(SIZE);
    take_snapshot(&volume, Method::CopyOnWrite);
    let mut queue = Queue::new(&volume);
    assert_eq!(queue.run(Op::Flush, 0, 0), Outcome::Done);
    let before = syncs(&volume);
    let range = |place: u64| vhost_blk_wire::types::ByteRange {
        offset_bytes: place * (64 << 10),
        length_bytes: 4096,
    };
    for place in 0..16 {
        let guest = GuestRange {
            address: 0,
            length_bytes: 4096,
        };
        let buffers = GuestBuffers::new(Arc::clone(&queue.memory), &[guest]).unwrap();
        let request = Request {
            op: Op::Write,
            range: range(place),
            buffers,
        };
        queue.worker.submit(Token(place), request);
    }
    queue.pass();
    for place in 0..16 {
        assert_eq!(queue.wait(Token(place)), Outcome::Done);
    }
    assert_eq!(syncs(&volume), before + 1);
}

#[test]
fn a_copy_is_preserved_alike_by_its_queue_and_by_a_hand() {
    for alone in [Alone::default, Alone::never] {
        let (volume, _directory) = volume(SIZE);
        let mut queue = Queue::new(&volume);
        queue.fill(1);
        for place in 0..8 {
            assert_eq!(
                queue.run(Op::Write, place * (64 << 10), 4096),
                Outcome::Done
            );
        }
        take_snapshot(&volume, Method::CopyOnWrite);
        queue.fill(2);
        let before = syncs(&volume);
        for place in 0..8 {
            let offset_bytes = place * (64 << 10);
            // What it learnt of the test's disk is forgotten.
            queue.worker.alone = alone();
            assert_eq!(queue.run(Op::Write, offset_bytes, 4096), Outcome::Done);
            assert!(
                head_bytes(&volume, offset_bytes, 4096)
                    .iter()
                    .all(|byte| *byte == 2)
            );
            assert!(
                snapshot_bytes(&volume, offset_bytes, 4096)
                    .iter()
                    .all(|byte| *byte == 1)
            );
        }
        assert_eq!(syncs(&volume), before + 8, "one each");
    }
}

#[test]
fn a_landed_copy_waits_for_those_that_were_under_way_and_for_no_younger_ones() {
    let (volume, _directory) = volume(SIZE);
    take_snapshot(&volume, Method::CopyOnWrite);
    let plan = |number: u32| {
        let range = ByteRange::new(u64::from(number) * (64 << 10), 4096);
        let plan = volume.store().plan_write(range, WriteKind::Write).unwrap();
        Some((number, plan))
    };
    let mut landed = Landed::default();
    assert!(!landed.is_due());
    let (first, second, third) = (landed.begin(), landed.begin(), landed.begin());
    landed.end(second, plan(2));
    assert!(!landed.is_due());
    let younger = landed.begin();
    landed.end(first, None);
    assert!(!landed.is_due(), "one is left");
    landed.end(third, plan(3));
    assert!(landed.is_due(), "the younger one is not waited for");
    assert_eq!(landed.take().len(), 2);
    assert!(!landed.is_due());
    landed.end(younger, plan(4));
    assert!(landed.is_due(), "nobody is under way");
    let alone = landed.begin();
    landed.end(alone, None);
    assert_eq!(landed.take().len(), 1);
    let failed = landed.begin();
    landed.end(failed, None);
    assert!(!landed.is_due(), "there is no plan");
}
