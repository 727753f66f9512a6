//! Tests of free and used blocks of the log.

use super::*;

fn space(limit_blocks: u64) -> Space {
    Space::new(8 * BLOCK_BYTES, limit_blocks * BLOCK_BYTES, 0)
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
fn block_set_is_a_set_in_every_part() {
    // Parts that are no multiple of a word, and bits in all of them.
    for part in [1, 7, 64, 100] {
        let mut set = BlockSet::new(part);
        let mut plain = std::collections::BTreeSet::new();
        for step in 0..2_000_u64 {
            let block = step * 7919 % 331;
            if step % 3 == 2 {
                assert_eq!(set.remove(block), plain.remove(&block));
            } else {
                assert_eq!(set.insert(block), plain.insert(block));
            }
            assert!((0..340).all(|block| set.contains(block) == plain.contains(&block)));
            assert_eq!(set.last(), plain.last().copied());
            let counted: u64 = (0..set.parts()).map(|number| set.count_in(number)).sum();
            assert_eq!(counted, plain.len() as u64);
            let from = block / part * part;
            let absent = (from..from + part).find(|block| !plain.contains(block));
            assert_eq!(set.first_absent(from, from + part), absent);
        }
        (0..331).for_each(|block| {
            set.insert(block);
        });
        let mut full = BlockSet::full(part, 2);
        assert!((0..2 * part).all(|block| full.contains(block)));
        assert_eq!(
            full.common_in(&set, 1),
            (part..2 * part).collect::<Vec<_>>()
        );
        assert!(full.remove(part) && !full.contains(part));
        assert_eq!(full.count_in(1), part - 1);
    }
}

#[test]
fn log_only_grows_until_the_scan_has_ended() {
    let mut space = space(1000);
    space.begin_scan(21);
    let run = space.allocate(3).unwrap()[0];
    assert_eq!(run.start, LogBlock(21), "nothing below the mark is given");
    space.note_named(LogBlock(4));
    space.note_named(LogBlock(19));
    // Freed meanwhile: the scan may have seen it, so it stays until a sweep.
    space.free(LogRun {
        start: LogBlock(19),
        count: 1,
    });
    space.end_scan();
    assert_eq!(space.used_blocks(), 2 + 3);
    let given: Vec<u64> = (0..20)
        .map(|_| space.allocate(1).unwrap()[0].start.0)
        .collect();
    assert!(!given.contains(&4) && !given.contains(&19));
    assert_eq!(given.iter().filter(|block| **block < 21).count(), 19);
}

#[test]
fn sweep_frees_what_was_there_and_is_named_no_more_and_nothing_else() {
    let mut space = space(1000);
    space.allocate(30).unwrap();
    space.begin_sweep();
    let during = space.allocate(5).unwrap()[0];
    (0..20).for_each(|block| space.note_named(LogBlock(block)));
    // Freed and given again while the sweep is under way: it is somebody else's now.
    space.free(LogRun {
        start: LogBlock(25),
        count: 1,
    });
    assert_eq!(space.allocate(1).unwrap()[0].start, LogBlock(25));
    let mut cursor = Some(0);
    while let Some(at) = cursor {
        cursor = space.sweep(at);
    }
    assert_eq!(space.used_blocks(), 20 + 5 + 1);
    let mut freed: Vec<u64> = Vec::new();
    for run in space.allocate(9).unwrap() {
        freed.extend(run.start.0..run.start.0 + run.count);
    }
    freed.sort_unstable();
    assert_eq!(freed, [20, 21, 22, 23, 24, 26, 27, 28, 29]);
    assert_eq!(during.start, LogBlock(30));
}

#[test]
fn segment_that_is_made_ready_is_closed_meanwhile_and_used_first_afterwards() {
    let mut space = space(32);
    assert_eq!(space.take_bare_segment(2), Some(0));
    let early = space.allocate(1).unwrap()[0];
    assert_eq!(early.start, LogBlock(8), "segment 0 is being written");
    space.ready(0);
    assert_eq!(space.allocate(1).unwrap()[0].start, LogBlock(0));
    assert_eq!(
        space.take_bare_segment(2),
        Some(2),
        "not segment 1, which has data in it"
    );
    space.released(2);
    assert_eq!(space.take_bare_segment(1), None, "more than half is left");
    space.allocate(7).unwrap();
    assert_eq!(space.take_bare_segment(1), Some(2));
}
