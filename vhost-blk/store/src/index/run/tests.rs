//! A run is found in with any number of fences, reads back as written, and damage of it is an error.

use super::*;
use crate::index::{Largest, RunWriter, most_pages};
use crate::io::BlockFile;
use crate::layout::LIVE;
use crate::sim::MemoryFile;
use crate::units::LogBlock;

const VOLUME: VolumeId = VolumeId(uuid::Uuid::from_u128(1));

fn key(block: u64, death: u32) -> Key {
    Key {
        block: Block(block),
        death,
    }
}

fn log(number: u64) -> Location {
    Location::Log(LogBlock(number))
}

/// A run at page 3 of what it is given.
fn written(records: &[(Key, Location)]) -> (Run, MemoryFile) {
    let file = MemoryFile::default();
    let largest = Largest {
        block: records.last().unwrap().0.block.0,
        epoch: LIVE - 2,
        log_block: 1 << 40,
    };
    let limit = most_pages(records.len() as u64, largest);
    let mut writer = RunWriter::new(VOLUME, Generation(7), 3, limit);
    for (key, location) in records {
        writer.push(&file, *key, *location).unwrap();
    }
    let run = writer.finish(&file).unwrap().unwrap();
    assert!(run.place.pages + run.place.fence_pages <= limit);
    assert_eq!(run.place.records, records.len() as u64);
    (run, file)
}

/// Every third block lives in the log, every sixth has a long history of odd deaths.
fn records(blocks: u64) -> Vec<(Key, Location)> {
    let mut records = Vec::new();
    for n in 0..blocks {
        let deaths = if n % 2 == 0 {
            u32::try_from(n % 60).unwrap()
        } else {
            0
        };
        records.extend(
            (0..deaths).map(|d| (key(3 * n, 2 * d + 1), log(1 << 30 | n << 8 | u64::from(d)))),
        );
        records.push((key(3 * n, LIVE), log(n)));
    }
    records
}

#[test]
fn history_of_a_block_is_known_when_its_live_version_begins_a_page() {
    // Records of several lengths, so that pages begin with either version.
    let records: Vec<_> = (0..3_000)
        .flat_map(|n| [(key(n, 5), log(n * n * n)), (key(n, LIVE), log(n))])
        .collect();
    let (run, file) = written(&records);
    let mut begins = 0;
    for number in 1..run.place.pages {
        let mut page = Vec::new();
        run.read_pages(&file, number, 1, &mut page).unwrap();
        let (first, location) = page[0];
        let place = records.iter().position(|(key, _)| *key == first).unwrap();
        let (before, _) = records[place - 1];
        if first.death != LIVE || before.block != first.block {
            continue;
        }
        begins += 1;
        let mut cache = PageCache::new(4);
        let end = run.end_of(&file, &mut cache, first.block).unwrap();
        assert_eq!(end.live, Some(location));
        assert_eq!(end.last_death, Some(before.death), "{first:?}");
    }
    assert!(begins > 0, "no page of {} begins so", run.place.pages);
}

#[test]
fn every_record_is_found_with_any_number_of_fences() {
    let records = records(3_000);
    let (mut run, file) = written(&records);
    assert!(run.place.pages > 20);
    let loaded = Run::load(&file, VOLUME, run.place).unwrap();
    assert_eq!(loaded.fences.len() as u64, run.place.pages);
    for most in [2, 3, 8, 1000] {
        let mut fences = Fences::new(most);
        for number in 0..run.place.pages {
            let mut page = Vec::new();
            run.read_pages(&file, number, 1, &mut page).unwrap();
            fences.push(page[0].0);
        }
        assert!(fences.len() <= most.max(2));
        run.fences = fences;
        let mut cache = PageCache::new(2);
        for n in (0..3_000).step_by(11) {
            let deaths = if n % 2 == 0 {
                u32::try_from(n % 60).unwrap()
            } else {
                0
            };
            let end = run.end_of(&file, &mut cache, Block(3 * n)).unwrap();
            let last_death = (deaths > 0).then(|| 2 * deaths - 1);
            assert_eq!(
                end,
                EndOfHistory {
                    live: Some(log(n)),
                    last_death
                }
            );
            let none = run.end_of(&file, &mut cache, Block(3 * n + 1)).unwrap();
            assert_eq!(none, EndOfHistory::default());
            for death in [0, 1, deaths, 2 * deaths, LIVE] {
                let range = key(3 * n, death)..=key(3 * n, LIVE);
                let found = run.first_in(&file, &mut cache, range.clone()).unwrap();
                let expected = records.iter().find(|(at, _)| range.contains(at)).copied();
                assert_eq!(found, expected);
            }
        }
    }
}

#[test]
fn walk_goes_over_all_and_leaps_where_it_is_told() {
    let records = records(500);
    let (run, file) = written(&records);
    let mut cache = PageCache::new(4);
    let range = key(0, 0)..=key(u64::MAX, LIVE);
    let mut all = Vec::new();
    run.visit(&file, &mut cache, &range, &mut |key, location| {
        all.push((key, location));
        Walk::On
    })
    .unwrap();
    assert_eq!(all, records);
    let mut live = Vec::new();
    run.visit(&file, &mut cache, &range, &mut |at, location| {
        if at.death == LIVE {
            live.push((at, location));
            Walk::On
        } else {
            Walk::To(key(at.block.0, LIVE))
        }
    })
    .unwrap();
    let expected: Vec<_> = records
        .iter()
        .filter(|(at, _)| at.death == LIVE)
        .copied()
        .collect();
    assert_eq!(live, expected);
}

#[test]
fn damage_is_an_error_of_the_page_that_is_read() {
    let (run, file) = written(&records(2_000));
    let at = (3 + 5) * PAGE_BYTES as u64 + 100;
    let mut byte = [0];
    file.read_at(&mut byte, at).unwrap();
    file.write_at(&[byte[0] ^ 0x10], at).unwrap();
    let mut cache = PageCache::new(100);
    let (mut whole, mut damaged) = (0, 0);
    for n in 0..2_000 {
        match run.end_of(&file, &mut cache, Block(3 * n)) {
            Ok(end) => {
                assert_eq!(end.live, Some(log(n)));
                whole += 1;
            }
            Err(StoreError::Corrupted { offset_bytes, .. }) => {
                assert_eq!(offset_bytes, at / 4096 * 4096);
                damaged += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(
        whole > 1_000 && damaged > 5,
        "{whole} whole, {damaged} damaged"
    );
    assert!(run.read_pages(&file, 0, 10, &mut Vec::new()).is_err());
    let fences = run.place.first_page + run.place.pages;
    file.write_at(&[0xee; 8], fences * PAGE_BYTES as u64)
        .unwrap();
    assert!(Run::load(&file, VOLUME, run.place).is_err());
}
