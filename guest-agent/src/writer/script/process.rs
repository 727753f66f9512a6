//! Runs one command inside its limit and ends it with all its children.
//!
//! Called by `script` and by the program `vmshadow-writer`. A command gets a process group of its own and, where cgroup v2 is
//! there and may be used, a control group, from which no child escapes. Its output is kept up to a limit; what a child that
//! outlives it still holds open is not waited for.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, OFlags, fcntl_setfl, memfd_create};
use rustix::process::{
    Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, set_parent_process_death_signal,
};
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Seek as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::control_group::{ControlGroup, Purpose};
use super::maker::{self, Maker};
use crate::clock::BootTime;

/// Output that is kept of each stream, bytes.
const OUTPUT_BYTES_MAX: usize = 64 * 1024;
/// Reads of a stream between two looks at the limit.
const READS_MAX: usize = 16;
/// Error text that is shown to people, bytes.
const MESSAGE_BYTES_MAX: usize = 1024;
/// First argument of the process that becomes the command; the program must know it.
const ARGUMENT: &str = "writer-script";

/// A command and how it is run.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// The program's file.
    pub program: &'a Path,
    /// Its arguments.
    pub arguments: &'a [OsString],
    /// Added to the environment of this process.
    pub environment: &'a [(&'static str, String)],
    /// What it can read from standard input.
    pub input: &'a [u8],
    /// It is killed after this time.
    pub limit: Duration,
}

/// How a command ended.
#[derive(Debug)]
pub enum Outcome {
    /// With exit status 0, and this output.
    Succeeded {
        /// Its standard output, up to 64 KiB.
        output: Vec<u8>,
    },
    /// With another status.
    Failed {
        /// The status.
        status: ExitStatus,
        /// Its standard error, up to 1024 characters.
        message: String,
    },
    /// It was killed, by its limit or by [`Killer::kill`]; or it was never started because of that.
    Killed,
}

/// Ends the command that is running, from any thread.
#[derive(Debug, Default)]
pub struct Killer(Mutex<Slot>);

#[derive(Debug, Default)]
struct Slot {
    /// Counts the kills: a command of an earlier time is not started any more.
    kills: u64,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    pid: Pid,
    group: Option<ControlGroup>,
    killed: bool,
}

impl Killer {
    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The time now.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.lock().kills
    }

    /// Nothing has been killed since this time.
    #[must_use]
    pub fn is_at(&self, time: u64) -> bool {
        self.now() == time
    }

    /// Kills the command and its children, if one is running; returns the time from now on, for [`Job::run_at`].
    pub fn kill(&self) -> u64 {
        let mut slot = self.lock();
        slot.kills += 1;
        if let Some(running) = slot.running.as_mut() {
            running.killed = true;
            running.kill();
        }
        slot.kills
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

impl Job<'_> {
    /// Runs it to its end or its limit.
    pub fn run(self, killer: &Killer) -> io::Result<Outcome> {
        self.run_in(ControlGroup::create(Purpose::Script), killer, None, true)
    }

    /// The same, unless the killer has killed since this time.
    pub fn run_at(self, killer: &Killer, time: u64) -> io::Result<Outcome> {
        self.run_in(
            ControlGroup::create(Purpose::Script),
            killer,
            Some(time),
            true,
        )
    }

    /// Without what only a program can do that knows [`become_script`]'s argument.
    #[cfg(test)]
    pub(super) fn run_plain(self, killer: &Killer, time: Option<u64>) -> io::Result<Outcome> {
        self.run_in(None, killer, time, false)
    }

    fn run_in(
        self,
        group: Option<ControlGroup>,
        killer: &Killer,
        time: Option<u64>,
        is_become: bool,
    ) -> io::Result<Outcome> {
        let limit_ms = u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX);
        let until = BootTime::now().plus_ms(limit_ms);
        let mut command = if is_become {
            let mut command = Command::new("/proc/self/exe");
            command.arg(ARGUMENT);
            if let Some(group) = &group {
                command.arg("--group").arg(group.procs());
            }
            command.arg("--").arg(self.program);
            command
        } else {
            Command::new(self.program)
        };
        command
            .args(self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .env(maker::VARIABLE, Maker::this_process()?.to_string())
            .current_dir("/")
            .stdin(readable(self.input)?)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        // Under the lock, or a kill could come between the start and its entry here.
        let mut slot = killer.lock();
        if time.is_some_and(|time| time != slot.kills) {
            return Ok(Outcome::Killed);
        }
        let mut child = command.spawn()?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::other("process number"))?;
        slot.running = Some(Running {
            pid,
            group,
            killed: false,
        });
        drop(slot);
        let mut output = Output::default();
        let ended = watch(&mut child, pid, until, &mut output);
        let running = killer.lock().running.take();
        let killed = running.as_ref().is_some_and(|running| running.killed);
        if let Some(running) = &running {
            // Children that it left behind end with it; so does a command that did not end in time.
            running.kill();
        }
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

/// A file in memory with this text: unlike a pipe it has room for all of it before anybody reads.
fn readable(text: &[u8]) -> io::Result<Stdio> {
    if text.is_empty() {
        return Ok(Stdio::null());
    }
    let mut file = fs::File::from(memfd_create("event", MemfdFlags::CLOEXEC)?);
    file.write_all(text)?;
    file.rewind()?;
    Ok(file.into())
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

/// Takes what is there, a pipe's worth at most, so that the limit is looked at however fast more comes; closes the stream at its
/// end.
fn drain(stream: &mut Option<impl Read>, into: &mut Vec<u8>) {
    let mut buffer = [0; 4096];
    for _ in 0..READS_MAX {
        let Some(open) = stream else {
            return;
        };
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

/// As [`become_script`], without the agent's protection from the out-of-memory killer.
pub fn become_script_of_agent(
    group: Option<&Path>,
    program: &Path,
    arguments: &[OsString],
) -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", "0").unwrap_or(());
    become_script(group, program, arguments)
}

/// Moves this process into a control group and replaces it by the command, which dies with the thread that waits for it.
/// Returns only if that fails.
pub fn become_script(
    group: Option<&Path>,
    program: &Path,
    arguments: &[OsString],
) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    become_session(group, program, arguments)
}

/// The same, but the command outlives the process that started it: it has something to undo then.
pub fn become_session(
    group: Option<&Path>,
    program: &Path,
    arguments: &[OsString],
) -> io::Result<()> {
    if let Some(procs) = group {
        fs::write(procs, "0")?;
    }
    Err(Command::new(program).args(arguments).exec())
}

#[test]
fn output_that_never_pauses_does_not_keep_its_reader_from_the_limit() {
    let (sender, drained) = std::sync::mpsc::channel();
    // In a thread: one that reads to the end never comes back.
    std::thread::spawn(move || {
        let (mut stream, mut kept) = (Some(io::repeat(b'x')), Vec::new());
        for _ in 0..4 {
            drain(&mut stream, &mut kept);
        }
        sender.send(kept.len())
    });
    let kept = drained.recv_timeout(Duration::from_secs(20));
    assert_eq!(kept, Ok(OUTPUT_BYTES_MAX));
}
