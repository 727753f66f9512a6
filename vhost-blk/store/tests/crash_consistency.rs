//! Power cuts and killed daemons at every sync point of random histories.
//!
//! A power cut leaves any subset of the sectors written since the last sync of their file; a killed daemon
//! leaves all of them. Whatever is left must open, check clean, hold the old or the new state and never a
//! third, keep everything flushed, show every committed snapshot as it was, and go on working: writes,
//! snapshots, another power cut during recovery, a clean close.
//! `VMSHADOW_CRASH_IMAGES=N` sets the number of images for each of the tests.
#![allow(clippy::cast_possible_truncation, reason = "volumes of a few blocks")]
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod harness;

use std::sync::Arc;

use harness::{
    Methods, Model, Op, Taken, Tale, Verdict, World, expect, history, read_all, small_options,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vhost_blk_store::sim::{
    CrashDisk, CrashPoint, FILES, Image, JOURNALS, MemoryFile, SUPERBLOCK, volume_files,
};
use vhost_blk_store::{
    BlockFile, BootId, Maintenance, Method, NewSnapshot, OpenOptions, SetId, SetOutcome, Severity,
    SnapshotId, SnapshotState, View, Volume, VolumeFiles, VolumeId, check, resolve_sets,
};

const SECTORS: u64 = 83;

fn wanted_images(default: u64) -> u64 {
    std::env::var("VMSHADOW_CRASH_IMAGES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(default)
}

/// The files of volume `number` on a disk.
fn files_on(number: usize, file: impl Fn(usize) -> Arc<dyn BlockFile>) -> VolumeFiles {
    volume_files(|place| file(number * FILES + place))
}

fn blank_images(models: &[Model]) -> Vec<Image> {
    let mut images: Vec<Image> = Vec::new();
    for model in models {
        images.push(model.bytes().into());
        images.resize(images.len() + FILES - 1, Image::default());
    }
    images
}

fn memory(images: Vec<Image>) -> impl Fn(usize) -> Arc<dyn BlockFile> {
    let files: Vec<Arc<dyn BlockFile>> = images
        .into_iter()
        .map(|image| -> Arc<dyn BlockFile> { Arc::new(MemoryFile::new(image)) })
        .collect();
    move |place| Arc::clone(&files[place])
}

/// The truth around one operation.
struct Step<'a> {
    op: Option<&'a Op>,
    before: &'a Model,
    after: &'a Model,
}

/// A recorded history: models before the first and after each operation.
struct Recorded {
    ops: Vec<Op>,
    models: Vec<Model>,
    points: Vec<CrashPoint>,
}

/// Runs a history on a crash disk. Markers: 2i during operation i, 2i+1 after it.
fn record(ops: Vec<Op>, every_writes: u64) -> Recorded {
    let model = Model::new(SECTORS);
    let disk = CrashDisk::new(blank_images(std::slice::from_ref(&model)), every_writes);
    let files = files_on(0, |place| disk.file(place));
    let mut world = World::new(files, small_options(1), model);
    disk.take_points();
    let mut models = vec![world.model.clone()];
    for (number, op) in (0..).zip(&ops) {
        disk.set_marker(2 * number);
        world.apply(op);
        models.push(world.model.clone());
        disk.set_marker(2 * number + 1);
        disk.record();
    }
    Recorded {
        ops,
        models,
        points: disk.take_points(),
    }
}

impl Recorded {
    fn step(&self, point: &CrashPoint) -> Step<'_> {
        let number = (point.marker / 2) as usize;
        if point.marker.is_multiple_of(2) {
            Step {
                op: Some(&self.ops[number]),
                before: &self.models[number],
                after: &self.models[number + 1],
            }
        } else {
            let model = &self.models[number + 1];
            Step {
                op: None,
                before: model,
                after: model,
            }
        }
    }
}

/// Whether every sector is one of its candidates.
fn all_in(found: &[Option<u64>], candidates: impl Fn(usize, u64) -> bool) -> Result<(), String> {
    for (sector, value) in found.iter().enumerate() {
        match value {
            None => return Err(format!("sector {sector} is torn")),
            Some(value) if candidates(sector, *value) => {}
            Some(value) => return Err(format!("sector {sector} holds {value}")),
        }
    }
    Ok(())
}

/// What a model allows in a sector after a power cut.
fn possible(model: &Model, sector: usize, value: u64) -> bool {
    model.head[sector] == value
        || model.possible[sector].contains(&value)
        || model.flies(sector, value)
}

