//! The library against an agent that is played by the test: what is said, and when an application is let go.

use super::*;
use crate::types::BackupType;
use crate::writer::{Abort, Event, EventKind, Release, Reply, Welcome};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Reports its calls.
struct Probe {
    calls: Sender<&'static str>,
    frozen: bool,
    veto: bool,
    /// It loses its hold after so many looks.
    looks: Option<u32>,
    evidence: Value,
    /// Its freeze takes all the time that there is for the answer.
    slow: bool,
}

impl Probe {
    /// One that does all it is asked, and is heard by nobody yet.
    fn willing() -> Self {
        Self {
            calls: channel().0,
            frozen: false,
            veto: false,
            looks: None,
            evidence: Value::from(5),
            slow: false,
        }
    }

    fn call(&self, name: &'static str) {
        self.calls.send(name).unwrap();
    }
}

impl Writer for Probe {
    fn registration(&self) -> Registration {
        Registration {
            level: crate::types::Level::BackEnd,
            ..Registration::new("probe", "probe:1", "Probe")
        }
    }

    fn freeze(&mut self, call: &Call<'_>, _: &Freeze) -> Result<Value, Veto> {
        self.calls.send("freeze").unwrap();
        if self.veto {
            return Err(Veto::retryable("busy"));
        }
        self.frozen = true;
        while self.slow && !call.is_over() {
            thread::yield_now();
        }
        Ok(self.evidence.clone())
    }

    fn thaw(&mut self, _: &Call<'_>, _: &Thaw) -> Result<Held, Veto> {
        self.calls.send("thaw").unwrap();
        self.frozen = false;
        // It always claims to have held: the library must know better.
        Ok(Held {
            held: true,
            evidence: Value::from(5),
        })
    }

    fn still_holds(&mut self) -> Result<(), String> {
        assert!(self.frozen, "asked without a freeze");
        if let Some(looks) = &mut self.looks {
            *looks -= 1;
            if *looks == 0 {
                return Err("its lock is gone".into());
            }
        }
        Ok(())
    }

    /// Prepares until nobody waits for it any more.
    fn prepare_snapshot(&mut self, call: &Call<'_>, _: &PrepareSnapshot) -> Result<(), Veto> {
        call.progress("checkpoint");
        self.call("prepare_snapshot");
        while !call.is_over() {
            thread::yield_now();
        }
        Err(Veto::timeout("given up"))
    }

    fn backup_complete(&mut self, _: &Call<'_>, _: &BackupComplete) -> Result<(), Veto> {
        self.call("backup_complete");
        Ok(())
    }

    fn backup_shutdown(&mut self, _: &BackupShutdown) -> Result<(), Veto> {
        self.call("backup_shutdown");
        Ok(())
    }

