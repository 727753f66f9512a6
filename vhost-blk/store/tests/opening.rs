//! What opening costs does not depend on how large the index is: it reads fences and table, and no page of records.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod harness;

use std::sync::Arc;

use harness::{Methods, Model, Op, Verdict, World, history, memory_files, small_options};
use vhost_blk_store::sim::{FailingFile, Fault, FaultKind};
use vhost_blk_store::{Method, OpenOptions, RecoveryReport, Volume};

const BLOCKS: u64 = 128;

fn options() -> OpenOptions {
    OpenOptions {
        memtable_records: 1 << 20,
        journal_bytes: 4096 * 64,
        journal_region_bytes: 1 << 20,
        ..small_options(1)
    }
}

/// Writes every block, one at a time, after a snapshot: each of them takes a version along.
fn redirect_all(world: &mut World) {
    world.apply(&Op::Snapshot {
        method: Method::RedirectOnWrite,
        verdict: Verdict::Keep,
    });
    for block in 0..BLOCKS {
        // Not in order, so that no record holds two of them.
        let sector = block * 37 % BLOCKS * 8;
        world.apply(&Op::Write { sector, count: 8 });
    }
}

/// Opens the volume anew, and counts the reads of the index.
fn reads_of_opening(world: &World) -> (u64, RecoveryReport) {
    let fault = Fault::new(FaultKind::Read, u64::MAX / 2);
    let mut files = world.files.clone();
    files.index = Arc::new(FailingFile::new(files.index, Arc::clone(&fault)));
    let (_, report) = Volume::open_files(files, &world.options).unwrap();
    (fault.counted(), report)
}

#[test]
fn replay_of_a_full_journal_reads_no_page_of_the_index() {
    let model = Model::new(BLOCKS * 8);
    let mut world = World::new(memory_files(model.bytes()), options(), model);
    redirect_all(&mut world);
    world.volume().close().unwrap();
    world.volume = None;
    let (without_replay, report) = reads_of_opening(&world);
    assert_eq!(report.replayed_records, 0);

    world.reopen().unwrap();
    redirect_all(&mut world);
    world.volume = None;
    let (with_replay, report) = reads_of_opening(&world);
    assert!(report.replayed_records >= BLOCKS, "{report:?}");
    assert_eq!(with_replay, without_replay);
    world.reopen().unwrap();
    world.compare();
}

#[test]
fn versions_that_only_the_journal_knows_are_those_of_the_index() {
    for seed in 0..30 {
        let model = Model::new(BLOCKS);
        let mut world = World::new(memory_files(model.bytes()), options(), model);
        for op in history(seed, Methods::Mixed, 60, BLOCKS) {
            world.apply(&op);
        }
        world.reopen().unwrap();
        world.compare();
    }
}
