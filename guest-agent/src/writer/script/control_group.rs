//! A cgroup v2 group for one command, from which none of its children escapes.
//!
//! Made by `process` and by the program `vmshadow-writer` for its session, below the own group of the process that makes it;
//! where that is not possible (cgroup v1, no right to it) there is none, and a process group must do. Groups are named by what
//! they are for and by the process that made them, so that the next one can tell which are left over, and whom to kill.

use super::maker::Maker;
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// How often the members of a control group are killed one by one.
const KILL_ROUNDS: usize = 64;

/// What a group is for: how its name begins, before its maker and a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A command for one event: it does not outlive its maker.
    Script,
    /// A session: it lets go by itself when its maker is gone.
    Session,
}

impl Purpose {
    fn prefix(self) -> &'static str {
        match self {
            Self::Script => "vmshadow-script-",
            Self::Session => "vmshadow-session-",
        }
    }
}

/// A group, removed with the value.
#[derive(Debug)]
pub struct ControlGroup(PathBuf);

impl ControlGroup {
    /// A new one, if one can be made.
    #[must_use]
    pub fn create(purpose: Purpose) -> Option<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let maker = Maker::this_process().ok()?;
        let path = own()?.join(format!("{}{maker}-{number}", purpose.prefix()));
        fs::create_dir(&path).ok()?;
        Some(Self(path))
    }

    /// Removes the empty groups of processes that are gone; called once, before the first is made. A session's group with
    /// somebody in it stays: one that outlives its writer is letting go just now.
    pub fn sweep() {
        // What is not empty is not removed.
        let own = own();
        drop(left(Purpose::Script, own.as_deref()));
        drop(left(Purpose::Session, own.as_deref()));
    }

    /// Where this process makes groups, if it can be told.
    pub(super) fn place() -> Option<PathBuf> {
        own()
    }

    /// The groups that processes which are gone made for scripts in this place.
    pub(super) fn left_of_scripts(place: &Path) -> Vec<Self> {
        left(Purpose::Script, Some(place))
    }

    /// Removes it if nobody is in it any more; returns whether it is gone.
    pub(super) fn remove(&self) -> bool {
        fs::remove_dir(&self.0).is_ok() || !self.0.exists()
    }

    /// The file that a process writes "0" to in order to join it.
    #[must_use]
    pub fn procs(&self) -> PathBuf {
        self.0.join("cgroup.procs")
    }

    /// Kills everybody in it.
    pub fn kill(&self) {
        if fs::write(self.0.join("cgroup.kill"), "1").is_ok() {
            return;
        }
        // Before Linux 5.14: one by one, and again for what they started meanwhile.
        for _ in 0..KILL_ROUNDS {
            let members = fs::read_to_string(self.procs()).unwrap_or_default();
            let mut members = members.lines().filter_map(|line| line.parse().ok());
            let mut members = members.by_ref().filter_map(Pid::from_raw).peekable();
            if members.peek().is_none() {
                return;
            }
            for member in members {
                kill_process(member, Signal::KILL).unwrap_or(());
            }
        }
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        // Not empty for as long as a killed process has not ended; an empty group costs nothing, and is swept at the next start.
        fs::remove_dir(&self.0).unwrap_or(());
    }
}

/// The directory of this process's own group.
fn own() -> Option<PathBuf> {
    let top = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .map(Path::new)
        .find(|top| top.join("cgroup.procs").exists())?;
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(top.join(own))
}

/// The groups for this purpose in a place whose makers are gone.
fn left(purpose: Purpose, place: Option<&Path>) -> Vec<ControlGroup> {
    let entries = place.and_then(|place| fs::read_dir(place).ok());
    entries
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            let name = entry.file_name();
            let maker = name.to_str().and_then(|name| maker(purpose, name));
            maker.is_some_and(|maker| maker.is_gone())
        })
        .map(|entry| ControlGroup(entry.path()))
        .collect()
}

/// The process that has made a group of this name.
fn maker(purpose: Purpose, name: &str) -> Option<Maker> {
    let (maker, number) = name.strip_prefix(purpose.prefix())?.rsplit_once('-')?;
    number.parse::<u64>().ok()?;
    maker.parse().ok()
}

#[test]
fn a_group_tells_who_has_made_it_and_what_for_and_other_names_tell_nobody() {
    let made = "17-4711".parse().ok();
    assert_eq!(maker(Purpose::Script, "vmshadow-script-17-4711-0"), made);
    assert_eq!(maker(Purpose::Session, "vmshadow-session-17-4711-0"), made);
    for name in [
        "vmshadow-session-17-4711-0",
        "vmshadow-script-17-0",
        "vmshadow-script-x-1-0",
        "vmshadow-script-1-1-x",
        "app.service",
        "",
    ] {
        assert_eq!(maker(Purpose::Script, name), None, "{name}");
    }
}
