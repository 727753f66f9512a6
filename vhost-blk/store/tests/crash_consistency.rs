//! Power cuts and killed daemons at every sync point of random histories.
//!
//! A power cut leaves any subset of the sectors written since the last sync of their file; a killed daemon
//! leaves all of them. Whatever is left must open, check clean, hold the old or the new state and never a
//! third, keep everything flushed, show every committed snapshot as it was, and go on working: writes,
//! snapshots, another power cut during recovery, a clean close.
//! A few thousand images are tried here by default; `make crash-images` tries as many as one likes.
#![allow(clippy::cast_possible_truncation, reason = "volumes of a few blocks")]
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod harness;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use harness::crash::{
    SECTORS, Step, Tried, all_in, assert_checks, blank_images, crash_history,
    crash_in_every_recovery, crash_in_every_way, files_on, history_of, memory, possible, try_image,
};
use harness::{Methods, Model, Op, Tale, Verdict, World, expect, read_all, small_options};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vhost_blk_store::sim::{CrashDisk, LOG};
use vhost_blk_store::{
    Method, NewSnapshot, OpenOptions, SetId, SetOutcome, SnapshotState, View, Volume, VolumeId,
    resolve_sets,
};

const METHODS: [Methods; 3] = [Methods::Redirect, Methods::Copy, Methods::Mixed];

fn crash_everywhere(methods: Methods, seed: u64, images: u64) {
    let mut tried = Tried::default();
    let mut histories = 0;
    while tried.all() < images {
        let seed = seed + histories;
        histories += 1;
        let most = (images - tried.all()).min(1_000);
        tried.add(&crash_history(
            seed,
            methods,
            &history_of(seed, methods),
            most,
        ));
    }
    println!("{methods:?}: {histories} histories, {tried}");
}

#[test]
fn redirect_on_write_survives_every_crash() {
    crash_everywhere(Methods::Redirect, 1_000, 4_000);
}

#[test]
fn copy_on_write_survives_every_crash() {
    crash_everywhere(Methods::Copy, 2_000, 4_000);
}

#[test]
fn mixed_methods_survive_every_crash() {
    crash_everywhere(Methods::Mixed, 3_000, 4_000);
}

#[test]
fn growth_and_its_end_survive_crashes_in_recovery() {
    let grow = |by, prepared| Op::Grow { by, prepared };
    for (methods, method) in [
        (Methods::Redirect, Method::RedirectOnWrite),
        (Methods::Copy, Method::CopyOnWrite),
    ] {
        let snapshot = Op::Snapshot {
            method,
            verdict: Verdict::Keep,
        };
        // The short last block, the new part of it, and what is behind it.
        let write = Op::Write {
            sector: SECTORS - 2,
            count: 12,
        };
        let ops = [
            Op::PrepareGrow { by: 3 },
            snapshot.clone(),
            write.clone(),
            grow(20, true),
            write.clone(),
            Op::BeginSnapshot { method },
            grow(5, false),
            write.clone(),
            Op::Revert { which: 0 },
            grow(11, false),
            write,
        ];
        let tried = crash_in_every_recovery(methods, &ops);
        println!("{methods:?}: {tried}");
    }
}

#[test]
fn zeroes_that_were_never_written_do_not_verify_by_their_checksum() {
    // Behind the end of the log everything reads as zeroes, also where a copy of zeroes was to come.
    let zeroes = Op::Zero {
        sector: 8,
        count: 8,
        may_unmap: false,
    };
    // Without the room that preparing a snapshot writes ahead.
    let snapshot = Op::BeginSnapshot {
        method: Method::CopyOnWrite,
    };
    let write = |sector| Op::Write { sector, count: 8 };
    let grow = Op::Grow {
        by: 21,
        prepared: true,
    };
    let zeroed = [zeroes, snapshot.clone(), Op::Flush, write(8)];
    let grown = [grow, snapshot, Op::Flush, write(96)];
    for ops in [&zeroed[..], &grown] {
        let tried = crash_in_every_way(Methods::Copy, ops, 1_024);
        println!("{tried}");
    }
}

