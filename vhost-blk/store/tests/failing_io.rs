//! The n-th read, write or sync of a history fails: the volume says so, refuses what it must, and after
//! reopening holds everything it acknowledged.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod harness;

use std::sync::Arc;

use harness::{
    Methods, Model, Op, World, history, memory_files, read_all, sector_value, small_options,
};
use vhost_blk_store::sim::{
    CrashDisk, FILES, FailingFile, Fault, FaultKind, Image, each_file, memory_volume, volume_files,
};
use vhost_blk_store::{BlockFile, ByteRange, StoreError, View, Volume, VolumeFiles, WriteKind};

const SECTORS: u64 = 67;

fn behind(files: &VolumeFiles, fault: &Arc<Fault>) -> VolumeFiles {
    let wrap = |file: &Arc<dyn BlockFile>| -> Arc<dyn BlockFile> {
        Arc::new(FailingFile::new(Arc::clone(file), Arc::clone(fault)))
    };
    let inner = each_file(files).map(wrap);
    volume_files(|place| Arc::clone(&inner[place]))
}

/// A volume that came into being before its disk went bad, and the disk.
fn world(fault: &Arc<Fault>) -> (World, CrashDisk) {
    let model = Model::new(SECTORS);
    let mut images = vec![model.bytes().into()];
    images.resize(FILES, Image::default());
    let disk = CrashDisk::new(images, 0);
    let files = volume_files(|place| disk.file(place));
    let world = World::new(files.clone(), small_options(1), model);
    let mut world = World {
        files: behind(&files, fault),
        volume: None,
        ..world
    };
    // Opening may be what fails; then it succeeds the second time, the fault strikes once.
    if world.reopen().is_err() {
        world.reopen().unwrap();
    }
    (world, disk)
}

/// Runs a history into the fault. What failed may have happened or not, in part. Answers how many operations
/// the fault counted.
fn run(kind: FaultKind, after: u64, seed: u64, methods: Methods) -> u64 {
    let fault = Fault::new(kind, after);
    let (mut world, disk) = world(&fault);
    let mut failed = false;
    for op in history(seed, methods, 90, SECTORS) {
        let before = world.model.clone();
        let Err(error) = world.try_apply(&op) else {
            continue;
        };
        assert!(fault.struck(), "{op:?}: {error:?} without a fault");
        assert!(!failed, "{op:?}: {error:?} after the fault was made good");
        failed = true;
        if world.volume.is_none() {
            // Closing or opening failed.
            world.reopen().unwrap();
        } else if poisoned(world.volume()) {
            refuses_everything(world.volume());
            world.volume = None;
            world.reopen().unwrap();
        }
        if world.open_plans.is_empty() {
            world.forget_flights().unwrap();
        }
        accept(&mut world, &before, &op);
        world.compare();
    }
    let counted = fault.counted();
    world.finish_all().unwrap();
    world.volume().flush().unwrap();
    world.model.flushed();
    world.compare();
    // Power cut: all that was acknowledged before the last flush is on the disk, the fault notwithstanding.
    disk.record();
    let point = disk.take_points().pop().unwrap();
    let files = memory_volume(point.power_cut(|_| false));
    let findings = vhost_blk_store::check(&files);
    assert!(findings.is_empty(), "{findings:?}");
    let options = small_options(2);
    let (volume, _) = Volume::open_files(files.clone(), &options).unwrap();
    let world = World {
        files,
        options,
        volume: Some(volume),
        open_plans: Vec::new(),
        model: world.model,
        members: world.members,
    };
    world.compare();
    counted
}

fn poisoned(volume: &Volume) -> bool {
    volume.status().poisoned
}

fn refuses_everything(volume: &Volume) {
    let range = ByteRange::new(0, 512);
    let refused = |result: Result<(), StoreError>| {
        assert!(
            matches!(result, Err(StoreError::Poisoned)),
            "{result:?} (I8)"
        );
    };
    refused(volume.flush());
    refused(volume.write_at(0, &[1; 512]));
    refused(volume.plan_write(range, WriteKind::Write).map(drop));
    refused(volume.maintain(1).map(drop));
    refused(volume.prepare_snapshot());
    read_all(volume, View::Head);
}

