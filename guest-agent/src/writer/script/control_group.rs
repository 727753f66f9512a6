//! A cgroup v2 group for one command, from which none of its children escapes.
//!
//! Made by `process` and by the program `vmshadow-writer` for its session, below the own group of the process that makes it;
//! where that is not possible (cgroup v1, no right to it) there is none, and a process group must do. Groups are named by the
//! process that made them, so that the next one can tell which are left over.

use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// How often the members of a control group are killed one by one.
const KILL_ROUNDS: usize = 64;
/// What names of groups begin with; the maker's process number and a number of its own follow.
const PREFIX: &str = "vmshadow-writer-";

/// A group, removed with the value.
#[derive(Debug)]
pub struct ControlGroup(PathBuf);

impl ControlGroup {
    /// A new one, if one can be made.
    #[must_use]
    pub fn create() -> Option<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let path = own()?.join(format!("{PREFIX}{}-{number}", std::process::id()));
        fs::create_dir(&path).ok()?;
        Some(Self(path))
    }

    /// Removes the empty groups of processes that are gone; called once, before the first is made. A group with somebody in it
    /// stays: a session that outlives its writer is letting go just now.
    pub fn sweep() {
        let Some(own) = own() else {
            return;
        };
        for entry in fs::read_dir(own).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let maker = name.to_str().and_then(maker);
            // One with our own number was made by somebody before us.
            let is_left = maker.is_some_and(|pid| {
                pid == std::process::id() || !Path::new(&format!("/proc/{pid}")).exists()
            });
            if is_left {
                fs::remove_dir(entry.path()).unwrap_or(());
            }
        }
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

/// The process that has made a group of this name.
fn maker(name: &str) -> Option<u32> {
    let (pid, number) = name.strip_prefix(PREFIX)?.split_once('-')?;
    number.parse::<u64>().ok()?;
    pid.parse().ok()
}

#[test]
fn a_group_tells_who_has_made_it_and_other_names_tell_nobody() {
    assert_eq!(maker("vmshadow-writer-17-0"), Some(17));
    for name in [
        "vmshadow-writer-17",
        "vmshadow-writer-x-1",
        "vmshadow-writer-1-x",
        "app.service",
        "",
    ] {
        assert_eq!(maker(name), None, "{name}");
    }
}
