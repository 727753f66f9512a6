//! The library's side of a connection: reads events, calls the writer, keeps the timer of the hold.
//!
//! Invariants: whatever ends the connection, the writer is not frozen afterwards and every set that it heard of has been
//! ended to it; a hold that the library ended is never said to have been held.

use super::call::Call;
use super::{Veto, Writer};
use crate::MESSAGE_BYTES_MAX;
use crate::lines::{Lines, Piece};
use crate::types::WriterFailure;
use crate::writer::{BackupShutdown, Event, EventKind, Progress, Release, Reply};
use serde::Serialize;
use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Time between two tries to reach an agent that is not there.
const RECONNECT: Duration = Duration::from_secs(1);
/// Time between two looks whether the application still holds.
const LOOK: Duration = Duration::from_millis(100);

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
        wire: Wire::new(stream),
        hold: None,
        open: BTreeSet::new(),
        copied: BTreeSet::new(),
    };
    let ended = match session.converse(writer) {
        Ok(never) => match never {},
        Err(ended) => ended,
    };
    for set in &session.open {
        writer.abort(set, "the agent is gone");
    }
    for set in session.copied {
        // There is nobody left to hear of a failure.
        writer
            .backup_shutdown(&BackupShutdown { set })
            .unwrap_or(());
    }
    ended
}

/// A hold that is in force.
struct Hold {
    set: String,
    generation: u64,
    until: Instant,
}

struct Session<'a> {
    wire: Wire<'a>,
    hold: Option<Hold>,
    /// Sets and restores that it has heard of, that an abort would end.
    open: BTreeSet<String>,
    /// Sets whose copies are there and whose backup is not complete.
    copied: BTreeSet<String>,
}

/// A conversation has no other end than an error.
enum Never {}

impl Session<'_> {
    fn converse(&mut self, writer: &mut dyn Writer) -> Result<Never, Ended> {
        // An agent that refuses this user says so before it reads and hangs up: then that is there to be read.
        self.wire.send(&writer.registration()).unwrap_or(());
        loop {
            let now = Instant::now();
            let until = self.hold.as_ref().map(|hold| hold.until.min(now + LOOK));
            let Some(line) = self.wire.next(until)? else {
                self.look(writer)?;
                continue;
            };
            let event: Event = serde_json::from_slice(&line).map_err(|_| Ended::Gone)?;
            if let EventKind::Welcome(welcome) = event.kind {
                match welcome.refused {
                    Some(why) => return Err(Ended::Refused(why)),
                    None => continue,
                }
            }
            let mut reply = Reply::agrees(event.seq);
            if let Err(veto) = self.take(writer, &event, &mut reply) {
                reply.ok = false;
                reply.code = Some(veto.code);
                reply.message = veto.message;
            }
            self.wire.reply(reply)?;
        }
    }

    /// Ends a hold that is over: by the library's own timer, since an agent that is stuck must not keep an application frozen,
    /// or because the application says so.
    fn look(&mut self, writer: &mut dyn Writer) -> io::Result<()> {
        let Some(hold) = &self.hold else {
            return Ok(());
        };
        let release = if Instant::now() >= hold.until {
            "the hold has lasted too long".to_owned()
        } else if let Err(why) = writer.still_holds() {
            why
        } else {
            return Ok(());
        };
        let generation = hold.generation;
        writer.abort(&hold.set, &release);
        self.hold = None;
        self.wire.send(&Release {
            release,
            generation,
        })
    }

    fn take(
        &mut self,
        writer: &mut dyn Writer,
        event: &Event,
        reply: &mut Reply,
    ) -> Result<(), Veto> {
        let is_prepare = matches!(
            event.kind,
            EventKind::PrepareBackup(_) | EventKind::PrepareSnapshot(_)
        );
        let limit = Duration::from_millis(event.deadline_ms);
        let call = Call::new(limit, &self.wire, event.seq, is_prepare);
        match &event.kind {
            EventKind::Welcome(_) => {}
            EventKind::Identify {} => {
                let metadata = writer.identify(&call)?;
                reply.metadata = serde_json::to_value(metadata)
                    .map_err(|error| Veto::nonretryable(error.to_string()))?;
            }
            EventKind::PrepareBackup(backup) => {
                // Before the call: a writer that refuses is told of the end all the same.
                self.open.insert(backup.set.clone());
                reply.components = writer.prepare_backup(&call, backup)?;
                if backup.component_mode && backup.components.is_empty() {
                    self.open.remove(&backup.set);
                }
            }
            EventKind::PrepareSnapshot(snapshot) => {
                self.open.insert(snapshot.set.clone());
                writer.prepare_snapshot(&call, snapshot)?;
            }
            EventKind::Freeze(freeze) => {
                self.open.insert(freeze.set.clone());
                // From before the call: what the call takes is part of the hold.
                let until = Instant::now() + Duration::from_millis(freeze.hold_ms);
                let evidence = writer.freeze(&call, freeze)?;
                if Instant::now() >= until {
                    // Nothing but this method's return could end it: the agent has given it up.
                    let late = "the freeze took longer than the hold may last";
                    writer.abort(&freeze.set, late);
                    return Err(Veto::timeout(late));
                }
                reply.evidence = evidence;
                self.hold = Some(Hold {
                    set: freeze.set.clone(),
                    generation: freeze.generation,
                    until,
                });
            }
            EventKind::Thaw(thaw) => {
                let hold = self.hold.take();
                let said = writer.thaw(&call, thaw)?;
                // A hold that the library ended was none, whatever the application believes.
                let in_time = hold.is_some_and(|hold| {
                    hold.generation == thaw.generation && Instant::now() <= hold.until
                });
                reply.held = Some(said.held && in_time);
                reply.evidence = said.evidence;
            }
            EventKind::PostSnapshot(snapshot) => {
                self.open.remove(&snapshot.set);
                self.copied.insert(snapshot.set.clone());
                reply.components = writer.post_snapshot(&call, snapshot)?;
            }
            EventKind::BackupComplete(outcome) => {
                self.copied.remove(&outcome.set);
                writer.backup_complete(&call, outcome)?;
            }
            EventKind::BackupShutdown(shutdown) => {
                self.copied.remove(&shutdown.set);
                writer.backup_shutdown(shutdown)?;
            }
            EventKind::Abort(abort) => {
                self.hold.take_if(|hold| hold.set == abort.set);
                self.open.remove(&abort.set);
                self.copied.remove(&abort.set);
                writer.abort(&abort.set, &abort.reason);
            }
            EventKind::PreRestore(restore) => {
                self.open.insert(restore.set.clone());
                reply.components = writer.pre_restore(&call, restore)?;
            }
            EventKind::PostRestore(restore) => {
                self.open.remove(&restore.set);
                reply.components = writer.post_restore(&call, restore)?;
            }
        }
        Ok(())
    }
}

