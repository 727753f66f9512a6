//! Sets over the control socket, under load, read back and compared.

use crate::harness::{
    Control, Daemon, Disk, SLOT_BYTES, Scratch, Workload, assert_shows_one_instant, wait_until,
};
use rustix::process::Signal;
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;
use uuid::Uuid;
use vhost_blk_wire::command::{
    QuerySnapshots, QueryVolumes, QueryWrites, SnapshotDelete, SnapshotRevert, SnapshotSetCommit,
    SnapshotSetDelete, SnapshotSetHold, SnapshotSetMark, SnapshotSetRelease, WriteMark,
    WriteUnmark,
};
use vhost_blk_wire::qmp::QmpError;
use vhost_blk_wire::types::{ByteRange, Method, SnapshotState};

const SIZE: u64 = 32 << 20;

struct Rig {
    scratch: Scratch,
    daemon: Daemon,
    names: Vec<String>,
}

impl Rig {
    /// A daemon with disks "a", "b", ...
    fn new(disks: usize, extra: &[&str]) -> Self {
        let scratch = Scratch::new();
        let names: Vec<String> = ["a", "b", "c", "d"]
            .iter()
            .take(disks)
            .map(|name| (*name).to_owned())
            .collect();
        let control = scratch.path("control");
        let mut arguments = vec!["--control".to_owned(), control.to_str().unwrap().to_owned()];
        arguments.extend(extra.iter().map(|text| (*text).to_owned()));
        for name in &names {
            let path = scratch.disk(&format!("{name}.raw"), SIZE);
            let socket = scratch.path(&format!("{name}.sock"));
            arguments.push("--disk".to_owned());
            arguments.push(format!(
                "path={},socket={}",
                path.display(),
                socket.display()
            ));
        }
        let daemon = Daemon::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        Self {
            scratch,
            daemon,
            names,
        }
    }

    fn control(&self) -> Control {
        Control::connect(&self.scratch.path("control"))
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.scratch.path(&format!("{name}.sock"))
    }

    fn attach(&self, name: &str, queues: i32) -> Disk {
        Disk::attach(&self.socket(name), queues)
    }

    fn names(&self) -> Vec<&str> {
        self.names.iter().map(String::as_str).collect()
    }
}

fn class(result: Result<impl std::fmt::Debug, QmpError>) -> String {
    result.unwrap_err().class
}

/// Slots of each queue in the tests under load.
const SLOTS: u64 = 501;

fn sets_under_load(method: Method, engine: &str) {
    let rig = Rig::new(1, &["--engine", engine]);
    let mut control = rig.control();
    let workload = Workload::start(rig.attach("a", 3), SLOTS);
    let mut taken = Vec::new();
    for round in 0..4 {
        // Enough writes between the sets that blocks are written again.
        let enough: Vec<_> = workload
            .answered()
            .iter()
            .map(|count| count + 200)
            .collect();
        wait_until("some writes", || {
            workload
                .answered()
                .iter()
                .zip(&enough)
                .all(|(now, enough)| now >= enough)
        });
        // Both methods mix on one volume.
        let method = if round == 2 && method == Method::Row {
            Method::Cow
        } else {
            method
        };
        let set = Uuid::new_v4();
        control.prepare(set, &["a"], Some(method)).unwrap();
        control.mark(set).unwrap();
        let before = workload.answered();
        wait_until("a write in the window", || workload.answered() > before);
        let before = workload.answered();
        let committed = control.commit(set).unwrap();
        control.keep(set).unwrap();
        let after = workload.answered();
        let volume = &committed.volumes[0];
        assert_eq!(volume.snapshot.method, method);
        assert!(
            volume.writes_in_window.total() > 0,
            "the witness saw the load"
        );
        assert!(committed.hold_us > 0 && committed.since_mark_us >= committed.hold_us);
        taken.push((volume.snapshot.snapshot, before, after));
    }
    workload.stop();
    for (snapshot, before, after) in taken {
        let image = control.read_snapshot(snapshot);
        assert_eq!(before.len(), 3);
        assert_shows_one_instant(&image, SLOTS, &before, &after);
    }
}

