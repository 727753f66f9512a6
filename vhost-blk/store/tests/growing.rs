//! A volume that grows while it is open: what is refused, what real files show, what the new part costs.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod harness;

use harness::{Model, Op, Verdict, World, memory_files, small_options};
use std::sync::atomic::{AtomicBool, Ordering};
use vhost_blk_store::sim::{MemoryFile, SUPERBLOCK, contents, memory_volume};
use vhost_blk_store::{Method, OpenOptions, StoreError, View, Volume, check, dump};

const SECTORS: u64 = 83;
/// Where a slot says which features it needs (FORMAT.md, `slot`).
const FEATURES: usize = 24;

fn world() -> World {
    let model = Model::new(SECTORS);
    World::new(memory_files(model.bytes()), small_options(1), model)
}

fn snapshot(method: Method) -> Op {
    Op::Snapshot {
        method,
        verdict: Verdict::Keep,
    }
}

fn grow(by: u64) -> Op {
    Op::Grow { by, prepared: true }
}

/// The features of both slots of a superblock.
fn features(world: &World) -> [u8; 2] {
    let bytes = contents(&world.files).unwrap()[SUPERBLOCK].to_bytes();
    [bytes[FEATURES], bytes[4096 + FEATURES]]
}

#[test]
fn sizes_that_cannot_be_are_refused_and_change_nothing() {
    let mut world = world();
    world.apply(&snapshot(Method::RedirectOnWrite));
    let before = contents(&world.files).unwrap();
    for wanted_bytes in [0, 512, 82 * 512, 83 * 512 + 1, (1 << 62) + 512, u64::MAX] {
        let volume = world.volume();
        for refused in [volume.grow(wanted_bytes), volume.prepare_grow(wanted_bytes)] {
            let Err(StoreError::BadSize { .. }) = refused else {
                panic!("{wanted_bytes}: {refused:?}");
            };
        }
    }
    // The size that it has is no growth, and no error.
    world.volume().grow(SECTORS * 512).unwrap();
    assert!(contents(&world.files).unwrap() == before);
    world.compare();
}

#[test]
fn growth_waits_for_writes_in_flight_as_a_snapshot_does() {
    let world = world();
    let volume = world.volume();
    let range = vhost_blk_store::ByteRange::new(0, 512);
    let plan = volume.plan_write(range, vhost_blk_store::WriteKind::Write);
    volume.prepare_grow(100 * 512).unwrap();
    assert!(matches!(volume.grow(100 * 512), Err(StoreError::Busy)));
    assert_eq!(volume.size_bytes(), SECTORS * 512);
    drop(plan);
    volume.grow(100 * 512).unwrap();
    assert_eq!(volume.size_bytes(), 100 * 512);
}

#[test]
fn what_no_snapshot_sees_is_written_in_place() {
    for method in [Method::RedirectOnWrite, Method::CopyOnWrite] {
        let mut world = world();
        world.apply(&snapshot(method));
        world.apply(&grow(80));
        // The last block that the snapshot sees a part of, and no further.
        let end = SECTORS.next_multiple_of(8);
        for sector in end..SECTORS + 80 {
            world.apply(&Op::Write { sector, count: 1 });
        }
        assert_eq!(world.volume().status().index_records, 0, "{method:?}");
        assert_eq!(world.volume().status().log_used_bytes, 0, "{method:?}");
        world.apply(&Op::Write {
            sector: end - 1,
            count: 1,
        });
        assert!(world.volume().status().log_used_bytes > 0, "{method:?}");
        world.compare();
    }
}

#[test]
fn programs_that_know_no_growth_are_kept_away_while_a_snapshot_is_smaller() {
    let mut world = world();
    world.apply(&grow(8));
    world.apply(&snapshot(Method::CopyOnWrite));
    world.apply(&Op::CloseReopen);
    assert_eq!(features(&world), [0, 0], "everything has one size");
    world.apply(&grow(8));
    assert!(features(&world).contains(&1));
    world.apply(&Op::CloseReopen);
    world.compare();
    assert_eq!(features(&world), [1, 1]);
    // A snapshot of the whole does not change that.
    world.apply(&snapshot(Method::CopyOnWrite));
    world.apply(&Op::Delete { which: 0 });
    world.settle_everything(0);
    world.apply(&grow(8));
    world.apply(&Op::CloseReopen);
    assert_eq!(features(&world), [0, 0], "the small snapshot is gone");
}

