//! The library against an agent that is played by the test: what is said, and when an application is let go.

use super::*;
use std::io::{BufRead as _, BufReader};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

/// Reports its calls.
struct Probe {
    calls: Sender<&'static str>,
    frozen: bool,
    veto: bool,
}

impl Writer for Probe {
    fn registration(&self) -> Registration {
        Registration {
            protocol: 1,
            class_id: "probe".into(),
            instance_id: "probe:1".into(),
            name: "Probe".into(),
            level: crate::types::Level::BackEnd,
            freeze_timeout_ms: 1_000,
            hold: crate::types::Hold::App,
        }
    }

    fn freeze(&mut self, _: &Freezing<'_>) -> Result<Value, Veto> {
        self.calls.send("freeze").unwrap();
        if self.veto {
            return Err(Veto::retryable("busy"));
        }
        self.frozen = true;
        Ok(Value::from(5))
    }

    fn thaw(&mut self, _: &Freezing<'_>) -> Result<Held, Veto> {
        self.calls.send("thaw").unwrap();
        self.frozen = false;
        // It always claims to have held: the library must know better.
        Ok(Held {
            held: true,
            evidence: Value::from(5),
        })
    }

    fn abort(&mut self, _: &str) {
        self.frozen = false;
        self.calls.send("abort").unwrap();
    }
}

struct Agent {
    reader: BufReader<UnixStream>,
    seq: u64,
    calls: Receiver<&'static str>,
    writer: JoinHandle<Ended>,
}

impl Agent {
    fn with(veto: bool) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let (sender, calls) = channel();
        let writer = thread::spawn(move || {
            let mut probe = Probe {
                calls: sender,
                frozen: false,
                veto,
            };
            let ended = serve(&mut probe, &theirs);
            assert!(!probe.frozen, "left frozen");
            ended
        });
        let mut agent = Self {
            reader: BufReader::new(ours),
            seq: 0,
            calls,
            writer,
        };
        let registration: Registration = agent.read();
        assert_eq!(registration.instance_id, "probe:1");
        agent.write(EventKind::Welcome {
            protocol: Some(1),
            refused: None,
        });
        agent
    }

    fn write(&mut self, kind: EventKind) {
        self.seq += 1;
        let event = Event {
            seq: self.seq,
            deadline_ms: 1_000,
            kind,
        };
        let line = serde_json::to_string(&event).unwrap();
        let mut stream = self.reader.get_ref();
        stream.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    fn read<T: serde::de::DeserializeOwned>(&mut self) -> T {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, kind: EventKind) -> Reply {
        self.write(kind);
        let reply: Reply = self.read();
        assert_eq!(reply.seq, self.seq);
        reply
    }

    fn freeze(&mut self, hold_ms: u64) -> Reply {
        self.ask(EventKind::Freeze {
            set: "s".into(),
            generation: 1,
            hold_ms,
        })
    }

    fn thaw(&mut self) -> Reply {
        self.ask(EventKind::Thaw {
            set: "s".into(),
            generation: 1,
        })
    }

    fn called(&self) -> &'static str {
        self.calls.recv_timeout(Duration::from_secs(20)).unwrap()
    }
}

#[test]
fn a_hold_in_time_is_told_as_held_with_the_same_evidence() {
    let mut agent = Agent::with(false);
    assert_eq!(agent.freeze(60_000).evidence, Value::from(5));
    let thawed = agent.thaw();
    assert_eq!(thawed.held, Some(true));
    assert_eq!(thawed.evidence, Value::from(5));
}

#[test]
fn the_librarys_own_timer_resumes_and_the_thaw_says_so() {
    let mut agent = Agent::with(false);
    assert!(agent.freeze(200).ok);
    assert_eq!(agent.called(), "freeze");
    assert_eq!(agent.called(), "abort");
    assert_eq!(agent.thaw().held, Some(false));
}

#[test]
fn a_lost_agent_resumes_the_application_at_once() {
    let mut agent = Agent::with(false);
    assert!(agent.freeze(600_000).ok);
    assert_eq!(agent.called(), "freeze");
    let Agent {
        reader,
        calls,
        writer,
        ..
    } = agent;
    drop(reader);
    assert_eq!(calls.recv_timeout(Duration::from_secs(20)), Ok("abort"));
    assert!(matches!(writer.join().unwrap(), Ended::Gone));
}

#[test]
fn a_veto_is_told_with_its_code() {
    let mut agent = Agent::with(true);
    let reply = agent.freeze(1_000);
    assert!(!reply.ok);
    assert_eq!(reply.code, Some(WriterFailure::Retryable));
    assert_eq!(reply.message, "busy");
    // Nothing was frozen, so nothing can have been held.
    assert_eq!(agent.thaw().held, Some(false));
}

#[test]
fn a_refusal_ends_the_library() {
    let mut agent = Agent::with(false);
    agent.write(EventKind::Welcome {
        protocol: None,
        refused: Some("not you".into()),
    });
    let ended = agent.writer.join().unwrap();
    assert!(matches!(ended, Ended::Refused(why) if why == "not you"));
}

#[test]
fn garbage_from_the_agent_ends_the_connection_and_the_hold() {
    let mut agent = Agent::with(false);
    assert!(agent.freeze(600_000).ok);
    let mut stream = agent.reader.get_ref();
    stream.write_all(b"{\"seq\":\n").unwrap();
    assert!(matches!(agent.writer.join().unwrap(), Ended::Gone));
    assert_eq!(agent.calls.iter().collect::<Vec<_>>(), ["freeze", "abort"]);
}
