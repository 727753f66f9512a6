//! What a guest may write into its ring, and that nothing of it is believed.

use super::{BadChain, Chain, Layout, Ring, RingBroken};
use crate::engine::testing::memory;
use crate::frontend::chain::{FLAG_INDIRECT, FLAG_NEXT, FLAG_WRITE};
use proptest::prelude::*;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const LAYOUT: Layout = Layout {
    size: 8,
    table: 0x1000,
    available: 0x2000,
    used: 0x3000,
    event_idx: false,
};
const WITH_EVENTS: Layout = Layout {
    event_idx: true,
    ..LAYOUT
};
const INDIRECT: u64 = 0x4000;

fn describe(memory: &GuestMemoryMmap, at: u64, descriptor: (u64, u32, u16, u16)) {
    let (address, length, flags, next) = descriptor;
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    memory.write_slice(&bytes, GuestAddress(at)).unwrap();
}

fn write(memory: &GuestMemoryMmap, at: u64, value: u16) {
    memory
        .write_slice(&value.to_le_bytes(), GuestAddress(at))
        .unwrap();
}

fn read(memory: &GuestMemoryMmap, at: u64) -> u16 {
    memory.read_obj(GuestAddress(at)).unwrap()
}

/// Descriptors from the start of the table, walked from the first.
fn walk(descriptors: &[(u64, u32, u16, u16)]) -> Result<Chain, BadChain> {
    let memory = memory();
    for (index, descriptor) in descriptors.iter().enumerate() {
        describe(&memory, LAYOUT.table + index as u64 * 16, *descriptor);
    }
    walk_in(&memory)
}

fn walk_in(memory: &Arc<GuestMemoryMmap>) -> Result<Chain, BadChain> {
    let mut chain = Chain::default();
    Ring::new(memory, LAYOUT).unwrap().walk(0, &mut chain)?;
    Ok(chain)
}

fn shape(chain: &Chain) -> (Vec<u64>, Vec<u64>) {
    let addresses = |ranges: &[crate::engine::GuestRange]| {
        ranges.iter().map(|range| range.address).collect::<Vec<_>>()
    };
    (addresses(&chain.readable), addresses(&chain.writable))
}

#[test]
fn a_chain_is_walked_along_its_next_fields() {
    let chain = walk(&[
        (10, 16, FLAG_NEXT, 5),
        (0, 0, 0, 0),
        (30, 1, FLAG_WRITE, 0),
        (0, 0, 0, 0),
        (0, 0, 0, 0),
        (20, 512, FLAG_NEXT, 2),
    ]);
    assert_eq!(shape(&chain.unwrap()), (vec![10, 20], vec![30]));
}

#[test]
fn an_indirect_table_is_walked_wherever_it_lies() {
    let memory = memory();
    let table = [
        (10, 16, FLAG_NEXT, 2),
        (30, 1, FLAG_WRITE, 0),
        (20, 512, FLAG_NEXT, 1),
    ];
    for (index, descriptor) in table.into_iter().enumerate() {
        describe(&memory, INDIRECT + index as u64 * 16, descriptor);
    }
    describe(&memory, LAYOUT.table, (INDIRECT, 48, FLAG_INDIRECT, 0));
    assert_eq!(shape(&walk_in(&memory).unwrap()), (vec![10, 20], vec![30]));
}

#[test]
fn chains_that_make_no_sense_are_given_back() {
    for descriptors in [
        vec![(10, 16, FLAG_NEXT, 0)],
        vec![(10, 16, FLAG_NEXT, 1), (20, 16, FLAG_NEXT, 0)],
        vec![(10, 16, FLAG_NEXT, 8)],
        vec![(10, 16, FLAG_NEXT, u16::MAX)],
        vec![(10, 16, FLAG_WRITE | FLAG_NEXT, 1), (20, 16, 0, 0)],
        vec![(INDIRECT, 16, FLAG_INDIRECT | FLAG_NEXT, 1)],
        vec![(INDIRECT, 0, FLAG_INDIRECT, 0)],
        vec![(INDIRECT, 17, FLAG_INDIRECT, 0)],
        vec![(INDIRECT, 16 * 1025, FLAG_INDIRECT, 0)],
        vec![(INDIRECT, u32::MAX - 15, FLAG_INDIRECT, 0)],
        vec![(u64::MAX - 8, 16, FLAG_INDIRECT, 0)],
        vec![(0xfff8, 16, FLAG_INDIRECT, 0)],
    ] {
        assert!(walk(&descriptors).is_err(), "{descriptors:?}");
    }
    let inner = [
        (INDIRECT, 16, FLAG_INDIRECT, 0),
        (10, 16, FLAG_NEXT, 0),
        (10, 16, FLAG_NEXT, 1),
    ];
    for inner in inner {
        let memory = memory();
        describe(&memory, INDIRECT, inner);
        describe(&memory, LAYOUT.table, (INDIRECT, 16, FLAG_INDIRECT, 0));
        assert!(walk_in(&memory).is_err(), "{inner:?} in an indirect table");
    }
}

