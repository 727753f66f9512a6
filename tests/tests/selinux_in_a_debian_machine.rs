//! SELinux in a real machine that enforces a distribution's policy from its boot: what our package may do under that policy alone, under
//! the one that `packaging/selinux` has for it, and what becomes of a freeze that a policy denies.
//!
//! `make selinux` runs it: the machine's image and two loads of a policy take minutes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vmshadow_tests::guest_protocol::QGA_PORT;
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::image::{program, project, target};
use vmshadow_tests::harness::qga::QgaClient;
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::{requires, wait};

const AGENT: &str = "vmshadow-guest-agent";
const UNIT_WRITER: &str = "vmshadow-unit-writer@sleeper";
/// FIFREEZE among what the policy lets the agent ask of mount points.
const FIFREEZE: &str = "(0x5877 ";

/// The agent's package, as `make deb` makes it.
fn package(directory: &Path) -> Result<PathBuf> {
    program("guest-agent")?;
    let built = Command::new(project().join("packaging/deb/build.sh"))
        .arg(target().join("x86_64-unknown-linux-gnu/release"))
        .arg(directory)
        .output()?;
    ensure!(built.status.success(), "{built:?}");
    let printed = String::from_utf8(built.stdout)?;
    Ok(printed.lines().next().context("no package")?.into())
}

/// What takes as long as apt or a policy's compiler do under emulation; it must succeed.
fn long(site: &Site, command: &str) -> Result<String> {
    let answer = site.vm.guest()?.start(command)?.wait(6 * wait::STEP)?;
    ensure!(answer.status == 0, "{answer:?}\n{}", site.log());
    Ok(answer.stdout)
}

/// The domain of the processes of this name.
fn domain(site: &Site, name: &str) -> Result<String> {
    let labels = site
        .vm
        .shell(&format!("ps -o label= -C {name} | sort -u"))?;
    let mut parts = labels.trim().split(':').skip(2);
    Ok(parts.next().context(labels.clone())?.to_owned())
}

/// What was denied to this domain since the last call.
fn denials(site: &Site, domain: &str) -> Result<Vec<String>> {
    let log = site.vm.shell("dmesg -c")?;
    let subject = format!("scontext=system_u:system_r:{domain}:");
    let denied = log
        .lines()
        .filter(|line| line.contains("avc:  denied") && line.contains(&subject));
    Ok(denied.map(str::to_owned).collect())
}

/// Loads this policy for the agent, labels what is its own, and starts it anew.
fn load(site: &Site, policy: &str) -> Result<()> {
    long(
        site,
        &format!(
            "cat >/root/vmshadow.cil <<'POLICY' && semodule -i /root/vmshadow.cil\n{policy}\nPOLICY\n"
        ),
    )?;
    long(
        site,
        &format!(
            "restorecon -RF /usr/sbin/guest-agent /run/vmshadow /etc/vmshadow && dmesg -c >/dev/null && \
             systemctl restart {AGENT} && systemctl start {UNIT_WRITER}"
        ),
    )?;
    site.wait_for_writer("willing")?;
    site.wait_for_writer("sleeper")
}

/// A set with a writer by script and one on the socket, and QEMU's protocol.
fn all_works(site: &Site) -> Result<()> {
    let set = site.create(&[])?;
    let report = set.answer.document.to_string();
    for part in [
        "\"/\"",
        "/mnt/a",
        "/mnt/b",
        "willing: held",
        "sleeper: held",
    ] {
        ensure!(report.contains(part), "no {part}: {report}");
    }
    // The script runs with what services without a domain of their own may do.
    let script = site.vm.shell("cat /run/script.context")?;
    ensure!(script.contains(":initrc_t:"), "{script}");
    let mut agent = QgaClient::connect(&site.vm.port(QGA_PORT))?;
    for (command, count) in [("guest-fsfreeze-freeze", 3), ("guest-fsfreeze-thaw", 3)] {
        let answer = agent.ask(command, json!({}))?;
        ensure!(answer == json!({ "return": count }), "{command}: {answer}");
    }
    nothing_is_frozen(site)
}

fn nothing_is_frozen(site: &Site) -> Result<()> {
    let probe = site.vm.guest()?.start("touch /etc/probe")?;
    ensure!(probe.wait(wait::STEP)?.status == 0, "{}", site.log());
    site.is_thawed(wait::STEP)
}

