//! The actor's steps with file systems, through the helper.
//!
//! Part of `actor`. Invariants: what is frozen is thawed exactly once, and only what FIFREEZE answered 0 for; every wait has
//! an end, after which the agent thaws by its own descriptors.

use super::actor::{Actor, Heard};
use super::cause::Cause;
use super::work::Work;
use crate::clock::BootTime;
use crate::filesystem::mounts::DeviceNumber;
use crate::filesystem::plan::Filesystem;
use crate::hold::helper::THAW_STEP_MS;
use crate::hold::message::{Ask, Tell};
use crate::journal;
use guest_agent_wire::host::{FilesystemReport, FilesystemResult, HOLD_MS_MAX};
use rustix::io::Errno;
use std::time::Duration;

/// Time to open all mount points, milliseconds.
const OPEN_MS: u64 = 5_000;
/// Time to look at all mounts.
const FIND_MAX: Duration = Duration::from_secs(5);
/// What the agent waits longer than the helper's own limits, milliseconds.
pub(super) const GRACE_MS: u64 = 1_000;

/// What becomes of a file system in this set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// It is frozen, in this slot of the helper.
    Slot(u32),
    ReadOnly,
    LeftOut,
    /// It has no freeze operation.
    Unfreezable,
}

/// A file system in a set.
#[derive(Clone, Debug)]
pub(super) struct Held {
    filesystem: Filesystem,
    role: Role,
    opened: Option<i32>,
    froze: Option<(i32, u64)>,
    thawed: Option<(i32, u64)>,
}

impl Held {
    fn slot(&self) -> Option<u32> {
        match self.role {
            Role::Slot(slot) => Some(slot),
            Role::ReadOnly | Role::LeftOut | Role::Unfreezable => None,
        }
    }

    pub(super) fn is_frozen(&self) -> bool {
        matches!(self.froze, Some((0, _)))
    }

    fn report(&self, after: &str) -> FilesystemReport {
        let (result, errno, message, took_us) = match (self.role, self.froze, self.thawed) {
            (Role::ReadOnly, ..) => (FilesystemResult::ReadOnly, 0, String::new(), 0),
            (Role::LeftOut, ..) => (FilesystemResult::LeftOut, 0, String::new(), 0),
            (Role::Unfreezable, ..) => (
                FilesystemResult::Failed,
                Errno::OPNOTSUPP.raw_os_error(),
                self.filesystem.why_not.clone().unwrap_or_default(),
                0,
            ),
            (Role::Slot(_), None, _) => (
                FilesystemResult::Failed,
                0,
                format!("not reached {after}"),
                0,
            ),
            (Role::Slot(_), Some((0, us)), None) if after == "freeze" => {
                (FilesystemResult::Frozen, 0, String::new(), us)
            }
            (Role::Slot(_), Some((0, _)), None) => (
                FilesystemResult::Failed,
                Errno::TIMEDOUT.raw_os_error(),
                "FITHAW has not returned".to_owned(),
                0,
            ),
            (Role::Slot(_), Some((0, _)), Some((0, us))) => {
                (FilesystemResult::Thawed, 0, String::new(), us)
            }
            (Role::Slot(_), Some((0, _)), Some((errno, us))) => {
                (FilesystemResult::Failed, errno, thaw_error(errno), us)
            }
            (Role::Slot(_), Some((errno, us)), _) => {
                (FilesystemResult::Failed, errno, freeze_error(errno), us)
            }
        };
        FilesystemReport {
            mountpoint: self.filesystem.name(),
            fstype: self.filesystem.fstype.clone(),
            result,
            errno,
            message,
            extents: self.filesystem.extents.clone(),
            took_us,
        }
    }
}

fn freeze_error(errno: i32) -> String {
    match Errno::from_raw_os_error(errno) {
        Errno::BUSY => "already frozen by somebody else".to_owned(),
        Errno::OPNOTSUPP => "it has no freeze operation".to_owned(),
        // The agent runs as root: what denies it is a policy.
        denied @ (Errno::ACCESS | Errno::PERM) => {
            format!(
                "FIFREEZE: {denied}: denied by a policy (SELinux, AppArmor) or for want of CAP_SYS_ADMIN"
            )
        }
        other => format!("FIFREEZE: {other}"),
    }
}

