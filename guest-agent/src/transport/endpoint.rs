//! Opens the port or the socket and hands out one conversation after another.

use super::{Outbox, vsock};
use crate::journal;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use std::io;
use std::num::ParseIntError;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// A port may come late (module loaded, hot-plugged), and a closed one gives no event when it opens: ask again after this.
const RETRY: Duration = Duration::from_millis(100);
/// How often a reading conversation looks whether its writing side has failed, milliseconds.
const CHECK_MS: i64 = 500;

/// Where the host is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A character device.
    Port(PathBuf),
    /// A Unix socket that the agent listens on; one client at a time.
    Listen(PathBuf),
    /// A vsock port that the agent listens on, for the host alone.
    Vsock(u32),
}

impl FromStr for Endpoint {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        if let Some(port) = text.strip_prefix("vsock:") {
            return Ok(Self::Vsock(port.parse()?));
        }
        Ok(match text.strip_prefix("unix:") {
            Some(path) => Self::Listen(path.into()),
            None => Self::Port(text.into()),
        })
    }
}

/// One conversation.
#[derive(Debug)]
pub struct Connection {
    fd: Arc<OwnedFd>,
    outbox: Outbox,
}

impl Connection {
    /// Reads what is there, or waits for it. `None` once the other side is gone, or does not read what is written to it.
    pub fn read(&self, buffer: &mut [u8]) -> Option<usize> {
        loop {
            if self.outbox.is_closed() {
                return None;
            }
            match rustix::io::read(&*self.fd, &mut *buffer) {
                Ok(0) => return None,
                Ok(count) => return Some(count),
                Err(Errno::AGAIN) => {
                    let mut polled = [PollFd::new(&*self.fd, PollFlags::IN)];
                    let limit = rustix::event::Timespec {
                        tv_sec: 0,
                        tv_nsec: CHECK_MS * 1_000_000,
                    };
                    // Woken or not: the next read tells.
                    poll(&mut polled, Some(&limit)).map(drop).unwrap_or(());
                }
                Err(Errno::INTR) => {}
                Err(_) => return None,
            }
        }
    }

    /// Where answers go.
    #[must_use]
    pub fn outbox(&self) -> Outbox {
        self.outbox.clone()
    }
}

/// Calls `converse` for each conversation, for ever. On vsock there may be several at a time, since a lost one may never end.
pub fn serve(endpoint: &Endpoint, converse: impl Fn(&Connection) + Sync) -> io::Error {
    match endpoint {
        Endpoint::Vsock(port) => vsock::serve(*port, &converse),
        Endpoint::Port(path) => {
            let mut said = None;
            loop {
                match open(
                    path,
                    OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY,
                    Mode::empty(),
                ) {
                    Ok(port) => {
                        said = None;
                        let port = Arc::new(port);
                        while wait_for_host(&port) {
                            talk(&port, &converse);
                        }
                    }
                    Err(error) => {
                        if said.replace(error) != Some(error) {
                            let path = path.display();
                            journal::note(format_args!("waiting for {path}: {error}"));
                        }
                        std::thread::sleep(RETRY);
                    }
                }
            }
        }
        Endpoint::Listen(path) => {
            // Left by an earlier agent; its directory belongs to us.
            std::fs::remove_file(path).unwrap_or(());
            let listener = match UnixListener::bind(path) {
                Ok(listener) => listener,
                Err(error) => return error,
            };
            loop {
                let (stream, _) = match listener.accept() {
                    Ok(accepted) => accepted,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return error,
                };
                if !may_speak(&stream) {
                    let path = path.display();
                    journal::note(format_args!("{path}: a stranger was turned away"));
                    continue;
                }
                if stream.set_nonblocking(true).is_ok() {
                    talk(&Arc::new(stream.into()), &converse);
                }
            }
        }
    }
}

pub(super) fn talk(fd: &Arc<OwnedFd>, converse: &impl Fn(&Connection)) {
    match Outbox::start(Arc::clone(fd)) {
        Ok(outbox) => {
            let connection = Connection {
                fd: Arc::clone(fd),
                outbox,
            };
            converse(&connection);
            connection.outbox.close();
        }
        Err(error) => {
            journal::note(format_args!("no thread for a conversation: {error}"));
            std::thread::sleep(RETRY);
        }
    }
}

/// Root, and the user that runs the agent.
fn may_speak(stream: &UnixStream) -> bool {
    socket_peercred(stream)
        .is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid())
}

/// Waits until the host has opened its side. False if the port itself is gone.
fn wait_for_host(port: &OwnedFd) -> bool {
    loop {
        let mut polled = [PollFd::new(port, PollFlags::IN)];
        if poll(&mut polled, None).is_err() {
            std::thread::sleep(RETRY);
            continue;
        }
        let [ref polled] = polled;
        let events = polled.revents();
        if events.intersects(PollFlags::ERR | PollFlags::NVAL) {
            return false;
        }
        if !events.contains(PollFlags::HUP) {
            return true;
        }
        // HUP for a closed host and for an unplugged port alike: the latter's node is gone.
        if rustix::fs::fstat(port.as_fd()).is_ok_and(|stat| stat.st_nlink == 0) {
            return false;
        }
        std::thread::sleep(RETRY);
    }
}
