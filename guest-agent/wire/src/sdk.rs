//! The writer library: what an application needs to take part in snapshot sets.
//!
//! An application implements [`Writer`] (its methods are VSS's `CVssWriter`'s) and calls [`run`]. The library keeps the
//! connection, answers the agent, and sees to it that an application is never left frozen: it resumes by its own timer and
//! when the connection ends, and then says at the thaw that writes were not held. It uses the standard library alone.
//!
//! ```no_run
//! use guest_agent_wire::sdk::{self, Freezing, Held, Veto, Writer};
//! use guest_agent_wire::writer::Registration;
//! use serde_json::Value;
//!
//! struct Queue { paused: bool }
//!
//! impl Writer for Queue {
//!     fn registration(&self) -> Registration {
//!         Registration {
//!             protocol: 1,
//!             class_id: "example-queue".into(),
//!             instance_id: "example-queue:main".into(),
//!             name: "Example queue".into(),
//!             level: Default::default(),
//!             freeze_timeout_ms: 20_000,
//!             hold: Default::default(),
//!         }
//!     }
//!     fn freeze(&mut self, _: &Freezing<'_>) -> Result<Value, Veto> {
//!         if self.paused {
//!             return Err(Veto::retryable("it is paused for other reasons"));
//!         }
//!         self.paused = true; // and wait until the last write is out
//!         Ok(Value::Null)
//!     }
//!     fn thaw(&mut self, _: &Freezing<'_>) -> Result<Held, Veto> {
//!         let held = std::mem::replace(&mut self.paused, false);
//!         Ok(Held { held, evidence: Value::Null })
//!     }
//!     fn abort(&mut self, _reason: &str) {
//!         self.paused = false;
//!     }
//! }
//!
//! // Returns only if the agent refuses this writer.
//! let refused = sdk::run(&mut Queue { paused: false }, guest_agent_wire::writer::SOCKET_PATH.as_ref());
//! eprintln!("{refused}");
//! ```

use crate::lines::{Lines, Piece};
use crate::types::{BackupType, WriterFailure};
use crate::writer::{Event, EventKind, Registration, Reply};
use serde_json::Value;
use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Time between two tries to reach an agent that is not there.
const RECONNECT: Duration = Duration::from_secs(1);

/// Why a writer says no, or has failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Veto {
    /// Code.
    pub code: WriterFailure,
    /// For people.
    pub message: String,
}

impl Veto {
    /// It may work another time.
    pub fn retryable(message: impl Into<String>) -> Self {
        Self {
            code: WriterFailure::Retryable,
            message: message.into(),
        }
    }

    /// It will not work another time either.
    pub fn nonretryable(message: impl Into<String>) -> Self {
        Self {
            code: WriterFailure::Nonretryable,
            message: message.into(),
        }
    }

    /// The set holds only part of the disks that the writer's files lie on.
    pub fn inconsistent(message: impl Into<String>) -> Self {
        Self {
            code: WriterFailure::Inconsistentsnapshot,
            message: message.into(),
        }
    }
}

/// A hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freezing<'a> {
    /// The set.
    pub set: &'a str,
    /// Generation of the hold.
    pub generation: u64,
    /// How long the hold may last. The library calls [`Writer::abort`] after it.
    pub hold: Duration,
    /// How long the answer may take.
    pub deadline: Duration,
}

/// What a writer says at the thaw.
#[derive(Clone, Debug, PartialEq)]
pub struct Held {
    /// Writes were held from the answer to `freeze` until now.
    pub held: bool,
    /// What proves it; for a writer that holds its writes itself it must equal what `freeze` returned.
    pub evidence: Value,
}

/// An application's part in a set. Only freeze, thaw and abort have no default.
pub trait Writer {
    /// Who it is.
    fn registration(&self) -> Registration;

    /// OnIdentify: its metadata document.
    fn identify(&mut self) -> Result<Value, Veto> {
        Ok(Value::Null)
    }

    /// OnPrepareBackup: the last chance to say no before any effect. `disks` are serials; none means all disks.
    fn prepare_backup(
        &mut self,
        set: &str,
        backup_type: BackupType,
        disks: &[String],
    ) -> Result<(), Veto> {
        let _unused = (set, backup_type, disks);
        Ok(())
    }

    /// OnPrepareSnapshot: complete transactions, flush caches. Heavy work belongs here.
    fn prepare_snapshot(&mut self, set: &str, deadline: Duration) -> Result<(), Veto> {
        let _unused = (set, deadline);
        Ok(())
    }

