//! Who serves the disks: `vhost-blk` as a process, and a stock peer for the harness's own check.
//!
//! Called by scenarios and the demo. It starts, kills and restarts; what the daemon says on its
//! control socket is read with `qmp`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::image;
use super::process::Process;
use super::qmp::Qmp;
use super::site::SiteDisk;
use super::wait;

/// `vhost-blk serve` with any number of disks.
#[derive(Debug)]
pub struct VhostBlk {
    process: Process,
    directory: PathBuf,
    arguments: Vec<OsString>,
    control: PathBuf,
    starts: u32,
}

impl VhostBlk {
    /// Serves the disks; sockets, shadow storage and logs lie in `directory`.
    pub fn start(directory: &Path, disks: &[SiteDisk]) -> Result<Self> {
        let control = directory.join("control.sock");
        let mut arguments = vec!["serve".into(), "--control".into(), control.clone().into()];
        for disk in disks {
            let mut group = OsString::from("path=");
            group.push(&disk.base);
            group.push(format!(",name={0},serial={0},socket=", disk.name));
            group.push(directory.join(format!("{}.sock", disk.name)));
            group.push(",shadow-storage=");
            group.push(directory.join(format!("{}.shadow", disk.name)));
            arguments.extend(["--disk".into(), group]);
        }
        let process = Self::spawn(directory, &arguments, 0)?;
        let daemon = Self {
            process,
            directory: directory.to_owned(),
            arguments,
            control,
            starts: 1,
        };
        daemon.wait_ready().with_context(|| daemon.log())?;
        Ok(daemon)
    }

    fn spawn(directory: &Path, arguments: &[OsString], number: u32) -> Result<Process> {
        let mut command = Command::new(image::program("vhost-blk")?);
        command.args(arguments);
        Process::start(
            "vhost-blk",
            command,
            &directory.join(format!("vhost-blk{number}")),
        )
    }

    fn wait_ready(&self) -> Result<()> {
        Qmp::connect(&self.control)?.execute("query-volumes", json!({}))?;
        Ok(())
    }

    /// The vhost-user socket of a disk.
    #[must_use]
    pub fn socket(&self, disk: &str) -> PathBuf {
        self.directory.join(format!("{disk}.sock"))
    }

    /// The control socket.
    #[must_use]
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Every snapshot there is, provisional ones included.
    pub fn snapshots(&self) -> Result<Vec<Value>> {
        let answer = Qmp::connect(&self.control)?.execute("query-snapshots", json!({}))?;
        answer
            .as_array()
            .cloned()
            .context("query-snapshots answers a list")
    }

    /// Its volumes.
    pub fn volumes(&self) -> Result<Vec<Value>> {
        let answer = Qmp::connect(&self.control)?.execute("query-volumes", json!({}))?;
        answer
            .as_array()
            .cloned()
            .context("query-volumes answers a list")
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Kills it (-9), as the kernel would when memory runs out.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Ends it in order (SIGTERM).
    pub fn stop(&mut self) -> Result<()> {
        self.process.signal(Signal::TERM)?;
        let status = self.process.wait(wait::STEP)?;
        ensure!(status.success(), "vhost-blk ended with {status}");
        Ok(())
    }

    /// Starts it again on the same disks and waits until it answers.
    pub fn restart(&mut self) -> Result<()> {
        self.process = Self::spawn(&self.directory, &self.arguments, self.starts)?;
        self.starts += 1;
        self.wait_ready().with_context(|| self.log())
    }

    /// Starts another that takes over from it (`--replace`), and waits until this one has ended.
    pub fn replace(&mut self) -> Result<()> {
        let mut arguments = self.arguments.clone();
        arguments.push("--replace".into());
        let next = Self::spawn(&self.directory, &arguments, self.starts)?;
        self.starts += 1;
        let status = self.process.wait(wait::STEP)?;
        self.process = next;
        ensure!(
            status.success(),
            "the replaced vhost-blk ended with {status}"
        );
        self.wait_ready().with_context(|| self.log())
    }

    /// What it has said since its last start.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.stdout() + &self.process.stderr()
    }
}

/// QEMU's own storage daemon, exporting one raw file over vhost-user.
#[derive(Debug)]
pub struct StorageDaemon {
    _process: Process,
    socket: PathBuf,
}

impl StorageDaemon {
    /// Exports `disk`; the socket and the log lie beside it.
    pub fn serve(disk: &Path) -> Result<Self> {
        let socket = disk.with_extension("sock");
        let mut command = Command::new("qemu-storage-daemon");
        command
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=disk,filename={}", disk.display()))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,addr.type=unix,addr.path={}",
                socket.display()
            ));
        let process = Process::start(
            "qemu-storage-daemon",
            command,
            &disk.with_extension("server"),
        )?;
        wait::until("the storage daemon's socket", wait::STEP, || {
            Ok(socket.exists().then_some(()))
        })?;
        Ok(Self {
            _process: process,
            socket,
        })
    }

    /// Where QEMU connects.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}