#[test]
fn redirect_on_write_sets_under_load_show_one_instant_each() {
    sets_under_load(Method::Row, "uring");
}

#[test]
fn copy_on_write_sets_under_load_show_one_instant_each() {
    sets_under_load(Method::Cow, "uring");
}

#[test]
fn sets_under_load_hold_with_plain_system_calls_too() {
    sets_under_load(Method::Row, "sync");
    sets_under_load(Method::Cow, "sync");
}

/// One thread writes the same number to all disks, one after the other: at one instant no later disk can be ahead of an
/// earlier one, and none more than one write behind.
#[test]
fn several_disks_are_taken_at_one_instant() {
    let rig = Rig::new(3, &[]);
    let mut control = rig.control();
    let mut disks: Vec<Disk> = rig.names().iter().map(|name| rig.attach(name, 1)).collect();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = std::sync::Arc::clone(&stop);
    let writer = std::thread::spawn(move || {
        for number in 1_u64.. {
            if stopped.load(std::sync::atomic::Ordering::SeqCst) {
                break;
            }
            let block: Vec<u8> = number.to_le_bytes().repeat(512);
            for disk in &mut disks {
                disk.first().write(number % 64 * 4096, &block).unwrap();
            }
        }
        disks
    });
    let mut shown = Vec::new();
    for round in 0..8 {
        let method = if round % 2 == 0 {
            Method::Row
        } else {
            Method::Cow
        };
        let committed = control.take_set(&rig.names(), method);
        let newest: Vec<u64> = committed
            .volumes
            .iter()
            .map(|volume| {
                let image = control.read_snapshot(volume.snapshot.snapshot);
                let numbers = image.chunks(4096).take(64);
                numbers
                    .map(|block| u64::from_le_bytes(block[..8].try_into().unwrap()))
                    .max()
                    .unwrap()
            })
            .collect();
        assert!(
            newest.is_sorted_by(|earlier, later| earlier >= later),
            "{newest:?}"
        );
        assert!(newest[0] - newest[2] <= 1, "{newest:?}");
        shown.push(newest);
    }
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    writer.join().unwrap();
    assert!(
        shown.last() > shown.first(),
        "the writer went on: {shown:?}"
    );
}

#[test]
fn a_quiet_window_is_witnessed_as_quiet_and_one_write_is_not() {
    let rig = Rig::new(1, &[]);
    let mut control = rig.control();
    let mut disk = rig.attach("a", 1);
    disk.first().write(0, &[1; 4096]).unwrap();
    let committed = control.take_set(&["a"], Method::Row);
    assert_eq!(committed.volumes[0].writes_in_window.total(), 0);

    let set = Uuid::new_v4();
    control.prepare(set, &["a"], None).unwrap();
    control.mark(set).unwrap();
    disk.first().write(8192, &[2; 512]).unwrap();
    let count = control.commit(set).unwrap().volumes[0]
        .writes_in_window
        .clone();
    assert_eq!(
        (count.writes, count.discards, count.write_zeroes),
        (1, 0, 0)
    );
    assert_eq!(
        count.first,
        Some(ByteRange {
            offset_bytes: 8192,
            length_bytes: 512
        })
    );
    control.keep(set).unwrap();
}

#[test]
fn a_mark_begins_anew_and_exempt_areas_do_not_count() {
    let rig = Rig::new(1, &[]);
    let mut control = rig.control();
    let mut disk = rig.attach("a", 1);
    let set = Uuid::new_v4();
    control.prepare(set, &["a"], None).unwrap();
    control.mark(set).unwrap();
    disk.first().write(0, &[1; 4096]).unwrap();
    let mark = json!({ "set": set, "exempt": [
        { "volume": "a", "ranges": [{ "offset-bytes": 0, "length-bytes": 65536 }] } ] });
    control
        .run(&serde_json::from_value::<SnapshotSetMark>(mark).unwrap())
        .unwrap();
    disk.first().write(4096, &[1; 4096]).unwrap();
    disk.first().discard(65536, 4096).unwrap();
    let count = control.commit(set).unwrap().volumes[0]
        .writes_in_window
        .clone();
    assert_eq!((count.writes, count.discards), (0, 1));
}

