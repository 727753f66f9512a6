//! What a script writer runs at each event.
//!
//! Made by `own` and `foreign`, run by `script`. A step is also what is written down while a writer is frozen, so that a later
//! agent can undo it. Invariant: nothing is run that is not trusted right before it is run.

use super::process::{Job, Killer, Outcome};
use super::trust::{self, Access};
use super::{as_value, event};
use crate::writer::failure;
use guest_agent_wire::host::Failure;
use guest_agent_wire::types::{BackupType, WriterFailure};
use guest_agent_wire::writer::EventKind;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Name of the step that undoes a freeze after which no file system was frozen (VMware's `freezeFail`); beside the names of
/// events.
pub(super) const FREEZE_FAIL: &str = "freeze-fail";

/// A writer's steps.
#[derive(Clone, Debug, Default)]
pub struct Recipe {
    /// By name of the event.
    pub(super) steps: BTreeMap<&'static str, Step>,
    /// Its metadata document, if no step says it.
    pub(super) metadata: Value,
    /// While this file exists another program has frozen the same application, and would not like it thawed.
    pub(super) busy: Option<PathBuf>,
    /// What a failure of the freeze means.
    pub(super) on_failure: OnFailure,
}

/// What a failure of the freeze means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) enum OnFailure {
    /// The set is refused.
    #[default]
    Veto,
    /// The set goes on, and this writer says at the thaw that it did not hold.
    NotHeld,
}

/// One command.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Step {
    /// The script.
    pub(super) file: PathBuf,
    /// Its arguments.
    pub(super) arguments: Vec<String>,
    /// It is read by `sh`, whether executable or not.
    pub(super) by_shell: bool,
    /// It must be for its owner alone.
    pub(super) is_private: bool,
    /// Exit status that means success with a warning.
    pub(super) warning: Option<i32>,
    /// Further tries after a failure.
    pub(super) retries: u32,
    /// A limit of its own for one try.
    pub(super) limit_ms: Option<u64>,
}

/// What goes with a run of a step.
pub(super) struct Run<'a> {
    pub(super) event: &'a EventKind,
    pub(super) backup_type: BackupType,
    pub(super) limit: Duration,
    pub(super) killer: &'a Killer,
    /// It is not run any more if the killer has killed since; none for what must be run.
    pub(super) time: Option<u64>,
}

impl Recipe {
    /// What undoes the freeze, or what a writer wants to be told of an abort; and its name.
    pub(super) fn undo(&self, is_frozen: bool) -> Option<(&'static str, &Step)> {
        let names: &[&'static str] = if is_frozen {
            &["abort", FREEZE_FAIL, "thaw"]
        } else {
            &["abort"]
        };
        names
            .iter()
            .find_map(|name| Some((*name, self.steps.get(name)?)))
    }
}

impl Step {
    /// An executable that is run as it is.
    pub(super) fn executable(file: impl Into<PathBuf>, arguments: &[&str]) -> Self {
        Self {
            file: file.into(),
            arguments: arguments.iter().map(|word| (*word).to_owned()).collect(),
            ..Self::default()
        }
    }

    /// Whether it may be run.
    pub(super) fn check(&self) -> Result<(), String> {
        if !self.file.is_absolute() {
            return Err(format!("{:?} is not an absolute path", self.file));
        }
        let access = if self.is_private {
            Access::OwnerAlone
        } else {
            Access::Any
        };
        let is_there =
            trust::file(&self.file, access)? && (self.by_shell || trust::executable(&self.file)?);
        if is_there {
            Ok(())
        } else {
            Err(format!("{} is not there", self.file.display()))
        }
    }

    /// Runs it, again if it fails and may be; what it wrote to standard output comes back.
    pub(super) fn run(&self, name: &str, run: &Run<'_>) -> Result<Value, Failure> {
        let until = crate::clock::BootTime::now()
            .plus_ms(u64::try_from(run.limit.as_millis()).unwrap_or(u64::MAX));
        let mut tries = 0;
        loop {
            let outcome = self.run_once(name, run, until.remaining());
            let may_again = tries < self.retries && !until.is_past();
            match outcome {
                Err(failed) if may_again && failed.code == WriterFailure::Retryable => tries += 1,
                outcome => return outcome,
            }
        }
    }

    fn run_once(&self, name: &str, run: &Run<'_>, left: Duration) -> Result<Value, Failure> {
        // Checked again right before it is run.
        self.check()
            .map_err(|why| failure(WriterFailure::Nonretryable, why))?;
        let limit = self
            .limit_ms
            .map_or(left, |own_ms| left.min(Duration::from_millis(own_ms)));
        let arguments: Vec<OsString> = self
            .by_shell
            .then(|| self.file.clone().into_os_string())
            .into_iter()
            .chain(self.arguments.iter().map(OsString::from))
            .collect();
        let program = if self.by_shell {
            Path::new("/bin/sh")
        } else {
            &self.file
        };
        let deadline_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let job = Job {
            program,
            arguments: &arguments,
            environment: &event::environment(run.event, run.backup_type, deadline_ms),
            input: &event::input(run.event),
            limit,
        };
        let outcome = match run.time {
            Some(time) => job.run_at(run.killer, time),
            None => job.run(run.killer),
        };
        match outcome {
            Ok(Outcome::Succeeded { output }) => Ok(as_value(&output)),
            Ok(Outcome::Failed { status, message })
                if self.warning.is_some() && status.code() == self.warning =>
            {
                Ok(Value::String(format!("warning: {message}")))
            }
            Ok(Outcome::Failed { status, message }) => Err(failure(
                WriterFailure::Retryable,
                format!("{name}: {status}: {message}"),
            )),
            Ok(Outcome::Killed) => Err(failure(
                WriterFailure::NotResponding,
                format!("{name} was killed at its limit"),
            )),
            Err(error) => Err(failure(
                WriterFailure::Nonretryable,
                format!("{name} cannot be run: {error}"),
            )),
        }
    }
}
