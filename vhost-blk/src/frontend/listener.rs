//! The socket of one volume: one front end at a time, on a listener that is kept.
//!
//! Called by the daemon, on a thread per volume. Knows vhost-user only as far as a connection begins and ends.
//!
//! Invariants:
//! * A front end that goes away without a word is drained before the next is accepted: no I/O of the old one is in flight
//!   when the new one starts.
//! * A second front end is turned away at once, and told of on the control socket; it would hang in its connect otherwise.
//! * When the daemon stops, what is done is published before the front end is hung up on: from then on it counts by itself.

use super::back_channel;
use super::handler::Handler;
use super::handover::Session;
use crate::engine::{Kick, VolumeEngine};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::DupFlags;
use std::io::{self, Write};
use std::mem::ManuallyDrop;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use vhost::vhost_user::{BackendReqHandler, Error};
use vhost_blk_wire::event::Event as WireEvent;

/// A front end that reconnects may be seen before its old connection is known to be over.
const HANG_UP_GRACE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 300_000_000,
};

/// Why a socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process listens on it.
    #[error("{0}: another process is listening on this socket")]
    InUse(PathBuf),
    /// Something that is not a socket has this name.
    #[error("{0}: exists and is not a socket")]
    NotASocket(PathBuf),
    /// Anything else.
    #[error("{path}: cannot listen")]
    Io {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// Listens on a Unix socket that only its owner may use. A socket that a dead process has left is replaced, a living one's
/// is not.
///
/// # Errors
/// [`SocketError`].
pub fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    let failed = |source| SocketError::Io {
        path: path.to_owned(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(found) if !std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => return Err(SocketError::InUse(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        },
    }
    // Bound under a name of our own and renamed when its mode is right, so that nobody can connect in between.
    let mut draft = path.as_os_str().to_owned();
    draft.push(format!(".{}", std::process::id()));
    let draft = PathBuf::from(draft);
    let listener = UnixListener::bind(&draft).map_err(failed)?;
    let owner_only = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(&draft, owner_only).map_err(failed)?;
    std::fs::rename(&draft, path).map_err(failed)?;
    Ok(listener)
}

/// Why [`serve`] came back.
#[derive(Debug)]
pub enum Served {
    /// The daemon is to stop.
    Stopped,
    /// Another process goes on with the session, if there is one.
    HandedOver(Option<Box<Session>>),
}

/// How front ends of a disk are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serving {
    /// Queues; a front end may use fewer.
    pub num_queues: u16,
    /// Longest time a queue's thread looks for work before it sleeps.
    pub poll_max: Duration,
}

/// Tells [`serve`] to come back.
#[derive(Debug)]
pub struct Ending {
    kick: Kick,
    is_hand_over: AtomicBool,
}

impl Ending {
    /// Not yet.
    ///
    /// # Errors
    /// Without descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            kick: Kick::new()?,
            is_hand_over: AtomicBool::new(false),
        })
    }

    /// Drain, hang up, come back.
    pub fn stop(&self) {
        self.kick.wake();
    }

    /// Stop the rings, keep the connection, come back with the session.
    pub fn hand_over(&self) {
        self.is_hand_over.store(true, Ordering::SeqCst);
        self.kick.wake();
    }
}

/// The two ends of a connection: who reads it, and what that sets.
struct Opened {
    connection: UnixStream,
    requests: BackendReqHandler<Mutex<Handler>>,
    handler: Arc<Mutex<Handler>>,
}

impl Opened {
    fn new(
        volume: &Arc<VolumeEngine>,
        serving: Serving,
        connection: UnixStream,
        requests: UnixStream,
    ) -> io::Result<Self> {
        let handler = Handler::new(Arc::clone(volume), serving, connection.try_clone()?)?;
        let handler = Arc::new(Mutex::new(handler));
        Ok(Self {
            connection,
            requests: BackendReqHandler::from_stream(requests, Arc::clone(&handler)),
            handler,
        })
    }
}

/// A session that was taken over; its rings do not run yet.
pub struct Resumed {
    opened: Opened,
    session: Session,
}

impl std::fmt::Debug for Resumed {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Resumed")
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}

