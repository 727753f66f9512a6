//! What happens between plan and complete: other writes, reads, deletions, settling, a snapshot, a sync.
//! Each interleaving is forced, not hoped for; the last test adds threads on top.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod harness;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock, Weak, mpsc};
use std::time::Duration;

use harness::{
    Model, Op, Verdict, World, expect, memory_files, read_all, sector_bytes, sector_value,
    small_options,
};
use vhost_blk_store::sim::{
    CrashDisk, FILES, FailingFile, Fault, FaultKind, Image, memory_volume, volume_files,
};
use vhost_blk_store::{
    BlockFile, ByteRange, DataFile, Extent, LeaveOut, Maintenance, Method, NewSnapshot,
    OpenOptions, Severity, SnapshotId, Source, StoreError, View, Volume, VolumeFiles, WriteKind,
    WritePlan, check,
};

const SECTORS: u64 = 80;
const BLOCK: u64 = 4096;

fn world() -> World {
    let model = Model::new(SECTORS);
    World::new(memory_files(model.bytes()), small_options(1), model)
}

fn snapshot(world: &mut World, method: Method) -> SnapshotId {
    world.apply(&Op::Snapshot {
        method,
        verdict: Verdict::Keep,
    });
    world.model.snapshots.last().unwrap().id
}

fn block(number: u64) -> ByteRange {
    ByteRange::new(number * BLOCK, BLOCK)
}

fn file_of<'a>(volume: &'a Volume, extent: &Extent) -> &'a Arc<dyn BlockFile> {
    match extent.source {
        Source::Base => volume.data_file(DataFile::Base),
        Source::Log => volume.data_file(DataFile::Log),
        Source::Zero => panic!("no file holds zeroes"),
    }
}

fn move_data(volume: &Volume, plan: &WritePlan, data: &[u8]) {
    let mut rest = data;
    for extent in plan.extents() {
        let (now, later) = rest.split_at(usize::try_from(extent.length_bytes).unwrap());
        file_of(volume, extent)
            .write_at(now, extent.offset_bytes)
            .unwrap();
        rest = later;
    }
}

fn maintain_to_idle(volume: &Volume) {
    let mut steps = 0;
    while volume.maintain(16).unwrap() != Maintenance::Idle {
        steps += 1;
        assert!(steps < 10_000, "maintenance does not end");
    }
}

#[test]
fn log_blocks_are_not_reused_while_a_read_of_them_is_planned() {
    let mut world = world();
    let first = snapshot(&mut world, Method::CopyOnWrite);
    world.apply(&Op::Write {
        sector: 0,
        count: 40,
    });
    let volume = world.volume();
    let plan = volume
        .plan_read(View::Snapshot(first), ByteRange::new(0, 5 * BLOCK))
        .unwrap();
    assert!(
        plan.extents()
            .iter()
            .all(|extent| extent.source == Source::Log)
    );
    volume.delete_snapshot(first).unwrap();
    maintain_to_idle(volume);
    // Everything that is written to the log now would like those blocks.
    world.model.snapshots.clear();
    snapshot(&mut world, Method::RedirectOnWrite);
    world.apply(&Op::Write {
        sector: 0,
        count: 80,
    });
    let volume = world.volume();
    let mut sector = 0;
    for extent in plan.extents() {
        let mut bytes = vec![0; usize::try_from(extent.length_bytes).unwrap()];
        file_of(volume, extent)
            .read_at(&mut bytes, extent.offset_bytes)
            .unwrap();
        for part in bytes.chunks_exact(512) {
            assert_eq!(sector_value(part), Some(1_000_000 + sector));
            sector += 1;
        }
    }
    assert_eq!(sector, 40);
    let pinned = volume.status().log_used_bytes;
    drop(plan);
    maintain_to_idle(volume);
    assert!(
        volume.status().log_used_bytes < pinned,
        "the space comes back with the pin"
    );
    world.compare();
}

#[test]
fn read_of_a_snapshot_that_was_overtaken_by_a_copy_is_noticed() {
    let mut world = world();
    let id = snapshot(&mut world, Method::CopyOnWrite);
    let volume = world.volume();
    let overtaken = volume.plan_read(View::Snapshot(id), block(2)).unwrap();
    let untouched = volume.plan_read(View::Snapshot(id), block(3)).unwrap();
    assert_eq!(overtaken.extents()[0].source, Source::Base);
    volume.write_at(2 * BLOCK, &[5; 4096]).unwrap();
    assert!(!volume.read_is_current(&overtaken).unwrap());
    assert!(volume.read_is_current(&untouched).unwrap());
    volume.delete_snapshot(id).unwrap();
    assert!(matches!(
        volume.read_is_current(&untouched),
        Err(StoreError::NoSuchSnapshot(_))
    ));
}

