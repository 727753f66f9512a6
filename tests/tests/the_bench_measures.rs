//! The measuring harness against the real daemon, with tiny sizes: that it measures, not what it measures.

#![allow(
    clippy::unwrap_used,
    reason = "a test may panic; clippy sees only its #[test] functions as one"
)]

use std::time::{Duration, Instant};

use vmshadow_tests::bench::Bench;
use vmshadow_tests::bench::contestants::{Ours, OursSpec};
use vmshadow_tests::bench::job::{Job, Op, SPARSE_STRIDE_BYTES};
use vmshadow_tests::bench::place::Place;
use vmshadow_tests::bench::report::{Goal, Quantity, Report};
use vmshadow_tests::bench::rounds::interleaved;
use vmshadow_tests::harness::image;

const DISK_BYTES: u64 = 16 << 20;

#[test]
fn two_daemons_take_turns_and_every_turn_is_counted() {
    let disk = Place::disk().unwrap();
    let mut bench = Bench {
        quick: true,
        rounds: 2,
        ram: disk.clone(),
        disk: disk.clone(),
        vhost_blk: image::program("vhost-blk").unwrap(),
        awake: None,
        report: Report::default(),
        begin: Instant::now(),
    };
    let spec = |name| OursSpec {
        name,
        size_bytes: DISK_BYTES,
        arguments: &[],
        queues: 1,
    };
    let mut ours = Ours::start(&bench, &disk, spec("vmshadow")).unwrap();
    let mut again = Ours::start(&bench, &disk, spec("vmshadow again")).unwrap();

    let job = Job::random(Op::Read, 4, DISK_BYTES).limit(Duration::from_millis(50));
    let all = interleaved(&bench, &mut [&mut ours, &mut again], &job, None).unwrap();
    for measured in &all {
        assert_eq!(measured.turns.len(), 2, "{measured:?}");
        for turn in &measured.turns {
            assert!(turn.ios > 0 && turn.per_second > 0.0, "{turn:?}");
            assert!(turn.processor_us.unwrap() > 0.0, "{turn:?}");
        }
    }
    let goals = [(Quantity::Rate, "vmshadow again", Goal::RatioAtLeast(0.0))];
    bench.report.contest(1, "read", &all, &goals);
    assert_eq!(bench.report.lines()[0].met(), Some(true));

    // Every block of the pattern once after a snapshot; the flushes behind them reach the daemon.
    ours.snapshot = Some("row");
    let job = Job::sparse(8, DISK_BYTES)
        .flush_every(16)
        .limit(Duration::from_secs(60));
    let all = interleaved(&bench, &mut [&mut ours], &job, None).unwrap();
    for turn in &all[0].turns {
        let blocks = DISK_BYTES / SPARSE_STRIDE_BYTES;
        assert_eq!((turn.ios, turn.flushes), (blocks, blocks / 16));
    }
    // A snapshot before each of the rounds, and before the one in which calls are counted.
    assert_eq!(ours.daemon.snapshots().unwrap().len(), 3);
    ours.daemon.delete_snapshots().unwrap();
    assert_eq!(ours.daemon.volume("disk").unwrap()["plain"], true);
}
