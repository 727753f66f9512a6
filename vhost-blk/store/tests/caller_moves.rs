//! A caller that moves everything itself: copies, checksums, data; and a snapshot that is begun first and made
//! durable later.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod harness;

use harness::{Model, Op, Verdict, World, expect, read_all, sector_bytes, small_options};
use vhost_blk_store::sim::{CrashDisk, FILES, Image, memory_volume, volume_files};
use vhost_blk_store::{
    BlockCopy, ByteRange, DataFile, Extent, Method, NewSnapshot, OpenOptions, Source, StoreError,
    View, Volume, WriteKind, WritePlan,
};

const SECTORS: u64 = 83;

/// A volume on a disk that can lose its power.
fn world() -> (World, CrashDisk) {
    let model = Model::new(SECTORS);
    let mut images = vec![Image::from(model.bytes())];
    images.resize(FILES, Image::default());
    let disk = CrashDisk::new(images, 0);
    let files = volume_files(|place| disk.file(place));
    let options = OpenOptions {
        segment_bytes: 1 << 20,
        ..small_options(1)
    };
    (World::new(files, options, model), disk)
}

fn new_snapshot(world: &mut World, method: Method) -> NewSnapshot {
    NewSnapshot {
        snapshot_id: world.model.fresh_id().into(),
        set_id: world.model.fresh_id().into(),
        members: world.members.clone(),
        method,
        created_unix_ms: 1,
    }
}

fn bytes_at(volume: &Volume, extent: &Extent) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(extent.length_bytes).unwrap()];
    let file = match extent.source {
        Source::Base => DataFile::Base,
        Source::Log => DataFile::Log,
        Source::Zero => return bytes,
    };
    volume
        .data_file(file)
        .read_at(&mut bytes, extent.offset_bytes)
        .unwrap();
    bytes
}

/// What an engine with a ring does before the data may move; the store moves nothing.
fn copy_and_seal(volume: &Volume, plan: &mut WritePlan) {
    let copies: Vec<BlockCopy> = plan.copies().to_vec();
    for (place, copy) in copies.iter().enumerate() {
        let bytes = bytes_at(volume, &copy.from);
        volume
            .data_file(DataFile::Log)
            .write_at(&bytes, copy.to_offset_bytes)
            .unwrap();
        if copy.wants_seal {
            plan.seal_copy(place, crc32c::crc32c(&bytes));
        }
    }
    plan.copies_landed();
    assert_eq!(plan.copies(), []);
}

fn move_and_seal(volume: &Volume, plan: &mut WritePlan, data: &[u8]) {
    let mut rest = data;
    for extent in plan.extents().to_vec() {
        let (now, later) = rest.split_at(usize::try_from(extent.length_bytes).unwrap());
        let file = match extent.source {
            Source::Base => DataFile::Base,
            Source::Log | Source::Zero => DataFile::Log,
        };
        volume
            .data_file(file)
            .write_at(now, extent.offset_bytes)
            .unwrap();
        rest = later;
    }
    for place in 0..plan.seals().len() {
        let part = plan.seals()[place];
        let start = usize::try_from(part.offset_bytes).unwrap();
        let end = start + usize::try_from(part.length_bytes).unwrap();
        plan.seal(place, crc32c::crc32c(&data[start..end]));
    }
}

#[test]
fn writes_whose_bytes_the_caller_moves_are_the_volumes() {
    for method in [Method::RedirectOnWrite, Method::CopyOnWrite] {
        let (mut world, _disk) = world();
        world.apply(&Op::Snapshot {
            method,
            verdict: Verdict::Keep,
        });
        let writes = [(3, 30), (40, 2), (56, 27)];
        let mut data = Vec::new();
        for (first, count) in writes {
            let mut bytes = Vec::new();
            for sector in first..first + count {
                let value = 5_000 + sector;
                world.model.head[usize::try_from(sector).unwrap()] = value;
                bytes.extend_from_slice(&sector_bytes(value));
            }
            data.push(bytes);
        }
        let volume = world.volume();
        let mut plans: Vec<WritePlan> = writes
            .iter()
            .map(|(first, count)| {
                let range = ByteRange::new(first * 512, count * 512);
                volume.plan_write(range, WriteKind::Write).unwrap()
            })
            .collect();
        // Room is the one thing that the store alone can make, and preparing the snapshot has made it.
        assert!(!plans.iter().any(WritePlan::needs_room));
        for plan in &mut plans {
            copy_and_seal(volume, plan);
        }
        volume.preserve(&mut plans).unwrap();
        assert!(!plans.iter().any(WritePlan::needs_prepare));
        for (plan, bytes) in plans.iter_mut().zip(&data) {
            move_and_seal(volume, plan, bytes);
        }
        volume.complete_writes(plans).unwrap();
        world.compare();
    }
}

#[test]
fn preserve_before_the_copies_landed_is_refused_and_gives_the_blocks_back() {
    let (mut world, _disk) = world();
    let method = Method::CopyOnWrite;
    let verdict = Verdict::Keep;
    world.apply(&Op::Snapshot { method, verdict });
    let volume = world.volume();
    let range = ByteRange::new(4096, 4096);
    let mut plans = [volume.plan_write(range, WriteKind::Write).unwrap()];
    assert!(matches!(
        volume.preserve(&mut plans),
        Err(StoreError::NotPrepared)
    ));
    // The failed plan is still there, and stands in nobody's way.
    drop(volume.plan_write(range, WriteKind::Write).unwrap());
    let [plan] = plans;
    assert!(matches!(
        volume.complete_write(plan),
        Err(StoreError::NotPrepared)
    ));
    world.compare();
}

/// A snapshot that was begun holds what was written before, whichever round makes it durable: here one that a
/// preserving write asked for, which has no interest in the base by itself.
#[test]
fn snapshot_that_was_begun_is_exact_in_whatever_round_it_becomes_durable() {
    let (mut world, disk) = world();
    let method = Method::CopyOnWrite;
    let verdict = Verdict::Keep;
    world.apply(&Op::Snapshot { method, verdict });
    // Twice: the second one goes in place, and no record speaks of it.
    for _ in 0..2 {
        world.apply(&Op::Write {
            sector: 8,
            count: 8,
        });
    }
    let new = new_snapshot(&mut world, method);
    let id = new.snapshot_id;
    world.volume().begin_snapshot(new).unwrap();
    let then = world.model.head.clone();
    // Preserved first, and so is durable the record that the snapshot was begun with.
    world.apply(&Op::Write {
        sector: 24,
        count: 8,
    });
    disk.record();
    let point = disk.take_points().pop().unwrap();
    let mut seen = 0;
    for image in point.power_cuts(20, 3) {
        let (volume, _) = Volume::open_files(memory_volume(image), &small_options(2)).unwrap();
        if volume.snapshots().iter().any(|s| s.snapshot_id == id) {
            expect(&then, &read_all(&volume, View::Snapshot(id)), "snapshot");
            seen += 1;
        }
    }
    assert!(
        seen > 0,
        "no image has the snapshot: the test proves nothing"
    );
}
