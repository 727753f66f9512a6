//! Programs that the host runs in the guest: `guest-exec`, `guest-exec-status`.
//!
//! Called by `command`. Each child has a thread of its own, which feeds it, keeps its output up to a limit and waits for it.
//! Invariants: at most `RUNNING_MAX` run; the results of `ENDED_MAX` are kept, the oldest go first; all output that is
//! kept together is at most `KEPT_BYTES_MAX`. A child is born by way of this program's own file (`become_program`), which
//! takes the agent's protection from the kernel's out-of-memory killer off it.

use super::arguments::{Arguments, encode};
use super::failed::{Failed, Outcome, reason};
use super::program;
use crate::journal;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io::{self, Read, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// First argument of the process that becomes the host's program.
const ARGUMENT: &str = "exec-child";
/// Children that may run at a time.
const RUNNING_MAX: usize = 64;
/// Children that have ended and were not asked about.
const ENDED_MAX: usize = 64;
/// As QEMU's agent: output that is kept of each stream.
const STREAM_BYTES_MAX: usize = 16 << 20;
/// Output that is kept of all together.
const KEPT_BYTES_MAX: usize = 128 << 20;

/// Bytes kept by all children; what a stream has taken it gives back when it is dropped.
static KEPT_BYTES: AtomicUsize = AtomicUsize::new(0);

/// One stream of a child.
#[derive(Debug, Default)]
struct Output {
    bytes: Vec<u8>,
    truncated: bool,
}

impl Output {
    fn push(&mut self, bytes: &[u8]) {
        let room = STREAM_BYTES_MAX.saturating_sub(self.bytes.len());
        let wanted = room.min(bytes.len());
        let before = KEPT_BYTES.fetch_add(wanted, Ordering::SeqCst);
        let granted = wanted.min(KEPT_BYTES_MAX.saturating_sub(before));
        KEPT_BYTES.fetch_sub(wanted - granted, Ordering::SeqCst);
        self.bytes
            .extend_from_slice(bytes.get(..granted).unwrap_or_default());
        self.truncated |= granted < bytes.len();
    }

    fn report(&self, object: &mut Map<String, Value>, name: &str) {
        if !self.bytes.is_empty() {
            object.insert(format!("{name}-data"), json!(encode(&self.bytes)));
            object.insert(format!("{name}-truncated"), json!(self.truncated));
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        KEPT_BYTES.fetch_sub(self.bytes.len(), Ordering::SeqCst);
    }
}

/// How a child ended.
#[derive(Debug)]
struct Ended {
    at: Instant,
    status: Option<ExitStatus>,
    out: Output,
    err: Output,
}

type Slot = Arc<Mutex<Option<Ended>>>;

fn lock(slot: &Slot) -> MutexGuard<'_, Option<Ended>> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Those that run, and those whose end nobody has asked for.
#[derive(Debug, Default)]
pub(super) struct Children(BTreeMap<i64, Slot>);

impl Children {
    /// `guest-exec`: answers a process number.
    pub(super) fn start(&mut self, arguments: &mut Arguments) -> Outcome {
        let path = arguments.text("path")?;
        let words = arguments.maybe_texts("arg")?.unwrap_or_default();
        let environment = arguments.maybe_texts("env")?;
        let input = arguments.maybe_bytes("input-data")?;
        let capture = arguments.maybe_flag("capture-output")?;
        arguments.end()?;
        self.forget_old();
        let running = self.0.values().filter(|slot| lock(slot).is_none()).count();
        if running >= RUNNING_MAX {
            return Err(not_started(&format!(
                "{RUNNING_MAX} programs of the host are running"
            )));
        }
        let started = program::find(&path).and_then(|program| {
            let command = command(&path, &program, &words, environment.as_deref());
            spawn(command, input, capture)
        });
        let (pid, slot) = started.map_err(|error| {
            not_started(&format!(
                "Failed to execute child process \u{201c}{path}\u{201d} ({})",
                reason(&error)
            ))
        })?;
        // A number that comes again belongs to another process: the earlier one has ended and been waited for.
        self.0.insert(pid, slot);
        Ok(json!({ "pid": pid }))
    }

    /// `guest-exec-status`: answers, and forgets what has ended.
    pub(super) fn status(&mut self, arguments: &mut Arguments) -> Outcome {
        let pid = arguments.integer("pid")?;
        arguments.end()?;
        let slot = self
            .0
            .get(&pid)
            .ok_or_else(|| Failed::generic("Invalid parameter 'pid'"))?;
        let Some(ended) = lock(slot).take() else {
            return Ok(json!({"exited": false}));
        };
        self.0.remove(&pid);
        let mut object = Map::new();
        object.insert("exited".into(), json!(true));
        if let Some(code) = ended.status.and_then(|status| status.code()) {
            object.insert("exitcode".into(), json!(code));
        }
        if let Some(signal) = ended.status.and_then(|status| status.signal()) {
            object.insert("signal".into(), json!(signal));
        }
        ended.out.report(&mut object, "out");
        ended.err.report(&mut object, "err");
        Ok(Value::Object(object))
    }

    fn forget_old(&mut self) {
        let ended = |slot: &Slot| lock(slot).as_ref().map(|ended| ended.at);
        let mut ends: Vec<_> = self
            .0
            .iter()
            .filter_map(|(pid, slot)| Some((ended(slot)?, *pid)))
            .collect();
        ends.sort();
        let surplus = (ends.len() + 1).saturating_sub(ENDED_MAX);
        for (_, pid) in ends.into_iter().take(surplus) {
            self.0.remove(&pid);
        }
    }
}

fn not_started(why: &str) -> Failed {
    Failed::generic(format!("Guest agent command failed, error was '{why}'"))
}

fn command(
    name: &str,
    program: &Path,
    words: &[String],
    environment: Option<&[String]>,
) -> Command {
    let mut command = Command::new("/proc/self/exe");
    if let Some(environment) = environment {
        command.env_clear();
        let pairs = environment.iter().filter_map(|pair| pair.split_once('='));
        command.envs(pairs);
    }
    // What the program sees as its own name is what the host wrote.
    command
        .arg(ARGUMENT)
        .arg(format!("--name={name}"))
        .arg("--");
    command.arg(program).args(words);
    command
}

fn spawn(mut command: Command, input: Option<Vec<u8>>, capture: bool) -> io::Result<(i64, Slot)> {
    let piped = |wanted| {
        if wanted {
            Stdio::piped()
        } else {
            Stdio::null()
        }
    };
    let mut child = command
        .stdin(piped(input.is_some()))
        .stdout(piped(capture))
        .stderr(piped(capture))
        .process_group(0)
        .spawn()?;
    let pid = i64::from(child.id());
    let slot = Slot::default();
    let of_thread = Arc::clone(&slot);
    let thread = std::thread::Builder::new().name("exec".into());
    thread.spawn(move || {
        let (mut out, mut err) = (Output::default(), Output::default());
        let talked = converse(&mut child, input.unwrap_or_default(), &mut out, &mut err);
        if let Err(error) = talked {
            journal::note(format_args!("output of process {pid} is lost: {error}"));
        }
        *lock(&of_thread) = Some(Ended {
            status: child.wait().ok(),
            at: Instant::now(),
            out,
            err,
        });
    })?;
    Ok((pid, slot))
}

/// Feeds the child and reads it until it has closed what it writes to.
fn converse(
    child: &mut Child,
    input: Vec<u8>,
    out: &mut Output,
    err: &mut Output,
) -> io::Result<()> {
    let mut stdin = child.stdin.take().map(|pipe| (pipe, input, 0));
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let fds = [
        stdin.as_ref().map(|(pipe, ..)| pipe.as_fd()),
        stdout.as_ref().map(AsFd::as_fd),
        stderr.as_ref().map(AsFd::as_fd),
    ];
    for fd in fds.into_iter().flatten() {
        fcntl_setfl(fd, OFlags::NONBLOCK)?;
    }
    feed(&mut stdin);
    while stdin.is_some() || stdout.is_some() || stderr.is_some() {
        let wanted: [(Option<BorrowedFd<'_>>, PollFlags); 3] = [
            (
                stdin.as_ref().map(|(pipe, ..)| pipe.as_fd()),
                PollFlags::OUT,
            ),
            (stdout.as_ref().map(AsFd::as_fd), PollFlags::IN),
            (stderr.as_ref().map(AsFd::as_fd), PollFlags::IN),
        ];
        let mut polled: Vec<_> = wanted
            .iter()
            .filter_map(|(fd, flags)| Some(PollFd::from_borrowed_fd((*fd)?, *flags)))
            .collect();
        match poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        drop(polled);
        feed(&mut stdin);
        drain(&mut stdout, out);
        drain(&mut stderr, err);
    }
    Ok(())
}

/// Writes what fits; closes the pipe after the last byte, or when nobody reads.
fn feed(stdin: &mut Option<(ChildStdin, Vec<u8>, usize)>) {
    while let Some((pipe, bytes, at)) = stdin {
        let left = bytes.get(*at..).unwrap_or_default();
        if left.is_empty() {
            *stdin = None;
            return;
        }
        match pipe.write(left) {
            Ok(count) => *at += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => *stdin = None,
        }
    }
}

/// Takes what is there; closes the stream at its end.
fn drain(stream: &mut Option<impl Read>, into: &mut Output) {
    let mut buffer = [0; 65_536];
    while let Some(open) = stream {
        match open.read(&mut buffer) {
            Ok(0) => *stream = None,
            Ok(count) => into.push(buffer.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => *stream = None,
        }
    }
}

/// Replaces this process by the host's program: a session of its own, no protection from the out-of-memory killer.
/// Returns only if that fails.
pub fn become_program(name: &str, program: &Path, words: &[std::ffi::OsString]) -> io::Result<()> {
    rustix::process::setsid().map(drop).unwrap_or(());
    std::fs::write("/proc/self/oom_score_adj", "0").unwrap_or(());
    Err(Command::new(program).arg0(name).args(words).exec())
}

#[cfg(test)]
mod tests {
    //! Limits. That programs run is tested in a machine, since they need the agent's own file.
    use super::*;

    #[test]
    fn output_beyond_the_limit_is_cut_and_said_to_be() {
        let mut output = Output::default();
        let block = vec![b'a'; STREAM_BYTES_MAX];
        output.push(&block);
        assert!(!output.truncated);
        output.push(b"b");
        assert!(output.truncated);
        assert_eq!(output.bytes.len(), STREAM_BYTES_MAX);
        let mut object = Map::new();
        output.report(&mut object, "out");
        assert_eq!(object["out-truncated"], true);
        let mut others = Vec::new();
        while KEPT_BYTES.load(Ordering::SeqCst) < KEPT_BYTES_MAX {
            let mut other = Output::default();
            other.push(&block);
            others.push(other);
            assert!(others.len() < 20, "the common limit does not hold");
        }
        let mut last = Output::default();
        last.push(b"x");
        assert!(last.bytes.is_empty() && last.truncated);
        others.clear();
        last.push(b"y");
        assert_eq!(last.bytes, b"y");
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error_in_qemus_words() {
        let mut map = Map::new();
        map.insert("path".into(), json!("/no/such/program"));
        let failed = Children::default()
            .start(&mut Arguments::new(map))
            .unwrap_err();
        assert_eq!(
            failed.desc,
            "Guest agent command failed, error was 'Failed to execute child process \u{201c}/no/such/program\u{201d} (No such file or directory)'"
        );
    }

    #[test]
    fn an_unknown_number_is_an_invalid_parameter() {
        let mut map = Map::new();
        map.insert("pid".into(), json!(1));
        let failed = Children::default()
            .status(&mut Arguments::new(map))
            .unwrap_err();
        assert_eq!(failed.desc, "Invalid parameter 'pid'");
    }
}
