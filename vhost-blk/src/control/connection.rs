//! One client of the control socket.
//!
//! Started by `server`. Reads a stream of JSON values and the descriptors that come with them, runs one command at a time on
//! a thread that may block, answers in order, passes events on, and undoes what the client leaves behind.
//!
//! Invariants: while a command runs the connection is still read, so that a client that goes away is noticed at once and
//! its open sets are undone; at most [`COMMANDS_MAX`] commands and [`DESCRIPTORS_MAX`] descriptors wait.

use super::events::Events;
use super::handler;
use crate::engine::{MarkId, OwnerId, SnapshotSets, VolumeEngine};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::Value;
use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use vhost_blk_wire::frame::JsonStream;
use vhost_blk_wire::qmp::{
    ErrorClass, Greeting, GreetingBody, QmpError, Request, ServerMessage, VersionInfo,
    VersionTriple,
};

/// Commands that may wait behind the running one. More are not read meanwhile.
const COMMANDS_MAX: usize = 64;
/// Descriptors that may wait for their `getfd`.
const DESCRIPTORS_MAX: usize = 16;

/// What all connections share.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) sets: Arc<SnapshotSets>,
    pub(super) events: Events,
    /// Where a hand-over is told to the daemon.
    hand_over: mpsc::Sender<std::os::unix::net::UnixStream>,
    next_number: AtomicU64,
}

impl Server {
    pub(super) fn new(
        sets: Arc<SnapshotSets>,
        events: Events,
        hand_over: mpsc::Sender<std::os::unix::net::UnixStream>,
    ) -> Self {
        Self {
            sets,
            events,
            hand_over,
            next_number: AtomicU64::new(1),
        }
    }

    /// Tells the daemon to hand over to who is at the other end; false if it does so already.
    pub(super) fn begin_hand_over(&self, to: std::os::unix::net::UnixStream) -> bool {
        self.hand_over.try_send(to).is_ok()
    }

    /// A number that was not given before: of a connection, a mark, a job.
    pub(super) fn next_number(&self) -> u64 {
        self.next_number.fetch_add(1, Ordering::Relaxed)
    }
}

/// What belongs to one client.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) server: Arc<Server>,
    pub(super) owner: OwnerId,
    negotiated: AtomicBool,
    /// The client has gone: long jobs give up.
    pub(super) gone: AtomicBool,
    /// Descriptors that came and have no name yet.
    arrived: Mutex<VecDeque<OwnedFd>>,
    /// Descriptors by name.
    named: Mutex<HashMap<String, OwnedFd>>,
    marks: Mutex<HashMap<u64, (Arc<VolumeEngine>, MarkId)>>,
}

impl Client {
    fn new(server: Arc<Server>) -> Arc<Self> {
        Arc::new(Self {
            owner: OwnerId(server.next_number()),
            server,
            negotiated: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            arrived: Mutex::new(VecDeque::new()),
            named: Mutex::new(HashMap::new()),
            marks: Mutex::new(HashMap::new()),
        })
    }

    pub(super) fn has_negotiated(&self) -> bool {
        self.negotiated.load(Ordering::SeqCst)
    }

    pub(super) fn negotiate(&self) {
        self.negotiated.store(true, Ordering::SeqCst);
    }

    /// The oldest descriptor that has no name yet.
    pub(super) fn take_arrived(&self) -> Option<OwnedFd> {
        lock(&self.arrived).pop_front()
    }

