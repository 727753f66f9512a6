//! What a front end may say while a ring runs, and what it is refused.

use crate::harness::{Control, Disk, RawFrontEnd, SharedRam, serve};
use std::fs::File;
use std::os::unix::fs::FileExt;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

/// Five writes, told to the device and not waited for.
fn five_writes(guest: &RawFrontEnd, position: u16, byte: u8) {
    for slot in 0..5 {
        let sector = u64::from(slot) * 1000;
        guest.offer_write(position.wrapping_add(slot), slot, sector, &[byte; 65536]);
    }
    guest.kick();
}

#[test]
fn a_ring_size_that_is_no_power_of_two_or_too_long_is_refused_and_the_socket_goes_on() {
    let served = serve(&[]);
    for size in [0, 3, 100, 1025, 2048, 65535] {
        let guest = RawFrontEnd::connect(&served.socket, SharedRam::new());
        assert!(guest.frontend.set_vring_num(0, size).is_err(), "{size}");
    }
    for size in [1, 16, 1024] {
        let guest = RawFrontEnd::connect(&served.socket, SharedRam::new());
        guest.frontend.set_vring_num(0, size).unwrap();
    }
    Disk::attach(&served.socket, 1)
        .first()
        .write(0, &[1; 512])
        .unwrap();
}

#[test]
fn what_a_running_ring_stands_on_cannot_be_changed() {
    let served = serve(&[]);
    let changes: [fn(&mut RawFrontEnd) -> bool; 4] = [
        |guest| guest.frontend.set_vring_num(0, 8).is_ok(),
        |guest| guest.frontend.set_vring_base(0, 0).is_ok(),
        |guest| guest.move_ring(0x100).is_ok(),
        |guest| guest.track().is_ok(),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut guest = RawFrontEnd::start(&served.socket, SharedRam::new(), 0);
        // The same addresses again are no change: QEMU repeats them when it switches the dirty log.
        guest.move_ring(0).unwrap();
        assert!(!change(&mut guest), "change {number}");
    }
}

#[test]
fn a_running_ring_takes_another_kick() {
    let served = serve(&[]);
    let mut guest = RawFrontEnd::start(&served.socket, SharedRam::new(), 0);
    for position in 0..20_u16 {
        guest.offer_write(position, 0, 0, &[1; 512]);
        guest.kick();
        guest.wait_used(position + 1);
        guest.change_kick();
    }
}

#[test]
fn a_disabled_ring_takes_nothing_and_goes_on_where_it_was() {
    let served = serve(&[]);
    let guest = RawFrontEnd::start(&served.socket, SharedRam::new(), 0);
    guest.enable_ring(false);
    guest.offer_write(0, 0, 0, &[1; 512]);
    guest.kick();
    // A message that takes its time: the daemon answers when the queue's thread has seen the kick, or could have.
    guest.share_memory();
    guest.share_memory();
    assert_eq!(guest.ram.used_index(), 0);
    guest.enable_ring(true);
    guest.wait_used(1);
}

#[test]
fn guest_memory_is_replaced_while_requests_are_in_flight() {
    let served = serve(&[]);
    let guest = RawFrontEnd::start(&served.socket, SharedRam::new(), 0);
    let mut position = 0_u16;
    for round in 0..50 {
        five_writes(&guest, position, round);
        guest.share_memory();
        position = position.wrapping_add(5);
        guest.wait_used(position);
        for slot in 0..5 {
            assert_eq!(guest.status(slot), 0);
        }
        guest.offer_read(position, 4, 4000, 512);
        guest.kick();
        position = position.wrapping_add(1);
        guest.wait_used(position);
        assert_eq!(guest.data::<512>(4), [round; 512]);
    }
}

#[test]
fn a_ring_is_drained_before_its_position_is_told() {
    let served = serve(&[]);
    for tracked in [false, true] {
        let ram = SharedRam::new();
        let mut memory = None;
        let mut position = 0_u16;
        for round in 0..20 {
            let guest = if tracked {
                RawFrontEnd::start_tracked(&served.socket, ram.clone(), &mut memory)
            } else {
                RawFrontEnd::start(&served.socket, ram.clone(), position)
            };
            five_writes(&guest, position, round);
            let start = position;
            let told = guest.frontend.get_vring_base(0).unwrap();
            position = u16::try_from(told).unwrap();
            // Whatever was taken is answered, and nothing comes after the answer.
            assert_eq!(guest.ram.used_index(), position);
            for entry in start..position {
                let head = guest.ram.used_head(entry);
                let slot = u16::try_from(head / 3).unwrap();
                assert_eq!(guest.status(slot), 0, "its status was written before");
            }
            guest.share_memory();
            assert_eq!(guest.ram.used_index(), position);
            guest.ram.set_available_index(position);
        }
    }
}

