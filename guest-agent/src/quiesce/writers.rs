//! The actor's steps with writers: send an event to some of them, wait for each inside its own limit.
//!
//! Part of `actor`. Invariant: a round ends by its deadlines whatever a writer does, and an interrupted round leaves every
//! writer that was asked marked as involved, so that the abort reaches it.

use super::actor::{Actor, Heard};
use super::cause::Cause;
use super::participant::Participant;
use super::service::Signal;
use super::step::Step;
use super::words;
use crate::clock::BootTime;
use crate::journal;
use crate::writer::failure;
use guest_agent_wire::host::{Failure, Prepare, WriterInfo, WriterReport};
use guest_agent_wire::types::{Level, WriterFailure};
use guest_agent_wire::writer::Reply;

/// Freeze order; thaw is the reverse.
pub(super) const LEVELS: [Level; 3] = [Level::FrontEnd, Level::BackEnd, Level::System];

/// What one writer's failure does to a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnFailure {
    /// The round ends at once; the set is undone.
    Stop,
    /// The others are still heard.
    GoOn,
}

impl Actor {
    /// Takes all writers but the excluded into the set. A directory that is not trusted would be an application that nobody
    /// asks, so it refuses the set unless it is excluded by name.
    pub(super) fn enlist(&mut self, exclude: &[String]) -> Result<(), Cause> {
        let (writers, refused) = self.registry.writers();
        self.set.participants = writers
            .into_iter()
            .map(|writer| {
                let known = self.memory.get(&writer.identity().instance_id);
                Participant::remembered(writer, known)
            })
            .filter(|participant| !exclude.iter().any(|name| participant.is_called(name)))
            .collect();
        match refused
            .into_iter()
            .find(|refused| !exclude.contains(&refused.name))
        {
            Some(refused) => Err(Cause::Veto {
                name: refused.name,
                failure: failure(WriterFailure::Nonretryable, refused.why),
            }),
            None => Ok(()),
        }
    }

    /// Notes which components the requester picked. One that is not there, or whose writer is not, refuses the set: nobody
    /// would ask for it.
    pub(super) fn select(&mut self, prepare: &Prepare) -> Result<(), Cause> {
        for participant in &mut self.set.participants {
            participant.begin_set();
            participant.is_left_out = prepare.component_mode;
        }
        if !prepare.component_mode && !prepare.components.is_empty() {
            let why = "components are picked in component mode alone";
            return Err(Cause::BadRequest(why.to_owned()));
        }
        for picked in &prepare.components {
            let found = self.set.participants.iter_mut();
            let mut is_there = false;
            for participant in found.filter(|participant| participant.is_called(&picked.writer)) {
                is_there = true;
                participant.select(&picked.components)?;
            }
            if !is_there {
                return Err(absent(&picked.writer));
            }
        }
        Ok(())
    }

    /// Lets go the writers of which no component was picked; they have heard all that they hear.
    pub(super) fn leave_out(&mut self) {
        let all = std::mem::take(&mut self.set.participants);
        let (left_out, stay) = all.into_iter().partition(|writer| writer.is_left_out);
        self.set.participants = stay;
        self.set.left_out = left_out;
    }

    /// All writers of the set.
    pub(super) fn everyone(&self) -> Vec<usize> {
        (0..self.set.participants.len()).collect()
    }

    fn of_level(&self, level: Level) -> Vec<usize> {
        let participants = self.set.participants.iter().enumerate();
        participants
            .filter(|(_, participant)| participant.writer.identity().level == level)
            .map(|(index, _)| index)
            .collect()
    }

    /// Freezes writers: front-end, back-end, system.
    pub(super) fn freeze_writers(&mut self, generation: u64) -> Result<(), Cause> {
        let writer_ms = self.set.writer_ms;
        let end = BootTime::now().plus_ms(writer_ms);
        for level in LEVELS {
            let who = self.of_level(level);
            // What the levels before took is gone from this one's time.
            let hold_ms = end.ms_since(BootTime::now());
            let step = Step::Freeze {
                generation,
                hold_ms,
            };
            self.round(&who, &step, Some(end), OnFailure::Stop)?;
        }
        Ok(())
    }