/// The head is one the crash may leave.
fn check_head(step: &Step<'_>, power_cut: bool, found: &[Option<u64>], ids: &[SnapshotId]) {
    let (before, after) = (step.before, step.after);
    let result = match step.op {
        // All of it or nothing: no mixture of the two states.
        Some(Op::Revert { .. }) => {
            let reverted = are_snapshots(ids, after, power_cut)
                && all_in(found, |sector, value| after.head[sector] == value).is_ok();
            if reverted {
                Ok(())
            } else {
                assert!(are_snapshots(ids, before, power_cut));
                all_in(found, |sector, value| {
                    if power_cut {
                        possible(before, sector, value)
                    } else {
                        before.head[sector] == value || before.flies(sector, value)
                    }
                })
            }
        }
        Some(_) if power_cut => all_in(found, |sector, value| {
            possible(before, sector, value) || possible(after, sector, value)
        }),
        // Killed in the operation: what it wrote may be there or not, all before it is.
        Some(_) => all_in(found, |sector, value| {
            before.head[sector] == value
                || after.head[sector] == value
                || before.flies(sector, value)
                || after.flies(sector, value)
                || (before.head[sector] != after.head[sector] && possible(after, sector, value))
        }),
        None if power_cut => all_in(found, |sector, value| possible(after, sector, value)),
        None => all_in(found, |sector, value| {
            after.head[sector] == value || after.flies(sector, value)
        }),
    };
    if let Err(what) = result {
        panic!("head: {what}");
    }
}

/// Whether these are the model's snapshots; a power cut may take the last of those that no flush covered.
fn are_snapshots(ids: &[SnapshotId], model: &Model, power_cut: bool) -> bool {
    let all: Vec<SnapshotId> = model.snapshots.iter().map(|taken| taken.id).collect();
    let lost = all.strip_prefix(ids);
    lost.is_some_and(|lost| {
        lost.is_empty() || power_cut && lost.iter().all(|id| model.begun.contains(id))
    })
}

/// The snapshots are those before or after the operation, each exactly as it was.
fn check_snapshots(step: &Step<'_>, power_cut: bool, volume: &Volume) -> Vec<Taken> {
    let ids: Vec<SnapshotId> = volume.snapshots().iter().map(|s| s.snapshot_id).collect();
    let known =
        are_snapshots(&ids, step.before, power_cut) || are_snapshots(&ids, step.after, power_cut);
    let one_more = matches!(step.op, Some(Op::Snapshot { .. }))
        && ids.split_last().is_some_and(|(last, rest)| {
            step.after
                .last_taken
                .as_ref()
                .is_some_and(|taken| taken.id == *last)
                && are_snapshots(rest, step.before, false)
        });
    assert!(
        known || one_more,
        "snapshots {ids:?}, before {:?}, after {:?}",
        step.before
            .snapshots
            .iter()
            .map(|t| t.id)
            .collect::<Vec<_>>(),
        step.after
            .snapshots
            .iter()
            .map(|t| t.id)
            .collect::<Vec<_>>(),
    );
    let mut found = Vec::new();
    for id in ids {
        let known = step
            .before
            .snapshots
            .iter()
            .chain(&step.after.snapshots)
            .chain(&step.after.last_taken)
            .find(|t| t.id == id);
        let sectors = &known
            .unwrap_or_else(|| panic!("nobody took snapshot {id}"))
            .sectors;
        let seen = read_all(volume, View::Snapshot(id));
        expect(sectors, &seen, &format!("snapshot {id}"));
        found.push(Taken {
            id,
            sectors: sectors.clone(),
        });
    }
    found
}

fn open(files: &VolumeFiles, boot: u8) -> Volume {
    let options = OpenOptions {
        boot_id: Some(BootId([boot; 16])),
        ..small_options(boot)
    };
    match Volume::open_files(files.clone(), &options) {
        Ok((volume, report)) => {
            assert!(!report.created);
            volume
        }
        Err(error) => panic!("does not open: {error:?}"),
    }
}

fn assert_checks(files: &VolumeFiles) {
    let findings = check(files);
    let damage: Vec<_> = findings
        .iter()
        .filter(|f| f.severity == Severity::Damage)
        .collect();
    assert!(damage.is_empty(), "{damage:?}");
}

/// Opens an image, compares, and goes on working with it.
fn try_image(step: &Step<'_>, images: Vec<Image>, power_cut: bool, seed: u64) {
    let files = files_on(0, memory(images));
    assert_checks(&files);
    let boot = if power_cut { 2 } else { 1 };
    let volume = open(&files, boot);
    let snapshots = check_snapshots(step, power_cut, &volume);
    let ids: Vec<SnapshotId> = snapshots.iter().map(|taken| taken.id).collect();
    let head = read_all(&volume, View::Head);
    check_head(step, power_cut, &head, &ids);
    assert_checks(&files);
    go_on(files, volume, boot, head, snapshots, step.after, seed);
}

