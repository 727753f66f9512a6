//! Which file systems there are, and in what order they freeze.
//!
//! Called by `quiesce` before each freeze and for `identify`. Freezes nothing. Invariants: each superblock is named once;
//! a file system whose device is a file on another one freezes before that one; `/` freezes last unless that rule forbids it;
//! network, FUSE and autofs mounts are never opened. What lies on a disk and cannot be frozen or reached (FUSE on a block
//! device, hidden beneath another mount, mounted in another name space only) is named all the same, for a copy in which it
//! was not held must not pass for one in which all was.

use super::devices::{self, BlockDevices, parse_swaps};
use super::mounts::{DeviceNumber, Mount, Tree, mount_of, parse};
use super::not_to_snapshot::Swap;
use guest_agent_wire::host::FilesystemInfo;
use guest_agent_wire::types::DiskExtent;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// Types on a disk that have no freeze operation: FIFREEZE answers EOPNOTSUPP.
const WITHOUT_FREEZE: &[&str] = &[
    "vfat", "msdos", "exfat", "udf", "hfs", "hfsplus", "minix", "ufs", "qnx4",
];

/// Types that hold data on disks but are not seen as one block device, so their freeze cannot be proven.
const UNCOVERED: &[&str] = &["zfs", "bcachefs"];

/// Most text about mounts of other name spaces than the first that is read; some 200,000 mounts.
const OTHER_SPACES_BYTES_MAX: usize = 32 << 20;

/// A mounted file system that is backed by a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filesystem {
    /// Device number of the superblock.
    pub device: DeviceNumber,
    /// Where it is mounted; the first that can be opened is taken.
    pub mountpoints: Vec<PathBuf>,
    /// Type.
    pub fstype: String,
    /// What was mounted.
    pub source: String,
    /// The superblock is read-only.
    pub read_only: bool,
    /// Why it cannot be frozen.
    pub why_not: Option<String>,
    /// Where it lies.
    pub extents: Vec<DiskExtent>,
    /// Freeze order: equal numbers freeze at the same time, smaller ones earlier.
    pub step: u32,
}

