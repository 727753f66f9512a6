//! Runs one of the guest's own programs to its end: shutdown, chpasswd, hwclock, systemctl.
//!
//! Called by `power`, `accounts` and `clock`. Invariant: it comes back; a program that hangs is killed at its limit, for the
//! commands behind it wait.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

/// Longest run, seconds.
const LIMIT_SECONDS: i64 = 60;
/// Where programs are if nobody says.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The full path of a program: as it stands if it has a slash, otherwise by `PATH`.
pub(super) fn find(name: &str) -> io::Result<PathBuf> {
    if name.contains('/') {
        return executable(Path::new(name));
    }
    let path = std::env::var("PATH").unwrap_or_else(|_| PATH.to_owned());
    let mut last = io::Error::from_raw_os_error(rustix::io::Errno::NOENT.raw_os_error());
    for directory in path.split(':').filter(|directory| !directory.is_empty()) {
        match executable(&Path::new(directory).join(name)) {
            Ok(path) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn executable(path: &Path) -> io::Result<PathBuf> {
    let data = std::fs::metadata(path)?;
    if data.is_file() && data.permissions().mode() & 0o111 != 0 {
        Ok(path.to_owned())
    } else {
        let denied = rustix::io::Errno::ACCESS.raw_os_error();
        Err(io::Error::from_raw_os_error(denied))
    }
}

/// Runs it with these arguments and this input; its output goes nowhere.
pub(super) fn run(program: &Path, arguments: &[&str], input: &[u8]) -> io::Result<ExitStatus> {
    let mut child = Command::new(program)
        .args(arguments)
        .current_dir("/")
        .stdin(if input.is_empty() {
            Stdio::null()
        } else {
            Stdio::piped()
        })
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A line or two: it fits into the pipe, or its reader is gone, and the status says so.
        stdin.write_all(input).unwrap_or(());
    }
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("process number"))?;
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    let limit = Timespec {
        tv_sec: LIMIT_SECONDS,
        tv_nsec: 0,
    };
    let count = loop {
        let mut polled = [PollFd::new(&ended, PollFlags::IN)];
        match poll(&mut polled, Some(&limit)) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    if count == 0 {
        child.kill()?;
    }
    child.wait()
}

#[cfg(test)]
mod tests {
    //! With programs that every system has.
    use super::*;

    #[test]
    fn a_program_is_found_fed_and_waited_for() {
        let sh = find("sh").unwrap();
        assert!(sh.is_absolute());
        let status = run(
            &sh,
            &["-c", "read line; test \"$line\" = hello"],
            b"hello\n",
        );
        assert!(status.unwrap().success());
        let status = run(&sh, &["-c", "exit 3"], b"");
        assert_eq!(status.unwrap().code(), Some(3));
        let error = find("no-such-program-anywhere").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        let error = find("/etc/passwd").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }
}
