//! The steps of a writer's life, each an event of the writer protocol: what is sent, how long the answer may take, and which
//! state it leads to.
//!
//! Used by `writers` and `participant`.

use super::participant::Participant;
use guest_agent_wire::host::POST_SNAPSHOT_MS;
use guest_agent_wire::types::WriterState;
use guest_agent_wire::writer::{
    Abort, BackupComplete, BackupShutdown, EventKind, Freeze, PostSnapshot, PrepareBackup,
    PrepareSnapshot, Restore, Thaw,
};

/// Longest time for `pre_restore` and `post_restore`, milliseconds.
pub(super) const RESTORE_MS: u64 = 1_800_000;
/// Time for a writer of which no component was picked: nobody needs its word.
const LEFT_OUT_MS: u64 = 10_000;

/// A step. What is the writer's own of an event is filled in from its [`Participant`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Identify,
    PrepareBackup(PrepareBackup),
    PrepareSnapshot,
    Freeze { generation: u64, hold_ms: u64 },
    Thaw { generation: u64 },
    PostSnapshot(PostSnapshot),
    BackupComplete(BackupComplete),
    BackupShutdown,
    Abort { reason: String },
    PreRestore,
    PostRestore,
}

impl Step {
    /// The event to send.
    pub(super) fn event(&self, set: &str, participant: &Participant) -> EventKind {
        let set = set.to_owned();
        match self {
            Self::Identify => EventKind::Identify {},
            Self::PrepareBackup(backup) => EventKind::PrepareBackup(PrepareBackup {
                components: participant.selected.clone(),
                ..backup.clone()
            }),
            Self::PrepareSnapshot => EventKind::PrepareSnapshot(PrepareSnapshot { set }),
            Self::Freeze {
                generation,
                hold_ms,
            } => EventKind::Freeze(Freeze {
                set,
                generation: *generation,
                hold_ms: participant.window_ms(*hold_ms),
            }),
            Self::Thaw { generation } => EventKind::Thaw(Thaw {
                set,
                generation: *generation,
            }),
            Self::PostSnapshot(snapshot) => EventKind::PostSnapshot(snapshot.clone()),
            Self::BackupComplete(outcome) => EventKind::BackupComplete(BackupComplete {
                components: participant.outcomes.clone(),
                ..outcome.clone()
            }),
            Self::BackupShutdown => EventKind::BackupShutdown(BackupShutdown { set }),
            Self::Abort { reason } => EventKind::Abort(Abort {
                set,
                reason: reason.clone(),
            }),
            Self::PreRestore => EventKind::PreRestore(restore(set, participant)),
            Self::PostRestore => EventKind::PostRestore(restore(set, participant)),
        }
    }

    /// Progress gives it more time.
    pub(super) fn is_prepare(&self) -> bool {
        matches!(self, Self::PrepareBackup(_) | Self::PrepareSnapshot)
    }

    /// Time for the answer, milliseconds, before the caller's own limit is applied.
    pub(super) fn limit_ms(&self, participant: &Participant) -> u64 {
        match self {
            Self::Identify => 30_000,
            Self::PrepareBackup(_) if participant.is_left_out => LEFT_OUT_MS,
            Self::PrepareBackup(_) | Self::PrepareSnapshot => {
                participant.writer.identity().prepare_timeout_ms
            }
            Self::PostSnapshot(_) => POST_SNAPSHOT_MS,
            Self::Freeze { hold_ms, .. } => participant.window_ms(*hold_ms),
            Self::Thaw { .. } | Self::Abort { .. } => 10_000,
            Self::BackupComplete(_) | Self::BackupShutdown => 60_000,
            Self::PreRestore | Self::PostRestore => RESTORE_MS,
        }
    }

    /// For the log.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Identify => "identify",
            Self::PrepareBackup(_) => "prepare_backup",
            Self::PrepareSnapshot => "prepare_snapshot",
            Self::Freeze { .. } => "freeze",
            Self::Thaw { .. } => "thaw",
            Self::PostSnapshot(_) => "post_snapshot",
            Self::BackupComplete(_) => "backup_complete",
            Self::BackupShutdown => "backup_shutdown",
            Self::Abort { .. } => "abort",
            Self::PreRestore => "pre_restore",
            Self::PostRestore => "post_restore",
        }
    }

    /// State after it.
    pub(super) fn succeeded(&self) -> WriterState {
        match self {
            // VSS: stable as long as PrepareSnapshot has not been called.
            Self::Identify
            | Self::PrepareBackup(_)
            | Self::BackupComplete(_)
            | Self::BackupShutdown
            | Self::PreRestore
            | Self::PostRestore
            | Self::Abort { .. } => WriterState::Stable,
            Self::PrepareSnapshot => WriterState::WaitingForFreeze,
            Self::Freeze { .. } => WriterState::WaitingForThaw,
            Self::Thaw { .. } => WriterState::WaitingForPostSnapshot,
            Self::PostSnapshot(_) => WriterState::WaitingForBackupComplete,
        }
    }

    /// State after its failure.
    pub(super) fn failed(&self) -> WriterState {
        match self {
            Self::Identify => WriterState::FailedAtIdentify,
            Self::PrepareBackup(_) => WriterState::FailedAtPrepareBackup,
            Self::PrepareSnapshot => WriterState::FailedAtPrepareSnapshot,
            Self::Freeze { .. } => WriterState::FailedAtFreeze,
            Self::Thaw { .. } => WriterState::FailedAtThaw,
            Self::PostSnapshot(_) => WriterState::FailedAtPostSnapshot,
            Self::BackupComplete(_) => WriterState::FailedAtBackupComplete,
            Self::BackupShutdown => WriterState::FailedAtBackupshutdown,
            Self::PreRestore => WriterState::FailedAtPreRestore,
            Self::PostRestore => WriterState::FailedAtPostRestore,
            // The failure that led to the abort is worth more than that of the abort.
            Self::Abort { .. } => WriterState::Unknown,
        }
    }
}

fn restore(set: String, participant: &Participant) -> Restore {
    Restore {
        set,
        components: participant.restore.clone(),
    }
}
