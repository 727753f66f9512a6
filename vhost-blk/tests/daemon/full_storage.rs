//! Shadow storage is full: what is held, what is dropped, what is told.

use crate::harness::{Control, Daemon, Disk, Scratch, wait_until};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;
use vhost_blk_wire::command::{QuerySnapshots, QueryVolumes, SnapshotDelete};
use vhost_blk_wire::types::Method;

const SIZE: u64 = 32 << 20;
const MIB: usize = 1 << 20;

struct Rig {
    scratch: Scratch,
    _daemon: Daemon,
}

impl Rig {
    fn new(shadow_storage: Option<&Path>, extra: &[&str]) -> Self {
        let scratch = Scratch::new();
        let disk = scratch.disk("a.raw", SIZE);
        Self::serving(scratch, &disk, shadow_storage, extra)
    }

    fn serving(
        scratch: Scratch,
        disk: &Path,
        shadow_storage: Option<&Path>,
        extra: &[&str],
    ) -> Self {
        let shadow = shadow_storage.map_or_else(|| scratch.path("a.shadow"), Path::to_path_buf);
        let (socket, control) = (scratch.path("a.sock"), scratch.path("control"));
        let paths: Vec<_> = [disk, &socket, &control, &shadow]
            .map(|path| path.to_str().unwrap().to_owned())
            .to_vec();
        let mut arguments = vec!["--disk", &paths[0], "--socket", &paths[1]];
        arguments.extend(["--control", &paths[2], "--shadow-storage", &paths[3]]);
        arguments.extend(extra);
        let daemon = Daemon::start(&arguments);
        Self {
            scratch,
            _daemon: daemon,
        }
    }

    fn control(&self) -> Control {
        Control::connect(&self.scratch.path("control"))
    }

    fn attach(&self) -> Disk {
        Disk::attach(&self.scratch.path("a.sock"), 1)
    }
}

/// Writes `value` over the first bytes, a block at a time, all at once; the numbers of those that were answered in time.
fn start_filling(disk: &mut Disk, blocks: usize, value: u8) {
    let queue = disk.first();
    queue.memory.fill(0, &vec![value; blocks * 4096]);
    for block in 0..blocks {
        queue.start_write(block as u64 * 4096, block * 4096, 4096, block);
    }
}

fn all_went_well(done: &[(usize, i32)]) {
    assert!(done.iter().all(|(_, result)| *result == 0));
}

#[test]
fn copy_on_write_drops_its_oldest_snapshots_and_the_guest_goes_on() {
    let rig = Rig::new(None, &["--shadow-limit", "1048576"]);
    let mut control = rig.control();
    let mut disk = rig.attach();
    let mut sets = Vec::new();
    // Each round preserves 128 blocks of 256 that there is room for.
    for round in 0..5_u8 {
        sets.push(
            control.take_set(&["a"], Method::Cow).volumes[0]
                .snapshot
                .snapshot,
        );
        start_filling(&mut disk, 128, round + 1);
        all_went_well(&disk.first().complete(128));
    }
    let told = control.wait_for_event("SNAPSHOTS_DELETED");
    assert_eq!(told, json!({ "snapshots": [sets[0]], "reason": "no-room" }));
    let left = control.run(&QuerySnapshots::default()).unwrap();
    let left: Vec<_> = left.iter().map(|snapshot| snapshot.snapshot).collect();
    assert!(!left.is_empty() && left.len() < 5, "{left:?}");
    assert_eq!(left, sets[5 - left.len()..], "the newest are left");
    for (round, snapshot) in sets.iter().enumerate().skip(5 - left.len()) {
        let image = control.read_snapshot(*snapshot);
        assert!(
            image[..128 * 4096]
                .iter()
                .all(|byte| usize::from(*byte) == round),
            "what is left is right"
        );
    }
}

