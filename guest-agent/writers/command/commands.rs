//! A command per event.
//!
//! Made by `main`, called by the writer library. Invariants: a command never outlives its limit or the agent's patience; what
//! a freeze began is undone by `abort` or `thaw`, by the guard if this process is gone.

use crate::config::{Command, Settings};
use crate::guard::Guard;
use crate::report::Report;
use guest_agent::writer::script::process::{Job, Killer, Outcome};
use guest_agent::writer::script::{as_value, check_executable, event};
use guest_agent_wire::components::ComponentReply;
use guest_agent_wire::metadata::Metadata;
use guest_agent_wire::sdk::{Call, Held, Veto, Writer};
use guest_agent_wire::types::BackupType;
use guest_agent_wire::writer::{
    Abort, BackupComplete, BackupShutdown, EventKind, Freeze, PostSnapshot, PrepareBackup,
    PrepareSnapshot, Registration, Restore, Thaw,
};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// How often the agent is looked at while a command runs.
const LOOK: Duration = Duration::from_millis(20);
/// Limit of a command that nobody waits for.
const ALONE: Duration = Duration::from_secs(10);

/// A writer by commands.
pub(crate) struct CommandWriter {
    registration: Registration,
    metadata: Metadata,
    commands: BTreeMap<&'static str, Command>,
    report: Report,
    backup_type: BackupType,
    frozen: bool,
    guard: Option<Guard>,
}

impl CommandWriter {
    pub(crate) fn new(
        settings: &Settings,
        commands: BTreeMap<&'static str, Command>,
        report: Report,
    ) -> Self {
        Self {
            registration: settings.registration(),
            // It has been read once already; whoever has taken it away since gets an empty one.
            metadata: settings.read_metadata().unwrap_or_default(),
            commands,
            report,
            backup_type: BackupType::default(),
            frozen: false,
            guard: None,
        }
    }

    /// Runs the command of an event, if there is one; what it printed comes back.
    fn tell(&mut self, call: &Call<'_>, kind: &EventKind) -> Result<Value, Veto> {
        let Some(command) = event::name(kind).and_then(|name| self.commands.get(name)) else {
            return Ok(Value::Null);
        };
        let start = Instant::now();
        let said = self.run(call, kind, command);
        self.report.event(kind, start, &said);
        said
    }

    fn run(&self, call: &Call<'_>, kind: &EventKind, command: &Command) -> Result<Value, Veto> {
        if let Command::Script(file) = command {
            check_executable(file).map_err(Veto::nonretryable)?;
        }
        let name = event::name(kind).unwrap_or_default();
        let limit = call.remaining();
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let (program, arguments) = command.words();
        let job = Job {
            program,
            arguments: &arguments,
            environment: &event::environment(kind, self.backup_type, limit_ms),
            input: &event::input(kind),
            limit,
        };
        match watched(call, job) {
            Ok(Outcome::Succeeded { output }) => Ok(as_value(&output)),
            Ok(Outcome::Failed { status, message }) => {
                Err(Veto::retryable(format!("{name}: {status}: {message}")))
            }
            Ok(Outcome::Killed) => Err(Veto::timeout(format!("{name} was killed at its limit"))),
            Err(error) => Err(Veto::nonretryable(format!("{name} cannot be run: {error}"))),
        }
    }

    /// What undoes a freeze, or is told of every abort.
    fn undo(&self) -> Option<(&'static str, &Command)> {
        let names: &[&'static str] = if self.frozen {
            &["abort", "thaw"]
        } else {
            &["abort"]
        };
        names
            .iter()
            .find_map(|name| Some((*name, self.commands.get(name)?)))
    }

    fn watch_over(&self, set: &str) -> Result<Option<Guard>, Veto> {
        let undo = self.commands.get("abort").or(self.commands.get("thaw"));
        let kind = EventKind::Abort(Abort {
            set: set.to_owned(),
            reason: "the writer was killed".to_owned(),
        });
        let limit_ms = u64::try_from(ALONE.as_millis()).unwrap_or(u64::MAX);
        let environment = event::environment(&kind, self.backup_type, limit_ms);
        undo.map(|undo| Guard::start(undo, environment))
            .transpose()
            .map_err(|error| Veto::out_of_resources(format!("no guard: {error}")))
    }

    fn goes_on(&mut self) {
        self.frozen = false;
        if let Some(guard) = self.guard.take() {
            guard.release();
        }
    }
}

