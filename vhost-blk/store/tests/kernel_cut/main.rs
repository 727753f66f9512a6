//! Power cuts under a real kernel: the store on a file system on a loop device on a disk of ours that keeps every
//! write and every flush it was given. Any moment is made again, with any part of what was not flushed, and
//! mounted; then the store has to open and hold what the simulated crashes demand, too.
//!
//! What the simulation assumes of kernel and file system is tried here: that fdatasync of a file reaches the
//! disk, with its size and its extents, that O_DIRECT and buffered writes of one file are covered by one sync.
//! Needs root, loop devices and FUSE, and says so where they are missing. `VMSHADOW_KERNEL_CUTS=N` tries more.
#![allow(clippy::cast_possible_truncation, reason = "volumes of a few blocks")]
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

#[path = "../harness/mod.rs"]
mod harness;
mod log_disk;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use harness::crash::{SECTORS, Step, assert_checks, check_head, check_snapshots, found_model};
use harness::{Methods, Model, Op, Tale, World, history, read_all, small_options};
use log_disk::{LogDisk, NAME};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vhost_blk_store::sim::Image;
use vhost_blk_store::{OpenOptions, View, Volume, VolumeFiles};

fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        let said = String::from_utf8_lossy(&output.stderr);
        Err(format!("{program} {arguments:?}: {said}"))
    }
}

/// A file system on a loop device on a file; gone when dropped.
struct Mounted {
    device: String,
    directory: PathBuf,
    is_mounted: bool,
}

impl Mounted {
    fn new(file: &Path, directory: &Path, options: &str) -> Result<Mounted, String> {
        // Others look for a free device at the same time.
        let mut tries = 0;
        let device = loop {
            match run("losetup", &["--find", "--show", file.to_str().unwrap()]) {
                Ok(device) => break device,
                Err(error) if tries == 20 => return Err(error),
                Err(_) => tries += 1,
            }
        };
        let mut mounted = Mounted {
            device,
            directory: directory.to_owned(),
            is_mounted: false,
        };
        let to = directory.to_str().unwrap();
        run("mount", &["-o", options, &mounted.device, to])?;
        mounted.is_mounted = true;
        Ok(mounted)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A program that another test is starting has copies of our open files between its fork and its exec.
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.is_mounted {
            match run("umount", &[self.directory.to_str().unwrap()]) {
                Ok(_) => self.is_mounted = false,
                Err(_) if Instant::now() < deadline => {}
                Err(error) => {
                    eprintln!("{error}");
                    break;
                }
            }
        }
        if let Err(error) = run("losetup", &["--detach", &self.device]) {
            eprintln!("{error}");
        }
    }
}

/// A file system that the store may find itself on.
#[derive(Clone, Copy, Debug)]
struct Kind {
    name: &'static str,
    size_bytes: u64,
    mkfs: &'static [&'static str],
    mount: &'static str,
}

const EXT4: Kind = Kind {
    name: "ext4",
    size_bytes: 96 << 20,
    mkfs: &["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0"],
    mount: "noatime",
};
const XFS: Kind = Kind {
    name: "xfs",
    size_bytes: 320 << 20,
    mkfs: &["mkfs.xfs", "-q", "-f"],
    mount: "noatime",
};
const BTRFS: Kind = Kind {
    name: "btrfs",
    size_bytes: 160 << 20,
    mkfs: &["mkfs.btrfs", "-q", "-f"],
    mount: "noatime",
};

/// In memory, where the machine has such a place: the cuts are ours, not the disk's.
fn directory() -> tempfile::TempDir {
    let shared = Path::new("/dev/shm");
    if shared.is_dir() {
        tempfile::tempdir_in(shared).unwrap()
    } else {
        tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
    }
}

fn write_image(path: &Path, image: &Image) {
    let file = File::create(path).unwrap();
    file.set_len(image.len_bytes()).unwrap();
    for (offset_bytes, length_bytes) in image.written() {
        let mut bytes = vec![0; length_bytes as usize];
        image.read(&mut bytes, offset_bytes);
        file.write_all_at(&bytes, offset_bytes).unwrap();
    }
}

