//! Tests of free and used blocks of the log.

use super::*;

fn space(limit_blocks: u64) -> Space {
    Space::new(8 * BLOCK_BYTES, limit_blocks * BLOCK_BYTES)
}

#[test]
fn allocation_is_contiguous_while_it_can_be() {
    let mut space = space(1000);
    let runs = space.allocate(20).unwrap();
    assert_eq!(
        runs,
        [LogRun {
            start: LogBlock(0),
            count: 20
        }]
    );
    assert_eq!(space.bare_segments(runs[0]), [0, 1, 2]);
    space.set_backed(0);
    assert_eq!(space.bare_segments(runs[0]), [1, 2]);
}

#[test]
fn no_block_is_given_twice_and_the_limit_holds() {
    let mut space = space(21);
    let mut seen = std::collections::HashSet::new();
    let mut given = Vec::new();
    while let Some(runs) = space.allocate(3) {
        for run in runs {
            for block in run.start.0..run.start.0 + run.count {
                assert!(block < 21 && seen.insert(block));
            }
            given.push(run);
        }
    }
    assert_eq!(seen.len(), 21);
    assert_eq!(space.used_blocks(), 21);
    for run in given {
        space.free(run);
    }
    assert_eq!(space.used_blocks(), 0);
    assert_eq!(space.allocate(21).unwrap()[0].count, 21);
}

#[test]
fn failed_allocation_takes_nothing() {
    let mut space = space(10);
    space.allocate(4).unwrap();
    assert!(space.allocate(7).is_none());
    assert_eq!(space.used_blocks(), 4);
    assert!(space.allocate(6).is_some());
}

#[test]
fn idle_segment_is_closed_until_its_hole_is_punched() {
    let mut space = space(16);
    let runs = space.allocate(16).unwrap();
    space.set_backed(0);
    space.set_backed(1);
    space.free(runs[0]);
    assert_eq!(space.take_idle_segment(1), Some(1));
    assert_eq!(space.take_idle_segment(1), None);
    assert!(
        space.allocate(9).is_none(),
        "segment 1 must not be used while it is punched"
    );
    space.released(1);
    let run = space.allocate(16).unwrap()[0];
    assert_eq!(space.bare_segments(run), [1]);
}

#[test]
fn bitmap_walks_its_bits() {
    let mut bits = Bitmap::default();
    for bit in [0, 1, 63, 64, 200] {
        bits.set(bit);
    }
    assert_eq!(bits.ones().collect::<Vec<_>>(), [0, 1, 63, 64, 200]);
    let mut other = Bitmap::default();
    other.set(63);
    assert_eq!(bits.minus(&other).ones().count(), 4);
    assert_eq!(bits.first_clear(0, 300), Some(2));
    assert_eq!(bits.first_clear(63, 65), None);
}
