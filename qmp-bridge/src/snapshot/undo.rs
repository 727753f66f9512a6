//! Takes a set back, at the stores and in the guest, for a bridge that lives or for one that has died.
//!
//! Called by `run` after a failure, and by `sets` for open records whose maker is dead. Idempotent: it may be repeated
//! until it says that nothing is left.

use super::document::{Outcome, Reason, ReasonCode, SetDocument};
use super::intent::{StateDirectory, StateError};
use super::level::Level;
use super::run::Limits;
use super::step::Step;
use crate::guest::{AgentAddress, Guest, GuestError, StockClient};
use crate::link::LinkError;
use crate::shown::plain;
use crate::storage::{StorageClient, StorageError};
use guest_agent_wire::host::ErrorCode;
use guest_agent_wire::types::BackupType;
use std::path::Path;
use std::time::Duration;
use tokio::time::Instant;
use uuid::Uuid;
use vhost_blk_wire::command::{SnapshotSetAbort, SnapshotSetDelete};
use vhost_blk_wire::qmp::ErrorClass;
use vhost_blk_wire::types::SnapshotState;

/// Pause between two looks at a daemon that is still undoing.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Makes sure that a daemon holds nothing of a set: no hold, no provisional snapshot, no kept one.
///
/// # Errors
/// The daemon does not answer, or still holds something at the limit.
pub async fn at_daemon(
    control: &Path,
    set: Uuid,
    reason: &str,
    limit: Duration,
) -> Result<(), StorageError> {
    let deadline = Instant::now() + limit;
    let client = StorageClient::connect(control, limit).await?;
    loop {
        let abort = SnapshotSetAbort {
            set,
            reason: reason.to_owned(),
        };
        let aborted = client.call(&abort, limit).await;
        let left = client.snapshots(limit).await?;
        let mut of_it = left.iter().filter(|snapshot| snapshot.set == set);
        match of_it.next() {
            // Refusals are fine as long as nothing is left: a set that was undone already is not found.
            None => match aborted {
                Err(error) if !error.is_answer() => return Err(error),
                Ok(_) | Err(_) => return Ok(()),
            },
            Some(snapshot) if snapshot.state == SnapshotState::Kept => {
                let deleted = client.call(&SnapshotSetDelete { set }, limit).await;
                match deleted {
                    Err(error) if !error.is(ErrorClass::SetNotFound) => return Err(error),
                    Ok(_) | Err(_) => {}
                }
            }
            Some(_) => {
                if let Err(error) = aborted
                    && Instant::now() >= deadline
                {
                    return Err(error);
                }
            }
        }
        if Instant::now() >= deadline {
            return Err(StorageError {
                control: control.to_owned(),
                source: LinkError::Deadline {
                    limit_ms: limit.as_millis(),
                }
                .into(),
            });
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// What became of an undoing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Undone {
    /// For the record.
    pub line: String,
    /// Nothing has to be tried again.
    pub sure: bool,
}

impl Undone {
    pub(super) fn sure(line: impl Into<String>) -> Self {
        Self {
            line: line.into(),
            sure: true,
        }
    }
}

/// Thaws and aborts in the guest on a connection of its own. Our agent has done so already when it lost its host, and its
/// dead-man thaws anyway: this makes sure, and says so. QEMU's agent has no dead-man: until it has answered, it has to be asked
/// again, unless the VM is gone and its freeze with it.
pub async fn in_guest(agent: &AgentAddress, set: Uuid, reason: &str, limit: Duration) -> Undone {
    if let AgentAddress::Qga(_) = agent {
        return match StockClient::thaw_whatever(agent, limit).await {
            Ok(count) => Undone::sure(format!("guest: thawed {count} on a new connection")),
            Err(GuestError::Refused(error)) if error.code == ErrorCode::HoldBroken => {
                Undone::sure(format!("guest: had thawed itself ({error})"))
            }
            Err(GuestError::Link(LinkError::Absent { why })) => {
                Undone::sure(format!("guest: gone, and its freeze with it ({why})"))
            }
            Err(error) => Undone {
                line: format!("guest: not known to be thawed ({error})"),
                sure: false,
            },
        };
    }
    let aborting = async {
        // `hello` alone already ends a set that an earlier conversation left open.
        match Guest::connect(agent, limit).await? {
            Guest::Native(guest) => guest.abort(set.to_string(), reason.to_owned(), limit).await,
            Guest::Stock(guest) => guest.thaw(limit).await.map(drop),
        }
    };
    let result: Result<(), GuestError> = aborting.await;
    match result {
        Ok(()) => Undone::sure("guest: aborted on a new connection"),
        Err(error) => Undone::sure(format!(
            "guest: not reached ({error}); its dead-man thaws it"
        )),
    }
}

/// Ends the record of a dead bridge: undoes an open set, completes a kept one. The caller holds the VM's lock.
///
/// # Errors
/// The state directory failed. A daemon that cannot be reached leaves the record open, to be tried again.
pub async fn of_the_dead(
    state: &StateDirectory,
    document: &mut SetDocument,
    limits: &Limits,
) -> Result<(), StateError> {
    match document.outcome {
        Outcome::Open => {}
        Outcome::Kept if !document.finished => {
            document.notes.push(
                "the bridge died before it had told the writers of the set (no post-snapshot, no backup-complete)"
                    .to_owned(),
            );
            // It may have told them, and then they wait for the end of the backup.
            document.awaits_backup = document.level_reached == Some(Level::Application)
                && document.request.backup_type != BackupType::Copy;
            document.finished = true;
            return state.store(document);
        }
        Outcome::Kept | Outcome::Refused | Outcome::Failed | Outcome::Undone => return Ok(()),
    }
    let reason = "the bridge that made this set died";
    let mut left = Vec::new();
    for control in document.vm.vhost_blk.clone().iter().rev() {
        match at_daemon(control, document.set, reason, limits.abort).await {
            Ok(()) => document
                .undone
                .push(format!("storage {}: nothing left", control.display())),
            Err(error) => left.push(error.to_string()),
        }
    }
    if let Some(agent) = document.vm.agent.clone() {
        let undone = in_guest(&agent, document.set, reason, limits.hello_again).await;
        if !undone.sure {
            left.push(undone.line.clone());
        }
        document.undone.push(undone.line);
    }
    if left.is_empty() {
        document.outcome = Outcome::Undone;
        document.finished = true;
        document.level_reached = None;
        document.copies.clear();
        if document.reason.is_none() {
            document.reason = Some(Reason {
                code: ReasonCode::BridgeDied,
                message: reason.to_owned(),
                step: document
                    .timings
                    .steps
                    .last()
                    .map_or(Step::Intent, |time| time.step),
                retryable: true,
            });
        }
    } else {
        for line in left {
            let line = plain(&line);
            tracing::warn!("set {}: cannot be undone yet: {line}", document.set);
        }
        // The record stays open, and the next start tries again.
        document.undone.clear();
    }
    state.store(document)
}
