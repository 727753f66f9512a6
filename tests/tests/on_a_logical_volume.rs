//! A file system on a logical volume (LVM, device mapper) whose stripes lie on two disks: the agent names both, a set of both is one
//! instant, and the copies are the volume again in another machine.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::load::Load;
use vmshadow_tests::harness::oracle;
use vmshadow_tests::harness::requires;
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::vm::VmBuilder;

/// The device mapper, and LVM as it is without udev.
const LVM: &str = r#"set -e
insmod /lib/modules/dm-mod.ko
mkdir -p /run/lvm /run/lock/lvm /mnt/lv
lvm() {
    /usr/sbin/lvm "$@" --config 'devices { scan = "/dev" obtain_device_list_from_udev = 0 use_devicesfile = 0 external_device_info_source = "none" }
        activation { udev_sync = 0 udev_rules = 0 monitoring = 0 }'
}
disk() {
    for disk in /sys/block/vd*; do
        [ "$(cat $disk/serial)" != $1 ] || echo /dev/${disk##*/}
    done
}
"#;

/// A volume whose pieces of 64 KiB lie on the two disks in turns.
const MAKE: &str = r"
umount /mnt/a /mnt/b
lvm pvcreate -q -y -ff $(disk a) $(disk b)
lvm vgcreate -q group $(disk a) $(disk b)
lvm lvcreate -q -y -W n -n data -i 2 -I 64k -l 100%FREE group
/usr/sbin/mke2fs -q -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 /dev/mapper/group-data
mount -t ext4 /dev/mapper/group-data /mnt/lv
";

/// The same in another machine.
const FIND: &str = r"
lvm vgchange -q -a y group
/usr/sbin/e2fsck -fn /dev/mapper/group-data
mount -t ext4 /dev/mapper/group-data /mnt/lv
";

/// Serials of the disks under a file system, as the agent tells them.
fn serials(filesystem: &Value) -> Vec<&str> {
    let extents = filesystem["identify"]["extents"].as_array();
    let mut serials: Vec<_> = extents
        .into_iter()
        .flatten()
        .filter_map(|extent| extent["serial"].as_str())
        .collect();
    serials.sort_unstable();
    serials.dedup();
    serials
}

#[test]
fn a_set_of_a_striped_logical_volume_is_one_instant_of_both_its_disks() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let disks = [("a", FileSystem::Ext4), ("b", FileSystem::Ext4)];
    let site = Site::start_in_databases_guest("mapped", &disks)?;
    site.vm.shell(&format!("{LVM}{MAKE}"))?;
    site.willing_writer()?;
    let load = Load::start(&site.vm, &["/mnt/lv/load.db"])?;
    // Half of the volume is no copy of it, and the document says so.
    let half = site.create(&["--disk", "a"])?.answer;
    let notes = half.at("/notes")?.to_string();
    ensure!(notes.contains("/mnt/lv lies on disk b, too"), "{notes}");
    let set = site.create(&[])?;
    let filesystems = set.answer.at("/filesystems")?.as_array();
    let mut filesystems = filesystems.context("file systems")?.iter();
    let lv = filesystems.find(|one| one["mountpoint"] == "/mnt/lv");
    let lv = lv.with_context(|| format!("{:#?}", set.answer))?;
    ensure!(serials(lv) == ["a", "b"], "{lv:#}");
    ensure!(lv["freeze"]["result"] == "frozen", "{lv:#}");
    let notes = set.answer.at("/notes")?.to_string();
    ensure!(!notes.contains("not in the set"), "{notes}");
    load.wait_for_more(10)?;
    let acks = load.stop(&site.vm)?;
    let copies = site.read_back(&set.answer, "copy")?;
    let [a, b] = copies.as_slice() else {
        anyhow::bail!("{copies:?}");
    };
    let second = VmBuilder::new("mapped-copy")
        .with_databases()
        .file("a", a)
        .file("b", b)
        .boot()?;
    second.shell(&format!("{LVM}{FIND}"))?;
    let found = oracle::open_database(&second, "/mnt/lv/load.db")?;
    oracle::compare(&found, 0, &acks, &set.window)
}
