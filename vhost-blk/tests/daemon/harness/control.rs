//! A client of the control socket, over the wire crate's own types.

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use uuid::Uuid;
use vhost_blk_wire::command::{
    Command, Empty, Getfd, QmpCapabilities, SnapshotRead, SnapshotSetAbort, SnapshotSetCommit,
    SnapshotSetCommitted, SnapshotSetKeep, SnapshotSetMark, SnapshotSetPrepare,
};
use vhost_blk_wire::frame::JsonStream;
use vhost_blk_wire::qmp::{QmpError, ServerMessage};
use vhost_blk_wire::types::Method;

/// A connection that has negotiated.
pub(crate) struct Control {
    stream: UnixStream,
    frames: JsonStream,
    pub(crate) events: VecDeque<(String, Value)>,
    /// Why [`Self::attempt`] got no answer.
    pub(crate) lost: Option<io::Error>,
}

impl Control {
    pub(crate) fn connect(socket: &Path) -> Self {
        let mut control = Self::greeted(socket);
        control.run(&QmpCapabilities::default()).unwrap();
        control
    }

    fn on(stream: UnixStream) -> Self {
        Self {
            stream,
            frames: JsonStream::new(),
            events: VecDeque::new(),
            lost: None,
        }
    }

    /// A connection to a daemon that may be killed at any moment: `None` if it was.
    pub(crate) fn try_connect(socket: &Path) -> Option<Self> {
        let stream = UnixStream::connect(socket).ok()?;
        let mut control = Self::on(stream);
        control.try_value().ok()?;
        control.attempt(&QmpCapabilities::default())?.unwrap();
        Some(control)
    }

    /// Runs a command of a daemon that may be killed at any moment: `None` if it was.
    pub(crate) fn attempt<C: Command>(
        &mut self,
        command: &C,
    ) -> Option<Result<C::Return, QmpError>> {
        let arguments = serde_json::to_value(command).unwrap();
        let text = json!({ "execute": C::NAME, "arguments": arguments, "id": 7 }).to_string();
        let sent = self.stream.write_all(text.as_bytes());
        let answer = sent.and_then(|()| self.try_answer());
        self.or_lost(answer)
    }

    fn or_lost<T>(&mut self, result: io::Result<T>) -> Option<T> {
        result.map_err(|error| self.lost = Some(error)).ok()
    }

    /// Waits for the answer of a daemon that may be killed: an error if it was.
    pub(crate) fn try_answer<T: DeserializeOwned>(&mut self) -> io::Result<Result<T, QmpError>> {
        loop {
            let value = self.try_value()?;
            match serde_json::from_value(value).unwrap() {
                ServerMessage::Return { value, .. } => {
                    return Ok(Ok(serde_json::from_value(value).unwrap()));
                }
                ServerMessage::Error { error, .. } => return Ok(Err(error)),
                ServerMessage::Event { .. } => {}
            }
        }
    }