#[test]
fn marks_of_a_connection_count_by_range() {
    let rig = Rig::new(1, &[]);
    let mut control = rig.control();
    let mut disk = rig.attach("a", 1);
    let ranges = vec![ByteRange {
        offset_bytes: 4096,
        length_bytes: 4096,
    }];
    let mark = control
        .run(&WriteMark {
            volume: "a".to_owned(),
            ranges,
        })
        .unwrap()
        .mark;
    disk.first().write(0, &[1; 4096]).unwrap();
    disk.first().write(0, &[1; 8192]).unwrap();
    disk.first().write_zeroes(4096, 512).unwrap();
    disk.first().read(4096, 4096).unwrap();
    let count = control.run(&QueryWrites { mark }).unwrap();
    assert_eq!((count.writes, count.write_zeroes), (1, 1));
    control.run(&WriteUnmark { mark }).unwrap();
    assert_eq!(class(control.run(&QueryWrites { mark })), "GenericError");
}

#[test]
fn a_daemon_that_was_stopped_in_the_window_breaks_the_hold_and_undoes_the_set() {
    let rig = Rig::new(2, &[]);
    let mut control = rig.control();
    let mut disk = rig.attach("a", 1);
    let set = Uuid::new_v4();
    control.prepare(set, &["a", "b"], None).unwrap();
    control.mark(set).unwrap();
    // Stopped while the command is under way; a limit of 1 s stands for the 10 s.
    rig.daemon.signal(Signal::STOP);
    control.start(
        "snapshot-set-commit",
        json!({ "set": set, "limit-ms": 1000 }),
    );
    std::thread::sleep(Duration::from_millis(1200));
    rig.daemon.signal(Signal::CONT);
    assert_eq!(class(control.answer()), "HoldBroken");
    control.wait_for_event("SNAPSHOT_SET_ABORTED");
    assert_eq!(control.run(&QuerySnapshots::default()).unwrap(), []);
    assert_eq!(class(control.keep(set)), "SetNotFound");
    disk.first().write(0, &[1; 4096]).unwrap();
}

#[test]
fn a_hold_holds_writes_but_not_reads_and_ends_the_set_when_it_lasts_too_long() {
    let rig = Rig::new(2, &[]);
    let mut control = rig.control();
    let mut disk = rig.attach("a", 1);
    disk.first().write(0, &[3; 4096]).unwrap();
    let set = Uuid::new_v4();
    control.prepare(set, &["a", "b"], None).unwrap();
    control
        .run(&SnapshotSetHold {
            set,
            limit_ms: 2000,
        })
        .unwrap();
    let queue = disk.first();
    queue.memory.fill(65536, &[4; 4096]);
    queue.start_write(0, 65536, 4096, 1);
    assert_eq!(
        queue.complete_within(1, Duration::from_millis(200)),
        [],
        "the write waits"
    );
    control.wait_for_event("SNAPSHOT_SET_ABORTED");
    assert_eq!(
        queue.complete(1),
        [(1, 0)],
        "and goes on when the hold has ended by itself"
    );
    assert_eq!(queue.read(0, 4096).unwrap(), vec![4; 4096]);
    assert_eq!(class(control.commit(set)), "SetNotFound");
}

#[test]
fn reads_go_on_while_writes_are_held() {
    let rig = Rig::new(1, &[]);
    let mut control = rig.control();
    let mut disk = rig.attach("a", 2);
    disk.queues[0].write(0, &[3; 4096]).unwrap();
    let set = Uuid::new_v4();
    control.prepare(set, &["a"], None).unwrap();
    control
        .run(&SnapshotSetHold {
            set,
            limit_ms: 10_000,
        })
        .unwrap();
    disk.queues[0].start_write(0, 65536, 4096, 1);
    assert_eq!(
        disk.queues[0].complete_within(1, Duration::from_millis(50)),
        []
    );
    assert_eq!(disk.queues[1].read(0, 4096).unwrap(), vec![3; 4096]);
    control.run(&SnapshotSetRelease { set }).unwrap();
    assert_eq!(disk.queues[0].complete(1), [(1, 0)]);
    control.abort(set).unwrap();
}

