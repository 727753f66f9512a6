//! A whole site: disks, the daemon that serves them, a machine with the agent, and `vmshadow` beside it.
//!
//! Called by scenarios, the demo and the measuring commands. Disk NAME has the serial NAME and is mounted on
//! `/mnt/NAME`; a load keeps its database in `/mnt/NAME/load.db`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::bridge::{Answer, Bridge};
use super::daemon::VhostBlk;
use super::database::{self, Kind};
use super::disk::{self, FileSystem, Partition};
use super::image::{self, GuestImage};
use super::load::Load;
use super::oracle::{self, Found, Restored, Window};
use super::qmp::Qmp;
use super::vm::{self, Vm, VmBuilder};
use super::vsock::VhostDeviceVsock;
use super::wait;
use crate::guest_protocol::{AGENT_PORT, Ack, QGA_PORT};

/// /proc/uptime is cut to hundredths of a second: the true time may be up to that much later.
const CLOCK_US: u64 = 10_000;

/// A disk of a site.
#[derive(Clone, Debug)]
pub struct SiteDisk {
    /// Volume, serial and the last part of the mount point.
    pub name: String,
    /// What is on it.
    pub file_system: FileSystem,
    /// The base file.
    pub base: PathBuf,
}

/// Everything of one scenario. Dropped in this order: machine, daemon, files.
#[derive(Debug)]
pub struct Site {
    /// The machine.
    pub vm: Vm,
    /// Who serves its disks.
    pub daemon: VhostBlk,
    /// `vmshadow` for this machine.
    pub bridge: Bridge,
    /// The disks.
    pub disks: Vec<SiteDisk>,
    /// Who serves its vsock device, if it has one.
    pub vsock: Option<VhostDeviceVsock>,
    directory: TempDir,
}

/// A set that was made, and when.
#[derive(Clone, Debug)]
pub struct Taken {
    /// The set document.
    pub answer: Answer,
    /// The guest's clock around it.
    pub window: Window,
}

impl Site {
    /// Makes the disks, starts the daemon, boots the machine.
    pub fn start(name: &str, disks: &[(&str, FileSystem)]) -> Result<Self> {
        Self::start_with(name, disks, false, Ok)
    }

    /// The same in the databases' guest, with no server started.
    pub fn start_in_databases_guest(name: &str, disks: &[(&str, FileSystem)]) -> Result<Self> {
        Self::start_with(name, disks, false, |machine| Ok(machine.with_databases()))
    }

    /// The same in a Debian with its own systemd, on a root that is served too, with these files in `/root`; with no agent until the scenario
    /// installs one. `/mnt/root` is a directory of the root.
    pub fn start_in_debian(
        name: &str,
        disks: &[(&str, FileSystem)],
        files: &[PathBuf],
    ) -> Result<Self> {
        let machine = VmBuilder::new(name).with_debian();
        Self::start_a_debian(machine, image::debian_image()?, disks, files)
    }

    /// The same with SELinux, which enforces the distribution's policy. The files have no labels.
    pub fn start_with_selinux(
        name: &str,
        disks: &[(&str, FileSystem)],
        files: &[PathBuf],
    ) -> Result<Self> {
        let machine = VmBuilder::new(name).with_selinux();
        Self::start_a_debian(machine, image::selinux_image()?, disks, files)
    }