    /// Thaws writers: system, back-end, front-end. Every one hears it, whatever the others say.
    pub(super) fn thaw_writers(&mut self, generation: u64) {
        for level in LEVELS.into_iter().rev() {
            let mut who = self.of_level(level);
            who.reverse();
            // A failure stands in the writer's report.
            self.round(&who, &Step::Thaw { generation }, None, OnFailure::GoOn)
                .unwrap_or(());
        }
        self.set_window();
    }

    /// Tells every writer that has heard of the set that it is over, in thaw order.
    pub(super) fn abort_writers(&mut self, reason: &str) {
        for level in LEVELS.into_iter().rev() {
            let mut who = self.of_level(level);
            who.reverse();
            who.retain(|index| {
                let participant = self.set.participants.get(*index);
                participant.is_some_and(|participant| participant.is_involved)
            });
            let reason = reason.to_owned();
            self.round(&who, &Step::Abort { reason }, None, OnFailure::GoOn)
                .unwrap_or(());
            for index in who {
                if let Some(participant) = self.set.participants.get_mut(index) {
                    participant.is_involved = false;
                }
            }
        }
        self.set_window();
    }

    /// Lets go the frozen writers that can be told without starting a process, while file systems stay frozen.
    pub(super) fn release_resident_writers(&mut self, reason: &str) {
        let participants = self.set.participants.iter().enumerate();
        let who: Vec<usize> = participants
            .filter(|(_, participant)| {
                participant.writer.is_resident() && participant.frozen_since.is_some()
            })
            .map(|(index, _)| index)
            .collect();
        let reason = reason.to_owned();
        self.round(&who, &Step::Abort { reason }, None, OnFailure::GoOn)
            .unwrap_or(());
        for index in who {
            if let Some(participant) = self.set.participants.get_mut(index) {
                participant.is_involved = false;
                participant.broke(failure(
                    WriterFailure::Timeout,
                    "it was released before the thaw",
                ));
            }
        }
        // Scripts are told after the file systems' thaw; ringing for them until then would be in vain.
        self.alarm.set(self.set.silence_end()).unwrap_or(());
    }

    /// Sends `step` to these writers and waits for their answers, each until its own deadline and all until `until`.
    pub(super) fn round(
        &mut self,
        who: &[usize],
        step: &Step,
        until: Option<BootTime>,
        on_failure: OnFailure,
    ) -> Result<(), Cause> {
        self.pending.clear();
        for index in who {
            self.send(*index, step, until);
        }
        let mut failed = None;
        while let Some(next) = self.next_deadline(who) {
            match self.wait(next) {
                Heard::Writer(number, answer) => {
                    // Answers to events of earlier rounds are not in the list any more.
                    let Some(index) = self.pending.remove(&number) else {
                        continue;
                    };
                    let cause = self.answered(index, step, answer);
                    failed = failed.or(cause);
                    if matches!(step, Step::Freeze { .. }) {
                        self.set_window();
                    }
                }
                Heard::Late => failed = self.late(who, step).or(failed),
                Heard::Interrupted(cause) => return Err(cause),
                Heard::Helper(..) | Heard::HelperDied => {}
            }
            if on_failure == OnFailure::Stop && failed.is_some() {
                break;
            }
        }
        self.pending.clear();
        failed.map_or(Ok(()), Err)
    }