impl Filesystem {
    /// The mount point by which it is named in reports.
    #[must_use]
    pub fn name(&self) -> String {
        self.mountpoints
            .first()
            .map(|path| path.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    /// Stands for those of name spaces that were too large to be read: nobody knows on which disks they lie.
    fn not_looked_at() -> Self {
        Self {
            device: DeviceNumber { major: 0, minor: 0 },
            mountpoints: vec![PathBuf::from("(other mount name spaces)")],
            fstype: "unknown".to_owned(),
            source: String::new(),
            read_only: false,
            why_not: Some("there are too many mounts to look at".to_owned()),
            extents: Vec::new(),
            step: 0,
        }
    }

    /// As the host sees it.
    #[must_use]
    pub fn info(&self) -> FilesystemInfo {
        FilesystemInfo {
            mountpoint: self.name(),
            fstype: self.fstype.clone(),
            device: self.source.clone(),
            read_only: self.read_only,
            freezable: !self.read_only && self.why_not.is_none(),
            why_not: self.why_not.clone(),
            extents: self.extents.clone(),
        }
    }

    /// It lies, at least in part, on one of these disks; true if nothing is known, or if no disks are named.
    #[must_use]
    pub fn is_on(&self, serials: &[String]) -> bool {
        serials.is_empty()
            || self.extents.is_empty()
            || self
                .extents
                .iter()
                .any(|extent| extent.serial.is_empty() || serials.contains(&extent.serial))
    }
}

/// Where to look, and what to leave alone.
#[derive(Clone, Debug)]
pub struct Sources {
    /// `/proc`.
    pub proc: PathBuf,
    /// `/sys`.
    pub sys: PathBuf,
    /// If set, only file systems mounted below it exist for the agent (containers and tests).
    pub only_under: Option<PathBuf>,
}

impl Sources {
    /// Mounts of the first process, in its name space.
    pub fn mounts(&self) -> std::io::Result<Vec<Mount>> {
        Ok(parse(&std::fs::read(self.proc.join("1/mountinfo"))?))
    }

    /// All file systems, in freeze order; those that only other mount name spaces see stand last.
    pub fn filesystems(&self) -> std::io::Result<Vec<Filesystem>> {
        let devices = BlockDevices::new(&self.sys);
        let only_under = self.only_under.as_deref();
        let mut filesystems = order(&self.mounts()?, &devices, only_under);
        let mut known: BTreeSet<_> = filesystems.iter().map(|fs| fs.device).collect();
        let mut room = OTHER_SPACES_BYTES_MAX;
        for processes in self.other_spaces()? {
            // All may have ended just now: what they saw nobody sees any more.
            let Some((process, text)) = self.seen_by_one_of(&processes, room) else {
                continue;
            };
            let Some(left) = room.checked_sub(text.len()) else {
                filesystems.push(Filesystem::not_looked_at());
                break;
            };
            room = left;
            for mut other in order_new(&parse(&text), &devices, only_under, &known) {
                known.insert(other.device);
                // Its own name may mean another file system here.
                let root = PathBuf::from(format!("/proc/{process}/root"));
                for mountpoint in &mut other.mountpoints {
                    let inside = mountpoint.strip_prefix("/").unwrap_or(mountpoint);
                    *mountpoint = root.join(inside);
                }
                let why = format!("mounted only in the mount name space of process {process}");
                other.why_not.get_or_insert(why);
                filesystems.push(other);
            }
        }
        Ok(filesystems)
    }

    /// Mount points by which these file systems can be reached, in whatever mount name space; none that something hides.
    pub fn ways_to(
        &self,
        wanted: &BTreeSet<DeviceNumber>,
    ) -> std::io::Result<BTreeMap<DeviceNumber, Vec<PathBuf>>> {
        let mut ways: BTreeMap<DeviceNumber, Vec<PathBuf>> = BTreeMap::new();
        let mut add = |mounts: &[Mount], root: &Path| {
            let tree = Tree::new(mounts);
            for mount in mounts.iter().filter(|mount| wanted.contains(&mount.device)) {
                if !tree.is_hidden(mount) {
                    let inside = mount.mountpoint.strip_prefix("/");
                    let path = root.join(inside.unwrap_or(&mount.mountpoint));
                    ways.entry(mount.device).or_default().push(path);
                }
            }
        };
        add(&self.mounts()?, Path::new("/"));
        let mut room = OTHER_SPACES_BYTES_MAX;
        for processes in self.other_spaces()? {
            let Some((process, text)) = self.seen_by_one_of(&processes, room) else {
                continue;
            };
            room = room.saturating_sub(text.len());
            let root = self.proc.join(process).join("root");
            add(&parse(&text), &root);
        }
        Ok(ways)
    }

    /// The processes of each mount name space but the first.
    fn other_spaces(&self) -> std::io::Result<Vec<Vec<String>>> {
        let mut spaces: BTreeMap<PathBuf, Vec<String>> = BTreeMap::new();
        for entry in std::fs::read_dir(&self.proc)?.flatten() {
            let name = entry.file_name();
            let Some(process) = name.to_str().filter(|n| n.parse::<u32>().is_ok()) else {
                continue;
            };
            // A process without one has ended, or is a zombie.
            if let Some(space) = self.name_space(process) {
                spaces.entry(space).or_default().push(process.to_owned());
            }
        }
        if let Some(first) = self.name_space("1") {
            spaces.remove(&first);
        }
        Ok(spaces.into_values().collect())
    }

    /// What a name space shows to the first of its processes that has not ended meanwhile.
    fn seen_by_one_of<'a>(
        &self,
        processes: &'a [String],
        room: usize,
    ) -> Option<(&'a str, Vec<u8>)> {
        let mut seen = processes.iter().map(|process| {
            let text = self.mountinfo(process, room).ok()?;
            Some((process.as_str(), text))
        });
        seen.find_map(|seen| seen)
    }

    /// What a process sees; one byte more than `room` if it is more than that.
    fn mountinfo(&self, process: &str, room: usize) -> std::io::Result<Vec<u8>> {
        let file = std::fs::File::open(self.proc.join(process).join("mountinfo"))?;
        let mut text = Vec::new();
        let limit = u64::try_from(room).unwrap_or(u64::MAX).saturating_add(1);
        file.take(limit).read_to_end(&mut text)?;
        Ok(text)
    }

    /// What names a process's mount name space; `None` if it has none or may not be looked at.
    fn name_space(&self, process: &str) -> Option<PathBuf> {
        std::fs::read_link(self.proc.join(process).join("ns/mnt")).ok()
    }

    /// Where a file lies: the extents of its whole file system. Empty if that is not on a disk, or cannot be told.
    pub fn extents_of(&self, file: &Path) -> std::io::Result<Vec<DiskExtent>> {
        let file = file.canonicalize()?;
        let mounts = self.mounts()?;
        let devices = BlockDevices::new(&self.sys);
        let Some(mount) = mount_of(&mounts, &file) else {
            return Ok(Vec::new());
        };
        let mut extents = Vec::new();
        for device in devices.of_mount(mount) {
            extents.extend(devices.beneath(device, &mounts).extents);
        }
        Ok(extents)
    }

    /// Swap that is in use and may have something on a disk.
    fn swaps(&self, devices: &BlockDevices) -> Vec<devices::Swap> {
        let text = std::fs::read_to_string(self.proc.join("swaps")).unwrap_or_default();
        let mut swaps = parse_swaps(&text);
        swaps.retain(|swap| swap.is_file || !devices.is_memory(&swap.path));
        swaps
    }

    /// The same as devices and files.
    #[must_use]
    pub fn swap(&self) -> Swap {
        let devices = BlockDevices::new(&self.sys);
        let mut swap = Swap::default();
        for area in self.swaps(&devices) {
            if area.is_file {
                swap.files.push(area.path.into());
            } else {
                swap.devices.extend(devices.by_name(&area.path));
            }
        }
        swap
    }

    /// Areas that are written while all is frozen: swap partitions. A swap file lies inside a file system's own extents and
    /// is not exempt: swapping to it in the window makes the host's witness refuse the set, which errs on the safe side.
    #[must_use]
    pub fn exempt(&self) -> Vec<DiskExtent> {
        let mounts = self.mounts().unwrap_or_default();
        let devices = BlockDevices::new(&self.sys);
        self.swaps(&devices)
            .iter()
            .filter(|swap| !swap.is_file)
            .filter_map(|swap| devices.by_name(&swap.path))
            .flat_map(|device| devices.beneath(device, &mounts).extents)
            .collect()
    }
}

/// File systems of these mounts, in freeze order.
#[must_use]
pub fn order(
    mounts: &[Mount],
    devices: &BlockDevices,
    only_under: Option<&Path>,
) -> Vec<Filesystem> {
    order_new(mounts, devices, only_under, &BTreeSet::new())
}

/// The same without what is known already. The work grows with the number of mounts, not with its square: there may be
/// thousands, and file systems may be frozen meanwhile.
fn order_new(
    mounts: &[Mount],
    devices: &BlockDevices,
    only_under: Option<&Path>,
    known: &BTreeSet<DeviceNumber>,
) -> Vec<Filesystem> {
    let mut exists: BTreeMap<DeviceNumber, bool> = BTreeMap::new();
    let candidates: Vec<&Mount> = mounts
        .iter()
        .filter(|mount| !known.contains(&mount.device))
        .filter(|mount| only_under.is_none_or(|top| mount.mountpoint.starts_with(top)))
        .filter(|mount| {
            let device = mount.device;
            let exists = exists
                .entry(device)
                .or_insert_with(|| devices.exists(device));
            *exists || is_on_disk_unseen(mount)
        })
        .collect();
    if candidates.is_empty() {
        return Vec::new();
    }
    let tree = Tree::new(mounts);
    let mut found: BTreeMap<DeviceNumber, Filesystem> = BTreeMap::new();
    let mut beneath: BTreeMap<DeviceNumber, Vec<DeviceNumber>> = BTreeMap::new();
    // A hidden mount point counts only for a file system that has no other.
    let (hidden, seen): (Vec<&Mount>, Vec<&Mount>) = candidates
        .into_iter()
        .partition(|mount| tree.is_hidden(mount));
    let seen = seen.into_iter().map(|mount| (mount, false));
    let hidden = hidden.into_iter().map(|mount| (mount, true));
    for (mount, is_hidden) in seen.chain(hidden) {
        if let Some(known) = found.get_mut(&mount.device) {
            if is_hidden {
                continue;
            }
            known.mountpoints.push(mount.mountpoint.clone());
            // The root of the file system names it better than a bind mount of a directory inside.
            if mount.root == Path::new("/") {
                let last = known.mountpoints.len() - 1;
                known.mountpoints.swap(0, last);
            }
            continue;
        }
        let (mountpoint, why_not) = if is_hidden {
            // Never opened, and its path is the name of what hides it.
            let mut name = mount.mountpoint.clone().into_os_string();
            name.push(" (hidden)");
            let why = "hidden beneath another mount".to_owned();
            (PathBuf::from(name), Some(why))
        } else {
            (mount.mountpoint.clone(), why_not(mount))
        };
        let mut extents = Vec::new();
        let mut under = Vec::new();
        for device in devices.of_mount(mount) {
            let lies = devices.beneath(device, mounts);
            for extent in lies.extents {
                if !extents.contains(&extent) {
                    extents.push(extent);
                }
            }
            under.extend(lies.filesystems);
        }
        beneath.insert(mount.device, under);
        found.insert(
            mount.device,
            Filesystem {
                device: mount.device,
                mountpoints: vec![mountpoint],
                fstype: mount.fstype.clone(),
                source: mount.source.clone(),
                read_only: mount.read_only,
                why_not,
                extents,
                step: 0,
            },
        );
    }
    let mut filesystems: Vec<Filesystem> = found.into_values().collect();
    number_steps(&mut filesystems, &beneath);
    filesystems.sort_by(|a, b| (a.step, &a.mountpoints).cmp(&(b.step, &b.mountpoints)));
    filesystems
}

/// It has data on disks though its number is not that of a block device.
fn is_on_disk_unseen(mount: &Mount) -> bool {
    (mount.fstype == "btrfs" && mount.source.starts_with('/'))
        || UNCOVERED.contains(&mount.fstype.as_str())
}

fn why_not(mount: &Mount) -> Option<String> {
    let fstype = mount.fstype.as_str();
    if UNCOVERED.contains(&fstype) {
        Some(format!(
            "{fstype} cannot be frozen through the kernel's freeze operation"
        ))
    } else if fstype.starts_with("fuse") {
        // Its answers come from a process that may be frozen or dead: it is not even opened.
        Some(format!("{fstype} is served by a process"))
    } else if WITHOUT_FREEZE.contains(&fstype) {
        Some(format!("{fstype} has no freeze operation"))
    } else {
        None
    }
}

/// Numbers the steps: the deeper a file system is nested in files of others, the earlier; `/` after its equals.
fn number_steps(
    filesystems: &mut [Filesystem],
    beneath: &BTreeMap<DeviceNumber, Vec<DeviceNumber>>,
) {
    let depth = |device| nesting(device, beneath, filesystems.len());
    let keys: Vec<(usize, bool)> = filesystems
        .iter()
        .map(|fs| {
            let is_root = fs.mountpoints.iter().any(|path| path == Path::new("/"));
            (usize::MAX - depth(fs.device), is_root)
        })
        .collect();
    let steps: BTreeSet<_> = keys.iter().copied().collect();
    for (fs, key) in filesystems.iter_mut().zip(&keys) {
        let step = steps.iter().take_while(|step| *step < key).count();
        fs.step = u32::try_from(step).unwrap_or(u32::MAX);
    }
}

/// Number of file systems beneath one, along the longest way.
fn nesting(
    device: DeviceNumber,
    beneath: &BTreeMap<DeviceNumber, Vec<DeviceNumber>>,
    limit: usize,
) -> usize {
    let Some(limit) = limit.checked_sub(1) else {
        return 0;
    };
    beneath
        .get(&device)
        .into_iter()
        .flatten()
        .map(|under| 1 + nesting(*under, beneath, limit))
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests;
