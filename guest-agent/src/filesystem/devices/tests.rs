//! A fake `/sys` with a partitioned virtio disk, LVM, a loop device and a two-device btrfs.

use super::*;
use crate::filesystem::mounts;
use std::os::unix::fs::symlink;

struct Sys(tempfile::TempDir);

impl Sys {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A device with its entries in dev/block and class/block.
    fn device(&self, path: &str, number: &str, sectors: u64) {
        self.file(&format!("devices/{path}/dev"), &format!("{number}\n"));
        self.file(&format!("devices/{path}/size"), &format!("{sectors}\n"));
        let name = path.rsplit('/').next().unwrap();
        for (folder, name) in [("dev/block", number), ("class/block", name)] {
            let folder = self.0.path().join(folder);
            fs::create_dir_all(&folder).unwrap();
            symlink(self.0.path().join("devices").join(path), folder.join(name)).unwrap();
        }
    }

    fn link(&self, from: &str, to: &str) {
        let from = self.0.path().join(from);
        fs::create_dir_all(from.parent().unwrap()).unwrap();
        symlink(self.0.path().join("devices").join(to), from).unwrap();
    }

    fn devices(&self) -> BlockDevices {
        BlockDevices::new(self.0.path())
    }
}

fn number(text: &str) -> DeviceNumber {
    DeviceNumber::parse(text).unwrap()
}

fn disk_with_partition() -> Sys {
    let sys = Sys::new();
    sys.device("pci/vda", "254:0", 2_000_000);
    sys.file("devices/pci/vda/serial", "root-disk\n");
    sys.device("pci/vda/vda1", "254:1", 1_000_000);
    sys.file("devices/pci/vda/vda1/partition", "1\n");
    sys.file("devices/pci/vda/vda1/start", "2048\n");
    sys
}

fn part(start: u64, sectors: u64) -> DiskExtent {
    DiskExtent {
        serial: "root-disk".into(),
        disk: "vda".into(),
        start_bytes: start * 512,
        length_bytes: sectors * 512,
    }
}

#[test]
fn a_partition_is_a_part_of_its_disk_and_carries_its_serial() {
    let sys = disk_with_partition();
    let found = sys.devices().beneath(number("254:1"), &[]);
    assert_eq!(found.extents, [part(2048, 1_000_000)]);
    let found = sys.devices().beneath(number("254:0"), &[]);
    assert_eq!(found.extents, [part(0, 2_000_000)]);
}

#[test]
fn device_mapper_is_followed_to_its_slaves() {
    let sys = disk_with_partition();
    sys.device("virtual/dm-0", "253:0", 4096);
    sys.link("devices/virtual/dm-0/slaves/vda1", "pci/vda/vda1");
    let found = sys.devices().beneath(number("253:0"), &[]);
    assert_eq!(found.extents, [part(2048, 1_000_000)]);
}

#[test]
fn a_loop_device_lies_on_the_file_system_of_its_backing_file() {
    let sys = disk_with_partition();
    sys.device("virtual/loop0", "7:0", 4096);
    sys.file("devices/virtual/loop0/loop/backing_file", "/var/image\n");
    let mounts = mounts::parse(b"1 1 254:1 / /var rw - ext4 /dev/vda1 rw\n");
    let found = sys.devices().beneath(number("7:0"), &mounts);
    assert_eq!(found.filesystems, [number("254:1")]);
    assert_eq!(found.extents, [part(2048, 1_000_000)]);
}

#[test]
fn a_loop_of_devices_ends() {
    let sys = Sys::new();
    sys.device("virtual/dm-0", "253:0", 1);
    sys.link("devices/virtual/dm-0/slaves/dm-0", "virtual/dm-0");
    assert_eq!(
        sys.devices().beneath(number("253:0"), &[]),
        Beneath::default()
    );
}

#[test]
fn btrfs_is_found_by_any_of_its_devices() {
    let sys = disk_with_partition();
    sys.device("pci/vdb", "254:16", 8);
    sys.link("fs/btrfs/uuid/devices/vda1", "pci/vda/vda1");
    sys.link("fs/btrfs/uuid/devices/vdb", "pci/vdb");
    let mut devices = sys.devices().btrfs_devices("/dev/vdb");
    devices.sort();
    assert_eq!(devices, [number("254:1"), number("254:16")]);
    assert!(sys.devices().btrfs_devices("/dev/vdc").is_empty());
}

#[test]
fn swaps_are_read() {
    let text = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n/dev/vda2                               partition\t524284\t0\t-2\n/swap\\040file file\t1\t0\t-3\n";
    assert_eq!(
        parse_swaps(text),
        [
            Swap {
                path: "/dev/vda2".into(),
                is_file: false
            },
            Swap {
                path: "/swap file".into(),
                is_file: true
            }
        ]
    );
}
