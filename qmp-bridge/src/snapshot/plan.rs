//! Decides what a set will hold and which levels are attempted. Pure: it only reads what was found.
//!
//! Called by `run` after the VM's disks and the daemons' volumes are known. It must not know sockets or clocks.

use super::document::{CreateRequest, UncoveredDisk};
use super::level::Level;
use crate::vm::{Backing, FoundDisk, same_socket};
use std::path::{Path, PathBuf};
use vhost_blk_wire::types::VolumeInfo;

/// Most volumes in a set (VSS: 64).
pub const VOLUMES_MAX: usize = 64;

/// The volumes of one daemon.
#[derive(Clone, Debug, PartialEq)]
pub struct DaemonVolumes {
    /// Its control socket.
    pub control: PathBuf,
    /// All its volumes, or those in the set.
    pub volumes: Vec<VolumeInfo>,
}

/// What a set will hold.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The volumes of the set, by daemon; no daemon without volumes.
    pub parts: Vec<DaemonVolumes>,
    /// Disks of the VM that are not in it.
    pub uncovered: Vec<UncoveredDisk>,
    /// Devices of all disks that the VM had, in it or not.
    pub devices: Vec<String>,
    /// Levels to attempt, highest first.
    pub attempts: Vec<Level>,
    /// Why levels above the first attempt are out of reach.
    pub lowered_by: Option<String>,
}

impl Plan {
    /// Serials of the disks in the set.
    #[must_use]
    pub fn serials(&self) -> Vec<String> {
        self.parts
            .iter()
            .flat_map(|part| part.volumes.iter())
            .map(|volume| volume.serial.clone())
            .collect()
    }

    /// Every writable disk is in the set or was left out by the requester.
    #[must_use]
    pub fn every_disk(&self) -> bool {
        self.uncovered.iter().all(|disk| disk.excluded)
    }

    /// Disks that the VM has by now and had not when the set was planned: what was mounted from them before the freeze was not held.
    pub fn add_plugged(&mut self, request: &CreateRequest, disks: &[FoundDisk]) {
        for disk in disks {
            if self.devices.contains(&disk.device) || disk.backing.is_read_only() {
                continue;
            }
            self.uncovered.push(UncoveredDisk {
                device: disk.device.clone(),
                why: "plugged in while the set was made".to_owned(),
                excluded: !request.disks.is_empty() || request.exclude_disks.contains(&disk.device),
            });
        }
    }

    /// Writes have to be held on all daemons before any commits: there are several.
    #[must_use]
    pub fn holds_across_daemons(&self) -> bool {
        self.parts.len() > 1
    }
}

/// Why there can be no set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A disk that the requester named does not exist, or is not ours.
    #[error("{0}: no such disk among those that vhost-blk serves to this VM")]
    NoSuchDisk(String),
    /// No disk of the VM is served by the daemons.
    #[error("no disk of this VM is served by vhost-blk")]
    NoDisks,
    /// Too many.
    #[error("{0} volumes: a set holds at most {VOLUMES_MAX}")]
    TooMany(usize),
    /// A volume refuses everything.
    #[error("volume {0} is poisoned by a disk error: restart its daemon")]
    Poisoned(String),
    /// Two volumes have one serial: extents of the guest could not be told apart.
    #[error("serial {0} belongs to two volumes of this VM")]
    SameSerial(String),
    /// A disk is not covered and the requester wants the level that needs it.
    #[error("{device}: {why}; exclude it by --exclude-disk, or take a lower level")]
    NotCovered {
        /// The disk.
        device: String,
        /// Why.
        why: String,
    },
}

