//! Format version 2's own rules: what a flush costs, when sealed data may change, what a power cut within
//! the one sync leaves, and that a journal stays in its region.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod harness;

use harness::{Model, Op, Verdict, World, read_all, sector_bytes, small_options};
use vhost_blk_store::sim::{BASE, CrashDisk, FILES, Image, memory_volume, volume_files};
use vhost_blk_store::{
    ByteRange, DataFile, Extent, Method, NewSnapshot, OpenOptions, Source, StoreError, View,
    Volume, WriteKind, WritePlan,
};

const BLOCK: u64 = 4096;

/// A volume of `blocks` blocks in memory, with thresholds that no test here reaches.
fn volume_of(blocks: u64) -> Volume {
    let files = memory_volume(blank(blocks));
    Volume::open_files(files, &roomy()).unwrap().0
}

fn blank(blocks: u64) -> Vec<Image> {
    let mut images = vec![Image::default(); FILES];
    images[BASE].set_len(blocks * BLOCK);
    images
}

fn roomy() -> OpenOptions {
    OpenOptions {
        memtable_records: 1 << 20,
        journal_bytes: 1 << 20,
        journal_region_bytes: 1 << 20,
        segment_bytes: 1 << 20,
        ..small_options(1)
    }
}

/// The same on a disk that can lose its power.
fn volume_on_disk(blocks: u64, options: &OpenOptions) -> (Volume, CrashDisk) {
    let disk = CrashDisk::new(blank(blocks), 0);
    let files = volume_files(|place| disk.file(place));
    let (volume, _) = Volume::open_files(files, options).unwrap();
    (volume, disk)
}

fn snapshot(volume: &Volume, method: Method) {
    let id = u128::from(volume.status().epoch.0);
    volume.prepare_snapshot().unwrap();
    let new = NewSnapshot {
        snapshot_id: uuid::Uuid::from_u128(id * 2).into(),
        set_id: uuid::Uuid::from_u128(id * 2 + 1).into(),
        members: vec![volume.id()],
        method,
        created_unix_ms: 1,
    };
    let set = new.set_id;
    volume.take_snapshot(new).unwrap();
    volume.keep_set(set).unwrap();
}

fn filled(value: u64) -> Vec<u8> {
    sector_bytes(value).repeat(8)
}

fn write(volume: &Volume, block: u64, value: u64) {
    volume.write_at(block * BLOCK, &filled(value)).unwrap();
}

/// The number that every sector of a block holds.
fn value_of(volume: &Volume, block: u64) -> Option<u64> {
    let mut bytes = vec![0; 4096];
    volume
        .read_at(View::Head, block * BLOCK, &mut bytes)
        .unwrap();
    let first = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    (bytes == filled(first)).then_some(first)
}

/// Syncs of base and log that a call makes.
fn syncs_of(volume: &Volume, call: impl FnOnce()) -> (u64, u64) {
    let before = volume.status().syncs;
    call();
    let after = volume.status().syncs;
    (after.base - before.base, after.log - before.log)
}

fn flush(volume: &Volume) {
    volume.flush().unwrap();
}

fn plan(volume: &Volume, block: u64) -> WritePlan {
    let range = ByteRange::new(block * BLOCK, BLOCK);
    volume.plan_write(range, WriteKind::Write).unwrap()
}

/// Where a write to `block` would go now.
fn place_of(volume: &Volume, block: u64) -> Extent {
    plan(volume, block).extents()[0]
}

/// Where the live version of `block` is.
fn live_of(volume: &Volume, block: u64) -> Extent {
    let range = ByteRange::new(block * BLOCK, BLOCK);
    volume.plan_read(View::Head, range).unwrap().extents()[0]
}

#[test]
fn log_written_round_and_round_costs_one_sync_a_flush() {
    const BLOCKS: u64 = 200;
    let volume = volume_of(BLOCKS);
    snapshot(&volume, Method::RedirectOnWrite);
    for pass in 0..3 {
        for block in 0..BLOCKS {
            write(&volume, block, pass * 1000 + block);
            assert_eq!(
                syncs_of(&volume, || flush(&volume)),
                (0, 1),
                "pass {pass}, block {block}"
            );
        }
    }
}

