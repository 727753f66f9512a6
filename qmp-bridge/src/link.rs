//! One connection to a peer that answers numbered calls and says other things unasked.
//!
//! Used by `qmp` (QEMU, vhost-blk, the bridge's own socket) and by `guest` (the agent). It knows neither protocol: a
//! [`Decode`] turns bytes into [`Incoming`].
//!
//! Invariants: a connection on which a call has timed out is closed, because nobody knows what the peer will still do or
//! say; dropping a call's future never leaves half a message on the wire, since one task owns the socket; an answer that
//! nobody waits for is dropped.

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;
use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::AbortHandle;

/// Unasked messages that are kept for a slow subscriber before he is told that he lost some.
const UNASKED_KEPT: usize = 1024;

/// What a peer has said.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// The answer to a call: what succeeded, or the error object.
    Answer {
        /// The call's number.
        id: u64,
        /// Return value or error object.
        result: Result<Value, Value>,
    },
    /// Anything else (greeting, event).
    Unasked(Value),
}

/// Turns bytes into messages.
pub(crate) trait Decode: Send + 'static {
    /// Takes bytes, gives the messages that are complete.
    ///
    /// # Errors
    /// The stream cannot be followed any further; the connection is closed with this text.
    fn decode(&mut self, bytes: &[u8]) -> Result<Vec<Incoming>, String>;

    /// A call goes out: the peer has one more answer to give.
    fn asked(&mut self) {}
}

/// Why a call has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The peer did not answer in time; the connection is closed.
    #[error("no answer within {limit_ms} ms")]
    Deadline {
        /// The limit.
        limit_ms: u128,
    },
    /// The connection is gone.
    #[error("connection lost: {why}")]
    Closed {
        /// How.
        why: String,
    },
    /// Nobody listens there: the peer does not run.
    #[error("connect: {why}")]
    Absent {
        /// What the system says.
        why: String,
    },
    /// The peer says what it must not: it would do so on another connection too.
    #[error("connection given up: {why}")]
    Unreadable {
        /// What.
        why: String,
    },
}

struct Outgoing {
    bytes: Vec<u8>,
    fd: Option<OwnedFd>,
}

type Answer = Result<Value, Value>;

#[derive(Default)]
struct Pending {
    calls: HashMap<u64, oneshot::Sender<Answer>>,
    closed: Option<LinkError>,
}

/// A connected stream socket. tokio's type for Unix sockets reads and writes one of any family.
pub(crate) type Stream = UnixStream;

/// The connection. Dropping it closes it.
pub(crate) struct Link {
    outgoing: mpsc::UnboundedSender<Outgoing>,
    pending: Arc<Mutex<Pending>>,
    unasked: broadcast::WeakSender<Value>,
    next_id: AtomicU64,
    task: AbortHandle,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").finish_non_exhaustive()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Link {
    /// Takes over a stream. `first_id` numbers the first call. The receiver gets every unasked message from the first byte
    /// on.
    pub(crate) fn new(
        stream: Stream,
        decoder: impl Decode,
        first_id: u64,
    ) -> (Self, broadcast::Receiver<Value>) {
        let (outgoing, queue) = mpsc::unbounded_channel();
        let (unasked, receiver) = broadcast::channel(UNASKED_KEPT);
        let pending = Arc::new(Mutex::new(Pending::default()));
        // Only the task holds the sender: when it ends, every receiver sees the end.
        let weak = unasked.downgrade();
        let run = run(stream, decoder, queue, Arc::clone(&pending), unasked);
        let task = tokio::spawn(run).abort_handle();
        let link = Self {
            outgoing,
            pending,
            unasked: weak,
            next_id: AtomicU64::new(first_id),
            task,
        };
        (link, receiver)
    }

    /// A further receiver of what the peer says unasked from now on; it sees the end of the connection as its own end.
    pub(crate) fn subscribe(&self) -> broadcast::Receiver<Value> {
        match self.unasked.upgrade() {
            Some(sender) => sender.subscribe(),
            None => broadcast::channel(1).1,
        }
    }

    /// Why the connection is closed, if it is.
    pub(crate) fn closed(&self) -> Option<LinkError> {
        lock(&self.pending).closed.clone()
    }

    /// Closes the connection; calls under way fail with `why`.
    pub(crate) fn close(&self, why: &str) {
        self.task.abort();
        close(&self.pending, lost(why));
    }

