//! What goes on beside the one open set: sets that are kept and wait for their backup to be complete; and restores.
//!
//! Part of `actor`. Invariants: every writer of a kept set hears exactly one of backup-complete, backup-shutdown and abort,
//! unless it or this agent is gone; every writer that heard pre-restore hears post-restore or abort.

use super::actor::{Actor, Set};
use super::cause::Cause;
use super::participant::Participant;
use super::service::Request;
use super::state::{Effect, Event, Phase};
use super::step::{RESTORE_MS, Step};
use super::writers::{LEVELS, OnFailure, absent};
use crate::clock::BootTime;
use crate::journal;
use guest_agent_wire::components::ComponentOutcome;
use guest_agent_wire::host::{BackupComplete, PostSnapshot, Restore, WritersSaid};
use guest_agent_wire::writer;

/// Most sets that wait at a time (VSS: backup sessions); one more shuts down the oldest.
const INCOMPLETE_MAX: usize = 64;

/// A set that is kept and waits for its backup to be complete.
pub(super) struct Incomplete {
    pub(super) name: String,
    participants: Vec<Participant>,
    /// It waits also when the conversation that made it has ended.
    is_detached: bool,
}

impl Actor {
    /// Tells writers the verdict.
    pub(super) fn finish(&mut self, post: &PostSnapshot) -> WritersSaid {
        self.interruptible = false;
        if !post.kept {
            self.abort_writers("the set was not kept");
            return self.said();
        }
        let snapshot = writer::PostSnapshot {
            set: post.set.clone(),
            snapshots: post.snapshots.clone(),
            mount: post.mount.clone(),
        };
        self.tell_all(&Step::PostSnapshot(snapshot), None);
        let said = self.said();
        let participants = std::mem::take(&mut self.set.participants);
        for participant in &participants {
            self.remember(participant);
        }
        if self.incomplete.len() >= INCOMPLETE_MAX {
            self.orphans.push(self.incomplete.remove(0));
        }
        self.incomplete.push(Incomplete {
            name: post.set.clone(),
            participants,
            is_detached: post.detached,
        });
        said
    }

    /// The same for a set whose requester never says more. It is a `copy`, so no writer changes its history for it.
    pub(super) fn finish_without_requester(&mut self, set: &str, until: BootTime) {
        self.interruptible = false;
        let snapshot = writer::PostSnapshot {
            set: set.to_owned(),
            ..writer::PostSnapshot::default()
        };
        let outcome = writer::BackupComplete {
            set: set.to_owned(),
            succeeded: true,
            components: Vec::new(),
        };
        self.tell_all(&Step::PostSnapshot(snapshot), Some(until));
        self.tell_all(&Step::BackupComplete(outcome), Some(until));
    }

    pub(super) fn is_incomplete(&self, set: &str) -> bool {
        self.incomplete.iter().any(|waiting| waiting.name == set)
    }

    /// Takes a waiting set up again, as the set that the actor works on.
    fn resume(&mut self, set: &str) -> bool {
        let found = self
            .incomplete
            .iter()
            .position(|waiting| waiting.name == set);
        let Some(found) = found else {
            return false;
        };
        let waiting = self.incomplete.remove(found);
        self.work_on(waiting);
        true
    }

    fn work_on(&mut self, waiting: Incomplete) {
        self.interruptible = false;
        self.set = Set {
            name: waiting.name,
            participants: waiting.participants,
            ..Set::default()
        };
    }

    /// Tells writers what became of the backup; `None` if no such set waits.
    pub(super) fn complete(&mut self, outcome: &BackupComplete) -> Option<WritersSaid> {
        if !self.resume(&outcome.set) {
            return None;
        }
        for participant in &mut self.set.participants {
            let said = outcome.components.iter();
            let said: Vec<&ComponentOutcome> = said
                .filter(|said| participant.is_called(&said.writer))
                .flat_map(|said| &said.components)
                .collect();
            // A component of which nothing is said fared as the backup did.
            participant.outcomes = participant
                .selected
                .iter()
                .map(|picked| {
                    let own = said.iter().find(|said| {
                        (&said.logical_path, &said.name) == (&picked.logical_path, &picked.name)
                    });
                    ComponentOutcome {
                        logical_path: picked.logical_path.clone(),
                        name: picked.name.clone(),
                        succeeded: own.map_or(outcome.succeeded, |own| own.succeeded),
                    }
                })
                .collect();
        }
        let step = Step::BackupComplete(writer::BackupComplete {
            set: outcome.set.clone(),
            succeeded: outcome.succeeded,
            components: Vec::new(),
        });
        self.tell_all(&step, None);
        Some(self.said())
    }

