//! A connected writer that a test plays: it reads the agent's events and answers what the test wants.

use super::{PATIENCE, Rig};
use guest_agent_wire::lines::{Lines, Piece};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

/// A connected writer that the test plays.
pub struct Played {
    stream: UnixStream,
    lines: Lines,
    ready: VecDeque<Value>,
}

impl Played {
    pub fn connect(rig: &Rig, registration: &Value) -> Self {
        let stream = UnixStream::connect(rig.path("run/writers.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut played = Self {
            stream,
            lines: Lines::default(),
            ready: VecDeque::new(),
        };
        played.write(registration);
        played
    }

    /// Registered under this name, with a window of this length.
    pub fn registered(rig: &Rig, name: &str, level: &str, freeze_timeout_ms: u64) -> Self {
        let mut played = Self::connect(
            rig,
            &json!({"protocol": 1, "class_id": "test", "instance_id": name, "name": name,
                    "level": level, "freeze_timeout_ms": freeze_timeout_ms}),
        );
        assert_eq!(played.event()["protocol"], 1);
        played
    }

    pub fn write(&mut self, value: &Value) {
        self.stream
            .write_all(format!("{value}\n").as_bytes())
            .unwrap();
    }

    /// Writes a line so often, or until the agent hangs up; how often it was.
    pub fn repeat(&mut self, value: &Value, times: usize) -> usize {
        let line = format!("{value}\n");
        let written = (0..times).take_while(|_| self.stream.write_all(line.as_bytes()).is_ok());
        written.count()
    }

    pub fn event(&mut self) -> Value {
        let mut buffer = [0; 4096];
        while self.ready.is_empty() {
            let count = match self.stream.read(&mut buffer) {
                // A socket with a time-out is not restarted when the process is stopped for a moment.
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                read => read.unwrap(),
            };
            assert!(count > 0, "the agent hung up");
            let ready = &mut self.ready;
            self.lines.take(&buffer[..count], |piece| {
                if let Piece::Line(line) = piece {
                    ready.push_back(serde_json::from_slice(&line).unwrap());
                }
            });
        }
        self.ready.pop_front().unwrap()
    }

    /// The next event, if one comes within this time.
    pub fn event_within(&mut self, limit: std::time::Duration) -> Option<Value> {
        if self.ready.is_empty() {
            self.stream.set_read_timeout(Some(limit)).unwrap();
            let mut byte = [0];
            let peeked = rustix::net::recv(&self.stream, &mut byte, rustix::net::RecvFlags::PEEK);
            self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
            peeked.ok()?;
        }
        Some(self.event())
    }

    /// The next event, which must be this one; answered with `reply`.
    pub fn answer(&mut self, event: &str, mut reply: Value) -> Value {
        let came = self.event();
        assert_eq!(came["event"], event, "{came}");
        reply["seq"] = came["seq"].clone();
        self.write(&reply);
        came
    }

    /// Agrees; to a freeze with the evidence that one who holds by itself must give.
    pub fn agree(&mut self, event: &str) -> Value {
        let evidence = (event == "freeze").then_some(7);
        self.answer(event, json!({"ok": true, "evidence": evidence}))
    }

    pub fn agree_to_prepare(&mut self) {
        self.agree("prepare_backup");
        self.agree("prepare_snapshot");
    }

    /// The next event is the abort.
    pub fn expect_abort(&mut self) -> String {
        let came = self.agree("abort");
        came["reason"].as_str().unwrap().to_owned()
    }
}