    /// OnFreeze: hold writes from the return on. The value is the evidence.
    fn freeze(&mut self, hold: &Freezing<'_>) -> Result<Value, Veto>;

    /// OnThaw: go on, and tell whether writes were held.
    fn thaw(&mut self, hold: &Freezing<'_>) -> Result<Held, Veto>;

    /// OnPostSnapshot.
    fn post_snapshot(&mut self, set: &str) -> Result<(), Veto> {
        let _unused = set;
        Ok(())
    }

    /// OnBackupComplete.
    fn backup_complete(&mut self, set: &str) -> Result<(), Veto> {
        let _unused = set;
        Ok(())
    }

    /// OnAbort: undo everything and go on. Comes in any state and more than once; also from the library itself, when the
    /// hold has lasted too long or the agent is gone.
    fn abort(&mut self, reason: &str);
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// The agent does not want this writer.
    #[error("the agent refused this writer: {0}")]
    Refused(String),
    /// The agent closed the connection, or sent what is not understood.
    #[error("the agent is gone")]
    Gone,
    /// The connection failed.
    #[error("the connection to the agent failed")]
    Io(#[from] io::Error),
}

/// Serves an application for ever: connects, reconnects after each loss, returns only when the agent refuses it.
pub fn run(writer: &mut dyn Writer, socket: &Path) -> Ended {
    loop {
        if let Ok(stream) = UnixStream::connect(socket)
            && let refused @ Ended::Refused(_) = serve(writer, &stream)
        {
            return refused;
        }
        // Nothing tells when an agent appears, so ask again.
        std::thread::sleep(RECONNECT);
    }
}

/// Serves an application on one connection, until it ends; the application is not frozen afterwards.
pub fn serve(writer: &mut dyn Writer, stream: &UnixStream) -> Ended {
    let mut session = Session {
        stream,
        lines: Lines::default(),
        ready: VecDeque::new(),
        frozen_until: None,
        involved: false,
    };
    let ended = match session.converse(writer) {
        Ok(never) => match never {},
        Err(ended) => ended,
    };
    if session.involved {
        writer.abort("the agent is gone");
    }
    ended
}

struct Session<'a> {
    stream: &'a UnixStream,
    lines: Lines,
    ready: VecDeque<Vec<u8>>,
    /// End of the hold that is in force.
    frozen_until: Option<Instant>,
    /// It has heard of a set whose end it has not heard of.
    involved: bool,
}

/// A conversation has no other end than an error.
enum Never {}

impl Session<'_> {
    fn converse(&mut self, writer: &mut dyn Writer) -> Result<Never, Ended> {
        let registration = serde_json::to_vec(&writer.registration()).map_err(io::Error::from)?;
        self.send(registration)?;
        loop {
            let Some(line) = self.next()? else {
                // The library's own timer: an agent that is stuck must not keep an application frozen.
                self.frozen_until = None;
                writer.abort("the hold has lasted too long");
                continue;
            };
            let event: Event = serde_json::from_slice(&line).map_err(|_| Ended::Gone)?;
            if let EventKind::Welcome { refused, .. } = event.kind {
                match refused {
                    Some(why) => return Err(Ended::Refused(why)),
                    None => continue,
                }
            }
            let mut reply = Reply {
                seq: event.seq,
                ok: true,
                code: None,
                message: String::new(),
                held: None,
                evidence: Value::Null,
                metadata: Value::Null,
            };
            let deadline = Duration::from_millis(event.deadline_ms);
            if let Err(veto) = self.take(writer, &event.kind, deadline, &mut reply) {
                reply.ok = false;
                reply.code = Some(veto.code);
                reply.message = veto.message;
            }
            self.send(serde_json::to_vec(&reply).map_err(io::Error::from)?)?;
        }
    }

    fn take(
        &mut self,
        writer: &mut dyn Writer,
        event: &EventKind,
        deadline: Duration,
        reply: &mut Reply,
    ) -> Result<(), Veto> {
        match event {
            EventKind::Welcome { .. } => {}
            EventKind::Identify {} => reply.metadata = writer.identify()?,
            EventKind::PrepareBackup {
                set,
                backup_type,
                disks,
            } => {
                self.involved = true;
                writer.prepare_backup(set, *backup_type, disks)?;
            }
            EventKind::PrepareSnapshot { set } => writer.prepare_snapshot(set, deadline)?,
            EventKind::Freeze {
                set,
                generation,
                hold_ms,
            } => {
                self.involved = true;
                let hold = Duration::from_millis(*hold_ms);
                // From before the call: what the call takes is part of the hold.
                let until = Instant::now() + hold;
                reply.evidence = writer.freeze(&Freezing {
                    set,
                    generation: *generation,
                    hold,
                    deadline,
                })?;
                self.frozen_until = Some(until);
            }
            EventKind::Thaw { set, generation } => {
                let until = self.frozen_until.take();
                let said = writer.thaw(&Freezing {
                    set,
                    generation: *generation,
                    hold: Duration::ZERO,
                    deadline,
                })?;
                // A hold that the library ended was none, whatever the application believes.
                let in_time = until.is_some_and(|until| Instant::now() <= until);
                reply.held = Some(said.held && in_time);
                reply.evidence = said.evidence;
            }
            EventKind::PostSnapshot { set } => writer.post_snapshot(set)?,
            EventKind::BackupComplete { set } => {
                self.involved = false;
                writer.backup_complete(set)?;
            }
            EventKind::Abort { reason, .. } => {
                self.frozen_until = None;
                self.involved = false;
                writer.abort(reason);
            }
        }
        Ok(())
    }

    fn send(&mut self, mut line: Vec<u8>) -> io::Result<()> {
        line.push(b'\n');
        let mut stream = self.stream;
        stream.write_all(&line)
    }

    /// The next line, or `None` when the hold has lasted too long.
    fn next(&mut self) -> Result<Option<Vec<u8>>, Ended> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(line) = self.ready.pop_front() {
                return Ok(Some(line));
            }
            let left = self
                .frozen_until
                .map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            self.stream.set_read_timeout(left)?;
            let mut stream = self.stream;
            let count = match stream.read(&mut buffer) {
                Ok(0) => return Err(Ended::Gone),
                Ok(count) => count,
                Err(error) if is_passing(&error) => continue,
                Err(error) => return Err(error.into()),
            };
            let mut is_broken = false;
            let ready = &mut self.ready;
            self.lines.take(
                buffer.get(..count).unwrap_or_default(),
                |piece| match piece {
                    Piece::Line(line) => ready.push_back(line),
                    Piece::Reset | Piece::TooLong => is_broken = true,
                },
            );
            if is_broken {
                return Err(Ended::Gone);
            }
        }
    }
}

/// A read that timed out or was interrupted may be tried again.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests;
