//! Fences lead to the one page that can hold a key; damaged pages are refused.

use super::*;
use crate::io::BlockFile;
use crate::layout::LIVE;
use crate::sim::MemoryFile;
use crate::units::LogBlock;

/// A run of `pages` full pages in which block 3n is live at log block n, with at most `most` fences.
fn run(pages: u64, most: usize) -> (Run, MemoryFile) {
    let file = MemoryFile::default();
    let volume_id = VolumeId(uuid::Uuid::from_u128(1));
    let mut run = Run {
        volume_id,
        slot: 0,
        generation: Generation(7),
        pages,
        records: pages * ENTRIES_PER_PAGE as u64,
        fences: Fences::new(most),
    };
    for number in 0..pages {
        let records: Vec<(Key, Location)> = (0..ENTRIES_PER_PAGE as u64)
            .map(|place| {
                let n = number * ENTRIES_PER_PAGE as u64 + place;
                let block = Block(3 * n);
                (Key { block, death: LIVE }, Location::Log(LogBlock(n)))
            })
            .collect();
        run.fences.push(records[0].0);
        let bytes = encode_page(volume_id, run.generation, number, &records);
        file.write_at(&bytes, number * PAGE_BYTES as u64).unwrap();
    }
    (run, file)
}

#[test]
fn every_record_is_found_with_any_number_of_fences() {
    for most in [2, 3, 8, 1000] {
        for pages in [1, 2, 7, 33] {
            let (run, file) = run(pages, most);
            assert!(run.fences.keys.len() <= most.max(2));
            let mut cache = PageCache::new(2);
            for n in (0..run.records).step_by(7) {
                // The block before has no record, the block itself has one.
                for block in [3 * n, (3 * n).saturating_sub(1)] {
                    let range = Key {
                        block: Block(block),
                        death: 0,
                    }..=Key {
                        block: Block(block),
                        death: LIVE,
                    };
                    let mut found = Vec::new();
                    run.visit(&file, &mut cache, &range, &mut |key, location| {
                        found.push((key.block.0, location));
                        Walk::On
                    })
                    .unwrap();
                    if block.is_multiple_of(3) {
                        assert_eq!(found, [(block, Location::Log(LogBlock(block / 3)))]);
                    } else {
                        assert_eq!(found, []);
                    }
                }
            }
        }
    }
}

#[test]
fn page_of_another_place_or_generation_does_not_verify() {
    let (run, file) = run(2, 10);
    let mut bytes = [0; PAGE_BYTES];
    file.read_at(&mut bytes, 0).unwrap();
    let verify = |volume, generation, number| {
        UnverifiedPage(&bytes)
            .verify(volume, generation, number)
            .is_some()
    };
    assert!(verify(run.volume_id, run.generation, 0));
    assert!(!verify(run.volume_id, run.generation, 1));
    assert!(!verify(run.volume_id, Generation(8), 0));
    assert!(!verify(VolumeId(uuid::Uuid::nil()), run.generation, 0));
}
