//! Why an operation on sets failed, by what the caller can do about it.
//!
//! Used by `sets`, `daemon` and `cli`. A set that could not be made is no error but a document with a reason; errors are
//! what happens outside of a set.

use crate::qmp::CallError;
use crate::snapshot::intent::StateError;
use crate::storage::StorageError;
use std::path::PathBuf;
use vhost_blk_wire::qmp::{ErrorClass, QmpError};

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request makes no sense: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// The configuration file is wrong.
    #[error("{}: {why}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// No such set, snapshot or VM.
    #[error("{0}")]
    NotFound(String),
    /// Somebody works on this VM: one at a time (VSS: SNAPSHOT_SET_IN_PROGRESS).
    #[error(
        "SNAPSHOT_SET_IN_PROGRESS: a set of {vm} is being made or undone, or a restore is open"
    )]
    SetInProgress {
        /// The VM.
        vm: String,
    },
    /// It cannot be done now.
    #[error("{0}")]
    InvalidState(String),
    /// vhost-blk refused or cannot be reached.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The agent refused or cannot be reached.
    #[error(transparent)]
    Guest(#[from] crate::guest::GuestError),
    /// The state directory failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// The bridge daemon refused or cannot be reached.
    #[error("bridge at {}: {source}", socket.display())]
    Bridge {
        /// Its socket.
        socket: PathBuf,
        /// What went wrong.
        #[source]
        source: CallError,
    },
    /// A local file or stream failed.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    /// The error as the daemon's clients see it.
    #[must_use]
    pub fn to_qmp(&self) -> QmpError {
        let class = match self {
            Self::NotFound(_) | Self::State(StateError::NotFound(_)) => ErrorClass::SetNotFound,
            Self::SetInProgress { .. } => ErrorClass::SetInProgress,
            Self::InvalidState(_) => ErrorClass::InvalidState,
            Self::Usage(_)
            | Self::Config { .. }
            | Self::Storage(_)
            | Self::Guest(_)
            | Self::State(_)
            | Self::Bridge { .. }
            | Self::Io { .. } => ErrorClass::GenericError,
        };
        QmpError::new(class, self.to_string())
    }
}
