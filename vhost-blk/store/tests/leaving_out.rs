//! Parts of a snapshot that nobody needs: what goes, what stays, what it saves.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod harness;

use harness::crash::crash_in_every_recovery;
use harness::{Methods, Model, Op, Verdict, World, memory_files, read_all, small_options};
use vhost_blk_store::{ByteRange, LeaveOut, Maintenance, Method, StoreError, View};

/// Sectors of a block.
const BLOCK: u64 = 8;
const BLOCKS: u64 = 40;

fn world() -> World {
    world_of(BLOCKS)
}

fn world_of(blocks: u64) -> World {
    let model = Model::new(blocks * BLOCK);
    World::new(memory_files(model.bytes()), small_options(1), model)
}

fn snapshot(method: Method) -> Op {
    let verdict = Verdict::Keep;
    Op::Snapshot { method, verdict }
}

fn write(block: u64, blocks: u64) -> Op {
    Op::Write {
        sector: block * BLOCK,
        count: blocks * BLOCK,
    }
}

fn leave_out(block: u64, blocks: u64) -> Op {
    Op::LeaveOut {
        sector: block * BLOCK,
        count: blocks * BLOCK,
    }
}

/// Blocks of snapshot number `place` that are zeroes.
fn zeroed(world: &World, place: usize) -> Vec<u64> {
    let id = world.model.snapshots[place].id;
    let seen = read_all(world.volume(), View::Snapshot(id));
    (0..)
        .zip(seen.chunks(8))
        .filter(|(_, block)| block.iter().all(|value| *value == Some(0)))
        .map(|(block, _)| block)
        .collect()
}

const METHODS: [Method; 2] = [Method::RedirectOnWrite, Method::CopyOnWrite];

#[test]
fn what_was_left_out_costs_no_room_when_it_is_written() {
    for method in METHODS {
        let mut world = world();
        world.apply(&snapshot(method));
        world.apply(&leave_out(10, 20));
        assert_eq!(zeroed(&world, 0), (10..30).collect::<Vec<_>>());
        world.compare();
        let before = world.volume().status().log_used_bytes;
        world.apply(&write(10, 20));
        assert_eq!(world.volume().status().log_used_bytes, before, "{method:?}");
        world.apply(&write(30, 4));
        let after = world.volume().status().log_used_bytes;
        assert!(after >= before + 4 * 4096, "{method:?}: the rest is kept");
        world.compare();
        world.apply(&Op::KillReopen);
        world.compare();
        world.settle_everything(1);
    }
}

#[test]
fn what_an_older_snapshot_sees_stays_in_both() {
    for method in METHODS {
        for older in METHODS {
            let mut world = world();
            world.apply(&snapshot(older));
            world.apply(&write(10, 10));
            world.apply(&snapshot(method));
            world.apply(&leave_out(0, BLOCKS));
            // Written between the two: the newest alone sees it.
            assert_eq!(zeroed(&world, 1), (10..20).collect::<Vec<_>>());
            assert!(zeroed(&world, 0).is_empty());
            world.compare();
            world.apply(&write(0, BLOCKS));
            world.compare();
            world.settle_everything(2);
        }
    }
}

#[test]
fn an_older_snapshot_of_a_smaller_volume_needs_nothing_behind_its_end() {
    let mut world = world_of(20);
    world.apply(&snapshot(Method::CopyOnWrite));
    world.apply(&Op::Grow {
        by: 4 * BLOCK,
        prepared: false,
    });
    world.apply(&snapshot(Method::CopyOnWrite));
    let id = world.model.snapshots[1].id;
    let mut wanted = LeaveOut::new(&[ByteRange::new(0, world.volume().size_bytes())]);
    while world.volume().leave_out(id, &mut wanted).unwrap() {}
    assert_eq!(wanted.left_out_bytes(), 4 * 4096);
    world.compare();
}

#[test]
fn only_the_newest_snapshot_leaves_anything_out() {
    let mut world = world();
    world.apply(&snapshot(Method::CopyOnWrite));
    let older = world.model.snapshots[0].id;
    world.apply(&write(3, 3));
    world.apply(&snapshot(Method::CopyOnWrite));
    let mut wanted = LeaveOut::new(&[ByteRange::new(0, 20 * 4096)]);
    assert!(!world.volume().leave_out(older, &mut wanted).unwrap());
    assert_eq!(wanted.left_out_bytes(), 0);
    world.compare();
    world.apply(&Op::Delete { which: 1 });
    let mut wanted = LeaveOut::new(&[ByteRange::new(0, 20 * 4096)]);
    while world.volume().leave_out(older, &mut wanted).unwrap() {}
    // Three blocks were written since.
    assert_eq!(wanted.left_out_bytes(), 17 * 4096);
    let nobodys = uuid::Uuid::from_u128(77).into();
    let refused = world.volume().leave_out(nobodys, &mut wanted);
    assert!(matches!(refused, Err(StoreError::NoSuchSnapshot(_))));
}