    fn abort(&mut self, _: &str, _: &str) {
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
    fn with(mut probe: Probe) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let (sender, calls) = channel();
        probe.calls = sender;
        let writer = thread::spawn(move || {
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
        agent.write(EventKind::Welcome(Welcome {
            protocol: Some(1),
            refused: None,
        }));
        agent
    }

    fn write(&mut self, kind: EventKind) {
        self.write_with(kind, 1_000);
    }

    fn write_with(&mut self, kind: EventKind, deadline_ms: u64) {
        self.seq += 1;
        let event = Event {
            seq: self.seq,
            deadline_ms,
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
        self.ask(EventKind::Freeze(Freeze {
            set: "s".into(),
            generation: 1,
            hold_ms,
        }))
    }

    fn thaw(&mut self) -> Reply {
        self.ask(EventKind::Thaw(Thaw {
            set: "s".into(),
            generation: 1,
        }))
    }

    fn called(&self) -> &'static str {
        self.calls.recv_timeout(Duration::from_secs(20)).unwrap()
    }
}

#[test]
fn a_hold_in_time_is_told_as_held_with_the_same_evidence() {
    let mut agent = Agent::with(Probe::willing());
    assert_eq!(agent.freeze(60_000).evidence, Value::from(5));
    let thawed = agent.thaw();
    assert_eq!(thawed.held, Some(true));
    assert_eq!(thawed.evidence, Value::from(5));
}

#[test]
fn the_librarys_own_timer_resumes_and_the_thaw_says_so() {
    let mut agent = Agent::with(Probe::willing());
    assert!(agent.freeze(200).ok);
    assert_eq!(agent.called(), "freeze");
    assert_eq!(agent.called(), "abort");
    let release: Release = agent.read();
    assert_eq!(release.generation, 1);
    assert_eq!(agent.thaw().held, Some(false));
}

#[test]
fn a_freeze_that_outlasts_its_hold_is_undone_and_refused() {
    let mut agent = Agent::with(Probe {
        slow: true,
        ..Probe::willing()
    });
    // The time for the answer is a second.
    let reply = agent.freeze(200);
    assert_eq!(
        (reply.ok, reply.code),
        (false, Some(WriterFailure::Timeout))
    );
    assert_eq!(agent.called(), "freeze");
    assert_eq!(agent.called(), "abort");
    assert_eq!(agent.thaw().held, Some(false));
}

#[test]
fn a_hold_that_the_application_has_lost_is_told_at_once() {
    let mut agent = Agent::with(Probe {
        looks: Some(3),
        ..Probe::willing()
    });
    assert!(agent.freeze(600_000).ok);
    let release: Release = agent.read();
    assert_eq!(release.release, "its lock is gone");
    assert_eq!(release.generation, 1);
    assert_eq!(agent.called(), "freeze");
    assert_eq!(agent.called(), "abort");
    assert_eq!(agent.thaw().held, Some(false));
}

#[test]
fn a_lost_agent_resumes_the_application_at_once() {
    let mut agent = Agent::with(Probe::willing());
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
    let mut agent = Agent::with(Probe {
        veto: true,
        ..Probe::willing()
    });
    let reply = agent.freeze(1_000);
    assert!(!reply.ok);
    assert_eq!(reply.code, Some(WriterFailure::Retryable));
    assert_eq!(reply.message, "busy");
    // Nothing was frozen, so nothing can have been held.
    assert_eq!(agent.thaw().held, Some(false));
}

#[test]
fn an_answer_longer_than_a_line_is_a_failure_that_says_so_and_the_hold_still_ends() {
    let mut agent = Agent::with(Probe {
        evidence: "x".repeat(crate::MESSAGE_BYTES_MAX).into(),
        ..Probe::willing()
    });
    let reply = agent.freeze(600_000);
    assert!(!reply.ok);
    assert_eq!(reply.code, Some(WriterFailure::Outofresources));
    let abort = EventKind::Abort(Abort {
        set: "s".into(),
        reason: "refused".into(),
    });
    assert!(agent.ask(abort).ok);
}

#[test]
fn a_refusal_ends_the_library() {
    let mut agent = Agent::with(Probe::willing());
    agent.write(EventKind::Welcome(Welcome {
        protocol: None,
        refused: Some("not you".into()),
    }));
    let ended = agent.writer.join().unwrap();
    assert!(matches!(ended, Ended::Refused(why) if why == "not you"));
}

#[test]
fn a_refusal_is_read_though_the_agent_hung_up_before_the_registration() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let refusal = Event {
        seq: 0,
        deadline_ms: 0,
        kind: EventKind::Welcome(Welcome {
            protocol: None,
            refused: Some("not you".into()),
        }),
    };
    let line = serde_json::to_string(&refusal).unwrap();
    (&ours).write_all(format!("{line}\n").as_bytes()).unwrap();
    drop(ours);
    let ended = serve(&mut Probe::willing(), &theirs);
    assert!(matches!(ended, Ended::Refused(why) if why == "not you"));
}

#[test]
fn garbage_from_the_agent_ends_the_connection_and_the_hold() {
    let mut agent = Agent::with(Probe::willing());
    assert!(agent.freeze(600_000).ok);
    let mut stream = agent.reader.get_ref();
    stream.write_all(b"{\"seq\":\n").unwrap();
    assert!(matches!(agent.writer.join().unwrap(), Ended::Gone));
    assert_eq!(agent.calls.iter().collect::<Vec<_>>(), ["freeze", "abort"]);
}

/// A set up to its copies.
fn make_copies(agent: &mut Agent, set: &str) {
    let backup = PrepareBackup {
        set: set.into(),
        backup_type: BackupType::Full,
        ..PrepareBackup::default()
    };
    assert!(agent.ask(EventKind::PrepareBackup(backup)).ok);
    let snapshot = PostSnapshot {
        set: set.into(),
        ..PostSnapshot::default()
    };
    assert!(agent.ask(EventKind::PostSnapshot(snapshot)).ok);
}

#[test]
fn each_set_that_waits_for_its_backup_is_shut_down_when_the_agent_is_lost_and_no_other() {
    let mut agent = Agent::with(Probe::willing());
    for set in ["a", "b", "c"] {
        make_copies(&mut agent, set);
    }
    let outcome = BackupComplete {
        set: "b".into(),
        succeeded: true,
        ..BackupComplete::default()
    };
    assert!(agent.ask(EventKind::BackupComplete(outcome)).ok);
    let Agent {
        reader,
        calls,
        writer,
        ..
    } = agent;
    drop(reader);
    writer.join().unwrap();
    assert_eq!(
        calls.iter().collect::<Vec<_>>(),
        ["backup_complete", "backup_shutdown", "backup_shutdown"]
    );
}

#[test]
fn a_writer_of_which_no_component_was_picked_has_nothing_to_undo() {
    let mut agent = Agent::with(Probe::willing());
    let backup = PrepareBackup {
        set: "s".into(),
        component_mode: true,
        ..PrepareBackup::default()
    };
    assert!(agent.ask(EventKind::PrepareBackup(backup)).ok);
    let Agent {
        reader,
        calls,
        writer,
        ..
    } = agent;
    drop(reader);
    writer.join().unwrap();
    assert_eq!(calls.iter().count(), 0);
}

#[test]
fn a_restore_that_the_agent_does_not_end_is_aborted() {
    let mut agent = Agent::with(Probe::willing());
    for end in [true, false] {
        let restore = Restore {
            set: "r".into(),
            ..Restore::default()
        };
        assert!(agent.ask(EventKind::PreRestore(restore.clone())).ok);
        if end {
            assert!(agent.ask(EventKind::PostRestore(restore)).ok);
        }
    }
    let Agent {
        reader,
        calls,
        writer,
        ..
    } = agent;
    drop(reader);
    writer.join().unwrap();
    assert_eq!(calls.iter().collect::<Vec<_>>(), ["abort"]);
}

#[test]
fn a_long_preparation_tells_its_progress_and_learns_of_an_abort() {
    let mut agent = Agent::with(Probe::willing());
    let set = "s".to_owned();
    // Far more than the test waits: only the abort can end it.
    agent.write_with(
        EventKind::PrepareSnapshot(PrepareSnapshot { set: set.clone() }),
        600_000,
    );
    let progress: crate::writer::Progress = agent.read();
    assert_eq!(
        (progress.seq, progress.progress.as_str()),
        (agent.seq, "checkpoint")
    );
    assert_eq!(agent.called(), "prepare_snapshot");
    agent.write(EventKind::Abort(Abort {
        set,
        reason: "enough".into(),
    }));
    let late: Reply = agent.read();
    assert_eq!(
        (late.seq, late.code),
        (agent.seq - 1, Some(WriterFailure::Timeout))
    );
    let reply: Reply = agent.read();
    assert_eq!((reply.seq, reply.ok), (agent.seq, true));
    assert_eq!(agent.called(), "abort");
}

/// Tells every row that it copies.
struct Talker;

impl Writer for Talker {
    fn registration(&self) -> Registration {
        Registration::new("talker", "talker:1", "Talker")
    }