#[test]
fn second_write_to_a_block_on_the_move_has_to_wait() {
    for method in [Method::RedirectOnWrite, Method::CopyOnWrite] {
        let mut world = world();
        snapshot(&mut world, method);
        let volume = world.volume();
        let first = volume.plan_write(block(1), WriteKind::Write).unwrap();
        let half = ByteRange::new(BLOCK + 2048, 4096);
        assert!(matches!(
            volume.plan_write(half, WriteKind::Write),
            Err(StoreError::Overlaps)
        ));
        let used = volume.status().log_used_bytes;
        drop(volume.plan_write(block(2), WriteKind::Write).unwrap());
        assert_eq!(
            volume.status().log_used_bytes,
            used,
            "a dropped plan keeps nothing"
        );
        drop(first);
        assert_eq!(volume.status().log_used_bytes, 0);
        assert!(volume.plan_write(half, WriteKind::Write).is_ok());
        world.compare();
    }
}

#[test]
fn unprepared_write_is_refused() {
    let mut world = world();
    snapshot(&mut world, Method::CopyOnWrite);
    let volume = world.volume();
    let plan = volume.plan_write(block(1), WriteKind::Write).unwrap();
    assert!(plan.needs_prepare());
    assert!(matches!(
        volume.complete_write(plan),
        Err(StoreError::NotPrepared)
    ));
    world.compare();
}

#[test]
fn snapshot_and_revert_are_refused_while_a_write_is_in_flight() {
    let mut world = world();
    let id = snapshot(&mut world, Method::RedirectOnWrite);
    let volume = world.volume();
    let new = || NewSnapshot {
        snapshot_id: uuid::Uuid::from_u128(77).into(),
        set_id: uuid::Uuid::from_u128(78).into(),
        members: vec![volume.id()],
        method: Method::RedirectOnWrite,
        created_unix_ms: 0,
    };
    let plan = volume.plan_write(block(1), WriteKind::Write).unwrap();
    assert!(matches!(volume.take_snapshot(new()), Err(StoreError::Busy)));
    assert!(matches!(volume.revert(id), Err(StoreError::Busy)));
    drop(plan);
    // And being refused holds nobody up.
    volume.write_at(0, &sector_bytes(1_000_000)).unwrap();
    volume.take_snapshot(new()).unwrap();
    assert!(matches!(
        volume.take_snapshot(new()),
        Err(StoreError::SnapshotExists(_))
    ));
}

#[test]
fn a_set_that_is_kept_is_deleted_and_not_discarded() {
    let mut world = world();
    snapshot(&mut world, Method::RedirectOnWrite);
    let volume = world.volume();
    let taken = volume.snapshots().remove(0);
    for _ in 0..2 {
        let refused = volume.discard_set(taken.set_id);
        assert!(matches!(refused, Err(StoreError::SetKept(set)) if set == taken.set_id));
        assert_eq!(volume.snapshots(), std::slice::from_ref(&taken));
    }
    world.compare();
    world.apply(&Op::KillReopen);
    world.compare();
    world.apply(&Op::Delete { which: 0 });
    let volume = world.volume();
    assert!(volume.snapshots().is_empty());
    volume.discard_set(taken.set_id).unwrap();
}

#[test]
fn settling_never_overtakes_a_write() {
    // A write of a redirected block is planned after `before` steps of settling it, and lands `between`
    // steps later.
    for before in 0..14 {
        for between in 0..14 {
            let mut world = world();
            snapshot(&mut world, Method::RedirectOnWrite);
            world.apply(&Op::Write {
                sector: 0,
                count: 48,
            });
            world.apply(&Op::Delete { which: 0 });
            let volume = world.volume();
            let steps = |count| {
                for _ in 0..count {
                    volume.maintain(2).unwrap();
                }
            };
            steps(before);
            let data: Vec<u8> = (500..508).flat_map(sector_bytes).collect();
            let plan = volume.plan_write(block(3), WriteKind::Write).unwrap();
            steps(between);
            move_data(volume, &plan, &data);
            steps(2);
            volume.complete_write(plan).unwrap();
            for sector in 0..8 {
                world.model.head[24 + sector] = 500 + sector as u64;
            }
            world.compare();
            maintain_to_idle(world.volume());
            world.compare();
            assert!(world.volume().is_plain());
        }
    }
}