    /// A snapshot's content, from a daemon that may be killed at any moment: `None` if it was.
    pub(crate) fn attempt_read(&mut self, snapshot: Uuid) -> Option<Result<Vec<u8>, QmpError>> {
        let mut file: File = tempfile::tempfile().unwrap();
        let sent = self.send_fd("out", &file);
        let named = sent.and_then(|()| self.try_answer::<Empty>());
        self.or_lost(named)?.unwrap();
        let command = SnapshotRead {
            snapshot,
            fdname: "out".to_owned(),
            range: None,
        };
        Some(self.attempt(&command)?.map(|done| {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes.len() as u64, done.length_bytes);
            bytes
        }))
    }

    /// A connection that has only read the greeting.
    pub(crate) fn greeted(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(super::PATIENCE)).unwrap();
        let mut control = Self::on(stream);
        let greeting = control.value();
        assert!(
            greeting["QMP"]["version"]["qemu"]["major"].is_number(),
            "{greeting}"
        );
        control
    }

    /// Sends bytes as they are.
    pub(crate) fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    /// Runs a command.
    pub(crate) fn run<C: Command>(&mut self, command: &C) -> Result<C::Return, QmpError> {
        let value = self.execute(C::NAME, serde_json::to_value(command).unwrap())?;
        Ok(serde_json::from_value(value).unwrap())
    }

    /// Runs a command by name.
    pub(crate) fn execute(&mut self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        self.start(name, arguments);
        self.answer()
    }

    /// Sends a command without waiting.
    pub(crate) fn start(&mut self, name: &str, arguments: Value) {
        self.send(&json!({ "execute": name, "arguments": arguments, "id": 7 }).to_string());
    }

    /// Waits for the answer of a command.
    pub(crate) fn answer(&mut self) -> Result<Value, QmpError> {
        loop {
            match self.message() {
                ServerMessage::Return { value, id } => {
                    assert_eq!(id, Some(json!(7)));
                    return Ok(value);
                }
                ServerMessage::Error { error, .. } => return Err(error),
                ServerMessage::Event { event, data, .. } => {
                    self.events.push_back((event, data.unwrap_or_default()));
                }
            }
        }
    }

    /// Waits for an event of that name.
    pub(crate) fn wait_for_event(&mut self, name: &str) -> Value {
        loop {
            if let Some(place) = self.events.iter().position(|(event, _)| event == name) {
                return self.events.remove(place).unwrap().1;
            }
            if let ServerMessage::Event { event, data, .. } = self.message() {
                self.events.push_back((event, data.unwrap_or_default()));
            }
        }
    }

    /// True if the daemon has closed the connection.
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut bytes = [0; 4096];
        loop {
            match self.stream.read(&mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return true,
                Ok(_) => {}
            }
        }
    }

    pub(crate) fn message(&mut self) -> ServerMessage {
        let value = self.value();
        serde_json::from_value(value).unwrap()
    }

    pub(crate) fn value(&mut self) -> Value {
        self.try_value().unwrap()
    }

    fn try_value(&mut self) -> io::Result<Value> {
        loop {
            if let Some(value) = self.frames.next_value().unwrap() {
                return Ok(value);
            }
            let mut bytes = [0; 4096];
            // A process that was stopped for a while hears of it so, where there is a limit to the wait.
            let length = match self.stream.read(&mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            if length == 0 {
                // The daemon has closed the connection.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.frames.push(&bytes[..length]).unwrap();
        }
    }

    pub(crate) fn prepare(
        &mut self,
        set: Uuid,
        volumes: &[&str],
        method: Option<Method>,
    ) -> Result<(), QmpError> {
        let volumes = volumes.iter().map(|name| (*name).to_owned()).collect();
        self.run(&SnapshotSetPrepare {
            set,
            volumes,
            method,
        })
        .map(drop)
    }

    pub(crate) fn mark(&mut self, set: Uuid) -> Result<(), QmpError> {
        self.run(&SnapshotSetMark {
            set,
            exempt: Vec::new(),
        })
        .map(drop)
    }

    pub(crate) fn commit(&mut self, set: Uuid) -> Result<SnapshotSetCommitted, QmpError> {
        self.run(&SnapshotSetCommit {
            set,
            limit_ms: 10_000,
        })
    }

    pub(crate) fn keep(&mut self, set: Uuid) -> Result<(), QmpError> {
        self.run(&SnapshotSetKeep { set }).map(drop)
    }

    pub(crate) fn abort(&mut self, set: Uuid) -> Result<(), QmpError> {
        self.run(&SnapshotSetAbort {
            set,
            reason: "test".to_owned(),
        })
        .map(drop)
    }

    /// Prepares, marks, commits and keeps; the snapshots in the order of the volumes.
    pub(crate) fn take_set(&mut self, volumes: &[&str], method: Method) -> SnapshotSetCommitted {
        let set = Uuid::new_v4();
        self.prepare(set, volumes, Some(method)).unwrap();
        self.mark(set).unwrap();
        let committed = self.commit(set).unwrap();
        self.keep(set).unwrap();
        committed
    }

    /// Sends a descriptor with `getfd`.
    pub(crate) fn getfd(&mut self, name: &str, descriptor: impl AsFd) -> Result<(), QmpError> {
        self.send_fd(name, descriptor).unwrap();
        self.answer().map(drop)
    }

    fn send_fd(&mut self, name: &str, descriptor: impl AsFd) -> io::Result<()> {
        let text = json!({
            "execute": Getfd::NAME, "arguments": { "fdname": name }, "id": 7,
        })
        .to_string();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [descriptor.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let bytes = [IoSlice::new(text.as_bytes())];
        let sent = sendmsg(&self.stream, &bytes, &mut ancillary, SendFlags::NOSIGNAL)?;
        assert_eq!(sent, text.len());
        Ok(())
    }

    /// A snapshot's content.
    pub(crate) fn read_snapshot(&mut self, snapshot: Uuid) -> Vec<u8> {
        let mut file: File = tempfile::tempfile().unwrap();
        self.getfd("out", &file).unwrap();
        let command = SnapshotRead {
            snapshot,
            fdname: "out".to_owned(),
            range: None,
        };
        let done = self.run(&command).unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, done.length_bytes);
        bytes
    }
}
