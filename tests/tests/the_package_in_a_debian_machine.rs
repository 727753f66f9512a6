//! The packages in a real machine whose first process is Debian's own systemd, as a user has them: installed by apt, started, killed,
//! upgraded and removed by it, with sets taken meanwhile.

#[path = "the_package_in_a_debian_machine/accounts.rs"]
mod accounts;
#[path = "the_package_in_a_debian_machine/file_systems.rs"]
mod file_systems;
#[path = "the_package_in_a_debian_machine/network_file_systems.rs"]
mod network_file_systems;
#[path = "the_package_in_a_debian_machine/power.rs"]
mod power;
#[path = "the_package_in_a_debian_machine/stopped.rs"]
mod stopped;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vmshadow_tests::guest_protocol::LOAD_PORT;
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::image::{program, project, target};
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::{requires, wait};

const AGENT: &str = "vmshadow-guest-agent";

/// The version of the package that is upgraded from: the same programs.
const OLDER_VERSION: &str = "0.0.1";

fn may_run() -> bool {
    if !requires::machines() || !requires::programs(&["dpkg-deb", "readelf", "mmdebstrap"]) {
        return false;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: a Debian of its own needs root");
        return false;
    }
    true
}

/// The packages, as `make deb` makes them.
fn packages(directory: &Path) -> Result<Vec<PathBuf>> {
    program("guest-agent")?;
    let built = Command::new(project().join("packaging/deb/build.sh"))
        .arg(target().join("x86_64-unknown-linux-gnu/release"))
        .arg(directory)
        .output()?;
    ensure!(built.status.success(), "{built:?}");
    let printed = String::from_utf8(built.stdout)?;
    Ok(printed.lines().map(PathBuf::from).collect())
}

/// The agent's package with a lower version, beside it.
fn older(packages: &[PathBuf]) -> Result<PathBuf> {
    let package = packages.first().context("no package")?;
    let older = package.with_file_name("older.deb");
    let made = Command::new("sh")
        .arg("-euc")
        .arg(
            "dpkg-deb -R $0 $1.d && sed -i \"s/^Version: .*/Version: $2/\" $1.d/DEBIAN/control && \
             dpkg-deb --root-owner-group -Zgzip -z1 --build $1.d $1",
        )
        .arg(package)
        .arg(&older)
        .arg(OLDER_VERSION)
        .output()?;
    ensure!(made.status.success(), "{made:?}");
    Ok(older)
}

/// A Debian with the packages in `/root` and an ext4 and an XFS disk; all of them, its root too, are served by us.
fn start(name: &str) -> Result<Site> {
    let directory = tempfile::tempdir()?;
    let mut packages = packages(directory.path())?;
    packages.push(older(&packages)?);
    let disks = [("a", FileSystem::Ext4), ("b", FileSystem::Xfs)];
    let site = Site::start_in_debian(name, &disks, &packages)?;
    eprintln!(
        "{name}: up {} ms after QEMU's start",
        site.vm.boot_time().as_millis()
    );
    Ok(site)
}

/// A command that may take as long as apt does under emulation.
fn apt(site: &Site, words: &str) -> Result<String> {
    let command = format!("DEBIAN_FRONTEND=noninteractive apt-get -y {words} 2>&1");
    let answer = site.vm.guest()?.start(&command)?.wait(3 * wait::STEP)?;
    ensure!(answer.status == 0, "{words}: {answer:?}\n{}", site.log());
    Ok(answer.stdout)
}

/// A property of a unit.
fn property(site: &Site, unit: &str, name: &str) -> Result<String> {
    let value = site
        .vm
        .shell(&format!("systemctl show --property={name} --value {unit}"))?;
    Ok(value.trim().to_owned())
}

#[test]
fn apt_installs_it_systemd_runs_it_and_a_set_is_taken() -> Result<()> {
    if !may_run() {
        return Ok(());
    }
    let site = start("debian")?;
    let first = site.vm.shell("readlink /proc/1/exe")?;
    ensure!(first.contains("systemd"), "the first process is {first}");
    // All that Debian started has come up: what fails later is ours.
    let failed = site
        .vm
        .shell("systemctl list-units --failed --plain --no-legend")?;
    ensure!(failed.trim().is_empty(), "{failed}");

    let said = apt(&site, "install /root/older.deb")?;
    ensure!(said.contains("Removing qemu-guest-agent"), "{said}");
    let status = site
        .vm
        .shell(&format!("systemctl status --no-pager {AGENT}"))?;
    ensure!(
        status.contains("active (running)") && status.contains("; enabled;"),
        "{status}"
    );
    let main = property(&site, AGENT, "MainPID")?;
    let score = site.vm.shell(&format!("cat /proc/{main}/oom_score_adj"))?;
    ensure!(score.trim() == "-900", "{score}");
    let memory = site.vm.shell(&format!("grep VmLck /proc/{main}/status"))?;
    ensure!(!memory.contains("\t       0 kB"), "not locked: {memory}");

    site.willing_writer()?;
    let set = site.create(&[])?;
    let report = set.answer.document.to_string();
    for point in ["\"/\"", "/mnt/a", "/mnt/b"] {
        ensure!(report.contains(point), "no {point}: {report}");
    }
    nothing_is_frozen(&site)?;
    killed_in_the_window(&site)?;
    units_stand_still(&site)?;
    upgraded_and_removed(&site)
}

