//! One writer in one set: its state, what it said, and how that is reported.
//!
//! Owned by `actor`; changed by `writers`.

use super::cause::Cause;
use super::step::Step;
use super::words;
use crate::clock::BootTime;
use crate::writer::{Writer, failure};
use guest_agent_wire::components::{
    ComponentOutcome, ComponentReply, RestoreComponent, SelectedComponent,
};
use guest_agent_wire::host::{Failure, WriterInfo, WriterReport};
use guest_agent_wire::metadata::Metadata;
use guest_agent_wire::types::{Hold, WriterFailure, WriterState};
use guest_agent_wire::writer::Reply;
use serde_json::Value;
use std::sync::Arc;

/// A writer in a set.
pub(super) struct Participant {
    pub(super) writer: Arc<dyn Writer>,
    pub(super) state: WriterState,
    pub(super) failure: Option<Failure>,
    pub(super) held: Option<bool>,
    pub(super) metadata: Option<Box<Metadata>>,
    /// Components that the requester picked.
    pub(super) selected: Vec<SelectedComponent>,
    /// Component mode, and none of its components was picked: it hears prepare-backup and nothing more.
    pub(super) is_left_out: bool,
    /// What became of its components.
    pub(super) outcomes: Vec<ComponentOutcome>,
    /// What is restored of it.
    pub(super) restore: Vec<RestoreComponent>,
    /// What it said of its components.
    components: Vec<ComponentReply>,
    evidence: Value,
    frozen_evidence: Value,
    /// Length of its components and of its evidence in an answer to the host.
    said_bytes: (usize, usize),
    took_us: u64,
    /// It has heard of this set, so it must hear of its end.
    pub(super) is_involved: bool,
    /// When `freeze` was sent, until `thaw` is answered or `abort` is sent.
    pub(super) frozen_since: Option<BootTime>,
    /// When the pending event was sent; `None` if none is pending.
    pub(super) asked: Option<BootTime>,
    /// When its answer is late.
    pub(super) deadline: Option<BootTime>,
    /// What a word of progress makes of the deadline: so many milliseconds, but not beyond this time.
    patience: Option<(u64, Option<BootTime>)>,
}

impl Participant {
    pub(super) fn new(writer: Arc<dyn Writer>) -> Self {
        Self {
            writer,
            state: WriterState::Stable,
            failure: None,
            held: None,
            metadata: None,
            selected: Vec::new(),
            is_left_out: false,
            outcomes: Vec::new(),
            restore: Vec::new(),
            components: Vec::new(),
            evidence: Value::Null,
            frozen_evidence: Value::Null,
            said_bytes: (0, 0),
            took_us: 0,
            is_involved: false,
            frozen_since: None,
            asked: None,
            deadline: None,
            patience: None,
        }
    }

    /// With what is remembered of it.
    pub(super) fn remembered(writer: Arc<dyn Writer>, known: Option<&WriterInfo>) -> Self {
        let mut participant = Self::new(writer);
        if let Some(known) = known {
            participant.state = known.state;
            participant.failure.clone_from(&known.last_failure);
            participant.metadata.clone_from(&known.metadata);
        }
        participant
    }

    /// A new set begins; what became of the last one is told no longer.
    pub(super) fn begin_set(&mut self) {
        self.state = WriterState::Stable;
        self.failure = None;
    }

    /// The requester picked these components, which must be in the document as far as it is known.
    pub(super) fn select(&mut self, picked: &[SelectedComponent]) -> Result<(), Cause> {
        for component in picked {
            let (path, name) = (&component.logical_path, &component.name);
            if let Some(metadata) = &self.metadata
                && metadata.component(path, name).is_none()
            {
                let writer = self.name();
                let why = format!("writer {writer} has no component {name:?} at {path:?}");
                return Err(Cause::BadRequest(why));
            }
        }
        self.selected.extend_from_slice(picked);
        self.is_left_out &= picked.is_empty();
        Ok(())
    }