    fn start_a_debian(
        machine: VmBuilder,
        image: &GuestImage,
        disks: &[(&str, FileSystem)],
        files: &[PathBuf],
    ) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("vmshadow-site-")
            .tempdir()?;
        let base = directory.path().join("root.raw");
        database::copy(image.root.as_ref().context("no root")?, &base)?;
        disk::put(&base, "/root", files)?;
        let mut made = vec![SiteDisk {
            name: vm::ROOT.to_owned(),
            file_system: FileSystem::Ext4,
            base,
        }];
        for (name, file_system) in disks {
            made.push(SiteDisk {
                name: (*name).to_owned(),
                file_system: *file_system,
                base: disk::create(directory.path(), name, *file_system)?,
            });
        }
        let site = Self::assemble(machine, directory, made, true, false, Ok)?;
        site.vm.shell("mkdir -p /mnt/root")?;
        Ok(site)
    }

    /// The same with a vsock device, over which `vmshadow` speaks to the agent. `more` is added to the machine.
    pub fn start_on_vsock(
        name: &str,
        disks: &[(&str, FileSystem)],
        more: impl FnOnce(VmBuilder) -> Result<VmBuilder>,
    ) -> Result<Self> {
        Self::start_with(name, disks, true, more)
    }

    /// The same with disks that can be pulled out of the running machine and put back.
    pub fn start_with_slots(name: &str, disks: &[(&str, FileSystem)]) -> Result<Self> {
        Self::start_with(name, disks, false, |machine| Ok(machine.with_slots()))
    }

    fn start_with(
        name: &str,
        disks: &[(&str, FileSystem)],
        on_vsock: bool,
        more: impl FnOnce(VmBuilder) -> Result<VmBuilder>,
    ) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("vmshadow-site-")
            .tempdir()?;
        let mut made = Vec::new();
        for (name, file_system) in disks {
            let base = disk::create(directory.path(), name, *file_system)?;
            made.push(SiteDisk {
                name: (*name).to_owned(),
                file_system: *file_system,
                base,
            });
        }
        Self::assemble(VmBuilder::new(name), directory, made, true, on_vsock, more)
    }

    /// The same on disks with a partition table. The guest mounts nothing by itself.
    pub fn start_partitioned(name: &str, disks: &[(&str, &[Partition])]) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("vmshadow-site-")
            .tempdir()?;
        let mut made = Vec::new();
        for (name, partitions) in disks {
            made.push(SiteDisk {
                name: (*name).to_owned(),
                file_system: FileSystem::Ext4,
                base: disk::create_partitioned(directory.path(), name, partitions)?,
            });
        }
        Self::assemble(VmBuilder::new(name), directory, made, false, false, Ok)
    }

    /// A machine with database servers and one disk, which holds an empty data directory.
    pub fn start_database(kind: Kind) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("vmshadow-site-")
            .tempdir()?;
        let disk = SiteDisk {
            name: "a".to_owned(),
            file_system: FileSystem::Ext4,
            base: directory.path().join("a.raw"),
        };
        database::copy(&kind.empty_disk()?, &disk.base)?;
        let machine = VmBuilder::new(kind.name()).with_databases();
        let site = Self::assemble(machine, directory, vec![disk], true, false, Ok)?;
        kind.run(&site.vm, "start", "/mnt/a")?;
        Ok(site)
    }

    fn assemble(
        machine: VmBuilder,
        directory: TempDir,
        made: Vec<SiteDisk>,
        mounted: bool,
        on_vsock: bool,
        more: impl FnOnce(VmBuilder) -> Result<VmBuilder>,
    ) -> Result<Self> {
        let daemon = VhostBlk::start(directory.path(), &made)?;
        let mut machine = machine.with_agent();
        for disk in &made {
            machine = machine.vhost_user(&disk.name, &daemon.socket(&disk.name));
            if mounted && disk.name != vm::ROOT {
                machine = machine.mounted(&format!("/mnt/{}", disk.name), disk.file_system);
            }
        }
        let mut vsock = None;
        if on_vsock {
            let backend = VhostDeviceVsock::start(directory.path())?;
            machine = machine.vsock(&backend.device());
            vsock = Some(backend);
        }
        let vm = more(machine)?.boot().with_context(|| daemon.log())?;
        let agent = vsock.as_ref().map_or_else(
            || vm.port(AGENT_PORT),
            |backend| format!("hybrid-vsock:{}", backend.hybrid().display()).into(),
        );
        let bridge = Bridge::new(
            &vm.qmp_socket(),
            &agent,
            daemon.control(),
            &directory.path().join("vmshadow"),
        )?;
        Ok(Self {
            vm,
            daemon,
            bridge,
            disks: made,
            vsock,
            directory,
        })
    }

    /// A directory for files of the scenario.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Installs a script writer in the guest: one executable per event.
    pub fn script_writer(&self, name: &str, scripts: &[(&str, &str)]) -> Result<()> {
        self.scripts(&format!("/etc/vmshadow/writers/{name}"), scripts)
    }

    /// Puts a directory of executables into the guest, that root trusts.
    pub fn scripts(&self, directory: &str, scripts: &[(&str, &str)]) -> Result<()> {
        self.vm
            .shell(&format!("mkdir -p {directory} && chmod 700 {directory}"))?;
        for (file, body) in scripts {
            let body = body.replace('\'', "'\\''");
            // `writer.json` holds settings, everything else is an executable for one event.
            let head = if *file == "writer.json" {
                ""
            } else {
                "#!/bin/sh\\n"
            };
            self.vm.shell(&format!(
                "printf '{head}%s\\n' '{body}' >{directory}/{file} && chmod 700 {directory}/{file}"
            ))?;
        }
        Ok(())
    }

    /// Starts the SQLite writer on the load's databases and waits until the agent knows it.
    pub fn sqlite_writer(&self) -> Result<()> {
        let databases: Vec<_> = self
            .disks
            .iter()
            .map(|disk| format!("--database /mnt/{}/load.db", disk.name))
            .collect();
        self.writer(&format!("sqlite-writer {}", databases.join(" ")), "SQLite")
    }

    /// Starts a database's writer and waits until the agent knows it.
    pub fn database_writer(&self, kind: Kind) -> Result<()> {
        let command = format!("database writer {} /mnt/a", kind.name());
        self.writer(&command, kind.writer())
    }

    /// Starts a connected writer and waits until the agent knows it by this name. It ends with the machine, or with a scenario that
    /// kills it.
    pub fn writer(&self, command: &str, name: &str) -> Result<()> {
        drop(self.vm.guest()?.start(&format!("exec {command}"))?);
        self.wait_for_writer(name)
    }

    /// Waits until the agent knows a writer of this name.
    pub fn wait_for_writer(&self, name: &str) -> Result<()> {
        let what = format!("the writer for {name} to register");
        wait::until(&what, wait::STEP, || {
            let writers = self.bridge.run(&["list", "writers"])?;
            // Right after the boot the agent may not be there yet.
            let registered = writers.code == 0 && writers.document.to_string().contains(name);
            Ok(registered.then_some(()))
        })
    }

    /// Pulls a disk out of the running machine, and waits until its daemon knows.
    pub fn pull(&self, disk: usize) -> Result<()> {
        self.vm.pull(disk)?;
        let name = &self.disks.get(disk).context("no such disk")?.name;
        let mut control = Qmp::connect(self.daemon.control())?;
        wait::until("the daemon to be let go", wait::STEP, || {
            let volumes = control.execute("query-volumes", json!({}))?;
            let mut volumes = volumes.as_array().into_iter().flatten();
            let volume = volumes.find(|volume| volume["volume"] == json!(name));
            Ok(volume
                .is_some_and(|volume| volume["connected"] == json!(false))
                .then_some(()))
        })
    }

    /// Puts it back.
    pub fn put_back(&self, disk: usize) -> Result<()> {
        let name = &self.disks.get(disk).context("no such disk")?.name;
        self.vm.put_back(disk, &self.daemon.socket(name))
    }

    /// A writer that agrees to everything: without any, nobody speaks for the applications.
    pub fn willing_writer(&self) -> Result<()> {
        self.script_writer("willing", &[("freeze", "exit 0"), ("thaw", "exit 0")])
    }

    /// Starts a load with one database on every disk.
    pub fn load(&self) -> Result<Load> {
        let databases: Vec<_> = self
            .disks
            .iter()
            .map(|disk| format!("/mnt/{}/load.db", disk.name))
            .collect();
        let names: Vec<_> = databases.iter().map(String::as_str).collect();
        Load::start(&self.vm, &names)
    }

    /// `vmshadow create` that succeeds at the application level.
    pub fn create(&self, arguments: &[&str]) -> Result<Taken> {
        self.create_by(|| self.try_create(arguments))
    }

    /// The same with a hold of this time at least, by the guest's clock: the bridge stands still between the freeze and the commit.
    /// All is held then: the copy has what was acknowledged at the hold's end, and nothing that was begun in it.
    pub fn create_held(&self, arguments: &[&str], hold: Duration) -> Result<Taken> {
        let mut bounds = None;
        let mut taken = self.create_by(|| {
            let mut all = vec!["create"];
            all.extend_from_slice(arguments);
            let mut running = self.bridge.start(&all, Some("marked"))?;
            running.wait_stopped()?;
            let held_us = self.vm.guest()?.boottime_us()? + CLOCK_US;
            let until_us = held_us + u64::try_from(hold.as_micros())?;
            let ends_us = wait::until("the guest's clock to go on", wait::STEP, || {
                let now_us = self.vm.guest()?.boottime_us()?;
                Ok((now_us >= until_us).then_some(now_us))
            })?;
            bounds = Some((ends_us, held_us));
            running.go_on()?;
            running.wait(wait::STEP)
        })?;
        (taken.window.asked_us, taken.window.answered_us) = bounds.context("not held")?;
        Ok(taken)
    }

    fn create_by(&self, create: impl FnOnce() -> Result<Answer>) -> Result<Taken> {
        let asked_us = self.vm.guest()?.boottime_us()?;
        let answer = create()?.succeeded().with_context(|| self.log())?;
        let answered_us = self.vm.guest()?.boottime_us()? + CLOCK_US;
        ensure!(answer.at("/level-reached")? == "application", "{answer:#?}");
        let window = Self::window(&answer, asked_us, answered_us)?;
        Ok(Taken { answer, window })
    }

    /// What is known of when a kept set was made, besides the guest's clock before and after it.
    pub fn window(answer: &Answer, asked_us: u64, answered_us: u64) -> Result<Window> {
        // The file system that was frozen last was held for at least this long (both are cut to milliseconds).
        let guest_ms = |name| {
            answer
                .at(&format!("/timings/guest/{name}"))?
                .as_u64()
                .context(name)
        };
        let hold_ms = guest_ms("hold-ms")?.saturating_sub(guest_ms("filesystems-ms")? + 1);
        Ok(Window {
            asked_us,
            answered_us,
            hold_ms,
        })
    }

    /// `vmshadow create`, whatever comes of it.
    pub fn try_create(&self, arguments: &[&str]) -> Result<Answer> {
        let mut all = vec!["create"];
        all.extend_from_slice(arguments);
        self.bridge.run(&all)
    }

    /// Reads every copy of a set into a file of its own, in the order of the disks.
    pub fn read_back(&self, set: &Answer, name: &str) -> Result<Vec<PathBuf>> {
        let copies = set.at("/copies")?.as_array().context("copies")?;
        let mut files = Vec::new();
        for disk in &self.disks {
            let copy = copies
                .iter()
                .find(|copy| copy["volume"] == json!(disk.name));
            let snapshot = copy.and_then(|copy| copy["snapshot"].as_str());
            let snapshot =
                snapshot.with_context(|| format!("no copy of {}: {set:#?}", disk.name))?;
            let file = self
                .directory
                .path()
                .join(format!("{name}-{}.raw", disk.name));
            let output = file.to_str().context("path")?;
            self.bridge
                .run(&["read", snapshot, "--output", output])?
                .succeeded()?;
            files.push(file);
        }
        Ok(files)
    }

    /// Judges copies of this site's disks, one file per disk, in a second machine.
    pub fn judge(&self, files: &[PathBuf]) -> Result<Vec<Found>> {
        let copies: Vec<_> = files
            .iter()
            .zip(self.disks.iter().cycle())
            .map(|(image, disk)| Restored {
                image,
                file_system: disk.file_system,
                database: "load.db",
            })
            .collect();
        oracle::judge(&copies)
    }

    /// Compares the databases of one set, in the order of the disks, with what was acknowledged, and with each other:
    /// they are of one instant, so each may be one transaction behind the one before, and never ahead.
    pub fn compare(&self, found: &[Found], acks: &[Ack], window: &Window) -> Result<()> {
        ensure!(found.len() == self.disks.len(), "{found:?}");
        for (number, database) in found.iter().enumerate() {
            oracle::compare(database, number, acks, window)
                .with_context(|| format!("database on disk {number}, {window:?}"))?;
        }
        for pair in found.windows(2) {
            if let [first, second] = pair {
                let ahead = first.last.checked_sub(second.last);
                ensure!(
                    ahead.is_some_and(|ahead| ahead <= 1),
                    "not one instant: {found:?}"
                );
            }
        }
        Ok(())
    }

    /// Nothing of a set is left: the daemon has no snapshot, the machine's disks take writes, the load goes on.
    pub fn is_unharmed(&self, load: &Load) -> Result<()> {
        self.is_thawed(wait::STEP)?;
        load.wait_for_more_within(5 * self.disks.len(), wait::STEP)?;
        let left = self.daemon.snapshots()?;
        ensure!(left.is_empty(), "snapshots are left: {left:#?}");
        Ok(())
    }

    /// Waits until every file system takes a write.
    pub fn is_thawed(&self, deadline: Duration) -> Result<()> {
        for disk in &self.disks {
            let probe = self
                .vm
                .guest()?
                .start(&format!("touch /mnt/{}/probe", disk.name))?;
            let answer = probe.wait(deadline).with_context(|| self.log())?;
            ensure!(answer.status == 0, "{answer:?}");
        }
        Ok(())
    }

    /// Waits until the agent itself says that nothing is frozen, over the QEMU guest agent protocol. Unlike
    /// [`Site::is_thawed`] it needs no disk that answers.
    pub fn agent_says_thawed(&self, deadline: Duration) -> Result<()> {
        let port = UnixStream::connect(self.vm.port(QGA_PORT))?;
        port.set_read_timeout(Some(wait::STEP))?;
        let mut answers = BufReader::new(port.try_clone()?);
        wait::until("the agent to say thawed", deadline, || {
            (&port).write_all(b"{\"execute\":\"guest-fsfreeze-status\"}\n")?;
            let mut line = String::new();
            answers.read_line(&mut line)?;
            let answer: Value = serde_json::from_str(&line).context(line)?;
            Ok((answer["return"] == "thawed").then_some(()))
        })
    }

    /// The set was refused for this reason, at exit code 3.
    pub fn was_refused(&self, answer: &Answer, codes: &[&str]) -> Result<()> {
        ensure!(
            answer.code == 3,
            "exit code {}: {answer:#?}\n{}",
            answer.code,
            self.log()
        );
        let code = answer.at("/reason/code")?;
        ensure!(
            codes.iter().any(|wanted| code == wanted),
            "{code}: {answer:#?}"
        );
        ensure!(
            answer.at("/copies")? == &Value::Array(Vec::new()),
            "{answer:#?}"
        );
        Ok(())
    }

    /// Console, QEMU's and the daemon's output, for messages.
    #[must_use]
    pub fn log(&self) -> String {
        format!("{}\nvhost-blk:\n{}", self.vm.log(), self.daemon.log())
    }
}