/// The connection: lines in and out.
pub(super) struct Wire<'a> {
    stream: &'a UnixStream,
    input: RefCell<Input>,
}

#[derive(Default)]
struct Input {
    lines: Lines,
    ready: VecDeque<Vec<u8>>,
    is_over: bool,
}

impl<'a> Wire<'a> {
    fn new(stream: &'a UnixStream) -> Self {
        Self {
            stream,
            input: RefCell::default(),
        }
    }

    fn send(&self, message: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(message).map_err(io::Error::from)?;
        line.push(b'\n');
        let mut stream = self.stream;
        stream.write_all(&line)
    }

    /// One that is longer than a line would end the connection, and nobody would know why.
    fn reply(&self, reply: Reply) -> io::Result<()> {
        let bytes = serde_json::to_vec(&reply).map_or(usize::MAX, |line| line.len());
        if bytes < MESSAGE_BYTES_MAX {
            return self.send(&reply);
        }
        self.send(&Reply {
            ok: false,
            code: Some(WriterFailure::Outofresources),
            message: format!("its answer of {bytes} bytes is longer than a line"),
            ..Reply::agrees(reply.seq)
        })
    }

    pub(super) fn progress(&self, seq: u64, what: &str) {
        let progress = what.to_owned();
        // A connection that is gone is noticed by whoever reads next.
        self.send(&Progress { seq, progress }).unwrap_or(());
    }

    /// The agent has sent something more, or has gone. Never waits.
    pub(super) fn has_more(&self) -> bool {
        let mut input = self.input.borrow_mut();
        if self.stream.set_nonblocking(true).is_err() {
            return true;
        }
        while input.ready.is_empty() && !input.is_over {
            match input.read(self.stream) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_passing(&error) => break,
                Err(_) => input.is_over = true,
            }
        }
        let is_blocking = self.stream.set_nonblocking(false).is_ok();
        !is_blocking || input.is_over || !input.ready.is_empty()
    }

    /// The next line, or `None` when it is `until`.
    fn next(&self, until: Option<Instant>) -> Result<Option<Vec<u8>>, Ended> {
        let mut input = self.input.borrow_mut();
        loop {
            if let Some(line) = input.ready.pop_front() {
                return Ok(Some(line));
            }
            if input.is_over {
                return Err(Ended::Gone);
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            self.stream.set_read_timeout(left)?;
            match input.read(self.stream) {
                Ok(()) => {}
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Input {
    fn read(&mut self, mut stream: &UnixStream) -> io::Result<()> {
        let mut buffer = [0; 4096];
        let count = stream.read(&mut buffer)?;
        let (ready, is_over) = (&mut self.ready, &mut self.is_over);
        if count == 0 {
            *is_over = true;
        }
        self.lines.take(
            buffer.get(..count).unwrap_or_default(),
            |piece| match piece {
                Piece::Line(line) => ready.push_back(line),
                Piece::Reset | Piece::TooLong => *is_over = true,
            },
        );
        Ok(())
    }
}

/// A read that timed out or was interrupted may be tried again.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}
