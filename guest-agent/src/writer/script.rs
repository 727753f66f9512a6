//! Script writers: an executable per event, from the agent's own directory or as other programs' hooks have it.
//!
//! `registry` scans, `quiesce` sends events, `agent` calls [`left_over::recover`] at start. Invariants: nothing is run that anybody but
//! root could have changed; a script never outlives its limit, nor do its children; none is started while file systems are
//! frozen (`is_resident` is false, and the sequence sees to it); what a freeze began is undone, whatever came between.

pub mod control_group;
pub mod event;
mod foreign;
pub mod left_over;
mod line;
mod maker;
mod own;
pub mod process;
mod recipe;
mod trust;

pub use foreign::{Foreign, Hooks};
pub use line::Line;
pub use recipe::Recipe;

use super::{Answer, Identity, Writer, failure};
use crate::clock::BootTime;
use crate::journal;
use guest_agent_wire::components::ComponentReply;
use guest_agent_wire::host::Failure;
use guest_agent_wire::types::{BackupType, WriterFailure};
use guest_agent_wire::writer::{EventKind, Reply};
use process::Killer;
use recipe::{OnFailure, Run, Step};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What names begin with in the state directory of what undoes the freeze of a writer.
const MARKER: &str = "script.";

/// What was found where a writer may be.
#[derive(Debug)]
pub enum Directory {
    /// A writer.
    Writer(Box<Recipe>, Identity),
    /// Its name, and why it is not trusted or understood.
    Refused(String, String),
}

/// Where script writers are looked for.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The agent's own directory.
    pub directory: Option<PathBuf>,
    /// The hooks of other programs.
    pub foreign: Foreign,
}

impl Sources {
    /// All that are there now.
    #[must_use]
    pub fn scan(&self) -> Vec<Directory> {
        let mut found: Vec<Directory> = self
            .directory
            .iter()
            .flat_map(|top| own::scan(top))
            .collect();
        found.extend(self.foreign.scan());
        let mut names = BTreeSet::new();
        for found in &mut found {
            if let Directory::Writer(_, identity) = found
                && !names.insert(identity.instance_id.clone())
            {
                let why = "another script has this name".to_owned();
                *found = Directory::Refused(identity.instance_id.clone(), why);
            }
        }
        found
    }
}

/// The executables of a directory by the events that they are for, or why it is not trusted or has none.
pub fn executables(directory: &Path) -> Result<BTreeMap<&'static str, PathBuf>, String> {
    trust::directory(directory)?;
    own::executables(directory)
}

/// Whether a file may be run.
pub fn check_executable(file: &Path) -> Result<(), String> {
    Step::executable(file, &[]).check()
}

/// A script writer in one set.
#[derive(Debug)]
pub struct Script {
    recipe: Arc<Recipe>,
    identity: Identity,
    marker: PathBuf,
    line: Arc<Line>,
    shared: Arc<Shared>,
}

/// What the threads of one writer share: they run one after the other.
#[derive(Debug, Default)]
struct Shared {
    turn: Mutex<Turn>,
    killer: Killer,
    /// What undoes is running.
    is_undoing: AtomicBool,
}

#[derive(Debug, Default)]
struct Turn {
    backup_type: BackupType,
    frozen: bool,
    /// Its freeze failed, and the set goes on without it.
    missed: Option<String>,
}

impl Script {
    /// A writer that [`Sources::scan`] found. `line` is that of all script writers.
    #[must_use]
    pub fn new(recipe: Recipe, identity: Identity, state_dir: &Path, line: Arc<Line>) -> Self {
        let mut marker = OsString::from(MARKER);
        marker.push(identity.instance_id.replace('/', "_"));
        Self {
            recipe: Arc::new(recipe),
            identity,
            marker: state_dir.join(marker),
            line,
            shared: Arc::default(),
        }
    }
}

impl Writer for Script {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn begin(&self, event: EventKind, deadline_ms: u64, answer: Answer) {
        // A script that still runs is of no more use, but for one that undoes: only an abort does that again.
        let is_abort = matches!(event, EventKind::Abort(_));
        let time = if is_abort || !self.shared.is_undoing.load(Ordering::SeqCst) {
            self.shared.killer.kill()
        } else {
            self.shared.killer.now()
        };
        let (recipe, marker) = (Arc::clone(&self.recipe), self.marker.clone());
        let shared = Arc::clone(&self.shared);
        let place = Order::of(&event).map(|order| (order, self.line.join()));
        let limit = Duration::from_millis(deadline_ms);
        let until = BootTime::now().plus_ms(deadline_ms);
        let run = move || {
            let is_undoing = matches!(place, Some((Order::Undo, _)));
            let is_refused = place.as_ref().is_some_and(|(_, place)| place.wait());
            if is_refused && !is_undoing {
                return answer(Err(not_begun("a script before it has refused")));
            }
            let mut turn = shared.turn.lock().unwrap_or_else(PoisonError::into_inner);
            let run = Run {
                event: &event,
                backup_type: BackupType::default(),
                // What undoes has all its time from its turn on, though the answer may come too late to count.
                limit: if is_undoing { limit } else { until.remaining() },
                killer: &shared.killer,
                time: (!is_undoing).then_some(time),
            };
            shared.is_undoing.store(is_undoing, Ordering::SeqCst);
            let said = turn.take(&recipe, &marker, run);
            shared.is_undoing.store(false, Ordering::SeqCst);
            drop(turn);
            if let (Err(_), Some((Order::Freeze, place))) = (&said, &place) {
                place.refuse();
            }
            answer(said);
            drop(place);
        };
        let started = std::thread::Builder::new().name("script".into()).spawn(run);
        if let Err(error) = started {
            // The answer went with the closure: the caller's deadline speaks for this writer.
            journal::note(format_args!("no thread for a script: {error}"));
        }
    }

