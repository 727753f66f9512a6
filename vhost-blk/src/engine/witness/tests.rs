//! What a mark counts.

use super::{Watched, Witness};
use crate::engine::Op;
use proptest::prelude::*;
use vhost_blk_wire::types::ByteRange;

fn bytes(offset_bytes: u64, length_bytes: u64) -> ByteRange {
    ByteRange {
        offset_bytes,
        length_bytes,
    }
}

fn everything() -> Watched {
    Watched::AllBut(Vec::new())
}

#[test]
fn only_requests_that_change_the_disk_count() {
    let witness = Witness::default();
    let mark = witness.mark(everything());
    for op in [
        Op::Read,
        Op::Flush,
        Op::Write,
        Op::Discard,
        Op::WriteZeroes { may_unmap: true },
    ] {
        let arrival = witness.arrived(op, bytes(512, 512));
        witness.landed(op, bytes(512, 512), arrival);
    }
    let count = witness.read(mark).unwrap();
    assert_eq!(
        (count.writes, count.discards, count.write_zeroes),
        (1, 1, 1)
    );
    assert_eq!(count.first, Some(bytes(512, 512)));
}

#[test]
fn a_write_in_flight_at_the_mark_counts_when_it_lands() {
    let witness = Witness::default();
    let arrival = witness.arrived(Op::Write, bytes(0, 4096));
    let mark = witness.mark(everything());
    assert_eq!(witness.read(mark).unwrap().total(), 0);
    witness.landed(Op::Write, bytes(0, 4096), arrival);
    assert_eq!(witness.read(mark).unwrap().total(), 1);
}

#[test]
fn a_write_that_landed_before_the_mark_does_not_count() {
    let witness = Witness::default();
    let arrival = witness.arrived(Op::Write, bytes(0, 4096));
    witness.landed(Op::Write, bytes(0, 4096), arrival);
    let mark = witness.mark(everything());
    assert_eq!(witness.read(mark).unwrap().total(), 0);
}

#[test]
fn each_mark_counts_a_request_once() {
    let witness = Witness::default();
    let early = witness.mark(everything());
    let arrival = witness.arrived(Op::Write, bytes(0, 4096));
    let late = witness.mark(everything());
    witness.landed(Op::Write, bytes(0, 4096), arrival);
    assert_eq!(witness.read(early).unwrap().total(), 1);
    assert_eq!(witness.read(late).unwrap().total(), 1);
}

#[test]
fn a_write_into_an_exempt_range_does_not_count_and_one_across_its_border_does() {
    let witness = Witness::default();
    let mark = witness.mark(Watched::AllBut(vec![bytes(8192, 4096), bytes(4096, 4096)]));
    let send = |range| {
        let arrival = witness.arrived(Op::Write, range);
        witness.landed(Op::Write, range, arrival);
    };
    send(bytes(4096, 8192));
    assert_eq!(witness.read(mark).unwrap().total(), 0);
    send(bytes(8192, 4608));
    assert_eq!(witness.read(mark).unwrap().total(), 1);
    send(bytes(3584, 1024));
    assert_eq!(witness.read(mark).unwrap().total(), 2);
}

#[test]
fn a_removed_mark_cannot_be_read() {
    let witness = Witness::default();
    let mark = witness.mark(everything());
    assert!(witness.unmark(mark));
    assert!(!witness.unmark(mark));
    assert_eq!(witness.read(mark), None);
}

proptest! {
    #[test]
    fn watched_ranges_agree_with_a_map_of_bytes(
        ranges in proptest::collection::vec((0_u64..64, 0_u64..16), 0..6),
        offset in 0_u64..64,
        length in 1_u64..16,
    ) {
        let ranges: Vec<_> = ranges.into_iter().map(|(at, len)| bytes(at, len)).collect();
        let covered = |byte: u64| ranges.iter().any(|range| {
            (range.offset_bytes..range.offset_bytes + range.length_bytes).contains(&byte)
        });
        let only = (offset..offset + length).any(covered);
        let all_but = (offset..offset + length).any(|byte| !covered(byte));
        prop_assert_eq!(Watched::Only(ranges.clone()).touches(bytes(offset, length)), only);
        prop_assert_eq!(Watched::AllBut(ranges.clone()).touches(bytes(offset, length)), all_but);
    }
}
