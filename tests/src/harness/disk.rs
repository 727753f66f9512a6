//! Disk images on the host: plain files with a file system in them, made without root or loop devices.
//!
//! Called by scenarios and the demo. Whoever serves the file (`daemon`, or QEMU itself) is not this
//! room's business.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::requires;

/// A file system of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4, built into the guest's kernel.
    Ext4,
    /// XFS, a module the guest loads when asked (a second or two under TCG).
    Xfs,
}

impl FileSystem {
    /// The name `mount -t` knows.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    /// Mount options. Two copies of one XFS carry one identity, which it refuses to mount twice.
    #[must_use]
    pub fn mount_options(self) -> &'static str {
        match self {
            Self::Ext4 => "rw",
            Self::Xfs => "rw,nouuid",
        }
    }
}

/// 256 MiB: enough for every scenario, sparse on the host.
pub const EXT4_BYTES: u64 = 256 << 20;
/// 384 MiB: `mkfs.xfs` refuses less than 300.
pub const XFS_BYTES: u64 = 384 << 20;

/// Makes `DIRECTORY/NAME.raw` with an empty file system.
pub fn create(directory: &Path, name: &str, file_system: FileSystem) -> Result<PathBuf> {
    let bytes = match file_system {
        FileSystem::Ext4 => EXT4_BYTES,
        FileSystem::Xfs => XFS_BYTES,
    };
    create_sized(directory, name, file_system, bytes)
}

/// The same with this many bytes.
pub fn create_sized(
    directory: &Path,
    name: &str,
    file_system: FileSystem,
    bytes: u64,
) -> Result<PathBuf> {
    let path = directory.join(format!("{name}.raw"));
    File::create(&path)?.set_len(bytes)?;
    match file_system {
        FileSystem::Ext4 => {
            // Without lazy initialisation: no background writes of the guest's kernel later.
            run(
                "mke2fs",
                &[
                    "-q",
                    "-t",
                    "ext4",
                    "-E",
                    "lazy_itable_init=0,lazy_journal_init=0",
                ],
                &path,
            )?;
        }
        FileSystem::Xfs => {
            run("mkfs.xfs", &["-q", "-f"], &path)?;
        }
    }
    Ok(path)
}

/// Puts files into a directory of an ext4 image, under their own names.
pub fn put(image: &Path, directory: &str, files: &[PathBuf]) -> Result<()> {
    for file in files {
        let name = file.file_name().and_then(|name| name.to_str());
        let name = name.with_context(|| format!("{} has no name", file.display()))?;
        let commands = tempfile::NamedTempFile::new()?;
        std::fs::write(
            &commands,
            format!("cd {directory}\nwrite {} {name}\n", file.display()),
        )?;
        let commands = commands.path().to_str().context("path")?;
        run("debugfs", &["-w", "-f", commands], image)?;
    }
    Ok(())
}

/// A partition of a disk.
#[derive(Clone, Copy, Debug)]
pub struct Partition {
    /// First byte, a multiple of 512.
    pub start_bytes: u64,
    /// Its size, a multiple of 512.
    pub bytes: u64,
    /// The code of its type: 0x83 gets an empty ext4, any other nothing.
    pub code: u8,
}

/// The code of a partition with a file system.
pub const LINUX: u8 = 0x83;
/// The code of one for swap.
pub const LINUX_SWAP: u8 = 0x82;

/// Makes `DIRECTORY/NAME.raw` with a table of up to four partitions (MBR).
pub fn create_partitioned(
    directory: &Path,
    name: &str,
    partitions: &[Partition],
) -> Result<PathBuf> {
    let path = directory.join(format!("{name}.raw"));
    let end = partitions.iter().map(|one| one.start_bytes + one.bytes);
    let mut table = vec![0; 446];
    for one in partitions {
        let sectors = |bytes: u64| u32::try_from(bytes / 512);
        // Addresses by cylinder are out of use: all ones says so.
        table.extend([0, 0xff, 0xff, 0xff, one.code, 0xff, 0xff, 0xff]);
        table.extend(sectors(one.start_bytes)?.to_le_bytes());
        table.extend(sectors(one.bytes)?.to_le_bytes());
    }
    ensure!(table.len() <= 510, "more than four partitions");
    table.resize(510, 0);
    table.extend([0x55, 0xaa]);
    let file = File::create(&path)?;
    file.set_len(end.max().unwrap_or(0))?;
    file.write_all_at(&table, 0)?;
    for one in partitions.iter().filter(|one| one.code == LINUX) {
        let options = format!(
            "offset={},lazy_itable_init=0,lazy_journal_init=0",
            one.start_bytes
        );
        // A whole number of its blocks.
        let size = format!("{}k", (one.bytes >> 12) << 2);
        let output = Command::new(requires::find("mke2fs").context("mke2fs is not installed")?)
            // A file system this small would have blocks of 1 KiB.
            .args(["-q", "-t", "ext4", "-b", "4096", "-E", &options])
            .arg(&path)
            .arg(size)
            .output()?;
        ensure!(output.status.success(), "{output:?}");
    }
    Ok(path)
}

/// Runs a program of the host on an image and fails with its output unless it ends with 0.
pub fn run(program: &str, arguments: &[&str], image: &Path) -> Result<String> {
    let path = requires::find(program).with_context(|| format!("{program} is not installed"))?;
    let output = Command::new(path).args(arguments).arg(image).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{program} {}: {}: {text}",
        image.display(),
        output.status
    );
    Ok(text)
}