#[test]
fn a_reset_device_forgets_its_rings_and_starts_anew() {
    let served = serve(&[]);
    let (ram, mut memory) = (SharedRam::new(), None);
    let mut guest = RawFrontEnd::start_tracked(&served.socket, ram.clone(), &mut memory);
    five_writes(&guest, 0, 1);
    guest.frontend.reset_device().unwrap();
    // A driver that starts anew begins with empty rings.
    ram.write(0x2000, &[0; 64]);
    ram.write(0x3000, &[0; 256]);
    let features = guest.frontend.get_features().unwrap();
    guest.frontend.set_features(features & !(1 << 29)).unwrap();
    guest.start_ring(0);
    guest.offer_write(0, 0, 0, &[2; 512]);
    guest.kick();
    guest.wait_used(1);
    guest.share_memory();
    assert_eq!(ram.used_index(), 1, "nothing of before is done again");
    assert_eq!(ram.used_head(0), 0);
}

#[test]
fn memory_that_the_file_does_not_have_is_refused() {
    let served = serve(&[]);
    let guest = RawFrontEnd::connect(&served.socket, SharedRam::new());
    assert!(guest.share_more_than_there_is().is_err());
    drop(guest);
    RawFrontEnd::connect(&served.socket, SharedRam::new());
}

#[test]
fn a_hundred_front_ends_leave_no_descriptor_behind() {
    let served = serve(&[]);
    let mut control = Control::connect(&served.control);
    let mut descriptors = Vec::new();
    for round in 0..100_u16 {
        let guest = RawFrontEnd::start_tracked(&served.socket, SharedRam::new(), &mut None);
        guest.offer_write(0, 0, 0, &[1; 512]);
        guest.kick();
        guest.wait_used(1);
        drop(guest);
        control.wait_for_event("VOLUME_DISCONNECTED");
        if round > 0 {
            descriptors.push(served.daemon.descriptors());
        }
    }
    // What a connection held may be given back a moment after the event; so the least of the last ten counts.
    let least = |part: &[usize]| *part.iter().min().unwrap();
    assert!(
        least(&descriptors[89..]) <= least(&descriptors[..10]),
        "{descriptors:?}"
    );
}

/// Pages that are marked in a log, which is empty afterwards.
fn take_marked(log: &File) -> Vec<u64> {
    let mut bytes = [0_u8; 128];
    log.read_exact_at(&mut bytes, 0).unwrap();
    log.write_all_at(&[0; 128], 0).unwrap();
    (0..1024)
        .filter(|page| bytes[(page / 8) as usize] & 1 << (page % 8) != 0)
        .collect()
}

/// Reads something that was not there before; answers the pages that changed by it, but for the guest's own part of the ring.
fn changed_by_a_read(guest: &RawFrontEnd, position: u16, sector: u64) -> Vec<u64> {
    // The device may look at the ring before it is kicked, so the pages are noted before the offer.
    guest.forget_status(2);
    let before = guest.ram.pages();
    guest.offer_read(position, 2, sector, 8192);
    guest.kick();
    guest.wait_used(position + 1);
    assert_eq!(guest.status(2), 0);
    // All of it is over: the log is marked before a message is answered.
    guest.share_memory();
    let after = guest.ram.pages();
    let pages = (0_u64..).zip(before.iter().zip(&after));
    pages
        .filter(|(page, (before, after))| !matches!(page, 1 | 2) && before != after)
        .map(|(page, _)| page)
        .collect()
}

#[test]
fn pages_that_the_device_writes_are_logged_while_it_is_switched_on() {
    let served = serve(&[]);
    let guest = RawFrontEnd::start(&served.socket, SharedRam::new(), 0);
    for (position, byte) in (0_u16..).zip(1..=4_u8) {
        guest.offer_write(position, 0, u64::from(byte) * 64, &[byte; 8192]);
        guest.kick();
        guest.wait_used(position + 1);
    }
    // Used ring; status; data of slot 2, over two pages.
    let expected = [0x3, 0x50, 0x51, 0x52];
    let log = guest.log();
    assert_eq!(changed_by_a_read(&guest, 4, 64), expected);
    assert_eq!(take_marked(&log), expected);
    // The memory table was sent again meanwhile.
    assert_eq!(changed_by_a_read(&guest, 5, 128), expected);
    assert_eq!(take_marked(&log), expected);
    guest.switch_log(false);
    take_marked(&log);
    assert_eq!(changed_by_a_read(&guest, 6, 192), expected);
    assert_eq!(take_marked(&log), [0_u64; 0]);
    guest.switch_log(true);
    assert_eq!(changed_by_a_read(&guest, 7, 256), expected);
    assert_eq!(take_marked(&log), expected);
    guest.frontend.get_vring_base(0).unwrap();
}
