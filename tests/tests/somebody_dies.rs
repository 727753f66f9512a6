//! Each of the programs killed (-9) at the worst moments: the guest is thawed, and a set is kept whole or not at all.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vmshadow_tests::harness::bridge::STEPS;
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::requires;
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::wait;

/// The dead-man's 10 s, and what an emulated machine on a busy host may add.
const THAWED_WITHIN: Duration = Duration::from_secs(25);

#[test]
fn an_agent_killed_while_frozen_leaves_the_guest_thawed_and_the_set_deleted() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let site = Site::start("agent", &[("a", FileSystem::Ext4)])?;
    let load = site.load()?;
    site.willing_writer()?;
    let mut create = site.bridge.start(&["create"], Some("frozen"))?;
    create.wait_stopped().with_context(|| site.log())?;
    site.vm.shell("killall -9 guest-agent")?;
    site.is_thawed(THAWED_WITHIN)?;
    create.go_on()?;
    let answer = create.wait(Duration::from_secs(120))?;
    site.was_refused(
        &answer,
        &["AGENT_UNREACHABLE", "HOLD_BROKEN", "AGENT_FAILED"],
    )?;
    site.is_unharmed(&load)?;
    // The agent came back: the next set is a good one.
    site.create(&[])?;
    Ok(())
}

#[test]
fn a_bridge_killed_after_any_step_leaves_a_thawed_guest_and_nothing_half_kept() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let site = Site::start(
        "bridge",
        &[("a", FileSystem::Ext4), ("b", FileSystem::Ext4)],
    )?;
    let load = site.load()?;
    site.willing_writer()?;
    for step in STEPS {
        let mut create = site.bridge.start(&["create"], Some(step))?;
        create
            .wait_stopped()
            .with_context(|| format!("{step}: {}", site.log()))?;
        create.kill()?;
        site.is_thawed(THAWED_WITHIN)
            .with_context(|| format!("killed after {step}"))?;
        load.wait_for_more_within(10, wait::STEP)?;
        // The next start finds the intent record and ends what was begun.
        let list = site.bridge.run(&["list"])?.succeeded()?;
        let left = site.daemon.snapshots()?;
        let provisional = left.iter().any(|snapshot| snapshot["state"] != "kept");
        ensure!(!provisional, "killed after {step}: {left:#?}");
        // Whole or not at all, and the records say the same: one copy of each disk for a kept set, none for any other.
        let listed = list.document.as_array().context("list answers a list")?;
        let kept = listed.iter().filter(|set| set["outcome"] == "kept").count();
        ensure!(
            left.len() == 2 * kept,
            "killed after {step}: {left:#?}, {listed:#?}"
        );
        // Before the verdict there is nothing to keep; from `kept` on the record says so and nothing undoes it. A bridge that
        // stops at the verdict may get further before all its threads stand still: either is whole.
        let is_kept = ["kept", "finished"].contains(step);
        ensure!(
            *step == "verdict" || (kept == 1) == is_kept,
            "killed after {step}: {listed:#?}"
        );
        if kept > 0 {
            let set = left
                .first()
                .and_then(|snapshot| snapshot["set"].as_str())
                .context("set")?;
            site.bridge.run(&["delete", set])?.succeeded()?;
        }
    }
    // Nothing stands in the way of the next set.
    site.create(&[])?;
    Ok(())
}

#[test]
fn a_daemon_killed_under_load_and_restarted_loses_no_acknowledged_transaction() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let mut site = Site::start("daemon", &[("a", FileSystem::Ext4)])?;
    let load = site.load()?;
    site.willing_writer()?;
    // A redirect-on-write set first: from here on, new blocks are found only by mappings.
    let set = site.create(&["--method", "row"])?;
    for _ in 0..5 {
        site.daemon.kill()?;
        site.daemon.restart()?;
        load.wait_for_more(40)?;
    }
    let acks = load.stop(&site.vm)?;
    let last = acks.last().context("no acknowledgement")?.id;
    site.vm.shell("umount /mnt/a")?;
    let end = site.try_create(&["--level", "crash"])?.succeeded()?;
    let mut files = site.read_back(&set.answer, "before")?;
    files.extend(site.read_back(&end, "after")?);
    let found = site.judge(&files)?;
    let (before, after) = (
        found.first().context("before")?,
        found.get(1).context("after")?,
    );
    site.compare(std::slice::from_ref(before), &acks, &set.window)?;
    ensure!(
        after.integrity == "ok" && after.count == after.last,
        "{after:?}"
    );
    ensure!(
        after.last >= last,
        "{last} was acknowledged, the disk ends at {}",
        after.last
    );
    Ok(())
}