#[test]
fn a_write_that_came_first_keeps_the_old_data() {
    for method in METHODS {
        let mut world = world();
        world.apply(&snapshot(method));
        world.apply(&write(12, 1));
        world.apply(&leave_out(10, 5));
        assert_eq!(zeroed(&world, 0), [10, 11, 13, 14], "{method:?}");
        world.compare();
    }
}

#[test]
fn parts_of_blocks_and_ranges_that_overlap_are_counted_once() {
    let mut world = world();
    world.apply(&snapshot(Method::CopyOnWrite));
    let id = world.model.snapshots[0].id;
    let ranges = [
        ByteRange::new(512, 3 * 4096),
        ByteRange::new(4096, 3 * 4096),
        ByteRange::new(38 * 4096, 100 * 4096),
        ByteRange::new(512, 512),
    ];
    let mut wanted = LeaveOut::new(&ranges);
    while world.volume().leave_out(id, &mut wanted).unwrap() {}
    assert_eq!(zeroed(&world, 0), [1, 2, 3, 38, 39]);
    assert_eq!(wanted.left_out_bytes(), 5 * 4096);
}

/// Steps until nothing is left to do, and bytes left out.
fn steps(world: &World, ranges: &[ByteRange]) -> (u32, u64) {
    let id = world.model.snapshots[0].id;
    let mut wanted = LeaveOut::new(ranges);
    let mut steps = 0;
    while world.volume().leave_out(id, &mut wanted).unwrap() {
        steps += 1;
    }
    (steps, wanted.left_out_bytes())
}

/// What a guest names again, and what it names in pieces, makes a store work no longer: each step is a sync.
#[test]
fn the_number_of_ranges_does_not_multiply_the_work() {
    let whole = ByteRange::new(0, BLOCKS * 4096);
    let again = vec![whole; 1000];
    let pieces: Vec<ByteRange> = (0..BLOCKS / 2)
        .map(|piece| ByteRange::new(piece * 2 * 4096, 4096))
        .collect();
    for (ranges, blocks) in [(vec![whole], BLOCKS), (again, BLOCKS), (pieces, BLOCKS / 2)] {
        let mut world = world();
        world.apply(&snapshot(Method::CopyOnWrite));
        let (steps, bytes) = steps(&world, &ranges);
        assert_eq!(bytes, blocks * 4096);
        assert!(steps <= 8, "{} ranges: {steps} steps", ranges.len());
    }
}

#[test]
fn a_revert_gives_zeroes_and_the_rest() {
    for method in METHODS {
        let mut world = world();
        world.apply(&snapshot(method));
        world.apply(&leave_out(10, 5));
        world.apply(&write(8, 20));
        world.apply(&Op::Revert { which: 0 });
        world.compare();
        assert_eq!(zeroed(&world, 0), [10, 11, 12, 13, 14]);
        world.settle_everything(3);
    }
}

#[test]
fn redirected_blocks_that_are_left_out_later_go_home() {
    let mut world = world();
    world.apply(&snapshot(Method::RedirectOnWrite));
    world.apply(&write(10, 10));
    world.apply(&snapshot(Method::RedirectOnWrite));
    world.apply(&leave_out(10, 10));
    world.apply(&write(10, 10));
    world.apply(&Op::Delete { which: 0 });
    while world.volume().maintain(8).unwrap() == Maintenance::More {}
    assert_eq!(world.volume().status().log_used_bytes, 0);
    world.compare();
}

#[test]
fn leaving_out_survives_crashes_in_every_recovery() {
    for (methods, method) in [
        (Methods::Redirect, Method::RedirectOnWrite),
        (Methods::Copy, Method::CopyOnWrite),
    ] {
        let ops = [
            snapshot(method),
            write(1, 3),
            snapshot(method),
            leave_out(0, 8),
            write(0, 8),
            Op::Flush,
            Op::BeginSnapshot { method },
            leave_out(0, 8),
            write(2, 4),
        ];
        let tried = crash_in_every_recovery(methods, &ops);
        println!("{methods:?}: {tried}");
    }
}