/// Takes over what the failed operation left, if it is one of the things it may leave.
fn accept(world: &mut World, before: &Model, op: &Op) {
    let volume = world.volume.as_ref().unwrap();
    let found: Vec<u64> = read_all(volume, View::Head)
        .into_iter()
        .enumerate()
        .map(|(sector, value)| value.unwrap_or_else(|| panic!("sector {sector} is torn")))
        .collect();
    let mut may_be = vec![before.head.len(), world.model.head.len()];
    if let Op::Grow { by, .. } = op {
        may_be.push(before.head.len() + usize::try_from(*by).unwrap());
    }
    let target = |id: &_| before.snapshots.iter().find(|taken| taken.id == *id);
    if let (Op::Revert { .. }, Some(last)) = (op, volume.snapshots().last())
        && let Some(target) = target(&last.snapshot_id)
    {
        may_be.push(target.sectors.len());
    }
    assert!(
        may_be.contains(&found.len()),
        "{op:?}: {} sectors",
        found.len()
    );
    let after = &world.model;
    let ids: Vec<_> = volume.snapshots().iter().map(|s| s.snapshot_id).collect();
    let mut known = after.snapshots.clone();
    known.extend(before.snapshots.iter().cloned());
    known.extend(after.last_taken.clone());
    let reverted = matches!(op, Op::Revert { .. })
        && ids
            .last()
            .and_then(|id| known.iter().find(|taken| taken.id == *id))
            .is_some_and(|target| target.sectors == found);
    for (sector, value) in found.iter().enumerate() {
        let (was, is) = (before.head.get(sector), after.head.get(sector));
        let possible = |model: &Model| model.possible.get(sector).cloned().unwrap_or_default();
        let written = possible(after).len() > possible(before).len();
        let allowed = was == Some(value)
            || is == Some(value)
            // A growth that was told to have failed, and was durable.
            || (matches!(op, Op::Grow { .. }) && was.is_none() && *value == 0)
            || before.flies(sector, *value)
            || (written && possible(after).contains(value));
        assert!(allowed || reverted, "{op:?}: sector {sector} holds {value}");
    }
    if ids.len() > before.snapshots.len() && known.iter().all(|taken| ids.last() != Some(&taken.id))
    {
        // The snapshot the operation was taking: of everything that was in flight before.
        assert!(matches!(op, Op::Snapshot { .. } | Op::BeginSnapshot { .. }));
        assert_eq!(ids.len(), before.snapshots.len() + 1);
        known.push(harness::Taken {
            id: ids[ids.len() - 1],
            sectors: after.head.clone(),
        });
    }
    let mut snapshots: Vec<harness::Taken> = ids
        .iter()
        .map(|id| known.iter().find(|t| t.id == *id).unwrap().clone())
        .collect();
    if let (Op::LeaveOut { sector, count }, Some(newest)) = (op, snapshots.last_mut()) {
        harness::note_left_out(volume, newest, *sector, *count).unwrap();
    }
    world.model.resize(found.len());
    for (sector, value) in found.into_iter().enumerate() {
        // A write that is still in flight may show: it is not the head's yet.
        if !world.model.flies(sector, value) {
            let old = std::mem::replace(&mut world.model.head[sector], value);
            world.model.possible[sector].push(old);
        }
    }
    world.model.snapshots = snapshots;
}

/// Every operation of the kind fails once.
fn every_operation(kind: FaultKind) {
    let mut tried = 0;
    let methods = [Methods::Redirect, Methods::Copy, Methods::Mixed];
    for (seed, methods) in (50..53).zip(methods) {
        let all = run(kind, u64::MAX / 2, seed, methods);
        for after in 0..all {
            let tale = harness::Tale(format!("{kind:?} {after} of {methods:?}, history {seed}"));
            run(kind, after, seed, methods);
            drop(tale);
        }
        tried += all;
    }
    assert!(
        tried > 100,
        "only {tried} operations: the test proves little"
    );
    println!("{kind:?}: {tried} faults, one at each operation");
}