/// Makes the plan from what QEMU and the daemons said.
///
/// # Errors
/// See [`PlanError`].
pub fn plan(
    request: &CreateRequest,
    disks: &[FoundDisk],
    daemons: &[DaemonVolumes],
) -> Result<Plan, PlanError> {
    let mut parts: Vec<DaemonVolumes> = Vec::new();
    let mut uncovered = Vec::new();
    let mut named: Vec<&str> = request.disks.iter().map(String::as_str).collect();
    for disk in disks {
        let ours = match &disk.backing {
            Backing::VhostUser { socket } => daemons.iter().find_map(|daemon| {
                daemon
                    .volumes
                    .iter()
                    .find(|volume| same_socket(Path::new(&volume.socket), socket))
                    .map(|volume| (daemon, volume))
            }),
            Backing::Other { .. } => None,
        };
        let names: Vec<&str> = ours
            .iter()
            .flat_map(|(_, volume)| [volume.volume.as_str(), volume.serial.as_str()])
            .chain([disk.device.as_str()])
            .chain(disk.aliases.iter().map(String::as_str))
            .collect();
        let excluded = request
            .exclude_disks
            .iter()
            .any(|e| names.contains(&e.as_str()));
        let chosen = request.disks.is_empty() || names.iter().any(|n| named.contains(n));
        match ours {
            Some((daemon, volume)) if chosen && !excluded => {
                named.retain(|name| !names.contains(name));
                if volume.poisoned {
                    return Err(PlanError::Poisoned(volume.volume.clone()));
                }
                add(&mut parts, daemon, volume);
            }
            Some(_) => uncovered.push(UncoveredDisk {
                device: disk.device.clone(),
                why: "left out by the requester".to_owned(),
                excluded: true,
            }),
            None if disk.backing.is_read_only() => {}
            None => uncovered.push(UncoveredDisk {
                device: disk.device.clone(),
                why: disk.backing.why_not_ours(),
                excluded: excluded || !request.disks.is_empty(),
            }),
        }
    }
    if let Some(name) = named.first() {
        return Err(PlanError::NoSuchDisk((*name).to_owned()));
    }
    check_volumes(&parts)?;
    let (attempts, lowered_by) = attempts(request, &uncovered)?;
    Ok(Plan {
        parts,
        uncovered,
        devices: disks.iter().map(|disk| disk.device.clone()).collect(),
        attempts,
        lowered_by,
    })
}

fn add(parts: &mut Vec<DaemonVolumes>, daemon: &DaemonVolumes, volume: &VolumeInfo) {
    match parts.iter_mut().find(|part| part.control == daemon.control) {
        Some(part) => {
            // One vhost-user socket serves one front end; the same volume twice would be two devices on one chardev.
            if !part.volumes.iter().any(|v| v.volume == volume.volume) {
                part.volumes.push(volume.clone());
            }
        }
        None => parts.push(DaemonVolumes {
            control: daemon.control.clone(),
            volumes: vec![volume.clone()],
        }),
    }
}

fn check_volumes(parts: &[DaemonVolumes]) -> Result<(), PlanError> {
    let mut serials: Vec<&str> = parts
        .iter()
        .flat_map(|part| part.volumes.iter())
        .map(|volume| volume.serial.as_str())
        .collect();
    if serials.is_empty() {
        return Err(PlanError::NoDisks);
    }
    if serials.len() > VOLUMES_MAX {
        return Err(PlanError::TooMany(serials.len()));
    }
    serials.sort_unstable();
    match serials.windows(2).find(|pair| pair.first() == pair.last()) {
        Some(pair) => Err(PlanError::SameSerial(
            pair.first().map(|s| (*s).to_owned()).unwrap_or_default(),
        )),
        None => Ok(()),
    }
}

/// The level asked, and with best effort all below it. A disk that is not covered rules out `application`.
fn attempts(
    request: &CreateRequest,
    uncovered: &[UncoveredDisk],
) -> Result<(Vec<Level>, Option<String>), PlanError> {
    let mut levels: Vec<Level> = [Level::Application, Level::Filesystem, Level::Crash]
        .into_iter()
        .filter(|level| *level == request.level || (request.best_effort && *level < request.level))
        .collect();
    let Some(open) = uncovered.iter().find(|disk| !disk.excluded) else {
        return Ok((levels, None));
    };
    levels.retain(|level| *level != Level::Application);
    if levels.is_empty() {
        return Err(PlanError::NotCovered {
            device: open.device.clone(),
            why: open.why.clone(),
        });
    }
    let lowered =
        (request.level == Level::Application).then(|| format!("{}: {}", open.device, open.why));
    Ok((levels, lowered))
}

#[cfg(test)]
mod tests;