#[test]
fn base_of_a_growth_that_was_only_begun_is_cut_off_again() {
    for snapshots in [false, true] {
        let mut world = world();
        if snapshots {
            world.apply(&snapshot(Method::RedirectOnWrite));
        }
        world.apply(&Op::PrepareGrow { by: 20 });
        let length = |world: &World| world.files.base.len_bytes().unwrap() / 512;
        assert_eq!(length(&world), SECTORS + 20);
        assert_eq!(check(&world.files), []);
        assert_eq!(
            dump(&world.files).unwrap().superblock.base_bytes,
            (SECTORS + 20) * 512
        );
        world.apply(&Op::KillReopen);
        assert_eq!(length(&world), SECTORS, "snapshots: {snapshots}");
        world.compare();
        world.apply(&Op::PrepareGrow { by: 20 });
        world.apply(&Op::CloseReopen);
        assert_eq!(length(&world), SECTORS, "snapshots: {snapshots}");
        world.compare();
    }
}

#[test]
fn base_that_somebody_else_made_longer_is_refused_and_left_as_it_is() {
    let mut world = world();
    world.apply(&snapshot(Method::RedirectOnWrite));
    world.apply(&Op::PrepareGrow { by: 20 });
    world.volume = None;
    let mut images = contents(&world.files).unwrap();
    images[0].set_len((SECTORS + 21) * 512);
    let files = memory_volume(images);
    let opened = Volume::open_files(files.clone(), &small_options(1));
    assert!(matches!(opened, Err(StoreError::BaseChanged { .. })));
    assert_eq!(files.base.len_bytes().unwrap(), (SECTORS + 21) * 512);
}

/// A block device: its length is its owner's.
#[derive(Debug)]
struct Device(MemoryFile);