#[test]
fn failed_sync_poisons_until_reopened() {
    every_operation(FaultKind::Sync);
}

#[test]
fn failed_write_loses_nothing_else() {
    every_operation(FaultKind::Write);
}

#[test]
fn short_write_loses_nothing_else() {
    every_operation(FaultKind::ShortWrite);
}

#[test]
fn full_disk_loses_nothing_else() {
    every_operation(FaultKind::WriteNoSpace);
}

#[test]
fn failed_read_loses_nothing() {
    every_operation(FaultKind::Read);
}

/// A sync fails and what it should have written is lost, though the page cache shows it: what was flushed before,
/// and snapshots that were durable before, must be whole after the next power cut all the same.
fn lose_a_sync(after: u64, seed: u64, methods: Methods) -> u64 {
    let (mut world, disk) = world(&Fault::new(FaultKind::Sync, u64::MAX / 2));
    disk.take_points();
    let before_history = disk.syncs();
    disk.fail_sync_after(after);
    let mut doubtful = vec![false; world.model.head.len()];
    let mut durable = Vec::new();
    let mut failed = false;
    for op in history(seed, methods, 90, SECTORS) {
        let before = world.model.clone();
        if world.try_apply(&op).is_ok() {
            continue;
        }
        assert!(!failed, "{op:?} fails again");
        failed = true;
        // The daemon ends, and comes back in the same boot.
        world.volume = None;
        world.reopen().unwrap();
        world.forget_flights().unwrap();
        accept(&mut world, &before, &op);
        world.compare();
        let model = &world.model;
        let known = before.snapshots.iter().map(|taken| taken.id);
        durable = known.filter(|id| !before.begun.contains(id)).collect();
        doubtful.resize(model.head.len().max(doubtful.len()), false);
        for (sector, doubtful) in doubtful.iter_mut().enumerate() {
            let changed = before.head.get(sector) != model.head.get(sector);
            let possible = |model: &Model| model.possible.get(sector).map_or(0, Vec::len);
            let pending = |model: &Model| possible(model) > 0;
            *doubtful = changed || pending(&before) || pending(model);
        }
    }
    let syncs = disk.syncs() - before_history;
    world.finish_all().unwrap();
    world.volume().flush().unwrap();
    disk.record();
    let point = disk.take_points().pop().unwrap();
    let files = memory_volume(point.power_cut(|_| false));
    let findings = vhost_blk_store::check(&files);
    assert!(findings.is_empty(), "{findings:?}");
    let (volume, _) = Volume::open_files(files, &small_options(2)).unwrap();
    let views = world
        .model
        .snapshots
        .iter()
        .map(|taken| (View::Snapshot(taken.id), &taken.sectors));
    for (view, sectors) in views.chain([(View::Head, &world.model.head)]) {
        let found = harness::try_read_all(&volume, view).unwrap();
        let strict = matches!(view, View::Snapshot(id) if durable.contains(&id));
        for (sector, found) in found.into_iter().enumerate() {
            let expected = Some(sectors[sector]);
            assert!(
                found == expected || (doubtful.get(sector) == Some(&true) && !strict),
                "{view:?}: sector {sector} holds {found:?} instead of {expected:?}"
            );
        }
    }
    syncs
}

#[test]
fn what_was_flushed_survives_a_sync_that_loses_its_writes() {
    let mut tried = 0;
    for (seed, methods) in (60..63).zip([Methods::Redirect, Methods::Copy, Methods::Mixed]) {
        let all = lose_a_sync(u64::MAX / 2, seed, methods);
        for after in 0..all {
            let tale = harness::Tale(format!("sync {after} of {methods:?}, history {seed}"));
            lose_a_sync(after, seed, methods);
            drop(tale);
        }
        tried += all;
    }
    println!("{tried} syncs that lost what they were for");
}

