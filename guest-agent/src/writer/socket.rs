//! Writers that are connected: the Unix socket, one connection and one reading thread for each.
//!
//! Started by `agent`. A connection is a registration; when it ends, the writer is gone, and `quiesce` is told. Invariants: only
//! root and users that an allow file names become writers, and nobody else is read; a connection that does not say who it is
//! takes nobody's place (`places`); a writer that does not read, sends garbage or says too much (`pace`) loses its connection;
//! sending never waits.
#![deny(clippy::indexing_slicing)]

use super::allow::{is_allowed, is_writer};
use super::pace::{Pace, TOO_MUCH};
use super::places::{Place, Places, ROOT};
use super::registry::Registry;
use super::{Answer, Identity, Writer, failure};
use crate::journal;
use crate::quiesce::service::{Service, Signal};
use guest_agent_wire::host::WRITER_MS_MAX;
use guest_agent_wire::lines::{Lines, Piece};
use guest_agent_wire::types::WriterFailure;
use guest_agent_wire::writer::{
    Event, EventKind, FromWriter, PREPARE_MS_MAX, PROTOCOL, Registration, Reply, Welcome,
};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{SendFlags, Shutdown, send, shutdown};
use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Time for the registration, to its last byte.
const REGISTRATION: Duration = Duration::from_secs(5);
/// Longest registration, bytes.
const REGISTRATION_BYTES_MAX: usize = 16 << 10;
/// Events to which one reply each is still taken as asked for.
const UNANSWERED_MAX: usize = 16;
/// Longest id or name, bytes.
pub(crate) const NAME_BYTES_MAX: usize = 256;
const STACK_BYTES: usize = 256 * 1024;

/// Listens at `path` on a thread of its own. Everybody may connect; [`admit`] and [`register`] decide.
pub fn listen(
    path: &Path,
    allow_dir: &Path,
    registry: Arc<Registry>,
    service: Service,
) -> io::Result<()> {
    fs::remove_file(path).unwrap_or(());
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    let allow_dir = allow_dir.to_owned();
    let places = Arc::<Places>::default();
    let accept = move || {
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) => {
                    journal::note(format_args!("writer socket: {error}"));
                    thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            // Without a word: one that may well be a writer comes again.
            let Some(place) = admit(&stream, &places) else {
                continue;
            };
            let (registry, service) = (Arc::clone(&registry), service.clone());
            let allow_dir = allow_dir.clone();
            // A thread that does not start drops the connection and its place.
            thread::Builder::new()
                .name("writer".into())
                .stack_size(STACK_BYTES)
                .spawn(move || serve(stream, place, &allow_dir, &registry, &service))
                .map(drop)
                .unwrap_or(());
        }
    };
    thread::Builder::new()
        .name("writers".into())
        .spawn(accept)
        .map(drop)
}

/// A place for the user at the other end.
fn admit(stream: &UnixStream, places: &Arc<Places>) -> Option<Place> {
    let uid = socket_peercred(stream).ok()?.uid.as_raw();
    let place = places.take(uid);
    if place.is_none() && places.may_note() {
        journal::note(format_args!(
            "user {uid} has too many connections that are no writers yet"
        ));
    }
    place
}

/// A connected writer.
struct Connected {
    identity: Identity,
    stream: UnixStream,
    pending: Mutex<Pending>,
}

#[derive(Default)]
struct Pending {
    seq: u64,
    answer: Option<(u64, Answer)>,
    /// Events without a reply yet, also those that were replaced since: a reply may be on its way.
    unanswered: BTreeSet<u64>,
    /// Why it is gone.
    gone: Option<String>,
}

impl Connected {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a reply, which means nothing if its event has been replaced since; false if it is to nothing that was asked, or
    /// not the first one.
    fn reply(&self, reply: Reply) -> bool {
        let mut pending = self.lock();
        let answer = pending.answer.take_if(|(seq, _)| *seq == reply.seq);
        let was_asked = pending.unanswered.remove(&reply.seq);
        drop(pending);
        if let Some((_, answer)) = answer {
            answer(Ok(reply));
        }
        was_asked
    }

    fn is_asked(&self, seq: u64) -> bool {
        let pending = self.lock();
        pending
            .answer
            .as_ref()
            .is_some_and(|(asked, _)| *asked == seq)
    }