/// A number from the environment.
fn wish(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

fn methods_of(seed: u64) -> Methods {
    METHODS[(seed % 3) as usize]
}

/// What a history panicked with, if it did.
fn failure(seed: u64, ops: &[Op]) -> Result<Tried, String> {
    let methods = methods_of(seed);
    std::panic::catch_unwind(|| crash_history(seed, methods, ops, u64::MAX)).map_err(|panic| {
        panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default()
    })
}

/// Leaves out operations as long as the history still fails.
fn shrink(seed: u64, mut ops: Vec<Op>) -> Vec<Op> {
    let mut part = ops.len() / 2;
    while part > 0 {
        let mut at = 0;
        while at < ops.len() {
            let mut fewer = ops.clone();
            fewer.drain(at..(at + part).min(ops.len()));
            if failure(seed, &fewer).is_err() {
                ops = fewer;
            } else {
                at += part;
            }
        }
        part /= 2;
    }
    ops
}

/// `make crash-images`: `VMSHADOW_CRASH_IMAGES` images of histories from seed `VMSHADOW_CRASH_SEED` on, on all
/// processors.
#[test]
#[ignore = "takes minutes: `make crash-images`"]
fn nightly_crash_images() {
    let wanted = wish("VMSHADOW_CRASH_IMAGES").unwrap_or(500_000);
    // Other histories every time, unless told.
    let first = wish("VMSHADOW_CRASH_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.unwrap().as_secs() * 1_000
    });
    let started = std::time::Instant::now();
    let next = AtomicU64::new(first);
    let state: Mutex<(Tried, Vec<(u64, String)>)> = Mutex::default();
    let workers = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    {
                        let state = state.lock().unwrap();
                        if state.0.all() >= wanted || state.1.len() >= 5 {
                            return;
                        }
                    }
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    let result = failure(seed, &history_of(seed, methods_of(seed)));
                    let mut state = state.lock().unwrap();
                    match result {
                        Ok(tried) => state.0.add(&tried),
                        Err(what) => state.1.push((seed, what)),
                    }
                }
            });
        }
    });
    let (tried, failures) = state.into_inner().unwrap();
    println!(
        "crash images: {tried}\ncrash images: seeds {first} to {}, {} s on {workers} processors, {} failures",
        next.into_inner() - 1,
        started.elapsed().as_secs(),
        failures.len()
    );
    for (seed, what) in &failures {
        println!("crash images: seed {seed}: {what}");
        println!(
            "crash images: again: VMSHADOW_CRASH_SEED={seed} cargo test -p vhost-blk-store \
             --test crash_consistency one_seed -- --ignored --nocapture"
        );
    }
    assert!(failures.is_empty());
}

/// The history of `VMSHADOW_CRASH_SEED` alone, made shorter if it fails.
#[test]
#[ignore = "needs a seed: see what `make crash-images` prints"]
fn one_seed_again() {
    let seed = wish("VMSHADOW_CRASH_SEED").unwrap_or(0);
    let ops = history_of(seed, methods_of(seed));
    let Err(what) = failure(seed, &ops) else {
        println!("seed {seed} holds");
        return;
    };
    let ops = shrink(seed, ops);
    println!(
        "seed {seed}, {:?}: {what}; the shortest history that fails:",
        methods_of(seed)
    );
    for op in &ops {
        println!("    {op:?}");
    }
    // Now without anything that hides the panic.
    crash_history(seed, methods_of(seed), &ops, u64::MAX);
}

/// Three volumes under one switch, and the contents of every set that was begun.
struct Sets {
    worlds: Vec<World>,
    /// Per set: its id, each volume's sectors, and whether keeping it was acknowledged.
    sets: Vec<(SetId, Vec<Vec<u64>>, bool)>,
}

impl Sets {
    fn models(&self) -> Vec<Model> {
        self.worlds
            .iter()
            .map(|world| world.model.clone())
            .collect()
    }

