//! What chains become, and that no chain breaks anything.

use super::super::chain::{Chain, Descriptor, FLAG_WRITE};
use super::{Disk, Parsed, parse};
use crate::engine::testing::memory;
use crate::engine::{Op, Outcome, Request};
use proptest::prelude::*;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const DISK: Disk<'_> = Disk {
    size_bytes: 1 << 20,
    read_only: false,
    serial: "a serial of 20 bytes",
};
/// Where the tests put headers, data and status.
const HEADER: u64 = 0x100;
const DATA: u64 = 0x1000;
const STATUS: u64 = 0x200;
/// Last bytes of the first region; what follows is not mapped.
const BORDER: u64 = 0x1_0000;

fn readable(address: u64, length_bytes: u32) -> Descriptor {
    Descriptor {
        address,
        length_bytes,
        flags: 0,
        next: 0,
    }
}

fn writable(address: u64, length_bytes: u32) -> Descriptor {
    Descriptor {
        flags: FLAG_WRITE,
        ..readable(address, length_bytes)
    }
}

/// Parses what a chain of these descriptors names.
fn parsed(
    memory: &Arc<GuestMemoryMmap>,
    descriptors: impl IntoIterator<Item = Descriptor>,
    disk: Disk<'_>,
) -> Parsed {
    let mut chain = Chain::default();
    for descriptor in descriptors {
        if let Err(bad) = chain.push(descriptor) {
            return Parsed::Unanswerable(bad.0);
        }
    }
    parse(memory, &mut chain, disk)
}

fn with_header(kind: u32, sector: u64) -> Arc<GuestMemoryMmap> {
    let memory = memory();
    memory
        .write_slice(&kind.to_le_bytes(), GuestAddress(HEADER))
        .unwrap();
    memory
        .write_slice(&sector.to_le_bytes(), GuestAddress(HEADER + 8))
        .unwrap();
    memory
}

fn engine(parsed: Parsed) -> Request {
    let Parsed::Engine(request, _) = parsed else {
        panic!("{parsed:?}")
    };
    request
}

