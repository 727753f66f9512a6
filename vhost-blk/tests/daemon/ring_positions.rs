//! Where a ring goes on after it was stopped, or after the daemon was killed.

use crate::harness::{Control, Daemon, RawFrontEnd, Served, SharedRam, serve, wait_until};
use uuid::Uuid;
use vhost::VhostBackend;
use vhost_blk_wire::command::{QueryWrites, SnapshotSetHold, SnapshotSetRelease, WriteMark};

#[test]
fn a_stopped_ring_has_published_what_is_done_and_gives_held_writes_back() {
    let served = serve(&[]);
    let (socket, control) = (&served.socket, &served.control);
    let mut control = Control::connect(control);
    let guest = RawFrontEnd::start(socket, SharedRam::new(), 0);
    guest.offer_write(0, 0, 0, &[1; 4096]);
    guest.kick();
    guest.wait_used(1);
    let set = Uuid::new_v4();
    control.prepare(set, &["disk"], None).unwrap();
    control
        .run(&SnapshotSetHold {
            set,
            limit_ms: 10_000,
        })
        .unwrap();
    let mark = WriteMark {
        volume: "disk".to_owned(),
        ranges: Vec::new(),
    };
    let mark = control.run(&mark).unwrap().mark;
    guest.offer_write(1, 1, 8, &[2; 4096]);
    guest.offer_write(2, 2, 16, &[3; 4096]);
    guest.kick();
    wait_until("both writes have left the ring", || {
        control.run(&QueryWrites { mark }).unwrap().writes == 2
    });
    // The daemon answers while writes are held, and says where to go on.
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 1);
    assert_eq!(guest.ram.used_index(), 1);
    assert_eq!(guest.status(1), 0xee);
    control.run(&SnapshotSetRelease { set }).unwrap();
    let ram = guest.ram.clone();
    drop(guest);
    let guest = RawFrontEnd::start(socket, ram, 1);
    guest.wait_used(3);
    assert_eq!((guest.status(1), guest.status(2)), (0, 0));
    control.abort(set).unwrap();
}

/// What QEMU does after a reconnect without in-flight tracking: go on at the used index.
#[test]
fn no_request_is_lost_when_the_daemon_is_killed_under_load() {
    let Served {
        scratch,
        mut daemon,
        socket,
        ..
    } = serve(&[]);
    let ram = SharedRam::new();
    let mut guest = RawFrontEnd::start(&socket, ram.clone(), 0);
    let mut position = 0_u16;
    for kill in 0..6_u64 {
        for round in 0..20_u64 {
            // Five writes at a time, waited for together.
            let start = position;
            for slot in 0..5_u16 {
                let sector = (u64::from(slot) * 1000 + (kill * 20 + round) * 8) % 20_000;
                guest.offer_write(position, slot, sector, &[(kill * 20 + round) as u8; 4096]);
                position = position.wrapping_add(1);
            }
            guest.kick();
            if round == 19 {
                let arguments = daemon.kill();
                drop(guest);
                daemon = Daemon::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
                let used = ram.used_index();
                assert!(
                    position.wrapping_sub(used) <= 5,
                    "from {start} to {position}: {used}"
                );
                guest = RawFrontEnd::start(&socket, ram.clone(), used);
            }
            guest.wait_used(position);
            for slot in 0..5 {
                assert_eq!(guest.status(slot), 0);
                let head = ram.used_head(start.wrapping_add(slot));
                assert_eq!(head, u32::from(slot) * 3, "in the order of arrival");
            }
        }
    }
    drop(guest);
    assert!(daemon.terminate().success());
    let disk = std::fs::read(scratch.path("disk.raw")).unwrap();
    for write in 0..120_usize {
        for slot in 0..5_usize {
            let sector = (slot * 1000 + write * 8) % 20_000;
            assert!(
                disk[sector * 512..][..4096]
                    .iter()
                    .all(|byte| *byte == write as u8)
            );
        }
    }
}

#[test]
fn the_write_cache_is_switched_and_the_setting_outlives_the_connection() {
    let served = serve(&[]);
    let socket = &served.socket;
    let ram = SharedRam::new();
    let mut guest = RawFrontEnd::start(socket, ram.clone(), 0);
    assert_eq!(guest.config(32, 1), [1]);
    guest.set_config(32, &[0]);
    assert_eq!(guest.config(32, 1), [0]);
    guest.offer_write(0, 0, 0, &[1; 512]);
    guest.kick();
    guest.wait_used(1);
    drop(guest);
    let mut guest = RawFrontEnd::start(socket, ram, 1);
    assert_eq!(guest.config(32, 1), [0]);
    assert_eq!(guest.config(0, 60).len(), 60);
}
