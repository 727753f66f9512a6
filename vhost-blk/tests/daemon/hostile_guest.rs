//! A guest that writes garbage into its ring may lose its requests or its device, but never the daemon or another disk.

use crate::harness::{Daemon, Descriptor, Disk, RawFrontEnd, Scratch, SharedRam};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::path::PathBuf;
use std::time::Duration;

fn serve() -> (Scratch, Daemon, PathBuf, PathBuf) {
    let scratch = Scratch::new();
    let disks = ["a", "b"].map(|name| {
        let disk = scratch.disk(&format!("{name}.raw"), 16 << 20);
        let socket = scratch.path(&format!("{name}.sock"));
        (
            format!("path={},socket={}", disk.display(), socket.display()),
            socket,
        )
    });
    let daemon = Daemon::start(&["--disk", &disks[0].0, "--disk", &disks[1].0]);
    let [(_, first), (_, second)] = disks;
    (scratch, daemon, first, second)
}

/// Processor time of the daemon so far.
fn processor_time(daemon: &Daemon) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.id())).unwrap();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

#[test]
fn random_descriptors_hurt_nobody_else() {
    let (_scratch, daemon, first, second) = serve();
    let mut other = Disk::attach(&second, 1);
    let mut random = SmallRng::seed_from_u64(3);
    for round in 0..20 {
        let ram = SharedRam::new();
        let guest = RawFrontEnd::start(&first, ram, 0);
        // Headers that are likely to be understood, at many places.
        for place in 0..64_u64 {
            let mut header = Vec::new();
            header.extend(random.random_range(0..15_u32).to_le_bytes());
            header.extend(0_u32.to_le_bytes());
            let sector = if random.random() {
                random.random_range(0..40_000)
            } else {
                random.random()
            };
            header.extend(u64::to_le_bytes(sector));
            guest.ram.write(0x1_0000 + place * 16, &header);
        }
        let mut position = 0_u16;
        for _ in 0..200 {
            for index in 0..16 {
                let address = match random.random_range(0..4) {
                    0 => random.random(),
                    1 => random.random_range(0..5 << 20),
                    _ => 0x1_0000 + random.random_range(0..64) * 16,
                };
                let length = match random.random_range(0..4) {
                    0 => random.random(),
                    1 => random.random_range(0..20),
                    2 => 512 * random.random_range(0..64),
                    _ => 16,
                };
                let flags = random.random_range(0..8);
                let next = random.random_range(0..20);
                guest.ram.describe(
                    index,
                    Descriptor {
                        address,
                        length,
                        flags,
                        next,
                    },
                );
            }
            guest
                .ram
                .set_available(position, random.random_range(0..18));
            position = position.wrapping_add(1);
            guest.ram.set_available_index(position);
            guest.kick();
        }
        drop(guest);
        other.first().write(round * 4096, &[7; 4096]).unwrap();
        assert_eq!(
            other.first().read(round * 4096, 4096).unwrap(),
            vec![7; 4096]
        );
    }
    drop(other);
    Disk::attach(&first, 1).first().write(0, &[1; 512]).unwrap();
    assert!(daemon.terminate().success());
}

#[test]
fn an_available_index_that_jumps_is_not_followed_and_costs_no_processor() {
    let (_scratch, daemon, first, _second) = serve();
    let guest = RawFrontEnd::start(&first, SharedRam::new(), 0);
    guest.ram.set_available_index(5000);
    guest.kick();
    let before = processor_time(&daemon);
    std::thread::sleep(Duration::from_millis(500));
    let spent = processor_time(&daemon) - before;
    assert!(spent < Duration::from_millis(200), "{spent:?} of 500 ms");
    assert_eq!(guest.ram.used_index(), 0);
    drop(guest);
    assert!(daemon.terminate().success());
}

#[test]
fn a_ring_that_points_at_itself_ends() {
    let (_scratch, daemon, first, _second) = serve();
    let guest = RawFrontEnd::start(&first, SharedRam::new(), 0);
    guest.ram.describe(
        0,
        Descriptor {
            address: 0x1_0000,
            length: 16,
            flags: 1,
            next: 1,
        },
    );
    guest.ram.describe(
        1,
        Descriptor {
            address: 0x1_0000,
            length: 16,
            flags: 1,
            next: 0,
        },
    );
    guest.ram.set_available(0, 0);
    guest.ram.set_available_index(1);
    guest.kick();
    guest.wait_used(1);
    guest.offer_write(1, 1, 0, &[3; 512]);
    guest.kick();
    guest.wait_used(2);
    assert_eq!(guest.status(1), 0);
    drop(guest);
    assert!(daemon.terminate().success());
}