    fn prepare_snapshot(&mut self, call: &Call<'_>, _: &PrepareSnapshot) -> Result<(), Veto> {
        for row in 0..10_000 {
            call.progress(&format!("row {row}"));
        }
        Ok(())
    }

    fn freeze(&mut self, _: &Call<'_>, _: &Freeze) -> Result<Value, Veto> {
        Ok(Value::Null)
    }

    fn thaw(&mut self, _: &Call<'_>, _: &Thaw) -> Result<Held, Veto> {
        Err(Veto::retryable("never frozen"))
    }

    fn abort(&mut self, _: &str, _: &str) {}
}

#[test]
fn an_application_that_tells_everything_does_not_flood_the_agent() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let event = Event {
        seq: 1,
        deadline_ms: 600_000,
        kind: EventKind::PrepareSnapshot(PrepareSnapshot { set: "s".into() }),
    };
    let line = serde_json::to_string(&event).unwrap();
    (&ours).write_all(format!("{line}\n").as_bytes()).unwrap();
    ours.shutdown(std::net::Shutdown::Write).unwrap();
    let start = std::time::Instant::now();
    let writer = thread::spawn(move || serve(&mut Talker, &theirs));
    let said: Vec<String> = BufReader::new(ours).lines().map(Result::unwrap).collect();
    writer.join().unwrap();
    let words = said.iter().filter(|line| line.contains("progress"));
    let most = start.elapsed().as_millis() / 100 + 1;
    assert!((1..=most).contains(&(words.count() as u128)), "{said:#?}");
    assert!(said.last().is_some_and(|line| line.contains("\"ok\":true")));
}
