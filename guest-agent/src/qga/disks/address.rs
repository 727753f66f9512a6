//! Where a disk is plugged in: bus, PCI address, unit, by its path in `/sys` alone.
//!
//! Called by `disks`. The same fields for the same controllers as QEMU's agent; what it does not know either is `unknown`
//! with -1 for every number of the address.

use serde_json::{Map, Value, json};
use std::fs;
use std::path::Path;

/// Describes the device at a canonical path like `/sys/devices/pci0000:00/0000:00:04.0/virtio1/block/vda/vda1`.
pub(super) fn of(node: &Path) -> Value {
    let path = node.to_string_lossy();
    let place = controller(&path, |controller| {
        let driver = fs::read_link(Path::new(controller).join("driver")).ok()?;
        Some(driver.file_name()?.to_str()?.to_owned())
    });
    let ports = |prefix: &str| {
        let controller = place.as_ref().map(|place| place.path).unwrap_or_default();
        let entries = fs::read_dir(controller).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        numbers(names, prefix)
    };
    let mut object = describe(&path, place.as_ref(), ports);
    if let Some(file) = device_file(node) {
        object.insert("dev".into(), json!(file));
    }
    if let Some(serial) = serial(node) {
        object.insert("serial".into(), json!(serial));
    }
    Value::Object(object)
}

/// `/dev/vda1`.
pub(super) fn device_file(node: &Path) -> Option<String> {
    let text = fs::read_to_string(node.join("uevent")).ok()?;
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))?;
    Some(format!("/dev/{name}"))
}

/// As udev names it; in a guest without udev, what the disk itself says.
fn serial(node: &Path) -> Option<String> {
    let number = fs::read_to_string(node.join("dev")).ok()?;
    let known = fs::read_to_string(format!("/run/udev/data/b{}", number.trim()));
    let of_udev = known.ok().and_then(|text| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("E:ID_SERIAL="));
        line.map(str::to_owned)
    });
    let disk = if node.join("partition").exists() {
        node.parent()?
    } else {
        node
    };
    let of_disk = || {
        ["serial", "device/serial"].iter().find_map(|file| {
            let text = fs::read_to_string(disk.join(file)).ok()?;
            Some(text.trim_matches(['\0', ' ', '\n']).to_owned())
        })
    };
    of_udev.or_else(of_disk).filter(|serial| !serial.is_empty())
}

/// A PCI device that disks hang on.
#[derive(Debug, PartialEq, Eq)]
struct Controller<'a> {
    path: &'a str,
    address: (i64, i64, i64, i64),
    driver: String,
}

/// The first PCI device on the way whose driver is one for disks.
fn controller(path: &str, driver: impl Fn(&str) -> Option<String>) -> Option<Controller<'_>> {
    const DRIVERS: [&str; 7] = [
        "ata_piix",
        "sym53c8xx",
        "virtio-pci",
        "ahci",
        "nvme",
        "xhci_hcd",
        "ehci-pci",
    ];
    let mut end = 0;
    for part in path.split('/') {
        end += part.len();
        if let Some(address) = pci_address(part) {
            let path = path.get(..end)?;
            if let Some(driver) = driver(path).filter(|name| DRIVERS.contains(&name.as_str())) {
                return Some(Controller {
                    path,
                    address,
                    driver,
                });
            }
        }
        end += 1;
    }
    None
}

fn describe(
    path: &str,
    controller: Option<&Controller<'_>>,
    ports: impl Fn(&str) -> Vec<i64>,
) -> Map<String, Value> {
    let target = target(path);
    let port = |prefix: &str| {
        let own = path.split('/').find_map(|part| number(part, prefix))?;
        let all = ports(prefix);
        i64::try_from(all.iter().position(|port| *port == own)?).ok()
    };
    let driver = controller.map(|controller| controller.driver.as_str());
    let place = match (driver, target) {
        (Some("ata_piix"), Some((_, id, _))) => {
            // One host for each of its two cables.
            let cable = port("host").or_else(|| port("ata"));
            cable.map(|cable| ("ide", cable, id))
        }
        (Some("sym53c8xx"), Some((_, id, _))) => Some(("scsi", 0, id)),
        (Some("virtio-pci"), Some((_, _, lun))) => Some(("scsi", 0, lun)),
        (Some("virtio-pci"), None) => Some(("virtio", 0, 0)),
        (Some("ahci"), Some(_)) => port("ata").map(|port| ("sata", 0, port)),
        (Some("nvme"), _) => Some(("nvme", 0, 0)),
        (Some("xhci_hcd" | "ehci-pci"), _) => Some(("usb", 0, 0)),
        // Virtio without PCI (microvm, other architectures).
        (None, None) if path.contains("/virtio") => Some(("virtio", 0, 0)),
        _ => None,
    };
    let (bus_type, bus, unit) = place.unwrap_or(("unknown", 0, 0));
    let address = controller.filter(|_| place.is_some());
    let (domain, number, slot, function) = address.map_or((-1, -1, -1, -1), |c| c.address);
    let mut object = Map::new();
    object.insert("bus-type".into(), json!(bus_type));
    object.insert("bus".into(), json!(bus));
    object.insert("target".into(), json!(0));
    object.insert("unit".into(), json!(unit));
    object.insert(
        "pci-controller".into(),
        json!({"domain": domain, "bus": number, "slot": slot, "function": function}),
    );
    object
}

