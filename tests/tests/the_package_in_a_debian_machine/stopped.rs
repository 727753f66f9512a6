//! The agent is stopped, started anew and upgraded by the administrator, in the window and out of it.
//!
//! Called by the scenario.

use anyhow::{Context, Result, ensure};
use vmshadow_tests::guest_protocol::AGENT_PORT;
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::wait;

use super::{AGENT, OLDER_VERSION, nothing_is_frozen, property, version};

/// A connected writer that tells what it hears, and a script writer that does.
pub(crate) fn witnesses(site: &Site) -> Result<()> {
    site.script_writer(
        "told",
        &[
            ("freeze", "echo freeze >>/run/told"),
            ("thaw", "echo thaw >>/run/told"),
            ("abort", "echo abort >>/run/told"),
        ],
    )?;
    site.vm.shell(
        "systemd-run --unit=connected vmshadow-writer --name connected --freeze 'echo freeze >>/run/connected' \
         --thaw 'echo thaw >>/run/connected' --abort 'echo abort >>/run/connected'",
    )?;
    site.wait_for_writer("connected")
}

/// A set with all that takes part, which is kept.
fn a_set_is_good(site: &Site) -> Result<()> {
    site.wait_for_writer("told")?;
    site.wait_for_writer("connected")?;
    site.vm.shell("rm -f /run/told /run/connected")?;
    site.create(&[])?;
    for file in ["told", "connected"] {
        let heard = site.vm.shell(&format!("cat /run/{file}"))?;
        ensure!(heard == "freeze\nthaw\n", "{file}: {heard}");
    }
    nothing_is_frozen(site)
}

/// All goes on, and no writer takes it for a thaw.
fn everybody_hears_of_the_end(site: &Site) -> Result<()> {
    nothing_is_frozen(site)?;
    for file in ["told", "connected"] {
        wait::until("the writers to hear of the end", wait::STEP, || {
            let heard = site.vm.shell(&format!("cat /run/{file}"))?;
            ensure!(!heard.contains("thaw"), "{file}: {heard}");
            Ok((heard == "freeze\nabort\n").then_some(()))
        })
        .with_context(|| file.to_owned())?;
    }
    Ok(())
}

/// What the administrator does while all is frozen: everything goes on, everybody hears of the end, and the set is no set.
/// `after` comes when all that has been seen, while the host still waits.
fn in_the_window(site: &Site, command: &str, after: &str) -> Result<String> {
    site.vm.shell("rm -f /run/told /run/connected")?;
    let mut create = site.bridge.start(&["create"], Some("frozen"))?;
    create.wait_stopped().with_context(|| site.log())?;
    let now = "cut -d ' ' -f 1 /proc/uptime";
    let said = site.vm.shell(&format!(
        "set -e; {now}; {command}; {now}; touch /mnt/a/probe /mnt/b/probe; {now}"
    ))?;
    eprintln!("{command}: begun, done, and writes are taken: {said}");
    everybody_hears_of_the_end(site)?;
    create.go_on()?;
    site.vm.shell(after)?;
    let answer = create.wait(3 * wait::STEP)?;
    // The second: of a machine that is so slow that the host's own clock has ended the hold before.
    site.was_refused(&answer, &["HOLD_BROKEN", "HOLD_WRITES_TIMEOUT"])?;
    eprintln!("{}", answer.at("/reason")?);
    let left = site.daemon.snapshots()?;
    ensure!(left.iter().all(|one| one["state"] == "kept"), "{left:#?}");
    Ok(said)
}

