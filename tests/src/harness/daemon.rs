//! Who serves the disks: `vhost-blk` as a process, and a stock peer for the harness's own check.
//!
//! Called by scenarios and the demo. It starts, kills and restarts; what the daemon says on its
//! control socket is read with `qmp`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::process::Process;
use super::wait;

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
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={}",
                socket.display()
            ));
        let process = Process::start("qemu-storage-daemon", command, &disk.with_extension("log"))?;
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
