//! The agent's side of a writer's connection, played by a test.

use guest_agent_wire::writer::{Event, EventKind};
use serde::de::DeserializeOwned;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// The agent's end.
#[derive(Debug)]
pub struct Agent {
    reader: BufReader<UnixStream>,
    seq: u64,
}

impl Agent {
    /// On this end of a connection whose other end a writer serves.
    pub fn on(stream: UnixStream, deadline: Duration) -> Self {
        stream.set_read_timeout(Some(deadline)).unwrap();
        let mut agent = Self {
            reader: BufReader::new(stream),
            seq: 0,
        };
        let _registration: serde_json::Value = agent.read();
        agent
    }

    /// The writer's next line.
    pub fn read<T: DeserializeOwned>(&mut self) -> T {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// The next line after this event.
    pub fn ask<T: DeserializeOwned>(&mut self, kind: EventKind) -> T {
        self.seq += 1;
        let event = Event {
            seq: self.seq,
            deadline_ms: 60_000,
            kind,
        };
        let line = serde_json::to_string(&event).unwrap();
        let mut stream = self.reader.get_ref();
        stream.write_all(format!("{line}\n").as_bytes()).unwrap();
        self.read()
    }
}
