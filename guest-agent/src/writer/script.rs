//! Script writers: a directory per writer, an executable per event.
//!
//! `registry` scans, `quiesce` sends events, `agent` calls [`recover`] at start. Invariants: nothing is run that anybody but
//! root could have changed; a script never outlives its limit, nor do its children; none is started while file systems are
//! frozen (`is_resident` is false, and the sequence sees to it).

mod process;
mod trust;

pub use process::become_script;

use super::{Answer, Identity, Writer, failure};
use crate::hold::ledger::boot_id;
use crate::journal;
use guest_agent_wire::host::{Failure, WRITER_MS_MAX};
use guest_agent_wire::types::{BackupType, Hold, Level, WriterFailure};
use guest_agent_wire::writer::{EventKind, PREPARE_MS_MAX, Reply};
use process::{Killer, Outcome, Script as Process};
use serde::Deserialize;
use serde_json::Value;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Largest `writer.json`, bytes.
const SETTINGS_BYTES_MAX: u64 = 64 * 1024;
/// Time for the abort of a writer that a killed agent left frozen.
const RECOVERY_MS: u64 = 10_000;
const MARKER: &str = "script.";
/// The executables that a writer may have.
const EVENTS: [&str; 11] = [
    "identify",
    "prepare-backup",
    "prepare",
    "freeze",
    "thaw",
    "post-snapshot",
    "backup-complete",
    "backup-shutdown",
    "abort",
    "pre-restore",
    "post-restore",
];

/// What a directory is.
#[derive(Debug)]
pub enum Directory {
    /// A writer.
    Writer(PathBuf, Identity),
    /// Its name, and why it is not trusted or understood.
    Refused(String, String),
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Settings {
    class_id: Option<String>,
    name: Option<String>,
    level: Level,
    freeze_timeout_ms: Option<u64>,
    hold: Option<Hold>,
}

/// Finds the writers below a directory, in the order of their names. A directory that does not exist has none.
#[must_use]
pub fn scan(top: &Path) -> Vec<Directory> {
    let Ok(entries) = fs::read_dir(top) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let name = path
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default();
            match identify(top, &path, &name) {
                Ok(identity) => Directory::Writer(path, identity),
                Err(why) => {
                    journal::note(format_args!("writer directory {name} is refused: {why}"));
                    Directory::Refused(name, why)
                }
            }
        })
        .collect()
}

fn identify(top: &Path, path: &Path, name: &str) -> Result<Identity, String> {
    trust::directory(top)?;
    trust::directory(path)?;
    let mut found = 0;
    for event in EVENTS {
        found += usize::from(trust::executable(&path.join(event))?);
    }
    if found == 0 {
        return Err(format!("it has none of {}", EVENTS.join(", ")));
    }
    let settings = read_settings(&path.join("writer.json"))?;
    let freeze_timeout_ms = settings.freeze_timeout_ms.unwrap_or(WRITER_MS_MAX);
    if !(1..=WRITER_MS_MAX).contains(&freeze_timeout_ms) {
        return Err(format!("freeze_timeout_ms must be 1 to {WRITER_MS_MAX}"));
    }
    Ok(Identity {
        class_id: settings
            .class_id
            .unwrap_or_else(|| format!("script:{name}")),
        instance_id: format!("script:{name}"),
        name: settings.name.unwrap_or_else(|| name.to_owned()),
        level: settings.level,
        freeze_timeout_ms,
        prepare_timeout_ms: PREPARE_MS_MAX,
        // A script is not there while the hold lasts, so it can keep no lock by itself.
        hold: settings.hold.unwrap_or(Hold::Filesystem),
    })
}

fn read_settings(path: &Path) -> Result<Settings, String> {
    if !trust::file(path)? {
        return Ok(Settings::default());
    }
    let length = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if length > SETTINGS_BYTES_MAX {
        return Err("writer.json is too large".to_owned());
    }
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    serde_json::from_str(&text).map_err(|error| format!("writer.json: {error}"))
}

/// A script writer in one set.
#[derive(Debug)]
pub struct Script {
    directory: PathBuf,
    identity: Identity,
    state_dir: PathBuf,
    shared: Arc<Shared>,
}

/// What the threads of one writer share: they run one after the other.
#[derive(Debug, Default)]
struct Shared {
    turn: Mutex<Turn>,
    killer: Killer,
}

#[derive(Debug, Default)]
struct Turn {
    backup_type: BackupType,
    frozen: bool,
}

impl Script {
    /// The writer of a directory that [`scan`] found.
    #[must_use]
    pub fn new(directory: PathBuf, identity: Identity, state_dir: PathBuf) -> Self {
        Self {
            directory,
            identity,
            state_dir,
            shared: Arc::default(),
        }
    }

    fn marker(&self) -> PathBuf {
        let name = self.directory.file_name().unwrap_or_default();
        let mut file = std::ffi::OsString::from(MARKER);
        file.push(name);
        self.state_dir.join(file)
    }
}

