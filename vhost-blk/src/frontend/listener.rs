//! The socket of one volume: one front end at a time, on a listener that is kept.
//!
//! Called by the daemon, on a thread per volume. Knows vhost-user only as far as a connection begins and ends.
//!
//! Invariants:
//! * The crate's object serves one connection only ("already claimed" otherwise), so each gets a new one.
//! * A front end that goes away without a word is drained before the next is accepted: no I/O of the old one is in flight
//!   when the new one starts.
//! * A second front end is turned away at once; it would hang in its connect otherwise.

use super::device::{Device, Memory};
use crate::engine::{Kick, VolumeEngine};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

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

/// Serves one front end after the other until `stop` is woken.
///
/// # Errors
/// If the listener itself fails.
pub fn serve(
    volume: &Arc<VolumeEngine>,
    listener: &UnixListener,
    num_queues: u16,
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
        let ended = connection(volume, listener, num_queues, stop);
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
    num_queues: u16,
    stop: &Kick,
) -> io::Result<Option<Served>> {
    let name = &volume.settings.name;
    let memory = Memory::new(GuestMemoryMmap::new());
    let device = Arc::new(Device::new(Arc::clone(volume), memory.clone(), num_queues)?);
    let mut daemon = VhostUserDaemon::new(format!("vhost {name}"), Arc::clone(&device), memory)
        .map_err(crate_error)?;
    let event = u64::from(device.kick_event());
    for (handler, kick) in daemon.get_epoll_handlers().iter().zip(device.kicks()) {
        handler.register_listener(kick.as_raw_fd(), EventSet::IN, event)?;
    }
    daemon
        .start(&mut Listener::from(listener.try_clone()?))
        .map_err(crate_error)?;
    tracing::info!(volume = %name, queues = num_queues, "front end connected");

    let over = Arc::new(Kick::new()?);
    let hang_up = daemon.shutdown_handle();
    let waiter = {
        let over = Arc::clone(&over);
        std::thread::Builder::new()
            .name(format!("wait {name}"))
            .spawn(move || {
                let result = daemon.wait();
                over.wake();
                (daemon, result)
            })?
    };
    let mut stopping = None;
    loop {
        match wait(listener, stop, Some(&over))? {
            Woken::Over => break,
            Woken::Stop => {
                stopping = Some(Served::Stopped);
                if let Some(hang_up) = &hang_up {
                    hang_up.shutdown();
                }
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
    let (daemon, result) = waiter
        .join()
        .map_err(|_| io::Error::other("a thread has panicked"))?;
    match result {
        Ok(()) => tracing::info!(volume = %name, "front end disconnected"),
        Err(error) => tracing::info!(volume = %name, %error, "front end disconnected"),
    }
    // The queues' threads still run: they wait for their I/O. Then the crate may drop them.
    device.settle();
    drop(daemon);
    for fd in device.take_exit_fds() {
        close_leaked(fd);
    }
    Ok(stopping)
}

/// The crate's error carries what cannot be shared between threads, so only its text goes on.
#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn crate_error(error: vhost_user_backend::Error) -> io::Error {
    io::Error::other(error.to_string())
}

/// Closes an event descriptor that the vhost-user-backend crate has turned into a number and forgotten
/// (`VringEpollHandler::new`).
#[allow(
    unsafe_code,
    reason = "the crate hands the descriptor's number out and drops its owner"
)]
fn close_leaked(fd: RawFd) {
    // SAFETY: the crate took the descriptor out of its owner with `into_raw_fd`; its event loop, the only other user of the
    // number, was dropped and its thread joined.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
}

/// Takes a second front end's connection and closes it.
fn refuse(volume: &VolumeEngine, listener: &UnixListener) -> io::Result<()> {
    let (connection, _) = listener.accept()?;
    drop(connection);
    tracing::warn!(volume = %volume.settings.name, "a second front end was turned away");
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
