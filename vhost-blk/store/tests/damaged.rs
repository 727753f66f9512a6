//! Flipped bits and foreign bytes in the metadata: found, or harmless; never a panic, a hang, or other data.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod harness;

use harness::{
    JOURNAL_REGION, Methods, Model, World, history, memory_files, small_options, try_read_all,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vhost_blk_store::sim::{
    FILE_NAMES, FILES, Image, LOG, Part, SUPERBLOCK, contents, memory_volume, metadata,
};
use vhost_blk_store::{Dump, StoreError, View, Volume, check, dump};

const SECTORS: u64 = 83;
/// A volume after a random history, flushed and dropped without closing: everything is in use.
fn worn(seed: u64) -> (Vec<Image>, Model) {
    let model = Model::new(SECTORS);
    let mut world = World::new(memory_files(model.bytes()), small_options(1), model);
    for op in history(seed, Methods::Mixed, 60, SECTORS) {
        world.apply(&op);
    }
    world.finish_all().unwrap();
    world.volume().flush().unwrap();
    (contents(&world.files).unwrap(), world.model)
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
    images: &[Image],
    whole_commits: &[u64],
    model: &Model,
    victim: Victim,
    what: &str,
) -> (bool, bool) {
    let files = memory_volume(images.to_vec());
    let findings = check(&files);
    let dumped = dump(&files).map(|dump| commits(&dump).1);
    let Ok((volume, _)) = Volume::open_files(files, &small_options(2)) else {
        assert!(
            !findings.is_empty(),
            "{what}: does not open, and the check says nothing"
        );
        return (true, false);
    };
    let (mut whole, mut told) = (true, false);
    let views = model
        .snapshots
        .iter()
        .map(|taken| (View::Snapshot(taken.id), &taken.sectors));
    for (view, sectors) in views.chain([(View::Head, &model.head)]) {
        match try_read_all(&volume, view) {
            Ok(found) => whole &= found.into_iter().eq(sectors.iter().copied().map(Some)),
            // A snapshot that is gone with the end of the journal.
            Err(StoreError::NoSuchSnapshot(_)) => whole = false,
            Err(_) => told = true,
        }
    }
    assert!(
        !told || !findings.is_empty(),
        "{what}: does not read, and the check says nothing"
    );
    assert!(
        !told || volume.status().poisoned,
        "{what}: writes go on with a damaged index"
    );
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
    (told, !whole)
}

#[test]
fn flipped_bits_are_found_or_harmless() {
    let mut random = SmallRng::seed_from_u64(77);
    let (mut refused, mut shortened, mut tried) = (0, 0, 0);
    for seed in 0..24 {
        let (images, model) = worn(seed);
        let files = memory_volume(images.clone());
        assert!(check(&files).is_empty());
        let (whole_commits, _) = commits(&dump(&files).unwrap());
        for part in metadata(&images, JOURNAL_REGION) {
            for _ in 0..60 {
                if part.length_bytes == 0 {
                    continue;
                }
                // Half of the damage near the start, where the headers are.
                let within = if random.random() {
                    random.random_range(0..part.length_bytes)
                } else {
                    random.random_range(0..part.length_bytes.min(512))
                };
                let mut images = images.clone();
                let (image, at) = (&mut images[part.place], part.offset_bytes + within);
                let left = part.length_bytes - within;
                let damage = random.random_range(0..3);
                match damage {
                    0 => image.flip(at, 1 << random.random_range(0..8)),
                    1 => image.fill(random.random(), at, left.min(512)),
                    _ => image.fill(0, at, left),
                }
                let victim = match (part.journal, damage) {
                    (true, 0) => Victim::Journal,
                    (true, _) => Victim::JournalEnd,
                    (false, _) => Victim::Other,
                };
                let what = format!("history {seed}, {} at {at}", FILE_NAMES[part.place]);
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

/// One bit of every byte that is in use, and of some that are not. `VMSHADOW_EVERY_BIT=1`: all eight.
#[test]
fn every_byte_of_the_metadata_is_guarded_or_means_nothing() {
    let every_bit = std::env::var_os("VMSHADOW_EVERY_BIT").is_some();
    let (mut refused, mut shortened, mut tried) = (0, 0, 0);
    for seed in if every_bit { 0..6 } else { 3..4 } {
        let (images, model) = worn(seed);
        let (whole_commits, _) = commits(&dump(&memory_volume(images.clone())).unwrap());
        for part in metadata(&images, JOURNAL_REGION) {
            let victim = if part.journal {
                Victim::Journal
            } else {
                Victim::Other
            };
            let mut bytes = vec![0; usize::try_from(part.length_bytes).unwrap()];
            images[part.place].read(&mut bytes, part.offset_bytes);
            for (at, near) in (0..).zip(
                bytes
                    .chunks(32)
                    .flat_map(|near| near.iter().map(move |_| near)),
            ) {
                // Of a hole every 61st byte will do.
                if near.iter().all(|byte| *byte == 0) && at % 61 != 0 {
                    continue;
                }
                let bits = if every_bit { 0..8 } else { at % 8..at % 8 + 1 };
                for bit in bits {
                    let at = part.offset_bytes + at;
                    let mut images = images.clone();
                    images[part.place].flip(at, 1 << bit);
                    let what = format!(
                        "history {seed}, {} at {at}, bit {bit}",
                        FILE_NAMES[part.place]
                    );
                    let (no, short) = try_damaged(&images, &whole_commits, &model, victim, &what);
                    refused += u64::from(no);
                    shortened += u64::from(short);
                    tried += 1;
                }
            }
        }
    }
    println!("{tried} flipped bits: {refused} found, {shortened} taken for a power cut");
    // The rest lies in what older generations left.
    assert!(refused * 10 > tried, "{refused} of {tried}");
}

#[test]
fn cut_off_files_are_found_or_harmless() {
    let (images, model) = worn(5);
    let mut tried = 0;
    for (place, name) in FILE_NAMES.iter().enumerate() {
        let length = images[place].len_bytes();
        let mut ends: Vec<u64> = (0..length).step_by(512).collect();
        ends.extend([1, 63, 511, 4095, 4097, length.saturating_sub(1)]);
        for end in ends.into_iter().filter(|end| *end < length) {
            let mut images = images.clone();
            images[place].set_len(end);
            let victim = if place == LOG {
                Victim::JournalEnd
            } else {
                Victim::Other
            };
            // The log's data blocks have no checksum: what is missing of them must be found by its length.
            let what = format!("{name} cut off at {end}");
            let (found, lost) = try_damaged(&images, &[], &model, victim, &what);
            let in_journal = end < 2 * JOURNAL_REGION || end % 4096 != 0;
            assert!(place != LOG || found || in_journal || !lost, "{what}");
            tried += 1;
        }
    }
    println!("{tried} files cut off");
}

#[test]
fn files_of_another_day_are_found_or_harmless() {
    let model = Model::new(SECTORS);
    let mut world = World::new(memory_files(model.bytes()), small_options(1), model);
    let mut days = Vec::new();
    for (number, op) in (1..).zip(history(21, Methods::Mixed, 160, SECTORS)) {
        world.apply(&op);
        if number % 20 == 0 {
            world.finish_all().unwrap();
            world.volume().flush().unwrap();
            days.push((contents(&world.files).unwrap(), world.model.clone()));
        }
    }
    let (mut refused, mut tried) = (0, 0);
    for (number, (new, model)) in days.iter().enumerate() {
        for (old, _) in &days[..number] {
            for place in (SUPERBLOCK..FILES).filter(|place| *place != LOG) {
                let mut mixed = new.clone();
                mixed[place].clone_from(&old[place]);
                let what = format!("an older {}", FILE_NAMES[place]);
                refused += u64::from(try_damaged(&mixed, &[], model, Victim::Other, &what).0);
                tried += 1;
            }
        }
        // Two files that look alike in each other's place.
        for (one, other) in [(3, FILES - 1), (SUPERBLOCK, 3), (LOG, 3)] {
            if one == other {
                continue;
            }
            let mut mixed = new.clone();
            mixed.swap(one, other);
            let what = format!("{} and {} swapped", FILE_NAMES[one], FILE_NAMES[other]);
            try_damaged(&mixed, &[], model, Victim::JournalEnd, &what);
        }
    }
    println!("{tried} files of another day: {refused} found");
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
        world.finish_all().unwrap();
        world.volume().flush().unwrap();
        contents(&world.files).unwrap()
    };
    let swap = |images: &mut [Image], part: Part| {
        let mut bytes = vec![0; usize::try_from(part.length_bytes).unwrap()];
        foreign[part.place].read(&mut bytes, part.offset_bytes);
        images[part.place].write(&bytes, part.offset_bytes);
    };
    let parts = metadata(&foreign, JOURNAL_REGION);
    for part in &parts {
        if part.place == SUPERBLOCK {
            continue;
        }
        let mut mixed = ours.clone();
        swap(&mut mixed, *part);
        let victim = if part.journal {
            Victim::JournalEnd
        } else {
            Victim::Other
        };
        try_damaged(&mixed, &[], &model, victim, FILE_NAMES[part.place]);
    }
    let mut both = ours.clone();
    for part in parts.iter().filter(|part| part.journal) {
        swap(&mut both, *part);
    }
    assert!(Volume::open_files(memory_volume(both), &small_options(2)).is_err());
}

#[test]
fn garbage_everywhere_never_panics() {
    let mut random = SmallRng::seed_from_u64(5);
    let (images, _) = worn(9);
    for _ in 0..300 {
        let mut images = images.clone();
        for image in images.iter_mut().skip(1) {
            for _ in 0..random.random_range(0..4) {
                let length = image.len_bytes().max(1);
                let at = random.random_range(0..length);
                let mut bytes = vec![0; random.random_range(1..3000)];
                bytes.iter_mut().for_each(|byte| *byte = random.random());
                image.write(&bytes, at);
                image.set_len(length);
            }
        }
        let files = memory_volume(images);
        drop(check(&files));
        drop(dump(&files));
        drop(Volume::open_files(files, &small_options(2)));
    }
}