/// `0000:00:04.0`.
fn pci_address(part: &str) -> Option<(i64, i64, i64, i64)> {
    let (domain, rest) = part.split_once(':')?;
    let (bus, rest) = rest.split_once(':')?;
    let (slot, function) = rest.split_once('.')?;
    let hex = |text| i64::from_str_radix(text, 16).ok();
    Some((hex(domain)?, hex(bus)?, hex(slot)?, hex(function)?))
}

/// Bus, target and unit of a part `2:0:0:1` behind a part `target2:0:0`.
fn target(path: &str) -> Option<(i64, i64, i64)> {
    let mut parts = path.split('/');
    parts.find(|part| part.starts_with("target"))?;
    let mut numbers = parts
        .next()?
        .split(':')
        .skip(1)
        .map(|word| word.parse().ok());
    Some((numbers.next()??, numbers.next()??, numbers.next()??))
}

/// 3 of `ata3`.
fn number(part: &str, prefix: &str) -> Option<i64> {
    part.strip_prefix(prefix)?.parse().ok()
}

fn numbers(names: impl Iterator<Item = String>, prefix: &str) -> Vec<i64> {
    let mut numbers: Vec<_> = names.filter_map(|name| number(&name, prefix)).collect();
    numbers.sort_unstable();
    numbers
}

#[cfg(test)]
mod tests {
    //! Paths as real machines have them.
    use super::*;

    fn described(path: &str, driver: &str, ports: &[i64]) -> Value {
        let place = controller(path, |_| Some(driver.to_owned()));
        Value::Object(describe(path, place.as_ref(), |_| ports.to_vec()))
    }

    #[test]
    fn a_virtio_disk_has_its_pci_address() {
        let one = described(
            "/sys/devices/pci0000:00/0000:00:1e.0/0000:01:04.1/virtio1/block/vda/vda1",
            "virtio-pci",
            &[],
        );
        // The bridge before it has no driver for disks in a real machine; here the first one counts.
        assert_eq!(one["bus-type"], "virtio");
        let path = "/sys/devices/pci0000:00/0000:00:1e.0/0000:01:04.1/virtio1/block/vda";
        let place = controller(path, |path| {
            let name = if path.ends_with("04.1") {
                "virtio-pci"
            } else {
                "pcieport"
            };
            Some(name.to_owned())
        });
        let place = place.unwrap();
        assert_eq!(place.address, (0, 1, 4, 1));
        assert_eq!(
            place.path,
            "/sys/devices/pci0000:00/0000:00:1e.0/0000:01:04.1"
        );
    }

    #[test]
    fn units_of_sata_ide_and_scsi_are_counted_as_qemu_counts_them() {
        let sata = "/sys/devices/pci0000:00/0000:00:1f.2/ata4/host3/target3:0:0/3:0:0:0/block/sdb";
        let sata = described(sata, "ahci", &[1, 2, 3, 4, 5, 6]);
        assert_eq!(
            (&sata["bus-type"], &sata["unit"]),
            (&json!("sata"), &json!(3))
        );
        let ide = "/sys/devices/pci0000:00/0000:00:01.1/ata2/host1/target1:0:1/1:0:1:0/block/sda";
        let ide = described(ide, "ata_piix", &[0, 1]);
        assert_eq!(
            (&ide["bus-type"], &ide["bus"], &ide["unit"]),
            (&json!("ide"), &json!(1), &json!(1))
        );
        let scsi =
            "/sys/devices/pci0000:00/0000:00:05.0/virtio2/host2/target2:0:0/2:0:0:7/block/sdc";
        let scsi = described(scsi, "virtio-pci", &[]);
        assert_eq!(
            (&scsi["bus-type"], &scsi["unit"]),
            (&json!("scsi"), &json!(7))
        );
    }

    #[test]
    fn what_is_not_known_has_no_address() {
        let one = described(
            "/sys/devices/pci0000:00/0000:00:05.0/x/block/sdc",
            "other",
            &[],
        );
        assert_eq!(one["bus-type"], "unknown");
        assert_eq!(one["pci-controller"]["slot"], -1);
    }
}
