//! Writers that are connected: the Unix socket, one connection and one reading thread for each.
//!
//! Started by `agent`. A connection is a registration; when it ends, the writer is gone, and `quiesce` is told. Invariants: only
//! root and users that an allow file names become writers; a writer that does not read or sends garbage loses its connection;
//! sending never waits.
#![deny(clippy::indexing_slicing)]

use super::registry::{CONNECTED_MAX, Registry};
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
use std::collections::VecDeque;
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Time for the registration.
const REGISTRATION: Duration = Duration::from_secs(5);
/// Connections that may be registering while all places are taken.
const SPARE: usize = 16;
/// Longest id or name, bytes.
pub(crate) const NAME_BYTES_MAX: usize = 256;
const STACK_BYTES: usize = 256 * 1024;

/// Listens at `path` on a thread of its own. Everybody may connect; [`is_allowed`] decides.
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
    let count = Arc::new(AtomicUsize::new(0));
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
            if count.fetch_add(1, Ordering::SeqCst) >= CONNECTED_MAX + SPARE {
                count.fetch_sub(1, Ordering::SeqCst);
                refuse(&stream, "there are too many connections");
                continue;
            }
            let (registry, service) = (Arc::clone(&registry), service.clone());
            let (allow_dir, of_thread) = (allow_dir.clone(), Arc::clone(&count));
            let started = thread::Builder::new()
                .name("writer".into())
                .stack_size(STACK_BYTES)
                .spawn(move || {
                    serve(stream, &allow_dir, &registry, &service);
                    of_thread.fetch_sub(1, Ordering::SeqCst);
                });
            if started.is_err() {
                count.fetch_sub(1, Ordering::SeqCst);
            }
        }
    };
    thread::Builder::new()
        .name("writers".into())
        .spawn(accept)
        .map(drop)
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
    gone: bool,
}

impl Connected {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reply(&self, reply: Reply) {
        let mut pending = self.lock();
        // An answer to an event that has been replaced since is nobody's.
        let answer = pending.answer.take_if(|(seq, _)| *seq == reply.seq);
        drop(pending);
        if let Some((_, answer)) = answer {
            answer(Ok(reply));
        }
    }

    fn is_asked(&self, seq: u64) -> bool {
        let pending = self.lock();
        pending
            .answer
            .as_ref()
            .is_some_and(|(asked, _)| *asked == seq)
    }

    fn hang_up(&self) {
        let mut pending = self.lock();
        pending.gone = true;
        let answer = pending.answer.take();
        drop(pending);
        if let Some((_, answer)) = answer {
            answer(Err(gone()));
        }
    }
}

fn gone() -> guest_agent_wire::host::Failure {
    failure(WriterFailure::NotResponding, "it hung up")
}

impl Writer for Connected {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn begin(&self, kind: EventKind, deadline_ms: u64, answer: Answer) {
        let mut pending = self.lock();
        if pending.gone {
            drop(pending);
            answer(Err(gone()));
            return;
        }
        pending.seq += 1;
        let event = Event {
            seq: pending.seq,
            deadline_ms,
            kind,
        };
        pending.answer = Some((event.seq, answer));
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

fn refuse(stream: &UnixStream, why: &str) {
    journal::note(format_args!("refused a writer: {why}"));
    // It may be gone already.
    let _told: bool = welcome(stream, Some(why));
}

fn serve(stream: UnixStream, allow_dir: &Path, registry: &Registry, service: &Service) {
    let mut reader = Reader::default();
    stream.set_read_timeout(Some(REGISTRATION)).unwrap_or(());
    let Some(line) = reader.next(&stream) else {
        refuse(&stream, "no registration came");
        return;
    };
    let identity = match register(&line, &stream, allow_dir) {
        Ok(identity) => identity,
        Err(why) => {
            refuse(&stream, &why);
            return;
        }
    };
    let Ok(write_half) = stream.try_clone() else {
        refuse(&stream, "there are no descriptors left");
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
        refuse(&stream, &why.to_string());
        return;
    }
    let name = &identity.name;
    journal::note(format_args!("writer {name} registered"));
    stream.set_read_timeout(None).unwrap_or(());
    while let Some(line) = reader.next(&stream) {
        match serde_json::from_slice(&line) {
            Ok(FromWriter::Reply(reply)) => writer.reply(reply),
            Ok(FromWriter::Progress(progress)) => {
                // One on an event that has been replaced since would give time to another.
                if writer.is_asked(progress.seq) {
                    service.send(Signal::WriterProgress {
                        instance_id: identity.instance_id.clone(),
                    });
                }
            }
            Ok(FromWriter::Release(release)) => service.send(Signal::WriterReleased {
                instance_id: identity.instance_id.clone(),
                generation: release.generation,
                why: release.release,
            }),
            Err(error) => {
                journal::note(format_args!("writer {name} sent garbage: {error}"));
                break;
            }
        }
    }
    writer.hang_up();
    // Told before its id is free: what is said of this connection must not hit the next one of that name.
    service.send(Signal::WriterGone {
        instance_id: identity.instance_id.clone(),
    });
    registry.remove(&identity);
    journal::note(format_args!("writer {name} hung up"));
}

/// Reads lines from a blocking stream.
#[derive(Default)]
struct Reader {
    lines: Lines,
    ready: VecDeque<Vec<u8>>,
    broken: bool,
}

impl Reader {
    /// The next line; `None` at the end, after a time-out, or after a line that is too long.
    fn next(&mut self, mut stream: &UnixStream) -> Option<Vec<u8>> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(line) = self.ready.pop_front() {
                return Some(line);
            }
            if self.broken {
                return None;
            }
            let count = match stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return None,
            };
            let (lines, ready, broken) = (&mut self.lines, &mut self.ready, &mut self.broken);
            lines.take(
                buffer.get(..count).unwrap_or_default(),
                |piece| match piece {
                    Piece::Line(line) => ready.push_back(line),
                    Piece::Reset | Piece::TooLong => *broken = true,
                },
            );
        }
    }
}

