//! The ledger: a small file in the state directory (a tmpfs) that says what this boot's agent has frozen.
//!
//! The helper writes it before the first FIFREEZE and changes one byte per file system afterwards, without allocating. It
//! is read only when both processes were killed: at the next start, or by `--thaw-leftovers`. Marks: `.` not touched, `f`
//! FIFREEZE called, `F` FIFREEZE returned 0, `T` not ours any more.
//!
//! `vmshadow-hold 1 BOOT_ID PID\n`, then a line `MARK MAJOR:MINOR\n` for each file system.
#![deny(clippy::indexing_slicing)]

use super::slot::open_first;
use crate::filesystem::freeze;
use crate::filesystem::mounts::DeviceNumber;
use crate::filesystem::plan::Sources;
use crate::journal;
use rustix::io::Errno;
use std::fs;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

const PREFIX: &str = "hold.";
const TITLE: &str = "vmshadow-hold 1";

/// Mark of one file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// FIFREEZE is about to be called.
    Freezing,
    /// FIFREEZE returned 0.
    Frozen,
    /// It failed, or FITHAW was called.
    Done,
}

/// An open ledger.
#[derive(Debug)]
pub struct Ledger {
    file: OwnedFd,
    path: PathBuf,
    first_mark: u64,
    places: Vec<u64>,
}

impl Ledger {
    /// Writes a ledger for these file systems, none frozen yet.
    pub fn create(
        state_dir: &Path,
        generation: u64,
        devices: impl Iterator<Item = DeviceNumber>,
    ) -> io::Result<Self> {
        let path = state_dir.join(format!("{PREFIX}{generation}"));
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        let mut text = format!("{TITLE} {} {}\n", boot_id()?, std::process::id());
        let first_mark = text.len() as u64;
        let mut places = Vec::new();
        for device in devices {
            places.push(text.len() as u64);
            text.push_str(&format!(". {device}\n"));
        }
        file.write_all(text.as_bytes())?;
        Ok(Self {
            file: file.into(),
            path,
            first_mark,
            places,
        })
    }

    /// Sets the mark of a file system. Allocates nothing; the state directory is a tmpfs, which cannot fail here.
    pub fn mark(&self, slot: usize, mark: Mark) {
        let byte = match mark {
            Mark::Freezing => b'f',
            Mark::Frozen => b'F',
            Mark::Done => b'T',
        };
        let place = self.places.get(slot).copied().unwrap_or(self.first_mark);
        rustix::io::pwrite(&self.file, &[byte], place)
            .map(drop)
            .unwrap_or(());
    }

    /// Nothing is frozen any more.
    pub fn remove(&self) {
        fs::remove_file(&self.path).unwrap_or(());
    }
}

/// What a ledger says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Record {
    boot_id: String,
    helper: u32,
    frozen: Vec<DeviceNumber>,
}

fn parse(text: &str) -> Option<Record> {
    let mut lines = text.lines();
    let head = lines.next()?.strip_prefix(TITLE)?.trim_start();
    let (boot_id, helper) = head.split_once(' ')?;
    let frozen = lines
        .filter_map(|line| match line.split_once(' ')? {
            ("f" | "F", device) => DeviceNumber::parse(device),
            _ => None,
        })
        .collect();
    Some(Record {
        boot_id: boot_id.to_owned(),
        helper: helper.trim().parse().ok()?,
        frozen,
    })
}

/// Why not all is put right. What can be has been, and each failure has been told.
#[derive(Debug, thiserror::Error)]
pub enum Unrecovered {
    /// A file system is frozen, or will be: scripts must wait, and it must be tried again.
    #[error("{0}")]
    StillFrozen(io::Error),
    /// Nothing is frozen, but a ledger cannot be removed.
    #[error("it cannot be removed: {0}")]
    LedgerStays(io::Error),
}

/// What came of the ledgers, or of an attempt at one: file systems.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Thawed just now.
    pub thawed: usize,
    /// Mounted where nobody sees them, or nowhere: they may be frozen still. Each has been told.
    pub unreached: usize,
}