impl Resumed {
    /// Maps the memory and sets everything the front end has said. Until the rings are started the session can still be left to who
    /// had it.
    ///
    /// # Errors
    /// If this daemon, or this volume, could not have got such a session from a front end.
    pub fn prepare(
        volume: &Arc<VolumeEngine>,
        serving: Serving,
        session: Session,
    ) -> io::Result<Self> {
        let bad = |error: Error| io::Error::other(error.to_string());
        // What was negotiated is said to the new endpoint on a connection of our own, which the front end's then replaces.
        let (ours, theirs) = UnixStream::pair()?;
        let mut opened = Opened::new(volume, serving, session.connection.try_clone()?, theirs)?;
        for message in session.negotiation() {
            (&ours).write_all(&message)?;
            opened.requests.handle_request().map_err(bad)?;
        }
        replace(&opened.requests, &session.connection)?;
        lock(&opened.handler).take_over(&session).map_err(bad)?;
        Ok(Self { opened, session })
    }

    fn start(self) -> Opened {
        if let Err(error) = lock(&self.opened.handler).start_taken_over(&self.session) {
            // The front end connects again and starts anew.
            tracing::error!(%error, "a session that was taken over does not start");
            hang_up(&self.opened.connection);
        }
        self.opened
    }
}

/// Puts another open file behind the number of the endpoint's descriptor.
#[allow(
    unsafe_code,
    reason = "the vhost crate has no way to exchange the connection of an endpoint"
)]
fn replace(
    requests: &BackendReqHandler<Mutex<Handler>>,
    connection: &UnixStream,
) -> io::Result<()> {
    // SAFETY: the endpoint owns the descriptor and lives; `ManuallyDrop` keeps this second owner from closing it.
    let place = unsafe { OwnedFd::from_raw_fd(requests.as_raw_fd()) };
    let mut place = ManuallyDrop::new(place);
    rustix::io::dup3(connection, &mut place, DupFlags::CLOEXEC)?;
    Ok(())
}

/// Serves one front end after the other until it is told to end, first the one that was `inherited`.
///
/// # Errors
/// If the listener itself fails.
pub fn serve(
    volume: &Arc<VolumeEngine>,
    listener: &UnixListener,
    serving: Serving,
    ending: &Ending,
    inherited: Option<Resumed>,
) -> io::Result<Served> {
    let mut inherited = inherited;
    loop {
        let resumed = inherited.take();
        if resumed.is_none() {
            match wait(listener, &ending.kick, None)? {
                Woken::Stop if ending.is_hand_over.load(Ordering::SeqCst) => {
                    return Ok(Served::HandedOver(None));
                }
                Woken::Stop => return Ok(Served::Stopped),
                Woken::Connection => {}
                Woken::Over | Woken::Nothing => continue,
            }
        }
        let Some(attached) = volume.attach() else {
            refuse(volume, listener)?;
            continue;
        };
        let opened = match resumed {
            Some(resumed) => Ok(resumed.start()),
            None => accept(volume, listener, serving),
        };
        let ended = opened.and_then(|opened| connection(volume, listener, ending, opened));
        drop(attached);
        match ended {
            Ok(Some(served)) => return Ok(served),
            Ok(None) => {}
            Err(error) => {
                tracing::error!(volume = %volume.settings.name, %error, "a connection failed");
            }
        }
    }
}

fn accept(
    volume: &Arc<VolumeEngine>,
    listener: &UnixListener,
    serving: Serving,
) -> io::Result<Opened> {
    let (connection, _) = listener.accept()?;
    let requests = connection.try_clone()?;
    tracing::info!(volume = %volume.settings.name, queues = serving.num_queues, "front end connected");
    Opened::new(volume, serving, connection, requests)
}