/// Every file system that was asked says EACCES, everybody is let go, and the agent goes on.
fn is_denied(site: &Site) -> Result<()> {
    let answer = site.try_create(&[])?;
    ensure!(answer.code != 0, "{answer:?}");
    ensure!(answer.at("/reason/code")? == "FREEZE_FAILED", "{answer:#?}");
    let reports = answer.at("/filesystems")?.as_array().context("reports")?;
    for point in ["/mnt/a", "/mnt/b"] {
        let report = reports
            .iter()
            .find(|report| report["mountpoint"] == point)
            .context(point)?;
        let freeze = &report["freeze"];
        ensure!(
            freeze["result"] == "failed" && freeze["errno"] == 13,
            "{freeze}"
        );
        let message = freeze["message"].as_str().unwrap_or_default();
        ensure!(message.contains("denied by a policy"), "{message}");
    }
    ensure!(
        reports
            .iter()
            .all(|report| report["freeze"]["result"] != "frozen"),
        "{reports:?}"
    );
    for writer in answer.at("/writers")?.as_array().context("writers")? {
        ensure!(writer["freeze"]["state"] == "STABLE", "{writer}");
    }
    nothing_is_frozen(site)?;
    let mut agent = QgaClient::connect(&site.vm.port(QGA_PORT))?;
    let refused = agent.ask("guest-fsfreeze-freeze", json!({}))?;
    ensure!(
        refused["error"]["class"] == "GenericError"
            && refused.to_string().contains("FIFREEZE: Permission denied"),
        "{refused}"
    );
    ensure!(agent.ask("guest-ping", json!({}))? == json!({"return": {}}));
    let status = agent.ask("guest-fsfreeze-status", json!({}))?;
    ensure!(status == json!({"return": "thawed"}), "{status}");
    nothing_is_frozen(site)?;
    let denied = denials(site, "vmshadow_agent_t")?;
    ensure!(
        !denied.is_empty() && denied.iter().all(|line| line.contains("ioctlcmd=0x5877")),
        "{denied:#?}"
    );
    Ok(())
}

#[test]
#[ignore = "takes minutes: `make selinux`"]
fn a_set_is_taken_under_both_policies_and_a_denied_freeze_is_told_for_each_file_system()
-> Result<()> {
    if !requires::machines() || !requires::programs(&["dpkg-deb", "mmdebstrap"]) {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: a Debian of its own needs root");
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let package = package(directory.path())?;
    let disks = [("a", FileSystem::Ext4), ("b", FileSystem::Xfs)];
    let site = Site::start_with_selinux("selinux", &disks, &[package])?;
    // The kernel's own messages are what shows denials, so it must not drop any.
    let mode = site.vm.shell(
        "sysctl -qw kernel.printk_ratelimit=0 kernel.printk='1 4 1 7' && restorecon -RF /root /mnt && getenforce",
    )?;
    ensure!(mode.trim() == "Enforcing", "{mode}");
    long(
        &site,
        &format!("DEBIAN_FRONTEND=noninteractive apt-get -y install /root/{AGENT}_*.deb 2>&1"),
    )?;
    let says = "id -Z >/run/script.context";
    site.script_writer("willing", &[("freeze", says), ("thaw", "exit 0")])?;
    site.vm.shell(&format!(
        "mkdir -p /run/systemd/system && printf '[Service]\\nExecStart=/bin/sleep infinity\\n' >/run/systemd/system/sleeper.service && \
         systemctl daemon-reload && systemctl start sleeper {UNIT_WRITER}"
    ))?;
    site.wait_for_writer("sleeper")?;

    eprintln!("selinux: under the distribution's policy alone");
    ensure!(domain(&site, "guest-agent")? == "initrc_t");
    all_works(&site)?;
    let denied = denials(&site, "initrc_t")?;
    ensure!(denied.is_empty(), "{denied:#?}");

    eprintln!("selinux: in a domain of its own");
    let policy = fs::read_to_string(project().join("packaging/selinux/vmshadow.cil"))?;
    load(&site, &policy)?;
    ensure!(domain(&site, "guest-agent")? == "vmshadow_agent_t");
    ensure!(domain(&site, "unit-writer")? == "initrc_t");
    all_works(&site)?;
    let denied = denials(&site, "vmshadow_agent_t")?;
    ensure!(denied.is_empty(), "{denied:#?}");

    eprintln!("selinux: FIFREEZE is denied");
    ensure!(policy.matches(FIFREEZE).count() == 1, "{policy}");
    load(&site, &policy.replace(FIFREEZE, "("))?;
    is_denied(&site)
}