/// `systemctl stop` and `systemctl restart`.
pub(crate) fn by_systemctl(site: &Site) -> Result<()> {
    a_set_is_good(site)?;
    // Systemd calls that no failure; the helper ends by itself, and no note of the hold is left.
    let stop = format!(
        "systemctl stop {AGENT}; systemctl show -p ActiveState -p Result {AGENT}; while pgrep guest-agent; do sleep 0.1; done; ls /run/vmshadow"
    );
    // The bridge asks a port that nobody has open until its limit, or until somebody answers who knows of no set.
    let left = in_the_window(site, &stop, &format!("systemctl start {AGENT}"))?;
    let is = left.contains("ActiveState=inactive") && left.contains("Result=success");
    ensure!(is && !left.contains("hold."), "{left}");
    a_set_is_good(site)?;

    let before = property(site, AGENT, "MainPID")?;
    in_the_window(site, &format!("systemctl restart {AGENT}"), ":")?;
    let after = property(site, AGENT, "MainPID")?;
    ensure!(after != before && after != "0", "{before}, {after}");
    a_set_is_good(site)
}

/// The unit is bound to no device: the agent that loses its port thaws, waits for it and goes on.
pub(crate) fn by_nobody_though_its_port_is_pulled_out(site: &Site) -> Result<()> {
    let before = property(site, AGENT, "MainPID")?;
    site.vm.shell("rm -f /run/told /run/connected")?;
    let mut create = site.bridge.start(&["create"], Some("frozen"))?;
    create.wait_stopped().with_context(|| site.log())?;
    site.vm.pull_port(AGENT_PORT)?;
    site.vm.shell("touch /mnt/a/probe /mnt/b/probe")?;
    everybody_hears_of_the_end(site)?;
    create.go_on()?;
    let answer = create.wait(3 * wait::STEP)?;
    site.was_refused(&answer, &["VM_DISTURBED"])?;
    site.vm.put_port_back(AGENT_PORT)?;
    a_set_is_good(site)?;
    let after = property(site, AGENT, "MainPID")?;
    ensure!(after == before, "started anew: {before}, {after}");
    Ok(())
}

/// From the older version that is installed to ours. The upgrade begins while no set is made, and comes to its end, which starts the
/// new agent, in the window.
pub(crate) fn by_an_upgrade(site: &Site) -> Result<()> {
    ensure!(version(site)? == OLDER_VERSION, "{}", version(site)?);
    a_set_is_good(site)?;
    let before = property(site, AGENT, "MainPID")?;
    // Debian's own program, which starts units for packages, waits for a word: what dpkg does before takes longer than a hold may.
    site.vm.shell(
        "mkdir /run/slow && printf '#!/bin/sh\\ntouch /run/begun; until [ -e /run/go ]; do sleep 0.1; done; exec /usr/bin/deb-systemd-invoke \"$@\"\\n' \
         >/run/slow/deb-systemd-invoke && chmod 755 /run/slow/deb-systemd-invoke",
    )?;
    let upgrade = format!(
        "mount -o remount,exec /run; PATH=/run/slow:$PATH dpkg -i /root/{AGENT}_*.deb 2>&1"
    );
    let upgrade = site.vm.guest()?.start(&upgrade)?;
    wait::until("the upgrade to be all but done", 3 * wait::STEP, || {
        ensure!(upgrade.still_runs(), "{:?}", upgrade.wait(wait::STEP));
        Ok((site.vm.shell("ls /run")?.contains("begun")).then_some(()))
    })?;
    in_the_window(
        site,
        &format!(
            "touch /run/go; until [ $(systemctl show -P MainPID {AGENT}) != {before} ]; do sleep 0.1; done"
        ),
        ":",
    )?;
    let answer = upgrade.wait(3 * wait::STEP)?;
    ensure!(answer.status == 0, "{answer:?}");
    let after = property(site, AGENT, "MainPID")?;
    ensure!(
        after != before && after != "0",
        "still the old one: {before}, {after}"
    );
    let status = site
        .vm
        .shell(&format!("dpkg-query -W -f '${{Status}}' {AGENT}"))?;
    ensure!(
        status == "install ok installed" && version(site)? != OLDER_VERSION,
        "{status}"
    );
    a_set_is_good(site)
}