    /// Hold on all (nothing is in flight here), take on all, keep on all.
    fn take(&mut self, method: Method) {
        let model = &mut self.worlds[0].model;
        let set_id = SetId(model.fresh_id());
        let contents = self
            .worlds
            .iter()
            .map(|world| world.model.head.clone())
            .collect();
        self.sets.push((set_id, contents, false));
        let members: Vec<VolumeId> = self.worlds.iter().map(|w| w.volume().id()).collect();
        for world in &mut self.worlds {
            let snapshot_id = world.model.fresh_id().into();
            let new = NewSnapshot {
                snapshot_id,
                set_id,
                members: members.clone(),
                method,
                created_unix_ms: 1,
            };
            world.volume().take_snapshot(new).unwrap();
            world.model.flushed();
        }
        for world in &mut self.worlds {
            world.volume().keep_set(set_id).unwrap();
        }
        self.sets.last_mut().unwrap().2 = true;
    }
}

fn set_options(volume: usize, boot: u8) -> OpenOptions {
    OpenOptions {
        volume_id: Some(VolumeId(uuid::Uuid::from_u128(volume as u128 + 1))),
        ..small_options(boot)
    }
}

/// After resolving, every set is on all volumes or on none, with the contents it was taken of.
fn check_sets(
    volumes: &[Volume],
    sets: &[(SetId, Vec<Vec<u64>>, bool)],
    begun: usize,
    kept: &[SetId],
) {
    for (set_id, contents, _) in &sets[..begun] {
        let holders: Vec<bool> = volumes
            .iter()
            .map(|volume| volume.snapshots().iter().any(|s| s.set_id == *set_id))
            .collect();
        assert!(
            holders.windows(2).all(|pair| pair[0] == pair[1]),
            "set {set_id}: {holders:?} (I9)"
        );
        assert!(
            holders[0] || !kept.contains(set_id),
            "set {set_id} was kept and is gone"
        );
        if !holders[0] {
            continue;
        }
        for (volume, sectors) in volumes.iter().zip(contents) {
            let snapshots = volume.snapshots();
            let snapshot = snapshots.iter().find(|s| s.set_id == *set_id).unwrap();
            assert_eq!(snapshot.state, SnapshotState::Kept);
            let seen = read_all(volume, View::Snapshot(snapshot.snapshot_id));
            expect(sectors, &seen, &format!("set {set_id} on {}", volume.id()));
        }
    }
}

#[test]
fn sets_over_volumes_are_kept_on_all_or_on_none() {
    const VOLUMES: usize = 3;
    let wanted = 2_000;
    let (mut tried, mut undecided, mut seed) = (0, 0, 9_000);
    while tried < wanted {
        seed += 1;
        let mut random = SmallRng::seed_from_u64(seed);
        let models = vec![Model::new(19); VOLUMES];
        let disk = CrashDisk::new(blank_images(&models), 4);
        let worlds = models.into_iter().enumerate().map(|(number, model)| {
            let files = files_on(number, |place| disk.file(place));
            World::new(files, set_options(number, 1), model)
        });
        let mut sets = Sets {
            worlds: worlds.collect(),
            sets: Vec::new(),
        };
        disk.take_points();
        // Per operation: models before and after, sets begun after it, sets kept before it.
        let mut steps = Vec::new();
        for number in 0..12 {
            disk.set_marker(number);
            let before = sets.models();
            let kept: Vec<SetId> = sets
                .sets
                .iter()
                .filter(|set| set.2)
                .map(|set| set.0)
                .collect();
            if number % 4 == 2 {
                let method = if random.random() {
                    Method::RedirectOnWrite
                } else {
                    Method::CopyOnWrite
                };
                sets.take(method);
            } else {
                for world in &mut sets.worlds {
                    world.apply(&Op::Write {
                        sector: random.random_range(0..19),
                        count: random.random_range(1..12),
                    });
                }
            }
            steps.push((before, sets.models(), sets.sets.len(), kept));
        }
        for (number, point) in disk.take_points().iter().enumerate() {
            let (before, after, begun, kept) = &steps[point.marker as usize];
            let _tale = Tale(format!(
                "sets {seed}, point {number}, operation {}",
                point.marker
            ));
            let mut images = point.power_cuts(3, seed ^ number as u64);
            images.push(point.killed());
            let killed = images.len() - 1;
            for (place, image) in images.into_iter().enumerate() {
                let file = memory(image);
                let boot = if place == killed { 1 } else { 2 };
                let open = |number| {
                    let files = files_on(number, &file);
                    assert_checks(&files);
                    let (volume, _) =
                        Volume::open_files(files, &set_options(number, boot)).unwrap();
                    volume
                };
                // One volume alone must not decide what it cannot know.
                if random.random_bool(0.3) {
                    let alone = open(0);
                    for resolution in resolve_sets(&[&alone]).unwrap() {
                        assert_ne!(resolution.outcome, SetOutcome::Discarded);
                    }
                }
                let volumes: Vec<Volume> = (0..VOLUMES).map(open).collect();
                let resolved = resolve_sets(&volumes.iter().collect::<Vec<_>>()).unwrap();
                undecided += resolved.len();
                check_sets(&volumes, &sets.sets, *begun, kept);
                for ((volume, before), after) in volumes.iter().zip(before).zip(after) {
                    let head = read_all(volume, View::Head);
                    let result = all_in(&head, |sector, value| {
                        possible(before, sector, value) || possible(after, sector, value)
                    });
                    assert_eq!(result, Ok(()));
                }
                // Resolving is final: another opening finds nothing to do.
                drop(volumes);
                let volumes: Vec<Volume> = (0..VOLUMES).map(open).collect();
                assert_eq!(
                    resolve_sets(&volumes.iter().collect::<Vec<_>>()).unwrap(),
                    []
                );
                check_sets(&volumes, &sets.sets, *begun, kept);
                tried += 1;
            }
        }
    }
    assert!(
        undecided > 0,
        "no image had an undecided set: the test proves nothing"
    );
    println!("sets: {tried} images of {VOLUMES} volumes, {undecided} undecided sets");
}

