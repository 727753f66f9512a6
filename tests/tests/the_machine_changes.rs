//! What is done to a running machine from outside while its guest is frozen: the agent's port or a disk is pulled out, a disk is plugged in,
//! a migration begins.
//! The set is refused, nothing stays frozen, and the next one is good. What a frozen guest still answers, and what a set without writers
//! is called, is seen in the same machine.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use vmshadow_tests::guest_protocol::{AGENT_PORT, QGA_PORT};
use vmshadow_tests::harness::bridge::Answer;
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::qga::QgaClient;
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::{requires, wait};

/// A set that is waited for, whatever comes of it.
const ENDS_WITHIN: Duration = Duration::from_secs(150);
/// What a busy machine may make of any set that was stopped on its way.
const TOO_LATE: [&str; 2] = ["HOLD_BROKEN", "HOLD_WRITES_TIMEOUT"];
/// Bytes a second: the machine's memory never gets over.
const SLOW: u64 = 4096;

/// Waits until the guest has disk `b`.
const SEES_B: &str = "until disk=$(grep -lx b /sys/block/vd*/serial); do usleep 100000; done";
const MOUNT_B: &str = "mount -t ext4 /dev/$(echo $disk | cut -d/ -f4) /mnt/b";

/// A set during which, after the freeze, something is done; the guest is thawed when it is over.
fn set_with(site: &Site, act: impl FnOnce() -> Result<()>) -> Result<Answer> {
    set_with_at(site, "frozen", act)
}

fn set_with_at(site: &Site, step: &str, act: impl FnOnce() -> Result<()>) -> Result<Answer> {
    let mut create = site.bridge.start(&["create"], Some(step))?;
    create.wait_stopped()?;
    act()?;
    create.go_on()?;
    let answer = create.wait(ENDS_WITHIN)?;
    takes_writes(site, "a")?;
    let left = site.daemon.snapshots()?;
    ensure!(
        left.is_empty() || answer.code == 0,
        "left: {left:#?} {answer:#?}"
    );
    Ok(answer)
}

fn takes_writes(site: &Site, disk: &str) -> Result<()> {
    let write = format!("echo >/mnt/{disk}/probe");
    let answer = site.vm.guest()?.start(&write)?.wait(wait::STEP)?;
    ensure!(answer.status == 0, "{answer:?}\n{}", site.log());
    Ok(())
}

/// The set that is kept in the end. An emulated machine may be too slow for the window once; not three times.
fn good(site: &Site, act: impl Fn() -> Result<()>) -> Result<Answer> {
    for _ in 0..3 {
        let answer = set_with(site, &act)?;
        if answer.code == 0 {
            ensure!(answer.at("/level-reached")? == "application", "{answer:#?}");
            delete(site, &answer)?;
            return Ok(answer);
        }
        site.was_refused(&answer, &TOO_LATE)?;
        eprintln!("too late, once more");
    }
    bail!("three sets were too late: {}", site.log());
}

fn delete(site: &Site, set: &Answer) -> Result<()> {
    let set = set.at("/set")?.as_str().context("set")?;
    site.bridge.run(&["delete", set])?.succeeded()?;
    Ok(())
}

#[test]
fn ports_disks_and_migrations_in_the_window_refuse_the_set_and_leave_the_guest_thawed() -> Result<()>
{
    if !requires::machines() {
        return Ok(());
    }
    let disks = [("a", FileSystem::Ext4), ("b", FileSystem::Ext4)];
    let site = Site::start_with_slots("changes", &disks)?;
    without_writers(&site)?;
    site.willing_writer()?;
    probes_are_answered(&site)?;
    the_port_is_pulled_out(&site)?;
    a_migration_begins(&site)?;
    a_disk_is_plugged_in(&site)?;
    a_disk_is_pulled_out(&site)
}

/// No set is called better than it is: nobody spoke for the applications.
fn without_writers(site: &Site) -> Result<()> {
    let answer = site.try_create(&[])?;
    site.was_refused(&answer, &["LEVEL_NOT_REACHED"])?;
    let left = site.daemon.snapshots()?;
    ensure!(left.is_empty(), "{left:#?}");
    let set = site.try_create(&["--best-effort"])?.succeeded()?;
    ensure!(set.at("/level-asked")? == "application", "{set:#?}");
    ensure!(set.at("/level-reached")? == "filesystem", "{set:#?}");
    // So it is told to whoever looks later.
    let id = set.at("/set")?.as_str().context("set")?;
    let shown = site.bridge.run(&["show", id])?.succeeded()?;
    ensure!(shown.at("/level-reached")? == "filesystem", "{shown:#?}");
    delete(site, &set)
}

/// By the order of events: what is answered is answered before the hold is over, and it does the set no harm.
fn probes_are_answered(site: &Site) -> Result<()> {
    let mut agent = QgaClient::connect(&site.vm.port(QGA_PORT))?;
    let agent = std::cell::RefCell::new(&mut agent);
    good(site, || {
        let mut agent = agent.borrow_mut();
        let held = site.vm.guest()?.start("echo >/mnt/a/held")?;
        // The same elsewhere, begun later, ends.
        site.vm.shell("echo >/tmp/free")?;
        for _ in 0..3 {
            let pong = agent.ask("guest-ping", json!({}))?;
            ensure!(pong == json!({"return": {}}), "{pong}");
            let status = agent.ask("guest-fsfreeze-status", json!({}))?;
            ensure!(status == json!({"return": "frozen"}), "{status}");
            let info = agent.ask("guest-info", json!({}))?;
            ensure!(info["return"]["version"].is_string(), "{info}");
        }
        ensure!(held.still_runs(), "it was not frozen any more");
        Ok(())
    })?;
    Ok(())
}