/// The kernel's boot id.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// Thaws what ledgers of this boot say was left frozen. A helper that is still dying (a
/// FIFREEZE of it may be under way, which no signal ends) is waited for, up to `patience`; after that its ledger stays and
/// the error asks to be called again, since the file system will be frozen once that FIFREEZE returns.
/// What cannot be reached by any mount point keeps its ledger, for another try.
pub fn recover(
    state_dir: &Path,
    sources: &Sources,
    patience: Duration,
) -> Result<Recovered, Unrecovered> {
    let boot_id = boot_id().map_err(Unrecovered::StillFrozen)?;
    let mut all = Recovered::default();
    let mut worst = None;
    let entries = fs::read_dir(state_dir).map_err(Unrecovered::StillFrozen)?;
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let path = entry.path();
        match recover_one(&path, &boot_id, sources, patience) {
            Ok(one) => {
                all.thawed += one.thawed;
                all.unreached += one.unreached;
            }
            Err(why) => {
                journal::note(format_args!("{}: {why}", path.display()));
                if !matches!(worst, Some(Unrecovered::StillFrozen(_))) {
                    worst = Some(why);
                }
            }
        }
    }
    worst.map_or(Ok(all), Err)
}

fn recover_one(
    path: &Path,
    boot_id: &str,
    sources: &Sources,
    patience: Duration,
) -> Result<Recovered, Unrecovered> {
    let record = fs::read_to_string(path).ok().and_then(|text| parse(&text));
    let mut left = Recovered::default();
    if let Some(record) = record.filter(|record| record.boot_id == boot_id) {
        let thaw = || thaw_all(&record.frozen, sources).map_err(Unrecovered::StillFrozen);
        left = thaw()?;
        match end_of(record.helper, patience) {
            End::Long => {}
            End::Now => {
                let before = left.thawed;
                left = thaw()?;
                left.thawed += before;
            }
            End::NotYet => {
                let text = format!("helper {} is still freezing", record.helper);
                return Err(Unrecovered::StillFrozen(io::Error::other(text)));
            }
        }
        if left.unreached > 0 {
            return Ok(left);
        }
    }
    match fs::remove_file(path) {
        Ok(()) => Ok(left),
        // By its helper, which has thawed what it held meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(left),
        Err(error) => Err(Unrecovered::LedgerStays(error)),
    }
}

/// By whichever mount of each that can be opened: the one by which it was frozen may be gone or covered by now.
fn thaw_all(devices: &[DeviceNumber], sources: &Sources) -> io::Result<Recovered> {
    let ways = sources.ways_to(&devices.iter().copied().collect())?;
    let mut left = Recovered::default();
    for device in devices.iter().rev() {
        let paths = ways.get(device).map(Vec::as_slice).unwrap_or_default();
        let place = paths.first().map_or_else(
            || format!("file system {device}, which is mounted nowhere"),
            |path| path.display().to_string(),
        );
        match open_first(*device, paths).and_then(freeze::thaw) {
            Ok(()) => {
                journal::note(format_args!(
                    "thawed {place}, left frozen by a killed agent"
                ));
                left.thawed += 1;
            }
            // Already thawed: by its own helper, or by a person.
            Err(Errno::INVAL) => {}
            Err(error) => {
                journal::note(format_args!(
                    "could not thaw {place}: {error}; mount it where it can be seen, then run guest-agent --thaw-leftovers"
                ));
                left.unreached += 1;
            }
        }
    }
    Ok(left)
}

/// When a helper ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Before it was asked.
    Long,
    /// While it was waited for.
    Now,
    /// It is still there.
    NotYet,
}

/// Waits until a helper is gone.
fn end_of(pid: u32, patience: Duration) -> End {
    let Some(pid) = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
    else {
        return End::Long;
    };
    // The number may have been given to another process since: only a helper is waited for.
    if !may_be_helper(pid) {
        return End::Long;
    }
    let Ok(pidfd) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else {
        return End::Long;
    };
    let mut polled = [rustix::event::PollFd::new(
        &pidfd,
        rustix::event::PollFlags::IN,
    )];
    let limit = rustix::event::Timespec {
        tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(patience.subsec_nanos()),
    };
    match rustix::event::poll(&mut polled, Some(&limit)) {
        Ok(0) | Err(_) => End::NotYet,
        Ok(_) => End::Now,
    }
}