#[test]
fn a_set_held_over_its_commit_releases_when_told() {
    let rig = Rig::new(1, &[]);
    let mut control = rig.control();
    let mut disk = rig.attach("a", 1);
    let set = Uuid::new_v4();
    control.prepare(set, &["a"], None).unwrap();
    control.mark(set).unwrap();
    control
        .run(&SnapshotSetHold {
            set,
            limit_ms: 10_000,
        })
        .unwrap();
    let queue = disk.first();
    queue.memory.fill(0, &[9; 4096]);
    queue.start_write(0, 0, 4096, 1);
    assert_eq!(queue.complete_within(1, Duration::from_millis(50)), []);
    let committed = control.commit(set).unwrap();
    let count = &committed.volumes[0].writes_in_window;
    assert_eq!(
        count.writes, 1,
        "a held write speaks against the guest all the same"
    );
    assert_eq!(
        queue.complete_within(1, Duration::from_millis(50)),
        [],
        "still held"
    );
    control.run(&SnapshotSetRelease { set }).unwrap();
    assert_eq!(queue.complete(1), [(1, 0)]);
    control.keep(set).unwrap();
    let image = control.read_snapshot(committed.volumes[0].snapshot.snapshot);
    assert!(
        image.iter().all(|byte| *byte == 0),
        "the held write came after"
    );
}

#[test]
fn a_front_end_that_reconnects_during_a_hold_finds_its_write_waiting() {
    let rig = Rig::new(1, &[]);
    let mut control = rig.control();
    let set = Uuid::new_v4();
    control.prepare(set, &["a"], None).unwrap();
    control
        .run(&SnapshotSetHold {
            set,
            limit_ms: 10_000,
        })
        .unwrap();
    let mut disk = rig.attach("a", 1);
    disk.first().start_write(0, 0, 4096, 1);
    assert_eq!(
        disk.first().complete_within(1, Duration::from_millis(50)),
        []
    );
    drop(disk);
    let mut disk = rig.attach("a", 1);
    assert_eq!(disk.first().read(0, 512).unwrap(), [0; 512]);
    control.abort(set).unwrap();
    disk.first().write(0, &[1; 512]).unwrap();
}

#[test]
fn an_owner_that_disconnects_undoes_its_set_before_and_after_the_commit() {
    for committed in [false, true] {
        let rig = Rig::new(1, &[]);
        let mut witness = rig.control();
        let mut owner = rig.control();
        let set = Uuid::new_v4();
        owner.prepare(set, &["a"], None).unwrap();
        owner.mark(set).unwrap();
        if committed {
            owner.commit(set).unwrap();
            let found = witness.run(&QuerySnapshots::default()).unwrap();
            assert_eq!(found[0].state, SnapshotState::Provisional);
        }
        drop(owner);
        let data = witness.wait_for_event("SNAPSHOT_SET_ABORTED");
        assert_eq!(data["set"], json!(set));
        assert_eq!(witness.run(&QuerySnapshots::default()).unwrap(), []);
        assert_eq!(class(witness.keep(set)), "SetNotFound");
        // The volume is free for the next set.
        witness.take_set(&["a"], Method::Cow);
    }
}

#[test]
fn a_kept_set_survives_its_owner_a_kill_and_a_restart_and_a_provisional_one_does_not() {
    let rig = Rig::new(2, &[]);
    let mut control = rig.control();
    let kept = control.take_set(&["a", "b"], Method::Row);
    let set = Uuid::new_v4();
    control.prepare(set, &["a", "b"], None).unwrap();
    control.commit(set).unwrap();
    let Rig {
        scratch,
        daemon,
        names: _,
    } = rig;
    let arguments = daemon.kill();
    let _daemon = Daemon::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let mut control = Control::connect(&scratch.path("control"));
    let found = control.run(&QuerySnapshots::default()).unwrap();
    let ids: Vec<_> = found.iter().map(|snapshot| snapshot.snapshot).collect();
    assert_eq!(found.len(), 2, "{found:?}");
    for volume in &kept.volumes {
        assert!(ids.contains(&volume.snapshot.snapshot));
    }
    assert!(
        found
            .iter()
            .all(|snapshot| snapshot.state == SnapshotState::Kept)
    );
    assert_eq!(class(control.keep(set)), "SetNotFound");
    control.keep(kept.volumes[0].snapshot.set).unwrap();
}