    /// Aborts a waiting set.
    pub(super) fn give_up(&mut self, set: &str, reason: &str) {
        if self.resume(set) {
            self.abort_writers(reason);
        }
        self.done();
    }

    /// A conversation has ended, or another begins: nobody is there any more for the sets that were bound to it.
    pub(super) fn orphan_if_gone(&mut self, request: &Request) {
        if !matches!(request, Request::HostGone | Request::Hello { .. }) {
            return;
        }
        for waiting in std::mem::take(&mut self.incomplete) {
            if waiting.is_detached {
                self.incomplete.push(waiting);
            } else {
                self.orphans.push(waiting);
            }
        }
    }

    /// Tells the writers of orphaned sets, once nothing else is under way.
    pub(super) fn shut_down_orphans(&mut self) {
        while self.machine.phase() == Phase::Idle
            && let Some(orphan) = self.orphans.pop()
        {
            if self.step(&Event::Complete) != Ok(Effect::Run) {
                self.orphans.push(orphan);
                return;
            }
            let name = &orphan.name;
            journal::note(format_args!("the requester of set {name} has gone"));
            self.work_on(orphan);
            self.tell_all(&Step::BackupShutdown, None);
            self.done();
        }
    }

    /// Tells the writers named that files will be replaced.
    pub(super) fn pre_restore(&mut self, restore: &Restore) -> Result<WritersSaid, Cause> {
        self.interruptible = true;
        self.set = Set {
            name: restore.set.clone(),
            ..Set::default()
        };
        // A directory that is refused keeps no other writer's files from being restored.
        self.enlist(&[]).unwrap_or(());
        for participant in &mut self.set.participants {
            participant.begin_set();
        }
        let all = std::mem::take(&mut self.set.participants);
        self.set.participants = all
            .into_iter()
            .filter(|writer| restore.writers.iter().any(|r| writer.is_called(&r.writer)))
            .collect();
        for wanted in &restore.writers {
            let participants = self.set.participants.iter();
            if !participants.clone().any(|p| p.is_called(&wanted.writer)) {
                return Err(absent(&wanted.writer));
            }
        }
        self.take_components(restore);
        let until = restore_end(restore);
        let who = self.everyone();
        self.round(&who, &Step::PreRestore, Some(until), OnFailure::Stop)?;
        Ok(self.said())
    }

    /// Tells them that files were replaced, or not.
    pub(super) fn post_restore(&mut self, restore: &Restore) -> WritersSaid {
        self.interruptible = false;
        self.take_components(restore);
        self.tell_all(&Step::PostRestore, Some(restore_end(restore)));
        self.said()
    }

    fn take_components(&mut self, restore: &Restore) {
        for participant in &mut self.set.participants {
            let named = restore.writers.iter();
            let named = named.filter(|wanted| participant.is_called(&wanted.writer));
            let components: Vec<_> = named.flat_map(|wanted| wanted.components.clone()).collect();
            // At the end one that is not named again is told what it was told at the start.
            if !components.is_empty() {
                participant.restore = components;
            }
        }
    }

    /// Tells all writers of the set; what fails stands in their reports.
    fn tell_all(&mut self, step: &Step, until: Option<BootTime>) {
        let who = self.everyone();
        self.round(&who, step, until, OnFailure::GoOn).unwrap_or(());
    }

    fn said(&self) -> WritersSaid {
        WritersSaid {
            writers: self.writer_reports(LEVELS.into_iter()),
        }
    }
}

fn restore_end(restore: &Restore) -> BootTime {
    let limit_ms = restore.limit_ms.unwrap_or(RESTORE_MS).min(RESTORE_MS);
    BootTime::now().plus_ms(limit_ms)
}
