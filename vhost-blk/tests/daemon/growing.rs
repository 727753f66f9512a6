//! A disk grows while it is served: what its front end is told, what it may do then, what snapshots show, what is refused.

use crate::harness::{
    Control, Daemon, Disk, RawFrontEnd, SLOT_BYTES, Served, SharedRam, Workload,
    assert_shows_one_instant, serve, serve_disk, wait_until,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::process::Signal;
use serde_json::json;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use uuid::Uuid;
use vhost_blk_wire::command::{BlockResize, BlockResized, QueryVolumes};
use vhost_blk_wire::qmp::QmpError;
use vhost_blk_wire::types::Method;

const MIB: u64 = 1 << 20;

fn resize(control: &mut Control, size: u64) -> Result<BlockResized, QmpError> {
    control.run(&BlockResize {
        volume: "disk".to_owned(),
        size,
    })
}

/// The message of the specification: request 2, version 1, no payload.
fn hear_of_change(channel: &mut UnixStream) {
    let mut message = [0; 12];
    channel.read_exact(&mut message).unwrap();
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
}

fn has_heard_nothing(channel: &UnixStream) -> bool {
    channel.set_nonblocking(true).unwrap();
    let heard = (&*channel).read(&mut [0]);
    channel.set_nonblocking(false).unwrap();
    matches!(heard, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

/// Capacity as the front end reads it, in bytes.
fn capacity(guest: &mut RawFrontEnd) -> u64 {
    let sectors = guest.config(0, 8);
    u64::from_le_bytes(sectors.try_into().unwrap()) * 512
}

/// A write of one sector at this byte; its status.
fn write(guest: &RawFrontEnd, position: &mut u16, offset: u64, byte: u8) -> u8 {
    guest.offer_write(*position, 0, offset / 512, &[byte; 512]);
    guest.kick();
    *position += 1;
    guest.wait_used(*position);
    guest.status(0)
}

fn read(guest: &RawFrontEnd, position: &mut u16, offset: u64) -> [u8; 512] {
    guest.offer_read(*position, 0, offset / 512, 512);
    guest.kick();
    *position += 1;
    guest.wait_used(*position);
    assert_eq!(guest.status(0), 0);
    guest.data(0)
}

fn served() -> (Served, Control) {
    let served = serve_disk(MIB, &[]);
    let control = Control::connect(&served.control);
    (served, control)
}

#[test]
fn a_running_guest_hears_of_the_new_size_and_writes_behind_the_old_end() {
    let (served, mut control) = served();
    let mut guest = RawFrontEnd::connect(&served.socket, SharedRam::new());
    assert_eq!(capacity(&mut guest), MIB);
    let mut channel = guest.give_back_channel();
    guest.start_ring(0);
    let mut position = 0;
    assert_eq!(write(&guest, &mut position, MIB, 1), 1, "an I/O error");
    assert!(has_heard_nothing(&channel));

    let resized = resize(&mut control, 2 * MIB).unwrap();
    assert_eq!(resized.size_bytes, 2 * MIB);
    hear_of_change(&mut channel);
    assert_eq!(capacity(&mut guest), 2 * MIB);
    let event = control.wait_for_event("VOLUME_RESIZED");
    assert_eq!(event, json!({ "volume": "disk", "size-bytes": 2 * MIB }));
    assert_eq!(write(&guest, &mut position, MIB, 2), 0);
    assert_eq!(write(&guest, &mut position, 2 * MIB - 512, 3), 0);
    assert_eq!(write(&guest, &mut position, 2 * MIB, 4), 1);
    assert_eq!(read(&guest, &mut position, MIB), [2; 512]);
    assert_eq!(read(&guest, &mut position, MIB + 512), [0; 512]);

    // The size that it has is no news.
    resize(&mut control, 2 * MIB).unwrap();
    assert!(has_heard_nothing(&channel));
    let volumes = control.run(&QueryVolumes::default()).unwrap();
    assert_eq!(volumes[0].size_bytes, 2 * MIB);
}

#[test]
fn a_disk_that_nobody_uses_grows_and_is_that_long_ever_after() {
    let (mut served, mut control) = served();
    // Without a front end, and with one that gave no channel.
    resize(&mut control, 2 * MIB).unwrap();
    let mut guest = RawFrontEnd::connect(&served.socket, SharedRam::new());
    assert_eq!(capacity(&mut guest), 2 * MIB);
    resize(&mut control, 3 * MIB).unwrap();
    assert_eq!(capacity(&mut guest), 3 * MIB);
    drop((guest, control));
    for clean in [false, true] {
        served
            .daemon
            .signal(if clean { Signal::TERM } else { Signal::KILL });
        served.daemon.wait();
        served.daemon = served.daemon.restart();
        assert_eq!(
            Disk::attach(&served.socket, 1).capacity(),
            3 * MIB,
            "clean: {clean}"
        );
    }
}

#[test]
fn a_front_end_that_comes_back_hears_of_what_it_missed() {
    let (served, mut control) = served();
    let mut guest = RawFrontEnd::connect(&served.socket, SharedRam::new());
    assert_eq!(capacity(&mut guest), MIB);
    drop(guest);
    wait_until("the front end to be gone", || {
        !control.run(&QueryVolumes::default()).unwrap()[0].connected
    });
    resize(&mut control, 2 * MIB).unwrap();
    // It does not read the configuration again by itself, as QEMU does not when it reconnects.
    let guest = RawFrontEnd::connect(&served.socket, SharedRam::new());
    let mut channel = guest.give_back_channel();
    assert!(has_heard_nothing(&channel));
    guest.start_ring(0);
    hear_of_change(&mut channel);
}

#[test]
fn sizes_and_moments_that_cannot_be_are_refused_and_change_nothing() {
    let (served, mut control) = served();
    for size in [0, 512, MIB - 512, MIB + 1, 2 * MIB + 256, u64::MAX] {
        let error = resize(&mut control, size).unwrap_err();
        assert_eq!(error.class, "GenericError", "{size}: {}", error.desc);
        assert!(error.desc.contains(&size.to_string()), "{}", error.desc);
    }
    let nobody = json!({ "volume": "nobody", "size": 2 * MIB });
    let error = control.execute("block_resize", nobody).unwrap_err();
    assert_eq!(error.class, "DeviceNotFound");
    // From prepare to the verdict.
    let set = Uuid::new_v4();
    let refused = |control: &mut Control| {
        let error = resize(control, 2 * MIB).unwrap_err();
        assert_eq!(error.class, "SetInProgress", "{}", error.desc);
    };
    control.prepare(set, &["disk"], None).unwrap();
    refused(&mut control);
    let hold = json!({ "set": set, "limit-ms": 10_000 });
    control.execute("snapshot-set-hold", hold).unwrap();
    refused(&mut control);
    control.commit(set).unwrap();
    refused(&mut control);
    control.abort(set).unwrap();
    assert_eq!(Disk::attach(&served.socket, 1).capacity(), MIB);
    resize(&mut control, 2 * MIB).unwrap();
}

/// Writes go on all the while; every snapshot shows one moment, in the size of that moment.
fn grows_under_load(method: Method, engine: &str) {
    const QUEUES: usize = 2;
    const SLOTS: u64 = 51;
    let first_bytes = QUEUES as u64 * SLOTS * SLOT_BYTES as u64 + 2560;
    let served = serve_disk(first_bytes, &["--num-queues", "2", "--engine", engine]);
    let mut control = Control::connect(&served.control);
    let workload = Workload::start(Disk::attach(&served.socket, 2), SLOTS);
    let mut size_bytes = first_bytes;
    let mut taken = Vec::new();
    let mut holds = Vec::new();
    for round in 0..12_u64 {
        let before = workload.answered();
        wait_until("writes to go on", || {
            let now = workload.answered();
            now.iter()
                .zip(&before)
                .all(|(now, before)| *now > before + 20)
        });
        let before = workload.answered();
        let committed = control.take_set(&["disk"], method);
        let after = workload.answered();
        let snapshot = &committed.volumes[0].snapshot;
        assert_eq!(snapshot.size_bytes, size_bytes);
        taken.push((snapshot.snapshot, size_bytes, before, after));
        size_bytes += 512 * (1 + round * 5);
        holds.push(resize(&mut control, size_bytes).unwrap().hold_us);
    }
    workload.stop();
    println!("{method:?}, {engine}: writes held for {holds:?} us");
    for (snapshot, size_bytes, before, after) in taken {
        let image = control.read_snapshot(snapshot);
        assert_eq!(image.len() as u64, size_bytes);
        let tail = usize::try_from(first_bytes - 2560).unwrap();
        assert!(image[tail..].iter().all(|byte| *byte == 0));
        assert_eq!(before.len(), QUEUES);
        assert_shows_one_instant(&image, SLOTS, &before, &after);
    }
}

#[test]
fn a_disk_grows_under_load_between_redirect_on_write_snapshots() {
    grows_under_load(Method::Row, "uring");
}

#[test]
fn a_disk_grows_under_load_between_copy_on_write_snapshots() {
    grows_under_load(Method::Cow, "uring");
}

#[test]
fn a_disk_grows_under_load_without_io_uring() {
    grows_under_load(Method::Cow, "sync");
}

#[test]
fn a_daemon_that_is_killed_while_its_disk_grows_leaves_the_old_or_the_new_size() {
    let (mut served, _) = served();
    let (mut size_bytes, mut grown) = (MIB, 0);
    let mut random = SmallRng::seed_from_u64(5);
    for round in 0..40_u8 {
        let mut control = Control::connect(&served.control);
        let method = if round % 2 == 0 {
            Method::Row
        } else {
            Method::Cow
        };
        let mut disk = Disk::attach(&served.socket, 1);
        let last = size_bytes - 512;
        disk.first().write(last, &[round; 512]).unwrap();
        let taken = control.take_set(&["disk"], method);
        // Now and then another write of the last block, which then lives in the log, or is preserved there.
        let byte = if random.random() { round } else { !round };
        disk.first().write(last, &[byte; 512]).unwrap();
        disk.first().flush().unwrap();
        drop(disk);

        let wanted = size_bytes + 512 * random.random_range(1..40);
        let arguments = json!({ "volume": "disk", "size": wanted });
        control.start("block_resize", arguments);
        // The moment of the kill is drawn: a growth takes a few milliseconds.
        std::thread::sleep(Duration::from_micros(random.random_range(0..8_000)));
        served.daemon.signal(Signal::KILL);
        served.daemon.wait();
        let answered = control.try_answer::<BlockResized>().is_ok();
        served.daemon = served.daemon.restart();

        let mut control = Control::connect(&served.control);
        let mut disk = Disk::attach(&served.socket, 1);
        let found = disk.capacity();
        assert!(found == wanted || (found == size_bytes && !answered));
        grown += u32::from(found == wanted);
        let length = std::fs::metadata(served.scratch.path("disk.raw")).unwrap();
        assert_eq!(length.len(), found, "the base is as long as the disk");
        let behind = disk.first().read(size_bytes, (found - size_bytes) as usize);
        if found > size_bytes {
            assert!(behind.unwrap().iter().all(|byte| *byte == 0));
        }
        assert_eq!(disk.first().read(last, 512).unwrap(), [byte; 512]);
        let image = control.read_snapshot(taken.volumes[0].snapshot.snapshot);
        assert_eq!(image.len() as u64, size_bytes);
        assert_eq!(image[last as usize..], [round; 512]);
        size_bytes = found;
    }
    println!("of 40 growths that were killed {grown} were through");
    assert!(
        (1..40).contains(&grown),
        "every kill came too early, or too late"
    );
}

#[test]
fn a_daemon_that_took_over_tells_the_same_front_end() {
    let mut served = serve(&[]);
    let mut guest = RawFrontEnd::connect(&served.socket, SharedRam::new());
    assert_eq!(capacity(&mut guest), 16 * MIB);
    let mut channel = guest.give_back_channel();
    guest.start_ring(0);
    let mut position = 0;
    let mut control = Control::connect(&served.control);
    resize(&mut control, 17 * MIB).unwrap();
    hear_of_change(&mut channel);
    assert_eq!(capacity(&mut guest), 17 * MIB);
    assert_eq!(write(&guest, &mut position, 16 * MIB, 1), 0);

    let mut arguments = served.daemon.arguments.clone();
    arguments.push("--replace".to_owned());
    let next = Daemon::launch(arguments);
    assert!(served.daemon.wait().success());
    served.daemon = next;
    assert_eq!(read(&guest, &mut position, 16 * MIB), [1; 512]);
    assert!(has_heard_nothing(&channel), "it knows the size");

    let mut control = Control::connect(&served.control);
    resize(&mut control, 18 * MIB).unwrap();
    hear_of_change(&mut channel);
    assert_eq!(capacity(&mut guest), 18 * MIB);
    assert_eq!(write(&guest, &mut position, 17 * MIB, 2), 0);
}