/// Runs it to its end, and kills it once nobody waits for it any more.
fn watched(call: &Call<'_>, job: Job<'_>) -> std::io::Result<Outcome> {
    let killer = Killer::default();
    let (sender, ended) = channel();
    thread::scope(|scope| {
        scope.spawn(|| sender.send(job.run(&killer)));
        loop {
            match ended.recv_timeout(LOOK) {
                Ok(outcome) => return outcome,
                Err(RecvTimeoutError::Timeout) => {
                    if call.is_over() {
                        killer.kill();
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(std::io::Error::other("its thread has ended"));
                }
            }
        }
    })
}

/// What a command printed of single components: an object with the key `components`.
fn components(said: &Value) -> Result<Vec<ComponentReply>, Veto> {
    match said.get("components") {
        None => Ok(Vec::new()),
        Some(components) => serde_json::from_value(components.clone())
            .map_err(|error| Veto::nonretryable(format!("the components in its output: {error}"))),
    }
}

impl Writer for CommandWriter {
    fn registration(&self) -> Registration {
        self.registration.clone()
    }

    fn identify(&mut self, call: &Call<'_>) -> Result<Metadata, Veto> {
        let said = self.tell(call, &EventKind::Identify {})?;
        if said.is_null() {
            return Ok(self.metadata.clone());
        }
        serde_json::from_value(said)
            .map_err(|error| Veto::nonretryable(format!("metadata document: {error}")))
    }

    fn prepare_backup(
        &mut self,
        call: &Call<'_>,
        backup: &PrepareBackup,
    ) -> Result<Vec<ComponentReply>, Veto> {
        self.backup_type = backup.backup_type;
        components(&self.tell(call, &EventKind::PrepareBackup(backup.clone()))?)
    }

    fn prepare_snapshot(
        &mut self,
        call: &Call<'_>,
        snapshot: &PrepareSnapshot,
    ) -> Result<(), Veto> {
        self.tell(call, &EventKind::PrepareSnapshot(snapshot.clone()))
            .map(drop)
    }

    fn freeze(&mut self, call: &Call<'_>, hold: &Freeze) -> Result<Value, Veto> {
        // A guard of an earlier freeze that nobody ended has nothing more to watch over.
        self.goes_on();
        self.guard = self.watch_over(&hold.set)?;
        self.frozen = true;
        self.tell(call, &EventKind::Freeze(hold.clone()))
    }

    fn thaw(&mut self, call: &Call<'_>, hold: &Thaw) -> Result<Held, Veto> {
        let held = self.frozen;
        let evidence = self.tell(call, &EventKind::Thaw(hold.clone()))?;
        self.goes_on();
        Ok(Held { held, evidence })
    }

    fn post_snapshot(
        &mut self,
        call: &Call<'_>,
        snapshot: &PostSnapshot,
    ) -> Result<Vec<ComponentReply>, Veto> {
        if self.frozen {
            // The thaw failed, and the copies are kept all the same: no abort will come.
            self.abort(&snapshot.set, "the thaw failed");
        }
        components(&self.tell(call, &EventKind::PostSnapshot(snapshot.clone()))?)
    }

    fn backup_complete(&mut self, call: &Call<'_>, outcome: &BackupComplete) -> Result<(), Veto> {
        self.tell(call, &EventKind::BackupComplete(outcome.clone()))
            .map(drop)
    }

    fn backup_shutdown(&mut self, shutdown: &BackupShutdown) -> Result<(), Veto> {
        let kind = EventKind::BackupShutdown(shutdown.clone());
        self.tell(&Call::alone(ALONE), &kind).map(drop)
    }

    fn abort(&mut self, set: &str, reason: &str) {
        let kind = EventKind::Abort(Abort {
            set: set.to_owned(),
            reason: reason.to_owned(),
        });
        let start = Instant::now();
        let Some((_, command)) = self.undo() else {
            return self.goes_on();
        };
        let undone = self.run(&Call::alone(ALONE), &kind, command);
        self.report.event(&kind, start, &undone);
        // One that failed is tried again at the next abort, or by the guard.
        if undone.is_ok() {
            self.goes_on();
        }
    }

    fn pre_restore(
        &mut self,
        call: &Call<'_>,
        restore: &Restore,
    ) -> Result<Vec<ComponentReply>, Veto> {
        components(&self.tell(call, &EventKind::PreRestore(restore.clone()))?)
    }

    fn post_restore(
        &mut self,
        call: &Call<'_>,
        restore: &Restore,
    ) -> Result<Vec<ComponentReply>, Veto> {
        components(&self.tell(call, &EventKind::PostRestore(restore.clone()))?)
    }
}
