//! File systems and disks: `guest-get-fsinfo`, `guest-get-disks`, `guest-get-diskstats`, `guest-fstrim`.
//!
//! Called by `command`, never while frozen. Mounts are chosen as QEMU's agent chooses them: every mount point of everything
//! that lies on a block device, last mounted first. What is frozen is chosen elsewhere (`filesystem::plan`).
#![deny(clippy::indexing_slicing)]

use super::arguments::Arguments;
use super::failed::{Failed, Outcome, reason};
use crate::filesystem::mounts::{DeviceNumber, Mount};
use crate::filesystem::plan::Sources;
use crate::filesystem::trim::trim;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use serde_json::{Map, Value, json};
use std::fs;
use std::path::Path;

mod address;

/// Deepest stack of devices that is followed.
const DEPTH_MAX: usize = 16;

/// Mounts on block devices, with the device that each lies on, last mounted first.
fn mounts(sources: &Sources) -> Result<Vec<(Mount, DeviceNumber)>, Failed> {
    let all = sources
        .mounts()
        .map_err(|error| Failed::because("fopen(\"/proc/self/mountinfo\")", &error))?;
    let only_under = sources.only_under.as_deref();
    let visible = all
        .into_iter()
        .rev()
        .filter(|mount| only_under.is_none_or(|top| mount.mountpoint.starts_with(top)));
    Ok(visible
        .filter_map(|mount| {
            let device = device_of(&mount, sources)?;
            Some((mount, device))
        })
        .collect())
}

/// A btrfs file system has a number of its own instead of its device's.
fn device_of(mount: &Mount, sources: &Sources) -> Option<DeviceNumber> {
    if mount.device.major != 0 {
        return Some(mount.device);
    }
    if mount.fstype != "btrfs" {
        return None;
    }
    let devices = crate::filesystem::devices::BlockDevices::new(&sources.sys);
    devices.by_name(&mount.source)
}

/// `guest-get-fsinfo`.
pub(super) fn filesystems(arguments: &Arguments, sources: &Sources) -> Outcome {
    arguments.end()?;
    let all = mounts(sources)?;
    Ok(all
        .iter()
        .map(|(mount, device)| filesystem(mount, *device, &sources.sys))
        .collect())
}

fn filesystem(mount: &Mount, device: DeviceNumber, sys: &Path) -> Value {
    let node = sys.join("dev/block").join(device.to_string());
    // In a container the device may be unseen: then its number is its name.
    let node = node.canonicalize().unwrap_or(node);
    let name = node.file_name().unwrap_or_default().to_string_lossy();
    let mut disks = Vec::new();
    gather(&node, &mut disks, DEPTH_MAX);
    let mut object = Map::new();
    object.insert("name".into(), json!(name));
    object.insert(
        "mountpoint".into(),
        json!(mount.mountpoint.to_string_lossy()),
    );
    object.insert("type".into(), json!(mount.fstype));
    object.insert("disk".into(), json!(disks));
    if let Ok(stat) = rustix::fs::statvfs(&mount.mountpoint) {
        let used = stat.f_blocks.saturating_sub(stat.f_bfree);
        let bytes = |blocks: u64| json!(blocks.saturating_mul(stat.f_frsize));
        object.insert("used-bytes".into(), bytes(used));
        // Without what only root may use.
        let total = used.saturating_add(stat.f_bavail);
        object.insert("total-bytes".into(), bytes(total));
    }
    Value::Object(object)
}

/// The real disks or partitions beneath a device. A loop device has none: what it lies on is a file.
fn gather(node: &Path, disks: &mut Vec<Value>, depth: usize) {
    let Some(depth) = depth.checked_sub(1) else {
        return;
    };
    if !is_virtual(node) {
        if node.join("dev").exists() {
            disks.push(address::of(node));
        }
        return;
    }
    for slave in entries(&node.join("slaves")) {
        if let Ok(slave) = slave.canonicalize() {
            gather(&slave, disks, depth);
        }
    }
}

fn is_virtual(node: &Path) -> bool {
    node.components().any(|part| part.as_os_str() == "virtual")
}

