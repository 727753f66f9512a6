//! The guest's Debian packages: what is in them, and what apt makes of them in a Debian of its own.

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
/// Servers that have a writer in a package of its own, and the user that it runs as.
const SERVERS: &[(&str, &str)] = &[
    ("postgresql", "postgres"),
    ("mariadb", "mysql"),
    ("mysql", "mysql"),
    ("redis", "redis"),
    ("etcd", "etcd"),
];
/// Programs and their manuals.
const MANUALS: &[(&str, &str)] = &[
    ("guest-agent", "guest-agent.8"),
    ("vmshadow-writer", "vmshadow-writer.1"),
    ("sqlite-writer", "sqlite-writer.1"),
    ("unit-writer", "unit-writer.8"),
    ("postgresql-writer", "postgresql-writer.8"),
    ("mariadb-writer", "mariadb-writer.8"),
    ("mysql-writer", "mysql-writer.8"),
    ("redis-writer", "redis-writer.8"),
    ("etcd-writer", "etcd-writer.8"),
];

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

/// Builds them out of the static programs that the images have: the agent's, and one for each server.
fn build(output: &Path) -> Result<Vec<PathBuf>> {
    program("guest-agent")?;
    let printed = run(Command::new(project().join("packaging/deb/build.sh"))
        .arg(target().join("x86_64-unknown-linux-gnu/release"))
        .arg(output))?;
    let packages: Vec<_> = printed.lines().map(PathBuf::from).collect();
    ensure!(packages.len() == 1 + SERVERS.len(), "{packages:?}");
    Ok(packages)
}

fn field(package: &Path, name: &str) -> Result<String> {
    let value = run(Command::new("dpkg-deb").arg("-f").arg(package).arg(name))?;
    Ok(value.trim().to_owned())
}

/// Its list has these files, and all that is in it is root's.
fn holds(package: &Path, files: &[String]) -> Result<()> {
    let list = run(Command::new("dpkg-deb").arg("-c").arg(package))?;
    for file in files {
        ensure!(
            list.lines().any(|line| line.ends_with(file)),
            "no {file} in\n{list}"
        );
    }
    ensure!(
        list.lines().all(|line| line.contains("root/root")),
        "not all root's:\n{list}"
    );
    Ok(())
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
    let packages = build(&directory.path().join("1"))?;
    for (first, second) in packages.iter().zip(build(&directory.path().join("2"))?) {
        ensure!(
            fs::read(first)? == fs::read(&second)?,
            "two builds of {} differ",
            first.display()
        );
    }
    let (agent, writers) = packages.split_first().context("packages")?;
    holds(
        agent,
        &[
            "./usr/sbin/guest-agent",
            "./usr/bin/sqlite-writer",
            "./usr/bin/vmshadow-writer",
            "./usr/libexec/vmshadow/unit-writer",
            "./lib/systemd/system/vmshadow-guest-agent.service",
            "./lib/systemd/system/vmshadow-sqlite-writer@.service",
            "./lib/systemd/system/vmshadow-unit-writer@.service",
            "./etc/default/vmshadow-guest-agent",
            "./etc/vmshadow/writers/",
            "./etc/vmshadow/writers.d/",
            "./usr/share/man/man8/guest-agent.8.gz",
            "./usr/share/man/man8/unit-writer.8.gz",
            "./usr/share/man/man1/sqlite-writer.1.gz",
            "./usr/share/man/man1/vmshadow-writer.1.gz",
            "./usr/share/doc/vmshadow-guest-agent/copyright",
            "./usr/share/doc/vmshadow-guest-agent/SELINUX.md.gz",
            "./usr/share/doc/vmshadow-guest-agent/vmshadow.cil",
        ]
        .map(str::to_owned),
    )?;
    let depends = field(agent, "Depends")?;
    ensure!(depends.is_empty(), "it depends on {depends}");
    for (package, (server, _)) in writers.iter().zip(SERVERS) {
        holds(
            package,
            &[
                format!("./usr/libexec/vmshadow/{server}-writer"),
                format!("./lib/systemd/system/vmshadow-{server}-writer.service"),
                format!("./etc/vmshadow/writers.d/{server}.conf"),
                format!("./etc/default/vmshadow-{server}-writer"),
                format!("./usr/share/man/man8/{server}-writer.8.gz"),
            ],
        )?;
        // The agent alone: no server, no library.
        let depends = field(package, "Depends")?;
        ensure!(
            depends == format!("{NAME} (= {})", field(agent, "Version")?),
            "{server}: {depends}"
        );
    }
    Ok(())
}