#[test]
fn flush_syncs_what_is_dirty_and_nothing_else() {
    let mut world = world();
    let syncs = |world: &World| {
        let syncs = world.volume().status().syncs;
        (syncs.base, syncs.log)
    };
    let cost = |world: &mut World, op: Option<Op>| {
        if let Some(op) = op {
            world.apply(&op);
        }
        let (base, log) = syncs(world);
        world.volume().flush().unwrap();
        let after = syncs(world);
        (after.0 - base, after.1 - log)
    };
    let write = || {
        Some(Op::Write {
            sector: 0,
            count: 8,
        })
    };
    assert_eq!(cost(&mut world, None), (0, 0));
    assert_eq!(cost(&mut world, write()), (1, 0));
    snapshot(&mut world, Method::RedirectOnWrite);
    assert_eq!(cost(&mut world, None), (0, 0));
    for _ in 0..5 {
        assert_eq!(cost(&mut world, write()), (0, 1), "data and record in one");
    }
    assert_eq!(cost(&mut world, None), (0, 0));
    let part = Some(Op::Write {
        sector: 25,
        count: 1,
    });
    assert_eq!(cost(&mut world, part.clone()), (0, 2), "not sealed");
    assert_eq!(cost(&mut world, part), (0, 1), "no new mapping");
    snapshot(&mut world, Method::CopyOnWrite);
    // The block lives in the log: it was preserved before the write, and is overwritten there.
    assert_eq!(
        cost(&mut world, write()),
        (0, 1),
        "the copy was committed before"
    );
    let other = Some(Op::Write {
        sector: 48,
        count: 8,
    });
    let before = syncs(&world).1;
    assert_eq!(cost(&mut world, other), (1, 0));
    assert_eq!(syncs(&world).1, before + 1, "copy and record in one");
}

#[test]
fn whole_block_redirects_read_nothing() {
    let mut world = world();
    snapshot(&mut world, Method::RedirectOnWrite);
    world.volume = None;
    // Opening reads neither base nor log, so the first read of either is the write's.
    let fault = Fault::new(FaultKind::Read, 0);
    let wrap =
        |file| -> Arc<dyn BlockFile> { Arc::new(FailingFile::new(file, Arc::clone(&fault))) };
    let files = world.files.clone();
    world.files.base = wrap(files.base);
    world.files.log = wrap(files.log);
    world.reopen().unwrap();
    world.volume().write_at(0, &[1; 8192]).unwrap();
    assert!(!fault.struck(), "a redirect read the old data");
    // A part of a block needs the rest of it.
    assert!(world.volume().write_at(4 * BLOCK, &[1; 512]).is_err());
    assert!(fault.struck());
}

/// A file that calls somebody back in the middle of a sync, before anything is durable.
struct Interrupted {
    file: Arc<dyn BlockFile>,
    during_sync: Arc<OnceLock<Box<dyn Fn() + Send + Sync>>>,
}

impl std::fmt::Debug for Interrupted {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.file.fmt(out)
    }
}

impl BlockFile for Interrupted {
    fn len_bytes(&self) -> io::Result<u64> {
        self.file.len_bytes()
    }
    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.file.read_at(buffer, offset_bytes)
    }
    fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.file.write_at(bytes, offset_bytes)
    }
    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
        self.file.write_zeroes(offset, length, may_unmap)
    }
    fn allocate(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        self.file.allocate(offset_bytes, length_bytes)
    }
    fn release(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        self.file.release(offset_bytes, length_bytes)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()?;
        // What is written from here on is behind this sync, although it has not returned.
        if let Some(interrupt) = self.during_sync.get() {
            interrupt();
        }
        Ok(())
    }
}

type Hook = Arc<OnceLock<Box<dyn Fn() + Send + Sync>>>;

/// A new volume; the hook is called in the middle of each sync of its log, once it is set.
fn interrupted() -> (CrashDisk, Hook, World) {
    interrupted_in(|files| &mut files.log)
}

