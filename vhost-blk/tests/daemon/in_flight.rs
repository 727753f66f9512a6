//! In-flight memory: what a killed daemon had not answered is done by the next, what it had answered is not.

use crate::harness::{
    Control, Daemon, InFlightMemory, RawFrontEnd, Served, SharedRam, serve, wait_until,
};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use uuid::Uuid;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vhost_blk_wire::command::{QueryWrites, SnapshotSetHold, SnapshotSetRelease, WriteMark};

fn kill_and_restart(daemon: Daemon) -> Daemon {
    let arguments = daemon.kill();
    Daemon::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Holds all writes, until the set is released, aborted, or its daemon dies.
fn hold(control: &mut Control) -> (Uuid, u64) {
    let set = Uuid::new_v4();
    control.prepare(set, &["disk"], None).unwrap();
    let limit_ms = 10_000;
    control.run(&SnapshotSetHold { set, limit_ms }).unwrap();
    let mark = WriteMark {
        volume: "disk".to_owned(),
        ranges: Vec::new(),
    };
    (set, control.run(&mark).unwrap().mark)
}

fn wait_for_writes(control: &mut Control, mark: u64, count: u64) {
    wait_until("writes have left the ring", || {
        control.run(&QueryWrites { mark }).unwrap().writes == count
    });
}

#[test]
fn with_in_flight_memory_a_read_overtakes_a_held_write_and_without_it_does_not() {
    for tracked in [true, false] {
        let served = serve(&[]);
        let mut control = Control::connect(&served.control);
        let ram = SharedRam::new();
        let guest = if tracked {
            RawFrontEnd::start_tracked(&served.socket, ram, &mut None)
        } else {
            RawFrontEnd::start(&served.socket, ram, 0)
        };
        let (set, mark) = hold(&mut control);
        guest.offer_write(0, 0, 0, &[1; 4096]);
        guest.offer_read(1, 1, 64, 4096);
        guest.kick();
        wait_for_writes(&mut control, mark, 1);
        if tracked {
            guest.wait_used(1);
            assert_eq!(guest.ram.used_head(0), 3, "the read's head");
            assert_eq!((guest.status(0), guest.status(1)), (0xee, 0));
        } else {
            assert_eq!(guest.ram.used_index(), 0);
        }
        control.run(&SnapshotSetRelease { set }).unwrap();
        guest.wait_used(2);
        assert_eq!(guest.ram.used_head(1), if tracked { 0 } else { 3 });
        assert_eq!((guest.status(0), guest.status(1)), (0, 0));
        control.abort(set).unwrap();
    }
}

#[test]
fn the_next_daemon_does_what_was_in_flight_and_nothing_else() {
    let Served {
        scratch,
        daemon,
        socket,
        control,
    } = serve(&[]);
    let mut client = Control::connect(&control);
    let (ram, mut memory) = (SharedRam::new(), None);
    let guest = RawFrontEnd::start_tracked(&socket, ram.clone(), &mut memory);
    let (_, mark) = hold(&mut client);
    guest.offer_write(0, 0, 0, &[1; 4096]);
    guest.offer_read(1, 1, 64, 4096);
    guest.offer_write(2, 2, 8, &[2; 4096]);
    guest.kick();
    wait_for_writes(&mut client, mark, 2);
    guest.wait_used(1);
    // Answered: if it were done again, the status would be written again.
    guest.forget_status(1);
    let daemon = kill_and_restart(daemon);
    drop(guest);
    // Not kicked: what is in flight is done by itself. And a new request comes after it.
    let guest = RawFrontEnd::start_tracked(&socket, ram, &mut memory);
    guest.wait_used(3);
    wait_until("the interrupt", || guest.take_interrupts());
    assert_eq!(guest.status(1), 0xee);
    assert_eq!((guest.status(0), guest.status(2)), (0, 0));
    let mut heads = [guest.ram.used_head(1), guest.ram.used_head(2)];
    heads.sort_unstable();
    assert_eq!(heads, [0, 6]);
    guest.offer_write(3, 1, 16, &[3; 4096]);
    guest.kick();
    guest.wait_used(4);
    assert_eq!(guest.ram.used_head(3), 3);
    drop(guest);
    assert!(daemon.terminate().success());
    let disk = std::fs::read(scratch.path("disk.raw")).unwrap();
    for (block, byte) in [(0, 1), (1, 2), (2, 3)] {
        assert_eq!(disk[block * 4096..][..4096], [byte; 4096]);
    }
}

#[test]
fn no_request_is_lost_or_answered_twice_when_the_daemon_is_killed_under_load() {
    let Served {
        scratch,
        mut daemon,
        socket,
        ..
    } = serve(&[]);
    let (ram, mut memory) = (SharedRam::new(), None);
    let mut guest = RawFrontEnd::start_tracked(&socket, ram.clone(), &mut memory);
    let mut position = 0_u16;
    for round in 0..200_u64 {
        let start = position;
        for slot in 0..5_u16 {
            let sector = u64::from(slot) * 4000 + round % 100 * 8;
            guest.offer_write(position, slot, sector, &[round as u8; 4096]);
            position = position.wrapping_add(1);
        }
        guest.kick();
        if round % 20 == 19 {
            daemon = kill_and_restart(daemon);
            drop(guest);
            guest = RawFrontEnd::start_tracked(&socket, ram.clone(), &mut memory);
        }
        guest.wait_used(position);
        let mut heads: Vec<u32> = (0..5)
            .map(|entry| ram.used_head(start.wrapping_add(entry)))
            .collect();
        heads.sort_unstable();
        assert_eq!(heads, [0, 3, 6, 9, 12], "each once, in whatever order");
        for slot in 0..5 {
            assert_eq!(guest.status(slot), 0);
        }
    }
    assert_eq!(
        guest.frontend.get_vring_base(0).unwrap(),
        u32::from(position)
    );
    drop(guest);
    assert!(daemon.terminate().success());
    let disk = std::fs::read(scratch.path("disk.raw")).unwrap();
    for round in 100..200_usize {
        for slot in 0..5_usize {
            let start = (slot * 4000 + round % 100 * 8) * 512;
            assert!(
                disk[start..][..4096]
                    .iter()
                    .all(|byte| *byte == round as u8)
            );
        }
    }
}

#[test]
fn memory_that_lies_costs_the_ring_and_nothing_else() {
    let served = serve(&[]);
    let mut control = Control::connect(&served.control);
    let (ram, mut memory) = (SharedRam::new(), None);
    drop(RawFrontEnd::start_tracked(
        &served.socket,
        ram.clone(),
        &mut memory,
    ));
    // A used index from the future.
    let InFlightMemory { file, .. } = memory.as_ref().unwrap();
    file.write_all_at(&1000_u16.to_le_bytes(), 14).unwrap();
    let guest = RawFrontEnd::start_tracked(&served.socket, ram.clone(), &mut memory);
    let told = control.wait_for_event("QUEUE_FAILED");
    assert_eq!(told["queue"], 0);
    guest.offer_write(0, 0, 0, &[1; 512]);
    guest.kick();
    drop(guest);
    let guest = RawFrontEnd::start(&served.socket, ram, 0);
    guest.wait_used(1);
    assert_eq!(guest.status(0), 0);
    drop(guest);
    assert!(served.daemon.terminate().success());
}

#[test]
fn a_ring_with_in_flight_memory_is_stopped_when_held_writes_are_through() {
    let served = serve(&[]);
    let mut control = Control::connect(&served.control);
    let (ram, mut memory) = (SharedRam::new(), None);
    let guest = RawFrontEnd::start_tracked(&served.socket, ram.clone(), &mut memory);
    let (set, mark) = hold(&mut control);
    guest.offer_write(0, 0, 0, &[1; 4096]);
    guest.kick();
    wait_for_writes(&mut control, mark, 1);
    // The daemon waits for the write, which waits for the release.
    let stopping = guest.frontend.clone();
    let stopping = std::thread::spawn(move || stopping.get_vring_base(0).unwrap());
    control.run(&SnapshotSetRelease { set }).unwrap();
    assert_eq!(stopping.join().unwrap(), 1);
    assert_eq!((ram.used_index(), guest.status(0)), (1, 0));
    control.abort(set).unwrap();
}

/// A daemon that was started after one that was killed with a write of ones to block 0 in flight on queue 0. Of the connection neither
/// queue runs yet, and queue 1 has a write of twos to the same block on its ring.
struct Cut {
    served: Served,
    memory: InFlightMemory,
    first: RawFrontEnd,
    second: RawFrontEnd,
}

impl Cut {
    fn new() -> Self {
        let mut served = serve(&[]);
        let mut control = Control::connect(&served.control);
        let ram = SharedRam::new();
        let mut first = RawFrontEnd::connect(&served.socket, ram.clone());
        let wanted = VhostUserInflight::new(0, 0, 2, 16);
        let (shape, file) = first.frontend.get_inflight_fd(&wanted).unwrap();
        let memory = InFlightMemory { shape, file };
        let hand_over = |guest: &mut RawFrontEnd| {
            let number = memory.file.as_raw_fd();
            guest
                .frontend
                .set_inflight_fd(&memory.shape, number)
                .unwrap();
        };
        hand_over(&mut first);
        first.start_ring(0);
        first.second().start_ring(0);
        let (_, mark) = hold(&mut control);
        first.offer_write(0, 0, 0, &[1; 4096]);
        first.kick();
        wait_for_writes(&mut control, mark, 1);
        served.daemon = kill_and_restart(served.daemon);
        drop(first);
        let mut first = RawFrontEnd::connect(&served.socket, ram);
        hand_over(&mut first);
        let second = first.second();
        second.offer_write(0, 1, 0, &[2; 4096]);
        second.kick();
        Self {
            served,
            memory,
            first,
            second,
        }
    }

    /// Starts queue 1 alone: it must not take its request.
    fn start_second(&self) {
        self.second.start_ring(0);
        // Orders are obeyed between passes over the ring.
        for _ in 0..5 {
            self.second.enable_ring(true);
        }
        let mut marked = [0];
        let entry = (16 + 16 * 16_u64).next_multiple_of(64) + 16 + 3 * 16;
        self.memory.file.read_exact_at(&mut marked, entry).unwrap();
        assert_eq!((marked, self.second.ram.used_index()), ([0], 0), "taken");
    }

    fn block(self) -> u8 {
        drop(self.second);
        drop(self.first);
        assert!(self.served.daemon.terminate().success());
        let disk = std::fs::read(self.served.scratch.path("disk.raw")).unwrap();
        assert!(disk[..4096].iter().all(|byte| *byte == disk[0]));
        disk[0]
    }
}

#[test]
fn nothing_new_is_taken_on_any_queue_before_what_was_in_flight_on_all_is_done() {
    let cut = Cut::new();
    cut.start_second();
    cut.first.start_ring(0);
    cut.first.wait_used(1);
    cut.second.wait_used(1);
    assert_eq!((cut.first.status(0), cut.second.status(1)), (0, 0));
    assert_eq!(cut.block(), 2, "what was in flight came after what is new");
}

#[test]
fn what_a_hold_keeps_in_flight_again_keeps_out_what_is_new() {
    let cut = Cut::new();
    let mut control = Control::connect(&cut.served.control);
    let (set, _) = hold(&mut control);
    cut.first.start_ring(0);
    cut.start_second();
    assert_eq!(cut.first.ram.used_index(), 0);
    control.run(&SnapshotSetRelease { set }).unwrap();
    cut.second.wait_used(1);
    assert_eq!(cut.first.ram.used_index(), 1);
    control.abort(set).unwrap();
    assert_eq!(cut.block(), 2);
}

#[test]
fn a_queue_that_is_stopped_keeps_no_other_waiting() {
    let cut = Cut::new();
    cut.start_second();
    assert_eq!(cut.first.frontend.get_vring_base(0).unwrap(), 0);
    cut.second.wait_used(1);
    assert_eq!((cut.first.status(0), cut.block()), (0xee, 2));
}

#[test]
fn after_a_reset_nothing_is_waited_for() {
    let mut cut = Cut::new();
    cut.first.frontend.reset_device().unwrap();
    let features = cut.first.frontend.get_features().unwrap();
    let features = features & !(1 << 29);
    cut.first.frontend.set_features(features).unwrap();
    cut.second.start_ring(0);
    cut.second.wait_used(1);
    assert_eq!((cut.first.status(0), cut.block()), (0xee, 2));
}

#[test]
fn a_queue_that_does_not_come_back_is_waited_for_for_a_while_and_told_of() {
    let cut = Cut::new();
    let mut control = Control::connect(&cut.served.control);
    cut.start_second();
    let told = control.wait_for_event("REQUESTS_OVERTAKEN");
    assert_eq!(
        (&told["volume"], &told["requests"]),
        (&"disk".into(), &1.into())
    );
    cut.second.wait_used(1);
    assert_eq!(cut.block(), 2);
}
