//! `vmshadow` as a process, as a person or a backup job starts it.
//!
//! Called by scenarios, the demo and the measuring commands. It reads exit codes and `--json`
//! alone. `VMSHADOW_STOP_AT=STEP` makes the command stop itself (SIGSTOP) after that step, so that a scenario can act
//! at exactly that point.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::image;
use super::process::Process;
use super::wait;

/// The steps after which `vmshadow create` can stop itself, in their order.
pub const STEPS: &[&str] = &[
    "intent",
    "identified",
    "prepared",
    "storage-prepared",
    "frozen",
    "marked",
    "committed",
    "thawed",
    "verdict",
    "kept",
    "finished",
];

/// The exit code that says: the level that was asked for was not reached.
pub const EXIT_LEVEL_NOT_REACHED: i32 = 3;

/// No command of a test may take longer.
const LONGEST: Duration = Duration::from_secs(180);

/// `vmshadow` with a configuration of one machine.
#[derive(Debug)]
pub struct Bridge {
    directory: PathBuf,
    config: PathBuf,
    daemon: Option<Daemon>,
    runs: AtomicU32,
}

/// A `qmp-bridge` that does the work.
#[derive(Debug)]
struct Daemon {
    socket: PathBuf,
    _process: Process,
}

/// What a finished `vmshadow` said.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The exit code.
    pub code: i32,
    /// Standard output as JSON; null if there was none.
    pub document: Value,
    /// Standard error.
    pub stderr: String,
    /// From start to end of the process.
    pub took: Duration,
}

impl Answer {
    /// The value at a JSON pointer, or an error that shows the whole answer.
    pub fn at(&self, pointer: &str) -> Result<&Value> {
        self.document
            .pointer(pointer)
            .with_context(|| format!("no {pointer} in {self:#?}"))
    }

    /// Fails unless the command succeeded.
    pub fn succeeded(self) -> Result<Self> {
        ensure!(
            self.code == 0,
            "vmshadow ended with {}: {self:#?}",
            self.code
        );
        Ok(self)
    }
}

/// A `vmshadow` that has not ended.
#[derive(Debug)]
pub struct Running {
    process: Process,
    begin: Instant,
}

impl Running {
    /// Waits until it has stopped itself.
    pub fn wait_stopped(&mut self) -> Result<()> {
        self.process.wait_stopped(wait::STEP)
    }

    /// Lets it go on after a stop.
    pub fn go_on(&self) -> Result<()> {
        self.process.signal(Signal::CONT)
    }

    /// Kills it (-9).
    pub fn kill(mut self) -> Result<()> {
        self.process.kill()
    }

    /// Waits for its end.
    pub fn wait(mut self, deadline: Duration) -> Result<Answer> {
        let status = self.process.wait(deadline)?;
        let stdout = self.process.stdout();
        let document = match stdout.trim() {
            "" => Value::Null,
            text => serde_json::from_str(text).with_context(|| format!("not JSON: {text}"))?,
        };
        let Some(code) = status.code() else {
            bail!("vmshadow was ended by {status}: {}", self.process.stderr());
        };
        Ok(Answer {
            code,
            document,
            stderr: self.process.stderr(),
            took: self.begin.elapsed(),
        })
    }
}

impl Bridge {
    /// Writes the configuration; intent records and outputs go to `directory` too.
    pub fn new(qmp: &Path, agent: &Path, control: &Path, directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        let config = directory.join("vmshadow.toml");
        let records = directory.join("records");
        let text = format!(
            "state-dir = {records:?}\n[[vm]]\nname = \"machine\"\nqmp = {qmp:?}\nagent = {agent:?}\nvhost-blk = [{control:?}]\n"
        );
        std::fs::write(&config, text)?;
        Ok(Self {
            directory: directory.to_owned(),
            config,
            daemon: None,
            runs: AtomicU32::new(0),
        })
    }

    /// The same through a daemon, which is started for it, on the same records.
    pub fn through_daemon(&self) -> Result<Self> {
        let directory = self.directory.join("daemon");
        std::fs::create_dir_all(&directory)?;
        let socket = directory.join("socket");
        let mut command = Command::new(image::program("qmp-bridge")?);
        command.arg("--socket").arg(&socket);
        command.arg("--config").arg(&self.config);
        let process = Process::start("qmp-bridge", command, &directory.join("log"))?;
        wait::until("the bridge's socket", wait::STEP, || {
            Ok(UnixStream::connect(&socket).ok().map(drop))
        })
        .with_context(|| process.stderr())?;
        Ok(Self {
            directory,
            config: self.config.clone(),
            daemon: Some(Daemon {
                socket,
                _process: process,
            }),
            runs: AtomicU32::new(0),
        })
    }

    /// Starts `vmshadow ARGUMENTS --json` for this machine.
    pub fn start(&self, arguments: &[&str], stop_at: Option<&str>) -> Result<Running> {
        let mut all = vec!["--json"];
        all.extend_from_slice(arguments);
        self.spawn(&all, stop_at)
    }

    /// Runs it to its end, whatever its exit code.
    pub fn run(&self, arguments: &[&str]) -> Result<Answer> {
        self.start(arguments, None)?.wait(LONGEST)
    }

    /// What a person sees: the standard output of a command that succeeds.
    pub fn text(&self, arguments: &[&str]) -> Result<String> {
        let mut running = self.spawn(arguments, None)?;
        let status = running.process.wait(LONGEST)?;
        ensure!(status.success(), "{status}: {}", running.process.stderr());
        Ok(running.process.stdout())
    }

    fn spawn(&self, arguments: &[&str], stop_at: Option<&str>) -> Result<Running> {
        let mut command = Command::new(image::program("vmshadow")?);
        match &self.daemon {
            None => command.arg("--config").arg(&self.config),
            Some(daemon) => command.arg("--bridge").arg(&daemon.socket),
        };
        command.args(arguments);
        if let Some(step) = stop_at {
            command.env("VMSHADOW_STOP_AT", step);
        }
        let run = self.runs.fetch_add(1, Ordering::Relaxed);
        let begin = Instant::now();
        let process = Process::start(
            "vmshadow",
            command,
            &self.directory.join(format!("run{run}")),
        )?;
        Ok(Running { process, begin })
    }
}
