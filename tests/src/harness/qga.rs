//! A client of the QEMU guest agent protocol, for QEMU's own agent and for ours.
//!
//! Called by scenarios and measuring commands that ask an agent on its port themselves. It knows the framing and how to get in step
//! with an agent, no command but `guest-sync`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::wait;

/// Longest wait for the reply to one attempt to get in step.
const SYNC: Duration = Duration::from_secs(5);

/// A client of one agent.
#[derive(Debug)]
pub struct QgaClient {
    port: BufReader<UnixStream>,
    next: u64,
}

impl QgaClient {
    /// Returns when an agent answers on this port. What was asked of one that has ended meanwhile is lost, so it asks again.
    pub fn connect(socket: &Path) -> Result<Self> {
        let port = UnixStream::connect(socket)?;
        port.set_read_timeout(Some(SYNC))?;
        let mut agent = Self {
            port: BufReader::new(port),
            next: 0,
        };
        // One that starts late answers all that waited for it: go on behind the last.
        wait::until("the agent to answer", wait::STEP, || {
            agent.next += 1;
            let sync = json!({"execute": "guest-sync", "arguments": {"id": agent.next}});
            writeln!(agent.port.get_mut(), "{sync}")?;
            while let Ok(reply) = agent.reply() {
                if reply == json!({"return": agent.next}) {
                    return Ok(Some(()));
                }
            }
            Ok(None)
        })?;
        agent.port.get_ref().set_read_timeout(Some(wait::STEP))?;
        Ok(agent)
    }

    /// One reply to one text, without the delimiter of a sync.
    pub fn ask_text(&mut self, text: &str) -> Result<Value> {
        let port = self.port.get_mut();
        port.write_all(text.as_bytes())?;
        port.write_all(b"\n")?;
        self.reply()
            .with_context(|| text.chars().take(200).collect::<String>())
    }

    /// What is answered to these bytes, which begin with a delimited sync, from its delimiter on: so many lines.
    pub fn ask_delimited(&mut self, bytes: &[u8], lines: usize) -> Result<Vec<Value>> {
        self.port.get_mut().write_all(bytes)?;
        let mut skipped = Vec::new();
        self.port.read_until(0xff, &mut skipped)?;
        ensure!(skipped.ends_with(b"\xff"), "no delimiter: {skipped:?}");
        (0..lines).map(|_| self.reply()).collect()
    }

    /// A command that is not answered when it succeeds.
    pub fn tell(&mut self, name: &str, arguments: &Value) -> Result<()> {
        let request = json!({"execute": name, "arguments": arguments});
        writeln!(self.port.get_mut(), "{request}")?;
        Ok(())
    }

    /// Replies that are there and nobody has read, of an agent that says nothing more.
    pub fn rest(&mut self) -> Result<Vec<Value>> {
        self.port.get_ref().set_nonblocking(true)?;
        let mut replies = Vec::new();
        while !self.port.fill_buf().unwrap_or_default().is_empty() {
            replies.push(self.reply()?);
        }
        self.port.get_ref().set_nonblocking(false)?;
        Ok(replies)
    }

    /// The next reply.
    pub fn reply(&mut self) -> Result<Value> {
        let mut line = Vec::new();
        self.port.read_until(b'\n', &mut line)?;
        ensure!(line.ends_with(b"}\n"), "not a line: {line:?}");
        let line = line.strip_prefix(b"\xff").unwrap_or(&line);
        Ok(serde_json::from_slice(line)?)
    }

    /// A command by name; the reply's id is checked and taken off.
    pub fn ask(&mut self, name: &str, arguments: Value) -> Result<Value> {
        self.next += 1;
        let mut request = json!({"execute": name, "id": self.next});
        if arguments != json!({}) {
            request["arguments"] = arguments;
        }
        let mut reply = self.ask_text(&request.to_string())?;
        let id = reply.as_object_mut().and_then(|reply| reply.remove("id"));
        ensure!(id == Some(json!(self.next)), "{name}: the id is {id:?}");
        Ok(reply)
    }
}