    fn send(&mut self, index: usize, step: &Step, until: Option<BootTime>) {
        let Some(participant) = self.set.participants.get_mut(index) else {
            return;
        };
        let now = BootTime::now();
        let deadline = participant.sent(step, now, until);
        self.next_event += 1;
        let number = self.next_event;
        self.pending.insert(number, index);
        let service = self.service.clone();
        let event = step.event(&self.set.name, participant);
        participant.writer.begin(
            event,
            deadline.ms_since(now),
            Box::new(move |answer| service.send(Signal::Writer(number, answer))),
        );
    }

    fn next_deadline(&self, who: &[usize]) -> Option<BootTime> {
        who.iter()
            .filter_map(|index| self.set.participants.get(*index)?.deadline)
            .min()
    }

    fn late(&mut self, who: &[usize], step: &Step) -> Option<Cause> {
        let mut failed = None;
        for index in who {
            let participant = self.set.participants.get(*index);
            let deadline = participant.and_then(|participant| participant.deadline);
            if deadline.is_some_and(BootTime::is_past) {
                let late = failure(WriterFailure::NotResponding, "no answer inside its limit");
                let cause = self.answered(*index, step, Err(late));
                failed = failed.or(cause);
            }
        }
        failed
    }

    /// Takes a writer's answer; what failed is logged and becomes a cause.
    fn answered(
        &mut self,
        index: usize,
        step: &Step,
        answer: Result<Reply, Failure>,
    ) -> Option<Cause> {
        let room_bytes = self.room_for(index);
        let participant = self.set.participants.get_mut(index)?;
        let failure = participant.answered(step, answer, room_bytes)?;
        let name = participant.name();
        journal::note(format_args!(
            "writer {name} failed at {}: {:?}: {}",
            step.name(),
            failure.code,
            failure.message
        ));
        if participant.is_left_out {
            // Nothing of it is backed up, so its word does not count.
            return None;
        }
        Some(match failure.code {
            WriterFailure::Timeout | WriterFailure::NotResponding => {
                Cause::NotResponding { name, failure }
            }
            WriterFailure::Inconsistentsnapshot
            | WriterFailure::PartialFailure
            | WriterFailure::RecoveryFailed
            | WriterFailure::StatusNotAvailable
            | WriterFailure::Outofresources
            | WriterFailure::Retryable
            | WriterFailure::Nonretryable => Cause::Veto { name, failure },
        })
    }

    /// What the words of the others leave for this writer's.
    fn room_for(&self, index: usize) -> usize {
        let participants = self.set.participants.iter().enumerate();
        let others = participants
            .filter(|(other, _)| *other != index)
            .map(|(_, participant)| participant);
        let others = others.chain(&self.set.left_out);
        words::room_beside(others.map(Participant::said_bytes).sum())
    }

    /// Sets the alarm to the time when the helper must have spoken, or to the end of the shortest window of a writer that has answered its freeze. One that has not is late by
    /// the deadline of its answer.
    pub(super) fn set_window(&mut self) {
        let window = self.shortest_window().map(|(end, _)| end);
        let end = window.into_iter().chain(self.set.silence_end()).min();
        self.alarm.set(end).unwrap_or(());
    }

    /// End of the shortest window, and whose it is.
    pub(super) fn shortest_window(&self) -> Option<(BootTime, usize)> {
        let participants = self.set.participants.iter().enumerate();
        participants
            .filter_map(|(index, participant)| {
                let since = participant.frozen_since?;
                if participant.asked.is_some() {
                    return None;
                }
                Some((
                    since.plus_ms(participant.window_ms(self.set.writer_ms)),
                    index,
                ))
            })
            .min()
    }

    /// Why the alarm of the windows rang.
    pub(super) fn window_cause(&mut self) -> Option<Cause> {
        let (end, index) = self.shortest_window()?;
        if !end.is_past() {
            return None;
        }
        let participant = self.set.participants.get_mut(index)?;
        participant.broke(failure(WriterFailure::Timeout, "its time was over"));
        Some(Cause::WindowOver {
            name: participant.name(),
        })
    }

