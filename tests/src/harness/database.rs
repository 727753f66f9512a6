//! Servers of the databases' guest: an empty data directory of each, made once, and how they are started.
//!
//! Called by the databases' scenarios and measurements. What the words mean inside the guest is in
//! `images/databases/database`; this room knows its command line alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::disk::{self, FileSystem};
use super::image;
use super::vm::{Vm, VmBuilder};

/// A server under emulation on a busy host may take this long to start, to stop, or to be checked.
const PATIENCE: Duration = Duration::from_secs(300);

/// Bytes of a database's disk; sparse on the host.
const DISK_BYTES: u64 = 512 << 20;

/// Which server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// PostgreSQL 15.
    Postgresql,
}

impl Kind {
    /// Its name in `images/databases/database`, of its directory and of its writer.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Postgresql => "postgresql",
        }
    }

    /// A disk with an empty data directory in `NAME/` and nothing else. It is made in a machine by the server's own
    /// programs, once for each image; callers copy it.
    pub fn empty_disk(self) -> Result<PathBuf> {
        let image = image::databases_image()?;
        let beside = image.manifest.parent().context("the image's directory")?;
        let made = beside.join(format!("{}.raw", self.name()));
        if made.is_file() {
            return Ok(made);
        }
        let work = tempfile::Builder::new()
            .prefix(self.name())
            .tempdir_in(beside)?;
        let file = disk::create_sized(work.path(), "disk", FileSystem::Ext4, DISK_BYTES)?;
        let vm = VmBuilder::new(self.name())
            .with_databases()
            .file("disk", &file)
            .mounted("/mnt/disk", FileSystem::Ext4)
            .boot()?;
        self.run(&vm, "make", "/mnt/disk")?;
        vm.shut_down()?;
        // Whole or not at all: another test program may make it at the same time.
        fs::rename(&file, &made)?;
        Ok(made)
    }

    /// What the server's own client prints for a statement without quotes.
    pub fn ask(self, vm: &Vm, statement: &str) -> Result<String> {
        let command = format!("database ask {} - \"{statement}\"", self.name());
        Ok(vm.shell(&command)?.trim().to_owned())
    }

    /// `database WORD KIND DIRECTORY` in the machine; its standard output.
    pub fn run(self, vm: &Vm, word: &str, directory: &str) -> Result<String> {
        let command = format!("database {word} {} {directory}", self.name());
        let answer = vm.guest()?.start(&command)?.wait(PATIENCE)?;
        ensure!(answer.status == 0, "{command}: {answer:?}\n{}", vm.log());
        Ok(answer.stdout)
    }
}

/// Copies a disk without filling its holes.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let status = std::process::Command::new("cp")
        .arg("--sparse=always")
        .args([from, to])
        .status()?;
    ensure!(status.success(), "cp {} {}", from.display(), to.display());
    Ok(())
}
