//! Why a set is not made, and what each peer's error means for it.
//!
//! Called by the rooms of `run`.

use super::super::document::ReasonCode;
use crate::guest::GuestError;
use crate::storage::StorageError;
use crate::vm::VmError;
use guest_agent_wire::host::ErrorCode;
use vhost_blk_wire::qmp::ErrorClass;

/// Why the set is not made.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) code: ReasonCode,
    pub(super) message: String,
    pub(super) retryable: bool,
}

impl Failure {
    pub(super) fn new(code: ReasonCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            retryable: false,
        }
    }

    pub(super) fn retryable(mut self) -> Self {
        self.retryable = true;
        self
    }
}

pub(super) fn internal(what: &str) -> Failure {
    Failure::new(ReasonCode::BadRequest, format!("internal error: {what}"))
}

/// The error and its causes on one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// A lower level may still be had after this failure: nothing was committed, and it was the guest's.
pub(super) fn can_go_lower(code: ReasonCode) -> bool {
    match code {
        ReasonCode::VmNotRunning
        | ReasonCode::AgentUnreachable
        | ReasonCode::AgentFailed
        | ReasonCode::WriterVeto
        | ReasonCode::WriterNotResponding
        | ReasonCode::FlushWritesTimeout
        | ReasonCode::FreezeFailed
        // Said before the commit only by an agent that can never reach the level.
        | ReasonCode::LevelNotReached
        | ReasonCode::HoldBroken => true,
        ReasonCode::SnapshotSetInProgress
        | ReasonCode::BadRequest
        | ReasonCode::HypervisorUnreachable
        | ReasonCode::VmMigrating
        | ReasonCode::VmDisturbed
        | ReasonCode::DiskNotCovered
        | ReasonCode::HoldWritesTimeout
        | ReasonCode::ProviderUnreachable
        | ReasonCode::ProviderVeto
        | ReasonCode::InsufficientStorage
        | ReasonCode::Cancelled
        | ReasonCode::BridgeDied
        | ReasonCode::StateDirectory => false,
    }
}

pub(super) fn failure_is_of_writers(code: ReasonCode) -> bool {
    code == ReasonCode::WriterVeto
        || code == ReasonCode::WriterNotResponding
        || code == ReasonCode::LevelNotReached
}

pub(super) fn storage_failure(error: &StorageError) -> Failure {
    let text = error.to_string();
    let code = if error.is(ErrorClass::SetInProgress) {
        ReasonCode::SnapshotSetInProgress
    } else if error.is(ErrorClass::HoldBroken) {
        ReasonCode::HoldWritesTimeout
    } else if error.is(ErrorClass::FlushTimeout) {
        ReasonCode::FlushWritesTimeout
    } else if error.is(ErrorClass::InsufficientStorage) {
        ReasonCode::InsufficientStorage
    } else if error.is_answer() {
        ReasonCode::ProviderVeto
    } else if error.is_deadline() {
        ReasonCode::HoldWritesTimeout
    } else {
        ReasonCode::ProviderUnreachable
    };
    let failure = Failure::new(code, text);
    let transient = [
        ReasonCode::SnapshotSetInProgress,
        ReasonCode::HoldWritesTimeout,
        ReasonCode::FlushWritesTimeout,
    ];
    if transient.contains(&code) {
        failure.retryable()
    } else {
        failure
    }
}

/// The same where a late answer means something else than a hold that took too long.
pub(super) fn unreachable_or(error: &StorageError, late: ReasonCode) -> Failure {
    if error.is_deadline() {
        Failure::new(late, error.to_string()).retryable()
    } else {
        storage_failure(error)
    }
}

pub(super) fn guest_failure(error: &GuestError) -> Failure {
    let text = error.to_string();
    match error {
        GuestError::Link(_) => Failure::new(ReasonCode::AgentUnreachable, text).retryable(),
        GuestError::BadAnswer { .. } | GuestError::VersionMismatch { .. } => {
            Failure::new(ReasonCode::AgentFailed, text)
        }
        GuestError::Refused(refused) => {
            let code = match refused.code {
                ErrorCode::SnapshotSetInProgress => ReasonCode::SnapshotSetInProgress,
                ErrorCode::WriterVeto => ReasonCode::WriterVeto,
                ErrorCode::WriterNotResponding => ReasonCode::WriterNotResponding,
                ErrorCode::FlushWritesTimeout => ReasonCode::FlushWritesTimeout,
                ErrorCode::FreezeFailed => ReasonCode::FreezeFailed,
                ErrorCode::HoldBroken => ReasonCode::HoldBroken,
                ErrorCode::BadRequest
                | ErrorCode::VersionMismatch
                | ErrorCode::SetNotFound
                | ErrorCode::Internal => ReasonCode::AgentFailed,
            };
            let failure = Failure::new(code, text);
            if refused.retryable {
                failure.retryable()
            } else {
                failure
            }
        }
    }
}

pub(super) fn vm_failure(error: &VmError) -> Failure {
    let code = match error {
        VmError::Unreachable { .. } => ReasonCode::HypervisorUnreachable,
        VmError::NotRunning { .. } => ReasonCode::VmNotRunning,
        VmError::Migrating { .. } => ReasonCode::VmMigrating,
    };
    Failure::new(code, error.to_string()).retryable()
}
