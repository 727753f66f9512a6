//! Processes the rig starts: QEMU, the daemon, `vmshadow`.
//!
//! Called by `vm`, `daemon` and `bridge`. Output goes to files, so that nothing blocks on a pipe
//! nobody reads and a failing test can show it. A process is killed when its owner is dropped, and by the kernel
//! (parent-death signal) when the test program itself is killed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};

use super::wait;

/// A running process, killed on drop.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    output: PathBuf,
}

impl Process {
    /// Starts `command`; its outputs go to the files `OUTPUT.out` and `OUTPUT.err`.
    pub fn start(name: &str, command: Command, output: &Path) -> Result<Self> {
        let stdout = File::create(output.with_added_extension("out"))?;
        let stderr = File::create(output.with_added_extension("err"))?;
        let mut wrapped = Command::new("setpriv");
        wrapped.args(["--pdeathsig", "KILL", "--"]);
        wrapped.arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(key, value),
                None => wrapped.env_remove(key),
            };
        }
        wrapped.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        let child = spawn(wrapped).with_context(|| format!("cannot start {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            output: output.to_owned(),
        })
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        self.read("out")
    }

    /// What it has written to standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.read("err")
    }

    fn read(&self, extension: &str) -> String {
        let bytes = fs::read(self.output.with_added_extension(extension)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn kernel_pid(&self) -> Result<Pid> {
        let pid = i32::try_from(self.pid()).ok();
        pid.and_then(Pid::from_raw).context("pid")
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.kernel_pid()?, signal).with_context(|| format!("signal to {}", self.name))
    }

    /// Whether it runs, and if not how it ended, for messages. Its end is left for [`Self::ended`] to take.
    #[must_use]
    pub fn state(&self) -> String {
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let seen = self
            .kernel_pid()
            .and_then(|pid| Ok(waitid(WaitId::Pid(pid), look)?));
        match seen {
            Ok(None) => "runs".to_owned(),
            Ok(Some(end)) => match (end.exit_status(), end.terminating_signal()) {
                (Some(status), _) => format!("has ended with status {status}"),
                (None, signal) => format!("was killed by signal {}", signal.unwrap_or_default()),
            },
            Err(error) => format!("has ended and was waited for ({error:#})"),
        }
    }

    /// Kills it (-9) and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Its exit status, if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        let child = &mut self.child;
        let ended = wait::until(&what, deadline, || Ok(child.try_wait()?));
        ended.with_context(|| self.stderr())
    }

    /// Waits until it has stopped itself (SIGSTOP): state `T` in /proc.
    pub fn wait_stopped(&mut self, deadline: Duration) -> Result<()> {
        let stat = format!("/proc/{}/stat", self.pid());
        wait::until(&format!("{} to stop", self.name), deadline, || {
            if let Some(status) = self.child.try_wait()? {
                let said = self.stdout() + &self.stderr();
                return Err(anyhow!("{} ended ({status}): {said}", self.name));
            }
            // The state is the word after the name in brackets.
            let text = fs::read_to_string(&stat)?;
            let state = text
                .rsplit_once(") ")
                .map(|(_, rest)| rest.starts_with('T'));
            Ok((state == Some(true)).then_some(()))
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("harness: cannot kill {}: {error:#}", self.name);
        }
    }
}

type Order = (Command, Sender<std::io::Result<Child>>);

/// The parent-death signal comes when the *thread* that started the child ends, and a test's
/// thread ends before a machine it shares with other tests: one thread starts all of them.
fn spawn(command: Command) -> Result<Child> {
    static NURSERY: OnceLock<Sender<Order>> = OnceLock::new();
    let nursery = NURSERY.get_or_init(|| {
        let (orders, inbox) = channel::<Order>();
        thread::spawn(move || {
            for (mut command, reply) in inbox {
                if reply.send(command.spawn()).is_err() {
                    eprintln!("harness: nobody waits for the process");
                }
            }
        });
        orders
    });
    let (reply, answer) = channel();
    nursery
        .send((command, reply))
        .map_err(|_| anyhow!("the nursery has ended"))?;
    Ok(answer.recv()??)
}