    fn hang_up(&self, why: &str) {
        let mut pending = self.lock();
        pending.gone = Some(why.to_owned());
        let answer = pending.answer.take();
        drop(pending);
        if let Some((_, answer)) = answer {
            answer(Err(failure(WriterFailure::NotResponding, why)));
        }
    }
}

impl Writer for Connected {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn begin(&self, kind: EventKind, deadline_ms: u64, answer: Answer) {
        let mut pending = self.lock();
        if let Some(why) = &pending.gone {
            let gone = failure(WriterFailure::NotResponding, why);
            drop(pending);
            answer(Err(gone));
            return;
        }
        pending.seq += 1;
        let event = Event {
            seq: pending.seq,
            deadline_ms,
            kind,
        };
        pending.answer = Some((event.seq, answer));
        pending.unanswered.insert(event.seq);
        if pending.unanswered.len() > UNANSWERED_MAX {
            pending.unanswered.pop_first();
        }
        drop(pending);
        if !send_line(&self.stream, &event) {
            // Half a line may be out, so this connection is of no more use; its thread says the rest.
            shutdown(&self.stream, Shutdown::Both).unwrap_or(());
        }
    }

    fn is_resident(&self) -> bool {
        true
    }
}

fn send_line(stream: &UnixStream, event: &Event) -> bool {
    let Ok(mut bytes) = serde_json::to_vec(event) else {
        return false;
    };
    bytes.push(b'\n');
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        match send(stream, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
    true
}

fn welcome(stream: &UnixStream, refused: Option<&str>) -> bool {
    send_line(
        stream,
        &Event {
            seq: 0,
            deadline_ms: 0,
            kind: EventKind::Welcome(Welcome {
                protocol: refused.is_none().then_some(PROTOCOL),
                refused: refused.map(str::to_owned),
            }),
        },
    )
}

fn refuse(stream: &UnixStream, place: &Place, why: &str) {
    if place.may_note() {
        journal::note(format_args!(
            "refused a writer of user {}: {why}",
            place.uid()
        ));
    }
    // It may be gone already.
    let _told: bool = welcome(stream, Some(why));
}

fn serve(
    stream: UnixStream,
    place: Place,
    allow_dir: &Path,
    registry: &Registry,
    service: &Service,
) {
    let mut reader = Reader::default();
    let identity = match registration(&stream, &mut reader, place.uid(), allow_dir) {
        Ok(identity) => identity,
        Err(why) => {
            refuse(&stream, &place, &why);
            return;
        }
    };
    let Ok(write_half) = stream.try_clone() else {
        refuse(&stream, &place, "there are no descriptors left");
        return;
    };
    let writer = Arc::new(Connected {
        identity: identity.clone(),
        stream: write_half,
        pending: Mutex::default(),
    });
    // Welcomed first, so that no event overtakes it.
    let added = registry.add_after(Arc::clone(&writer) as Arc<dyn Writer>, || {
        welcome(&stream, None)
    });
    if let Err(why) = added {
        refuse(&stream, &place, &why.to_string());
        return;
    }
    drop(place);
    let name = &identity.name;
    journal::note(format_args!("writer {name} registered"));
    let why = converse(&writer, &stream, &mut reader, service);
    writer.hang_up(&why);
    // Told before its id is free: what is said of this connection must not hit the next one of that name.
    service.send(Signal::WriterGone {
        instance_id: identity.instance_id.clone(),
        why: why.clone(),
    });
    registry.remove(&identity);
    journal::note(format_args!("writer {name}: {why}"));
}

/// Hears a writer until it is gone; why it is.
fn converse(
    writer: &Connected,
    stream: &UnixStream,
    reader: &mut Reader,
    service: &Service,
) -> String {
    let mut pace = Pace::default();
    while let Some(line) = reader.next(stream) {
        let is_answer = match serde_json::from_slice(&line) {
            Ok(said) => hear(writer, said, service),
            Err(error) => return hang_up_on(stream, &format!("it sent garbage: {error}")),
        };
        if !is_answer && !pace.takes(Instant::now(), line.len()) {
            return hang_up_on(stream, TOO_MUCH);
        }
    }
    "it hung up".to_owned()
}

fn hang_up_on(stream: &UnixStream, why: &str) -> String {
    // It may not read.
    let _told: bool = welcome(stream, Some(why));
    // The set that it is in keeps another descriptor of the connection.
    shutdown(stream, Shutdown::Both).unwrap_or(());
    format!("it was hung up on: {why}")
}

/// Passes on what a writer says; true if it was asked.
fn hear(writer: &Connected, said: FromWriter, service: &Service) -> bool {
    let instance_id = writer.identity.instance_id.clone();
    match said {
        FromWriter::Reply(reply) => return writer.reply(reply),
        FromWriter::Progress(progress) => {
            // One on an event that has been replaced since would give time to another.
            if writer.is_asked(progress.seq) {
                service.send(Signal::WriterProgress { instance_id });
            }
        }
        FromWriter::Release(release) => service.send(Signal::WriterReleased {
            instance_id,
            generation: release.generation,
            why: release.release,
        }),
    }
    false
}

/// Reads lines from a blocking stream.
#[derive(Default)]
struct Reader {
    lines: Lines,
    ready: VecDeque<Vec<u8>>,
    broken: bool,
}

impl Reader {
    /// The first line, if it is there in time and is not too long.
    fn first(&mut self, stream: &UnixStream) -> Option<Vec<u8>> {
        let until = Instant::now() + REGISTRATION;
        let mut read_bytes = 0;
        while self.ready.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.broken || read_bytes > REGISTRATION_BYTES_MAX {
                return None;
            }
            stream.set_read_timeout(Some(left)).ok()?;
            read_bytes += self.read(stream)?;
        }
        stream.set_read_timeout(None).ok()?;
        self.ready.pop_front()
    }

    /// The next line; `None` at the end, or after a line that is too long.
    fn next(&mut self, stream: &UnixStream) -> Option<Vec<u8>> {
        loop {
            if let Some(line) = self.ready.pop_front() {
                return Some(line);
            }
            if self.broken {
                return None;
            }
            self.read(stream)?;
        }
    }

    /// Reads once; how many bytes.
    fn read(&mut self, mut stream: &UnixStream) -> Option<usize> {
        let mut buffer = [0; 4096];
        let count = match stream.read(&mut buffer) {
            Ok(0) => return None,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Some(0),
            Err(_) => return None,
        };
        let (ready, broken) = (&mut self.ready, &mut self.broken);
        self.lines.take(
            buffer.get(..count).unwrap_or_default(),
            |piece| match piece {
                Piece::Line(line) => ready.push_back(line),
                Piece::Reset | Piece::TooLong => *broken = true,
            },
        );
        Some(count)
    }
}