    /// A requester calls it so.
    pub(super) fn is_called(&self, name: &str) -> bool {
        let identity = self.writer.identity();
        [&identity.instance_id, &identity.class_id, &identity.name]
            .into_iter()
            .any(|own| own == name)
    }

    pub(super) fn name(&self) -> String {
        self.writer.identity().name.clone()
    }

    /// How long it may stay frozen, milliseconds.
    pub(super) fn window_ms(&self, hold_ms: u64) -> u64 {
        self.writer.identity().freeze_timeout_ms.min(hold_ms)
    }

    /// An event has been sent. It is answered in so many milliseconds, and in any case `until` then.
    pub(super) fn sent(&mut self, step: &Step, now: BootTime, until: Option<BootTime>) -> BootTime {
        let limit_ms = step.limit_ms(self);
        let own = now.plus_ms(limit_ms);
        let deadline = until.map_or(own, |until| until.min(own));
        self.asked = Some(now);
        self.deadline = Some(deadline);
        self.patience = step.is_prepare().then_some((limit_ms, until));
        self.evidence = Value::Null;
        self.said_bytes.1 = 0;
        match step {
            Step::Freeze { .. } => self.frozen_since = Some(now),
            Step::Abort { .. } => self.frozen_since = None,
            // What it says until it has answered is still about this hold.
            Step::Thaw { .. }
            | Step::Identify
            | Step::PrepareBackup(_)
            | Step::PrepareSnapshot
            | Step::PostSnapshot(_)
            | Step::BackupComplete(_)
            | Step::BackupShutdown
            | Step::PreRestore
            | Step::PostRestore => {}
        }
        if *step != Step::Identify {
            self.is_involved = true;
        }
        deadline
    }

    /// It says that it is at work.
    pub(super) fn progressed(&mut self) {
        if let (Some(_), Some((limit_ms, until))) = (self.asked, self.patience) {
            let own = BootTime::now().plus_ms(limit_ms);
            self.deadline = Some(until.map_or(own, |until| until.min(own)));
        }
    }

    /// How much of an answer to the host its words take, bytes.
    pub(super) fn said_bytes(&self) -> usize {
        self.said_bytes.0 + self.said_bytes.1
    }

    /// The answer is there, or it is late; so many bytes of it have room. Returns what failed in this step.
    pub(super) fn answered(
        &mut self,
        step: &Step,
        answer: Result<Reply, Failure>,
        room_bytes: usize,
    ) -> Option<Failure> {
        let asked = self.asked.take();
        self.deadline = None;
        self.took_us = asked.map_or(0, |asked| BootTime::now().us_since(asked));
        if matches!(step, Step::Thaw { .. }) {
            self.frozen_since = None;
            if self.held == Some(false) {
                // A hold that was lost stays lost whatever is said at its end, and why is told already.
                return None;
            }
        }
        let said_before = self.said_bytes.0;
        let answer = answer.and_then(|reply| words::fit(reply, said_before, room_bytes));
        let reply = match answer {
            Ok(reply) if reply.ok => match failed_component(&reply.components) {
                None => reply,
                // Whatever it says of itself.
                Some(failure) => {
                    self.add(reply.components);
                    return Some(self.fail(step, failure));
                }
            },
            Ok(reply) => {
                self.add(reply.components);
                let code = reply.code.unwrap_or(WriterFailure::Nonretryable);
                let why = words::for_people(&reply.message);
                return Some(self.fail(step, failure(code, why)));
            }
            Err(failure) => return Some(self.fail(step, failure)),
        };
        self.said_bytes.1 = words::bytes(&reply.evidence);
        self.evidence = reply.evidence;
        self.add(reply.components);
        match step {
            Step::Identify => {
                if let Err(why) = self.identified(reply.metadata) {
                    let why = format!("metadata document: {why}");
                    return Some(self.fail(step, failure(WriterFailure::Nonretryable, why)));
                }
                // What became of the last set is still to be told.
                if self.state != WriterState::FailedAtIdentify {
                    return None;
                }
                self.failure = None;
            }
            Step::Freeze { .. } => {
                if self.is_unproven() {
                    let why = "it holds its writes itself (hold: app), but gives no evidence";
                    return Some(self.fail(step, failure(WriterFailure::Nonretryable, why)));
                }
                self.frozen_evidence = self.evidence.clone();
            }
            Step::Thaw { .. } => {
                if let Err(failure) = self.check_hold(reply.held) {
                    return Some(self.fail(step, failure));
                }
                self.held = Some(true);
            }
            Step::Abort { .. } if self.failure.is_some() => return None,
            // A failure is still to be told after the snapshot, and when the backup is complete.
            Step::PostSnapshot(_) | Step::BackupComplete(_) | Step::BackupShutdown
                if self.failure.is_some() =>
            {
                return None;
            }
            Step::PrepareBackup(_) if self.is_left_out => {
                self.state = WriterState::Stable;
                return None;
            }
            Step::PrepareBackup(_)
            | Step::PrepareSnapshot
            | Step::PostSnapshot(_)
            | Step::BackupComplete(_)
            | Step::BackupShutdown
            | Step::PreRestore
            | Step::PostRestore
            | Step::Abort { .. } => {}
        }
        self.state = step.succeeded();
        None
    }

