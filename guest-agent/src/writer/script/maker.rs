//! Who started a script: a process, told from a later one of the same number by its start.
//!
//! Used by `control_group` in the names of groups, by `process` in the environment of scripts, and by `left_over`.

use std::fmt;
use std::fs;
use std::io;
use std::str::FromStr;

/// Name of the variable that all scripts and their children have in their environment: the maker.
pub(super) const VARIABLE: &str = "VMSHADOW_SCRIPT_OF";
/// Place of the start time in `/proc/PID/stat` behind the name in brackets: proc(5), field 22.
const START_TIME: usize = 19;

/// A process: its number and its start, in clock ticks since boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Maker {
    pid: u32,
    start: u64,
}

impl Maker {
    /// This process.
    pub(super) fn this_process() -> io::Result<Self> {
        let pid = std::process::id();
        let start = start(pid)?;
        Ok(Self { pid, start })
    }

    /// Whether it has ended.
    pub(super) fn is_gone(self) -> bool {
        start(self.pid).map_or(true, |start| start != self.start)
    }
}

impl fmt::Display for Maker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.pid, self.start)
    }
}

/// This names no process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a process and its start")]
pub(super) struct NotAMaker;

impl FromStr for Maker {
    type Err = NotAMaker;

    fn from_str(text: &str) -> Result<Self, NotAMaker> {
        let (pid, start) = text.split_once('-').ok_or(NotAMaker)?;
        Ok(Self {
            pid: pid.parse().map_err(|_| NotAMaker)?,
            start: start.parse().map_err(|_| NotAMaker)?,
        })
    }
}

fn start(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(") ").unwrap_or_default();
    // A process that is dead, but not waited for, is gone.
    if fields.starts_with(['Z', 'X']) {
        return Err(io::ErrorKind::NotFound.into());
    }
    let start = fields.split(' ').nth(START_TIME);
    start
        .and_then(|start| start.parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[test]
fn a_process_is_known_by_its_number_and_its_start() {
    let here = Maker::this_process().unwrap();
    assert!(!here.is_gone());
    assert_eq!(here.to_string().parse(), Ok(here));
    let before = Maker {
        start: here.start - 1,
        ..here
    };
    assert!(before.is_gone(), "an earlier one of this number");
    assert_eq!("17".parse::<Maker>(), Err(NotAMaker));
}