#[test]
fn block_written_again_and_again_costs_one_sync_a_flush_and_little_space() {
    let volume = volume_of(16);
    snapshot(&volume, Method::RedirectOnWrite);
    for value in 0..500 {
        write(&volume, 3, value);
        assert_eq!(syncs_of(&volume, || flush(&volume)), (0, 1));
    }
    let used = volume.status().log_used_bytes;
    assert!(used <= 4 * BLOCK, "one live block holds {used} bytes");
}

#[test]
fn preserving_batch_costs_one_sync() {
    let volume = volume_of(64);
    snapshot(&volume, Method::CopyOnWrite);
    let mut plans: Vec<WritePlan> = (0..64)
        .step_by(2)
        .map(|block| plan(&volume, block))
        .collect();
    let cost = syncs_of(&volume, || volume.prepare_writes(&mut plans).unwrap());
    assert_eq!(cost, (0, 1));
    drop(plans);
    // The data itself is in the base, and needs its own.
    write(&volume, 0, 5);
    assert_eq!(syncs_of(&volume, || flush(&volume)), (1, 0));
}

#[test]
fn relaxed_order_leaves_the_copies_sync_to_the_next_flush() {
    let options = OpenOptions {
        relaxed_order: true,
        ..roomy()
    };
    let (volume, _) = Volume::open_files(memory_volume(blank(64)), &options).unwrap();
    snapshot(&volume, Method::CopyOnWrite);
    let mut plans = vec![plan(&volume, 3)];
    let cost = syncs_of(&volume, || volume.prepare_writes(&mut plans).unwrap());
    assert_eq!(cost, (0, 0));
    drop(plans);
    write(&volume, 3, 5);
    let (base, log) = syncs_of(&volume, || flush(&volume));
    assert!(base == 1 && log > 0, "{base} and {log}");
}

