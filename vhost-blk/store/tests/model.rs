//! The store against a plain vector of sectors per snapshot: random histories of both methods.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod harness;

use harness::{
    JOURNAL_REGION, Methods, Model, Op, Verdict, World, history, memory_files, small_options,
};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use vhost_blk_store::{Maintenance, Method, StoreError};

fn run(ops: &[Op], sectors: u64) {
    let model = Model::new(sectors);
    let mut world = World::new(memory_files(model.bytes()), small_options(1), model);
    for op in ops {
        world.apply(op);
        world.compare();
    }
    world.settle_everything(0);
}

fn op(sectors: u64) -> impl Strategy<Value = Op> {
    let range = (
        0..sectors * 3 / 2,
        prop_oneof![Just(8u64), 1..8u64, 1..40u64],
    );
    let method = prop_oneof![Just(Method::RedirectOnWrite), Just(Method::CopyOnWrite)];
    let verdict = prop_oneof![
        Just(Verdict::Keep),
        Just(Verdict::Leave),
        Just(Verdict::Discard)
    ];
    prop_oneof![
        8 => range.clone().prop_map(|(sector, count)| Op::Write { sector, count }),
        2 => (proptest::collection::vec((0..sectors, 1..20u64), 2..5), any::<bool>())
            .prop_map(|(writes, seals)| Op::Batch { writes, seals }),
        2 => (range.clone(), any::<bool>()).prop_map(|((sector, count), may_unmap)| Op::Zero {
            sector,
            count,
            may_unmap
        }),
        2 => range.prop_map(|(sector, count)| Op::Discard { sector, count }),
        1 => Just(Op::Flush),
        1 => (0..sectors, 1..60u64).prop_map(|(sector, count)| Op::LeaveOut { sector, count }),
        3 => (method, verdict).prop_map(|(method, verdict)| Op::Snapshot { method, verdict }),
        2 => (0..8u64).prop_map(|which| Op::Delete { which }),
        1 => (0..8u64).prop_map(|which| Op::Revert { which }),
        3 => (1..30u64, 1..12u64).prop_map(|(steps, budget)| Op::Maintain { steps, budget }),
        1 => (1..24u64, any::<bool>()).prop_map(|(by, prepared)| Op::Grow { by, prepared }),
        1 => (1..24u64).prop_map(|by| Op::PrepareGrow { by }),
        1 => Just(Op::CloseReopen),
        1 => Just(Op::KillReopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 384,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(
            "proptest-regressions/model.txt",
        ))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn volume_is_always_what_the_model_says(
        ops in proptest::collection::vec(op(131), 1..80),
    ) {
        run(&ops, 131);
    }
}

#[test]
fn long_histories_of_every_method_hold() {
    for (seed, methods) in [Methods::Redirect, Methods::Copy, Methods::Mixed]
        .into_iter()
        .enumerate()
    {
        for round in 0..8 {
            run(&history(seed as u64 * 100 + round, methods, 300, 131), 131);
        }
    }
}

#[test]
fn settling_goes_on_after_a_checkpoint_freed_more_in_the_middle_of_a_pass() {
    let snapshot = |method, verdict| Op::Snapshot { method, verdict };
    let ops = [
        snapshot(Method::CopyOnWrite, Verdict::Keep),
        Op::Batch {
            writes: vec![(32, 1), (41, 8), (128, 5), (18, 10)],
            seals: false,
        },
        Op::Maintain {
            steps: 6,
            budget: 1,
        },
        snapshot(Method::RedirectOnWrite, Verdict::Leave),
        Op::Write {
            sector: 42,
            count: 8,
        },
    ];
    run(&ops, 131);
}

#[test]
fn full_log_refuses_writes_and_changes_nothing() {
    let mut refused = 0;
    for seed in 0..24 {
        let model = Model::new(131);
        let mut options = small_options(1);
        // Not a whole number of segments, and less than the volume.
        options.log_limit_bytes = 11 * 4096;
        let mut world = World::new(memory_files(model.bytes()), options, model);
        for op in history(seed, Methods::Mixed, 200, 131) {
            let before = world.model.clone();
            match world.try_apply(&op) {
                Ok(()) => {}
                Err(StoreError::NoSpace) => {
                    refused += 1;
                    world.model = before;
                }
                Err(error) => panic!("{op:?}: {error:?}"),
            }
            world.compare();
        }
        world.finish(0, false).unwrap();
        world.finish_all().unwrap();
        while !world.model.snapshots.is_empty() {
            world.apply(&Op::Delete { which: 0 });
        }
        while world.volume().maintain(8).unwrap() != Maintenance::Idle {}
        assert!(world.volume().is_plain());
        world.compare();
    }
    assert!(refused > 100, "only {refused} writes found the log full");
}

#[test]
fn journal_and_memory_stay_bounded_without_any_maintenance() {
    let model = Model::new(131);
    let options = small_options(1);
    let (journal_bytes, memtable_records) = (options.journal_bytes, options.memtable_records);
    let mut world = World::new(memory_files(model.bytes()), options, model);
    for round in 0..60 {
        let method = if round % 2 == 0 {
            Method::RedirectOnWrite
        } else {
            Method::CopyOnWrite
        };
        world.apply(&Op::Snapshot {
            method,
            verdict: Verdict::Keep,
        });
        for block in 0..16 {
            world.apply(&Op::Write {
                sector: block * 8,
                count: 8,
            });
        }
        if round > 3 {
            world.apply(&Op::Delete { which: round });
        }
        // A snapshot and a write may come on top of the bound before the next write waits.
        let bound = usize::try_from(5 * journal_bytes + 64 * 64).unwrap();
        for region in [0, JOURNAL_REGION] {
            let mut bytes = vec![0; usize::try_from(JOURNAL_REGION).unwrap()];
            world.files.journal.read_at(&mut bytes, region).unwrap();
            let end = bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0);
            assert!(end < bound, "a journal of {end} bytes");
        }
    }
    world.compare();
    // Versions that four or five snapshots can see, and what two checkpoints may hold back.
    let records = world.volume().status().index_records;
    assert!(
        records < 17 * 8 + 8 * memtable_records as u64,
        "{records} records"
    );
}