    fn identified(&mut self, said: Value) -> Result<(), String> {
        let mut metadata = if said.is_null() {
            Metadata::default()
        } else {
            serde_json::from_value(said).map_err(|error| error.to_string())?
        };
        metadata.check().map_err(|error| error.to_string())?;
        // A document cannot speak for another writer.
        let identity = self.writer.identity();
        metadata.class_id.clone_from(&identity.class_id);
        metadata.instance_id.clone_from(&identity.instance_id);
        metadata.name.clone_from(&identity.name);
        self.metadata = Some(Box::new(metadata));
        Ok(())
    }

    /// Its document is left out if it has no room in what is left of the answer; returns what is left then.
    pub(super) fn fit_document(&mut self, room_bytes: usize) -> usize {
        let Some(document) = &self.metadata else {
            return room_bytes;
        };
        let bytes = serde_json::to_vec(document).map_or(usize::MAX, |text| text.len());
        if let Some(left) = room_bytes.checked_sub(bytes) {
            return left;
        }
        self.metadata = None;
        let why = format!("its metadata document of {bytes} bytes has no room in the answer");
        self.fail(&Step::Identify, failure(WriterFailure::Outofresources, why));
        room_bytes
    }

    /// Adds what it said of its components to what it said before.
    fn add(&mut self, said: Vec<ComponentReply>) {
        if said.is_empty() {
            return;
        }
        self.merge(said);
        self.said_bytes.0 = words::bytes(&self.components);
    }

    fn merge(&mut self, said: Vec<ComponentReply>) {
        for reply in said {
            let known = self.components.iter_mut().find(|known| {
                (&known.logical_path, &known.name) == (&reply.logical_path, &reply.name)
            });
            let Some(known) = known else {
                self.components.push(reply);
                continue;
            };
            known.stamp = reply.stamp.or(known.stamp.take());
            if !reply.metadata.is_null() {
                known.metadata = reply.metadata;
            }
            known.partial_files.extend(reply.partial_files);
            known.differenced_files.extend(reply.differenced_files);
            known.target = reply.target.or(known.target);
            known.failure = reply.failure.or(known.failure.take());
        }
    }

    /// Nothing could be compared at the thaw, so nobody but itself would know whether it held.
    fn is_unproven(&self) -> bool {
        self.writer.identity().hold == Hold::App && self.evidence.is_null()
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
        Err(failure(WriterFailure::Retryable, why))
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

    /// It broke the hold, outside any step. The first reason stays.
    pub(super) fn broke(&mut self, failure: Failure) {
        if self.held == Some(false) {
            return;
        }
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
            components: self.components.clone(),
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

/// A component that failed though others did not: its writer has not done what it was asked.
fn failed_component(components: &[ComponentReply]) -> Option<Failure> {
    components.iter().find_map(|component| {
        let why = component.failure.as_ref()?;
        let text = format!("component {}: {}", component.name, why.message);
        Some(failure(WriterFailure::PartialFailure, text))
    })
}