/// Hears who a connection of this user is.
fn registration(
    stream: &UnixStream,
    reader: &mut Reader,
    uid: u32,
    allow_dir: &Path,
) -> Result<Identity, String> {
    // Before it has said anything, so that a stranger cannot wait in the place of a writer.
    if uid != ROOT && !is_writer(allow_dir, uid) {
        return Err(format!("user {uid} is not allowed to be a writer"));
    }
    let Some(line) = reader.first(stream) else {
        return Err("no registration came".to_owned());
    };
    register(&line, uid, allow_dir)
}

fn register(line: &[u8], uid: u32, allow_dir: &Path) -> Result<Identity, String> {
    let registration: Registration =
        serde_json::from_slice(line).map_err(|error| format!("registration: {error}"))?;
    if registration.protocol != PROTOCOL {
        return Err(format!("this agent speaks protocol {PROTOCOL}"));
    }
    for text in [
        &registration.class_id,
        &registration.instance_id,
        &registration.name,
    ] {
        if text.is_empty() || text.len() > NAME_BYTES_MAX || text.contains(char::is_control) {
            return Err(format!(
                "ids and name need 1 to {NAME_BYTES_MAX} bytes, and no control characters"
            ));
        }
    }
    if !(1..=WRITER_MS_MAX).contains(&registration.freeze_timeout_ms) {
        return Err(format!("freeze_timeout_ms must be 1 to {WRITER_MS_MAX}"));
    }
    if !(1..=PREPARE_MS_MAX).contains(&registration.prepare_timeout_ms) {
        return Err(format!("prepare_timeout_ms must be 1 to {PREPARE_MS_MAX}"));
    }
    if uid != ROOT && !is_allowed(allow_dir, &registration.class_id, uid) {
        return Err(format!(
            "user {uid} is not allowed to be a writer of class {}",
            registration.class_id
        ));
    }
    Ok(Identity {
        class_id: registration.class_id,
        instance_id: registration.instance_id,
        name: registration.name,
        level: registration.level,
        freeze_timeout_ms: registration.freeze_timeout_ms,
        prepare_timeout_ms: registration.prepare_timeout_ms,
        hold: registration.hold,
        uid,
    })
}
