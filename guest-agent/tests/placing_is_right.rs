//! Files that need not be in a copy, on real file systems and of every kind whose blocks are not simply its own: what is left out of a
//! copy is theirs alone, and the copy is whole but for it.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;

use guest_agent::filesystem::mounts::{DeviceNumber, Mount};
use guest_agent::filesystem::not_to_snapshot::{Swap, Wish, find, place};
use guest_agent_wire::host::NotToSnapshot;
use guest_agent_wire::metadata::FileSet;
use rig::{Rig, can_run, on_a_partition, run};
use rustix::fs::{FallocateFlags, fallocate};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

const KIB: usize = 1 << 10;
/// Where [`on_a_partition`] says that the disk's partition begins.
const PARTITION_BYTES: u64 = 1 << 20;

/// Bytes that are found again: no block is zero, and no two are the same.
fn content(name: &str, bytes: usize) -> Vec<u8> {
    let line = |number: usize| format!("{name} {number:012}\n");
    let mut all: Vec<u8> = (0..=bytes / 8).flat_map(|n| line(n).into_bytes()).collect();
    all.truncate(bytes);
    all
}

/// Makes the files. Those whose names begin with `f` are named by the pattern. What is open stays open: room behind its end is promised.
fn fill(place: &Path, fstype: &str) -> Vec<File> {
    let write = |name: &str, bytes: usize| {
        let mut file = File::create(place.join(name)).unwrap();
        file.write_all(&content(name, bytes)).unwrap();
        file
    };
    for round in 0..4 {
        write(&format!("kept{round}"), 100 * KIB);
        write(&format!("f-plain{round}"), 100 * KIB);
        // In the inode, where there is room for that.
        write(&format!("kept-tiny{round}"), 40);
        write(&format!("f-tiny{round}"), 40);
    }
    let holes = write("f-holes", 512 * KIB);
    rustix::fs::syncfs(&holes).unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&holes, punch, (64 * KIB) as u64, (128 * KIB) as u64).unwrap();
    // What was given back is somebody else's.
    write("kept-in-the-hole", 128 * KIB);
    let reserved = write("f-reserved", 10 * KIB);
    let room = FallocateFlags::KEEP_SIZE;
    fallocate(&reserved, room, (64 * KIB) as u64, (64 * KIB) as u64).unwrap();
    if fstype == "xfs" {
        write("f-shared", 200 * KIB);
        let text = |name: &str| place.join(name).to_str().unwrap().to_owned();
        run(
            "cp",
            &["--reflink=always", &text("f-shared"), &text("kept-shared")],
        );
        // A part of it is its own again.
        let shared = File::options().write(true).open(text("f-shared")).unwrap();
        shared.write_all_at(&content("own", 8 * KIB), 0).unwrap();
    }
    // Nobody has asked for a place for these yet.
    let mut open = Vec::new();
    for name in ["f-late", "kept-late"] {
        let mut file = write(name, 300 * KIB);
        file.write_all(&content(name, 5_000)).unwrap();
        open.push(file);
    }
    open
}

fn files(place: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(place).unwrap().map(Result::unwrap);
    files
        .filter(|entry| entry.file_type().unwrap().is_file())
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect()
}

/// Places the files in the window, and copies the disk without them.
fn copied_without(fstype: &str, mountpoint: &Path, image: &Path, copy: &Path) -> NotToSnapshot {
    let place_text = mountpoint.to_str().unwrap();
    let stat = rustix::fs::stat(mountpoint).unwrap();
    let device = DeviceNumber {
        major: rustix::fs::major(stat.st_dev),
        minor: rustix::fs::minor(stat.st_dev),
    };
    let top = tempfile::tempdir().unwrap();
    let devices = on_a_partition(top.path(), device);
    let mounts = [Mount {
        id: 1,
        parent: 0,
        device,
        root: "/".into(),
        mountpoint: mountpoint.into(),
        fstype: fstype.to_owned(),
        source: "/dev/vda1".to_owned(),
        read_only: false,
    }];
    let wish = Wish {
        set: FileSet::new(place_text, "f*"),
        owner: None,
    };
    let later = || Instant::now() + Duration::from_secs(600);
    let found = find(&[wish], &[], &mounts, &devices, &[], later());
    run("fsfreeze", &["-f", place_text]);
    let (placed, open) = place(&found, &Swap::default(), &devices, &[], &[device], later());
    let copying = [
        "--sparse=always",
        image.to_str().unwrap(),
        copy.to_str().unwrap(),
    ];
    run("cp", &copying);
    run("fsfreeze", &["-u", place_text]);
    drop(open);
    let file = File::options().write(true).open(copy).unwrap();
    assert_eq!(placed.extents_not_told, 0);
    for extent in &placed.extents {
        let start = extent.start_bytes.checked_sub(PARTITION_BYTES).unwrap();
        let zeroes = vec![0; usize::try_from(extent.length_bytes).unwrap()];
        file.write_all_at(&zeroes, start).unwrap();
    }
    placed
}