    fn is_resident(&self) -> bool {
        false
    }
}

/// Why a script waits for its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Freeze,
    Undo,
}

impl Order {
    fn of(event: &EventKind) -> Option<Self> {
        match event {
            EventKind::Freeze(_) => Some(Self::Freeze),
            EventKind::Thaw(_) | EventKind::Abort(_) => Some(Self::Undo),
            EventKind::Welcome(_)
            | EventKind::Identify {}
            | EventKind::PrepareBackup(_)
            | EventKind::PrepareSnapshot(_)
            | EventKind::PostSnapshot(_)
            | EventKind::BackupComplete(_)
            | EventKind::BackupShutdown(_)
            | EventKind::PreRestore(_)
            | EventKind::PostRestore(_) => None,
        }
    }
}

impl Turn {
    fn take(&mut self, recipe: &Recipe, marker: &Path, mut run: Run<'_>) -> Result<Reply, Failure> {
        if let EventKind::PrepareBackup(backup) = run.event {
            self.backup_type = backup.backup_type;
        }
        run.backup_type = self.backup_type;
        let mut reply = Reply::agrees(0);
        match run.event {
            EventKind::Identify {} => {
                reply.metadata = said(recipe, &run)?;
                if reply.metadata.is_null() {
                    reply.metadata = recipe.metadata.clone();
                }
            }
            EventKind::Freeze(_) => reply.evidence = self.freeze(recipe, marker, &run)?,
            EventKind::Thaw(_) => {
                reply.evidence = said(recipe, &run)?;
                self.thawed(marker);
                if let Some(why) = self.missed.take() {
                    return Err(failure(WriterFailure::Retryable, why));
                }
                reply.held = Some(true);
            }
            EventKind::Abort(_) => self.undo(recipe, marker, &run)?,
            EventKind::PrepareBackup(_)
            | EventKind::PrepareSnapshot(_)
            | EventKind::PostSnapshot(_)
            | EventKind::BackupComplete(_)
            | EventKind::BackupShutdown(_)
            | EventKind::PreRestore(_)
            | EventKind::PostRestore(_)
            | EventKind::Welcome(_) => {
                if self.frozen && matches!(run.event, EventKind::PostSnapshot(_)) {
                    // Its thaw failed, and the copies are kept all the same: no abort will come.
                    self.undo(recipe, marker, &run)?;
                }
                reply.evidence = said(recipe, &run)?;
                reply.components = components(&reply.evidence)?;
            }
        }
        Ok(reply)
    }

    fn freeze(&mut self, recipe: &Recipe, marker: &Path, run: &Run<'_>) -> Result<Value, Failure> {
        if let Some(busy) = recipe.busy.as_ref().filter(|busy| busy.exists()) {
            let why = format!(
                "another program has frozen it ({} is there)",
                busy.display()
            );
            return Err(failure(WriterFailure::Retryable, why));
        }
        let is_given_up = run.time.is_some_and(|time| !run.killer.is_at(time));
        if is_given_up || run.limit.is_zero() {
            return Err(not_begun("the scripts before it took all the time"));
        }
        if let Some((name, step)) = recipe.undo(true) {
            left_over::mark(marker, name, step)?;
        }
        self.frozen = true;
        let frozen = said(recipe, run);
        match (frozen, recipe.on_failure) {
            (Err(failed), OnFailure::NotHeld) => {
                self.missed = Some(failed.message.clone());
                Ok(json!({ "not_frozen": failed.message }))
            }
            (frozen, OnFailure::Veto | OnFailure::NotHeld) => frozen,
        }
    }

    fn undo(&mut self, recipe: &Recipe, marker: &Path, run: &Run<'_>) -> Result<(), Failure> {
        let undone = recipe
            .undo(self.frozen)
            .map(|(name, step)| step.run(name, run));
        undone.transpose()?;
        self.missed = None;
        self.thawed(marker);
        Ok(())
    }

    fn thawed(&mut self, marker: &Path) {
        self.frozen = false;
        fs::remove_file(marker).unwrap_or(());
    }
}

/// It has not even begun, so there is nothing to undo.
fn not_begun(why: &str) -> Failure {
    failure(WriterFailure::NotResponding, why)
}

/// Runs the step of an event, if there is one.
fn said(recipe: &Recipe, run: &Run<'_>) -> Result<Value, Failure> {
    let step = event::name(run.event).and_then(|name| Some((name, recipe.steps.get(name)?)));
    step.map_or(Ok(Value::Null), |(name, step)| step.run(name, run))
}

/// What a script said of single components: an object with the key `components`. Other output is for people.
fn components(said: &Value) -> Result<Vec<ComponentReply>, Failure> {
    match said.get("components") {
        None => Ok(Vec::new()),
        Some(components) => serde_json::from_value(components.clone()).map_err(|error| {
            let why = format!("the components in its output: {error}");
            failure(WriterFailure::Nonretryable, why)
        }),
    }
}

/// Output of a command: JSON, or else text.
#[must_use]
pub fn as_value(output: &[u8]) -> Value {
    let text = String::from_utf8_lossy(output);
    let text = text.trim();
    if text.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()))
    }
}

#[cfg(test)]
mod tests;