    /// A connected writer is gone: fails the set if it is frozen.
    pub(super) fn gone_cause(&mut self, instance_id: &str, why: String) -> Option<Cause> {
        let why = words::for_people(&why);
        let participant = self.frozen_one(instance_id)?;
        participant.broke(failure(WriterFailure::NotResponding, why.clone()));
        Some(Cause::WriterGone {
            name: participant.name(),
            why,
        })
    }

    /// A connected writer resumed by itself: fails the set if it is frozen in this generation.
    pub(super) fn released_cause(
        &mut self,
        instance_id: &str,
        generation: u64,
        why: String,
    ) -> Option<Cause> {
        if generation != self.machine.generation() {
            return None;
        }
        let why = words::for_people(&why);
        let participant = self.frozen_one(instance_id)?;
        participant.broke(failure(WriterFailure::Timeout, why.clone()));
        Some(Cause::WriterReleased {
            name: participant.name(),
            why,
        })
    }

    fn frozen_one(&mut self, instance_id: &str) -> Option<&mut Participant> {
        self.set.participants.iter_mut().find(|participant| {
            participant.frozen_since.is_some()
                && participant.writer.identity().instance_id == instance_id
        })
    }

    /// A connected writer is at work: it has more time if it prepares.
    pub(super) fn progressed(&mut self, instance_id: &str) {
        let found = self.set.participants.iter_mut();
        for participant in found {
            if participant.writer.identity().instance_id == instance_id {
                participant.progressed();
            }
        }
    }

    pub(super) fn writer_reports(&self, levels: impl Iterator<Item = Level>) -> Vec<WriterReport> {
        levels
            .flat_map(|level| self.of_level(level))
            .filter_map(|index| Some(self.set.participants.get(index)?.report()))
            .collect()
    }

    /// All writers that are there, with what is known of each. While anything is frozen no directory is read, so those of the
    /// set alone.
    pub(super) fn writer_infos(&self) -> Vec<WriterInfo> {
        let of_set = self.set.participants.iter().chain(&self.set.left_out);
        let mut of_set: Vec<WriterInfo> = of_set.map(Participant::info).collect();
        if self.machine.is_frozen() {
            words::fit_documents(&mut of_set);
            return of_set;
        }
        let (writers, _) = self.registry.writers();
        let mut infos: Vec<WriterInfo> = writers
            .into_iter()
            .map(|writer| {
                let known = self.memory.get(&writer.identity().instance_id);
                Participant::remembered(writer, known).info()
            })
            .collect();
        for info in of_set {
            let place = infos
                .iter_mut()
                .find(|known| known.instance_id == info.instance_id);
            match place {
                Some(place) => *place = info,
                None => infos.push(info),
            }
        }
        words::fit_documents(&mut infos);
        infos
    }

    /// Keeps a writer's state for later questions.
    pub(super) fn remember(&mut self, participant: &Participant) {
        let info = participant.info();
        self.memory.insert(info.instance_id.clone(), info);
    }

    /// Keeps each writer's state for later questions, and ends their part in the set.
    pub(super) fn dismiss(&mut self) {
        let left_out = std::mem::take(&mut self.set.left_out);
        for participant in std::mem::take(&mut self.set.participants)
            .iter()
            .chain(&left_out)
        {
            self.remember(participant);
        }
        // Instances come and go; what is remembered of the gone must not grow for ever.
        if self.memory.len() > MEMORY_MAX {
            let (writers, _) = self.registry.writers();
            self.memory.retain(|instance, _| {
                writers
                    .iter()
                    .any(|writer| writer.identity().instance_id == *instance)
            });
        }
    }
}

/// A writer that a requester named is not there.
pub(super) fn absent(name: &str) -> Cause {
    Cause::Veto {
        name: name.to_owned(),
        failure: failure(WriterFailure::StatusNotAvailable, "it is not there"),
    }
}

/// States remembered before those of gone writers are forgotten.
const MEMORY_MAX: usize = 1024;