#[test]
fn each_manual_names_every_option_and_no_other() -> Result<()> {
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
    for (name, manual) in MANUALS {
        let help = run(Command::new(program(name)?).arg("--help"))?;
        let manual = fs::read_to_string(project().join("packaging/deb").join(manual))?;
        // An example may name another program's options: they follow its options and end at the references.
        let (before, after) = manual.split_once(".SH OPTIONS").context("no options")?;
        ensure!(before.contains("\n.B "), "{name} has no synopsis");
        let listed = after.split("\n.SH ").next().unwrap_or_default();
        let (help, manual) = (options(&help), options(&listed.replace("\\-", "-")));
        ensure!(
            help.len() > 5 && help == manual,
            "{name}\nhelp: {help:?}\nmanual: {manual:?}"
        );
    }
    Ok(())
}

#[test]
fn lintian_finds_nothing() -> Result<()> {
    if !may_run(&["lintian"]) {
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let packages = build(directory.path())?;
    let found = run(Command::new("lintian")
        .args(["--allow-root", "--fail-on", "error,warning", "--info"])
        .args(&packages))?;
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
    let mut packages = Vec::new();
    for package in build(&debian.path("root"))? {
        let inside = package.strip_prefix(debian.directory.path())?;
        packages.push(inside.display().to_string());
    }
    let (package, writers) = packages.split_first().context("packages")?;
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

    writers_are_off_until_they_are_enabled(&debian, writers)?;

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

/// The servers' packages, beside the agent's.
fn writers_are_off_until_they_are_enabled(debian: &Debian, packages: &[String]) -> Result<()> {
    let all = packages.iter().map(|package| format!("/{package}"));
    let all = all.collect::<Vec<_>>().join(" ");
    debian.run(&format!("apt-get -y install {all}"))?;
    let units = SERVERS
        .iter()
        .map(|(server, _)| format!("vmshadow-{server}-writer.service"));
    let units = units.collect::<Vec<_>>().join(" ");
    let all_are = |state: &str| -> Result<()> {
        let said = debian.run(&format!("systemctl is-enabled {units} || true"))?;
        ensure!(
            said == format!("{state}\n").repeat(SERVERS.len()),
            "not {state}: {said}"
        );
        Ok(())
    };
    all_are("disabled")?;
    let verified = debian.run(&format!(
        "systemd-analyze verify --man=no {units} 2>&1 || true"
    ))?;
    ensure!(!verified.contains("vmshadow"), "{verified}");
    for (server, user) in SERVERS {
        let unit = debian.path(&format!(
            "lib/systemd/system/vmshadow-{server}-writer.service"
        ));
        let unit = fs::read_to_string(unit)?;
        ensure!(unit.contains(&format!("\nUser={user}\n")), "{unit}");
        let allowed = format!("/etc/vmshadow/writers.d/{server}.conf");
        let stat = debian.run(&format!(
            "stat -c \"%a %u\" {allowed}; grep -v ^# {allowed}"
        ))?;
        ensure!(
            stat == format!("644 0\n{server} = {user}\n"),
            "{allowed}: {stat}"
        );
    }
    // What their owner has decided outlives an upgrade.
    debian.run(&format!(
        "systemctl enable {units} && apt-get -y install --reinstall {all}"
    ))?;
    all_are("enabled")?;
    debian.run(&format!(
        "systemctl disable {units} && apt-get -y install --reinstall {all}"
    ))?;
    all_are("disabled")?;
    for unit in [
        "vmshadow-unit-writer@x.service",
        "vmshadow-sqlite-writer@root.service",
    ] {
        let verified = debian.run(&format!(
            "touch /etc/default/vmshadow-sqlite-writer-root; systemd-analyze verify --man=no {unit} 2>&1 || true"
        ))?;
        ensure!(!verified.contains("vmshadow"), "{verified}");
        debian.run(&format!("systemctl enable {unit}"))?;
    }
    debian.run("rm /etc/default/vmshadow-sqlite-writer-root; apt-get -y purge vmshadow-writer-postgresql vmshadow-writer-mariadb vmshadow-writer-mysql vmshadow-writer-redis vmshadow-writer-etcd")?;
    for (server, _) in SERVERS {
        let state = debian.state(&format!("vmshadow-writer-{server}"))?;
        ensure!(state.is_empty(), "{server}: {state}");
        ensure!(
            !debian
                .path(&format!("etc/vmshadow/writers.d/{server}.conf"))
                .exists()
        );
    }
    Ok(())
}
