//! Reads `/proc/1/mountinfo`: text only, nothing is opened.
//!
//! Called by `plan`. What is decided here is decided from text, because opening a mount point of a dead network or FUSE
//! server hangs for ever.
#![deny(clippy::indexing_slicing)]

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Device number of a file system or block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber {
    /// Major number; 0 is an anonymous device.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl DeviceNumber {
    /// Reads `8:1`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }
}

impl std::fmt::Display for DeviceNumber {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}:{}", self.major, self.minor)
    }
}

/// One line of mountinfo (proc_pid_mountinfo(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Number of this mount.
    pub id: u32,
    /// Number of the mount that it lies on.
    pub parent: u32,
    /// Device of the superblock.
    pub device: DeviceNumber,
    /// What of the file system is mounted here; `/` unless it is a bind mount or a subvolume.
    pub root: PathBuf,
    /// Where.
    pub mountpoint: PathBuf,
    /// Type, without the subtype (`fuse` of `fuse.sshfs` stays whole).
    pub fstype: String,
    /// What was mounted.
    pub source: String,
    /// The superblock is read-only. A read-only bind mount of a writable file system is not.
    pub read_only: bool,
}

/// Parses mountinfo; lines that are not understood are left out.
#[must_use]
pub fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|byte| *byte == b'\n')
        .filter_map(parse_line)
        .collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let device = DeviceNumber::parse(std::str::from_utf8(fields.next()?).ok()?)?;
    let root = unescape_path(fields.next()?);
    let mountpoint = unescape_path(fields.next()?);
    let _mount_options = fields.next()?;
    // Optional fields, until a lone dash.
    fields.find(|field| *field == b"-")?;
    let fstype = String::from_utf8_lossy(&unescape(fields.next()?)).into_owned();
    let source = String::from_utf8_lossy(&unescape(fields.next()?)).into_owned();
    let read_only = fields
        .next()?
        .split(|byte| *byte == b',')
        .any(|option| option == b"ro");
    Some(Mount {
        id,
        parent,
        device,
        root,
        mountpoint,
        fstype,
        source,
        read_only,
    })
}

fn number(field: &[u8]) -> Option<u32> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn unescape_path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(field)))
}

/// Undoes the kernel's octal escapes of space, tab, newline, backslash and hash.
#[must_use]
pub fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(octal_byte);
        match (*first, octal) {
            (b'\\', Some(byte)) => {
                out.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

fn octal_byte(digits: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(digits).ok()?;
    if text.bytes().any(|digit| !(b'0'..=b'7').contains(&digit)) {
        return None;
    }
    u8::from_str_radix(text, 8).ok()
}

/// The mount that a path lies on: the last one with the longest mount point that is a prefix.
#[must_use]
pub fn mount_of<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    mounts
        .iter()
        .filter(|mount| path.starts_with(&mount.mountpoint))
        .max_by_key(|mount| mount.mountpoint.components().count())
}

/// Mounts by what they lie on, to find which of them the lookup of a path ends in.
#[derive(Debug)]
pub struct Tree<'a> {
    above: HashMap<(Option<u32>, &'a Path), &'a Mount>,
}

impl<'a> Tree<'a> {
    /// Looks at each mount once.
    #[must_use]
    pub fn new(mounts: &'a [Mount]) -> Self {
        let ids: HashSet<u32> = mounts.iter().map(|mount| mount.id).collect();
        let above = mounts
            .iter()
            .map(|mount| {
                // The root of a name space lies on nothing that is seen there.
                let parent = Some(mount.parent).filter(|id| *id != mount.id && ids.contains(id));
                ((parent, mount.mountpoint.as_path()), mount)
            })
            .collect();
        Self { above }
    }

    /// The mount whose root, or a directory in it, is what this path opens; `None` if it is on no mount.
    #[must_use]
    pub fn reached(&self, path: &Path) -> Option<&'a Mount> {
        let mut ways: Vec<&Path> = path.ancestors().collect();
        ways.reverse();
        let mut reached: Option<&'a Mount> = None;
        // Each step goes to a mount on the last one, so a loop (which no kernel writes) is what the limit is for.
        let mut steps = self.above.len();
        for way in ways {
            while let Some(next) = self.above.get(&(reached.map(|mount| mount.id), way)) {
                reached = Some(next);
                steps = steps.checked_sub(1)?;
            }
        }
        reached
    }

    /// Something covers this mount, or a mount or directory on the way to it: opening its mount point would reach another file
    /// system, if any. What is covered by the same file system is not hidden.
    #[must_use]
    pub fn is_hidden(&self, mount: &Mount) -> bool {
        self.reached(&mount.mountpoint)
            .is_none_or(|reached| reached.device != mount.device)
    }
}

#[cfg(test)]
mod tests;
