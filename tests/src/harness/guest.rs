//! The host's end of the guest's command shell.
//!
//! Called by `vm`, `load`, `oracle` and scenarios. Commands run at the same time in the guest; an
//! answer finds its caller by the request's number. Works while every disk's file system is frozen.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use super::wait;
use crate::guest_protocol::{ShellRequest, ShellResponse};

#[derive(Debug, Default)]
struct Waiting {
    next_id: u64,
    callers: HashMap<u64, Sender<ShellResponse>>,
}

/// A connection to the shell of one machine.
#[derive(Debug)]
pub struct Guest {
    port: Mutex<UnixStream>,
    waiting: Arc<Mutex<Waiting>>,
}

/// A command that runs in the guest.
#[derive(Debug)]
pub struct Running {
    command: String,
    answer: Receiver<ShellResponse>,
    /// The answer, once [`Self::still_runs`] has found it: it comes only once.
    seen: OnceCell<ShellResponse>,
}

impl Running {
    /// Waits for the command's end, whatever its status.
    pub fn wait(&self, deadline: Duration) -> Result<ShellResponse> {
        if let Some(response) = self.seen.get() {
            return Ok(response.clone());
        }
        match self.answer.recv_timeout(deadline) {
            Ok(response) => Ok(response),
            Err(RecvTimeoutError::Timeout) => {
                bail!(
                    "no answer in {} s to {:?}",
                    deadline.as_secs(),
                    self.command
                )
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the machine is gone: {:?}", self.command),
        }
    }

    /// True while no answer has come.
    #[must_use]
    pub fn still_runs(&self) -> bool {
        match self.answer.try_recv() {
            Ok(response) => {
                // An answer that was seen before stays: nobody is sent two.
                self.seen.get_or_init(|| response);
                false
            }
            Err(TryRecvError::Empty) => true,
            Err(TryRecvError::Disconnected) => false,
        }
    }
}

impl Guest {
    /// Connects to the Unix socket behind the shell's port.
    pub fn connect(socket: &Path) -> Result<Self> {
        let port = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
        let answers = BufReader::new(port.try_clone()?);
        let waiting = Arc::<Mutex<Waiting>>::default();
        let table = Arc::clone(&waiting);
        thread::spawn(move || {
            for line in answers.lines().map_while(Result::ok) {
                match serde_json::from_str::<ShellResponse>(&line) {
                    Ok(response) => {
                        let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
                        if let Some(caller) = table.callers.remove(&response.id) {
                            // A caller that gave up has closed its end.
                            drop(caller.send(response));
                        }
                    }
                    Err(error) => eprintln!("harness: {error} in the shell's answer {line:?}"),
                }
            }
            table
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .callers
                .clear();
        });
        Ok(Self {
            port: Mutex::new(port),
            waiting,
        })
    }

    /// Starts a command and returns at once.
    pub fn start(&self, command: &str) -> Result<Running> {
        let (caller, answer) = channel();
        let id = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.next_id += 1;
            let id = waiting.next_id;
            waiting.callers.insert(id, caller);
            id
        };
        let request = ShellRequest {
            id,
            command: command.to_owned(),
        };
        let mut line = serde_json::to_string(&request)?;
        line.push('\n');
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        port.write_all(line.as_bytes())?;
        Ok(Running {
            command: command.to_owned(),
            answer,
            seen: OnceCell::new(),
        })
    }

    /// Runs a command to its end and returns its standard output; any status but 0 is an error.
    pub fn shell(&self, command: &str) -> Result<String> {
        let response = self.start(command)?.wait(wait::STEP)?;
        if response.status != 0 {
            return Err(anyhow!(
                "{command:?} ended with {}: {}{}",
                response.status,
                response.stdout,
                response.stderr
            ));
        }
        Ok(response.stdout)
    }

    /// The guest's `CLOCK_BOOTTIME` in microseconds (to the hundredth of a second /proc gives).
    pub fn boottime_us(&self) -> Result<u64> {
        let text = self.shell("cat /proc/uptime")?;
        let seconds = text.split(' ').next().and_then(|word| word.split_once('.'));
        let (whole, hundredths) = seconds.with_context(|| format!("uptime {text:?}"))?;
        Ok(whole.parse::<u64>()? * 1_000_000 + hundredths.parse::<u64>()? * 10_000)
    }
}