fn register(line: &[u8], stream: &UnixStream, allow_dir: &Path) -> Result<Identity, String> {
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
    let peer = socket_peercred(stream).map_err(|error| format!("peer: {error}"))?;
    let uid = peer.uid.as_raw();
    if uid != 0 && !is_allowed(allow_dir, &registration.class_id, uid) {
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

/// True if a `*.conf` of the directory has a line `CLASS_ID = USER`: a number, or a name of `/etc/passwd`. Files that others
/// than root can change are not read.
#[must_use]
pub fn is_allowed(allow_dir: &Path, class_id: &str, uid: u32) -> bool {
    // Read anew each time: a package's user may come after the agent.
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    is_allowed_among(&passwd, allow_dir, class_id, uid)
}

fn is_allowed_among(passwd: &str, allow_dir: &Path, class_id: &str, uid: u32) -> bool {
    let Ok(entries) = fs::read_dir(allow_dir) else {
        return false;
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    files
        .iter()
        .filter(|file| {
            file.extension()
                .is_some_and(|extension| extension == "conf")
        })
        .filter(|file| is_roots_alone(file))
        .filter_map(|file| fs::read_to_string(file).ok())
        .any(|text| {
            text.lines()
                .filter(|line| !line.trim_start().starts_with('#'))
                .filter_map(|line| line.rsplit_once('='))
                .any(|(class, user)| {
                    class.trim() == class_id && number(passwd, user.trim()) == Some(uid)
                })
        })
}

/// A user's number. A word of digits is one, whoever bears it as a name.
fn number(passwd: &str, user: &str) -> Option<u32> {
    if user.is_empty() || user.bytes().all(|byte| byte.is_ascii_digit()) {
        return user.parse().ok();
    }
    let mut accounts = passwd.lines().map(|line| line.split(':'));
    let mut account = accounts.find_map(|mut fields| (fields.next()? == user).then_some(fields))?;
    account.nth(1)?.parse().ok()
}

fn is_roots_alone(file: &Path) -> bool {
    fs::symlink_metadata(file)
        .is_ok_and(|stat| stat.is_file() && stat.uid() == 0 && stat.mode() & 0o022 == 0)
}

#[cfg(test)]
mod tests {
    //! Who may be a writer.
    use super::*;

    #[test]
    fn a_user_is_a_writer_only_of_the_class_that_an_allow_file_names() {
        if !rustix::process::getuid().is_root() {
            eprintln!("skipped: allow files must belong to root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.conf");
        fs::write(
            &file,
            "# people\npostgres = 70\n\nweb=33\ndb = ann\ndb = 0\ndb =\n",
        )
        .unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(is_allowed(dir.path(), "postgres", 70));
        assert!(!is_allowed(dir.path(), "postgres", 33));
        assert!(!is_allowed(dir.path(), "mysql", 70));
        let among = |passwd: &str, uid| is_allowed_among(passwd, dir.path(), "db", uid);
        let passwd = "root:x:0:0::/:/bin/sh\nann:x:1000:1001::/:/bin/sh\n70:x:5:5::/:/bin/sh\n";
        assert!(among(passwd, 1000) && among(passwd, 0));
        assert!(!among(passwd, 1001) && !among("annette:x:1000:1::/:\n", 1000));
        assert!(!among("ann\nann:x\n", 1000));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o664)).unwrap();
        assert!(!is_allowed(dir.path(), "postgres", 70));
        fs::rename(&file, dir.path().join("a.conf.bak")).unwrap();
        assert!(!is_allowed(dir.path(), "postgres", 70));
    }
}
