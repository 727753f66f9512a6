//! Writes that were not held from freeze to commit, whoever let them through: caught, and the set deleted.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::requires;
use vmshadow_tests::harness::site::Site;

#[test]
fn somebody_else_who_thaws_in_the_window_is_caught() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let site = Site::start("thawed", &[("a", FileSystem::Ext4)])?;
    let load = site.load()?;
    site.willing_writer()?;
    let mut create = site.bridge.start(&["create"], Some("frozen"))?;
    create.wait_stopped()?;
    site.vm.shell("fsfreeze --unfreeze /mnt/a")?;
    create.go_on()?;
    let answer = create.wait(Duration::from_secs(120))?;
    site.was_refused(&answer, &["HOLD_BROKEN", "LEVEL_NOT_REACHED"])?;
    site.is_unharmed(&load)
}

#[test]
fn writes_to_a_file_system_that_was_left_out_are_caught_by_the_host_alone() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let site = Site::start(
        "left-out",
        &[("a", FileSystem::Ext4), ("b", FileSystem::Ext4)],
    )?;
    let load = site.load()?;
    site.willing_writer()?;
    let arguments = ["create", "--exclude-filesystem", "/mnt/b"];
    let mut create = site.bridge.start(&arguments, Some("marked"))?;
    create.wait_stopped()?;
    site.vm
        .shell("dd if=/dev/urandom of=/mnt/b/noise bs=64k count=16 conv=fsync")?;
    create.go_on()?;
    let answer = create.wait(Duration::from_secs(120))?;
    site.was_refused(&answer, &["HOLD_BROKEN", "LEVEL_NOT_REACHED"])?;
    for (witness, verdict) in [
        ("filesystems", "agrees"),
        ("writers", "agrees"),
        ("time", "agrees"),
        ("host", "disagrees"),
    ] {
        let said = answer.at(&format!("/witnesses/{witness}/value"))?;
        ensure!(said == verdict, "{witness}: {said}");
    }
    site.is_unharmed(&load)
}

#[test]
fn a_commit_that_is_late_by_ten_seconds_breaks_the_hold() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let site = Site::start("late", &[("a", FileSystem::Ext4)])?;
    let load = site.load()?;
    site.willing_writer()?;
    let mut create = site.bridge.start(&["create"], Some("marked"))?;
    create.wait_stopped()?;
    site.daemon.signal(Signal::STOP)?;
    let stopped = Instant::now();
    create.go_on()?;
    // The guest's own clock ends the hold while the host still stands still.
    site.agent_says_thawed(Duration::from_secs(25))?;
    ensure!(
        stopped.elapsed() > Duration::from_secs(3),
        "thawed too early to be the dead-man"
    );
    site.daemon.signal(Signal::CONT)?;
    let answer = create.wait(Duration::from_secs(120))?;
    site.was_refused(&answer, &["HOLD_BROKEN", "HOLD_WRITES_TIMEOUT"])?;
    site.is_unharmed(&load)
}