/// What is in a directory, by name.
fn entries(directory: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// `guest-get-disks`.
pub(super) fn disks(arguments: &Arguments, sources: &Sources) -> Outcome {
    arguments.end()?;
    let mut all = Vec::new();
    for entry in entries(&sources.sys.join("block")) {
        let Ok(node) = entry.canonicalize() else {
            continue;
        };
        let size = fs::read_to_string(node.join("size")).unwrap_or_default();
        let Some(name) = address::device_file(&node).filter(|_| !matches!(size.trim(), "" | "0"))
        else {
            continue;
        };
        let mut object = Map::new();
        object.insert("name".into(), json!(name));
        object.insert("partition".into(), json!(false));
        if let Ok(alias) = fs::read_to_string(node.join("dm/name")) {
            object.insert("alias".into(), json!(alias.trim()));
        }
        if !is_virtual(&node) {
            object.insert("address".into(), address::of(&node));
        }
        let slaves = entries(&node.join("slaves"));
        let slaves = slaves
            .iter()
            .filter_map(|slave| address::device_file(slave));
        object.insert("dependencies".into(), slaves.map(Value::from).collect());
        all.push(Value::Object(object));
        for part in entries(&node) {
            if part.join("partition").exists()
                && let Some(partition) = address::device_file(&part)
            {
                all.push(json!({"name": partition, "partition": true, "dependencies": [name]}));
            }
        }
    }
    Ok(json!(all))
}

/// `guest-get-diskstats`.
pub(super) fn statistics(arguments: &Arguments) -> Outcome {
    arguments.end()?;
    let text = fs::read_to_string("/proc/diskstats")
        .map_err(|error| Failed::because("could not open /proc/diskstats", &error))?;
    Ok(text.lines().filter_map(statistics_of).collect())
}

/// A line of `/proc/diskstats`; older kernels have fewer numbers.
fn statistics_of(line: &str) -> Option<Value> {
    const NAMES: [&str; 17] = [
        "read-ios",
        "read-merges",
        "read-sectors",
        "read-ticks",
        "write-ios",
        "write-merges",
        "write-sectors",
        "write-ticks",
        "ios-pgr",
        "total-ticks",
        "weight-ticks",
        "discard-ios",
        "discard-merges",
        "discard-sectors",
        "discard-ticks",
        "flush-ios",
        "flush-ticks",
    ];
    let mut words = line.split_ascii_whitespace();
    let major: u64 = words.next()?.parse().ok()?;
    let minor: u64 = words.next()?.parse().ok()?;
    let name = words.next()?;
    let mut stats = Map::new();
    for (name, word) in NAMES.iter().zip(words) {
        stats.insert((*name).into(), json!(word.parse::<u64>().ok()?));
    }
    Some(json!({"name": name, "major": major, "minor": minor, "stats": stats}))
}

/// `guest-fstrim`. What cannot be trimmed is said beside its path; the command itself succeeds.
pub(super) fn fstrim(arguments: &mut Arguments, sources: &Sources) -> Outcome {
    let minimum_bytes = arguments.maybe_integer("minimum")?.unwrap_or(0);
    arguments.end()?;
    let minimum_bytes = u64::try_from(minimum_bytes).unwrap_or(0);
    let all = mounts(sources)?;
    let paths = all.iter().map(|(mount, _)| {
        let path = mount.mountpoint.to_string_lossy();
        match trim_one(mount, minimum_bytes) {
            Ok((trimmed, minimum)) => json!({"path": path, "trimmed": trimmed, "minimum": minimum}),
            Err(error) => json!({"path": path, "error": error}),
        }
    });
    Ok(json!({"paths": paths.collect::<Vec<_>>()}))
}

fn trim_one(mount: &Mount, minimum_bytes: u64) -> Result<(u64, u64), String> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let said = |what: &str, error: Errno| format!("{what}: {}", reason(&error.into()));
    let directory = open(&mount.mountpoint, flags, Mode::empty())
        .map_err(|error| said("failed to open", error))?;
    trim(directory, minimum_bytes).map_err(|error| match error {
        Errno::NOTTY | Errno::OPNOTSUPP => "trim not supported".to_owned(),
        error => said("failed to trim", error),
    })
}

#[cfg(test)]
mod tests {
    //! Counters; the rest is tested in a machine beside QEMU's own agent.
    use super::*;

    #[test]
    fn counters_are_named_in_the_kernels_order() {
        let one = statistics_of(" 254 0 vda 1 2 3 4 5 6 7 8 9 10 11").unwrap();
        assert_eq!((&one["major"], &one["name"]), (&json!(254), &json!("vda")));
        assert_eq!(one["stats"]["read-ios"], 1);
        assert_eq!(one["stats"]["weight-ticks"], 11);
        assert_eq!(one["stats"].get("flush-ios"), None);
        assert_eq!(statistics_of("x"), None);
    }

    #[test]
    fn this_machines_own_disks_are_listed() {
        let sources = Sources {
            proc: "/proc".into(),
            sys: "/sys".into(),
            only_under: Some("/nowhere".into()),
        };
        assert_eq!(
            filesystems(&Arguments::default(), &sources).unwrap(),
            json!([])
        );
        let Ok(Value::Array(all)) = disks(&Arguments::default(), &sources) else {
            panic!("no list");
        };
        for disk in &all {
            assert!(
                disk["name"].as_str().unwrap().starts_with("/dev/"),
                "{disk}"
            );
        }
    }
}