#[test]
fn second_touch_of_a_neighbourhood_preserves_the_rest_of_it() {
    let volume = volume_of(64);
    snapshot(&volume, Method::CopyOnWrite);
    let used = || volume.status().log_used_bytes / BLOCK;
    // Sparse: one block each.
    for first in [0, 16, 32] {
        write(&volume, first + 5, 1);
    }
    assert_eq!(used(), 3);
    // The second write to a neighbourhood takes the rest along, and what is in flight out.
    let flying = plan(&volume, 9);
    assert_eq!(used(), 3 + 15, "planned, not yet copied");
    drop(flying);
    assert_eq!(used(), 3);
    let mut flying = plan(&volume, 25);
    let other = plan(&volume, 40);
    assert_eq!(used(), 3 + 15 + 15);
    assert!(matches!(
        volume.plan_write(ByteRange::new(26 * BLOCK, BLOCK), WriteKind::Write),
        Err(StoreError::Overlaps)
    ));
    volume
        .prepare_writes(std::slice::from_mut(&mut flying))
        .unwrap();
    drop((flying, other));
    // All of them are written in place now, and none of them is preserved twice.
    let cost = syncs_of(&volume, || {
        for block in 16..32 {
            write(&volume, block, 2);
        }
    });
    assert_eq!(cost, (0, 0));
    assert_eq!(used(), 3 + 15);
    let seen = volume.snapshots()[0].snapshot_id;
    let mut bytes = vec![1; 64 * 4096];
    volume.read_at(View::Snapshot(seen), 0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
}

#[test]
fn dense_writing_preserves_its_district_and_no_more() {
    let volume = volume_of(1024);
    snapshot(&volume, Method::CopyOnWrite);
    let used = || volume.status().log_used_bytes / BLOCK;
    for neighbourhood in 0..4 {
        write(&volume, 256 + neighbourhood * 48, 1);
        write(&volume, 256 + neighbourhood * 48 + 7, 1);
    }
    assert_eq!(used(), 4 * 16, "their own neighbourhoods");
    write(&volume, 500, 1);
    assert_eq!(used(), 4 * 16 + 1, "a first touch is a first touch");
    let flying = plan(&volume, 390);
    assert_eq!(used(), 4 * 16 + 2);
    write(&volume, 501, 1);
    assert_eq!(used(), 256, "all of the district");
    drop(flying);
    assert_eq!(used(), 255, "but what was in flight");
    let seen = volume.snapshots()[0].snapshot_id;
    let mut bytes = vec![1; 1024 * 4096];
    volume.read_at(View::Snapshot(seen), 0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
    // In place from now on.
    let cost = syncs_of(&volume, || {
        (256..384).for_each(|block| write(&volume, block, 2))
    });
    assert_eq!((cost, used()), ((0, 0), 255));
}

#[test]
fn preserving_ahead_never_takes_the_last_room() {
    let options = OpenOptions {
        log_limit_bytes: 6 * BLOCK,
        segment_bytes: 8 * BLOCK,
        ..roomy()
    };
    let files = memory_volume(blank(32));
    let (volume, _) = Volume::open_files(files, &options).unwrap();
    snapshot(&volume, Method::CopyOnWrite);
    for block in 0..6 {
        write(&volume, block, 3);
    }
    let full = volume.write_at(6 * BLOCK, &filled(3));
    assert!(matches!(full, Err(StoreError::NoSpace)));
}

#[test]
fn sealed_data_stays_where_it_is_until_a_later_round_confirms_it() {
    let volume = volume_of(16);
    snapshot(&volume, Method::RedirectOnWrite);
    write(&volume, 1, 10);
    let first = live_of(&volume, 1);
    assert_ne!(place_of(&volume, 1), first, "not even flushed");
    flush(&volume);
    assert_ne!(
        place_of(&volume, 1),
        first,
        "its own round is no confirmation"
    );
    write(&volume, 2, 20);
    flush(&volume);
    assert_eq!(
        place_of(&volume, 1),
        first,
        "the next round's COMMIT names it"
    );
    assert_ne!(place_of(&volume, 2), live_of(&volume, 2));
    // A round that had nothing of its own to commit confirms as well: it rides on a sync of the log.
    write(&volume, 1, 11);
    assert_eq!(live_of(&volume, 1), first);
    assert_eq!(syncs_of(&volume, || flush(&volume)), (0, 1));
    assert_eq!(place_of(&volume, 2), live_of(&volume, 2));
}

#[test]
fn zeroes_in_place_wait_for_confirmation_too() {
    let volume = volume_of(16);
    snapshot(&volume, Method::RedirectOnWrite);
    for may_unmap in [false, true] {
        for (offset, length) in [(0, BLOCK), (512, 1024)] {
            write(&volume, 1, 10);
            flush(&volume);
            let live = live_of(&volume, 1);
            let range = ByteRange::new(BLOCK + offset, length);
            let zeroes = volume
                .plan_write(range, WriteKind::WriteZeroes { may_unmap })
                .unwrap();
            for extent in zeroes.extents() {
                let end = live.offset_bytes + BLOCK;
                let within = (live.offset_bytes..end).contains(&extent.offset_bytes);
                assert!(extent.source != Source::Log || !within, "{extent:?}");
            }
        }
    }
}

/// Runs `check` on what may be left when the power goes now, all of it and nothing of it included.
fn cut(disk: &CrashDisk, options: &OpenOptions, mut check: impl FnMut(&Volume)) -> u64 {
    disk.record();
    let point = disk.take_points().pop().unwrap();
    let mut tried = 0;
    for image in point.power_cuts(16, 11) {
        let boot = OpenOptions {
            boot_id: small_options(2).boot_id,
            ..options.clone()
        };
        let (volume, _) = Volume::open_files(memory_volume(image), &boot).unwrap();
        check(&volume);
        tried += 1;
    }
    tried
}

#[test]
fn flushed_round_survives_what_is_written_over_its_blocks_later() {
    for method in [Method::RedirectOnWrite, Method::CopyOnWrite] {
        let (volume, disk) = volume_on_disk(16, &roomy());
        snapshot(&volume, Method::RedirectOnWrite);
        // One round that returned: block 2's records are as good as block 1's.
        write(&volume, 1, 10);
        write(&volume, 2, 20);
        flush(&volume);
        if method == Method::CopyOnWrite {
            snapshot(&volume, method);
        }
        // Not flushed, in all stages, on top of it.
        let mut open = plan(&volume, 1);
        if open.needs_prepare() {
            volume
                .prepare_writes(std::slice::from_mut(&mut open))
                .unwrap();
        }
        let extent = open.extents()[0];
        let file = match extent.source {
            Source::Base => DataFile::Base,
            Source::Log | Source::Zero => DataFile::Log,
        };
        volume
            .data_file(file)
            .write_at(&filled(11), extent.offset_bytes)
            .unwrap();
        let check = |after: &Volume| {
            assert!([Some(10), Some(11), None].contains(&value_of(after, 1)));
            assert_eq!(
                value_of(after, 2),
                Some(20),
                "{method:?}: a flush was undone"
            );
        };
        assert!(cut(&disk, &roomy(), check) > 2);
        volume.complete_write(open).unwrap();
        cut(&disk, &roomy(), check);
        write(&volume, 1, 12);
        cut(&disk, &roomy(), |after| {
            assert_eq!(
                value_of(after, 2),
                Some(20),
                "{method:?}: a flush was undone"
            );
        });
    }
}

#[test]
fn superseded_block_is_not_given_to_anybody_before_its_round_is_confirmed() {
    let (volume, disk) = volume_on_disk(64, &roomy());
    snapshot(&volume, Method::RedirectOnWrite);
    write(&volume, 1, 10);
    write(&volume, 2, 20);
    flush(&volume);
    let first = live_of(&volume, 1);
    write(&volume, 1, 11);
    // Whatever the guest writes now, the block of 10 stays: after a power cut it may be the one that counts.
    for block in 8..40 {
        write(&volume, block, 100 + block);
        assert_ne!(live_of(&volume, block), first);
    }
    cut(&disk, &roomy(), |after| {
        assert!([Some(10), Some(11)].contains(&value_of(after, 1)));
        assert_eq!(value_of(after, 2), Some(20));
    });
    flush(&volume);
    for block in 40..50 {
        write(&volume, block, 100 + block);
        assert_ne!(live_of(&volume, block), first, "flushed, not confirmed");
    }
    // A read that was planned while it was live may still be under way.
    flush(&volume);
    write(&volume, 50, 1);
    assert_eq!(live_of(&volume, 50), first, "free again");
}

#[test]
fn round_whose_data_did_not_arrive_is_dropped_wholly_and_stays_dropped() {
    let (volume, disk) = volume_on_disk(32, &roomy());
    snapshot(&volume, Method::RedirectOnWrite);
    for block in 1..5 {
        write(&volume, block, 10);
    }
    flush(&volume);
    disk.take_points();
    for block in 1..5 {
        write(&volume, block, 11);
    }
    flush(&volume);
    // Before the sync took effect: everything of the round is pending, its COMMIT, too.
    let points = disk.take_points();
    let before = points
        .iter()
        .find(|point| point.pending_sectors() > 30)
        .unwrap();
    let (mut old, mut new) = (0, 0);
    for image in before.power_cuts(60, 3) {
        let files = memory_volume(image);
        let mut seen: Option<Vec<Option<u64>>> = None;
        for boot in 2..5 {
            let options = OpenOptions {
                boot_id: small_options(boot).boot_id,
                ..roomy()
            };
            let (volume, report) = Volume::open_files(files.clone(), &options).unwrap();
            let values: Vec<Option<u64>> = (1..5).map(|block| value_of(&volume, block)).collect();
            assert!(
                values == [Some(10); 4] || values == [Some(11); 4],
                "half a round: {values:?}"
            );
            if let Some(seen) = &seen {
                assert_eq!(*seen, values, "another opening decides otherwise");
                assert_eq!(report.dropped_records, 0);
            }
            old += u64::from(values[0] == Some(10));
            new += u64::from(values[0] == Some(11));
            if seen.is_none() {
                // Where the dropped round's data was, other data may come now.
                for block in 8..16 {
                    write(&volume, block, 77);
                }
                volume.flush().unwrap();
            }
            seen = Some(values);
            drop(volume);
        }
    }
    assert!(
        old > 0 && new > 0,
        "{old} old, {new} new: the test proves nothing"
    );
}

#[test]
fn checksum_of_data_that_was_not_written_drops_the_round() {
    let (volume, disk) = volume_on_disk(16, &roomy());
    snapshot(&volume, Method::RedirectOnWrite);
    write(&volume, 1, 10);
    flush(&volume);
    // A caller that seals what it did not write, as one would that let the guest change its memory.
    let mut wrong = plan(&volume, 1);
    volume
        .data_file(DataFile::Log)
        .write_at(&filled(11), wrong.extents()[0].offset_bytes)
        .unwrap();
    wrong.seal(0, crc32c::crc32c(&filled(12)));
    volume.complete_write(wrong).unwrap();
    flush(&volume);
    cut(&disk, &roomy(), |after| {
        assert_eq!(value_of(after, 1), Some(10));
    });
}

#[test]
fn rounds_of_very_many_sealed_blocks_are_ordered() {
    const BLOCKS: u64 = 4200;
    let volume = volume_of(BLOCKS);
    snapshot(&volume, Method::RedirectOnWrite);
    for first in (0..BLOCKS).step_by(16) {
        let count = 16.min(BLOCKS - first);
        let bytes = filled(first).repeat(usize::try_from(count).unwrap());
        volume.write_at(first * BLOCK, &bytes).unwrap();
    }
    assert_eq!(syncs_of(&volume, || flush(&volume)), (0, 2));
    write(&volume, 1, 3);
    assert_eq!(
        syncs_of(&volume, || flush(&volume)),
        (0, 1),
        "the count begins anew"
    );
}

#[test]
fn journal_never_leaves_its_region_however_much_is_in_flight() {
    const BLOCKS: u64 = 300;
    let options = OpenOptions {
        journal_region_bytes: 16 << 10,
        journal_bytes: 1 << 30,
        memtable_records: 1 << 20,
        segment_bytes: 4 << 20,
        ..small_options(1)
    };
    let (volume, disk) = volume_on_disk(BLOCKS, &options);
    snapshot(&volume, Method::RedirectOnWrite);
    let mut refused = 0;
    for pass in 0..6 {
        let mut plans = Vec::new();
        // Every other block, so that no two share a record.
        for block in (0..BLOCKS).step_by(2) {
            let range = ByteRange::new(block * BLOCK, BLOCK);
            match volume.plan_write(range, WriteKind::Write) {
                Ok(plan) => plans.push((block, plan)),
                Err(StoreError::Busy) => refused += 1,
                Err(error) => panic!("{error:?}"),
            }
        }
        assert!(!plans.is_empty(), "nothing in flight, and still no room");
        for (block, plan) in plans {
            let mut plan = [plan];
            volume.prepare_writes(&mut plan).unwrap();
            let [mut plan] = plan;
            let extent = plan.extents()[0];
            assert_eq!(extent.source, Source::Log);
            assert!(extent.offset_bytes >= 2 * options.journal_region_bytes);
            let bytes = filled(pass * 10_000 + block);
            volume
                .data_file(DataFile::Log)
                .write_at(&bytes, extent.offset_bytes)
                .unwrap();
            if let Some(part) = plan.seals().first() {
                assert_eq!(part.length_bytes, BLOCK);
                plan.seal(0, crc32c::crc32c(&bytes));
            }
            volume.complete_write(plan).unwrap();
        }
        volume.flush().unwrap();
        let before: Vec<Option<u64>> = (0..BLOCKS).map(|block| value_of(&volume, block)).collect();
        let tried = cut(&disk, &options, |after| {
            for block in 0..BLOCKS {
                let expected = before[usize::try_from(block).unwrap()];
                assert_eq!(value_of(after, block), expected, "block {block}");
            }
        });
        assert!(tried > 0);
    }
    assert!(
        refused > 0,
        "there was always room: the test proves nothing"
    );
}

#[test]
fn killed_daemon_keeps_writes_over_unconfirmed_data() {
    let model = Model::new(83);
    let files = memory_volume(vec![model.bytes().into()]);
    let mut world = World::new(files, small_options(1), model);
    let verdict = Verdict::Keep;
    let method = Method::RedirectOnWrite;
    world.apply(&Op::Snapshot { method, verdict });
    for _ in 0..4 {
        for _ in 0..3 {
            world.apply(&Op::Write {
                sector: 8,
                count: 16,
            });
            world.compare();
        }
        world.apply(&Op::Flush);
        world.apply(&Op::KillReopen);
        world.compare();
        assert!(read_all(world.volume(), View::Head)[8].is_some());
    }
}
