//! The agent killed or stopped, with or without its helper, and the machine paused, after every step of a set: nothing stays
//! frozen beyond the limit, the set is whole and true or not kept at all, and the next one is good.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use vmshadow_tests::harness::bridge::{Answer, STEPS};
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::load::Load;
use vmshadow_tests::harness::oracle::Window;
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::{requires, wait};

/// The dead-man's 10 s, and what an emulated machine on a busy host may add.
const THAWED_WITHIN: Duration = Duration::from_secs(25);
/// A set that is waited for, whatever comes of it.
const ENDS_WITHIN: Duration = Duration::from_secs(150);
/// After these the guest is frozen: whatever happens then, nobody can vouch for the set any more.
const IN_THE_WINDOW: [&str; 3] = ["frozen", "marked", "committed"];
/// After these the set is kept: whatever happens then, it stays.
const DECIDED: [&str; 2] = ["kept", "finished"];
/// Where a pause is tried that does not end: before the window and at its end. The bridge waits for a paused guest at each turn.
const PAUSED_FOR_GOOD: [&str; 2] = ["prepared", "committed"];
/// A set that is kept though something happened after these was not decided before: its copies are judged.
const UNDECIDED: [&str; 2] = ["thawed", "verdict"];
/// The agent is the one that the other, which thaws for it, has as its parent.
const AGENT: &str = "$(for one in $(pidof guest-agent); do \
     grep -q guest-agent /proc/$(cut -d' ' -f4 /proc/$one/stat)/comm || echo $one; done)";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Happens {
    /// The helper is left.
    AgentKilled,
    /// Nobody is left: the next start thaws.
    BothKilled,
    /// The agent stands still, and goes on when the disks take writes again.
    AgentStopped,
    /// A pause that ends at once.
    Paused,
    /// A pause that the bridge does not live to see the end of.
    StaysPaused,
}

const ALL: [Happens; 5] = [
    Happens::AgentKilled,
    Happens::BothKilled,
    Happens::AgentStopped,
    Happens::Paused,
    Happens::StaysPaused,
];

/// A set in which this happens after this step, while the bridge goes on.
fn set_with(site: &Site, happens: Happens, step: &str) -> Result<Answer> {
    let pause = |command| {
        let mut monitor = site.vm.monitor()?;
        monitor.execute(command, serde_json::json!({})).map(drop)
    };
    // What was killed in the last round is started again in its own time, and what was left of it has gone then.
    let agent = wait::until("the agent and its helper", wait::STEP, || {
        let all = site
            .vm
            .shell(&format!("echo {AGENT}; pidof guest-agent || true"))?;
        let mut lines = all.lines().map(str::split_whitespace);
        let agents: Vec<&str> = lines.next().into_iter().flatten().collect();
        let both = lines.next().map_or(0, Iterator::count);
        Ok(match agents.as_slice() {
            [agent] if both == 2 => Some((*agent).to_owned()),
            _ => None,
        })
    })?;
    let mut create = site.bridge.start(&["create"], Some(step))?;
    create.wait_stopped()?;
    match happens {
        Happens::AgentKilled => {
            site.vm.shell(&format!("kill -KILL {agent}"))?;
            create.go_on()?;
        }
        Happens::BothKilled => {
            site.vm.shell("killall -KILL guest-agent")?;
            create.go_on()?;
        }
        Happens::AgentStopped => {
            site.vm.shell(&format!("kill -STOP {agent}"))?;
            create.go_on()?;
            site.is_thawed(THAWED_WITHIN)?;
            site.vm.shell(&format!("kill -CONT {agent}"))?;
        }
        Happens::Paused => {
            pause("stop")?;
            create.go_on()?;
            pause("cont")?;
        }
        Happens::StaysPaused => {
            pause("stop")?;
            create.go_on()?;
            let answer = create.wait(ENDS_WITHIN);
            pause("cont")?;
            return answer;
        }
    }
    create.wait(ENDS_WITHIN)
}