impl vhost_blk_store::BlockFile for Device {
    fn len_bytes(&self) -> std::io::Result<u64> {
        self.0.len_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> std::io::Result<()> {
        self.0.read_at(buffer, offset_bytes)
    }
    fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> std::io::Result<()> {
        self.0.write_at(bytes, offset_bytes)
    }
    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> std::io::Result<()> {
        self.0.write_zeroes(offset, length, may_unmap)
    }
    fn allocate(&self, _: u64, _: u64) -> std::io::Result<()> {
        panic!("a device has all its space")
    }
    fn release(&self, _: u64, _: u64) -> std::io::Result<()> {
        panic!("a device keeps its space")
    }
    fn sync_data(&self) -> std::io::Result<()> {
        self.0.sync_data()
    }
    fn set_len(&self, _: u64) -> std::io::Result<()> {
        panic!("a device has the length it has")
    }
    fn is_device(&self) -> bool {
        true
    }
}

#[test]
fn volume_on_a_device_grows_as_far_as_the_device_has_grown() {
    let model = Model::new(SECTORS);
    let mut files = memory_files(Vec::new());
    let device = std::sync::Arc::new(Device(MemoryFile::new(model.bytes())));
    files.base = device.clone();
    let mut world = World::new(files, small_options(1), model);
    world.apply(&snapshot(Method::CopyOnWrite));
    let refused = world.volume().grow((SECTORS + 40) * 512);
    assert!(matches!(refused, Err(StoreError::BadSize { .. })));
    world.compare();
    // Its owner enlarges it; nothing happens before somebody says so, a restart included.
    let zeroes = vec![0; 60 * 512];
    vhost_blk_store::BlockFile::write_at(&device.0, &zeroes, SECTORS * 512).unwrap();
    assert_eq!(check(&world.files), []);
    world.apply(&Op::CloseReopen);
    world.compare();
    world.apply(&grow(40));
    world.apply(&Op::KillReopen);
    world.compare();
    // The snapshot's size is nothing that the device is cut to.
    world.apply(&Op::Revert { which: 0 });
    world.apply(&Op::CloseReopen);
    world.compare();
}

#[test]
fn real_file_grows_and_comes_back_with_its_snapshots() {
    let directory = tempfile::tempdir().unwrap();
    let (base, shadow) = (
        directory.path().join("base"),
        directory.path().join("shadow"),
    );
    std::fs::write(&base, Model::new(SECTORS).bytes()).unwrap();
    let length = || std::fs::metadata(&base).unwrap().len();
    for direct in [false, true] {
        let options = OpenOptions {
            direct,
            volume_id: None,
            ..small_options(1)
        };
        let open = || Volume::adopt(&base, &shadow, &options).unwrap().0;
        let volume = open();
        let old_bytes = volume.size_bytes();
        let id = uuid::Uuid::from_u128(old_bytes.into());
        volume
            .take_snapshot(vhost_blk_store::NewSnapshot {
                snapshot_id: id.into(),
                set_id: id.into(),
                members: vec![volume.id()],
                method: Method::RedirectOnWrite,
                created_unix_ms: 1,
            })
            .unwrap();
        volume.keep_set(id.into()).unwrap();
        let mut before = vec![0; usize::try_from(old_bytes).unwrap()];
        volume.read_at(View::Head, 0, &mut before).unwrap();
        volume.grow(old_bytes + 21 * 512).unwrap();
        assert_eq!(length(), old_bytes + 21 * 512);
        volume.write_at(old_bytes - 512, &[7; 3 * 512]).unwrap();
        volume.flush().unwrap();
        // Killed.
        drop(volume);
        let volume = open();
        assert_eq!(volume.size_bytes(), old_bytes + 21 * 512);
        let mut tail = vec![0; 22 * 512];
        volume
            .read_at(View::Head, old_bytes - 512, &mut tail)
            .unwrap();
        assert!(tail[..3 * 512].iter().all(|byte| *byte == 7));
        assert!(tail[3 * 512..].iter().all(|byte| *byte == 0));
        let view = View::Snapshot(id.into());
        let mut then = vec![0; before.len()];
        volume.read_at(view, 0, &mut then).unwrap();
        assert!(then == before, "direct: {direct}");
        let behind = volume.read_at(view, old_bytes, &mut [0; 512]);
        assert!(matches!(behind, Err(StoreError::OutOfRange { .. })));
        if direct {
            volume.revert(id.into()).unwrap();
            assert_eq!((volume.size_bytes(), length()), (old_bytes, old_bytes));
        }
        volume.close().unwrap();
    }
}

#[test]
fn plain_volume_whose_base_was_made_shorter_forgets_the_sizes_of_dropped_snapshots() {
    for ends_in_order in [false, true] {
        let mut world = world();
        world.apply(&snapshot(Method::RedirectOnWrite));
        world.apply(&grow(80));
        world.apply(&Op::Delete { which: 0 });
        if ends_in_order {
            world.volume().close().unwrap();
        }
        world.volume = None;
        let mut images = contents(&world.files).unwrap();
        images[0].set_len(40 * 512);
        let files = memory_volume(images);
        for _ in 0..3 {
            let (volume, _) = Volume::open_files(files.clone(), &small_options(1)).unwrap();
            assert_eq!(volume.size_bytes(), 40 * 512);
            if ends_in_order {
                volume.close().unwrap();
            }
        }
        assert_eq!(check(&files), []);
    }
}

/// A file that cannot be cut off while `stubborn`.
#[derive(Debug)]
struct Uncut {
    file: MemoryFile,
    stubborn: AtomicBool,
}

impl vhost_blk_store::BlockFile for Uncut {
    fn len_bytes(&self) -> std::io::Result<u64> {
        self.file.len_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> std::io::Result<()> {
        self.file.read_at(buffer, offset_bytes)
    }
    fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> std::io::Result<()> {
        self.file.write_at(bytes, offset_bytes)
    }
    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> std::io::Result<()> {
        self.file.write_zeroes(offset, length, may_unmap)
    }
    fn allocate(&self, offset: u64, length: u64) -> std::io::Result<()> {
        self.file.allocate(offset, length)
    }
    fn release(&self, offset: u64, length: u64) -> std::io::Result<()> {
        self.file.release(offset, length)
    }
    fn sync_data(&self) -> std::io::Result<()> {
        self.file.sync_data()
    }
    fn set_len(&self, length_bytes: u64) -> std::io::Result<()> {
        if self.stubborn.load(Ordering::SeqCst) {
            return Err(std::io::Error::other("not now"));
        }
        self.file.set_len(length_bytes)
    }
}

#[test]
fn volume_that_grows_back_over_a_base_that_was_not_cut_off_reads_zeroes_there() {
    let model = Model::new(SECTORS);
    let mut files = memory_files(Vec::new());
    let base = std::sync::Arc::new(Uncut {
        file: MemoryFile::new(model.bytes()),
        stubborn: AtomicBool::new(false),
    });
    files.base = base.clone();
    let mut world = World::new(files, small_options(1), model);
    world.apply(&snapshot(Method::RedirectOnWrite));
    world.apply(&grow(80));
    world.apply(&Op::Write {
        sector: SECTORS + 20,
        count: 8,
    });
    base.stubborn.store(true, Ordering::SeqCst);
    world.apply(&Op::Revert { which: 0 });
    assert_eq!(world.files.base.len_bytes().unwrap(), (SECTORS + 80) * 512);
    base.stubborn.store(false, Ordering::SeqCst);
    world.apply(&grow(80));
    world.compare();
}
