//! Our daemon as the bench drives it: started, connected to, snapshots taken, made idle.
//!
//! Called by the figures. It speaks to the control socket as any client does.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use uuid::Uuid;

use super::client::Client;
use super::cost;
use crate::harness::process::Process;
use crate::harness::qmp::Qmp;
use crate::harness::wait;

/// Longest wait for work in the background.
const BACKGROUND: Duration = Duration::from_secs(120);

/// A disk to serve.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// Name; socket and shadow storage are named by it.
    pub name: String,
    /// The raw file.
    pub base: PathBuf,
}

/// What to start.
#[derive(Clone, Debug)]
pub struct DaemonSpec<'a> {
    /// The program.
    pub program: &'a Path,
    /// For sockets, shadow storage and logs.
    pub directory: &'a Path,
    /// At least one.
    pub disks: Vec<DiskSpec>,
    /// Further arguments.
    pub arguments: &'a [&'a str],
}

/// `vhost-blk serve`, killed on drop.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    program: PathBuf,
    arguments: Vec<OsString>,
    directory: PathBuf,
    disks: Vec<DiskSpec>,
    control: Qmp,
    replacements: usize,
}

impl Daemon {
    /// Starts it and waits until it answers.
    pub fn start(spec: &DaemonSpec<'_>) -> Result<Self> {
        let mut arguments = vec!["serve".into(), "--control".into()];
        arguments.push(spec.directory.join("control.sock").into());
        for disk in &spec.disks {
            let mut group = OsString::from("path=");
            group.push(&disk.base);
            group.push(format!(",name={0},serial={0},socket=", disk.name));
            group.push(socket(spec.directory, &disk.name));
            group.push(",shadow-storage=");
            group.push(spec.directory.join(format!("{}.shadow", disk.name)));
            arguments.extend(["--disk".into(), group]);
        }
        arguments.extend(spec.arguments.iter().map(OsString::from));
        let (process, control) = spawn(spec.program, &arguments, spec.directory)?;
        Ok(Self {
            process,
            program: spec.program.to_owned(),
            arguments,
            directory: spec.directory.to_owned(),
            disks: spec.disks.clone(),
            control,
            replacements: 0,
        })
    }

