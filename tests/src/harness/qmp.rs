//! A small client of sockets that speak QMP framing: QEMU's monitor and vhost-blk's control socket.
//!
//! Called by `vm`, `daemon` and scenarios that act as somebody else (pause the machine, thaw
//! behind the bridge's back). It is deliberately not the product's client: a fault there must not
//! hide from the tests. Events are skipped by all but `event`.

use std::io::{BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use super::wait;

type Messages =
    serde_json::StreamDeserializer<'static, serde_json::de::IoRead<BufReader<UnixStream>>, Value>;

/// A connection after `qmp_capabilities`.
pub struct Qmp {
    stream: UnixStream,
    messages: Messages,
    next_id: u64,
}

impl std::fmt::Debug for Qmp {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Qmp")
            .field("next_id", &self.next_id)
            .finish_non_exhaustive()
    }
}

impl Qmp {
    /// Connects (waiting for the socket to appear) and negotiates.
    pub fn connect(socket: &Path) -> Result<Self> {
        let what = format!("a server on {}", socket.display());
        let stream = wait::until(&what, wait::STEP, || Ok(UnixStream::connect(socket).ok()))?;
        stream.set_read_timeout(Some(wait::STEP))?;
        let reader = BufReader::new(stream.try_clone()?);
        let messages = serde_json::Deserializer::from_reader(reader).into_iter();
        let mut qmp = Self {
            stream,
            messages,
            next_id: 1,
        };
        let greeting = qmp.read()?;
        ensure!(greeting.get("QMP").is_some(), "no QMP greeting: {greeting}");
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs one command and returns its `return`.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let (id, line) = self.line(command, &arguments);
        self.stream.write_all(line.as_bytes())?;
        self.answer(command, id)
    }

    /// Hands a descriptor over (`getfd`) under a name.
    pub fn pass(&mut self, name: &str, descriptor: BorrowedFd<'_>) -> Result<()> {
        let (id, line) = self.line("getfd", &json!({ "fdname": name }));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [descriptor];
        let fits = ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        ensure!(fits, "no room for a descriptor");
        let bytes = [IoSlice::new(line.as_bytes())];
        let sent = sendmsg(&self.stream, &bytes, &mut ancillary, SendFlags::empty())?;
        ensure!(sent == line.len(), "only {sent} bytes of getfd were taken");
        self.answer("getfd", id).map(drop)
    }

    fn line(&mut self, command: &str, arguments: &Value) -> (u64, String) {
        let id = self.next_id;
        self.next_id += 1;
        let message = json!({"execute": command, "arguments": arguments, "id": id});
        (id, message.to_string() + "\n")
    }

    fn answer(&mut self, command: &str, id: u64) -> Result<Value> {
        loop {
            let mut message = self.read()?;
            if message.get("event").is_some() {
                continue;
            }
            ensure!(
                message.get("id") == Some(&json!(id)),
                "answer to something else: {message}"
            );
            if let Some(error) = message.get("error") {
                bail!("{command}: {error}");
            }
            return message
                .get_mut("return")
                .map(Value::take)
                .context("neither return nor error");
        }
    }

    /// Waits for an event that is wanted; others, and those that came while a command ran, are skipped.
    pub fn event(&mut self, mut wanted: impl FnMut(&Value) -> bool) -> Result<Value> {
        loop {
            let message = self.read()?;
            if message.get("event").is_some() && wanted(&message) {
                return Ok(message);
            }
        }
    }

    /// Changes how long an answer may take.
    pub fn set_deadline(&mut self, deadline: Duration) -> Result<()> {
        Ok(self.stream.set_read_timeout(Some(deadline))?)
    }

    fn read(&mut self) -> Result<Value> {
        Ok(self.messages.next().context("the server hung up")??)
    }
}
