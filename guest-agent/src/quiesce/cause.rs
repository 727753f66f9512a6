//! Why a set could not go on, and what the host is told about it.
//!
//! Made by `actor` and its steps; turned into an [`AgentError`] by both protocols.

use guest_agent_wire::host::{AgentError, ErrorCode, Failure};

/// Why a set ended before its time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// A writer said no.
    #[error("writer {name} refused: {} ({:?})", failure.message, failure.code)]
    Veto {
        /// Its name.
        name: String,
        /// What it said.
        failure: Failure,
    },
    /// A writer did not answer in time, or hung up.
    #[error("writer {name} did not answer: {}", failure.message)]
    NotResponding {
        /// Its name.
        name: String,
        /// What was found.
        failure: Failure,
    },
    /// File systems were not all frozen inside the limit.
    #[error("the file systems did not freeze within {hold_ms} ms")]
    FlushTimeout {
        /// The limit.
        hold_ms: u64,
    },
    /// A file system cannot be frozen.
    #[error("{mountpoint}: {why}")]
    FreezeFailed {
        /// Where it is mounted.
        mountpoint: String,
        /// What the kernel said.
        why: String,
    },
    /// The dead-man thawed the file systems.
    #[error("the hold limit of {hold_ms} ms passed")]
    DeadMan {
        /// The limit.
        hold_ms: u64,
    },
    /// A writer's time was over.
    #[error("the time of writer {name} was over")]
    WindowOver {
        /// Its name.
        name: String,
    },
    /// A writer hung up while it was frozen, or was hung up on.
    #[error("writer {name} was lost while frozen: {why}")]
    WriterGone {
        /// Its name.
        name: String,
        /// What was found.
        why: String,
    },
    /// A writer resumed while it was frozen.
    #[error("writer {name} resumed before the thaw: {why}")]
    WriterReleased {
        /// Its name.
        name: String,
        /// What it said.
        why: String,
    },
    /// The host asked for what is not there.
    #[error("{0}")]
    BadRequest(String),
    /// The helper process died.
    #[error("the helper that held the file systems died")]
    HelperDied,
    /// The host closed its side.
    #[error("the host went away")]
    HostGone,
    /// The host asked for it.
    #[error("aborted by the host: {0}")]
    Aborted(String),
    /// Something that should work did not.
    #[error("{0}")]
    Internal(String),
}

impl Cause {
    /// The code for the host.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Veto { .. } => ErrorCode::WriterVeto,
            Self::NotResponding { .. } => ErrorCode::WriterNotResponding,
            Self::FlushTimeout { .. } => ErrorCode::FlushWritesTimeout,
            Self::FreezeFailed { .. } => ErrorCode::FreezeFailed,
            Self::DeadMan { .. }
            | Self::WindowOver { .. }
            | Self::WriterGone { .. }
            | Self::WriterReleased { .. }
            | Self::HelperDied => ErrorCode::HoldBroken,
            Self::BadRequest(_) => ErrorCode::BadRequest,
            Self::HostGone | Self::Aborted(_) => ErrorCode::SetNotFound,
            Self::Internal(_) => ErrorCode::Internal,
        }
    }

    /// Another try may work.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Veto { failure, .. } => failure.code.is_retryable(),
            Self::NotResponding { .. }
            | Self::FlushTimeout { .. }
            | Self::DeadMan { .. }
            | Self::WindowOver { .. }
            | Self::WriterGone { .. }
            | Self::WriterReleased { .. }
            | Self::HelperDied
            | Self::HostGone
            | Self::Aborted(_) => true,
            Self::FreezeFailed { .. } | Self::BadRequest(_) | Self::Internal(_) => false,
        }
    }

    /// For the host, without reports.
    #[must_use]
    pub fn error(&self) -> AgentError {
        error(self.code(), self.to_string(), self.is_retryable())
    }
}

/// An error without reports.
#[must_use]
pub fn error(code: ErrorCode, message: String, retryable: bool) -> AgentError {
    AgentError {
        code,
        message,
        retryable,
        writers: Vec::new(),
        filesystems: Vec::new(),
    }
}
