//! Flipped bits and foreign bytes in the metadata: found, or harmless; never a panic, a hang, or other data.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod harness;

use std::sync::Arc;

use harness::{Methods, Model, World, history, memory_files, read_all, small_options};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vhost_blk_store::sim::MemoryFile;
use vhost_blk_store::{BlockFile, Dump, View, Volume, VolumeFiles, check, dump};

const SECTORS: u64 = 83;
const NAMES: [&str; 7] = [
    "base",
    "superblock",
    "log",
    "journal.0",
    "journal.1",
    "index.0",
    "index.1",
];

fn images(files: &VolumeFiles) -> Vec<Vec<u8>> {
    [
        &files.base,
        &files.superblock,
        &files.log,
        &files.journal[0],
        &files.journal[1],
        &files.index[0],
        &files.index[1],
    ]
    .into_iter()
    .map(|file| {
        let mut bytes = vec![0; usize::try_from(file.len_bytes().unwrap()).unwrap()];
        file.read_at(&mut bytes, 0).unwrap();
        bytes
    })
    .collect()
}

fn files(images: &[Vec<u8>]) -> VolumeFiles {
    let at =
        |place: usize| -> Arc<dyn BlockFile> { Arc::new(MemoryFile::new(images[place].clone())) };
    VolumeFiles {
        base: at(0),
        superblock: at(1),
        log: at(2),
        journal: [at(3), at(4)],
        index: [at(5), at(6)],
    }
}

/// A volume after a random history, flushed and dropped without closing: everything is in use.
fn worn(seed: u64) -> (Vec<Vec<u8>>, Model) {
    let model = Model::new(SECTORS);
    let mut world = World::new(memory_files(model.bytes()), small_options(1), model);
    for op in history(seed, Methods::Mixed, 60, SECTORS) {
        world.apply(&op);
    }
    world.volume().flush().unwrap();
    (images(&world.files), world.model)
}

/// Sequence numbers of the COMMITs in a journal, and of its last record.
fn commits(dump: &Dump) -> (Vec<u64>, u64) {
    let commits = dump
        .journal
        .iter()
        .filter(|entry| entry.record.starts_with("Commit"));
    (
        commits.map(|entry| entry.sequence).collect(),
        dump.journal.last().unwrap().sequence,
    )
}

/// What the damage was done to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Victim {
    Journal,
    /// A journal of which so much is gone that nothing behind it can tell what there was.
    JournalEnd,
    Other,
}

/// Either the volume does not open, or everything in it reads as before, or reading answers an error.
/// Only the loss of the journal's last round looks like a power cut, and is taken for one.
fn try_damaged(
    images: &[Vec<u8>],
    whole_commits: &[u64],
    model: &Model,
    victim: Victim,
    what: &str,
) -> (bool, bool) {
    let files = files(images);
    let findings = check(&files);
    let dumped = dump(&files).map(|dump| commits(&dump).1);
    let Ok((volume, _)) = Volume::open_files(files, &small_options(2)) else {
        assert!(
            !findings.is_empty(),
            "{what}: does not open, and the check says nothing"
        );
        return (true, false);
    };
    let mut whole = true;
    for taken in &model.snapshots {
        let mut bytes = vec![0; usize::try_from(volume.size_bytes()).unwrap()];
        match volume.read_at(View::Snapshot(taken.id), 0, &mut bytes) {
            Ok(()) => {
                let found = read_all(&volume, View::Snapshot(taken.id));
                let expected: Vec<Option<u64>> = taken.sectors.iter().copied().map(Some).collect();
                whole &= found == expected;
            }
            Err(_) => whole = false,
        }
    }
    let expected: Vec<Option<u64>> = model.head.iter().copied().map(Some).collect();
    whole &= read_all(&volume, View::Head) == expected;
    match victim {
        Victim::Other => assert!(whole, "{what}: opened with other contents"),
        Victim::Journal if !whole => {
            let last = dumped.unwrap();
            let lost = whole_commits
                .iter()
                .filter(|commit| **commit > last)
                .count();
            assert!(lost <= 1, "{what}: lost {lost} rounds and says nothing");
        }
        Victim::Journal | Victim::JournalEnd => {}
    }
    (false, !whole)
}

#[test]
fn flipped_bits_are_found_or_harmless() {
    let mut random = SmallRng::seed_from_u64(77);
    let (mut refused, mut shortened, mut tried) = (0, 0, 0);
    for seed in 0..24 {
        let (images, model) = worn(seed);
        assert!(check(&files(&images)).is_empty());
        let (whole_commits, _) = commits(&dump(&files(&images)).unwrap());
        for place in [1, 3, 4, 5, 6] {
            for _ in 0..60 {
                let mut images = images.clone();
                let length = images[place].len();
                if length == 0 {
                    continue;
                }
                // Half of the damage near the start, where the headers are.
                let at = if random.random() {
                    random.random_range(0..length)
                } else {
                    random.random_range(0..length.min(512))
                };
                let damage = random.random_range(0..3);
                match damage {
                    0 => images[place][at] ^= 1 << random.random_range(0..8),
                    1 => {
                        let end = (at + 512).min(length);
                        images[place][at..end].fill(random.random());
                    }
                    _ => images[place].truncate(at),
                }
                let victim = match (place, damage) {
                    (3 | 4, 0) => Victim::Journal,
                    (3 | 4, _) => Victim::JournalEnd,
                    _ => Victim::Other,
                };
                let what = format!("history {seed}, {} at {at}", NAMES[place]);
                let (no, short) = try_damaged(&images, &whole_commits, &model, victim, &what);
                refused += u64::from(no);
                shortened += u64::from(short);
                tried += 1;
            }
        }
    }
    println!("{tried} damaged volumes: {refused} refused, {shortened} with a shortened journal");
    assert!(refused > 0);
}

#[test]
fn files_of_another_volume_are_refused() {
    let (ours, model) = worn(3);
    let foreign = {
        let other = Model::new(SECTORS);
        let mut options = small_options(1);
        options.volume_id = Some(uuid::Uuid::from_u128(0xbad).into());
        let mut world = World::new(memory_files(other.bytes()), options, other);
        for op in history(4, Methods::Mixed, 60, SECTORS) {
            world.apply(&op);
        }
        world.volume().flush().unwrap();
        images(&world.files)
    };
    for place in [3, 4, 5, 6] {
        let mut mixed = ours.clone();
        mixed[place].clone_from(&foreign[place]);
        let journal = place == 3 || place == 4;
        let victim = if journal {
            Victim::JournalEnd
        } else {
            Victim::Other
        };
        try_damaged(&mixed, &[], &model, victim, NAMES[place]);
    }
    let mut both = ours.clone();
    both[3].clone_from(&foreign[3]);
    both[4].clone_from(&foreign[4]);
    assert!(Volume::open_files(files(&both), &small_options(2)).is_err());
}

#[test]
fn garbage_everywhere_never_panics() {
    let mut random = SmallRng::seed_from_u64(5);
    let (images, _) = worn(9);
    for _ in 0..300 {
        let mut images = images.clone();
        for image in images.iter_mut().skip(1) {
            for _ in 0..random.random_range(0..4) {
                if image.is_empty() {
                    continue;
                }
                let at = random.random_range(0..image.len());
                let end = (at + random.random_range(1..3000)).min(image.len());
                image[at..end]
                    .iter_mut()
                    .for_each(|byte| *byte = random.random());
            }
        }
        let files = files(&images);
        drop(check(&files));
        drop(dump(&files));
        drop(Volume::open_files(files, &small_options(2)));
    }
}
