//! One command that stays: it gets each event as a line of JSON on standard input and answers on standard output, as a
//! connected writer does, but without registration and timer. So a script can keep a database session open from one event to
//! the next.
//!
//! Made by `main`, called by the writer library. Invariants: one that does not answer in time loses its turn, and one that
//! does not answer an abort is killed with its children: whatever it locked is let go with it. One that has ended while frozen
//! does not hold, and the set fails at once.

use crate::config::Settings;
use crate::report::Report;
use guest_agent::writer::script::control_group::{ControlGroup, Purpose};
use guest_agent_wire::components::ComponentReply;
use guest_agent_wire::lines::{Lines, Piece};
use guest_agent_wire::metadata::Metadata;
use guest_agent_wire::sdk::{Call, Held, Veto, Writer};
use guest_agent_wire::types::WriterFailure;
use guest_agent_wire::writer::{
    Abort, BackupComplete, BackupShutdown, Event, EventKind, Freeze, FromWriter, PostSnapshot,
    PrepareBackup, PrepareSnapshot, Registration, Reply, Restore, Thaw,
};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;
use std::io::{self, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// How often the agent is looked at while the command thinks.
const LOOK: Duration = Duration::from_millis(20);
/// Time for what the agent does not wait for.
const ALONE: Duration = Duration::from_secs(10);

/// A writer by a command that stays.
pub(crate) struct SessionWriter {
    registration: Registration,
    metadata: Metadata,
    command: String,
    report: Report,
    running: Option<Running>,
    seq: u64,
    /// It has frozen and has not been told to go on.
    frozen: bool,
    /// Why it did not hold, if it did not.
    broken: Option<String>,
}

struct Running {
    child: Child,
    group: Option<ControlGroup>,
    /// Lines for it; written by a thread, since it may not read.
    input: Sender<Vec<u8>>,
    said: Receiver<FromWriter>,
}

impl Running {
    fn start(command: &str) -> io::Result<Self> {
        let group = ControlGroup::create(Purpose::Session);
        // This program joins the group before it becomes the command, so that no child of it can be outside.
        let mut become_it = Command::new("/proc/self/exe");
        become_it.args(["writer-script", "--stays"]);
        if let Some(group) = &group {
            become_it.arg("--group").arg(group.procs());
        }
        let mut child = become_it
            .args(["--", "/bin/sh", "-c", command])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let (Some(pipe), Some(output)) = (input, output) else {
            return Err(io::Error::other("no pipes"));
        };
        let (input, lines) = channel();
        thread::Builder::new()
            .name("input".into())
            .spawn(move || write(pipe, &lines))?;
        let (sender, said) = channel();
        thread::Builder::new()
            .name("session".into())
            .spawn(move || read(output, &sender))?;
        Ok(Self {
            child,
            group,
            input,
            said,
        })
    }

    /// Ends it with its children.
    fn kill(mut self) {
        if let Some(group) = &self.group {
            group.kill();
        }
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // It has not been waited for, so the number is still its own.
            kill_process_group(pid, Signal::KILL).unwrap_or(());
        }
        self.child.wait().map(drop).unwrap_or(());
    }
}

/// Writes the lines that come, until nobody sends or nobody reads any more.
fn write(mut pipe: ChildStdin, lines: &Receiver<Vec<u8>>) {
    while let Ok(line) = lines.recv() {
        if pipe.write_all(&line).is_err() {
            return;
        }
    }
}

/// Hands over what the command says, until it ends or says what is not understood.
fn read(mut output: ChildStdout, sender: &Sender<FromWriter>) {
    let mut lines = Lines::default();
    let mut buffer = [0; 4096];
    let mut is_understood = true;
    while is_understood {
        let count = match output.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        lines.take(buffer.get(..count).unwrap_or_default(), |piece| {
            let said = match piece {
                Piece::Line(line) => serde_json::from_slice(&line).ok(),
                Piece::Reset | Piece::TooLong => None,
            };
            is_understood &= said.is_some_and(|said| sender.send(said).is_ok());
        });
    }
}

