//! The steps of a set: their names in progress lines, timings and documents, and the fault points of the tests.
//!
//! Called by `run`. The names are stable: scripts and tests use them.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A step, named for what is true when it is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// The intent record is on disk.
    Intent,
    /// The VM's disks, the guest's writers and file systems are known.
    Identified,
    /// Writers are prepared, file systems flushed.
    Prepared,
    /// The stores have flushed and made room.
    StoragePrepared,
    /// Writers and file systems are frozen.
    Frozen,
    /// The stores count writes from here on (and hold them, if there are several daemons).
    Marked,
    /// Every snapshot is on disk, provisional.
    Committed,
    /// File systems and writers run again.
    Thawed,
    /// The witnesses have been heard and the level is known.
    Verdict,
    /// Every store has made the snapshots permanent, and the record says so: nothing undoes the set any more.
    Kept,
    /// Writers have heard the outcome; the document is complete.
    Finished,
}

impl Step {
    /// All steps, in order.
    pub const ALL: [Self; 11] = [
        Self::Intent,
        Self::Identified,
        Self::Prepared,
        Self::StoragePrepared,
        Self::Frozen,
        Self::Marked,
        Self::Committed,
        Self::Thawed,
        Self::Verdict,
        Self::Kept,
        Self::Finished,
    ];

    /// The stable name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Intent => "intent",
            Self::Identified => "identified",
            Self::Prepared => "prepared",
            Self::StoragePrepared => "storage-prepared",
            Self::Frozen => "frozen",
            Self::Marked => "marked",
            Self::Committed => "committed",
            Self::Thawed => "thawed",
            Self::Verdict => "verdict",
            Self::Kept => "kept",
            Self::Finished => "finished",
        }
    }

    /// The step of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|step| step.as_str() == name)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Environment variable that names the step after which the process stops itself. For tests only: they kill it there.
pub const STOP_AT_VARIABLE: &str = "VMSHADOW_STOP_AT";

/// Where a test wants this process to stand still.
#[derive(Clone, Copy, Debug, Default)]
pub struct FaultPoint {
    stop_at: Option<Step>,
}

impl FaultPoint {
    /// From [`STOP_AT_VARIABLE`].
    ///
    /// # Errors
    /// The variable names no step.
    pub fn from_environment() -> Result<Self, String> {
        match std::env::var(STOP_AT_VARIABLE) {
            Err(_) => Ok(Self::default()),
            Ok(name) => match Step::from_name(&name) {
                Some(step) => Ok(Self {
                    stop_at: Some(step),
                }),
                None => Err(format!("{STOP_AT_VARIABLE}={name} names no step")),
            },
        }
    }

    /// Called after each step: raises SIGSTOP at this process if it is the one.
    pub fn passed(self, step: Step) {
        if self.stop_at == Some(step)
            && let Err(errno) = rustix::process::kill_process(
                rustix::process::getpid(),
                rustix::process::Signal::STOP,
            )
        {
            tracing::error!("SIGSTOP at {step}: {errno}");
        }
    }
}