#[test]
fn journal_sync_that_failed_is_made_up_for_by_reopening() {
    let method = Method::RedirectOnWrite;
    for journal in 0..2 {
        let model = Model::new(SECTORS);
        let disk = CrashDisk::new(blank_images(std::slice::from_ref(&model)), 0);
        let files = files_on(0, |place| disk.file(place));
        let mut world = World::new(files, small_options(1), model);
        let verdict = Verdict::Keep;
        world.apply(&Op::Snapshot { method, verdict });
        if journal == 1 {
            // A checkpoint moves on to the other journal.
            world.apply(&Op::CloseReopen);
            world.apply(&Op::Write {
                sector: 0,
                count: 8,
            });
            world.apply(&Op::CloseReopen);
            world.apply(&Op::Snapshot { method, verdict });
        }
        let mut failed = false;
        for sector in [16, 32, 48] {
            disk.fail_next_sync(LOG);
            let before = world.model.clone();
            // A record without data: for data nothing could be done.
            let write = world.try_apply(&Op::Zero {
                sector,
                count: 8,
                may_unmap: true,
            });
            let flush = write.and_then(|()| world.volume().flush());
            if flush.is_err() {
                failed = true;
                // The daemon ends, and comes back without a boot: it sees its page cache.
                world.volume = None;
                world.reopen().unwrap();
                let head = read_all(world.volume(), View::Head);
                if head[sector as usize] == Some(before.head[sector as usize]) {
                    world.model = before;
                }
                world.compare();
            }
        }
        // Nothing is pending any more: the disk holds what was synced, and that alone.
        world.volume().flush().unwrap();
        world.model.flushed();
        disk.record();
        let point = disk.take_points().pop().unwrap();
        assert_eq!(point.pending_sectors(), 0);
        let step = Step {
            boot: 1,
            op: None,
            before: &world.model,
            after: &world.model,
        };
        try_image(&step, point.power_cut(|_| false), true, 1);
        assert!(failed, "the sync never failed: the test proves nothing");
    }
}

#[test]
fn crash_during_adoption_leaves_a_base_that_can_be_adopted() {
    let model = Model::new(SECTORS);
    let disk = CrashDisk::new(blank_images(std::slice::from_ref(&model)), 1);
    let files = files_on(0, |place| disk.file(place));
    let mut options = small_options(1);
    options.journal_prewritten_bytes = 4096;
    drop(World::new(files, options, model.clone()));
    for point in disk.take_points() {
        for image in point.power_cuts(64, 7) {
            let files = files_on(0, memory(image));
            let (volume, _) = Volume::open_files(files.clone(), &small_options(2)).unwrap();
            expect(&model.head, &read_all(&volume, View::Head), "head");
            assert_checks(&files);
        }
    }
}