fn thaw_error(errno: i32) -> String {
    match Errno::from_raw_os_error(errno) {
        Errno::INVAL => "somebody else thawed it".to_owned(),
        other => format!("FITHAW: {other}"),
    }
}

/// Which file systems a freeze takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice<'a> {
    /// Mount points left out.
    pub(super) exclude: &'a [String],
    /// Only these, if given.
    pub(super) only: Option<&'a [String]>,
}

impl Actor {
    /// All that there are. On a thread, since there may be thousands of mounts: an abort, a thaw and `status` need not wait for it.
    pub(super) fn find_filesystems(&mut self) -> Result<Vec<Filesystem>, Cause> {
        let sources = self.sources.clone();
        let found = match Work::start("mounts", FIND_MAX, move |_| sources.filesystems()) {
            Some(work) => self.listening_to(&work)?,
            None => None,
        };
        match found {
            Some(found) => found.map_err(|error| Cause::Internal(format!("mountinfo: {error}"))),
            None => {
                let limit = FIND_MAX.as_millis();
                let why = format!("the file systems were not found within {limit} ms");
                Err(Cause::Internal(why))
            }
        }
    }

    /// Finds the file systems of the set and has the helper open them.
    pub(super) fn open_filesystems(&mut self, choice: Choice<'_>) -> Result<(), Cause> {
        self.close_filesystems();
        let found = self.find_filesystems()?;
        let mut slots = 0;
        for filesystem in found {
            if !filesystem.is_on(&self.set.disks) || !is_chosen(&filesystem, choice.only) {
                continue;
            }
            let role = if self.is_left_out(&filesystem, choice) {
                Role::LeftOut
            } else if filesystem.read_only {
                Role::ReadOnly
            } else if filesystem.why_not.is_some() {
                Role::Unfreezable
            } else {
                slots += 1;
                Role::Slot(slots - 1)
            };
            self.set.filesystems.push(Held {
                filesystem,
                role,
                opened: None,
                froze: None,
                thawed: None,
            });
        }
        let list: Vec<&Filesystem> = self
            .set
            .filesystems
            .iter()
            .filter(|held| held.slot().is_some())
            .map(|held| &held.filesystem)
            .collect();
        self.holder
            .open(&list)
            .map_err(|error| Cause::Internal(format!("helper: {error}")))?;
        let until = BootTime::now().plus_ms(OPEN_MS);
        while self.slots().any(|held| held.opened.is_none()) {
            match self.wait(until) {
                Heard::Helper(Tell::Opened { slot, errno }, duplicate) => {
                    self.holder.keep(slot, duplicate);
                    if let Some(held) = self.slot(slot) {
                        held.opened = Some(errno);
                    }
                }
                Heard::Late => break,
                Heard::Interrupted(cause) => return Err(cause),
                Heard::HelperDied => return Err(Cause::HelperDied),
                Heard::Helper(..) | Heard::Writer(..) => {}
            }
        }
        match self.slots().find(|held| held.opened != Some(0)) {
            Some(held) => Err(Cause::FreezeFailed {
                mountpoint: held.filesystem.name(),
                why: held.opened.map_or_else(
                    || "opening its mount point hangs".to_owned(),
                    |errno| format!("cannot be opened: {}", Errno::from_raw_os_error(errno)),
                ),
            }),
            None => Ok(()),
        }
    }

    /// Writes back what is dirty, so that the freeze has little to do.
    pub(super) fn sync_filesystems(&mut self, until: BootTime) -> Result<(), Cause> {
        self.ask_helper(Ask::Sync)?;
        let mut missing = self.slots().count();
        while missing > 0 {
            match self.wait(until) {
                Heard::Helper(Tell::Synced { slot, errno, .. }, _) => {
                    missing -= 1;
                    if errno != 0 {
                        let mountpoint = self.slot(slot).map(|held| held.filesystem.name());
                        return Err(Cause::FreezeFailed {
                            mountpoint: mountpoint.unwrap_or_default(),
                            why: format!("syncfs: {}", Errno::from_raw_os_error(errno)),
                        });
                    }
                }
                Heard::Late => {
                    return Err(Cause::FreezeFailed {
                        mountpoint: "file systems".to_owned(),
                        why: "writing back takes longer than the limit".to_owned(),
                    });
                }
                Heard::Interrupted(cause) => return Err(cause),
                Heard::HelperDied => return Err(Cause::HelperDied),
                Heard::Helper(..) | Heard::Writer(..) => {}
            }
        }
        Ok(())
    }