fn read_image(path: &Path) -> Image {
    let file = File::open(path).unwrap();
    let length_bytes = file.metadata().unwrap().len();
    let mut image = Image::default();
    let mut bytes = vec![0; 1 << 20];
    let mut at = 0;
    while at < length_bytes {
        let count = file.read_at(&mut bytes, at).unwrap();
        image.write(&bytes[..count], at);
        at += count as u64;
    }
    image
}

/// A fresh file system with a base in it, durable.
fn prepared(kind: Kind, model: &Model, directory: &Path) -> Result<Image, String> {
    let file = directory.join("fresh.img");
    File::create(&file)
        .unwrap()
        .set_len(kind.size_bytes)
        .unwrap();
    let path = file.to_str().unwrap();
    let (program, arguments) = kind.mkfs.split_first().unwrap();
    run(program, &[arguments, &[path]].concat())?;
    let mounted = Mounted::new(&file, &directory.join("mnt"), kind.mount)?;
    fs::write(directory.join("mnt/disk.raw"), model.bytes()).unwrap();
    drop(mounted);
    let image = read_image(&file);
    fs::remove_file(file).unwrap();
    Ok(image)
}

fn options(boot: u8) -> OpenOptions {
    OpenOptions {
        direct: true,
        ..small_options(boot)
    }
}

fn files(directory: &Path, options: &OpenOptions) -> VolumeFiles {
    let base = directory.join("mnt/disk.raw");
    VolumeFiles::open(&base, &directory.join("mnt/shadow"), options).unwrap()
}

/// A history on the real thing: models, and how many events the disk had seen around each operation.
struct Recorded {
    disk: LogDisk,
    ops: Vec<Op>,
    models: Vec<Model>,
    /// Before and after each operation.
    moments: Vec<(usize, usize)>,
}

/// A history in which the base is extended and cut off: its length is the file system's to keep.
fn growing_history(seed: u64) -> Vec<Op> {
    let mut ops = history(seed, Methods::Mixed, 40, SECTORS);
    for (number, op) in ops.iter_mut().enumerate() {
        match number % 10 {
            4 | 9 => {
                *op = Op::Grow {
                    by: 11,
                    prepared: number.is_multiple_of(2),
                };
            }
            7 => *op = Op::Revert { which: 0 },
            _ => {}
        }
    }
    ops
}

fn record(kind: Kind, seed: u64, directory: &Path) -> Result<Recorded, String> {
    let model = Model::new(SECTORS);
    let disk = LogDisk::new(prepared(kind, &model, directory)?);
    let fuse = directory.join("fuse");
    let session = disk
        .mount(&fuse)
        .map_err(|error| format!("mounting FUSE: {error}"))?;
    let mounted = Mounted::new(&fuse.join(NAME), &directory.join("mnt"), kind.mount)?;
    let mut world = World::new(files(directory, &options(1)), options(1), model);
    let ops = growing_history(seed);
    let (mut models, mut moments) = (vec![world.model.clone()], Vec::new());
    for op in &ops {
        let before = disk.events();
        world.apply(op);
        moments.push((before, disk.events()));
        models.push(world.model.clone());
    }
    drop(world);
    drop(mounted);
    drop(session);
    Ok(Recorded {
        disk,
        ops,
        models,
        moments,
    })
}

impl Recorded {
    /// What went on when the disk had seen so many events.
    fn step(&self, events: usize) -> Step<'_> {
        let during = |(before, after): &(usize, usize)| *before < events && events < *after;
        if let Some(number) = self.moments.iter().position(during) {
            return Step {
                boot: 1,
                op: Some(&self.ops[number]),
                before: &self.models[number],
                after: &self.models[number + 1],
            };
        }
        // Behind the last operation that had ended.
        let ended = self
            .moments
            .iter()
            .filter(|(_, after)| *after <= events)
            .count();
        let model = &self.models[ended];
        Step {
            boot: 1,
            op: None,
            before: model,
            after: model,
        }
    }
}

