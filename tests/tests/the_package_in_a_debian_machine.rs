//! The packages in a real machine whose first process is Debian's own systemd, as a user has them: installed by apt, started, killed,
//! upgraded and removed by it, with sets taken meanwhile.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vmshadow_tests::harness::disk::{self, FileSystem};
use vmshadow_tests::harness::image::{program, project, target};
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::{requires, wait};

const AGENT: &str = "vmshadow-guest-agent";
/// Room for all packages on the disk that brings them.
const PACKAGES_BYTES: u64 = 64 << 20;

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

/// A disk with the packages on it, as `make deb` makes them.
fn packages(directory: &Path) -> Result<PathBuf> {
    program("guest-agent")?;
    let debs = directory.join("debs");
    let built = Command::new(project().join("packaging/deb/build.sh"))
        .arg(target().join("x86_64-unknown-linux-gnu/release"))
        .arg(&debs)
        .output()?;
    ensure!(built.status.success(), "{built:?}");
    let path = directory.join("packages.raw");
    File::create(&path)?.set_len(PACKAGES_BYTES)?;
    let debs = debs.to_str().context("path")?;
    disk::run("mke2fs", &["-q", "-t", "ext4", "-d", debs], &path)?;
    Ok(path)
}

/// A Debian with the agent installed by apt and an ext4 and an XFS disk that we serve.
fn start(name: &str) -> Result<Site> {
    let directory = tempfile::tempdir()?;
    let packages = packages(directory.path())?;
    let disks = [("a", FileSystem::Ext4), ("b", FileSystem::Xfs)];
    let site = Site::start_in_debian(name, &disks, |machine| {
        Ok(machine
            .file("packages", &packages)
            .mounted("/media", FileSystem::Ext4))
    })?;
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

    let said = apt(&site, &format!("install /media/{AGENT}_*.deb"))?;
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
    site.vm.shell("touch /etc/probe")?;
    site.is_thawed(wait::STEP)?;
    Ok(())
}