impl SessionWriter {
    pub(crate) fn new(settings: &Settings, command: String, report: Report) -> Self {
        Self {
            registration: settings.registration(),
            metadata: settings.read_metadata().unwrap_or_default(),
            command,
            report,
            running: None,
            seq: 0,
            frozen: false,
            broken: None,
        }
    }

    /// Sends an event and waits for its answer.
    fn tell(&mut self, call: &Call<'_>, kind: EventKind) -> Result<Reply, Veto> {
        let start = Instant::now();
        let said = self.ask(call, &kind);
        self.report.event(&kind, start, &said);
        said
    }

    fn ask(&mut self, call: &Call<'_>, kind: &EventKind) -> Result<Reply, Veto> {
        self.start_if_gone()?;
        self.seq += 1;
        let deadline_ms = u64::try_from(call.remaining().as_millis()).unwrap_or(u64::MAX);
        let event = Event {
            seq: self.seq,
            deadline_ms,
            kind: kind.clone(),
        };
        let mut line =
            serde_json::to_vec(&event).map_err(|error| Veto::nonretryable(error.to_string()))?;
        line.push(b'\n');
        let Some(running) = &mut self.running else {
            return Err(gone());
        };
        if running.input.send(line).is_err() {
            return Err(self.lost());
        }
        loop {
            let Some(running) = &self.running else {
                return Err(gone());
            };
            match running.said.recv_timeout(LOOK) {
                Ok(FromWriter::Reply(reply)) if reply.seq == self.seq => return answer(reply),
                // To an event that has been given up.
                Ok(FromWriter::Reply(_)) => {}
                Ok(FromWriter::Progress(progress)) => {
                    if progress.seq == self.seq {
                        call.progress(&progress.progress);
                    }
                }
                Ok(FromWriter::Release(release)) => self.broken = Some(release.release),
                Err(RecvTimeoutError::Disconnected) => return Err(self.lost()),
                Err(RecvTimeoutError::Timeout) => {
                    if call.is_over() {
                        return Err(Veto::timeout("the session did not answer in time"));
                    }
                }
            }
        }
    }

    /// Takes what it said since the last event, and starts it anew if it has ended and nothing depends on the old one.
    fn start_if_gone(&mut self) -> Result<(), Veto> {
        if self.look() {
            return Ok(());
        }
        if self.running.is_some() {
            let lost = self.lost();
            if self.frozen {
                return Err(lost);
            }
        }
        let running = Running::start(&self.command);
        self.running =
            Some(running.map_err(|error| Veto::retryable(format!("the session: {error}")))?);
        Ok(())
    }

    /// Takes what it said since the last event. It is there and can be understood.
    fn look(&mut self) -> bool {
        let Some(running) = &mut self.running else {
            return false;
        };
        loop {
            match running.said.try_recv() {
                Ok(FromWriter::Release(release)) => self.broken = Some(release.release),
                Ok(FromWriter::Reply(_) | FromWriter::Progress(_)) => {}
                Err(TryRecvError::Empty) => return matches!(running.child.try_wait(), Ok(None)),
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// It has ended, or cannot be understood: what is left of it is killed.
    fn lost(&mut self) -> Veto {
        if let Some(running) = self.running.take() {
            running.kill();
        }
        if self.frozen {
            self.broken = Some("the session has ended".to_owned());
        }
        gone()
    }
}

fn gone() -> Veto {
    Veto::retryable("the session has ended, or said what is not understood")
}

fn answer(reply: Reply) -> Result<Reply, Veto> {
    if reply.ok {
        return Ok(reply);
    }
    let code = reply.code.unwrap_or(WriterFailure::Nonretryable);
    Err(Veto::new(code, reply.message))
}

impl Drop for SessionWriter {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.kill();
        }
    }
}

impl Writer for SessionWriter {
    fn registration(&self) -> Registration {
        self.registration.clone()
    }