/// Mounts what a power cut left, opens the store on it, and goes on.
fn try_cut(kind: Kind, step: &Step<'_>, image: &Image, seed: u64, directory: &Path) {
    let path = directory.join("cut.img");
    write_image(&path, image);
    let mounted = Mounted::new(&path, &directory.join("mnt"), kind.mount).unwrap();
    let shadow = directory.join("mnt/shadow");
    let read_only = OpenOptions {
        read_only: true,
        ..options(2)
    };
    if shadow.join("superblock").exists()
        && let Ok(files) = VolumeFiles::open(&directory.join("mnt/disk.raw"), &shadow, &read_only)
    {
        assert_checks(&files);
    }
    let files = files(directory, &options(2));
    let (volume, _) = Volume::open_files(files.clone(), &options(2)).unwrap();
    let snapshots = check_snapshots(step, true, &volume);
    let ids: Vec<_> = snapshots.iter().map(|taken| taken.id).collect();
    let head = read_all(&volume, View::Head);
    check_head(step, true, &head, &ids);
    let model = found_model(&head, snapshots, step.after);
    drop(volume);
    let mut world = World::open(files, options(2), model);
    for op in history(seed, Methods::Mixed, 5, SECTORS) {
        world.apply(&op);
    }
    world.compare();
    drop(world);
    drop(mounted);
}

fn cut_everywhere(kind: Kind, cuts: u64, seed: u64) {
    let scratch = directory();
    let directory = scratch.path();
    for name in ["mnt", "fuse"] {
        fs::create_dir(directory.join(name)).unwrap();
    }
    let (mut tried, mut seed) = (0, seed);
    let mut events = 0;
    while tried < cuts {
        seed += 1;
        let recorded = match record(kind, seed, directory) {
            Ok(recorded) => recorded,
            Err(reason) if tried == 0 => {
                println!("skipped: {}: {reason}", kind.name);
                return;
            }
            Err(reason) => panic!("{reason}"),
        };
        events += recorded.disk.events();
        let mut random = SmallRng::seed_from_u64(seed);
        for _ in 0..24.min(cuts - tried) {
            // Half of the cuts are in operations, where things go on.
            let (first, last) = recorded.moments[random.random_range(0..recorded.moments.len())];
            let at = if random.random() && first < last {
                random.random_range(first..=last)
            } else {
                random.random_range(recorded.moments[0].0..=recorded.disk.events())
            };
            let whole = random.random();
            let density = [0.0, 1.0, 0.5, 0.9, 0.1][random.random_range(0..5)];
            let step = recorded.step(at);
            let _tale = Tale(format!(
                "{} history {seed}, cut behind event {at}, whole writes {whole}, density {density}, {:?}",
                kind.name, step.op
            ));
            let mut sectors = SmallRng::seed_from_u64(random.random());
            let image = recorded
                .disk
                .cut(at, whole, || sectors.random_bool(density));
            try_cut(kind, &step, &image, random.random(), directory);
            tried += 1;
        }
    }
    println!(
        "{}: {tried} cuts of a disk that saw {events} writes and flushes",
        kind.name
    );
}

fn wanted(default: u64) -> u64 {
    std::env::var("VMSHADOW_KERNEL_CUTS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

#[test]
fn volume_on_ext4_survives_cuts_of_the_disk_below() {
    cut_everywhere(EXT4, wanted(48), 100);
}

#[test]
fn volume_on_xfs_survives_cuts_of_the_disk_below() {
    cut_everywhere(XFS, wanted(24), 200);
}

#[test]
fn volume_on_btrfs_survives_cuts_of_the_disk_below() {
    cut_everywhere(BTRFS, wanted(12), 300);
}