impl Writer for Script {
    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn begin(&self, event: EventKind, deadline_ms: u64, answer: Answer) {
        // Only an abort comes while a script runs; that script is of no more use.
        self.shared.killer.kill();
        let (directory, marker) = (self.directory.clone(), self.marker());
        let shared = Arc::clone(&self.shared);
        let run = move || {
            let mut turn = shared.turn.lock().unwrap_or_else(PoisonError::into_inner);
            answer(turn.take(&directory, &marker, &event, deadline_ms, &shared.killer));
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

impl Turn {
    fn take(
        &mut self,
        directory: &Path,
        marker: &Path,
        event: &EventKind,
        deadline_ms: u64,
        killer: &Killer,
    ) -> Result<Reply, Failure> {
        let (file, set) = match event {
            EventKind::Identify {} => ("identify", ""),
            EventKind::PrepareBackup(backup) => {
                self.backup_type = backup.backup_type;
                ("prepare-backup", backup.set.as_str())
            }
            EventKind::PrepareSnapshot(snapshot) => ("prepare", snapshot.set.as_str()),
            EventKind::Freeze(freeze) => {
                mark(marker, directory)?;
                self.frozen = true;
                ("freeze", freeze.set.as_str())
            }
            EventKind::Thaw(thaw) => ("thaw", thaw.set.as_str()),
            EventKind::PostSnapshot(snapshot) => ("post-snapshot", snapshot.set.as_str()),
            EventKind::BackupComplete(outcome) if !outcome.succeeded => {
                // A script sees no outcome: one that runs may truncate logs.
                ("backup-shutdown", outcome.set.as_str())
            }
            EventKind::BackupComplete(outcome) => ("backup-complete", outcome.set.as_str()),
            EventKind::BackupShutdown(shutdown) => ("backup-shutdown", shutdown.set.as_str()),
            EventKind::Abort(abort) => (undo(directory, self.frozen), abort.set.as_str()),
            EventKind::PreRestore(restore) => ("pre-restore", restore.set.as_str()),
            EventKind::PostRestore(restore) => ("post-restore", restore.set.as_str()),
            EventKind::Welcome(_) => ("", ""),
        };
        let said = run(directory, file, set, self.backup_type, deadline_ms, killer)?;
        let mut reply = Reply::agrees(0);
        match event {
            EventKind::Identify {} => reply.metadata = said,
            EventKind::Thaw(_) => {
                reply.held = Some(true);
                reply.evidence = said;
                self.thawed(marker);
            }
            EventKind::Abort(_) => self.thawed(marker),
            EventKind::Freeze(_)
            | EventKind::PrepareBackup(_)
            | EventKind::PrepareSnapshot(_)
            | EventKind::PostSnapshot(_)
            | EventKind::BackupComplete(_)
            | EventKind::BackupShutdown(_)
            | EventKind::PreRestore(_)
            | EventKind::PostRestore(_)
            | EventKind::Welcome(_) => reply.evidence = said,
        }
        Ok(reply)
    }

    fn thawed(&mut self, marker: &Path) {
        self.frozen = false;
        fs::remove_file(marker).unwrap_or(());
    }
}

/// What undoes a freeze: `abort`, or `thaw` for writers that have only these two.
fn undo(directory: &Path, frozen: bool) -> &'static str {
    if directory.join("abort").exists() {
        "abort"
    } else if frozen {
        "thaw"
    } else {
        ""
    }
}

/// Runs one executable if it is there; what it wrote to standard output comes back.
fn run(
    directory: &Path,
    file: &str,
    set: &str,
    backup_type: BackupType,
    deadline_ms: u64,
    killer: &Killer,
) -> Result<Value, Failure> {
    let path = directory.join(file);
    if file.is_empty() || !path.exists() {
        return Ok(Value::Null);
    }
    // Checked again right before it is run.
    for checked in [
        trust::directory(directory),
        trust::executable(&path).map(drop),
    ] {
        checked.map_err(|why| failure(WriterFailure::Nonretryable, why))?;
    }
    let backup_type = serde_json::to_value(backup_type).unwrap_or_default();
    let process = Process {
        path: &path,
        environment: &[
            ("VSS_EVENT", file),
            ("VSS_SET", set),
            ("VSS_TYPE", backup_type.as_str().unwrap_or_default()),
            ("VSS_DEADLINE_MS", &deadline_ms.to_string()),
        ],
        limit: Duration::from_millis(deadline_ms),
    };
    match process.run(killer) {
        Ok(Outcome::Succeeded { output }) => Ok(as_value(&output)),
        Ok(Outcome::Failed { status, message }) => Err(failure(
            WriterFailure::Retryable,
            format!("{file}: {status}: {message}"),
        )),
        Ok(Outcome::Killed) => Err(failure(
            WriterFailure::NotResponding,
            format!("{file} was killed at its limit"),
        )),
        Err(error) => Err(failure(
            WriterFailure::Nonretryable,
            format!("{file} cannot be run: {error}"),
        )),
    }
}

fn as_value(output: &[u8]) -> Value {
    let text = String::from_utf8_lossy(output);
    let text = text.trim();
    if text.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()))
    }
}

/// Notes that this writer is being frozen, for an agent that starts after this one was killed.
fn mark(marker: &Path, directory: &Path) -> Result<(), Failure> {
    boot_id()
        .and_then(|boot| fs::write(marker, format!("{boot}\n{}\n", directory.display())))
        .map_err(|error| failure(WriterFailure::Outofresources, error.to_string()))
}

/// Undoes the freeze of script writers that a killed agent of this boot left behind; returns how many there were.
pub fn recover(state_dir: &Path) -> io::Result<usize> {
    let boot = boot_id()?;
    let mut undone = 0;
    for entry in fs::read_dir(state_dir)?.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(MARKER) {
            continue;
        }
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let mut lines = text.lines();
        if lines.next() == Some(boot.as_str())
            && let Some(directory) = lines.next().map(Path::new)
        {
            undone += 1;
            let file = undo(directory, true);
            let killer = Killer::default();
            let none = BackupType::default();
            if let Err(failed) = run(directory, file, "", none, RECOVERY_MS, &killer) {
                let directory = directory.display();
                journal::note(format_args!("{directory}: {}", failed.message));
            }
        }
        fs::remove_file(entry.path())?;
    }
    Ok(undone)
}

#[cfg(test)]
mod tests;