#[test]
fn it_goes_through_stops_upgrades_a_dead_nfs_server_and_reboots() -> Result<()> {
    if !may_run() {
        return Ok(());
    }
    let site = start("service")?;
    // Ours removes it.
    site.vm.shell("cp /usr/sbin/qemu-ga /root/")?;
    // Without apt, which takes longer and is in the other test.
    site.vm
        .shell("dpkg -r qemu-guest-agent >&2 && dpkg -i /root/older.deb >&2")?;
    stopped::witnesses(&site)?;
    let begin = std::time::Instant::now();
    let tell = |what: &str| eprintln!("{what}: after {} s", begin.elapsed().as_secs());
    stopped::by_an_upgrade(&site)?;
    tell("upgraded");
    stopped::by_systemctl(&site)?;
    tell("stopped and started");
    stopped::by_nobody_though_its_port_is_pulled_out(&site)?;
    tell("without its port");
    network_file_systems::keep_nobody_waiting(&site)?;
    tell("NFS");
    start_stock(&site)?;
    accounts::are_set_as_qemus_own_agent_sets_them(&site)?;
    tell("accounts");
    site.vm.shell("pkill -x qemu-ga")?;
    power::is_off_as_qemus_own_agent_puts_it(&site)?;
    tell("power");
    Ok(())
}

#[test]
fn the_root_freezes_last_and_what_cannot_freeze_lowers_the_level() -> Result<()> {
    if !may_run() {
        return Ok(());
    }
    let site = start("freezes")?;
    site.vm
        .shell("dpkg -r qemu-guest-agent >&2 && dpkg -i /root/older.deb >&2")?;
    site.willing_writer()?;
    site.wait_for_writer("willing")?;
    file_systems::freeze_in_order(&site)?;
    file_systems::without_a_freeze_are_told(&site)
}

/// QEMU's own agent, on a port of its own.
fn start_stock(site: &Site) -> Result<()> {
    let command = format!(
        "exec /root/qemu-ga --method virtio-serial --path /dev/virtio-ports/{LOAD_PORT} --statedir /run >/run/qemu-ga.log 2>&1"
    );
    drop(site.vm.guest()?.start(&command)?);
    Ok(())
}

/// The version of the agent's package that is installed.
fn version(site: &Site) -> Result<String> {
    site.vm
        .shell(&format!("dpkg-query -W -f '${{Version}}' {AGENT}"))
}

/// The root's file system and the disks take writes.
fn nothing_is_frozen(site: &Site) -> Result<()> {
    let probe = site.vm.guest()?.start("touch /etc/probe")?;
    ensure!(probe.wait(wait::STEP)?.status == 0, "{}", site.log());
    site.is_thawed(wait::STEP)
}

/// Agent and helper are killed while all is frozen: the unit's last command thaws, and else the unit is started again.
fn killed_in_the_window(site: &Site) -> Result<()> {
    // Not started again, there is nobody else who could thaw.
    site.vm.shell(&format!(
        "d=/run/systemd/system/{AGENT}.service.d && mkdir -p $d && printf '[Service]\\nRestart=no\\n' >$d/once.conf && systemctl daemon-reload"
    ))?;
    let mut create = site.bridge.start(&["create"], Some("frozen"))?;
    create.wait_stopped().with_context(|| site.log())?;
    // One shell for all: by the time of a second one the agent's own deadline could have thawed.
    let killed = site.vm.shell("pkill -9 -x guest-agent && echo killed")?;
    ensure!(killed.trim() == "killed", "{killed}");
    nothing_is_frozen(site)?;
    create.go_on()?;
    let answer = create.wait(3 * wait::STEP)?;
    ensure!(answer.code != 0, "{answer:?}");
    wait::until("the unit to have failed", wait::STEP, || {
        Ok((property(site, AGENT, "ActiveState")? == "failed").then_some(()))
    })?;
    site.vm.shell(&format!(
        "rm /run/systemd/system/{AGENT}.service.d/once.conf && systemctl daemon-reload && systemctl reset-failed {AGENT} && systemctl start {AGENT}"
    ))?;
    let before = property(site, AGENT, "MainPID")?;
    site.vm.shell("pkill -9 -x guest-agent")?;
    wait::until("the agent to be started again", wait::STEP, || {
        let state = property(site, AGENT, "ActiveState")?;
        let now = property(site, AGENT, "MainPID")?;
        Ok((state == "active" && now != before && now != "0").then_some(()))
    })?;
    let said = site
        .vm
        .shell(&format!("journalctl --no-pager -u {AGENT} -o cat"))?;
    ensure!(said.contains("status=9/KILL"), "{said}");
    // The set that comes next is whole.
    site.wait_for_writer("willing")?;
    site.create(&[])?;
    nothing_is_frozen(site)
}