    /// Starts it with one disk, named `disk`, on a base that is there.
    pub fn one(program: &Path, directory: &Path, base: &Path, arguments: &[&str]) -> Result<Self> {
        let disk = DiskSpec {
            name: "disk".to_owned(),
            base: base.to_owned(),
        };
        Self::start(&DaemonSpec {
            program,
            directory,
            disks: vec![disk],
            arguments,
        })
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it has written to standard error: why a request failed.
    #[must_use]
    pub fn said(&self) -> String {
        self.process.stderr()
    }

    /// The connection to its control socket.
    pub fn control(&mut self) -> &mut Qmp {
        &mut self.control
    }

    /// Where front ends connect.
    #[must_use]
    pub fn socket(&self, disk: &str) -> PathBuf {
        socket(&self.directory, disk)
    }

    /// Where a disk's shadow storage is.
    #[must_use]
    pub fn shadow_storage(&self, disk: &str) -> PathBuf {
        self.directory.join(format!("{disk}.shadow"))
    }

    /// Connects a client.
    pub fn client(&self, disk: &str, queues: usize) -> Result<Client> {
        Client::connect(&self.socket(disk), queues).with_context(|| self.process.stderr())
    }

    /// Takes a set of all disks by `row` or `cow` and keeps it; answers what the commit said and the set.
    pub fn snapshot(&mut self, method: &str) -> Result<(Uuid, Value)> {
        let set = Uuid::new_v4();
        let volumes: Vec<&str> = self.disks.iter().map(|disk| disk.name.as_str()).collect();
        let begin = json!({"set": set, "volumes": volumes, "method": method});
        self.control.execute("snapshot-set-prepare", begin)?;
        self.control
            .execute("snapshot-set-mark", json!({"set": set}))?;
        let commit = json!({"set": set, "limit-ms": 10_000});
        let committed = self.control.execute("snapshot-set-commit", commit)?;
        self.control
            .execute("snapshot-set-keep", json!({"set": set}))?;
        Ok((set, committed))
    }

    /// Every snapshot, oldest first.
    pub fn snapshots(&mut self) -> Result<Vec<Value>> {
        let answer = self.control.execute("query-snapshots", json!({}))?;
        answer.as_array().cloned().context("a list of snapshots")
    }

    /// One disk's line of `query-volumes`.
    pub fn volume(&mut self, disk: &str) -> Result<Value> {
        let answer = self.control.execute("query-volumes", json!({}))?;
        let volumes = answer.as_array().context("a list of volumes")?;
        let found = volumes.iter().find(|volume| volume["volume"] == disk);
        found.cloned().with_context(|| format!("no volume {disk}"))
    }

    /// Deletes every snapshot, and waits until all disks are plain raw files again and nothing is left to do.
    pub fn delete_snapshots(&mut self) -> Result<()> {
        let mut sets: Vec<Value> = self
            .snapshots()?
            .iter()
            .map(|one| one["set"].clone())
            .collect();
        sets.dedup();
        for set in sets {
            self.control
                .execute("snapshot-set-delete", json!({"set": set}))?;
        }
        let control = &mut self.control;
        wait::until("plain disks", BACKGROUND, || {
            let answer = control.execute("query-volumes", json!({}))?;
            let volumes = answer.as_array().context("a list of volumes")?;
            let plain = volumes.iter().all(|volume| volume["plain"] == true);
            Ok(plain.then_some(()))
        })?;
        self.wait_idle()
    }

    /// Waits until it does nothing.
    pub fn wait_idle(&self) -> Result<()> {
        // Twice: what has no hurry begins only when the guest has rested for a while.
        cost::wait_quiet(self.pid(), BACKGROUND)?;
        cost::wait_quiet(self.pid(), BACKGROUND)
    }

    /// Kills it (-9).
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Starts it again with the same arguments and waits until its control socket answers.
    pub fn restart(&mut self) -> Result<()> {
        (self.process, self.control) = spawn(&self.program, &self.arguments, &self.directory)?;
        Ok(())
    }

    /// Puts a new process in its place, which takes the connections over, and waits for the end of the old one.
    pub fn replace(&mut self) -> Result<()> {
        let mut arguments = self.arguments.clone();
        arguments.push("--replace".into());
        self.replacements += 1;
        let output = self.directory.join(format!("next-{}", self.replacements));
        let mut command = Command::new(&self.program);
        command.args(arguments);
        let next = Process::start("vhost-blk", command, &output)?;
        let status = self
            .process
            .wait(wait::STEP)
            .with_context(|| next.stderr())?;
        self.process = next;
        ensure!(
            status.success(),
            "the replaced vhost-blk ended with {status}"
        );
        self.control = connected(&self.process, &self.directory)?;
        Ok(())
    }

    /// Ends it in order.
    pub fn stop(&mut self) -> Result<()> {
        self.process.signal(Signal::TERM)?;
        let status = self.process.wait(wait::STEP)?;
        ensure!(status.success(), "vhost-blk ended with {status}");
        Ok(())
    }
}

fn socket(directory: &Path, disk: &str) -> PathBuf {
    directory.join(format!("{disk}.sock"))
}

fn spawn(program: &Path, arguments: &[OsString], directory: &Path) -> Result<(Process, Qmp)> {
    let mut command = Command::new(program);
    command.args(arguments);
    let process = Process::start("vhost-blk", command, &directory.join("vhost-blk"))?;
    let control = connected(&process, directory)?;
    Ok((process, control))
}

/// Its control socket, when it answers.
fn connected(process: &Process, directory: &Path) -> Result<Qmp> {
    let control = Qmp::connect(&directory.join("control.sock"));
    let mut control = control.with_context(|| process.stderr())?;
    control.execute("query-volumes", json!({}))?;
    Ok(control)
}

/// True if the program takes the flag: some figures need flags that older builds lack.
pub fn takes(program: &Path, flag: &str) -> Result<bool> {
    let help = super::place::run(Command::new(program).args(["serve", "--help"]))?;
    Ok(help.contains(flag))
}
