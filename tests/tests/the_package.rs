//! The guest's Debian package: what is in it, and what apt makes of it in a Debian of its own.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vmshadow_tests::harness::image::{program, project, target};
use vmshadow_tests::harness::process::Process;
use vmshadow_tests::harness::{requires, wait};

const NAME: &str = "vmshadow-guest-agent";

fn run(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{text}{error}",
        output.status
    );
    Ok(text)
}

/// Builds it out of the static programs that the images have.
fn build(output: &Path) -> Result<PathBuf> {
    program("guest-agent")?;
    let printed = run(Command::new(project().join("packaging/deb/build.sh"))
        .arg(target().join("x86_64-unknown-linux-gnu/release"))
        .arg(output))?;
    Ok(PathBuf::from(printed.trim()))
}

fn may_run(programs: &[&str]) -> bool {
    requires::machines()
        && requires::programs(&["dpkg-deb", "readelf"])
        && requires::programs(programs)
}

#[test]
fn two_builds_are_the_same_bytes_and_hold_what_a_guest_needs() -> Result<()> {
    if !may_run(&[]) {
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let first = build(&directory.path().join("1"))?;
    let second = build(&directory.path().join("2"))?;
    ensure!(fs::read(&first)? == fs::read(&second)?, "two builds differ");
    let list = run(Command::new("dpkg-deb").arg("-c").arg(&first))?;
    for file in [
        "./usr/sbin/guest-agent",
        "./usr/bin/sqlite-writer",
        "./lib/systemd/system/vmshadow-guest-agent.service",
        "./etc/default/vmshadow-guest-agent",
        "./etc/vmshadow/writers/",
        "./etc/vmshadow/writers.d/",
        "./usr/share/man/man8/guest-agent.8.gz",
        "./usr/share/doc/vmshadow-guest-agent/copyright",
        "./usr/share/doc/vmshadow-guest-agent/SELINUX.md.gz",
    ] {
        ensure!(
            list.lines().any(|line| line.ends_with(file)),
            "no {file} in\n{list}"
        );
    }
    ensure!(
        list.lines().all(|line| line.contains("root/root")),
        "not all root's:\n{list}"
    );
    let depends = run(Command::new("dpkg-deb")
        .arg("-f")
        .arg(&first)
        .arg("Depends"))?;
    ensure!(depends.trim().is_empty(), "it depends on {depends}");
    Ok(())
}

#[test]
fn the_manual_names_every_option_and_no_other() -> Result<()> {
    if !may_run(&[]) {
        return Ok(());
    }
    let options = |text: &str| -> Vec<String> {
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
        let mut options: Vec<_> = words
            .filter(|word| word.starts_with("--") && word.len() > 2)
            .map(str::to_owned)
            .collect();
        options.sort();
        options.dedup();
        options
    };
    let help = run(Command::new(program("guest-agent")?).arg("--help"))?;
    let manual = fs::read_to_string(project().join("packaging/deb/guest-agent.8"))?;
    let (help, manual) = (options(&help), options(&manual.replace("\\-", "-")));
    ensure!(
        help.len() > 10 && help == manual,
        "help: {help:?}\nmanual: {manual:?}"
    );
    Ok(())
}

#[test]
fn lintian_finds_nothing() -> Result<()> {
    if !may_run(&["lintian"]) {
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let package = build(directory.path())?;
    let found = run(Command::new("lintian")
        .args(["--allow-root", "--fail-on", "error,warning", "--info"])
        .arg(&package))?;
    ensure!(found.trim().is_empty(), "{found}");
    Ok(())
}

/// A Debian with systemd and the stock agent, in a directory that is removed with the value.
struct Debian {
    directory: tempfile::TempDir,
}

impl Debian {
    /// Unpacks it; makes it the first time.
    fn new() -> Result<Self> {
        let archive = target().join("images/debian.tar");
        if !archive.is_file() {
            fs::create_dir_all(target().join("images"))?;
            let new = target().join(format!("images/debian-{}.tar", std::process::id()));
            eprintln!("making a Debian: a minute, once");
            run(Command::new("mmdebstrap")
                .args([
                    "--quiet",
                    "--variant=apt",
                    "--include=systemd,qemu-guest-agent",
                ])
                .arg("bookworm")
                .arg(&new))?;
            fs::rename(&new, &archive)?;
        }
        let directory = tempfile::Builder::new()
            .prefix("vmshadow-debian-")
            .tempdir()?;
        run(Command::new("tar")
            .args(["--exclude=./dev/*", "-C"])
            .arg(directory.path())
            .arg("-xf")
            .arg(&archive))?;
        Ok(Self { directory })
    }

    fn path(&self, inside: &str) -> PathBuf {
        self.directory.path().join(inside)
    }

    /// A command in it, with mounts that end with it.
    fn command(&self, command: &str) -> Command {
        let top = self.directory.path().display();
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "--propagation", "private", "sh", "-c"]);
        unshare.arg(format!(
            "mount -t proc proc {top}/proc && mount -t sysfs -o ro sysfs {top}/sys && mount -t devtmpfs devtmpfs {top}/dev && \
             mount -t tmpfs tmpfs {top}/tmp && \
             exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive LC_ALL=C chroot {top} sh -c '{command}'"
        ));
        unshare
    }

    fn run(&self, command: &str) -> Result<String> {
        run(&mut self.command(command))
    }

    /// What dpkg says of a package: `ii`, `rc`, or nothing.
    fn state(&self, package: &str) -> Result<String> {
        let line =
            format!("dpkg-query -W -f \"\\${{db:Status-Abbrev}}\" {package} 2>/dev/null || true");
        Ok(self.run(&line)?.trim().to_owned())
    }
}