/// A service of the distribution's systemd that counts, for as long as it runs.
fn counter(site: &Site, name: &str) -> Result<()> {
    site.vm.shell(&format!(
        "mkdir -p /run/systemd/system && printf '[Service]\\nExecStart=/bin/sh -c \"while :; do echo >>/run/{name}.count; sleep 0.1; done\"\\n' \
         >/run/systemd/system/{name}.service && systemctl daemon-reload && systemctl start {name}"
    ))?;
    Ok(())
}

fn count(site: &Site, name: &str) -> Result<u64> {
    let text = site.vm.shell(&format!("wc -l </run/{name}.count"))?;
    Ok(text.trim().parse()?)
}

/// The unit writer by the unit file that the package has brought: one service is frozen, one is stopped and started.
fn units_stand_still(site: &Site) -> Result<()> {
    for name in ["frozen", "stopped"] {
        counter(site, name)?;
    }
    site.vm.shell(
        "d=/run/systemd/system/vmshadow-unit-writer@stopped.service.d && mkdir -p $d && \
         printf '[Service]\\nEnvironment=OPTIONS=--stop\\n' >$d/stop.conf && systemctl daemon-reload && \
         systemctl start vmshadow-unit-writer@frozen vmshadow-unit-writer@stopped",
    )?;
    for name in ["\"frozen\"", "\"stopped\""] {
        site.wait_for_writer(name)?;
    }
    let before = property(site, "stopped", "MainPID")?;
    // In the window, before file systems are frozen too: what they count and the kernel's word, seen by another writer.
    site.script_writer(
        "witness",
        &[
            ("writer.json", r#"{"level": "SYSTEM"}"#),
            (
                "freeze",
                "cat /sys/fs/cgroup/system.slice/frozen.service/cgroup.events >/run/seen; systemctl show -P ActiveState stopped >>/run/seen",
            ),
            ("thaw", "exit 0"),
        ],
    )?;
    site.create(&[])?;
    let seen = site.vm.shell("cat /run/seen")?;
    ensure!(
        seen.contains("frozen 1") && seen.ends_with("inactive\n"),
        "{seen}"
    );
    let after = property(site, "stopped", "MainPID")?;
    ensure!(after != before && after != "0", "{before}, {after}");
    for name in ["frozen", "stopped"] {
        let had = count(site, name)?;
        wait::until("the service to go on", wait::STEP, || {
            Ok((count(site, name)? > had).then_some(()))
        })?;
    }
    Ok(())
}

/// An upgrade replaces a running agent; a purge leaves no program, process or unit.
fn upgraded_and_removed(site: &Site) -> Result<()> {
    let before = property(site, AGENT, "MainPID")?;
    ensure!(version(site)? == OLDER_VERSION, "{}", version(site)?);
    apt(site, &format!("install /root/{AGENT}_*.deb"))?;
    ensure!(version(site)? != OLDER_VERSION, "not upgraded");
    let after = property(site, AGENT, "MainPID")?;
    ensure!(
        after != before && after != "0",
        "still the old one: {before}, {after}"
    );
    site.wait_for_writer("willing")?;
    apt(site, &format!("purge {AGENT}"))?;
    let left = site.vm.shell(
        "pgrep -l 'guest-agent|unit-writer'; find /etc/systemd /var/lib/systemd /usr/sbin /usr/libexec /lib/systemd \
         -name '*vmshadow*' -o -name guest-agent; systemctl list-units --all --plain --no-legend 'vmshadow-guest*' 'vmshadow-unit*'",
    )?;
    ensure!(left.trim().is_empty(), "left behind: {left}");
    nothing_is_frozen(site)
}
