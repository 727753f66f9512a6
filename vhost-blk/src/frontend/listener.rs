//! The socket of one volume: one front end at a time, on a listener that is kept.
//!
//! Called by the daemon, on a thread per volume. Knows vhost-user only as far as a connection begins and ends.
//!
//! Invariants:
//! * A front end that goes away without a word is drained before the next is accepted: no I/O of the old one is in flight
//!   when the new one starts.
//! * A second front end is turned away at once, and told of on the control socket; it would hang in its connect otherwise.
//! * When the daemon stops, what is done is published before the front end is hung up on: from then on it counts by itself.

use super::handler::Handler;
use crate::engine::{Kick, VolumeEngine};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::io;
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// The daemon is to stop.
    Stopped,
}

/// How front ends of a disk are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serving {
    /// Queues; a front end may use fewer.
    pub num_queues: u16,
    /// Longest time a queue's thread looks for work before it sleeps.
    pub poll_max: Duration,
}

/// Serves one front end after the other until `stop` is woken.
///
/// # Errors
/// If the listener itself fails.
pub fn serve(
    volume: &Arc<VolumeEngine>,
    listener: &UnixListener,
    serving: Serving,
    stop: &Kick,
) -> io::Result<Served> {
    loop {
        match wait(listener, stop, None)? {
            Woken::Stop => return Ok(Served::Stopped),
            Woken::Connection => {}
            Woken::Over | Woken::Nothing => continue,
        }
        let Some(attached) = volume.attach() else {
            refuse(volume, listener)?;
            continue;
        };
        let ended = connection(volume, listener, serving, stop);
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

/// Serves one front end; `Some` if the daemon is to stop.
fn connection(
    volume: &Arc<VolumeEngine>,
    listener: &UnixListener,
    serving: Serving,
    stop: &Kick,
) -> io::Result<Option<Served>> {
    let name = &volume.settings.name;
    let (stream, _) = listener.accept()?;
    let hang_up = stream.try_clone()?;
    let handler = Handler::new(Arc::clone(volume), serving, stream.try_clone()?)?;
    let handler = Arc::new(Mutex::new(handler));
    let mut requests = BackendReqHandler::from_stream(stream, Arc::clone(&handler));
    tracing::info!(volume = %name, queues = serving.num_queues, "front end connected");

    let over = Arc::new(Kick::new()?);
    let told = WakeAtEnd(Arc::clone(&over));
    let reader = std::thread::Builder::new()
        .name(format!("vhost {name}"))
        .spawn(move || {
            let _told = told;
            loop {
                if let Err(error) = requests.handle_request() {
                    return error;
                }
            }
        })?;
    let mut stopping = None;
    loop {
        match wait(listener, stop, Some(&over))? {
            Woken::Over => break,
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
    if let Err(error) = hang_up.shutdown(Shutdown::Both) {
        tracing::debug!(%error, "the front end has gone already");
    }
    match reader.join() {
        Ok(Error::Disconnected) => tracing::info!(volume = %name, "front end disconnected"),
        Ok(error) => tracing::warn!(volume = %name, %error, "front end disconnected"),
        Err(_) => tracing::error!(volume = %name, "the thread of a connection has panicked"),
    }
    // Settled before the queues' threads end with the handler.
    lock(&handler).settle();
    drop(handler);
    Ok(stopping)
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