fn interrupted_in(
    which: impl Fn(&mut VolumeFiles) -> &mut Arc<dyn BlockFile>,
) -> (CrashDisk, Hook, World) {
    let model = Model::new(SECTORS);
    let mut images = vec![model.bytes().into()];
    images.resize(FILES, Image::default());
    let disk = CrashDisk::new(images, 1);
    let hook = Hook::default();
    let mut files = volume_files(|place| disk.file(place));
    let file = which(&mut files);
    *file = Arc::new(Interrupted {
        file: Arc::clone(file),
        during_sync: Arc::clone(&hook),
    });
    let world = World::new(files, small_options(1), model);
    (disk, hook, world)
}

#[test]
fn blocks_preserved_ahead_are_written_once_they_are_durable_and_not_before() {
    let (disk, hook, mut world) = interrupted();
    let first = snapshot(&mut world, Method::CopyOnWrite);
    let volume = Arc::new(world.volume.take().unwrap());
    volume.write_at(0, &value_bytes(7)).unwrap();
    let mut ahead = [volume.plan_write(block(3), WriteKind::Write).unwrap()];
    assert!(ahead[0].needs_preserve());

    let (weak, refused) = (Arc::downgrade(&volume), Arc::new(AtomicU64::new(0)));
    let counted = Arc::clone(&refused);
    let interrupt = move || {
        for number in [3, 5] {
            let plan = weak
                .upgrade()
                .unwrap()
                .plan_write(block(number), WriteKind::Write);
            assert!(matches!(plan, Err(StoreError::Overlaps)), "{number}");
            counted.fetch_add(1, Ordering::SeqCst);
        }
    };
    assert!(hook.set(Box::new(interrupt)).is_ok());
    disk.take_points();
    volume.prepare_writes(&mut ahead).unwrap();
    assert_eq!(refused.load(Ordering::SeqCst), 2, "one sync");
    // The write itself is still under way.
    volume.write_at(5 * BLOCK, &value_bytes(50)).unwrap();
    volume.write_at(3 * BLOCK, &value_bytes(30)).unwrap();
    disk.record();
    let mut images_tried = 0;
    for point in disk.take_points() {
        for image in point.power_cuts(40, 5) {
            let (volume, _) = Volume::open_files(memory_volume(image), &small_options(2)).unwrap();
            let old = read_all(&volume, View::Snapshot(first));
            for (sector, value) in (1_000_000..).zip(old) {
                assert_eq!(value, Some(sector), "what the snapshot sees");
            }
            images_tried += 1;
        }
    }
    assert!(images_tried > 20, "{images_tried}");
    drop(ahead);
    let head = read_all(&volume, View::Head);
    assert_eq!(head[24..32], [Some(30); 8]);
    assert_eq!(head[32], Some(1_000_032));
    assert_eq!(head[40..48], [Some(50); 8]);
}

#[test]
fn deletion_that_is_not_durable_yet_lets_nothing_be_overwritten() {
    for method in [Method::RedirectOnWrite, Method::CopyOnWrite] {
        let (_disk, hook, mut world) = interrupted();
        let only = snapshot(&mut world, method);
        let volume = Arc::new(world.volume.take().unwrap());
        let is_spared = move |volume: &Volume| {
            let plan = volume.plan_write(block(3), WriteKind::Write).unwrap();
            let in_log = plan.extents().iter().all(|one| one.source == Source::Log);
            in_log || plan.needs_preserve()
        };
        assert!(is_spared(&volume));
        let (weak, syncs) = (Arc::downgrade(&volume), Arc::new(AtomicU64::new(0)));
        let counted = Arc::clone(&syncs);
        let interrupt = move || {
            assert!(is_spared(&weak.upgrade().unwrap()), "{method:?}");
            counted.fetch_add(1, Ordering::SeqCst);
        };
        assert!(hook.set(Box::new(interrupt)).is_ok());
        volume.delete_snapshot(only).unwrap();
        assert!(syncs.load(Ordering::SeqCst) > 0);
        assert!(!is_spared(&volume), "nobody sees it any more");
    }
}

