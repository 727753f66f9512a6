//! Where a block device lies: disk serial, start and length, by `/sys` alone.
//!
//! Called by `plan`. Reads text files of sysfs (and `/proc/swaps`), opens no device. Where sysfs does not tell the exact
//! place (device mapper, RAID, loop), the answer is the whole of what lies beneath: extents may be too large, never too small.
#![deny(clippy::indexing_slicing)]

use super::mounts::{DeviceNumber, Mount, mount_of};
use guest_agent_wire::types::DiskExtent;
use std::fs;
use std::path::{Path, PathBuf};

const SECTOR_BYTES: u64 = 512;
/// Deepest stack of devices that is followed.
const DEPTH_MAX: usize = 16;

/// What lies beneath a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Beneath {
    /// Parts of disks.
    pub extents: Vec<DiskExtent>,
    /// File systems that hold the backing files of loop devices on the way.
    pub filesystems: Vec<DeviceNumber>,
}

/// Reader of `/sys`.
#[derive(Clone, Debug)]
pub struct BlockDevices {
    sys: PathBuf,
}

impl BlockDevices {
    /// Reads below `sys` (`/sys`, another directory in tests).
    #[must_use]
    pub fn new(sys: &Path) -> Self {
        Self {
            sys: sys.to_owned(),
        }
    }

    /// True if the number names a block device.
    #[must_use]
    pub fn exists(&self, device: DeviceNumber) -> bool {
        device.major != 0 && self.node(device).exists()
    }

    /// Devices of a btrfs file system, found by the device that it was mounted from.
    #[must_use]
    pub fn btrfs_devices(&self, source: &str) -> Vec<DeviceNumber> {
        let name = kernel_name(source);
        let Ok(entries) = fs::read_dir(self.sys.join("fs/btrfs")) else {
            return Vec::new();
        };
        for entry in entries.flatten() {
            let devices = entry.path().join("devices");
            if name
                .as_ref()
                .is_some_and(|name| devices.join(name).exists())
            {
                let Ok(devices) = fs::read_dir(devices) else {
                    continue;
                };
                return devices
                    .flatten()
                    .filter_map(|device| read_device(&device.path()))
                    .collect();
            }
        }
        Vec::new()
    }

    /// Where a device lies. `mounts` places the backing files of loop devices.
    #[must_use]
    pub fn beneath(&self, device: DeviceNumber, mounts: &[Mount]) -> Beneath {
        let mut found = Beneath::default();
        self.follow(device, mounts, &mut found, DEPTH_MAX);
        found
    }

    fn follow(&self, device: DeviceNumber, mounts: &[Mount], found: &mut Beneath, depth: usize) {
        let Some(depth) = depth.checked_sub(1) else {
            return;
        };
        let Ok(node) = self.node(device).canonicalize() else {
            return;
        };
        if node.join("partition").exists() {
            let Some(disk) = node.parent() else { return };
            let start = read_sectors(&node.join("start"));
            let length = read_sectors(&node.join("size"));
            match (is_stacked(disk), read_device(disk)) {
                // A partition of a loop, device-mapper or RAID device: what lies beneath the whole.
                (true, Some(whole)) => self.follow(whole, mounts, found, depth),
                _ => push(&mut found.extents, extent(disk, start, length)),
            }
            return;
        }
        if let Ok(file) = fs::read_to_string(node.join("loop/backing_file")) {
            let file = file.trim_end_matches('\n').trim_end_matches(" (deleted)");
            if let Some(mount) = mount_of(mounts, Path::new(file)) {
                if !found.filesystems.contains(&mount.device) {
                    found.filesystems.push(mount.device);
                }
                for device in self.of_mount(mount) {
                    self.follow(device, mounts, found, depth);
                }
            }
            return;
        }
        let slaves = slaves(&node);
        if slaves.is_empty() {
            let length = read_sectors(&node.join("size"));
            push(&mut found.extents, extent(&node, 0, length));
        }
        for slave in slaves {
            if let Some(slave) = read_device(&slave) {
                self.follow(slave, mounts, found, depth);
            }
        }
    }

    /// Where a device lies if its addresses are those of one disk, shifted by the start of its partition: nothing is
    /// stacked beneath it, and the disk has a serial by which the host knows it.
    #[must_use]
    pub fn exact(&self, device: DeviceNumber) -> Option<DiskExtent> {
        let node = self.node(device).canonicalize().ok()?;
        let exact = if node.join("partition").exists() {
            let disk = node.parent()?;
            if is_stacked(disk) {
                return None;
            }
            let start = read_sectors(&node.join("start"));
            extent(disk, start, read_sectors(&node.join("size")))
        } else if is_stacked(&node) {
            return None;
        } else {
            extent(&node, 0, read_sectors(&node.join("size")))
        };
        (!exact.serial.is_empty()).then_some(exact)
    }

