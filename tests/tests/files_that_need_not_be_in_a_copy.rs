//! FilesNotToSnapshot and swap, under load: what a set leaves out, what it saves, and that everything else is whole.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vmshadow_tests::harness::bridge::Answer;
use vmshadow_tests::harness::disk::{self, FileSystem, LINUX, LINUX_SWAP, Partition};
use vmshadow_tests::harness::load::Load;
use vmshadow_tests::harness::oracle::{self, Restored};
use vmshadow_tests::harness::requires;
use vmshadow_tests::harness::site::Site;

const MIB: u64 = 1 << 20;
/// The swap disk: an ext4 disk of this size, taken for swap in the guest.
const SWAP_BYTES: u64 = vmshadow_tests::harness::disk::EXT4_BYTES;
/// What swap keeps: its header.
const HEADER_BYTES: u64 = 64 << 10;

/// What needs not be in a copy: a cache on ext4 that is rewritten all the time, one on XFS that is not, a swap disk and a swap file.
const SETUP: &str = "set -e
    mkdir -p /mnt/a/cache /mnt/b/cache /etc/vmshadow/files-not-to-snapshot.d
    dd if=/dev/urandom of=/mnt/a/kept bs=64k count=64 2>/dev/null
    dd if=/dev/urandom of=/mnt/a/cache/big bs=1M count=32 2>/dev/null
    dd if=/dev/urandom of=/mnt/b/cache/big bs=1M count=32 2>/dev/null
    dd if=/dev/zero of=/mnt/b/swapfile bs=1M count=16 2>/dev/null
    sync
    chmod 600 /mnt/b/swapfile
    mkswap /mnt/b/swapfile >/dev/null
    swapon /mnt/b/swapfile
    swap=$(awk '$2 == \"/mnt/s\" {print $1}' /proc/mounts)
    umount /mnt/s
    mkswap $swap >/dev/null
    swapon $swap
    printf '# caches\\n/mnt/a/cache/**\\n/mnt/b/cache/b*g\\n' >/etc/vmshadow/files-not-to-snapshot.d/caches.conf
    chmod 644 /etc/vmshadow/files-not-to-snapshot.d/caches.conf
    sha256sum /mnt/a/kept | cut -d ' ' -f 1";

/// Bytes that the copy of a disk does not have.
fn left_out(set: &Answer, disk: &str) -> Result<u64> {
    let copies = set.at("/copies")?.as_array().context("copies")?;
    let copy = copies.iter().find(|copy| copy["volume"] == disk);
    let copy = copy.with_context(|| format!("no copy of {disk}: {set:#?}"))?;
    Ok(copy["left-out-bytes"].as_u64().unwrap_or(0))
}

/// A file of an ext4 image, with the file system's own tool.
fn file_of(image: &Path, name: &str, to: &Path) -> Result<()> {
    let request = format!("dump {name} {}", to.display());
    let output = Command::new("debugfs")
        .args(["-R", &request])
        .arg(image)
        .output()?;
    ensure!(output.status.success() && to.exists(), "{output:?}");
    Ok(())
}

fn sha256(path: &Path) -> Result<String> {
    let output = Command::new("sha256sum").arg(path).output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
}

/// Bytes of a file, from `start` on, that are not zero.
fn not_zero(path: &Path, start: u64) -> Result<u64> {
    let file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    let (mut at, mut found) = (start, 0);
    loop {
        let length = file.read_at(&mut buffer, at)?;
        if length == 0 {
            return Ok(found);
        }
        let bytes = buffer.get(..length).unwrap_or_default();
        found += bytes.iter().filter(|byte| **byte != 0).count() as u64;
        at += length as u64;
    }
}