/// The revert's new epoch would not know of it.
#[test]
fn nothing_is_left_out_in_the_middle_of_a_revert() {
    let (_disk, hook, mut world) = interrupted_in(|files| &mut files.index);
    let only = snapshot(&mut world, Method::RedirectOnWrite);
    // The first time a slot is written; the step that the revert meets has nothing to do but its records.
    let first = Op::LeaveOut {
        sector: 0,
        count: 8,
    };
    world.apply(&first);
    world.apply(&Op::Write {
        sector: 8,
        count: 8,
    });
    let mut expected = world.model.snapshots[0].sectors.clone();
    let volume = Arc::new(world.volume.take().unwrap());
    let weak = Arc::downgrade(&volume);
    let (answer, answered) = mpsc::channel();
    let (answer, answered) = (Mutex::new(Some(answer)), Arc::new(Mutex::new(answered)));
    let early = Arc::clone(&answered);
    let interrupt = move || {
        let Some(answer) = answer.lock().unwrap().take() else {
            return;
        };
        let volume = weak.upgrade().unwrap();
        std::thread::spawn(move || {
            let mut wanted = LeaveOut::new(&[ByteRange::new(2 * BLOCK, 3 * BLOCK)]);
            while volume.leave_out(only, &mut wanted).unwrap() {}
            drop(volume);
            answer.send(wanted.left_out_bytes()).unwrap();
        });
        let early = early.lock().unwrap();
        let early = early.recv_timeout(Duration::from_millis(100));
        assert!(early.is_err(), "{early:?}");
    };
    assert!(hook.set(Box::new(interrupt)).is_ok());
    volume.revert(only).unwrap();
    let left_out_bytes = answered.lock().unwrap().recv().unwrap();
    assert_eq!(left_out_bytes, 3 * BLOCK);
    drop(volume);
    // What came behind the revert is of the new epoch, also for who replays it.
    world.reopen().unwrap();
    let head = read_all(world.volume(), View::Head);
    expect(&expected, &head, "head");
    expected[16..40].fill(0);
    let seen = read_all(world.volume(), View::Snapshot(only));
    expect(&expected, &seen, "snapshot");
    world.volume = None;
    assert_eq!(check(&world.files), []);
}

#[test]
fn write_that_completes_during_a_flush_is_not_committed_by_it() {
    let (disk, hook, mut world) = interrupted();
    snapshot(&mut world, Method::RedirectOnWrite);
    let volume = Arc::new(world.volume.take().unwrap());
    let weak: Weak<Volume> = Arc::downgrade(&volume);
    let done = AtomicBool::new(false);
    let interrupt = move || {
        if !done.swap(true, Ordering::SeqCst) {
            weak.upgrade()
                .unwrap()
                .write_at(2 * BLOCK, &value_bytes(222))
                .unwrap();
        }
    };
    assert!(hook.set(Box::new(interrupt)).is_ok());
    volume.write_at(BLOCK, &value_bytes(111)).unwrap();
    disk.take_points();
    volume.flush().unwrap();
    disk.set_marker(1);
    disk.record();
    let points = disk.take_points();
    let mut images_tried = 0;
    for point in points {
        for image in point.power_cuts(40, 5) {
            let files = memory_volume(image);
            assert!(check(&files).iter().all(|f| f.severity != Severity::Damage));
            let (volume, _) = Volume::open_files(files, &small_options(2)).unwrap();
            let head = read_all(&volume, View::Head);
            for (sector, value) in head.iter().enumerate() {
                let old = 1_000_000 + sector as u64;
                let allowed: &[u64] = match sector / 8 {
                    1 if point.marker == 1 => &[111],
                    1 => &[old, 111],
                    2 => &[old, 222],
                    _ => &[old],
                };
                let value = value.unwrap();
                assert!(allowed.contains(&value), "sector {sector} holds {value}");
            }
            images_tried += 1;
        }
    }
    println!("{images_tried} images");
}

fn value_bytes(value: u64) -> Vec<u8> {
    sector_bytes(value).repeat(8)
}