#[test]
fn a_ring_outside_guest_memory_or_across_a_hole_is_broken() {
    let memory = memory();
    for bad in [0xfff0, 0x1_0000, u64::MAX - 3, 0xf_fffc] {
        for layout in [
            Layout {
                table: bad,
                ..LAYOUT
            },
            Layout {
                available: bad,
                ..LAYOUT
            },
            Layout {
                used: bad,
                ..LAYOUT
            },
        ] {
            let found = Ring::new(&memory, layout);
            assert!(
                matches!(found, Err(RingBroken::NotThere)),
                "{layout:?}: {found:?}"
            );
        }
    }
}

#[test]
fn an_index_that_jumps_and_a_head_outside_the_table_break_the_ring() {
    let memory = memory();
    let ring = Ring::new(&memory, LAYOUT).unwrap();
    write(&memory, LAYOUT.available + 2, 3);
    assert_eq!(ring.available_from(65_534), Ok(5), "across the wrap");
    assert_eq!(ring.available_from(65_531), Ok(8));
    assert_eq!(
        ring.available_from(65_530),
        Err(RingBroken::Jumped { ahead: 9, size: 8 })
    );
    assert!(ring.available_from(4).is_err(), "backwards");
    write(&memory, LAYOUT.available + 4 + 2 * 2, 7);
    assert_eq!(ring.available_head(10), Ok(7));
    write(&memory, LAYOUT.available + 4 + 2 * 2, 8);
    assert_eq!(ring.available_head(10), Err(RingBroken::NoSuchHead(8)));
}

#[test]
fn an_answer_is_written_before_the_index_that_shows_it() {
    let memory = memory();
    let ring = Ring::new(&memory, LAYOUT).unwrap();
    ring.write_used(9, 5, 513).unwrap();
    assert_eq!(ring.used_index(), Ok(0));
    let entry: u64 = memory.read_obj(GuestAddress(LAYOUT.used + 4 + 8)).unwrap();
    assert_eq!(u64::from_le(entry), 513 << 32 | 5);
    ring.publish(10).unwrap();
    assert_eq!(ring.used_index(), Ok(10));
}

#[test]
fn interrupts_and_kicks_follow_the_flags_or_the_events() {
    let memory = memory();
    let ring = Ring::new(&memory, LAYOUT).unwrap();
    assert_eq!(ring.wants_interrupt(0, 1), Ok(true));
    write(&memory, LAYOUT.available, 1);
    assert_eq!(ring.wants_interrupt(0, 1), Ok(false));
    ring.ask_for_no_kicks().unwrap();
    assert_eq!(read(&memory, LAYOUT.used), 1);
    assert_eq!(ring.ask_for_kicks(0), Ok(false));
    assert_eq!(read(&memory, LAYOUT.used), 0);
    write(&memory, LAYOUT.available + 2, 1);
    assert_eq!(ring.ask_for_kicks(0), Ok(true), "one has come meanwhile");

    let ring = Ring::new(&memory, WITH_EVENTS).unwrap();
    let (used_event, available_event) = (LAYOUT.available + 4 + 16, LAYOUT.used + 4 + 64);
    write(&memory, used_event, 5);
    assert_eq!(ring.wants_interrupt(3, 5), Ok(false), "not there yet");
    assert_eq!(ring.wants_interrupt(3, 6), Ok(true));
    assert_eq!(ring.wants_interrupt(6, 8), Ok(false), "behind it");
    write(&memory, used_event, 65_535);
    assert_eq!(ring.wants_interrupt(65_534, 2), Ok(true), "across the wrap");
    assert_eq!(ring.ask_for_kicks(1), Ok(false));
    assert_eq!(read(&memory, available_event), 1);
}

proptest! {
    /// Whatever the tables hold, a walk ends, and with at most as many ranges as a chain may have.
    #[test]
    fn no_table_leads_a_walk_astray(
        table in proptest::collection::vec(any::<[u8; 16]>(), 8),
        indirect in proptest::collection::vec((0_u16..8, 0_u16..12), 1..20),
        flags in 0_u16..8,
        length in prop_oneof![0_u32..400, any::<u32>()],
    ) {
        let memory = memory();
        for (index, bytes) in table.iter().enumerate() {
            memory.write_slice(bytes, GuestAddress(LAYOUT.table + index as u64 * 16)).unwrap();
        }
        for (index, (flags, next)) in indirect.iter().enumerate() {
            describe(&memory, INDIRECT + index as u64 * 16, (0, 1, *flags, *next));
        }
        describe(&memory, LAYOUT.table, (INDIRECT, length, flags, 1));
        if let Ok(chain) = walk_in(&memory) {
            prop_assert!(chain.readable.len() + chain.writable.len() <= 1024);
        }
    }
}
