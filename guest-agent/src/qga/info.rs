//! What the guest is: file systems, operating system, name, time, in the shapes of QEMU's schema.
//!
//! Called by `command`, never while frozen.

use crate::filesystem::devices::BlockDevices;
use crate::filesystem::plan::{Filesystem, Sources};
use serde_json::{Map, Value, json};
use std::fs;
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// `guest-get-fsinfo`.
pub(super) fn filesystems(sources: &Sources) -> io::Result<Value> {
    let devices = BlockDevices::new(&sources.sys);
    let all = sources.filesystems()?;
    Ok(all
        .iter()
        .map(|filesystem| describe(filesystem, &devices))
        .collect())
}

fn describe(filesystem: &Filesystem, devices: &BlockDevices) -> Value {
    let name = filesystem.source.strip_prefix("/dev/");
    let mut object = json!({
        "name": name.unwrap_or(&filesystem.source),
        "mountpoint": filesystem.name(),
        "type": filesystem.fstype,
        "disk": filesystem.extents.iter().map(|extent| disk(&extent.disk, &extent.serial, devices)).collect::<Vec<_>>(),
    });
    if let (Ok(stat), Some(object)) = (
        rustix::fs::statvfs(filesystem.name().as_str()),
        object.as_object_mut(),
    ) {
        let used = stat.f_blocks.saturating_sub(stat.f_bfree);
        object.insert(
            "used-bytes".into(),
            json!(used.saturating_mul(stat.f_frsize)),
        );
        object.insert(
            "total-bytes".into(),
            json!(stat.f_blocks.saturating_mul(stat.f_frsize)),
        );
    }
    object
}

fn disk(name: &str, serial: &str, devices: &BlockDevices) -> Value {
    let path = devices.by_name(name).and_then(|n| devices.node_path(n));
    let path = path.unwrap_or_default();
    let (bus_type, pci) = bus(&path);
    let mut object = Map::new();
    object.insert("bus-type".into(), json!(bus_type));
    object.insert("bus".into(), json!(0));
    object.insert("target".into(), json!(0));
    object.insert("unit".into(), json!(0));
    object.insert("pci-controller".into(), pci);
    object.insert("dev".into(), json!(format!("/dev/{name}")));
    if !serial.is_empty() {
        object.insert("serial".into(), json!(serial));
    }
    Value::Object(object)
}

/// Bus and PCI address, from a path like `/sys/devices/pci0000:00/0000:00:04.0/virtio1/block/vda`; -1 where there is none.
fn bus(path: &Path) -> (&'static str, Value) {
    let mut bus = "unknown";
    let mut pci = (-1, -1, -1, -1);
    for part in path.iter().filter_map(|part| part.to_str()) {
        if let Some(address) = pci_address(part) {
            pci = address;
        }
        bus = match part {
            _ if part.starts_with("virtio") => "virtio",
            _ if part.starts_with("nvme") => "nvme",
            _ if part.starts_with("ata") => "sata",
            _ if part.starts_with("host") && bus == "unknown" => "scsi",
            _ => bus,
        };
    }
    let (domain, number, slot, function) = pci;
    (
        bus,
        json!({"domain": domain, "bus": number, "slot": slot, "function": function}),
    )
}

/// `0000:00:04.0`.
fn pci_address(part: &str) -> Option<(i64, i64, i64, i64)> {
    let (domain, rest) = part.split_once(':')?;
    let (bus, rest) = rest.split_once(':')?;
    let (slot, function) = rest.split_once('.')?;
    let hex = |text| i64::from_str_radix(text, 16).ok();
    Some((hex(domain)?, hex(bus)?, hex(slot)?, hex(function)?))
}

/// `guest-get-osinfo`.
pub(super) fn operating_system() -> Value {
    let mut object = Map::new();
    for (key, file) in [
        ("kernel-release", "/proc/sys/kernel/osrelease"),
        ("kernel-version", "/proc/sys/kernel/version"),
    ] {
        if let Ok(text) = fs::read_to_string(file) {
            object.insert(key.into(), json!(text.trim()));
        }
    }
    object.insert("machine".into(), json!(std::env::consts::ARCH));
    let release = fs::read_to_string("/etc/os-release")
        .or_else(|_| fs::read_to_string("/usr/lib/os-release"))
        .unwrap_or_default();
    for line in release.lines() {
        let Some((name, value)) = line.split_once('=') else {
            continue;
        };
        let key = match name {
            "ID" => "id",
            "NAME" => "name",
            "PRETTY_NAME" => "pretty-name",
            "VERSION" => "version",
            "VERSION_ID" => "version-id",
            "VARIANT" => "variant",
            "VARIANT_ID" => "variant-id",
            _ => continue,
        };
        object.insert(key.into(), json!(value.trim_matches(['"', '\''])));
    }
    Value::Object(object)
}

/// `guest-get-host-name`.
pub(super) fn host_name() -> io::Result<Value> {
    let name = fs::read_to_string("/proc/sys/kernel/hostname")?;
    Ok(json!({ "host-name": name.trim() }))
}

/// `guest-get-time`: nanoseconds since 1970.
pub(super) fn time() -> io::Result<Value> {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(io::Error::other)?;
    Ok(json!(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    //! Addresses are read from paths.
    use super::*;

    #[test]
    fn a_virtio_disk_has_its_pci_address() {
        let path = Path::new("/sys/devices/pci0000:00/0000:00:04.0/virtio1/block/vda");
        assert_eq!(
            bus(path),
            (
                "virtio",
                json!({"domain": 0, "bus": 0, "slot": 4, "function": 0})
            )
        );
        let path =
            Path::new("/sys/devices/pci0000:00/0000:00:1f.2/ata1/host0/target0:0:0/block/sda");
        assert_eq!(bus(path).0, "sata");
        assert_eq!(
            bus(Path::new("/sys/devices/virtual/block/loop0")).1["slot"],
            -1
        );
    }
}