#[test]
fn failed_flush_is_an_error_and_the_next_one_too() {
    for methods in [Methods::Redirect, Methods::Copy] {
        let model = Model::new(SECTORS);
        let files = memory_files(model.bytes());
        drop(World::new(files.clone(), small_options(1), model));
        let fault = Fault::new(FaultKind::Sync, 100_000);
        let volume = {
            let (volume, _) =
                Volume::open_files(behind(&files, &fault), &small_options(1)).unwrap();
            volume
        };
        drop(volume);
        // The first sync after opening is the flush's: opening syncs a fixed number of times.
        for after in 0..20 {
            let fault = Fault::new(FaultKind::Sync, after);
            let Ok((volume, _)) = Volume::open_files(behind(&files, &fault), &small_options(1))
            else {
                continue;
            };
            if volume.write_at(0, &[9; 512]).is_err() {
                continue;
            }
            match volume.flush() {
                Ok(()) => {}
                Err(StoreError::Io { op, .. }) => {
                    assert_eq!(op, "sync");
                    assert!(matches!(volume.flush(), Err(StoreError::Poisoned)));
                    assert!(matches!(
                        volume.write_at(0, &[9; 512]),
                        Err(StoreError::Poisoned)
                    ));
                }
                Err(error) => panic!("{methods:?}: {error:?}"),
            }
        }
    }
}

#[test]
fn full_log_holds_the_write_until_there_is_room() {
    let model = Model::new(SECTORS);
    let mut options = small_options(1);
    options.log_limit_bytes = 4 * 4096;
    let mut world = World::new(memory_files(model.bytes()), options, model);
    world.apply(&Op::Snapshot {
        method: vhost_blk_store::Method::RedirectOnWrite,
        verdict: harness::Verdict::Keep,
    });
    let volume = world.volume();
    for block in 0..4 {
        volume.write_at(block * 4096, &[7; 4096]).unwrap();
    }
    assert!(matches!(
        volume.write_at(4 * 4096, &[7; 4096]),
        Err(StoreError::NoSpace)
    ));
    // Blocks that are in the log already go on.
    volume.write_at(0, &[8; 4096]).unwrap();
    volume.discard_at(ByteRange::new(0, 4096)).unwrap();
    let mut steps = 0;
    while volume.write_at(4 * 4096, &[7; 4096]).is_err() {
        volume.maintain(64).unwrap();
        steps += 1;
        assert!(steps < 100, "the discarded block never came back");
    }
    let mut sector = [0; 512];
    volume.read_at(View::Head, 4 * 4096, &mut sector).unwrap();
    assert_eq!(sector_value(&sector), Some(u64::from_le_bytes([7; 8])));
}

/// The opening scan of what was there before goes on beside the checkpoint that a failed revert leaves.
#[test]
fn revert_that_fails_takes_no_run_from_under_the_scan() {
    let model = Model::new(SECTORS);
    let mut world = World::new(memory_files(model.bytes()), small_options(1), model);
    world.apply(&Op::Snapshot {
        method: vhost_blk_store::Method::RedirectOnWrite,
        verdict: harness::Verdict::Keep,
    });
    world.apply(&Op::Write {
        sector: 0,
        count: 40,
    });
    world.volume.take().unwrap().close().unwrap();
    world.model.flushed();
    // No other file fails, and the first write to this one is the revert's.
    let fault = Fault::new(FaultKind::WriteNoSpace, 0);
    let index = Arc::clone(&world.files.index);
    world.files.index = Arc::new(FailingFile::new(index, Arc::clone(&fault)));
    world.reopen().unwrap();
    let volume = world.volume();
    assert!(volume.status().scanning && !fault.struck());
    let reverted = volume.revert(world.model.snapshots[0].id);
    assert!(matches!(reverted, Err(StoreError::NoSpace)), "{reverted:?}");
    // The checkpoint ends, and slots are written until none names what it merged; no step of the scan is taken meanwhile.
    volume.prepare_grow((SECTORS + 8) * 512).unwrap();
    assert!(volume.status().scanning);
    let mut steps = 0;
    while volume.maintain(8).unwrap() != vhost_blk_store::Maintenance::Idle {
        steps += 1;
        assert!(steps < 10_000, "maintenance does not end");
    }
    assert!(!volume.status().scanning && !poisoned(volume));
    world.compare();
    world.settle_everything(1);
}