#[test]
fn a_redirect_on_write_snapshot_is_not_dropped_but_a_copy_on_write_one_beside_it_is() {
    let rig = Rig::new(None, &["--shadow-limit", "1048576"]);
    let mut control = rig.control();
    let mut disk = rig.attach();
    let kept = control.take_set(&["a"], Method::Row).volumes[0]
        .snapshot
        .snapshot;
    // Whole neighbourhoods: nothing beside them is preserved ahead.
    start_filling(&mut disk, 96, 1);
    all_went_well(&disk.first().complete(96));
    let dropped = control.take_set(&["a"], Method::Cow).volumes[0]
        .snapshot
        .snapshot;
    start_filling(&mut disk, 96, 2);
    all_went_well(&disk.first().complete(96));
    let also_kept = control.take_set(&["a"], Method::Row).volumes[0]
        .snapshot
        .snapshot;
    start_filling(&mut disk, 256, 3);
    // 256 new blocks beside the 96 of the first round do not fit: the rest waits.
    let done = disk.first().complete_within(256, Duration::from_secs(1));
    let told = control.wait_for_event("SNAPSHOTS_DELETED");
    assert_eq!(told, json!({ "snapshots": [dropped], "reason": "no-room" }));
    all_went_well(&done);
    assert_eq!(done.len(), 160);
    let left = control.run(&QuerySnapshots::default()).unwrap();
    let left: Vec<_> = left.iter().map(|snapshot| snapshot.snapshot).collect();
    assert_eq!(left, [kept, also_kept]);
    for snapshot in left {
        control.run(&SnapshotDelete { snapshot }).unwrap();
    }
    all_went_well(&disk.first().complete(256 - done.len()));
}

#[test]
fn an_open_set_that_stands_in_the_way_is_undone_and_told() {
    let rig = Rig::new(None, &["--shadow-limit", "1048576"]);
    let mut control = rig.control();
    let mut disk = rig.attach();
    let set = Uuid::new_v4();
    control.prepare(set, &["a"], Some(Method::Cow)).unwrap();
    control.commit(set).unwrap();
    start_filling(&mut disk, 512, 1);
    all_went_well(&disk.first().complete(512));
    let told = control.wait_for_event("SNAPSHOT_SET_ABORTED");
    assert_eq!(told["set"], json!(set));
    let reason = told["reason"].as_str().unwrap();
    assert!(reason.contains("full"), "{reason}");
    assert_eq!(control.keep(set).unwrap_err().class, "SetNotFound");
}

/// A small file system of its own; unmounted at the end.
struct SmallFileSystem(PathBuf);

impl SmallFileSystem {
    fn mount(at: PathBuf, bytes: usize) -> Option<Self> {
        std::fs::create_dir_all(&at).unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"])
            .arg(&at)
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(at)),
            Ok(output) => {
                let why = String::from_utf8_lossy(&output.stderr);
                println!("skipped: cannot mount a small file system: {why}");
                None
            }
            Err(error) => {
                println!("skipped: cannot mount a small file system: {error}");
                None
            }
        }
    }

    /// Leaves room for as many bytes, about; what takes the rest.
    fn leave(&self, bytes: usize) -> PathBuf {
        let filler = self.0.join("filler");
        let mut taken = 0;
        let free = rustix::fs::statvfs(&self.0).unwrap();
        let free = usize::try_from(free.f_bavail * free.f_frsize).unwrap();
        if free > bytes {
            taken = free - bytes;
        }
        // The daemon takes some meanwhile: as much as there is.
        let mut file = std::fs::File::create(&filler).unwrap();
        let _full = std::io::Write::write_all(&mut file, &vec![1; taken]);
        filler
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        // The daemon may be on its way out.
        wait_until("unmounted", || {
            std::process::Command::new("umount")
                .arg(&self.0)
                .output()
                .is_ok_and(|output| output.status.success())
        });
    }
}

