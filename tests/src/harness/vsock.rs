//! vsock without a kernel's help: `vhost-device-vsock` between a machine and Unix sockets.
//!
//! Called by scenarios. It gives the hybrid socket that Cloud Hypervisor and Firecracker give: `CONNECT PORT` reaches a port of
//! the guest, and what the guest dials on CID 2 arrives at the socket named after the port.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::image;
use super::process::Process;
use super::requires;
use super::wait;

/// The guest's address.
pub const GUEST_CID: u32 = 42;

/// The backend of a machine's vsock device; killed on drop.
#[derive(Debug)]
pub struct VhostDeviceVsock {
    process: Process,
    directory: PathBuf,
    starts: u32,
}

/// Where `make tools` has put the program, or where it was installed otherwise.
fn program() -> Option<PathBuf> {
    let built = image::target().join("tools/bin/vhost-device-vsock");
    if built.is_file() {
        return Some(built);
    }
    requires::find("vhost-device-vsock")
}

/// True if there is such a backend. Otherwise prints why the scenario is skipped, or panics in CI.
#[must_use]
pub fn backend_is_there() -> bool {
    if program().is_some() {
        return true;
    }
    let reason = "no vhost-device-vsock (run `make tools`)";
    assert!(std::env::var("CI").is_err(), "cannot run: {reason}");
    eprintln!("SKIPPED: {reason}");
    false
}

impl VhostDeviceVsock {
    /// Starts it; its sockets lie in `directory`.
    pub fn start(directory: &Path) -> Result<Self> {
        let process = spawn(directory, 0)?;
        let backend = Self {
            process,
            directory: directory.to_owned(),
            starts: 1,
        };
        backend.wait_ready()?;
        Ok(backend)
    }

    fn wait_ready(&self) -> Result<()> {
        wait::until("vhost-device-vsock to listen", wait::STEP, || {
            Ok(self.device().exists().then_some(()))
        })
        .with_context(|| self.process.stderr())
    }

    /// The vhost-user socket for QEMU.
    #[must_use]
    pub fn device(&self) -> PathBuf {
        self.directory.join("vsock-device.sock")
    }

    /// The hybrid socket for the host's programs.
    #[must_use]
    pub fn hybrid(&self) -> PathBuf {
        hybrid(&self.directory)
    }

    /// Where connections of the guest to this port of the host arrive.
    #[must_use]
    pub fn host_port(&self, port: u32) -> PathBuf {
        self.directory.join(format!("vsock.sock_{port}"))
    }

    /// Kills it (-9).
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()?;
        // A killed one leaves them behind.
        for socket in [self.device(), self.hybrid()] {
            std::fs::remove_file(socket).unwrap_or(());
        }
        Ok(())
    }

    /// Starts it again after a kill.
    pub fn restart(&mut self) -> Result<()> {
        self.process = spawn(&self.directory, self.starts)?;
        self.starts += 1;
        self.wait_ready()
    }
}

fn hybrid(directory: &Path) -> PathBuf {
    directory.join("vsock.sock")
}

fn spawn(directory: &Path, number: u32) -> Result<Process> {
    let mut command = Command::new(program().context("no vhost-device-vsock")?);
    command.arg("--guest-cid").arg(GUEST_CID.to_string());
    command
        .arg("--socket")
        .arg(directory.join("vsock-device.sock"));
    command.arg("--uds-path").arg(hybrid(directory));
    let output = directory.join(format!("vhost-device-vsock{number}"));
    Process::start("vhost-device-vsock", command, &output)
}
