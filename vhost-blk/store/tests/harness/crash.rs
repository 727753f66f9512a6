//! Crash images of one history: what a power cut, a killed daemon, or both in turn may leave at every sync
//! and after writes, and the judgement of each image.
//!
//! A history goes on after a crash, too: on one of its images another history is recorded, up to `depth`
//! times, so that images hold what several openings left behind.

use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vhost_blk_store::sim::{
    CrashDisk, CrashPoint, FILES, Image, MemoryFile, SUPERBLOCK, volume_files,
};
use vhost_blk_store::{
    BlockFile, BootId, Maintenance, OpenOptions, Severity, SnapshotId, View, Volume, VolumeFiles,
    check,
};

use super::{Methods, Model, Op, Taken, Tale, World, expect, history, read_all, small_options};

pub const SECTORS: u64 = 83;

/// The files of volume `number` on a disk.
pub fn files_on(number: usize, file: impl Fn(usize) -> Arc<dyn BlockFile>) -> VolumeFiles {
    volume_files(|place| file(number * FILES + place))
}

pub fn blank_images(models: &[Model]) -> Vec<Image> {
    let mut images: Vec<Image> = Vec::new();
    for model in models {
        images.push(model.bytes().into());
        images.resize(images.len() + FILES - 1, Image::default());
    }
    images
}

pub fn memory(images: Vec<Image>) -> impl Fn(usize) -> Arc<dyn BlockFile> {
    let files: Vec<Arc<dyn BlockFile>> = images
        .into_iter()
        .map(|image| -> Arc<dyn BlockFile> { Arc::new(MemoryFile::new(image)) })
        .collect();
    move |place| Arc::clone(&files[place])
}

/// The truth around one operation.
pub struct Step<'a> {
    /// The boot in which it happened: another one follows a power cut.
    pub boot: u8,
    pub op: Option<&'a Op>,
    pub before: &'a Model,
    pub after: &'a Model,
}

/// Where a history begins: the files after an earlier crash, or a blank disk.
#[derive(Clone)]
pub struct Start {
    images: Vec<Image>,
    model: Model,
    boot: u8,
}

impl Start {
    pub fn blank() -> Start {
        let model = Model::new(SECTORS);
        Start {
            images: blank_images(std::slice::from_ref(&model)),
            model,
            boot: 1,
        }
    }
}

/// A recorded history: models before the first and after each operation.
struct Recorded {
    ops: Vec<Op>,
    models: Vec<Model>,
    points: Vec<CrashPoint>,
    boot: u8,
}

/// Runs a history on a crash disk. Markers: 2i during operation i, 2i+1 after it.
fn record(start: Start, ops: &[Op], every_writes: u64) -> Recorded {
    let disk = CrashDisk::new(start.images, every_writes);
    let files = files_on(0, |place| disk.file(place));
    let mut world = World::open(files, small_options(start.boot), start.model);
    disk.take_points();
    let mut models = vec![world.model.clone()];
    for (number, op) in (0..).zip(ops) {
        disk.set_marker(2 * number);
        world.apply(op);
        models.push(world.model.clone());
        disk.set_marker(2 * number + 1);
        disk.record();
    }
    Recorded {
        ops: ops.to_vec(),
        models,
        points: disk.take_points(),
        boot: start.boot,
    }
}

impl Recorded {
    fn step(&self, point: &CrashPoint) -> Step<'_> {
        let number = (point.marker / 2) as usize;
        let boot = self.boot;
        if point.marker.is_multiple_of(2) {
            Step {
                boot,
                op: Some(&self.ops[number]),
                before: &self.models[number],
                after: &self.models[number + 1],
            }
        } else {
            let model = &self.models[number + 1];
            Step {
                boot,
                op: None,
                before: model,
                after: model,
            }
        }
    }
}