#[test]
fn one_set_at_a_time_on_a_volume_and_every_id_only_once() {
    let rig = Rig::new(2, &[]);
    let mut control = rig.control();
    let set = Uuid::new_v4();
    control.prepare(set, &["a"], None).unwrap();
    assert_eq!(
        class(control.prepare(Uuid::new_v4(), &["b", "a"], None)),
        "SetInProgress"
    );
    assert_eq!(class(control.prepare(set, &["b"], None)), "InvalidState");
    let other = Uuid::new_v4();
    control.prepare(other, &["b"], None).unwrap();
    control.abort(other).unwrap();
    control.commit(set).unwrap();
    control.keep(set).unwrap();
    assert_eq!(class(control.prepare(set, &["a"], None)), "InvalidState");
    assert_eq!(class(control.abort(set)), "InvalidState");
}

#[test]
fn commands_that_do_not_fit_are_refused_by_class() {
    let rig = Rig::new(1, &[]);
    let mut control = rig.control();
    let set = Uuid::new_v4();
    assert_eq!(
        class(control.prepare(set, &["nosuch"], None)),
        "DeviceNotFound"
    );
    assert_eq!(class(control.prepare(set, &[], None)), "GenericError");
    assert_eq!(
        class(control.prepare(set, &["a", "a"], None)),
        "GenericError"
    );
    assert_eq!(class(control.commit(set)), "SetNotFound");
    assert_eq!(class(control.abort(set)), "SetNotFound");
    assert_eq!(
        class(control.run(&SnapshotDelete { snapshot: set })),
        "SnapshotNotFound"
    );
    assert_eq!(
        class(control.run(&SnapshotRevert { snapshot: set })),
        "SnapshotNotFound"
    );
    control.prepare(set, &["a"], None).unwrap();
    for limit_ms in [0, 10_001] {
        assert_eq!(
            class(control.run(&SnapshotSetCommit { set, limit_ms })),
            "GenericError"
        );
    }
    assert_eq!(class(control.keep(set)), "InvalidState");
    assert_eq!(
        class(control.run(&SnapshotSetRelease { set })),
        "InvalidState"
    );
    control.commit(set).unwrap();
    assert_eq!(class(control.commit(set)), "InvalidState");
    assert_eq!(
        class(control.run(&SnapshotSetDelete { set })),
        "InvalidState"
    );
    control.keep(set).unwrap();
}

#[test]
fn deleted_sets_are_gone_and_the_disk_becomes_plain_again() {
    let rig = Rig::new(2, &[]);
    let mut control = rig.control();
    let mut disk = rig.attach("a", 1);
    disk.first().write(0, &[1; 65536]).unwrap();
    let first = control.take_set(&["a", "b"], Method::Row);
    disk.first().write(4096, &[2; 4096]).unwrap();
    let second = control.take_set(&["a"], Method::Row);
    disk.first().write(8192, &[3; 4096]).unwrap();
    control
        .run(&SnapshotSetDelete {
            set: first.volumes[0].snapshot.set,
        })
        .unwrap();
    control.wait_for_event("SNAPSHOTS_DELETED");
    assert_eq!(control.run(&QuerySnapshots::default()).unwrap().len(), 1);
    control
        .run(&SnapshotDelete {
            snapshot: second.volumes[0].snapshot.snapshot,
        })
        .unwrap();
    wait_until("all blocks are settled back", || {
        control
            .run(&QueryVolumes::default())
            .unwrap()
            .iter()
            .all(|volume| volume.plain)
    });
    let base = std::fs::read(rig.scratch.path("a.raw")).unwrap();
    assert_eq!(base[4096], 2);
    assert_eq!(base[8192], 3);
    assert_eq!(disk.first().read(0, 16384).unwrap()[..], base[..16384]);
}