/// The agent's own port. The host's end stays open, so that nothing but the guest can know.
fn the_port_is_pulled_out(site: &Site) -> Result<()> {
    let answer = set_with(site, || {
        site.vm.pull_port(AGENT_PORT)?;
        takes_writes(site, "a")?;
        takes_writes(site, "b")
    })?;
    site.was_refused(&answer, &["VM_DISTURBED"])?;
    let why = answer.at("/reason/message")?.to_string();
    ensure!(why.contains("DEVICE_DELETED"), "{why}");
    // It was not the dead-man that thawed.
    let console = site.vm.console();
    ensure!(console.contains("undone: the host went away"), "{console}");
    site.vm.put_port_back(AGENT_PORT)?;
    site.wait_for_writer("willing")?;
    good(site, || Ok(())).map(drop)
}

/// With the events of it and, as QEMU is by itself, without.
fn a_migration_begins(site: &Site) -> Result<()> {
    let mut monitor = site.vm.monitor()?;
    monitor.execute("migrate-set-parameters", json!({"max-bandwidth": SLOW}))?;
    for events in [false, true] {
        let capability = json!({"capability": "events", "state": events});
        let capabilities = json!({ "capabilities": [capability] });
        monitor.execute("migrate-set-capabilities", capabilities)?;
        let answer = set_with(site, || {
            let migrate = json!({"uri": "exec:cat >/dev/null"});
            monitor.execute("migrate", migrate).map(drop)
        })?;
        site.was_refused(&answer, &["VM_DISTURBED", "HOLD_BROKEN"])?;
        let said = answer.document.to_string();
        let word = if events { "MIGRATION" } else { "migrates" };
        ensure!(said.contains(word), "events {events}: {answer:#?}");
        // It runs still: nothing new is begun.
        let answer = site.try_create(&[])?;
        ensure!(answer.code == 1, "{answer:#?}");
        ensure!(answer.at("/reason/code")? == "VM_MIGRATING", "{answer:#?}");
        ensure!(site.daemon.snapshots()?.is_empty(), "{answer:#?}");
        monitor.execute("migrate_cancel", json!({}))?;
        wait::until("the migration to be over", wait::STEP, || {
            let state = monitor.execute("query-migrate", json!({}))?;
            Ok((state["status"] == "cancelled").then_some(()))
        })?;
    }
    good(site, || Ok(())).map(drop)
}

/// The volumes that a set has copies of.
fn copied(set: &Answer) -> Result<Vec<&str>> {
    let copies = set.at("/copies")?.as_array().context("copies")?;
    let volumes = copies.iter().map(|copy| copy["volume"].as_str());
    volumes.collect::<Option<_>>().context("no volume")
}

/// Behind the choice of the disks and before the freeze there is time to mount it; in the window it is in no copy all the same. The next set
/// has it.
fn a_disk_is_plugged_in(site: &Site) -> Result<()> {
    for step in ["storage-prepared", "frozen"] {
        site.vm.shell("umount /mnt/b")?;
        site.pull(1)?;
        let answer = set_with_at(site, step, || {
            site.put_back(1)?;
            if step != "frozen" {
                site.vm.shell(&format!("{SEES_B}; {MOUNT_B}"))?;
            }
            Ok(())
        })?;
        site.was_refused(&answer, &["VM_DISTURBED"])?;
        let why = answer.at("/reason/message")?.to_string();
        ensure!(why.contains("disk1: plugged in"), "{why}");
        // The guest looks at a slot for seconds.
        site.vm.shell(&format!(
            "{SEES_B}; grep -q ' /mnt/b ' /proc/mounts || {MOUNT_B}"
        ))?;
        takes_writes(site, "b")?;
        let set = good(site, || Ok(()))?;
        ensure!(copied(&set)? == ["a", "b"], "{set:#?}");
    }
    Ok(())
}

/// One that nothing is mounted from, and then one that is frozen.
fn a_disk_is_pulled_out(site: &Site) -> Result<()> {
    for mounted in [false, true] {
        if !mounted {
            site.vm.shell("umount /mnt/b")?;
        }
        let answer = set_with(site, || {
            let mut monitor = site.vm.monitor()?;
            monitor.execute("device_del", json!({"id": "disk1"}))?;
            // The guest has to let it go.
            let is_it = |event: &Value| {
                event["event"] == "DEVICE_DELETED" && event["data"]["device"] == "disk1"
            };
            monitor.event(is_it).map(drop)
        })?;
        site.was_refused(&answer, &["VM_DISTURBED"])?;
        let why = answer.at("/reason/message")?.to_string();
        ensure!(why.contains("DEVICE_DELETED"), "{why}");
        if !mounted {
            let chardev = json!({"id": "vhost1"});
            wait::until("the disk's connection to be free", wait::STEP, || {
                let removed = site
                    .vm
                    .monitor()?
                    .execute("chardev-remove", chardev.clone());
                Ok(removed.ok().map(drop))
            })?;
            site.put_back(1)?;
            site.vm.shell(&format!("{SEES_B}; {MOUNT_B}"))?;
            good(site, || Ok(()))?;
        }
    }
    Ok(())
}