/// Serves one front end; `Some` if the daemon is to stop.
fn connection(
    volume: &Arc<VolumeEngine>,
    listener: &UnixListener,
    ending: &Ending,
    opened: Opened,
) -> io::Result<Option<Served>> {
    let name = &volume.settings.name;
    let Opened {
        connection,
        mut requests,
        handler,
    } = opened;
    let over = Arc::new(Kick::new()?);
    let told = WakeAtEnd(Arc::clone(&over));
    let quit = Arc::new(Kick::new()?);
    let reader = {
        let (connection, quit) = (connection.try_clone()?, Arc::clone(&quit));
        let reading = Arc::clone(&handler);
        std::thread::Builder::new()
            .name(format!("vhost {name}"))
            .spawn(move || {
                let _told = told;
                loop {
                    match is_readable(&connection, &quit) {
                        Ok(true) => {}
                        Ok(false) => return None,
                        Err(error) => return Some(Error::SocketError(error)),
                    }
                    let handled = match back_channel::take(&connection) {
                        Ok(None) => requests.handle_request(),
                        Ok(Some(offered)) => lock(&reading).take_back_channel(offered),
                        Err(error) => Err(Error::SocketError(error)),
                    };
                    if let Err(error) = handled {
                        return Some(error);
                    }
                }
            })?
    };
    let mut stopping = None;
    loop {
        match wait(listener, &ending.kick, Some(&over))? {
            Woken::Over => break,
            Woken::Stop if ending.is_hand_over.load(Ordering::SeqCst) => {
                // Nothing is read from the connection any more: what the front end says next is for who takes over.
                quit.wake();
                let read = reader.join();
                let session = match read {
                    Ok(None) => lock(&handler).hand_over().map(Box::new),
                    Ok(Some(error)) => Err(io::Error::other(error.to_string())),
                    Err(_) => Err(io::Error::other(
                        "the thread of the connection has panicked",
                    )),
                };
                let session = session.inspect_err(|error| {
                    // It connects again.
                    tracing::warn!(volume = %name, %error, "a session that cannot be handed over");
                    hang_up(&connection);
                });
                lock(&handler).settle();
                return Ok(Some(Served::HandedOver(session.ok())));
            }
            Woken::Stop => {
                stopping = Some(Served::Stopped);
                lock(&handler).close();
                break;
            }
            Woken::Connection => {
                let mut gone = [PollFd::new(&*over, PollFlags::IN)];
                if poll(&mut gone, Some(&HANG_UP_GRACE))? == 0 {
                    refuse(volume, listener)?;
                }
            }
            Woken::Nothing => {}
        }
    }
    // The reader may be waiting for the rest of a message, or for the next.
    hang_up(&connection);
    match reader.join() {
        Ok(None | Some(Error::Disconnected)) => {
            tracing::info!(volume = %name, "front end disconnected");
        }
        Ok(Some(error)) => tracing::warn!(volume = %name, %error, "front end disconnected"),
        Err(_) => tracing::error!(volume = %name, "the thread of a connection has panicked"),
    }
    // Settled before the queues' threads end with the handler.
    lock(&handler).settle();
    drop(handler);
    Ok(stopping)
}

fn hang_up(connection: &UnixStream) {
    if let Err(error) = connection.shutdown(Shutdown::Both) {
        tracing::debug!(%error, "the front end has gone already");
    }
}

/// Waits for a message; false if there is to be none.
fn is_readable(connection: &UnixStream, quit: &Kick) -> io::Result<bool> {
    let mut fds = [
        PollFd::new(quit, PollFlags::IN),
        PollFd::new(connection, PollFlags::IN),
    ];
    poll(&mut fds, None)?;
    let [quit, _] = fds;
    Ok(quit.revents().is_empty())
}

fn lock(handler: &Mutex<Handler>) -> std::sync::MutexGuard<'_, Handler> {
    handler.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wakes when it is dropped, so that a thread's end is seen however it ends.
struct WakeAtEnd(Arc<Kick>);

impl Drop for WakeAtEnd {
    fn drop(&mut self) {
        self.0.wake();
    }
}

/// Takes a second front end's connection and closes it.
fn refuse(volume: &VolumeEngine, listener: &UnixListener) -> io::Result<()> {
    let (connection, _) = listener.accept()?;
    drop(connection);
    tracing::warn!(volume = %volume.settings.name, "a second front end was turned away");
    volume.tell(WireEvent::FrontEndRefused {
        volume: volume.settings.name.clone(),
    });
    Ok(())
}

enum Woken {
    Connection,
    Stop,
    Over,
    Nothing,
}

fn wait(listener: &UnixListener, stop: &Kick, over: Option<&Kick>) -> io::Result<Woken> {
    let mut fds = vec![
        PollFd::new(stop, PollFlags::IN),
        PollFd::new(listener, PollFlags::IN),
    ];
    if let Some(over) = over {
        fds.push(PollFd::new(over, PollFlags::IN));
    }
    poll(&mut fds, None)?;
    let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    Ok(match ready.as_slice() {
        [true, ..] => Woken::Stop,
        [_, _, true] => Woken::Over,
        [_, true, ..] => Woken::Connection,
        _ => Woken::Nothing,
    })
}

/// `poll(2)`, again after a signal.
fn poll(fds: &mut [PollFd<'_>], timeout: Option<&Timespec>) -> io::Result<usize> {
    loop {
        match rustix::event::poll(fds, timeout) {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}