#[test]
fn a_revert_brings_the_disk_back_and_is_refused_while_a_front_end_is_connected() {
    let rig = Rig::new(1, &[]);
    let mut control = rig.control();
    let mut disk = rig.attach("a", 1);
    disk.first().write(0, &[1; 65536]).unwrap();
    let set = control.take_set(&["a"], Method::Row);
    let snapshot = set.volumes[0].snapshot.snapshot;
    disk.first().write(4096, &[2; 8192]).unwrap();
    assert_eq!(
        class(control.run(&SnapshotRevert { snapshot })),
        "InvalidState"
    );
    drop(disk);
    control.wait_for_event("VOLUME_DISCONNECTED");
    control.run(&SnapshotRevert { snapshot }).unwrap();
    let mut disk = rig.attach("a", 1);
    assert_eq!(disk.first().read(0, 65536).unwrap(), vec![1; 65536]);
}

/// Redirected data cannot be dropped, so a guest has to wait; it must not get an error, and reads must not wait.
#[test]
fn writes_wait_while_shadow_storage_is_full_and_go_on_when_there_is_room() {
    for engine in ["uring", "sync"] {
        let rig = Rig::new(1, &["--engine", engine, "--shadow-limit", "1048576"]);
        let mut control = rig.control();
        let mut disk = rig.attach("a", 1);
        let set = control.take_set(&["a"], Method::Row).volumes[0]
            .snapshot
            .set;
        let queue = disk.first();
        queue.memory.fill(0, &[6; 2 << 20]);
        for block in 0..512 {
            queue.start_write(block as u64 * 4096, block * 4096, 4096, block);
        }
        let done = queue.complete_within(512, Duration::from_millis(500));
        control.wait_for_event("SHADOW_STORAGE_FULL");
        assert!(
            !done.is_empty() && done.len() < 512,
            "{engine}: {} are through",
            done.len()
        );
        assert!(done.iter().all(|(_, result)| *result == 0));
        control.run(&SnapshotSetDelete { set }).unwrap();
        let rest = queue.complete(512 - done.len());
        assert!(rest.iter().all(|(_, result)| *result == 0), "{engine}");
        assert!(
            queue
                .read(0, 2 << 20)
                .unwrap()
                .iter()
                .all(|byte| *byte == 6)
        );
        drop(disk);
        assert!(rig.daemon.terminate().success());
    }
}

#[test]
fn a_snapshot_streams_through_a_pipe_whole() {
    let rig = Rig::new(1, &[]);
    let mut control = rig.control();
    let mut disk = rig.attach("a", 1);
    let pattern: Vec<u8> = (0..SLOT_BYTES).map(|byte| (byte % 253) as u8).collect();
    disk.first().write(1 << 20, &pattern).unwrap();
    let set = control.take_set(&["a"], Method::Cow);
    disk.first().write(1 << 20, &[0xff; SLOT_BYTES]).unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    control.getfd("pipe", &writer).unwrap();
    drop(writer);
    let collector = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut std::fs::File::from(reader), &mut bytes).unwrap();
        bytes
    });
    let read = json!({ "snapshot": set.volumes[0].snapshot.snapshot, "fdname": "pipe",
        "range": { "offset-bytes": 1 << 20, "length-bytes": 1 << 20 } });
    let done = control.execute("snapshot-read", read).unwrap();
    assert_eq!(done["length-bytes"], json!(1 << 20));
    assert_eq!(done["data-bytes"], json!(SLOT_BYTES));
    let bytes = collector.join().unwrap();
    assert_eq!(bytes.len(), 1 << 20);
    assert!(bytes[..SLOT_BYTES] == pattern[..]);
    assert!(bytes[SLOT_BYTES..].iter().all(|byte| *byte == 0));
}