#[test]
fn redirected_writes_wait_for_room_on_a_full_file_system_and_go_on_when_there_is_some() {
    let scratch = Scratch::new();
    let Some(small) = SmallFileSystem::mount(scratch.path("small"), 256 * MIB) else {
        return;
    };
    let rig = Rig::new(Some(&small.0.join("shadow")), &[]);
    let mut control = rig.control();
    let mut disk = rig.attach();
    control.take_set(&["a"], Method::Row);
    wait_until("room ahead", || {
        control.run(&QueryVolumes::default()).unwrap()[0].shadow_ahead_bytes >= 64 << 20
    });
    let filler = small.leave(0);
    let mut blocks_done = 0;
    let blocks = 512;
    // Rewrites what is redirected by new snapshots, until there is no room.
    let mut round = 0;
    let waiting = loop {
        round += 1;
        start_filling(&mut disk, blocks, round);
        let done = disk.first().complete_within(blocks, Duration::from_secs(2));
        all_went_well(&done);
        blocks_done += done.len();
        if done.len() < blocks {
            break blocks - done.len();
        }
        control.take_set(&["a"], Method::Row);
        assert!(round < 100, "a full file system took {blocks_done} blocks");
    };
    control.wait_for_event("SHADOW_STORAGE_FULL");
    std::fs::remove_file(filler).unwrap();
    all_went_well(&disk.first().complete(waiting));
    let shown = disk.first().read(0, blocks * 4096).unwrap();
    assert!(shown.iter().all(|byte| *byte == round));
}

#[test]
fn writes_into_a_thin_disk_wait_for_room_on_its_file_system() {
    let scratch = Scratch::new();
    let Some(small) = SmallFileSystem::mount(scratch.path("small"), 16 * MIB) else {
        return;
    };
    let thin = small.0.join("a.raw");
    std::fs::File::create(&thin).unwrap().set_len(SIZE).unwrap();
    let rig = Rig::serving(Scratch::new(), &thin, Some(&scratch.path("a.shadow")), &[]);
    let mut control = rig.control();
    let mut disk = rig.attach();
    let snapshot = control.take_set(&["a"], Method::Cow).volumes[0]
        .snapshot
        .snapshot;
    let filler = small.leave(MIB);
    start_filling(&mut disk, 512, 1);
    let done = disk.first().complete_within(512, Duration::from_secs(2));
    all_went_well(&done);
    assert!(done.len() < 512, "a full file system took everything");
    control.wait_for_event("SHADOW_STORAGE_FULL");
    let kept = control.run(&QuerySnapshots::default()).unwrap();
    assert!(
        kept.iter().any(|kept| kept.snapshot == snapshot),
        "dropped although its room is of no use to the disk"
    );
    std::fs::remove_file(filler).unwrap();
    all_went_well(&disk.first().complete(512 - done.len()));
    let shown = disk.first().read(0, 512 * 4096).unwrap();
    assert!(shown.iter().all(|byte| *byte == 1));
}

#[test]
fn copy_on_write_drops_its_oldest_snapshot_on_a_full_file_system() {
    let scratch = Scratch::new();
    let Some(small) = SmallFileSystem::mount(scratch.path("small"), 256 * MIB) else {
        return;
    };
    let rig = Rig::new(Some(&small.0.join("shadow")), &[]);
    let mut control = rig.control();
    let mut disk = rig.attach();
    let first = control.take_set(&["a"], Method::Cow).volumes[0]
        .snapshot
        .snapshot;
    let _filler = small.leave(0);
    for round in 1..100 {
        start_filling(&mut disk, 512, round);
        all_went_well(&disk.first().complete(512));
        let left = control.run(&QuerySnapshots::default()).unwrap();
        if left.iter().all(|snapshot| snapshot.snapshot != first) {
            let told = control.wait_for_event("SNAPSHOTS_DELETED");
            assert_eq!(told, json!({ "snapshots": [first], "reason": "no-room" }));
            return;
        }
        let _taken = control.take_set(&["a"], Method::Cow);
    }
    panic!("nothing was dropped");
}