/// What the guest reads in its status byte.
fn status(memory: &Arc<GuestMemoryMmap>, parsed: Parsed) -> u8 {
    let Parsed::Now(outcome, answer) = parsed else {
        panic!("{parsed:?}")
    };
    answer.write(memory, outcome);
    memory.read_obj(GuestAddress(STATUS)).unwrap()
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

#[test]
fn a_read_names_its_range_and_its_memory() {
    let memory = with_header(IN, 8);
    let chain = [
        readable(HEADER, 16),
        writable(DATA, 4096),
        writable(STATUS, 1),
    ];
    let Parsed::Engine(request, answer) = parsed(&memory, chain, DISK) else {
        panic!()
    };
    assert_eq!(request.op, Op::Read);
    assert_eq!(
        (request.range.offset_bytes, request.range.length_bytes),
        (4096, 4096)
    );
    assert_eq!(request.buffers.length_bytes(), 4096);
    assert_eq!(answer.write(&memory, Outcome::Done), 4097);
    assert_eq!(answer.write(&memory, Outcome::Failed), 1);
}

#[test]
fn header_and_status_may_share_descriptors_with_data_or_be_split() {
    let memory = with_header(OUT, 0);
    let chain = [
        readable(HEADER, 4),
        readable(HEADER + 4, 12 + 500),
        readable(DATA, 12),
        writable(STATUS, 0),
        writable(STATUS, 1),
    ];
    let request = engine(parsed(&memory, chain, DISK));
    assert_eq!(request.range.length_bytes, 512);
    let memory = with_header(IN, 0);
    let chain = [readable(HEADER, 16), writable(STATUS - 512, 513)];
    let request = engine(parsed(&memory, chain, DISK));
    assert_eq!(request.buffers.length_bytes(), 512);
}

#[test]
fn a_request_outside_the_disk_is_an_error_and_nothing_else() {
    for (sector, length) in [
        (2048, 512),
        (2047, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 4096),
        (0, 100),
        (0, 0),
    ] {
        let memory = with_header(IN, sector);
        let chain = [
            readable(HEADER, 16),
            writable(DATA, length),
            writable(STATUS, 1),
        ];
        let parsed = parsed(&memory, chain, DISK);
        assert_eq!(
            status(&memory, parsed),
            IOERR,
            "sector {sector}, {length} bytes"
        );
    }
}

#[test]
fn an_unknown_kind_is_unsupported() {
    for kind in [2, 10, 14, 99, u32::MAX] {
        let memory = with_header(kind, 0);
        let chain = [readable(HEADER, 16), writable(STATUS, 1)];
        assert_eq!(status(&memory, parsed(&memory, chain, DISK)), UNSUPP);
    }
}

#[test]
fn the_serial_is_twenty_bytes_padded_with_zeroes() {
    let memory = with_header(GET_ID, 0);
    let disk = Disk {
        serial: "vda",
        ..DISK
    };
    memory.write_slice(&[0xff; 20], GuestAddress(DATA)).unwrap();
    let chain = [
        readable(HEADER, 16),
        writable(DATA, 20),
        writable(STATUS, 1),
    ];
    let parsed = parsed(&memory, chain, disk);
    assert_eq!(status(&memory, parsed), OK);
    let mut id = [0; 20];
    memory.read_slice(&mut id, GuestAddress(DATA)).unwrap();
    assert_eq!(&id, b"vda\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

fn clear_segment(
    kind: u32,
    sector: u64,
    sectors: u32,
    flags: u32,
) -> (Arc<GuestMemoryMmap>, Parsed) {
    let memory = with_header(kind, 0);
    memory
        .write_slice(&sector.to_le_bytes(), GuestAddress(DATA))
        .unwrap();
    memory
        .write_slice(&sectors.to_le_bytes(), GuestAddress(DATA + 8))
        .unwrap();
    memory
        .write_slice(&flags.to_le_bytes(), GuestAddress(DATA + 12))
        .unwrap();
    let chain = [
        readable(HEADER, 16),
        readable(DATA, 16),
        writable(STATUS, 1),
    ];
    let parsed = parsed(&memory, chain, DISK);
    (memory, parsed)
}

#[test]
fn discard_and_write_zeroes_say_what_they_clear() {
    let request = engine(clear_segment(DISCARD, 8, 16, 0).1);
    assert_eq!(request.op, Op::Discard);
    assert_eq!(
        (request.range.offset_bytes, request.range.length_bytes),
        (4096, 8192)
    );
    assert_eq!(
        engine(clear_segment(WRITE_ZEROES, 0, 1, 1).1).op,
        Op::WriteZeroes { may_unmap: true }
    );
    assert_eq!(
        engine(clear_segment(WRITE_ZEROES, 0, 1, 0).1).op,
        Op::WriteZeroes { may_unmap: false }
    );
}

#[test]
fn bad_discards_are_refused_as_the_specification_says() {
    for (kind, sector, sectors, flags, expected) in [
        (DISCARD, 0, 8, 1, UNSUPP),
        (DISCARD, 0, 8, 2, UNSUPP),
        (WRITE_ZEROES, 0, 8, 4, UNSUPP),
        (DISCARD, 2047, 2, 0, IOERR),
        (DISCARD, 0, u32::MAX, 0, IOERR),
        (DISCARD, u64::MAX, 1, 0, IOERR),
    ] {
        let (memory, parsed) = clear_segment(kind, sector, sectors, flags);
        assert_eq!(
            status(&memory, parsed),
            expected,
            "{kind} {sector}+{sectors} flags {flags}"
        );
    }
}

#[test]
fn a_read_only_disk_takes_no_change() {
    let disk = Disk {
        read_only: true,
        ..DISK
    };
    for kind in [OUT, DISCARD, WRITE_ZEROES] {
        let memory = with_header(kind, 0);
        let chain = [
            readable(HEADER, 16),
            readable(DATA, 512),
            writable(STATUS, 1),
        ];
        assert_eq!(status(&memory, parsed(&memory, chain, disk)), IOERR);
    }
    let memory = with_header(FLUSH, 0);
    let chain = [readable(HEADER, 16), writable(STATUS, 1)];
    assert_eq!(engine(parsed(&memory, chain, disk)).op, Op::Flush);
}

#[test]
fn memory_that_is_not_there_costs_the_request() {
    for chain in [
        vec![
            readable(HEADER, 16),
            writable(BORDER - 100, 512),
            writable(STATUS, 1),
        ],
        vec![
            readable(BORDER - 8, 16),
            writable(DATA, 512),
            writable(STATUS, 1),
        ],
        vec![
            readable(HEADER, 16),
            writable(u64::MAX - 100, 512),
            writable(STATUS, 1),
        ],
        vec![
            readable(HEADER, 16),
            writable(BORDER, u32::MAX),
            writable(STATUS, 1),
        ],
    ] {
        let memory = with_header(IN, 0);
        assert_eq!(status(&memory, parsed(&memory, chain, DISK)), IOERR);
    }
}

#[test]
fn without_a_place_for_the_status_a_chain_goes_back_as_it_is() {
    for chain in [
        vec![],
        vec![readable(HEADER, 16)],
        vec![readable(HEADER, 16), writable(STATUS, 0)],
        vec![readable(HEADER, 16), writable(BORDER, 1)],
        vec![writable(STATUS, 1), readable(HEADER, 16)],
        vec![readable(HEADER, 16); 2000],
    ] {
        let memory = with_header(IN, 0);
        let parsed = parsed(&memory, chain, DISK);
        assert!(matches!(parsed, Parsed::Unanswerable(_)), "{parsed:?}");
    }
}

proptest! {
    /// Whatever a guest writes: no panic, and what reaches the engine is inside the disk and has as much memory.
    #[test]
    fn no_chain_reaches_beyond_the_disk(
        kind in prop_oneof![0_u32..16, any::<u32>()],
        sector in prop_oneof![0_u64..4096, any::<u64>()],
        descriptors in proptest::collection::vec(
            (prop_oneof![0_u64..0x2_0000, 0xf_0000_u64..0x12_0000, any::<u64>()],
             prop_oneof![0_u32..20, Just(512), Just(4096), any::<u32>()], any::<bool>()),
            0..8,
        ),
        read_only in any::<bool>(),
    ) {
        let memory = with_header(kind, sector);
        let mut chain = vec![readable(HEADER, 16)];
        chain.extend(descriptors.into_iter().map(|(address, length_bytes, device_writes)| Descriptor {
            address, length_bytes, flags: if device_writes { FLAG_WRITE } else { 0 }, next: 0,
        }));
        // Writable ones last, so that more than the first check is reached.
        chain.sort_by_key(|descriptor| descriptor.flags);
        let disk = Disk { read_only, ..DISK };
        if let Parsed::Engine(request, answer) = parsed(&memory, chain, disk) {
            prop_assert!(request.range.offset_bytes + request.range.length_bytes <= disk.size_bytes);
            prop_assert!(!read_only || !request.op.changes_disk());
            if matches!(request.op, Op::Read | Op::Write) {
                prop_assert_eq!(request.buffers.length_bytes(), request.range.length_bytes);
                prop_assert!(request.range.length_bytes.is_multiple_of(512));
                let mut copy = vec![0; usize::try_from(request.range.length_bytes).unwrap()];
                request.buffers.read_at(0, &mut copy).unwrap();
            }
            answer.write(&memory, Outcome::Failed);
        }
    }
}