    /// Block devices that a mounted file system lies on.
    #[must_use]
    pub fn of_mount(&self, mount: &Mount) -> Vec<DeviceNumber> {
        if mount.fstype == "btrfs" {
            self.btrfs_devices(&mount.source)
        } else if self.exists(mount.device) {
            vec![mount.device]
        } else {
            Vec::new()
        }
    }

    /// Kernel path of the disk under a device, `/sys/devices/pci0000:00/...`, for naming its bus.
    #[must_use]
    pub fn node_path(&self, device: DeviceNumber) -> Option<PathBuf> {
        self.node(device).canonicalize().ok()
    }

    /// Device number of a device file, looked up by its kernel name.
    #[must_use]
    pub fn by_name(&self, path: &str) -> Option<DeviceNumber> {
        read_device(&self.sys.join("class/block").join(kernel_name(path)?))
    }

    /// True if nothing of this device is on a disk: a RAM disk, or zram that writes nothing back to one.
    #[must_use]
    pub fn is_memory(&self, path: &str) -> bool {
        let Some(name) = kernel_name(path) else {
            return false;
        };
        match name.trim_end_matches(|c: char| c.is_ascii_digit()) {
            "ram" => true,
            "zram" => {
                let backing = self.sys.join("class/block").join(name).join("backing_dev");
                // Not there in a kernel that cannot write back.
                fs::read_to_string(backing).map_or(true, |backing| backing.trim() == "none")
            }
            _ => false,
        }
    }

    fn node(&self, device: DeviceNumber) -> PathBuf {
        self.sys.join("dev/block").join(device.to_string())
    }
}

/// `/dev/mapper/x` or `/dev/vda1` as the kernel calls it: symbolic links of devtmpfs are followed.
fn kernel_name(source: &str) -> Option<String> {
    let path = Path::new(source);
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    Some(path.file_name()?.to_str()?.replace('/', "!"))
}

fn is_stacked(disk: &Path) -> bool {
    disk.join("loop/backing_file").exists() || !slaves(disk).is_empty()
}

fn slaves(node: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(node.join("slaves")) else {
        return Vec::new();
    };
    let mut slaves: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    slaves.sort();
    slaves
}

fn read_device(node: &Path) -> Option<DeviceNumber> {
    DeviceNumber::parse(&fs::read_to_string(node.join("dev")).ok()?)
}

fn read_sectors(file: &Path) -> u64 {
    fs::read_to_string(file)
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok())
        .unwrap_or(0)
        .saturating_mul(SECTOR_BYTES)
}

fn extent(disk: &Path, start_bytes: u64, length_bytes: u64) -> DiskExtent {
    DiskExtent {
        serial: serial(disk),
        disk: disk
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default(),
        start_bytes,
        length_bytes,
    }
}

fn push(extents: &mut Vec<DiskExtent>, extent: DiskExtent) {
    if !extents.contains(&extent) {
        extents.push(extent);
    }
}

/// Serial of a disk: virtio-blk, NVMe, then SCSI (page 0x80, whose first four bytes are its header).
fn serial(disk: &Path) -> String {
    for place in ["serial", "device/serial"] {
        if let Ok(text) = fs::read(disk.join(place)) {
            let text = clean(&text);
            if !text.is_empty() {
                return text;
            }
        }
    }
    fs::read(disk.join("device/vpd_pg80"))
        .ok()
        .and_then(|page| page.get(4..).map(clean))
        .unwrap_or_default()
}

fn clean(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .trim_matches(|c: char| c.is_whitespace() || c == '\0')
        .to_owned()
}

/// One line of `/proc/swaps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swap {
    /// Device or file.
    pub path: String,
    /// It is a file on a file system.
    pub is_file: bool,
}

/// Parses `/proc/swaps`.
#[must_use]
pub fn parse_swaps(text: &str) -> Vec<Swap> {
    text.lines()
        .skip(1)
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let path = super::mounts::unescape(fields.next()?.as_bytes());
            let kind = fields.next()?;
            Some(Swap {
                path: String::from_utf8_lossy(&path).into_owned(),
                is_file: kind == "file",
            })
        })
        .collect()
}

#[cfg(test)]
mod tests;