#[test]
fn apt_installs_it_in_place_of_the_stock_agent_and_takes_it_away_again() -> Result<()> {
    if !may_run(&["mmdebstrap", "unshare", "chroot"]) {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: a Debian of its own needs root");
        return Ok(());
    }
    let debian = Debian::new()?;
    let package = build(&debian.path("root"))?;
    let package = package
        .strip_prefix(debian.directory.path())?
        .display()
        .to_string();
    ensure!(
        debian.state("qemu-guest-agent")? == "ii",
        "no stock agent to begin with"
    );

    let said = debian.run(&format!("apt-get -y install /{package}"))?;
    ensure!(debian.state(NAME)? == "ii", "{said}");
    ensure!(
        debian.state("qemu-guest-agent")? != "ii",
        "two agents:\n{said}"
    );
    let enabled = debian.run(&format!("systemctl is-enabled {NAME}.service"))?;
    ensure!(enabled.trim() == "enabled", "{enabled}");
    let unit = debian.run(&format!(
        "systemd-analyze verify --man=no {NAME}.service 2>&1 || true"
    ))?;
    ensure!(
        !unit.contains(NAME),
        "systemd does not like the unit: {unit}"
    );
    ensure!(
        debian.run(&format!("dpkg --verify {NAME}"))?.is_empty(),
        "not as it was packed"
    );

    // The installed program works, and knows where it is.
    let agent = debian.command(
        "exec guest-agent --port unix:/run/native --qga-port unix:/run/qga --only-under /nowhere --block-rpcs guest-exec",
    );
    let mut agent = Process::start("guest-agent", agent, &debian.path("agent"))?;
    let asked = || -> Result<()> {
        let port = wait::until("the agent to listen", wait::STEP, || {
            Ok(UnixStream::connect(debian.path("run/qga")).ok())
        })?;
        let mut port = BufReader::new(port);
        let mut ask = |name: &str| -> Result<Value> {
            writeln!(port.get_mut(), "{{\"execute\":\"{name}\"}}")?;
            let mut line = String::new();
            port.read_line(&mut line)?;
            Ok(serde_json::from_str(&line)?)
        };
        let system = ask("guest-get-osinfo")?;
        ensure!(system["return"]["id"] == "debian", "{system}");
        let blocked = ask("guest-exec")?;
        ensure!(blocked["error"]["class"] == "CommandNotFound", "{blocked}");
        Ok(())
    };
    asked().with_context(|| agent.stderr())?;
    agent.kill()?;

    // What a person has set survives an upgrade; what a person has put there survives everything.
    let default = debian.path("etc/default/vmshadow-guest-agent");
    fs::write(&default, "OPTIONS=\"--block-rpcs guest-exec\"\n")?;
    fs::create_dir(debian.path("etc/vmshadow/writers/mine"))?;
    debian.run(&format!("apt-get -y install --reinstall /{package}"))?;
    ensure!(
        fs::read_to_string(&default)?.contains("guest-exec"),
        "the options are lost"
    );
    debian.run(&format!("apt-get -y remove {NAME}"))?;
    ensure!(debian.state(NAME)? == "rc");
    ensure!(!debian.path("usr/sbin/guest-agent").exists() && default.exists());
    debian.run(&format!("apt-get -y purge {NAME}"))?;
    let state = debian.state(NAME)?;
    ensure!(state.is_empty(), "{state}");
    ensure!(!default.exists() && debian.path("etc/vmshadow/writers/mine").exists());
    let links = debian.run("find /etc/systemd /var/lib/systemd -name \"*vmshadow*\"")?;
    ensure!(links.is_empty(), "left behind: {links}");
    Ok(())
}