/// Damage may show late: writes, snapshots, maintenance, reopening on what was recovered.
fn go_on(
    files: VolumeFiles,
    volume: Volume,
    boot: u8,
    head: Vec<Option<u64>>,
    snapshots: Vec<Taken>,
    after: &Model,
    seed: u64,
) {
    let mut model = Model::new(SECTORS);
    model.head = head.into_iter().map(Option::unwrap).collect();
    model.snapshots = snapshots;
    model.next_value = after.next_value + 1_000;
    model.next_id = after.next_id + 1_000;
    let members = vec![volume.id()];
    let options = small_options(boot);
    let mut world = World {
        files,
        options,
        volume: Some(volume),
        open_plans: Vec::new(),
        model,
        members,
    };
    for op in history(seed, Methods::Mixed, 6, SECTORS) {
        world.apply(&op);
        world.compare();
    }
    for _ in 0..500 {
        if world.volume().maintain(16).unwrap() == Maintenance::Idle {
            break;
        }
    }
    world.compare();
    world.apply(&Op::CloseReopen);
    world.compare();
    assert_checks(&world.files);
}

/// Cuts the power again while the image recovers, at every sync of the recovery.
fn cut_recovery(step: &Step<'_>, images: Vec<Image>, power_cut: bool, seed: u64) -> u64 {
    let disk = CrashDisk::new(images.clone(), 2);
    let files = files_on(0, |place| disk.file(place));
    // A killed daemon's bytes are in the page cache: nothing of them is durable before recovery syncs
    // it. `images` is therefore the right start only for a power cut; for a kill the second crash is a
    // kill, too.
    drop(open(&files, if power_cut { 2 } else { 1 }));
    let mut tried = 0;
    for point in disk.take_points() {
        if power_cut {
            for image in point.power_cuts(3, seed) {
                try_image_again(step, image, 3, true);
                tried += 1;
            }
        } else {
            try_image_again(step, point.killed(), 1, false);
            tried += 1;
        }
    }
    tried
}

fn try_image_again(step: &Step<'_>, images: Vec<Image>, boot: u8, power_cut: bool) {
    let files = files_on(0, memory(images));
    assert_checks(&files);
    let volume = open(&files, boot);
    let snapshots = check_snapshots(step, power_cut, &volume);
    let ids: Vec<SnapshotId> = snapshots.iter().map(|taken| taken.id).collect();
    check_head(step, power_cut, &read_all(&volume, View::Head), &ids);
}

fn crash_everywhere(methods: Methods, seed: u64, images: u64) {
    let mut tried = (0, 0, 0);
    let mut round = 0;
    while tried.0 + tried.1 + tried.2 < images {
        let seed = seed + round;
        round += 1;
        let recorded = record(history(seed, methods, 40, SECTORS), 3);
        let mut random = SmallRng::seed_from_u64(seed);
        for (number, point) in recorded.points.iter().enumerate() {
            let step = recorded.step(point);
            let _tale = Tale(format!(
                "history {seed} {methods:?}, point {number} {:?}, marker {}, {:?}",
                point.moment, point.marker, step.op
            ));
            let most = if random.random_bool(0.1) { 16 } else { 3 };
            for image in point.power_cuts(most, seed ^ number as u64) {
                if random.random_bool(0.02) {
                    tried.2 += cut_recovery(&step, image.clone(), true, random.random());
                }
                try_image(&step, image, true, random.random());
                tried.0 += 1;
            }
            // A sector that was being written when the power went may be unreadable; two slots are there
            // for that.
            if let Some(image) = point.power_cut_garbling(SUPERBLOCK) {
                try_image(&step, image, true, random.random());
                tried.0 += 1;
            }
            if random.random_bool(0.5) {
                if random.random_bool(0.1) {
                    tried.2 += cut_recovery(&step, point.killed(), false, random.random());
                }
                try_image(&step, point.killed(), false, random.random());
                tried.1 += 1;
            }
            if tried.0 + tried.1 + tried.2 >= images {
                break;
            }
        }
    }
    println!(
        "{methods:?}: {round} histories, {} power cuts, {} killed daemons, {} crashes in recovery",
        tried.0, tried.1, tried.2
    );
}

#[test]
fn redirect_on_write_survives_every_crash() {
    crash_everywhere(Methods::Redirect, 1_000, wanted_images(30_000));
}

#[test]
fn copy_on_write_survives_every_crash() {
    crash_everywhere(Methods::Copy, 2_000, wanted_images(30_000));
}

#[test]
fn mixed_methods_survive_every_crash() {
    crash_everywhere(Methods::Mixed, 3_000, wanted_images(30_000));
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
    let wanted = wanted_images(8_000);
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
    for (journal, method) in [
        (0, Method::RedirectOnWrite),
        (1, Method::RedirectOnWrite),
        (0, Method::CopyOnWrite),
        (1, Method::CopyOnWrite),
    ] {
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
            disk.fail_next_sync(JOURNALS[journal]);
            let before = world.model.clone();
            let write = world.try_apply(&Op::Write { sector, count: 8 });
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
            op: None,
            before: &world.model,
            after: &world.model,
        };
        try_image(&step, point.power_cut(|_| false), true, 1);
        assert!(
            failed || journal == 1,
            "the sync never failed: the test proves nothing"
        );
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