/// A helper by its command line; or by none, in a process whose first thread has ended: one that was killed while another
/// thread is in FIFREEZE looks so, and a process that has ended altogether does not make anybody wait.
fn may_be_helper(pid: rustix::process::Pid) -> bool {
    let process = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
    let command = fs::read(process.join("cmdline")).unwrap_or_default();
    if command.is_empty() {
        let stat = fs::read_to_string(process.join("stat")).unwrap_or_default();
        return stat
            .rsplit(") ")
            .next()
            .is_some_and(|rest| rest.starts_with('Z'));
    }
    command
        .split(|byte| *byte == 0)
        .any(|word| word == super::helper::ARGUMENT.as_bytes())
}

#[cfg(test)]
mod tests {
    //! What is written is read again, and nothing else is believed.
    use super::*;
    use rustix::fs::Mode;

    fn sources() -> Sources {
        Sources {
            proc: "/proc".into(),
            sys: "/sys".into(),
            only_under: None,
        }
    }

    #[test]
    fn a_ledger_names_what_is_frozen_now() {
        let dir = tempfile::tempdir().unwrap();
        let devices = [1, 2, 3, 4].map(|minor| DeviceNumber { major: 9, minor });
        let ledger = Ledger::create(dir.path(), 5, devices.into_iter()).unwrap();
        let read = || parse(&fs::read_to_string(dir.path().join("hold.5")).unwrap()).unwrap();
        assert_eq!(read().frozen, []);
        ledger.mark(0, Mark::Freezing);
        ledger.mark(1, Mark::Frozen);
        ledger.mark(2, Mark::Frozen);
        ledger.mark(2, Mark::Done);
        assert_eq!(read().frozen, [devices[0], devices[1]]);
        assert_eq!(read().boot_id, boot_id().unwrap());
        assert_eq!(read().helper, std::process::id());
        ledger.remove();
        assert!(!dir.path().join("hold.5").exists());
    }

    #[test]
    fn a_ledger_that_its_helper_removes_meanwhile_is_no_error() {
        use rustix::fs::{CWD, FileType, mknodat};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hold.7");
        // A pipe, so that the ledger has been read when it goes.
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let mut helper = std::process::Command::new("sh")
            .args(["-c", "echo \"$1 $$\" >\"$2\"; rm \"$2\"", "sh"])
            .arg(format!("{TITLE} {}", boot_id().unwrap()))
            .arg(&path)
            .arg(crate::hold::helper::ARGUMENT)
            .spawn()
            .unwrap();
        let thawed = recover(dir.path(), &sources(), Duration::from_secs(60));
        assert!(helper.wait().unwrap().success());
        assert_eq!(thawed.unwrap(), Recovered::default());
    }

    #[test]
    fn a_ledger_of_what_cannot_be_reached_stays() {
        let dir = tempfile::tempdir().unwrap();
        let nowhere = DeviceNumber {
            major: 999,
            minor: 9,
        };
        let text = format!("{TITLE} {} 0\nF {nowhere}\n", boot_id().unwrap());
        fs::write(dir.path().join("hold.3"), text).unwrap();
        let left = recover(dir.path(), &sources(), Duration::ZERO).unwrap();
        assert_eq!((left.thawed, left.unreached), (0, 1));
        assert!(dir.path().join("hold.3").exists());
    }

    #[test]
    fn a_ledger_that_cannot_be_removed_keeps_no_other() {
        let dir = tempfile::tempdir().unwrap();
        // In whatever order they are found.
        for number in 0..20 {
            let path = dir.path().join(format!("hold.{number}"));
            if number % 2 == 0 {
                fs::create_dir(path).unwrap();
            } else {
                fs::write(path, "vmshad").unwrap();
            }
        }
        let recovered = recover(dir.path(), &sources(), Duration::ZERO);
        assert!(matches!(recovered, Err(Unrecovered::LedgerStays(_))));
        let left = fs::read_dir(dir.path()).unwrap().flatten();
        assert!(left.map(|entry| entry.path()).all(|path| path.is_dir()));
    }

    #[test]
    fn a_ledger_of_another_boot_or_a_torn_one_is_thrown_away() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("hold.1"),
            "vmshadow-hold 1 other-boot 1\nF 0:0\n",
        )
        .unwrap();
        fs::write(dir.path().join("hold.2"), "vmshad").unwrap();
        fs::write(dir.path().join("unrelated"), "x").unwrap();
        let left = recover(dir.path(), &sources(), Duration::ZERO).unwrap();
        assert_eq!(left, Recovered::default());
        let stay: Vec<_> = fs::read_dir(dir.path()).unwrap().flatten().collect();
        assert_eq!(stay.len(), 1);
    }
}