/// What is kept is whole: one copy of each disk, permanent, at the level that was asked. Of all else nothing is left.
fn is_whole_or_gone(site: &Site, answer: &Answer) -> Result<()> {
    let left = site.daemon.snapshots()?;
    if answer.code == 0 {
        ensure!(answer.at("/outcome")? == "kept", "{answer:#?}");
        ensure!(answer.at("/level-reached")? == "application", "{answer:#?}");
        ensure!(left.len() == site.disks.len(), "{left:#?}");
        ensure!(left.iter().all(|one| one["state"] == "kept"), "{left:#?}");
    } else {
        ensure!(answer.at("/outcome")? != "kept", "{answer:#?}");
        let copies = answer.at("/copies")?.as_array().context("copies")?;
        ensure!(copies.is_empty(), "{answer:#?}");
        ensure!(left.is_empty(), "{left:#?}");
    }
    Ok(())
}

fn delete(site: &Site, answer: &Answer) -> Result<()> {
    let set = answer.at("/set")?.as_str().context("set")?;
    site.bridge.run(&["delete", set])?.succeeded()?;
    Ok(())
}

/// A set that nothing happens to. An emulated machine may be too slow for the window once; not three times.
fn next_is_good(site: &Site) -> Result<()> {
    for _ in 0..3 {
        let answer = site.try_create(&[])?;
        is_whole_or_gone(site, &answer)?;
        if answer.code == 0 {
            return delete(site, &answer);
        }
        site.was_refused(&answer, &["HOLD_BROKEN", "HOLD_WRITES_TIMEOUT"])?;
        eprintln!("too late, once more");
    }
    bail!("three sets were too late: {}", site.log());
}

/// One step and what happens after it; the window of the set if it was kept.
fn happens_after(
    site: &Site,
    load: &Load,
    happens: Happens,
    step: &str,
) -> Result<Option<(Answer, Window)>> {
    let asked_us = site.vm.guest()?.boottime_us()?;
    let answer = set_with(site, happens, step)?;
    site.is_thawed(THAWED_WITHIN)?;
    // The time that is read is cut to hundredths.
    let answered_us = site.vm.guest()?.boottime_us()? + 10_000;
    load.wait_for_more(5)?;
    is_whole_or_gone(site, &answer)?;
    let is_kept = answer.code == 0;
    ensure!(
        !(is_kept && IN_THE_WINDOW.contains(&step)),
        "kept all the same: {answer:#?}"
    );
    ensure!(is_kept || !DECIDED.contains(&step), "not kept: {answer:#?}");
    let why = answer.document["reason"]["code"].as_str().unwrap_or("kept");
    println!("{happens:?} after {step}: {why}");
    if !is_kept {
        return Ok(None);
    }
    let window = Site::window(&answer, asked_us, answered_us)?;
    Ok(Some((answer, window)))
}

#[test]
fn whatever_happens_after_any_step_leaves_a_thawed_guest_and_a_true_set_or_none() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let site = Site::start("steps", &[("a", FileSystem::Ext4), ("b", FileSystem::Ext4)])?;
    let load = site.load()?;
    site.willing_writer()?;
    let mut copies = Vec::new();
    let mut windows = Vec::new();
    for happens in ALL {
        for step in STEPS {
            if happens == Happens::StaysPaused && !PAUSED_FOR_GOOD.contains(step) {
                continue;
            }
            let kept = happens_after(&site, &load, happens, step)
                .with_context(|| format!("{happens:?} after {step}"))?;
            if let Some((set, window)) = kept {
                if UNDECIDED.contains(step) {
                    copies.extend(site.read_back(&set, &format!("{happens:?}-{step}"))?);
                    windows.push(window);
                }
                delete(&site, &set)?;
            } else {
                next_is_good(&site).with_context(|| format!("{happens:?} after {step}"))?;
            }
        }
    }
    let acks = load.stop(&site.vm)?;
    ensure!(!copies.is_empty(), "no set was kept");
    let found = site.judge(&copies)?;
    for (pair, window) in found.chunks(site.disks.len()).zip(&windows) {
        site.compare(pair, &acks, window)?;
    }
    println!("{} copies judged", found.len());
    Ok(())
}
