//! Every request there is on a small volume: each range of sectors, each kind, on blocks in each state, by the
//! store's own driver and by a caller that moves everything itself.
//!
//! What planning does with the ends of requests, with runs of blocks in unlike states and with a short last
//! block is arithmetic: few enough cases to try them all instead of drawing some.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod harness;

use harness::{Model, Op, Stage, Verdict, World, memory_files, small_options};
use vhost_blk_store::sim::{Image, contents, memory_volume};
use vhost_blk_store::{ByteRange, Method, Source, WriteKind};

/// Three blocks and three sectors.
const SECTORS: u64 = 27;

/// A volume whose blocks are in the base, in the log, zero, touched or not, in some order.
fn states(number: u64) -> World {
    let model = Model::new(SECTORS);
    let mut world = World::new(memory_files(model.bytes()), small_options(1), model);
    let snapshot = |method| Op::Snapshot {
        method,
        verdict: Verdict::Keep,
    };
    let write = |sector, count| Op::Write { sector, count };
    let zero = |sector, count| Op::Zero {
        sector,
        count,
        may_unmap: true,
    };
    let (redirect, copy) = (Method::RedirectOnWrite, Method::CopyOnWrite);
    let ops = match number {
        0 => vec![],
        1 => vec![snapshot(redirect)],
        2 => vec![snapshot(copy)],
        // Log, zero, base, base; then untouched by the other method.
        3 => vec![snapshot(redirect), write(0, 8), zero(8, 8)],
        4 => vec![snapshot(redirect), write(0, 8), zero(8, 8), snapshot(copy)],
        5 => vec![
            snapshot(redirect),
            zero(16, 11),
            write(8, 8),
            snapshot(redirect),
        ],
        // Touched ones beside untouched ones.
        6 => vec![snapshot(copy), write(8, 8), write(24, 3)],
        7 => vec![
            snapshot(redirect),
            write(4, 8),
            snapshot(copy),
            write(16, 8),
            zero(0, 8),
        ],
        _ => panic!("no such state"),
    };
    ops.iter().for_each(|op| world.apply(op));
    world.volume().flush().unwrap();
    world.model.flushed();
    world
}

const STATES: u64 = 8;

#[test]
fn every_request_does_what_the_model_says() {
    let mut tried = 0;
    for state in 0..STATES {
        let start = states(state);
        let images: Vec<Image> = contents(&start.files).unwrap();
        for first in 0..SECTORS {
            for count in 1..=SECTORS - first {
                let (sector, zero) = (first, None);
                let begin = |zero, stage| Op::Begin {
                    sector,
                    count,
                    zero,
                    stage,
                    seals: true,
                };
                let ops = [
                    Op::Write { sector, count },
                    Op::Zero {
                        sector,
                        count,
                        may_unmap: count % 2 == 0,
                    },
                    Op::Discard { sector, count },
                    begin(zero, Stage::Copied),
                    begin(Some(count % 2 == 0), Stage::Moved),
                ];
                for op in ops {
                    let files = memory_volume(images.clone());
                    let model = start.model.clone();
                    let mut world = World::open(files, small_options(1), model);
                    world.apply(&op);
                    world.compare();
                    world.finish_all().unwrap();
                    world.compare();
                    tried += 1;
                }
            }
        }
    }
    println!("{tried} requests");
}

#[test]
fn extents_of_every_plan_are_the_range_and_nothing_twice() {
    for state in 0..STATES {
        let world = states(state);
        let volume = world.volume();
        for first in 0..SECTORS {
            for count in 1..=SECTORS - first {
                let range = ByteRange::new(first * 512, count * 512);
                let plan = volume.plan_write(range, WriteKind::Write).unwrap();
                let mut taken: Vec<(Source, u64, u64)> = Vec::new();
                let mut add = |source, start: u64, length: u64| {
                    assert!(length > 0 && start.is_multiple_of(512) && length.is_multiple_of(512));
                    let end = start + length;
                    assert!(source != Source::Base || end <= SECTORS * 512);
                    assert!(
                        !taken
                            .iter()
                            .any(|(s, from, to)| *s == source && start < *to && *from < end),
                        "state {state}, {range:?}: {taken:?} and {start}..{end}"
                    );
                    taken.push((source, start, end));
                };
                let mut length = 0;
                for extent in plan.extents() {
                    add(extent.source, extent.offset_bytes, extent.length_bytes);
                    length += extent.length_bytes;
                }
                assert_eq!(length, range.length_bytes);
                for copy in plan.copies() {
                    add(Source::Log, copy.to_offset_bytes, copy.from.length_bytes);
                }
                for part in plan.seals() {
                    assert!(part.offset_bytes + part.length_bytes <= range.length_bytes);
                    assert_eq!((range.offset_bytes + part.offset_bytes) % 4096, 0);
                }
            }
        }
    }
}
