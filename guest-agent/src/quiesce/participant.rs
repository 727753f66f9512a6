//! One writer in one set: its state, what it said, and how that is reported.
//!
//! Owned by `actor`; changed by `writers`.

use crate::clock::BootTime;
use crate::writer::Writer;
use guest_agent_wire::host::{Failure, WriterInfo, WriterReport};
use guest_agent_wire::types::{BackupType, Hold, WriterState};
use guest_agent_wire::writer::{EventKind, Reply};
use serde_json::Value;
use std::sync::Arc;

/// A step in a writer's life (an event of the writer protocol).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Identify,
    PrepareBackup {
        backup_type: BackupType,
        disks: Vec<String>,
    },
    PrepareSnapshot,
    Freeze {
        generation: u64,
        hold_ms: u64,
    },
    Thaw {
        generation: u64,
    },
    PostSnapshot,
    BackupComplete,
    Abort {
        reason: String,
    },
}

impl Step {
    /// The event to send.
    pub(super) fn event(&self, set: &str, participant: &Participant) -> EventKind {
        let set = set.to_owned();
        match self {
            Self::Identify => EventKind::Identify {},
            Self::PrepareBackup { backup_type, disks } => EventKind::PrepareBackup {
                set,
                backup_type: *backup_type,
                disks: disks.clone(),
            },
            Self::PrepareSnapshot => EventKind::PrepareSnapshot { set },
            Self::Freeze {
                generation,
                hold_ms,
            } => EventKind::Freeze {
                set,
                generation: *generation,
                hold_ms: participant.window_ms(*hold_ms),
            },
            Self::Thaw { generation } => EventKind::Thaw {
                set,
                generation: *generation,
            },
            Self::PostSnapshot => EventKind::PostSnapshot { set },
            Self::BackupComplete => EventKind::BackupComplete { set },
            Self::Abort { reason } => EventKind::Abort {
                set,
                reason: reason.clone(),
            },
        }
    }

    /// Time for the answer, milliseconds, before the caller's own limit is applied.
    pub(super) fn limit_ms(&self, participant: &Participant) -> u64 {
        match self {
            Self::Identify => 30_000,
            Self::PrepareBackup { .. } | Self::PrepareSnapshot | Self::PostSnapshot => 600_000,
            Self::Freeze { hold_ms, .. } => participant.window_ms(*hold_ms),
            Self::Thaw { .. } | Self::Abort { .. } => 10_000,
            Self::BackupComplete => 60_000,
        }
    }

    /// For the log.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Identify => "identify",
            Self::PrepareBackup { .. } => "prepare_backup",
            Self::PrepareSnapshot => "prepare_snapshot",
            Self::Freeze { .. } => "freeze",
            Self::Thaw { .. } => "thaw",
            Self::PostSnapshot => "post_snapshot",
            Self::BackupComplete => "backup_complete",
            Self::Abort { .. } => "abort",
        }
    }

    fn succeeded(&self) -> WriterState {
        match self {
            Self::Identify | Self::BackupComplete | Self::Abort { .. } => WriterState::Stable,
            Self::PrepareBackup { .. } | Self::PrepareSnapshot => WriterState::WaitingForFreeze,
            Self::Freeze { .. } => WriterState::WaitingForThaw,
            Self::Thaw { .. } => WriterState::WaitingForPostSnapshot,
            Self::PostSnapshot => WriterState::WaitingForBackupComplete,
        }
    }

    fn failed(&self) -> WriterState {
        match self {
            Self::Identify => WriterState::FailedAtIdentify,
            Self::PrepareBackup { .. } => WriterState::FailedAtPrepareBackup,
            Self::PrepareSnapshot => WriterState::FailedAtPrepareSnapshot,
            Self::Freeze { .. } => WriterState::FailedAtFreeze,
            Self::Thaw { .. } => WriterState::FailedAtThaw,
            Self::PostSnapshot => WriterState::FailedAtPostSnapshot,
            Self::BackupComplete => WriterState::FailedAtBackupComplete,
            // The failure that led to the abort is worth more than that of the abort.
            Self::Abort { .. } => WriterState::Unknown,
        }
    }
}

/// A writer in a set.
pub(super) struct Participant {
    pub(super) writer: Arc<dyn Writer>,
    pub(super) state: WriterState,
    pub(super) failure: Option<Failure>,
    pub(super) held: Option<bool>,
    pub(super) metadata: Value,
    evidence: Value,
    frozen_evidence: Value,
    took_us: u64,
    /// It has heard of this set, so it must hear of its end.
    pub(super) is_involved: bool,
    /// When `freeze` was sent, until `thaw` or `abort` is.
    pub(super) frozen_since: Option<BootTime>,
    /// When the pending event was sent; `None` if none is pending.
    pub(super) asked: Option<BootTime>,
    /// When its answer is late.
    pub(super) deadline: Option<BootTime>,
}

