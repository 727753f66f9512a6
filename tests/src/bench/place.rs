//! Where the files of a run lie: in memory or on the machine's disk.
//!
//! Called by the figures. In memory means ext4 on a loop device whose file is in `/dev/shm`: unlike tmpfs it takes O_DIRECT as a disk's
//! file system does, answers io_uring without worker threads and counts what is written. The mount is in a mount namespace of this
//! program alone and the loop's file is unlinked as soon as it is mounted, so nothing is left behind however the program ends.
//!
//! Files go with whoever made them (`Files`), so that a figure begins with the room that the one before it had.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use rustix::fs::{Advice, fadvise, syncfs};
use tempfile::TempDir;

use super::cost::Device;
use crate::harness::image;

/// About as much as was found scattered on a machine that had been at work.
const BALLAST_BYTES: u64 = 1 << 30;

const MARK: &str = "VMSHADOW_BENCH_NAMESPACE";

/// A directory on a known file system; copies of it share the directory, which goes with the last.
#[derive(Clone, Debug)]
pub struct Place {
    /// `RAM` or `disk`, for the tables.
    pub name: &'static str,
    /// The file system in words.
    pub description: String,
    /// The block device under it, if it has one.
    pub device: Option<Device>,
    path: PathBuf,
    guard: Arc<Guard>,
}

#[derive(Debug)]
struct Guard {
    // Removed after the mount below it has gone.
    mount: Option<Mount>,
    _directory: TempDir,
}

/// Takes the scattered pages that the kernel hands out first, for as long as the place lives: of contestants that were the same program,
/// the one whose file was made first was up to 15 % slower.
fn write_ballast(path: &Path) -> Result<()> {
    let mut file = File::create(path)?;
    let piece = vec![1; 1 << 20];
    for _ in 0..BALLAST_BYTES >> 20 {
        file.write_all(&piece)?;
    }
    Ok(())
}

/// Runs this program again in a mount namespace of its own; returns if it is there already, or may not (not root).
pub fn enter_namespace() -> Result<()> {
    if std::env::var_os(MARK).is_some() || !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let error = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--"])
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(MARK, "1")
        .exec();
    Err(error).context("unshare")
}

impl Place {
    /// Files in memory, at most `size_bytes` of them.
    pub fn ram(size_bytes: u64) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("vmshadow-bench-")
            .tempdir_in("/dev/shm")?;
        if std::env::var_os(MARK).is_none() {
            return Ok(Self {
                name: "RAM",
                description: "tmpfs at /dev/shm (not root: no loop device)".to_owned(),
                device: None,
                path: directory.path().to_owned(),
                guard: Arc::new(Guard {
                    mount: None,
                    _directory: directory,
                }),
            });
        }
        write_ballast(&directory.path().join("ballast"))?;
        let image = directory.path().join("image");
        let file = File::create(&image)?;
        file.set_len(size_bytes)?;
        run(Command::new("mke2fs")
            .args([
                "-q",
                "-F",
                "-t",
                "ext4",
                "-E",
                "lazy_itable_init=0,lazy_journal_init=0",
            ])
            .arg(&image))?;
        let path = directory.path().join("mount");
        fs::create_dir(&path)?;
        run(Command::new("mount")
            .args(["-o", "loop,noatime"])
            .arg(&image)
            .arg(&path))?;
        let mount = Mount {
            path: path.clone(),
            image: file,
        };
        fs::remove_file(&image)?;
        Ok(Self {
            name: "RAM",
            description: "ext4 (noatime) on a loop device over a file in tmpfs".to_owned(),
            device: Device::under(&path)?,
            path,
            guard: Arc::new(Guard {
                mount: Some(mount),
                _directory: directory,
            }),
        })
    }

    /// Files on the machine's disk, below cargo's target directory.
    pub fn disk() -> Result<Self> {
        let parent = image::target().join("bench");
        fs::create_dir_all(&parent)?;
        let directory = tempfile::Builder::new()
            .prefix("files-")
            .tempdir_in(parent)?;
        let description = mounted(directory.path())?;
        Ok(Self {
            name: "disk",
            description,
            device: Device::under(directory.path())?,
            path: directory.path().to_owned(),
            guard: Arc::new(Guard {
                mount: None,
                _directory: directory,
            }),
        })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A new empty directory, removed with its files when it is dropped.
    pub fn directory(&self, name: &str) -> Result<Files> {
        let path = self.path.join(name);
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir(&path)?;
        Ok(Files { path })
    }

    /// Gives the memory of removed files back. Fails if there are files left; answers how many bytes of memory the files took until now,
    /// at most; zero on a disk.
    pub fn emptied(&self) -> Result<u64> {
        for entry in fs::read_dir(&self.path)? {
            let name = entry?.file_name();
            ensure!(name == "lost+found", "{} was left behind", name.display());
        }
        let Some(mount) = &self.guard.mount else {
            return Ok(0);
        };
        // Until now the loop's file has kept every block that was ever written.
        let most_bytes = mount.image.metadata()?.blocks() * 512;
        run(Command::new("fstrim").arg(&self.path))?;
        Ok(most_bytes)
    }

    /// A file full of noise, on the device and out of the page cache.
    pub fn file(&self, path: &Path, size_bytes: u64) -> Result<()> {
        const PIECE_BYTES: usize = 1 << 20;
        let mut bytes = vec![0; PIECE_BYTES];
        SmallRng::seed_from_u64(size_bytes).fill_bytes(&mut bytes);
        let mut file = File::create(path)?;
        let mut left = size_bytes;
        while left > 0 {
            let length = usize::try_from(left)?.min(PIECE_BYTES);
            file.write_all(bytes.get(..length).context("a piece")?)?;
            left -= length as u64;
        }
        syncfs(&file)?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
        Ok(())
    }
}

/// A directory of a place, removed with all that is in it on drop: behind the programs that use it.
#[derive(Debug)]
pub struct Files {
    path: PathBuf,
}

impl Files {
    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("bench: cannot remove {}: {error}", self.path.display());
        }
    }
}

/// A mount of a file by a loop device, undone on drop.
#[derive(Debug)]
struct Mount {
    path: PathBuf,
    image: File,
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("umount").arg("--lazy").arg(&self.path)) {
            eprintln!("bench: {error:#}");
        }
    }
}

/// Runs a program to its end and fails with what it said.
pub fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// Type and options of the file system that holds the path.
fn mounted(path: &Path) -> Result<String> {
    let text = run(Command::new("findmnt")
        .args([
            "--noheadings",
            "--output",
            "FSTYPE,SOURCE,OPTIONS",
            "--target",
        ])
        .arg(path))?;
    let words: Vec<&str> = text.split_whitespace().collect();
    let [kind, source, options] = words.as_slice() else {
        bail!("findmnt said {text:?}");
    };
    Ok(format!("{kind} ({options}) on {source}"))
}
