//! Accepts clients of the control socket until the daemon is told to stop.
//!
//! Called by the daemon on its main thread. Knows nothing of commands.
//!
//! Who may connect: the socket's mode is 0600, and the peer has to be of our user or root (SO_PEERCRED), since a socket may have been handed
//! around.

use super::connection::{self, Server};
use super::events::Events;
use crate::engine::SnapshotSets;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use tokio::net::UnixStream;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGTERM and SIGINT.
#[derive(Debug)]
pub struct StopSignal {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignal {
    /// Catches both signals from now on. Needs to be called inside the runtime.
    ///
    /// # Errors
    /// If the handlers cannot be installed.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Why [`serve`] came back.
#[derive(Debug)]
pub enum Ended {
    /// A stop signal.
    Stopped,
    /// All disks are to go to the daemon at the other end.
    HandOver(std::os::unix::net::UnixStream),
}

/// Serves clients until a stop signal, or until a client asks for a hand-over. Without a listener only waits for the signal.
///
/// # Errors
/// If the listener cannot be used.
pub async fn serve(
    listener: Option<UnixListener>,
    sets: &Arc<SnapshotSets>,
    events: &Events,
    stop: &mut StopSignal,
) -> io::Result<Ended> {
    let Some(listener) = listener else {
        stop.wait().await;
        return Ok(Ended::Stopped);
    };
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let (hand_over, mut handed_over) = tokio::sync::mpsc::channel(1);
    let server = Arc::new(Server::new(Arc::clone(sets), events.clone(), hand_over));
    loop {
        tokio::select! {
            () = stop.wait() => return Ok(Ended::Stopped),
            Some(to) = handed_over.recv() => return Ok(Ended::HandOver(to)),
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if is_allowed(&stream) => {
                    tokio::spawn(connection::run(stream, Arc::clone(&server)));
                }
                Ok((stream, _)) => {
                    tracing::warn!(peer = ?stream.peer_cred(), "a client of another user was turned away");
                    connection::refuse(&stream);
                }
                Err(error) => {
                    // Out of descriptors, most likely: others will be closed.
                    tracing::warn!(%error, "cannot accept a control connection");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            },
        }
    }
}

fn is_allowed(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream
        .peer_cred()
        .is_ok_and(|peer| peer.uid() == own || peer.uid() == 0)
}
