//! The agent reached over vsock: a whole set, strangers, and connections that break.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vmshadow_tests::guest_protocol::AGENT_PORT;
use vmshadow_tests::harness::bridge::Bridge;
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::vsock::GUEST_CID;
use vmshadow_tests::harness::{image, requires, vsock, wait};

/// The dead-man's 10 s, and what an emulated machine on a busy host may add.
const THAWED_WITHIN: Duration = Duration::from_secs(25);
/// `vmshadow` inside the guest, where it can dial by the kernel's own vsock.
const IN_GUEST: &str = "/mnt/programs/vmshadow --state-dir /tmp/state list writers --json --qmp /tmp/q --vhost-blk /tmp/b";

fn can_run() -> bool {
    requires::machines() && vsock::backend_is_there()
}

#[test]
fn a_whole_set_is_taken_over_vsock_and_a_bridge_that_dies_is_noticed() -> Result<()> {
    if !can_run() {
        return Ok(());
    }
    let site = Site::start_on_vsock("vsock", &[("a", FileSystem::Ext4)], Ok)?;
    let load = site.load()?;
    site.sqlite_writer()?;
    let set = site.create(&[])?;
    let files = site.read_back(&set.answer, "copy")?;
    // The next bridge dies: the guest sees the end of the connection, and serves the one after it.
    let mut create = site.bridge.start(&["create"], Some("frozen"))?;
    create.wait_stopped()?;
    create.kill()?;
    site.is_thawed(THAWED_WITHIN)?;
    site.bridge.run(&["recover"])?.succeeded()?;
    site.create(&[])?;
    site.bridge.run(&["list", "writers"])?.succeeded()?;
    load.wait_for_more(5)?;
    let acks = load.stop(&site.vm)?;
    let found = site.judge(&files)?;
    site.compare(&found, &acks, &set.window)
}

/// A disk with `vmshadow` on it.
fn programs(directory: &Path) -> Result<std::path::PathBuf> {
    let files = directory.join("programs");
    std::fs::create_dir_all(&files)?;
    std::fs::copy(image::program("vmshadow")?, files.join("vmshadow"))?;
    let disk = directory.join("programs.img");
    let mke2fs = requires::find("mke2fs").context("mke2fs")?;
    let status = Command::new(mke2fs)
        .args(["-q", "-t", "ext4", "-d"])
        .arg(&files)
        .arg(&disk)
        .arg("64M")
        .status()?;
    ensure!(status.success(), "mke2fs: {status}");
    Ok(disk)
}

/// Passes bytes on between what the guest dials and the agent's serial port.
fn relay(from: &Path, to: &Path) -> Result<()> {
    fn pass(mut from: UnixStream, mut to: UnixStream) {
        drop(io::copy(&mut from, &mut to));
        drop(to.shutdown(Shutdown::Both));
    }
    let (listener, to) = (UnixListener::bind(from)?, to.to_owned());
    thread::spawn(move || -> Result<()> {
        for near in listener.incoming() {
            let (near, far) = (near?, UnixStream::connect(&to)?);
            let (near_again, far_again) = (near.try_clone()?, far.try_clone()?);
            thread::spawn(move || pass(near_again, far_again));
            thread::spawn(move || pass(far, near));
        }
        Ok(())
    });
    Ok(())
}

#[test]
fn strangers_are_not_heard_and_a_backend_that_dies_ends_the_hold() -> Result<()> {
    if !can_run() {
        return Ok(());
    }
    let files = tempfile::tempdir()?;
    let disk = programs(files.path())?;
    let mut site =
        Site::start_on_vsock("vsock-strangers", &[("a", FileSystem::Ext4)], |machine| {
            let machine = machine.file("programs", &disk);
            Ok(machine.mounted("/mnt/programs", FileSystem::Ext4))
        })?;
    site.willing_writer()?;
    site.bridge.run(&["list", "writers"])?.succeeded()?;
    // From inside, over loopback and by the guest's own address: a stranger.
    for cid in [1, GUEST_CID] {
        let command = format!("{IN_GUEST} --agent vsock:{cid}");
        let answer = site.vm.guest()?.start(&command)?.wait(wait::STEP)?;
        ensure!(answer.status != 0, "CID {cid} was heard: {answer:?}");
        // It is hung up on, again and again.
        let hung_up = ["connection lost", "no answer within"];
        ensure!(
            hung_up.iter().any(|how| answer.stderr.contains(how)),
            "CID {cid}: {answer:?}"
        );
    }
    // The same command finds the agent where it is let through: what was turned away above was the stranger.
    let backend = site.vsock.as_ref().context("vsock")?;
    relay(&backend.host_port(9000), &site.vm.port(AGENT_PORT))?;
    let writers = site.vm.shell(&format!("{IN_GUEST} --agent vsock:2:9000"))?;
    ensure!(writers.contains("willing"), "{writers}");
    // And the strangers have done no harm.
    site.bridge.run(&["list", "writers"])?.succeeded()?;
    the_backend_dies(&mut site)
}

/// In the middle of a set. The serial port takes over.
fn the_backend_dies(site: &mut Site) -> Result<()> {
    let load = site.load()?;
    // The disk with the programs is in nobody's set.
    let create = ["create", "--disk", "a"];
    let mut running = site.bridge.start(&create, Some("frozen"))?;
    running.wait_stopped()?;
    site.vsock.as_mut().context("vsock")?.kill()?;
    running.go_on()?;
    let answer = running.wait(Duration::from_secs(120))?;
    site.was_refused(
        &answer,
        &["AGENT_UNREACHABLE", "HOLD_BROKEN", "AGENT_FAILED"],
    )?;
    // The guest is told nothing of it: its own clock ends the hold.
    site.is_thawed(THAWED_WITHIN)?;
    // In the guest the lost conversation is still open. It stands in nobody's way.
    let serial = Bridge::new(
        &site.vm.qmp_socket(),
        &site.vm.port(AGENT_PORT),
        site.daemon.control(),
        &site.directory().join("serial"),
    )?;
    let set = serial.run(&create)?.succeeded()?;
    ensure!(set.at("/level-reached")? == "application", "{set:#?}");
    load.wait_for_more(5)
}