#[test]
fn threads_write_flush_snapshot_read_and_maintain_together() {
    const WRITERS: u64 = 3;
    const BLOCKS: u64 = 48;
    const ENOUGH: u64 = 16;
    let files = memory_files(vec![0; usize::try_from(BLOCKS * BLOCK).unwrap()]);
    let options = OpenOptions {
        memtable_records: 200,
        journal_bytes: 200 * 64,
        ..small_options(1)
    };
    let (volume, _) = Volume::open_files(files.clone(), &options).unwrap();
    // The daemon's duty: writers hold it shared, a snapshot alone.
    let gate = RwLock::new(());
    let head: Vec<Mutex<u64>> = (0..BLOCKS).map(|_| Mutex::new(0)).collect();
    let taken: Mutex<Vec<(SnapshotId, Vec<u64>)>> = Mutex::default();
    let (finished, snapshots) = (AtomicU64::new(0), AtomicU64::new(0));
    let snapshots_end = AtomicU64::new(0);
    // However rarely the machine lets the thread of the snapshots run.
    let enough = || {
        let of = |count: &AtomicU64| count.load(Ordering::SeqCst);
        of(&snapshots) >= ENOUGH || of(&snapshots_end) > 0
    };
    let done = || finished.load(Ordering::SeqCst) == WRITERS;
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (volume, gate, head, finished) = (&volume, &gate, &head, &finished);
            let enough = &enough;
            scope.spawn(move || {
                let _finished = CountOnDrop(finished);
                for round in (0_u64..).take_while(|round| *round < 20_000 || !enough()) {
                    let place = (round * 7 + writer * 13) % BLOCKS;
                    let _shared = gate.read().unwrap();
                    let mut current = head[usize::try_from(place).unwrap()].lock().unwrap();
                    let value = round * WRITERS + writer + 1;
                    let mut tried = volume.write_at(place * BLOCK, &value_bytes(value));
                    while matches!(tried, Err(StoreError::Overlaps)) {
                        // Another writer preserves it ahead.
                        std::thread::yield_now();
                        tried = volume.write_at(place * BLOCK, &value_bytes(value));
                    }
                    tried.unwrap();
                    *current = value;
                    drop(current);
                    if round % 16 == writer {
                        volume.flush().unwrap();
                    }
                }
            });
        }
        scope.spawn(|| {
            let _snapshots_end = CountOnDrop(&snapshots_end);
            let mut number = 0_u128;
            while !done() {
                number += 1;
                let id = SnapshotId(uuid::Uuid::from_u128(number));
                let method = if number.is_multiple_of(2) {
                    Method::RedirectOnWrite
                } else {
                    Method::CopyOnWrite
                };
                volume.prepare_snapshot().unwrap();
                let alone = gate.write().unwrap();
                let new = NewSnapshot {
                    snapshot_id: id,
                    set_id: uuid::Uuid::from_u128(number << 64).into(),
                    members: vec![volume.id()],
                    method,
                    created_unix_ms: 0,
                };
                volume.take_snapshot(new).unwrap();
                snapshots.fetch_add(1, Ordering::SeqCst);
                let values = head.iter().map(|value| *value.lock().unwrap());
                taken.lock().unwrap().push((id, values.collect()));
                drop(alone);
                let mut taken = taken.lock().unwrap();
                if taken.len() > 4 {
                    let (id, _) = taken.remove(usize::try_from(number % 4).unwrap());
                    volume.delete_snapshot(id).unwrap();
                }
            }
        });
        scope.spawn(|| {
            while !done() {
                volume.maintain(32).unwrap();
                std::thread::yield_now();
            }
        });
        scope.spawn(|| {
            while !done() {
                let taken = taken.lock().unwrap();
                for (id, values) in &*taken {
                    expect_blocks(values, &read_all(&volume, View::Snapshot(*id)));
                }
            }
        });
    });
    let values: Vec<u64> = head.iter().map(|value| *value.lock().unwrap()).collect();
    expect_blocks(&values, &read_all(&volume, View::Head));
    for (id, values) in &*taken.lock().unwrap() {
        expect_blocks(values, &read_all(&volume, View::Snapshot(*id)));
    }
    let snapshots = snapshots.into_inner();
    println!("{snapshots} snapshots under load");
    assert!(snapshots >= ENOUGH);
    volume.close().unwrap();
    assert_eq!(check(&files), []);
    let (volume, _) = Volume::open_files(files, &options).unwrap();
    expect_blocks(&values, &read_all(&volume, View::Head));
}

fn expect_blocks(values: &[u64], found: &[Option<u64>]) {
    let sectors: Vec<u64> = values.iter().flat_map(|value| [*value; 8]).collect();
    expect(&sectors, found, "blocks");
}

/// Counts a thread's end, be it a panic: the others must not wait for it for ever.
struct CountOnDrop<'a>(&'a AtomicU64);

impl Drop for CountOnDrop<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}