    /// Freezes the opened file systems, innermost first.
    pub(super) fn freeze_filesystems(&mut self, generation: u64) -> Result<(), Cause> {
        let hold_ms = self.set.hold_ms;
        self.set.hold_end = Some(BootTime::now().plus_ms(hold_ms));
        self.set.freeze_asked = true;
        self.set_window();
        self.ask_helper(Ask::Freeze {
            generation,
            hold_ms,
        })?;
        // A hold by QEMU's protocol may last minutes; its freeze may not.
        let flush_ms = hold_ms.min(HOLD_MS_MAX);
        let until = BootTime::now().plus_ms(flush_ms + GRACE_MS);
        let ok = loop {
            match self.wait(until) {
                Heard::Helper(
                    Tell::Froze {
                        slot,
                        errno,
                        took_us,
                    },
                    _,
                ) => {
                    if let Some(held) = self.slot(slot) {
                        held.froze = Some((errno, took_us));
                    }
                }
                Heard::Helper(
                    Tell::FreezeDone {
                        generation: done,
                        ok,
                    },
                    _,
                ) if done == generation => break ok,
                Heard::Helper(Tell::Ended { .. }, _) | Heard::Late => {
                    return Err(Cause::FlushTimeout { hold_ms: flush_ms });
                }
                Heard::Interrupted(cause) => return Err(cause),
                Heard::HelperDied => return Err(Cause::HelperDied),
                Heard::Helper(..) | Heard::Writer(..) => {}
            }
        };
        if ok {
            return Ok(());
        }
        let no_freeze = Errno::OPNOTSUPP.raw_os_error();
        let failed = self.slots().find_map(|held| match held.froze {
            Some((errno, _)) if errno != 0 && errno != no_freeze => {
                Some((held.filesystem.name(), freeze_error(errno)))
            }
            _ => None,
        });
        Err(match failed {
            Some((mountpoint, why)) => Cause::FreezeFailed { mountpoint, why },
            None => Cause::Internal("the helper could not write its ledger".to_owned()),
        })
    }

    /// Fails if a file system of the set was mounted or made writable after the others had been chosen: writers take up to a
    /// minute to freeze, and it would be the one that is not held.
    pub(super) fn find_missed(&mut self, choice: Choice<'_>) -> Result<(), Cause> {
        let found = self.find_filesystems()?;
        let missed = found.iter().find(|filesystem| {
            filesystem.is_on(&self.set.disks)
                && is_chosen(filesystem, choice.only)
                && !self.is_left_out(filesystem, choice)
                && !filesystem.read_only
                && !self.set.filesystems.iter().any(|held| {
                    held.filesystem.device == filesystem.device && held.role != Role::ReadOnly
                })
        });
        match missed {
            Some(filesystem) => Err(Cause::FreezeFailed {
                mountpoint: filesystem.name(),
                why: "it was mounted or made writable while writers froze".to_owned(),
            }),
            None => Ok(()),
        }
    }

    fn is_left_out(&self, filesystem: &Filesystem, choice: Choice<'_>) -> bool {
        names(filesystem, choice.exclude) || names(filesystem, &self.settings.exclude_filesystems)
    }

    /// Thaws what is frozen; returns when all has been thawed, or does not come back from it.
    pub(super) fn thaw_filesystems(&mut self, generation: u64) {
        if !std::mem::take(&mut self.set.freeze_asked) {
            return;
        }
        let is_silent = self.set.silence_end().is_some_and(BootTime::is_past);
        let mut lost = self.ask_helper(Ask::Thaw { generation }).is_err();
        lost |= self.helper_died || is_silent;
        let steps = self.slots().map(|held| held.filesystem.step).max();
        let steps = u64::from(steps.unwrap_or(0)) + 1;
        let until = BootTime::now().plus_ms(steps * THAW_STEP_MS + GRACE_MS);
        while !lost {
            match self.wait(until) {
                Heard::Helper(
                    Tell::Thawed {
                        slot,
                        errno,
                        took_us,
                    },
                    _,
                ) => {
                    if let Some(held) = self.slot(slot) {
                        // It may have been frozen after the end of its generation, without a word of that.
                        held.froze = held.froze.or(Some((0, 0)));
                        held.thawed = Some((errno, took_us));
                    }
                }
                Heard::Helper(
                    Tell::ThawDone {
                        generation: done,
                        first_freeze,
                        first_thaw,
                    },
                    _,
                ) if done == generation => {
                    self.set.hold_us = first_thaw.us_since(first_freeze);
                    break;
                }
                Heard::Helper(Tell::Ended { .. }, _) => {
                    let hold_ms = self.set.hold_ms;
                    self.set.broken.get_or_insert(Cause::DeadMan { hold_ms });
                }
                Heard::HelperDied | Heard::Late => lost = true,
                Heard::Helper(..) | Heard::Writer(..) | Heard::Interrupted(_) => {}
            }
        }
        if lost {
            self.thaw_by_hand();
        }
        self.set.hold_end = None;
    }

