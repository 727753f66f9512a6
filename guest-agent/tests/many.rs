//! As many file systems and writers as a large guest has.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use guest_agent_wire::sdk::{self, Call, Held, Veto, Writer};
use guest_agent_wire::writer::{Freeze, Registration, Thaw};
use rig::{Probe, Rig, can_run, run, wait_until};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;

const FILESYSTEMS: usize = 500;
const WRITERS: usize = 200;

#[test]
fn five_hundred_file_systems_are_held_as_one() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::new();
    let first = rig.path("first.img");
    fs::File::create(&first).unwrap().set_len(1 << 20).unwrap();
    run(
        "mkfs.ext4",
        &["-q", "-F", "-O", "^has_journal", first.to_str().unwrap()],
    );
    for number in 0..FILESYSTEMS {
        let image = rig.path(&format!("{number}.img"));
        fs::copy(&first, &image).unwrap();
        let options = ["-t", "ext4", "-o", "loop", image.to_str().unwrap()];
        rig.mount_with(&format!("{number}"), &options);
    }
    rig.start();
    let mut bridge = rig.bridge();
    let identified = bridge.ok("identify", json!({}));
    assert_eq!(
        identified["filesystems"].as_array().unwrap().len(),
        FILESYSTEMS
    );
    bridge.prepare();
    let frozen = bridge.freeze();
    let mut probe = Probe::start(&rig.mountpoint("499"));
    probe.wait_blocked();
    let thawed = bridge.thaw(&frozen);
    assert_eq!(thawed["held"], true, "{}", thawed["why_not"]);
    let all = thawed["filesystems"].as_array().unwrap();
    let names: BTreeSet<&str> = all
        .iter()
        .filter(|fs| fs["result"] == "thawed")
        .map(|fs| fs["mountpoint"].as_str().unwrap())
        .collect();
    assert_eq!(names.len(), FILESYSTEMS);
    probe.wait_done();
    // A helper that is killed in the middle is replaced in all of them.
    bridge.ok("hello", json!({"versions": [1]}));
    bridge.prepare();
    bridge.freeze();
    rig::kill_9(rig.helper_pid());
    for number in [0, 250, 499] {
        Probe::start(&rig.mountpoint(&format!("{number}"))).wait_done();
    }
}

/// Thousands of mounts must not stay behind, whatever the test did.
struct Detached(std::path::PathBuf);

impl Drop for Detached {
    fn drop(&mut self) {
        let mut command = std::process::Command::new("umount");
        let status = command.arg("-l").arg(&self.0).status();
        status.map(drop).unwrap_or(());
    }
}

#[test]
fn thousands_of_mounts_of_one_file_system_keep_no_thaw_waiting() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let detached = thousands_of_mounts(&rig);
    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    let thawed = bridge.thaw(&frozen);
    drop(detached);
    assert_eq!(thawed["held"], true, "{}", thawed["why_not"]);
}

#[test]
fn status_and_ping_are_answered_while_thousands_of_mounts_are_looked_at() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let _detached = thousands_of_mounts(&rig);
    let (mut bridge, mut qga) = (rig.bridge(), rig.qga());
    // It does nothing but look, as every freeze does first: nobody is asked for anything meanwhile.
    let identify = bridge.send("identify", json!({}));
    let status = bridge.send("status", json!({}));
    let ping = qga.ask("{\"execute\":\"guest-ping\"}");
    assert_eq!(ping, "{\"return\":{}}\n");
    let first = bridge.next();
    let second = bridge.next();
    assert_eq!(
        (&first["id"], &second["id"]),
        (&json!(status), &json!(identify))
    );
}

/// Bind mounts of the rig's file system.
fn thousands_of_mounts(rig: &Rig) -> Detached {
    let all = rig.mountpoint("all");
    fs::create_dir(&all).unwrap();
    // In a tmpfs of their own, so that all go with it; each round doubles them.
    run("mount", &["-t", "tmpfs", "tmpfs", all.to_str().unwrap()]);
    let detached = Detached(all.clone());
    run("mount", &["--make-private", all.to_str().unwrap()]);
    let script = "set -e; cd \"$0\"; mkdir 0; mount --bind \"$1\" 0; n=1
        for round in $(seq 13); do mkdir \"r$round\"; for d in *; do [ \"$d\" = \"r$round\" ] || mkdir \"r$round/$d\"; done
        for d in *; do [ \"$d\" = \"r$round\" ] || mount --rbind \"$d\" \"r$round/$d\"; done; done";
    let a = rig.mountpoint_text("a");
    run("bash", &["-c", script, all.to_str().unwrap(), &a]);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let count = mounts
        .lines()
        .filter(|line| line.contains("/mnt/all/"))
        .count();
    eprintln!("{count} mounts");
    assert!(count > 4_000, "only {count} mounts");
    detached
}

struct Willing(usize);

impl Writer for Willing {
    fn registration(&self) -> Registration {
        let name = format!("willing-{}", self.0);
        Registration {
            freeze_timeout_ms: 30_000,
            ..Registration::new("willing", &name, &name)
        }
    }

    fn freeze(&mut self, _: &Call<'_>, _: &Freeze) -> Result<Value, Veto> {
        Ok(json!(self.0))
    }

    fn thaw(&mut self, _: &Call<'_>, _: &Thaw) -> Result<Held, Veto> {
        let evidence = json!(self.0);
        Ok(Held {
            held: true,
            evidence,
        })
    }

    fn abort(&mut self, _: &str, _: &str) {}
}

#[test]
fn two_hundred_writers_hold_as_one() {
    if !can_run(&[]) {
        return;
    }
    let rig = Rig::with("ext4");
    let socket = rig.path("run/writers.sock");
    for number in 0..WRITERS {
        let socket = socket.clone();
        // Ends with the test's process.
        std::thread::spawn(move || sdk::run(&mut Willing(number), &socket));
    }
    let mut bridge = rig.bridge();
    wait_until("all are registered", || {
        let writers = bridge.status()["writers"].as_array().map(Vec::len);
        writers == Some(WRITERS)
    });
    bridge.prepare();
    let frozen = bridge.freeze();
    assert_eq!(frozen["writers"].as_array().unwrap().len(), WRITERS);
    let thawed = bridge.thaw(&frozen);
    assert_eq!(thawed["held"], true, "{}", thawed["why_not"]);
    let all = thawed["writers"].as_array().unwrap();
    assert_eq!(
        all.iter().filter(|writer| writer["held"] == true).count(),
        WRITERS
    );
}
