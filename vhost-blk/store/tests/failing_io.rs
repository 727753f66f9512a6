//! The n-th read, write or sync of a history fails: the volume says so, refuses what it must, and after
//! reopening holds everything it acknowledged.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod harness;

use std::sync::Arc;

use harness::{
    Methods, Model, Op, World, history, memory_files, read_all, sector_value, small_options,
};
use vhost_blk_store::sim::{FailingFile, Fault, FaultKind, each_file, volume_files};
use vhost_blk_store::{BlockFile, ByteRange, StoreError, View, Volume, VolumeFiles, WriteKind};

const SECTORS: u64 = 67;

fn behind(files: &VolumeFiles, fault: &Arc<Fault>) -> VolumeFiles {
    let wrap = |file: &Arc<dyn BlockFile>| -> Arc<dyn BlockFile> {
        Arc::new(FailingFile::new(Arc::clone(file), Arc::clone(fault)))
    };
    let inner = each_file(files).map(wrap);
    volume_files(|place| Arc::clone(&inner[place]))
}

/// A volume that came into being before its disk went bad.
fn world(fault: &Arc<Fault>) -> (World, VolumeFiles) {
    let model = Model::new(SECTORS);
    let files = memory_files(model.bytes());
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
    (world, files)
}

/// Runs a history into the fault. What failed may have happened or not, in part.
fn run(kind: FaultKind, after: u64, seed: u64, methods: Methods) -> bool {
    let fault = Fault::new(kind, after);
    let (mut world, files) = world(&fault);
    let struck_early = fault.struck();
    for op in history(seed, methods, 60, SECTORS) {
        let before = world.model.clone();
        let Err(error) = world.try_apply(&op) else {
            continue;
        };
        assert!(fault.struck(), "{op:?}: {error:?} without a fault");
        if world.volume.is_none() {
            // Closing or opening failed.
            world.reopen().unwrap();
        } else if poisoned(world.volume()) {
            refuses_everything(world.volume());
            world.volume = None;
            world.reopen().unwrap();
        }
        accept(&mut world, &before, &op);
        world.compare();
        for op in history(seed + 1, methods, 20, SECTORS) {
            world.apply(&op);
            world.compare();
        }
        let findings = vhost_blk_store::check(&files);
        assert!(findings.is_empty(), "{findings:?}");
        return true;
    }
    fault.struck() && !struck_early
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
    let found = read_all(volume, View::Head);
    let after = world.model.clone();
    let reverting = matches!(op, Op::Revert { .. });
    for (sector, value) in found.iter().enumerate() {
        let value = value.unwrap_or_else(|| panic!("sector {sector} is torn"));
        let written = before.head[sector] != after.head[sector]
            || after.possible[sector].len() > before.possible[sector].len();
        let allowed = value == before.head[sector]
            || value == after.head[sector]
            || reverting
            || (written && after.possible[sector].contains(&value));
        assert!(allowed, "{op:?}: sector {sector} holds {value}");
        world.model.head[sector] = value;
    }
    let ids: Vec<_> = volume.snapshots().iter().map(|s| s.snapshot_id).collect();
    let old: Vec<_> = before.snapshots.iter().map(|t| t.id).collect();
    let mut known = after.snapshots.clone();
    known.extend(before.snapshots.iter().cloned());
    if ids.len() > old.len() {
        // The snapshot the operation was taking.
        assert!(matches!(op, Op::Snapshot { .. }) && ids.len() == old.len() + 1);
        known.push(harness::Taken {
            id: ids[old.len()],
            sectors: before.head.clone(),
        });
    }
    if reverting {
        let target = world
            .model
            .snapshots
            .iter()
            .find(|t| t.sectors == world.model.head)
            .cloned();
        assert!(
            world.model.head == before.head || target.is_some(),
            "half a revert"
        );
    }
    world.model.snapshots = ids
        .iter()
        .map(|id| known.iter().find(|t| t.id == *id).unwrap().clone())
        .collect();
}

fn every_operation(kind: FaultKind, most: u64) {
    let mut struck = 0;
    for (place, methods) in [Methods::Redirect, Methods::Copy, Methods::Mixed]
        .into_iter()
        .enumerate()
    {
        for after in 0..most {
            struck += u64::from(run(kind, after, 50 + place as u64, methods));
        }
    }
    assert!(
        struck * 2 > most,
        "only {struck} faults struck: the test proves little"
    );
    println!("{kind:?}: {struck} faults struck in an operation");
}

#[test]
fn failed_sync_poisons_until_reopened() {
    every_operation(FaultKind::Sync, 120);
}

#[test]
fn failed_write_loses_nothing_else() {
    every_operation(FaultKind::Write, 200);
}

#[test]
fn full_disk_loses_nothing_else() {
    every_operation(FaultKind::WriteNoSpace, 200);
}

#[test]
fn failed_read_loses_nothing() {
    every_operation(FaultKind::Read, 200);
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