    fn identify(&mut self, call: &Call<'_>) -> Result<Metadata, Veto> {
        let said = self.tell(call, EventKind::Identify {})?.metadata;
        if said.is_null() {
            return Ok(self.metadata.clone());
        }
        serde_json::from_value(said)
            .map_err(|error| Veto::nonretryable(format!("metadata document: {error}")))
    }

    fn prepare_backup(
        &mut self,
        call: &Call<'_>,
        backup: &PrepareBackup,
    ) -> Result<Vec<ComponentReply>, Veto> {
        let kind = EventKind::PrepareBackup(backup.clone());
        Ok(self.tell(call, kind)?.components)
    }

    fn prepare_snapshot(
        &mut self,
        call: &Call<'_>,
        snapshot: &PrepareSnapshot,
    ) -> Result<(), Veto> {
        self.tell(call, EventKind::PrepareSnapshot(snapshot.clone()))
            .map(drop)
    }

    fn freeze(&mut self, call: &Call<'_>, hold: &Freeze) -> Result<Value, Veto> {
        self.start_if_gone()?;
        self.broken = None;
        self.frozen = true;
        Ok(self.tell(call, EventKind::Freeze(hold.clone()))?.evidence)
    }

    fn still_holds(&mut self) -> Result<(), String> {
        if !self.look() && self.running.is_some() {
            self.lost();
        }
        self.broken.clone().map_or(Ok(()), Err)
    }

    fn thaw(&mut self, call: &Call<'_>, hold: &Thaw) -> Result<Held, Veto> {
        let was_frozen = self.frozen;
        let reply = self.tell(call, EventKind::Thaw(hold.clone()))?;
        self.frozen = false;
        Ok(Held {
            held: was_frozen && self.broken.is_none() && reply.held == Some(true),
            evidence: reply.evidence,
        })
    }

    fn post_snapshot(
        &mut self,
        call: &Call<'_>,
        snapshot: &PostSnapshot,
    ) -> Result<Vec<ComponentReply>, Veto> {
        if self.frozen {
            // The thaw failed, and the copies are kept all the same: no abort will come.
            self.abort(&snapshot.set, "the thaw failed");
        }
        let kind = EventKind::PostSnapshot(snapshot.clone());
        Ok(self.tell(call, kind)?.components)
    }

    fn backup_complete(&mut self, call: &Call<'_>, outcome: &BackupComplete) -> Result<(), Veto> {
        self.tell(call, EventKind::BackupComplete(outcome.clone()))
            .map(drop)
    }

    fn backup_shutdown(&mut self, shutdown: &BackupShutdown) -> Result<(), Veto> {
        let kind = EventKind::BackupShutdown(shutdown.clone());
        self.tell(&Call::alone(ALONE), kind).map(drop)
    }

    fn abort(&mut self, set: &str, reason: &str) {
        let kind = EventKind::Abort(Abort {
            set: set.to_owned(),
            reason: reason.to_owned(),
        });
        let undone = match &self.running {
            // It has locked nothing that is still locked.
            None => Ok(()),
            Some(_) => self.tell(&Call::alone(ALONE), kind).map(drop),
        };
        if undone.is_err()
            && let Some(running) = self.running.take()
        {
            self.report
                .note("the session did not end the set; it is killed");
            running.kill();
        }
        self.frozen = false;
    }

    fn pre_restore(
        &mut self,
        call: &Call<'_>,
        restore: &Restore,
    ) -> Result<Vec<ComponentReply>, Veto> {
        let kind = EventKind::PreRestore(restore.clone());
        Ok(self.tell(call, kind)?.components)
    }

    fn post_restore(
        &mut self,
        call: &Call<'_>,
        restore: &Restore,
    ) -> Result<Vec<ComponentReply>, Veto> {
        let kind = EventKind::PostRestore(restore.clone());
        Ok(self.tell(call, kind)?.components)
    }
}
