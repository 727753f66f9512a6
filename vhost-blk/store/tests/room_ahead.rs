//! Room for the writes after a snapshot is made before it and in the background, and no write has to make it.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod harness;

use harness::{Methods, Model, Op, Verdict, World, history, memory_files, small_options};
use vhost_blk_store::{ByteRange, Maintenance, Method, OpenOptions, WriteKind};

const SEGMENT_BYTES: u64 = 8 * 4096;

fn world(segments_ahead: u64) -> World {
    let model = Model::new(1024);
    let options = OpenOptions {
        segments_ahead,
        ..small_options(1)
    };
    World::new(memory_files(model.bytes()), options, model)
}

fn snapshot(world: &mut World) {
    world.apply(&Op::Snapshot {
        method: Method::RedirectOnWrite,
        verdict: Verdict::Keep,
    });
}

fn maintain_to_the_end(world: &World) {
    while world.volume().maintain(4).unwrap() != Maintenance::Idle {}
}

#[test]
fn a_volume_without_snapshots_sets_no_room_aside() {
    let mut world = world(3);
    world.apply(&Op::Write {
        sector: 0,
        count: 64,
    });
    maintain_to_the_end(&world);
    let status = world.volume().status();
    assert_eq!((status.log_ahead_bytes, status.log_backed_bytes), (0, 0));
}

#[test]
fn the_first_write_after_a_snapshot_finds_room_that_was_written() {
    let mut world = world(3);
    snapshot(&mut world);
    assert_eq!(world.volume().status().log_ahead_bytes, SEGMENT_BYTES);
    let plan = world
        .volume()
        .plan_write(ByteRange::new(0, 4096), WriteKind::Write)
        .unwrap();
    assert!(!plan.needs_prepare());
}

#[test]
fn room_ahead_follows_the_writes_and_no_write_makes_it() {
    let mut world = world(3);
    snapshot(&mut world);
    for place in 0..100 {
        let range = ByteRange::new(place * 4096, 4096);
        let plan = world.volume().plan_write(range, WriteKind::Write).unwrap();
        assert!(!plan.needs_prepare(), "write {place} had to make room");
        drop(plan);
        world.apply(&Op::Write {
            sector: place * 8,
            count: 8,
        });
        maintain_to_the_end(&world);
    }
    let status = world.volume().status();
    let free = status.log_backed_bytes - status.log_used_bytes;
    assert!(free >= 5 * SEGMENT_BYTES / 2, "{status:?}");
    assert_eq!(status.log_ahead_bytes, status.log_backed_bytes);
}

#[test]
fn freed_segments_are_used_again_without_being_written_anew() {
    let mut world = world(3);
    for round in 0..20 {
        snapshot(&mut world);
        world.apply(&Op::Write {
            sector: round % 2 * 64,
            count: 64,
        });
        maintain_to_the_end(&world);
        if round > 3 {
            world.apply(&Op::Delete { which: 0 });
            maintain_to_the_end(&world);
        }
    }
    let status = world.volume().status();
    assert!(
        status.log_ahead_bytes <= 12 * SEGMENT_BYTES,
        "twenty segments were filled: {status:?}"
    );
}

#[test]
fn zeroes_ahead_never_land_on_data() {
    for seed in 0..40 {
        let mut world = world(seed % 4);
        for op in history(seed, Methods::Mixed, 80, 1024) {
            world.apply(&op);
            world.volume().maintain(1).unwrap();
        }
        world.compare();
    }
}