impl Participant {
    pub(super) fn new(writer: Arc<dyn Writer>) -> Self {
        Self {
            writer,
            state: WriterState::Stable,
            failure: None,
            held: None,
            metadata: Value::Null,
            evidence: Value::Null,
            frozen_evidence: Value::Null,
            took_us: 0,
            is_involved: false,
            frozen_since: None,
            asked: None,
            deadline: None,
        }
    }

    pub(super) fn name(&self) -> String {
        self.writer.identity().name.clone()
    }

    /// How long it may stay frozen, milliseconds.
    pub(super) fn window_ms(&self, hold_ms: u64) -> u64 {
        self.writer.identity().freeze_timeout_ms.min(hold_ms)
    }

    /// An event has been sent.
    pub(super) fn sent(&mut self, step: &Step, now: BootTime, deadline: BootTime) {
        self.asked = Some(now);
        self.deadline = Some(deadline);
        self.evidence = Value::Null;
        match step {
            Step::Freeze { .. } => self.frozen_since = Some(now),
            Step::Thaw { .. } | Step::Abort { .. } => self.frozen_since = None,
            Step::Identify
            | Step::PrepareBackup { .. }
            | Step::PrepareSnapshot
            | Step::PostSnapshot
            | Step::BackupComplete => {}
        }
        if *step != Step::Identify {
            self.is_involved = true;
        }
    }

    /// The answer is there, or it is late. Returns what failed in this step.
    pub(super) fn answered(
        &mut self,
        step: &Step,
        answer: Result<Reply, Failure>,
    ) -> Option<Failure> {
        let asked = self.asked.take();
        self.deadline = None;
        self.took_us = asked.map_or(0, |asked| BootTime::now().us_since(asked));
        let reply = match answer {
            Ok(reply) if reply.ok => reply,
            Ok(reply) => {
                let code = reply
                    .code
                    .unwrap_or(guest_agent_wire::types::WriterFailure::Nonretryable);
                return Some(self.fail(step, crate::writer::failure(code, reply.message)));
            }
            Err(failure) => return Some(self.fail(step, failure)),
        };
        self.evidence = reply.evidence;
        match step {
            Step::Identify => self.metadata = reply.metadata,
            Step::Freeze { .. } => self.frozen_evidence = self.evidence.clone(),
            Step::Thaw { .. } => {
                if let Err(failure) = self.check_hold(reply.held) {
                    return Some(self.fail(step, failure));
                }
                self.held = Some(true);
            }
            Step::Abort { .. } if self.failure.is_some() => return None,
            Step::PrepareBackup { .. }
            | Step::PrepareSnapshot
            | Step::PostSnapshot
            | Step::BackupComplete
            | Step::Abort { .. } => {}
        }
        self.state = step.succeeded();
        None
    }

    /// Nobody is taken to have held who does not say so, nor an application whose own evidence changed meanwhile.
    fn check_hold(&self, held: Option<bool>) -> Result<(), Failure> {
        let is_app = self.writer.identity().hold == Hold::App;
        let why = if held != Some(true) {
            "it did not hold its writes"
        } else if is_app && self.evidence != self.frozen_evidence {
            "its evidence changed while it was frozen"
        } else {
            return Ok(());
        };
        let code = guest_agent_wire::types::WriterFailure::Retryable;
        Err(crate::writer::failure(code, why))
    }

    fn fail(&mut self, step: &Step, failure: Failure) -> Failure {
        if matches!(step, Step::Thaw { .. }) {
            self.held = Some(false);
        }
        if matches!(step, Step::Abort { .. }) && self.failure.is_some() {
            return failure;
        }
        self.state = step.failed();
        self.failure = Some(failure.clone());
        failure
    }

    /// It broke the hold, outside any step.
    pub(super) fn broke(&mut self, failure: Failure) {
        self.held = Some(false);
        self.state = WriterState::FailedAtThaw;
        self.failure = Some(failure);
    }

    pub(super) fn report(&self) -> WriterReport {
        let identity = self.writer.identity();
        WriterReport {
            instance_id: identity.instance_id.clone(),
            name: identity.name.clone(),
            state: self.state,
            held: self.held,
            evidence: self.evidence.clone(),
            failure: self.failure.clone(),
            took_ms: self.took_us / 1_000,
        }
    }

    pub(super) fn info(&self) -> WriterInfo {
        let identity = self.writer.identity();
        WriterInfo {
            class_id: identity.class_id.clone(),
            instance_id: identity.instance_id.clone(),
            name: identity.name.clone(),
            level: identity.level,
            freeze_timeout_ms: identity.freeze_timeout_ms,
            hold: identity.hold,
            state: self.state,
            last_failure: self.failure.clone(),
            metadata: self.metadata.clone(),
        }
    }
}
