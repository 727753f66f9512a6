//! What it costs inside the window to place files that need not be in a copy. It measures, and fails only where files are not placed:
//! `cargo test -p guest-agent --test placing_costs -- --ignored --nocapture`, as root.
//!
//! Each round mounts anew, so that nothing is in the caches but what the search of `prepare` brought there. The images lie in this
//! machine's own page cache: reads of a disk cost more than here, so they are counted too.

#![allow(
    clippy::unwrap_used,
    reason = "a measurement that cannot be made fails"
)]

mod rig;

use guest_agent::filesystem::mounts::{DeviceNumber, Mount};
use guest_agent::filesystem::not_to_snapshot::{Swap, Wish, find, place};
use guest_agent_wire::metadata::FileSet;
use rig::{Rig, can_run, on_a_partition, run};
use rustix::fs::FallocateFlags;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const BLOCK: u64 = 4096;
const ROUNDS: usize = 5;

/// A file with so many extents of a block each, with a hole behind each.
fn make(path: &Path, extents: u64) {
    let file = fs::File::create(path).unwrap();
    for extent in 0..extents {
        rustix::fs::fallocate(&file, FallocateFlags::empty(), extent * 2 * BLOCK, BLOCK).unwrap();
    }
}

/// Reads of the device since it was made.
fn reads(device: DeviceNumber) -> u64 {
    let stat = fs::read_to_string(format!("/sys/dev/block/{device}/stat")).unwrap();
    stat.split_whitespace().next().unwrap().parse().unwrap()
}

struct Figures {
    searched: Duration,
    placed: Duration,
    reads: u64,
    again: Duration,
    again_reads: u64,
    files: u64,
}

/// One round on a fresh mount: the search, and the placing behind a freeze, twice.
fn round(fstype: &str, image: &Path, mountpoint: &Path) -> Figures {
    let place_text = mountpoint.to_str().unwrap();
    run(
        "mount",
        &[
            "-t",
            fstype,
            "-o",
            "loop",
            image.to_str().unwrap(),
            place_text,
        ],
    );
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
    let start = Instant::now();
    let found = find(&[wish], &[], &mounts, &devices, &[], later());
    let searched = start.elapsed();
    run("fsfreeze", &["-f", place_text]);
    let measure = || {
        let (start, before) = (Instant::now(), reads(device));
        let (placed, open) = place(&found, &Swap::default(), &devices, &[], &[device], later());
        let took = start.elapsed();
        let figures = (took, reads(device) - before, placed.files);
        (figures, open)
    };
    let ((placed, reads, files), first) = measure();
    let ((again, again_reads, _), second) = measure();
    run("fsfreeze", &["-u", place_text]);
    drop((first, second));
    // What was kept open is closed on a thread.
    rig::wait_until("the file system to be free", || {
        let ended = std::process::Command::new("umount")
            .arg(place_text)
            .output();
        ended.unwrap().status.success()
    });
    Figures {
        searched,
        placed,
        reads,
        again,
        again_reads,
        files,
    }
}

fn median(rounds: &[Figures], of: impl Fn(&Figures) -> Duration) -> String {
    let mut all: Vec<Duration> = rounds.iter().map(of).collect();
    all.sort();
    let ms = |at: usize| all.get(at).unwrap().as_secs_f64() * 1000.0;
    format!("{:.2} ({:.2})", ms(ROUNDS / 2), ms(ROUNDS - 1))
}

#[test]
#[ignore = "a measurement"]
fn placing_files_costs_this_much_of_the_window() {
    if !can_run(&["mkfs.xfs", "fsfreeze"]) {
        return;
    }
    println!("median (maximum) of {ROUNDS} rounds, ms; reads of the device");
    println!(
        "| file system | files | extents each | placed | search | placing | reads | placing again | reads |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for fstype in ["ext4", "xfs"] {
        for (files, extents) in [
            (1, 1),
            (1, 1000),
            (100, 1),
            (100, 500),
            (512, 1),
            (512, 100),
            (512, 1000),
        ] {
            let mut rig = Rig::new();
            let image = rig.path("image");
            fs::File::create(&image).unwrap().set_len(4 << 30).unwrap();
            let force = if fstype == "xfs" { "-f" } else { "-F" };
            run(
                &format!("mkfs.{fstype}"),
                &["-q", force, image.to_str().unwrap()],
            );
            let mountpoint: PathBuf =
                rig.mount_with("a", &["-t", fstype, "-o", "loop", image.to_str().unwrap()]);
            for file in 0..files {
                make(&mountpoint.join(format!("f{file}")), extents);
            }
            run("umount", &[mountpoint.to_str().unwrap()]);
            let rounds: Vec<Figures> = (0..ROUNDS)
                .map(|_| round(fstype, &image, &mountpoint))
                .collect();
            let last = rounds.last().unwrap();
            assert!(last.files > 0);
            println!(
                "| {fstype} | {files} | {extents} | {} | {} | {} | {} | {} | {} |",
                last.files,
                median(&rounds, |round| round.searched),
                median(&rounds, |round| round.placed),
                last.reads,
                median(&rounds, |round| round.again),
                last.again_reads,
            );
        }
    }
}