    /// Sends a call and waits for its answer. `encode` gets the call's number. Without a limit it waits as long as the
    /// connection lives.
    pub(crate) async fn call(
        &self,
        encode: impl FnOnce(u64) -> Vec<u8>,
        fd: Option<OwnedFd>,
        limit: Option<Duration>,
    ) -> Result<Answer, LinkError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        {
            let mut pending = lock(&self.pending);
            if let Some(error) = &pending.closed {
                return Err(error.clone());
            }
            pending.calls.insert(id, sender);
        }
        let bytes = encode(id);
        // A send fails only when the task is gone; the receiver tells then.
        drop(self.outgoing.send(Outgoing { bytes, fd }));
        let answer = match limit {
            None => receiver.await,
            Some(limit) => match tokio::time::timeout(limit, receiver).await {
                Ok(answer) => answer,
                Err(_elapsed) => {
                    let limit_ms = limit.as_millis();
                    self.close(&format!("an earlier call had no answer in {limit_ms} ms"));
                    return Err(LinkError::Deadline { limit_ms });
                }
            },
        };
        answer.map_err(|_gone| self.closed().unwrap_or_else(|| lost("closed")))
    }
}

fn lock(pending: &Mutex<Pending>) -> MutexGuard<'_, Pending> {
    // Nothing panics while it is held, and a half-done insertion would do no harm.
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lost(why: impl ToString) -> LinkError {
    LinkError::Closed {
        why: why.to_string(),
    }
}

fn close(pending: &Mutex<Pending>, error: LinkError) {
    let mut pending = lock(pending);
    pending.closed.get_or_insert(error);
    // Dropping the senders wakes the callers.
    pending.calls.clear();
}

async fn run(
    stream: Stream,
    mut decoder: impl Decode,
    mut queue: mpsc::UnboundedReceiver<Outgoing>,
    pending: Arc<Mutex<Pending>>,
    unasked: broadcast::Sender<Value>,
) {
    let mut buffer = vec![0_u8; 64 * 1024];
    let error = loop {
        tokio::select! {
            read = read(&stream, &mut buffer) => {
                match read {
                    Ok(0) => break lost("the peer closed it"),
                    Ok(length) => {
                        let bytes = buffer.get(..length).unwrap_or_default();
                        match decoder.decode(bytes) {
                            Ok(messages) => {
                                for message in messages {
                                    deliver(message, &pending, &unasked);
                                }
                            }
                            Err(why) => break LinkError::Unreadable { why },
                        }
                    }
                    Err(error) => break lost(error),
                }
            }
            message = queue.recv() => {
                let Some(message) = message else { break lost("closed") };
                decoder.asked();
                if let Err(error) = send(&stream, &message).await {
                    break lost(error);
                }
            }
        }
    };
    close(&pending, error);
}

fn deliver(message: Incoming, pending: &Mutex<Pending>, unasked: &broadcast::Sender<Value>) {
    match message {
        Incoming::Answer { id, result } => {
            let call = lock(pending).calls.remove(&id);
            if let Some(call) = call {
                // The caller may have gone.
                drop(call.send(result));
            }
        }
        // Nobody has to be listening.
        Incoming::Unasked(value) => drop(unasked.send(value)),
    }
}

/// Bytes that are there, or waits for some. Nothing is lost when it is not waited for to its end.
pub(crate) async fn read(stream: &Stream, buffer: &mut [u8]) -> io::Result<usize> {
    let read = || rustix::io::read(stream, &mut *buffer).map_err(io::Error::from);
    stream.async_io(Interest::READABLE, read).await
}

/// Writes a message; a descriptor travels with its first byte.
async fn send(stream: &Stream, message: &Outgoing) -> io::Result<()> {
    let mut rest = message.bytes.as_slice();
    let mut fd = message.fd.as_ref();
    while !rest.is_empty() {
        let send = || match fd {
            None => rustix::net::send(stream, rest, SendFlags::NOSIGNAL).map_err(io::Error::from),
            Some(fd) => {
                let fds = [fd.as_fd()];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                    return Err(io::Error::other("no room for a descriptor"));
                }
                let bytes = [IoSlice::new(rest)];
                sendmsg(stream, &bytes, &mut control, SendFlags::NOSIGNAL).map_err(io::Error::from)
            }
        };
        let length = stream.async_io(Interest::WRITABLE, send).await?;
        fd = None;
        rest = rest.get(length..).unwrap_or_default();
    }
    Ok(())
}

/// Connects to a Unix socket.
pub(crate) async fn connect(path: &Path, limit: Duration) -> Result<Stream, LinkError> {
    match tokio::time::timeout(limit, UnixStream::connect(path)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => {
            use io::ErrorKind::{ConnectionRefused, NotFound};
            if [NotFound, ConnectionRefused].contains(&error.kind()) {
                let why = error.to_string();
                return Err(LinkError::Absent { why });
            }
            Err(lost(format_args!("connect: {error}")))
        }
        Err(_elapsed) => Err(LinkError::Deadline {
            limit_ms: limit.as_millis(),
        }),
    }
}