#[test]
fn caches_and_swap_are_left_out_of_sets_under_load_and_nothing_else_is() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let disks = [
        ("a", FileSystem::Ext4),
        ("b", FileSystem::Xfs),
        ("s", FileSystem::Ext4),
    ];
    let site = Site::start("not-to-snapshot", &disks)?;
    let kept = site.vm.shell(SETUP)?;
    let load = Load::start(&site.vm, &["/mnt/a/load.db", "/mnt/b/load.db"])?;
    site.willing_writer()?;
    // The same blocks again and again: the first half of it.
    let rewriting = site.vm.guest()?.start(
        "while [ ! -e /tmp/enough ]; do \
            dd if=/dev/urandom of=/mnt/a/cache/big bs=64k count=256 conv=notrunc,fsync 2>/dev/null; done",
    )?;
    load.wait_for_more(20)?;
    let mut sets = Vec::new();
    for method in ["row", "cow"] {
        let set = site.create(&["--method", method])?;
        let told = set.answer.at("/not-to-snapshot")?;
        ensure!(
            told["unresolved"].is_null() && told["files"] == 3,
            "{told:#?}"
        );
        let names = told["names"].to_string();
        ensure!(names.contains("/mnt/b/cache/big"), "{names}");
        let [a, b, s] = ["a", "b", "s"].map(|disk| left_out(&set.answer, disk));
        let (a, b, s) = (a?, b?, s?);
        println!("{method}: {a} of a, {b} of b, {s} of s left out");
        // A write that came first has kept some of what is rewritten all the time. The swap file's header is in one piece with
        // its first blocks or not.
        ensure!((15 * MIB..=32 * MIB).contains(&a), "{method}: {a} of a");
        let most = 32 * MIB + 16 * MIB - HEADER_BYTES;
        ensure!((most - MIB..=most + MIB).contains(&b), "{method}: {b} of b");
        ensure!(s == SWAP_BYTES - HEADER_BYTES, "{method}: {s} of s");
        sets.push(set);
        load.wait_for_more(40)?;
    }
    ensure!(rewriting.still_runs(), "nothing is rewritten any more");
    site.vm.shell("touch /tmp/enough")?;
    rewriting.wait(vmshadow_tests::harness::wait::STEP)?;
    // What was left out costs nothing when it is overwritten.
    let used = |site: &Site| -> Result<u64> {
        let volumes = site.daemon.volumes()?;
        let swap = volumes.iter().find(|volume| volume["volume"] == "s");
        let swap = swap.and_then(|swap| swap["shadow-used-bytes"].as_u64());
        swap.context("no volume s")
    };
    let before = used(&site)?;
    site.vm.shell(
        "swap=$(awk '/^.dev.vd/ {print $1}' /proc/swaps) && swapoff $swap && \
         dd if=/dev/urandom of=$swap bs=1M seek=1 count=32 conv=notrunc,fsync 2>/dev/null",
    )?;
    let after = used(&site)?;
    ensure!(after <= before, "{before} bytes before, {after} after");
    let acks = load.stop(&site.vm)?;
    for (number, set) in sets.iter().enumerate() {
        let files = site.read_back(&set.answer, &format!("set{number}"))?;
        let [a, b, s] = files.as_slice() else {
            anyhow::bail!("{files:?}");
        };
        let found = oracle::judge(&[
            Restored {
                image: a,
                file_system: FileSystem::Ext4,
                database: "load.db",
            },
            Restored {
                image: b,
                file_system: FileSystem::Xfs,
                database: "load.db",
            },
        ])?;
        for (number, database) in found.iter().enumerate() {
            oracle::compare(database, number, &acks, &set.window)?;
        }
        let copy = site.directory().join(format!("kept{number}"));
        file_of(a, "/kept", &copy)?;
        ensure!(
            sha256(&copy)? == kept.trim(),
            "another file is not what it was"
        );
        // The swap disk has its header, by which it is found at the next boot, and nothing more.
        let mut header = [0; 10];
        File::open(s)?.read_exact_at(&mut header, 4086)?;
        ensure!(&header == b"SWAPSPACE2", "{header:?}");
        ensure!(not_zero(s, HEADER_BYTES)? == 0, "something of swap is left");
        let big = site.directory().join(format!("big{number}"));
        file_of(a, "/cache/big", &big)?;
        let most = 32 * MIB - left_out(&set.answer, "a")?;
        let rest = not_zero(&big, 0)?;
        ensure!(
            rest <= most,
            "{rest} bytes of the cache are in the copy, {most} were not left out"
        );
    }
    Ok(())
}

/// On disk `p`, a file system where today's tools put it, and swap behind it.
const P: [Partition; 2] = [
    Partition {
        start_bytes: MIB,
        bytes: 160 * MIB,
        code: LINUX,
    },
    Partition {
        start_bytes: 161 * MIB,
        bytes: 32 * MIB,
        code: LINUX_SWAP,
    },
];
/// On disk `q`, one where tools of the time of cylinders put it: its blocks are none of the store's.
const Q: [Partition; 1] = [Partition {
    start_bytes: 63 * 512,
    bytes: 128 * MIB,
    code: LINUX,
}];

