//! A guest whose clock jumps, which is paused, whose disks and memory are full, and whose agent stands still, all in the
//! middle of a set. Nothing stays frozen, no set is called better than it is, and the next one is good.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use vmshadow_tests::harness::bridge::Answer;
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::load::Load;
use vmshadow_tests::harness::requires;
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::wait;

/// A set that is waited for, whatever comes of it.
const ENDS_WITHIN: Duration = Duration::from_secs(150);
/// The hold has run out before the thaw came: what a busy machine may make of any set that was stopped on its way.
const TOO_LATE: [&str; 2] = ["HOLD_BROKEN", "HOLD_WRITES_TIMEOUT"];
/// What a set comes to whose machine was paused in the window.
const PAUSED: [&str; 3] = ["VM_DISTURBED", "HOLD_BROKEN", "HOLD_WRITES_TIMEOUT"];

/// A set in the middle of which, after `step`, something is done to the guest.
fn set_with(site: &Site, step: &str, act: impl FnOnce() -> Result<()>) -> Result<Answer> {
    let mut create = site.bridge.start(&["create"], Some(step))?;
    create.wait_stopped()?;
    act()?;
    create.go_on()?;
    create.wait(ENDS_WITHIN)
}

/// What is done does the set no harm. An emulated machine may be too slow for the window once; not three times.
fn is_good_all_the_same(site: &Site, step: &str, act: impl Fn() -> Result<()>) -> Result<()> {
    for _ in 0..3 {
        let answer = set_with(site, step, &act)?;
        if answer.code == 0 {
            let level = answer.at("/level-reached")?;
            ensure!(level == "application", "after {step}: {answer:#?}");
            return Ok(());
        }
        site.was_refused(&answer, &TOO_LATE)?;
        eprintln!("after {step}: too late, once more");
    }
    bail!("after {step}: three sets were too late: {}", site.log());
}

/// The machine with a load; the willing writer makes its sets the application's.
fn site(name: &str) -> Result<(Site, Load)> {
    let site = Site::start(name, &[("a", FileSystem::Ext4)])?;
    let load = site.load()?;
    site.willing_writer()?;
    Ok((site, load))
}

#[test]
fn a_clock_that_is_set_and_a_pause_change_nothing_of_what_is_promised() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let (site, load) = site("clock")?;
    for (step, year) in [("prepared", 2001), ("frozen", 2035), ("frozen", 1999)] {
        is_good_all_the_same(&site, step, || set_clock(&site, year))?;
    }
    // Nobody says thaw: the dead-man's clock is not the one that was set back.
    let answer = set_with(&site, "frozen", || {
        set_clock(&site, 1995)?;
        site.agent_says_thawed(wait::STEP)
    })?;
    site.was_refused(&answer, &TOO_LATE)?;

    let mut monitor = site.vm.monitor()?;
    let mut pause = |command: &str| monitor.execute(command, serde_json::json!({}));
    // A pause that ends before the window does no harm, unless the word of it comes late.
    let answer = set_with(&site, "prepared", || {
        pause("stop")?;
        pause("cont")?;
        Ok(())
    })?;
    if answer.code != 0 {
        site.was_refused(&answer, &PAUSED)?;
    }
    // In the window: even if it ends at once.
    for step in ["frozen", "committed"] {
        let answer = set_with(&site, step, || {
            pause("stop")?;
            pause("cont")?;
            Ok(())
        })?;
        site.was_refused(&answer, &PAUSED)?;
        site.is_thawed(wait::STEP)?;
    }
    // One that does not end: the guest cannot be told to thaw, and does so when it goes on.
    let answer = set_with(&site, "frozen", || pause("stop").map(drop))?;
    site.was_refused(&answer, &PAUSED)?;
    let answer = site.try_create(&[])?;
    site.was_refused(&answer, &["VM_NOT_RUNNING"])?;
    pause("cont")?;
    site.is_thawed(wait::STEP)?;
    load.wait_for_more(5)?;
    is_good_all_the_same(&site, "identified", || Ok(()))
}

fn set_clock(site: &Site, year: u32) -> Result<()> {
    site.vm.shell(&format!("date -s '{year}-01-01 00:00:00'"))?;
    let clock = site.vm.shell("date +%Y")?;
    ensure!(clock.trim() == year.to_string(), "{clock}");
    Ok(())
}

#[test]
fn an_agent_that_stands_still_full_disks_and_no_memory_leave_nothing_frozen() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let (site, load) = site("memory")?;
    let agents = site.vm.shell("pidof guest-agent")?;

    // The agent is the one that the other, which thaws for it, has as its parent.
    let agent = "$(for one in $(pidof guest-agent); do \
         grep -q guest-agent /proc/$(cut -d' ' -f4 /proc/$one/stat)/comm || echo $one; done)";
    let answer = set_with(&site, "frozen", || {
        site.vm.shell(&format!("kill -STOP {agent}"))?;
        site.is_thawed(wait::STEP)?;
        // It has stood still all the while.
        let state = site
            .vm
            .shell(&format!("cut -d' ' -f3 /proc/{agent}/stat"))?;
        ensure!(state.trim() == "T", "{state}");
        site.vm.shell(&format!("kill -CONT {agent}"))?;
        Ok(())
    })?;
    site.was_refused(&answer, &TOO_LATE)?;
    load.wait_for_more(5)?;
    // The database needs room from here on.
    drop(load);

    // The disk of the set, and the root file system.
    for place in ["/mnt/a", ""] {
        let filled = site.vm.shell(&format!(
            "dd if=/dev/zero of={place}/filling bs=64k 2>&1 || true"
        ))?;
        ensure!(filled.contains("No space left"), "{filled}");
    }
    is_good_all_the_same(&site, "identified", || Ok(()))?;
    site.vm.shell("rm /filling /mnt/a/filling")?;

    // Little is left to eat, so that the end of it comes inside the window.
    site.vm.shell(
        "mount -o remount,size=100% /tmp && free=$(awk '/MemAvailable/ {print int($2 / 1024)}' /proc/meminfo) &&
         dd if=/dev/zero of=/tmp/filling bs=1M count=$((free - 64))",
    )?;
    is_good_all_the_same(&site, "frozen", || {
        // It keeps all that it reads, for there is never a line.
        let eaten = site.vm.guest()?.start("tail /dev/zero")?.wait(wait::STEP)?;
        ensure!(eaten.status != 0, "it was not killed: {eaten:?}");
        Ok(())
    })?;
    let now = site.vm.shell("pidof guest-agent")?;
    ensure!(now == agents, "{agents} became {now}: {}", site.log());
    site.vm.shell("rm /tmp/filling")?;
    site.is_thawed(wait::STEP)?;
    is_good_all_the_same(&site, "identified", || Ok(()))
}
