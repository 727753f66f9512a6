//! Pages hold what was put into them, are found in, and never panic on anything.

use proptest::prelude::*;

use super::*;
use crate::units::Generation;

const VOLUME: VolumeId = VolumeId(uuid::Uuid::from_u128(1));
const SEAL: Seal = Seal::Page(Generation(7), 3);

fn key(block: u64, death: u32) -> Key {
    Key {
        block: Block(block),
        death,
    }
}

fn location(kind: u8, number: u64) -> Location {
    match kind % 3 {
        0 => Location::Base,
        1 => Location::Zero,
        _ => Location::Log(LogBlock(number % MAX_LOG_BLOCKS)),
    }
}

/// Ascending records, dense and sparse, with short and long histories.
fn records() -> impl Strategy<Value = Vec<(Key, Location)>> {
    let step = prop_oneof![0..3_u64, 0..300_u64, 0..1_u64 << 40];
    let death = prop_oneof![1..600_u32, 1..LIVE - 2, Just(LIVE)];
    let one = (
        step,
        death,
        any::<u8>(),
        prop_oneof![0..5_000_u64, any::<u64>()],
    );
    proptest::collection::vec(one, 1..2_000).prop_map(|parts| {
        let mut block = 0;
        let mut sorted = std::collections::BTreeMap::new();
        for (step, death, kind, number) in parts {
            block += step;
            sorted.insert(key(block, death), location(kind, number));
        }
        sorted.into_iter().collect()
    })
}

proptest! {
    #[test]
    fn page_holds_what_was_put_into_it_and_finds_it(records in records(), probe in 0..1_u64 << 41) {
        let mut builder = PageBuilder::default();
        let count = records.iter().take_while(|(key, location)| builder.push(*key, *location)).count();
        prop_assert!(count > 100.min(records.len() - 1));
        let bytes = builder.finish(VOLUME, SEAL);
        let page = UnverifiedPage(&bytes).verify(VOLUME, SEAL).unwrap();
        let held = &records[..count];
        let mut all = page.all();
        let unpacked: Vec<_> = all.by_ref().collect();
        prop_assert_eq!(all.check(), Ok(()));
        prop_assert_eq!(&unpacked[..], held);
        let probes = held.iter().step_by(7).map(|(at, _)| *at);
        for at in probes.chain([key(probe, LIVE), key(0, 0)]) {
            for at in [at, key(at.block.0, at.death.saturating_sub(1)), Key::live(at.block)] {
                let behind = held.partition_point(|(key, _)| *key <= at);
                let expected = [
                    behind.checked_sub(1).map(|place| held[place]),
                    behind.checked_sub(2).map(|place| held[place]),
                ];
                prop_assert_eq!(page.last_two(at), Ok(expected));
                let next = page.near(at).find(|(key, _)| *key >= at);
                prop_assert_eq!(next, held.iter().find(|(key, _)| *key >= at).copied());
            }
        }
    }

    #[test]
    fn nothing_in_a_page_can_panic(start in records(), edits in proptest::collection::vec((0..PAGE_BYTES, any::<u8>()), 0..64), probe: u64) {
        let mut builder = PageBuilder::default();
        for (key, location) in start {
            if !builder.push(key, location) {
                break;
            }
        }
        let mut bytes = builder.finish(VOLUME, SEAL);
        for (at, byte) in edits {
            bytes[at] = byte;
        }
        let crc = SEAL.crc(VOLUME, &bytes[4..]);
        put(&mut bytes, page::CRC, &crc.to_le_bytes());
        if let Some(page) = UnverifiedPage(&bytes).verify(VOLUME, SEAL) {
            prop_assert!(page.all().count() <= PAGE_BYTES);
            page.last_two(key(probe, 5)).ok();
            prop_assert!(page.near(key(probe, 5)).count() <= PAGE_BYTES);
        }
    }

    #[test]
    fn numbers_of_any_size_come_back(value: u64, other: i64) {
        let mut bytes = Vec::new();
        put_varint(&mut bytes, value);
        prop_assert_eq!(bytes.len() as u64, varint_bytes(value));
        prop_assert!(bytes.len() <= 10);
        prop_assert_eq!(unzigzag(zigzag(other)), other);
    }
}

#[test]
fn page_of_another_place_or_generation_does_not_verify() {
    let mut builder = PageBuilder::default();
    assert!(builder.push(key(1, LIVE), Location::Zero));
    let bytes = builder.finish(VOLUME, SEAL);
    let verify = |volume, seal| UnverifiedPage(&bytes).verify(volume, seal).is_some();
    assert!(verify(VOLUME, SEAL));
    assert!(!verify(VOLUME, Seal::Page(Generation(7), 4)));
    assert!(!verify(VOLUME, Seal::Page(Generation(8), 3)));
    assert!(!verify(VOLUME, Seal::Fence(Generation(7), 3)));
    assert!(!verify(VolumeId(uuid::Uuid::nil()), SEAL));
}

#[test]
fn first_touches_at_random_take_about_ten_bytes_a_block() {
    // 1 % of 1 TiB at random: one block in a hundred, log blocks in the order of the writes, 512 epochs.
    let mut random = 1_u64;
    let mut next = move |most: u64| {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (random >> 33) % most
    };
    let (mut block, mut blocks, mut pages) = (0, 0_u64, 0_u64);
    let mut builder = PageBuilder::default();
    while pages < 100 {
        block += 1 + next(200);
        let epoch = u32::try_from(1 + next(512)).unwrap();
        let log = Location::Log(LogBlock(next(2_700_000)));
        for (key, location) in [(key(block, epoch), Location::Base), (key(block, LIVE), log)] {
            if !builder.push(key, location) {
                builder.finish(VOLUME, SEAL);
                pages += 1;
                assert!(builder.push(key, location));
            }
        }
        blocks += 1;
    }
    let bytes_per_block = pages as f64 * PAGE_BYTES as f64 / blocks as f64;
    println!("{bytes_per_block:.2} bytes a block");
    assert!(bytes_per_block < 11.0, "{bytes_per_block}");
}