    pub(super) fn named(&self) -> MutexGuard<'_, HashMap<String, OwnedFd>> {
        lock(&self.named)
    }

    pub(super) fn marks(&self) -> MutexGuard<'_, HashMap<u64, (Arc<VolumeEngine>, MarkId)>> {
        lock(&self.marks)
    }

    /// Undoes what the client leaves behind.
    fn leave(&self) {
        self.gone.store(true, Ordering::SeqCst);
        for (_, (volume, mark)) in self.marks().drain() {
            volume.witness.unmark(mark);
        }
        self.server.sets.owner_gone(self.owner);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells a client of another user why, as far as its buffer takes it.
pub(super) fn refuse(stream: &UnixStream) {
    let refusal = ServerMessage::Error {
        error: QmpError::new(
            ErrorClass::AccessDenied,
            "this socket is for the daemon's user and root",
        ),
        id: None,
    };
    if let Ok(line) = line(&refusal) {
        // The client may be gone, or not reading: it is turned away all the same.
        drop(stream.try_write(line.as_bytes()));
    }
}

/// Serves a client until it goes.
pub(super) async fn run(stream: UnixStream, server: Arc<Server>) {
    let client = Client::new(server);
    tracing::debug!(client = ?client.owner, "connected");
    if let Err(error) = converse(stream, &client).await {
        tracing::debug!(client = ?client.owner, %error, "a control connection ended");
    }
    // Undoing writes to disks, so it is done where blocking is allowed.
    if tokio::task::spawn_blocking(move || client.leave())
        .await
        .is_err()
    {
        tracing::error!("undoing the sets of a client that has gone has panicked");
    }
}

/// The version, as greeting and `query-version` tell it.
pub(super) fn version() -> VersionInfo {
    let number = |text: &str| text.parse().unwrap_or(0);
    VersionInfo {
        qemu: VersionTriple {
            major: number(env!("CARGO_PKG_VERSION_MAJOR")),
            minor: number(env!("CARGO_PKG_VERSION_MINOR")),
            micro: number(env!("CARGO_PKG_VERSION_PATCH")),
        },
        package: concat!("vhost-blk ", env!("CARGO_PKG_VERSION")).to_owned(),
    }
}

async fn converse(stream: UnixStream, client: &Arc<Client>) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let greeting = Greeting {
        qmp: GreetingBody {
            version: version(),
            capabilities: Vec::new(),
        },
    };
    writer.write_all(line(&greeting)?.as_bytes()).await?;
    let mut events = client.server.events.listen();
    let mut frames = JsonStream::new();
    let mut waiting: VecDeque<Value> = VecDeque::new();
    let mut running: Option<JoinHandle<ServerMessage>> = None;
    loop {
        if running.is_none()
            && let Some(value) = waiting.pop_front()
        {
            let client = Arc::clone(client);
            running = Some(tokio::task::spawn_blocking(move || answer(&client, value)));
        }
        tokio::select! {
            message = finished(&mut running) => {
                running = None;
                writer.write_all(line(&message)?.as_bytes()).await?;
            }
            ready = reader.readable(), if waiting.len() < COMMANDS_MAX => {
                ready?;
                if !receive(reader.as_ref(), client, &mut frames)? {
                    return Ok(());
                }
                loop {
                    match frames.next_value() {
                        Ok(Some(value)) => waiting.push_back(value),
                        Ok(None) => break,
                        Err(error) => return farewell(&mut writer, &error.to_string()).await,
                    }
                }
            }
            event = events.recv() => match event {
                Ok(event) if client.has_negotiated() => writer.write_all(event.as_bytes()).await?,
                Ok(_) => {}
                Err(RecvError::Lagged(count)) => tracing::warn!(count, "a slow client has lost events"),
                Err(RecvError::Closed) => return Ok(()),
            }
        }
    }
}

/// The running command's answer; never, if none runs.
async fn finished(running: &mut Option<JoinHandle<ServerMessage>>) -> ServerMessage {
    let Some(task) = running else {
        return std::future::pending().await;
    };
    task.await.unwrap_or_else(|_| ServerMessage::Error {
        error: QmpError::new(
            ErrorClass::GenericError,
            "the command has failed inside the daemon",
        ),
        id: None,
    })
}

/// Reads what is there. False at the end of the stream.
fn receive(stream: &UnixStream, client: &Client, frames: &mut JsonStream) -> io::Result<bool> {
    let mut bytes = [0_u8; 16 * 1024];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = stream.try_io(Interest::READABLE, || {
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        Ok(recvmsg(
            stream,
            &mut buffers,
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )?
        .bytes)
    });
    let length = match received {
        Ok(length) => length,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
        Err(error) => return Err(error),
    };
    let mut arrived = lock(&client.arrived);
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            // What has no room is closed by being dropped.
            let room = DESCRIPTORS_MAX.saturating_sub(arrived.len());
            arrived.extend(descriptors.take(room));
        }
    }
    drop(arrived);
    let Some(bytes) = bytes.get(..length).filter(|bytes| !bytes.is_empty()) else {
        return Ok(false);
    };
    frames.push(bytes).map_err(io::Error::other)?;
    Ok(true)
}

/// Runs one command.
fn answer(client: &Arc<Client>, value: Value) -> ServerMessage {
    let id = value.get("id").cloned();
    let result = serde_json::from_value::<Request>(value)
        .map_err(|error| QmpError::new(ErrorClass::GenericError, format!("not a command: {error}")))
        .and_then(|request| handler::execute(client, &request));
    match result {
        Ok(value) => ServerMessage::Return { value, id },
        Err(error) => ServerMessage::Error { error, id },
    }
}

async fn farewell(writer: &mut OwnedWriteHalf, why: &str) -> io::Result<()> {
    let error = QmpError::new(ErrorClass::GenericError, why);
    writer
        .write_all(line(&ServerMessage::Error { error, id: None })?.as_bytes())
        .await
}

/// A message as it goes over the wire.
fn line(message: &impl serde::Serialize) -> io::Result<String> {
    Ok(format!("{}\r\n", serde_json::to_string(message)?))
}