fn is_left_out_rightly(fstype: &str, checker: &[&str]) {
    let mut rig = Rig::new();
    let image = rig.path("disk.img");
    let size = if fstype == "xfs" { 320 } else { 32 };
    File::create(&image).unwrap().set_len(size << 20).unwrap();
    let text = image.to_str().unwrap();
    match fstype {
        "xfs" => run("mkfs.xfs", &["-q", "-m", "reflink=1", text]),
        _ => run(
            "mkfs.ext4",
            &["-q", "-F", "-I", "256", "-O", "inline_data", text],
        ),
    }
    let mountpoint = rig.mount_with("disk", &["-t", fstype, "-o", "loop", text]);
    let open = fill(&mountpoint, fstype);
    let before = files(&mountpoint);
    let copy = rig.path("copy.img");
    let placed = copied_without(fstype, &mountpoint, &image, &copy);
    drop(open);
    println!("{fstype}: {placed:#?}");

    let copy_text = copy.to_str().unwrap();
    // XFS has a log to be replayed even when it is frozen.
    let options = if fstype == "xfs" {
        "loop,nouuid"
    } else {
        "loop"
    };
    let restored = rig.mount_with("copy", &["-t", fstype, "-o", options, copy_text]);
    let after = files(&restored);
    run("umount", &[restored.to_str().unwrap()]);
    // The file system itself is whole.
    let mut arguments = checker[1..].to_vec();
    arguments.push(copy_text);
    run(checker[0], &arguments);
    assert!(before.keys().eq(after.keys()), "{:?}", after.keys());
    let mut gone = 0;
    for (name, bytes) in &before {
        let now = &after[name];
        if now == bytes {
            continue;
        }
        assert!(name.starts_with('f'), "{name} is not what it was");
        assert!(
            now.iter().all(|byte| *byte == 0),
            "a part of {name} is left"
        );
        gone += 1;
    }
    let whole = |name: &str| before[name] == after[name];
    // Every one whose blocks are its own.
    for name in ["f-plain0", "f-plain3", "f-holes", "f-reserved", "f-late"] {
        assert!(!whole(name), "{name} is in the copy");
    }
    assert_eq!(placed.files, gone, "{placed:#?}");
    let refused = |why: &str| placed.reasons.iter().filter(|r| r.contains(why)).count();
    match fstype {
        "xfs" => {
            assert!(whole("f-shared"));
            assert_eq!(refused("shares blocks with another file"), 1, "{placed:#?}");
        }
        _ => {
            assert!(whole("f-tiny0") && whole("f-tiny3"));
            assert_eq!(refused("shares a block with other data"), 4, "{placed:#?}");
        }
    }
}

#[test]
fn inline_data_holes_and_late_blocks_of_ext4_are_left_out_rightly_or_not_at_all() {
    if can_run(&["fsfreeze"]) {
        is_left_out_rightly("ext4", &["e2fsck", "-fn"]);
    }
}

#[test]
fn shared_blocks_holes_and_promised_room_of_xfs_are_left_out_rightly_or_not_at_all() {
    if can_run(&["fsfreeze", "mkfs.xfs"]) {
        is_left_out_rightly("xfs", &["xfs_repair", "-n"]);
    }
}