    /// The helper is dead or silent: thaws by the duplicates what it froze or was freezing.
    fn thaw_by_hand(&mut self) {
        // A helper that does not do its work makes way for another.
        self.holder.kill();
        self.set.broken.get_or_insert(Cause::HelperDied);
        let slots: Vec<u32> = self
            .slots()
            .filter(|held| held.thawed.is_none() && matches!(held.froze, None | Some((0, _))))
            .filter_map(Held::slot)
            .collect();
        let patience = Duration::from_millis(THAW_STEP_MS);
        for (slot, errno) in self.holder.thaw_by_hand(&slots, patience) {
            if let Some(held) = self.slot(slot) {
                if errno == 0 {
                    held.froze = Some((0, 0));
                }
                held.thawed = Some((errno, 0));
            }
        }
        journal::note(format_args!(
            "thawed {} file systems without the helper",
            slots.len()
        ));
    }

    /// Forgets the file systems.
    pub(super) fn close_filesystems(&mut self) {
        if !self.set.filesystems.is_empty() {
            self.holder.close();
            self.set.filesystems.clear();
        }
    }

    /// Devices of the file systems that are frozen.
    pub(super) fn frozen_devices(&self) -> Vec<DeviceNumber> {
        let frozen = self.slots().filter(|held| held.is_frozen());
        frozen.map(|held| held.filesystem.device).collect()
    }

    /// Why the file systems did not hold; `None` if they did.
    pub(super) fn filesystems_not_held(&self) -> Option<String> {
        let limit_us = self.set.hold_ms.saturating_mul(1_000);
        if self.set.hold_us > limit_us {
            let hold_ms = self.set.hold_us / 1_000;
            return Some(format!("file systems were frozen for {hold_ms} ms"));
        }
        self.slots()
            .filter(|held| held.is_frozen())
            .find_map(|held| match held.thawed {
                Some((0, _)) => None,
                Some((errno, _)) => {
                    Some(format!("{}: {}", held.filesystem.name(), thaw_error(errno)))
                }
                None => Some(format!("{}: not thawed", held.filesystem.name())),
            })
    }

    /// What each file system said, in freeze order.
    pub(super) fn reports_after_freeze(&self) -> Vec<FilesystemReport> {
        let held = self.set.filesystems.iter();
        held.map(|held| held.report("freeze")).collect()
    }

    /// What each file system said, in thaw order.
    pub(super) fn reports_after_thaw(&self) -> Vec<FilesystemReport> {
        let held = self.set.filesystems.iter().rev();
        held.map(|held| held.report("thaw")).collect()
    }

    fn ask_helper(&self, ask: Ask) -> Result<(), Cause> {
        self.holder.ask(ask).map_err(|_| Cause::HelperDied)
    }

    fn slots(&self) -> impl Iterator<Item = &Held> {
        let held = self.set.filesystems.iter();
        held.filter(|held| held.slot().is_some())
    }

    fn slot(&mut self, slot: u32) -> Option<&mut Held> {
        let mut held = self.set.filesystems.iter_mut();
        held.find(|held| held.slot() == Some(slot))
    }
}

fn names(filesystem: &Filesystem, list: &[String]) -> bool {
    list.iter().any(|name| {
        filesystem
            .mountpoints
            .iter()
            .any(|path| path == std::path::Path::new(name))
    })
}

fn is_chosen(filesystem: &Filesystem, only: Option<&[String]>) -> bool {
    only.is_none_or(|only| names(filesystem, only))
}