/// Whether every sector is one of its candidates.
pub fn all_in(
    found: &[Option<u64>],
    candidates: impl Fn(usize, u64) -> bool,
) -> Result<(), String> {
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
pub fn possible(model: &Model, sector: usize, value: u64) -> bool {
    model.head.get(sector) == Some(&value)
        || (model.possible.get(sector)).is_some_and(|possible| possible.contains(&value))
        || model.flies(sector, value)
}

/// The head is one the crash may leave.
pub fn check_head(step: &Step<'_>, power_cut: bool, found: &[Option<u64>], ids: &[SnapshotId]) {
    let (before, after) = (step.before, step.after);
    let is_long = |model: &Model| found.len() == model.head.len();
    assert!(
        is_long(before) || is_long(after),
        "{} sectors, {} before and {} after",
        found.len(),
        before.sectors(),
        after.sectors()
    );
    let holds = |model: &Model, sector: usize, value| model.head.get(sector) == Some(&value);
    let result = match step.op {
        // All of it or nothing: no mixture of the two states.
        Some(Op::Revert { .. }) => {
            let reverted = are_snapshots(ids, after, power_cut)
                && is_long(after)
                && all_in(found, |sector, value| holds(after, sector, value)).is_ok();
            if reverted {
                Ok(())
            } else {
                assert!(are_snapshots(ids, before, power_cut) && is_long(before));
                all_in(found, |sector, value| {
                    if power_cut {
                        possible(before, sector, value)
                    } else {
                        holds(before, sector, value) || before.flies(sector, value)
                    }
                })
            }
        }
        Some(_) if power_cut => all_in(found, |sector, value| {
            possible(before, sector, value) || possible(after, sector, value)
        }),
        // Killed in the operation: what it wrote may be there or not, all before it is.
        Some(_) => all_in(found, |sector, value| {
            holds(before, sector, value)
                || holds(after, sector, value)
                || before.flies(sector, value)
                || after.flies(sector, value)
                || (before.head.get(sector) != after.head.get(sector)
                    && possible(after, sector, value))
        }),
        None if power_cut => all_in(found, |sector, value| possible(after, sector, value)),
        None => all_in(found, |sector, value| {
            holds(after, sector, value) || after.flies(sector, value)
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
pub fn check_snapshots(step: &Step<'_>, power_cut: bool, volume: &Volume) -> Vec<Taken> {
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
        let mut sectors = known
            .unwrap_or_else(|| panic!("nobody took snapshot {id}"))
            .sectors
            .clone();
        let seen = read_all(volume, View::Snapshot(id));
        if let Some(Op::LeaveOut { .. }) = step.op {
            note_left_out(&mut sectors, &seen, step.after, id);
        }
        expect(&sectors, &seen, &format!("snapshot {id}"));
        found.push(Taken { id, sectors });
    }
    found
}

/// In the middle of leaving out, each block is as before, or as afterwards.
fn note_left_out(sectors: &mut [u64], seen: &[Option<u64>], after: &Model, id: SnapshotId) {
    let Some(left) = after.snapshots.iter().find(|taken| taken.id == id) else {
        return;
    };
    let blocks = sectors.chunks_mut(8).zip(left.sectors.chunks(8));
    for ((before, after), seen) in blocks.zip(seen.chunks(8)) {
        if seen
            .iter()
            .zip(after)
            .all(|(seen, after)| *seen == Some(*after))
        {
            before.copy_from_slice(after);
        }
    }
}

pub fn open(files: &VolumeFiles, boot: u8) -> Volume {
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

pub fn assert_checks(files: &VolumeFiles) {
    let findings = check(files);
    let damage: Vec<_> = findings
        .iter()
        .filter(|f| f.severity == Severity::Damage)
        .collect();
    assert!(damage.is_empty(), "{damage:?}");
}

/// Opens an image, compares, and goes on working with it.
pub fn try_image(step: &Step<'_>, images: Vec<Image>, power_cut: bool, seed: u64) {
    let files = files_on(0, memory(images));
    assert_checks(&files);
    let boot = step.boot + u8::from(power_cut);
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
    let model = found_model(&head, snapshots, after);
    let mut world = World::around(volume, files, small_options(boot), model);
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
    if seed.is_multiple_of(4) {
        world.settle_everything(seed);
    }
}

/// What is there after a crash is the truth from now on: opening has made it durable.
pub fn found_model(head: &[Option<u64>], snapshots: Vec<Taken>, after: &Model) -> Model {
    let mut model = Model::new(head.len() as u64);
    model.head = head.iter().map(|value| value.unwrap()).collect();
    model.snapshots = snapshots;
    model.next_value = after.next_value + 1_000;
    model.next_id = after.next_id + 1_000;
    model
}

/// Cuts the power again while the image recovers, at every sync of the recovery.
fn cut_recovery(step: &Step<'_>, images: Vec<Image>, power_cut: bool, seed: u64) -> u64 {
    let disk = CrashDisk::new(images, 2);
    let files = files_on(0, |place| disk.file(place));
    drop(open(&files, step.boot + u8::from(power_cut)));
    let mut tried = 0;
    for point in disk.take_points() {
        if power_cut {
            for image in point.power_cuts(3, seed) {
                try_image_again(step, image, step.boot + 2, true);
                tried += 1;
            }
        } else {
            try_image_again(step, point.killed(), step.boot, false);
            tried += 1;
        }
    }
    tried
}

/// A killed daemon's bytes are in the page cache, and nothing of them is durable before recovery syncs it:
/// the power goes while the next daemon recovers.
fn cut_after_kill(step: &Step<'_>, point: &CrashPoint, seed: u64) -> u64 {
    let disk = point.resume(3);
    let files = files_on(0, |place| disk.file(place));
    drop(open(&files, step.boot));
    let mut tried = 0;
    for point in disk.take_points() {
        for image in point.power_cuts(3, seed) {
            try_image_again(step, image, step.boot + 1, true);
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

/// Images tried.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tried {
    pub power_cuts: u64,
    pub kills: u64,
    pub in_recovery: u64,
}

impl Tried {
    pub fn all(&self) -> u64 {
        self.power_cuts + self.kills + self.in_recovery
    }

    pub fn add(&mut self, other: &Tried) {
        self.power_cuts += other.power_cuts;
        self.kills += other.kills;
        self.in_recovery += other.in_recovery;
    }
}

impl std::fmt::Display for Tried {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            out,
            "{} images: {} power cuts, {} killed daemons, {} crashes in recovery",
            self.all(),
            self.power_cuts,
            self.kills,
            self.in_recovery
        )
    }
}

/// The history of a seed. Every other one writes the same few blocks again and again, sealed, with a flush
/// behind nearly every write: what a database's log does, and what recycles blocks in the log the fastest.
pub fn history_of(seed: u64, methods: Methods) -> Vec<Op> {
    if seed.is_multiple_of(2) {
        return history(seed, methods, 40, SECTORS);
    }
    let mut random = SmallRng::seed_from_u64(seed);
    history(seed, methods, 60, SECTORS)
        .into_iter()
        .enumerate()
        .map(|(number, op)| match number % 8 {
            0 | 3 | 5 => Op::Batch {
                writes: (0..random.random_range(1..4))
                    .map(|_| (random.random_range(0..4) * 8, 8))
                    .collect(),
                seals: true,
            },
            1 | 4 | 6 => Op::Flush,
            _ => op,
        })
        .collect()
}

/// Tries images of a history until `most` are tried, and of what follows a crash.
pub fn crash_history(seed: u64, methods: Methods, ops: &[Op], most: u64) -> Tried {
    let mut tried = Tried::default();
    crash_from(Start::blank(), seed, methods, ops, most, 2, &mut tried);
    tried
}

/// Every point of a history that is not long: all images of it, where they are not more than `most`.
pub fn crash_in_every_way(methods: Methods, ops: &[Op], most: u64) -> Tried {
    let (recorded, mut tried) = (record(Start::blank(), ops, 0), Tried::default());
    for (number, point) in (0..).zip(&recorded.points) {
        let step = recorded.step(point);
        let tale = Tale(format!(
            "{methods:?}, point {number} {:?}, marker {}, {:?}",
            point.moment, point.marker, step.op
        ));
        for image in point.power_cuts(most, number) {
            try_image(&step, image, true, number);
            tried.power_cuts += 1;
        }
        drop(tale);
    }
    tried
}

/// Every point of a history, with a power cut at every write of the recovery after a killed daemon and after a cut.
pub fn crash_in_every_recovery(methods: Methods, ops: &[Op]) -> Tried {
    let (recorded, mut tried) = (record(Start::blank(), ops, 1), Tried::default());
    for (number, point) in (0..).zip(&recorded.points) {
        let step = recorded.step(point);
        let tale = Tale(format!(
            "{methods:?}, point {number} {:?}, marker {}, {:?}",
            point.moment, point.marker, step.op
        ));
        tried.in_recovery += cut_after_kill(&step, point, number);
        for image in point.power_cuts(4, number) {
            tried.in_recovery += cut_recovery(&step, image, true, number);
        }
        drop(tale);
    }
    tried
}

fn crash_from(
    start: Start,
    seed: u64,
    methods: Methods,
    ops: &[Op],
    most: u64,
    depth: u64,
    tried: &mut Tried,
) {
    let recorded = record(start, ops, 3);
    let mut random = SmallRng::seed_from_u64(seed);
    for (number, point) in recorded.points.iter().enumerate() {
        if tried.all() >= most {
            return;
        }
        let step = recorded.step(point);
        let tale = Tale(format!(
            "history {seed} {methods:?}, depth {depth}, point {number} {:?}, marker {}, {:?}",
            point.moment, point.marker, step.op
        ));
        let cuts = if random.random_bool(0.1) { 16 } else { 3 };
        for image in point.power_cuts(cuts, seed ^ number as u64) {
            if random.random_bool(0.02) {
                tried.in_recovery += cut_recovery(&step, image.clone(), true, random.random());
            }
            try_image(&step, image, true, random.random());
            tried.power_cuts += 1;
        }
        // A sector that was being written when the power went may be unreadable; two slots are there
        // for that.
        if let Some(image) = point.power_cut_garbling(SUPERBLOCK) {
            try_image(&step, image, true, random.random());
            tried.power_cuts += 1;
        }
        if random.random_bool(0.5) {
            if random.random_bool(0.1) {
                tried.in_recovery += cut_recovery(&step, point.killed(), false, random.random());
                tried.in_recovery += cut_after_kill(&step, point, random.random());
            }
            try_image(&step, point.killed(), false, random.random());
            tried.kills += 1;
        }
        // Life goes on after a crash.
        if depth > 0 && random.random_bool(0.004) {
            let power_cut = random.random_bool(0.7);
            let image = if power_cut {
                point.power_cut(|_| random.random())
            } else {
                point.killed()
            };
            let start = go_on_from(&step, image, power_cut);
            let ops = history(random.random(), methods, 24, SECTORS);
            let limit = tried.all() + 400;
            crash_from(
                start,
                random.random(),
                methods,
                &ops,
                limit.min(most),
                depth - 1,
                tried,
            );
        }
        drop(tale);
    }
}

/// What was found after a crash, as the start of another history.
fn go_on_from(step: &Step<'_>, images: Vec<Image>, power_cut: bool) -> Start {
    let files = files_on(0, memory(images.clone()));
    let boot = step.boot + u8::from(power_cut);
    let volume = open(&files, boot);
    let snapshots = check_snapshots(step, power_cut, &volume);
    let head = read_all(&volume, View::Head);
    let model = found_model(&head, snapshots, step.after);
    Start {
        images,
        model,
        boot,
    }
}