/// Files that a writer names lie in turns with others, piece by piece, on both disks. Swap is full of what was there before.
const PARTITIONED: &str = "set -e
    for disk in /sys/block/vd*; do
        name=$(cat $disk/serial) node=/dev/${disk##*/}
        mkdir -p /mnt/$name
        mount -t ext4 ${node}1 /mnt/$name
        mkdir -p /mnt/$name/app/deep
        cd /mnt/$name/app
        for round in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do
            for file in one.tmp kept deep/two.tmp two.tmp kept.tmp.txt; do
                dd if=/dev/urandom bs=4k count=$((20 + round)) 2>/dev/null >>$file
            done
            sync
        done
        [ $name = q ] || {
            dd if=/dev/urandom of=${node}2 bs=1M count=32 2>/dev/null
            mkswap ${node}2 >/dev/null
            swapon ${node}2
        }
    done
    sync";

/// The writer's own document.
const IDENTIFY: &str = r#"cat <<END
{"exclude_from_snapshot": [{"path": "/mnt/p/app", "spec": "*.tmp"}, {"path": "/mnt/q/app", "spec": "*.tmp", "recursive": true}]}
END"#;

/// Files of a disk that the writer names, and those that it does not.
const NAMED: [(&str, &[&str], &[&str]); 2] = [
    (
        "p",
        &["one.tmp", "two.tmp"],
        &["kept", "kept.tmp.txt", "deep/two.tmp"],
    ),
    (
        "q",
        &["one.tmp", "two.tmp", "deep/two.tmp"],
        &["kept", "kept.tmp.txt"],
    ),
];

/// A part of a file into a file of its own.
fn cut(from: &Path, partition: &Partition, to: &Path) -> Result<()> {
    let mut bytes = vec![0; usize::try_from(partition.bytes)?];
    File::open(from)?.read_exact_at(&mut bytes, partition.start_bytes)?;
    Ok(std::fs::write(to, bytes)?)
}

#[test]
fn what_writers_name_on_partitions_is_left_out_and_swap_that_is_wanted_is_kept() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let site = Site::start_partitioned("partitions", &[("p", &P), ("q", &Q)])?;
    site.vm.shell(PARTITIONED)?;
    let identify = [
        ("identify", IDENTIFY),
        ("freeze", "exit 0"),
        ("thaw", "exit 0"),
    ];
    site.script_writer("app", &identify)?;
    let sum = |path: &str| -> Result<String> {
        let text = site.vm.shell(&format!("sha256sum {path}"))?;
        Ok(text.split(' ').next().unwrap_or_default().to_owned())
    };
    let swap = "$(awk '/^.dev.vd/ {print $1}' /proc/swaps)";
    let swap_sum = sum(swap)?;
    for keep_swap in [false, true] {
        if keep_swap {
            // The agent comes back with this argument.
            site.vm.shell(
                "echo --keep-swap >/etc/vmshadow/agent.args && killall guest-agent
                 is_there() { for one in $(pidof guest-agent); do grep -q keep-swap /proc/$one/cmdline && return; done; false; }
                 until is_there; do usleep 100000; done",
            )?;
            site.wait_for_writer("app")?;
        }
        let set = site.create(&[])?;
        let told = set.answer.at("/not-to-snapshot")?;
        ensure!(
            told["files"] == 5 && told["patterns"] == 2 && told["unresolved"].is_null(),
            "{told:#?}"
        );
        let names = told["names"].to_string();
        ensure!(names.contains("swap on") != keep_swap, "{names}");
        let mut bytes = Vec::new();
        for (disk, gone, _) in NAMED {
            let gone = gone.join(" ");
            let sizes = site
                .vm
                .shell(&format!("cd /mnt/{disk}/app && stat -c %s {gone}"))?;
            bytes.push(
                sizes
                    .lines()
                    .map(str::parse::<u64>)
                    .sum::<Result<u64, _>>()?,
            );
        }
        let [of_p, of_q] = *bytes.as_slice() else {
            anyhow::bail!("{bytes:?}");
        };
        let of_swap = if keep_swap {
            0
        } else {
            P[1].bytes - HEADER_BYTES
        };
        let (p, q) = (left_out(&set.answer, "p")?, left_out(&set.answer, "q")?);
        println!(
            "swap kept: {keep_swap}; {p} of p, {q} of q left out, told {}",
            told["bytes"]
        );
        ensure!(told["bytes"] == of_p + of_q + of_swap, "{told:#?}");
        // On p all is whole blocks; on q each piece of a file loses its ends.
        ensure!(p == of_p + of_swap, "{p} of p, not {}", of_p + of_swap);
        ensure!((of_q / 2..of_q).contains(&q), "{q} of {of_q} on q");

        let files = site.read_back(&set.answer, &format!("swap-{keep_swap}"))?;
        for ((disk, gone, kept), image) in NAMED.iter().zip(&files) {
            let partition = if *disk == "p" { &P[0] } else { &Q[0] };
            let there = site.directory().join(format!("{disk}-{keep_swap}"));
            cut(image, partition, &there)?;
            disk::run("e2fsck", &["-fn"], &there)?;
            let copy = site.directory().join("file");
            for name in *kept {
                file_of(&there, &format!("/app/{name}"), &copy)?;
                let path = format!("/mnt/{disk}/app/{name}");
                ensure!(sha256(&copy)? == sum(&path)?, "{path} is not what it was");
            }
            // What is left of a named file is the ends of its pieces, where there are any.
            let mut rest = 0;
            for name in *gone {
                file_of(&there, &format!("/app/{name}"), &copy)?;
                rest += not_zero(&copy, 0)?;
            }
            let most = if *disk == "p" { 0 } else { of_q - q };
            ensure!(rest <= most, "{rest} bytes of what was named are on {disk}");
        }
        let swap = site.directory().join(format!("swap-copy-{keep_swap}"));
        cut(files.first().context("p")?, &P[1], &swap)?;
        if keep_swap {
            ensure!(sha256(&swap)? == swap_sum, "swap is not what it was");
        } else {
            let mut header = [0; 10];
            File::open(&swap)?.read_exact_at(&mut header, 4086)?;
            ensure!(&header == b"SWAPSPACE2", "{header:?}");
            ensure!(
                not_zero(&swap, HEADER_BYTES)? == 0,
                "something of swap is left"
            );
        }
    }
    Ok(())
}
