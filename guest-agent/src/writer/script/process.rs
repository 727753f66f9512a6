//! Runs one script inside its limit and ends it with all its children.
//!
//! Called by `script`. A script gets a process group of its own and, where cgroup v2 is there, a control group, from which
//! no child escapes. Its output is kept up to a limit; what a child that outlives it still holds open is not waited for.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::fs;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::BootTime;

/// Output that is kept of each stream, bytes.
const OUTPUT_BYTES_MAX: usize = 64 * 1024;
/// Error text that is shown to people, bytes.
const MESSAGE_BYTES_MAX: usize = 1024;
/// First argument of the process that becomes the script.
const ARGUMENT: &str = "writer-script";

/// A script and how it is run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Script<'a> {
    pub(super) path: &'a Path,
    pub(super) environment: &'a [(&'a str, &'a str)],
    pub(super) limit: Duration,
}

/// How it ended.
#[derive(Debug)]
pub(super) enum Outcome {
    Succeeded { output: Vec<u8> },
    Failed { status: ExitStatus, message: String },
    Killed,
}

/// Ends the script that is running, from any thread.
#[derive(Debug, Default)]
pub(super) struct Killer(Mutex<Option<Running>>);

#[derive(Debug)]
struct Running {
    pid: Pid,
    group: Option<ControlGroup>,
    killed: bool,
}

impl Killer {
    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills it and its children, if one is running.
    pub(super) fn kill(&self) {
        if let Some(running) = self.lock().as_mut() {
            running.killed = true;
            running.kill();
        }
    }
}

impl Running {
    /// The leader has not been waited for yet, so its number is nobody else's.
    fn kill(&self) {
        if let Some(group) = &self.group {
            group.kill();
        }
        kill_process_group(self.pid, Signal::KILL).unwrap_or(());
    }
}

impl Script<'_> {
    /// Runs it to its end or its limit.
    pub(super) fn run(self, killer: &Killer) -> io::Result<Outcome> {
        self.run_in(ControlGroup::create(), killer)
    }

    #[cfg(test)]
    pub(super) fn run_without_group(self, killer: &Killer) -> io::Result<Outcome> {
        self.run_in(None, killer)
    }

    fn run_in(self, group: Option<ControlGroup>, killer: &Killer) -> io::Result<Outcome> {
        let until = BootTime::from_us(
            BootTime::now()
                .as_us()
                .saturating_add(u64::try_from(self.limit.as_micros()).unwrap_or(u64::MAX)),
        );
        let mut command = match &group {
            Some(group) => {
                let mut command = Command::new("/proc/self/exe");
                command.arg(ARGUMENT).arg("--group").arg(group.procs());
                command.arg(self.path);
                command
            }
            None => Command::new(self.path),
        };
        let mut child = command
            .envs(self.environment.iter().copied())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::other("process number"))?;
        *killer.lock() = Some(Running {
            pid,
            group,
            killed: false,
        });
        let mut output = Output::default();
        let ended = watch(&mut child, pid, until, &mut output);
        let mut running = killer.lock();
        let killed = running.as_ref().is_some_and(|running| running.killed);
        if let Some(running) = running.take() {
            // Children that the script left behind end with it; so does a script that did not end in time.
            running.kill();
        }
        drop(running);
        let status = child.wait()?;
        ended?;
        Ok(if killed || until.is_past() && !status.success() {
            Outcome::Killed
        } else if status.success() {
            Outcome::Succeeded { output: output.out }
        } else {
            let text = String::from_utf8_lossy(&output.err).trim().to_owned();
            let message = text.chars().take(MESSAGE_BYTES_MAX).collect();
            Outcome::Failed { status, message }
        })
    }
}

#[derive(Default)]
struct Output {
    out: Vec<u8>,
    err: Vec<u8>,
}

/// Reads its output until it has ended or `until` is past.
fn watch(child: &mut Child, pid: Pid, until: BootTime, output: &mut Output) -> io::Result<()> {
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
    for fd in [out.as_ref().map(AsFd::as_fd), err.as_ref().map(AsFd::as_fd)]
        .into_iter()
        .flatten()
    {
        fcntl_setfl(fd, OFlags::NONBLOCK)?;
    }
    loop {
        let left = until.remaining();
        let mut polled = vec![PollFd::new(&pidfd, PollFlags::IN)];
        for fd in [out.as_ref().map(AsFd::as_fd), err.as_ref().map(AsFd::as_fd)]
            .into_iter()
            .flatten()
        {
            polled.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
        }
        let limit = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(&mut polled, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ended = polled.first().is_some_and(|fd| !fd.revents().is_empty());
        drop(polled);
        drain(&mut out, &mut output.out);
        drain(&mut err, &mut output.err);
        if ended || until.is_past() {
            return Ok(());
        }
    }
}

/// Takes what is there; closes the stream at its end.
fn drain(stream: &mut Option<impl Read>, into: &mut Vec<u8>) {
    let mut buffer = [0; 4096];
    while let Some(open) = stream {
        match open.read(&mut buffer) {
            Ok(0) => *stream = None,
            Ok(count) => {
                let room = OUTPUT_BYTES_MAX.saturating_sub(into.len()).min(count);
                into.extend_from_slice(buffer.get(..room).unwrap_or_default());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => *stream = None,
        }
    }
}

/// A cgroup v2 group below the agent's own.
#[derive(Debug)]
struct ControlGroup(PathBuf);

impl ControlGroup {
    fn create() -> Option<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let top = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
            .into_iter()
            .map(Path::new)
            .find(|top| top.join("cgroup.procs").exists())?;
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let name = format!("vmshadow-writer-{}-{number}", std::process::id());
        let path = top.join(own).join(name);
        fs::create_dir(&path).ok()?;
        Some(Self(path))
    }

    fn procs(&self) -> PathBuf {
        self.0.join("cgroup.procs")
    }

    /// Kernels before 5.14 have no cgroup.kill; the process group must do there.
    fn kill(&self) {
        fs::write(self.0.join("cgroup.kill"), "1").unwrap_or(());
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        // Not empty for as long as a killed process has not ended; an empty group costs nothing.
        fs::remove_dir(&self.0).unwrap_or(());
    }
}

/// Moves this process into a control group and replaces it by the script. Returns only if that fails.
pub fn become_script(procs: &Path, script: &Path) -> io::Result<()> {
    fs::write(procs, "0")?;
    Err(Command::new(script).exec())
}
