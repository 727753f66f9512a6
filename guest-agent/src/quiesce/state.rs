//! What may happen when: the pure state machine of the one set that can be open.
//!
//! `actor` feeds it every request and every end of an operation, and does what it answers. It knows no clock, no writer and
//! no file system.
//!
//! ```text
//!            begin           freeze           thaw            finish
//!   Idle ---------> Preparing      Prepared -> Freezing      Frozen -> Thawing      Thawed -> Finishing -> Idle
//!    ^  \identify      |  done ------^  |         |  done ------^  |       | done -----^  |
//!    |   Identifying   |                |         |                |       |              |
//!    +-----------------+----------------+---------+----------------+-------+--------------+
//!         failed, abort, host lost, hold broken: everything is thawed, every writer aborted
//!
//!           restore                restored                              complete
//!   Idle ------------> PreRestoring -> Restoring -> PostRestoring -> Idle ---------> Completing -> Idle
//! ```
//!
//! A set that waits for its backup to be complete is not open here: another one may begin. `Completing` is what its writers
//! hear in the end.
//!
//! A phase in `-ing` is an operation that the actor is busy with: what ends the set interrupts it, or waits for its end when
//! it is short and thaws anyway. In the other phases the actor is free and unwinds at once.

/// Who opened the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Owner {
    /// The bridge, on the native port.
    Native,
    /// A client of the QEMU guest agent protocol.
    Qga,
}

/// Where the set is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// None is open.
    Idle,
    /// None is open; writers are asked for their metadata.
    Identifying,
    /// Writers prepare.
    Preparing,
    /// Ready to freeze.
    Prepared,
    /// Writers, then file systems, freeze.
    Freezing,
    /// Everything is held.
    Frozen,
    /// File systems, then writers, thaw.
    Thawing,
    /// Waiting for the verdict.
    Thawed,
    /// Writers hear the verdict.
    Finishing,
    /// None is open; writers of a set that was kept hear what became of its backup.
    Completing,
    /// Writers are told that files will be replaced.
    PreRestoring,
    /// Files may be replaced.
    Restoring,
    /// Writers are told that files were replaced.
    PostRestoring,
    /// Everything is being thawed and aborted.
    Unwinding,
}

impl Phase {
    fn is_frozen(self) -> bool {
        matches!(self, Self::Freezing | Self::Frozen | Self::Thawing)
    }

    /// A set or a restore is open.
    fn is_open(self) -> bool {
        match self {
            Self::Idle | Self::Identifying | Self::Completing => false,
            Self::Preparing
            | Self::Prepared
            | Self::Freezing
            | Self::Frozen
            | Self::Thawing
            | Self::Thawed
            | Self::Finishing
            | Self::PreRestoring
            | Self::Restoring
            | Self::PostRestoring
            | Self::Unwinding => true,
        }
    }
}

/// What happens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Ask writers for their metadata.
    Identify,
    /// Open a set and prepare it.
    Begin(Owner, String),
    /// Freeze the set.
    Freeze(Owner, String),
    /// Thaw it; the generation that `freeze` gave.
    Thaw(Owner, String, u64),
    /// The verdict is known.
    Finish(Owner, String),
    /// Tell the writers of a kept set what became of its backup.
    Complete,
    /// Open a restore.
    Restore(String),
    /// End it.
    Restored(String),
    /// End the set, if it is open and of this owner.
    Abort(Owner, String),
    /// End whatever set this owner has open.
    AbortAll(Owner),
    /// The hold of this generation did not last.
    Broken {
        /// The generation.
        generation: u64,
        /// A writer broke it; the file systems are still frozen.
        still_frozen: bool,
    },
    /// The operation succeeded.
    Done,
    /// The operation failed, or the set is to be unwound: that begins now.
    Unwinding,
    /// Everything is thawed and aborted, for this reason.
    Unwound(String),
}

impl Event {
    fn is_about_the_open_set(&self) -> bool {
        match self {
            Self::Freeze(..) | Self::Thaw(..) | Self::Finish(..) | Self::Restored(_) => true,
            // An abort is asked of it whatever it does.
            Self::Abort(..)
            | Self::AbortAll(_)
            | Self::Identify
            | Self::Begin(..)
            | Self::Complete
            | Self::Restore(_)
            | Self::Broken { .. }
            | Self::Done
            | Self::Unwinding
            | Self::Unwound(_) => false,
        }
    }
}

/// What the actor must do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Start the operation of the new phase.
    Run,
    /// Interrupt the operation, then look at this event again.
    Interrupt,
    /// Look at this event again when the operation is over.
    Later,
    /// Thaw and abort everything now, then tell `Unwound`.
    Unwind,
    /// The hold is lost but the file systems stay frozen until their client thaws them (QGA only).
    Mark,
    /// Nothing.
    Nothing,
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// Another set is open.
    InProgress,
    /// No such set is open.
    NotFound,
    /// The set is open, but not at this step.
    WrongStep(Phase),
    /// The set ended by itself while it was frozen, for this reason.
    HoldBroken(String),
}

/// A set that ended while frozen.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Broken {
    owner: Owner,
    set: String,
    why: String,
}

/// The machine.
#[derive(Clone, Debug)]
pub struct Machine {
    phase: Phase,
    owner: Owner,
    set: String,
    generation: u64,
    /// At most one of each owner.
    broken: Vec<Broken>,
    /// Where it was when the unwinding began.
    unwound_from: Phase,
}

impl Machine {
    /// No set is open. Generations count from `generation`, which must be larger than any that this boot has seen.
    #[must_use]
    pub fn new(generation: u64) -> Self {
        Self {
            phase: Phase::Idle,
            owner: Owner::Native,
            set: String::new(),
            generation,
            broken: Vec::new(),
            unwound_from: Phase::Idle,
        }
    }

    /// A hold did not last, perhaps one of an earlier run of the agent, and its owner does not know.
    pub fn begin_broken(&mut self, owner: Owner, set: &str, why: &str) {
        self.forget_broken(owner);
        self.broken.push(Broken {
            owner,
            set: set.to_owned(),
            why: why.to_owned(),
        });
    }

    fn forget_broken(&mut self, owner: Owner) {
        self.broken.retain(|broken| broken.owner != owner);
    }

    /// A client of the QEMU guest agent protocol froze, or is about to, and has not been told how its hold ended.
    #[must_use]
    pub fn owes_qga_a_word(&self) -> bool {
        let is_broken = self.broken.iter().any(|broken| broken.owner == Owner::Qga);
        is_broken || (self.owner == Owner::Qga && self.is_frozen())
    }

    /// Where it is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Something is, or may be, frozen.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.work().is_frozen()
    }

    /// The phase, or the one that is being unwound.
    fn work(&self) -> Phase {
        if self.phase == Phase::Unwinding {
            self.unwound_from
        } else {
            self.phase
        }
    }

    /// Generation of the present or last hold.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The open set and its owner.
    #[must_use]
    pub fn open(&self) -> Option<(Owner, &str)> {
        self.work()
            .is_open()
            .then_some((self.owner, self.set.as_str()))
    }

    /// Takes an event.
    pub fn step(&mut self, event: &Event) -> Result<Effect, Refusal> {
        if self.phase == Phase::Unwinding && event.is_about_the_open_set() {
            // What is answered depends on what the set is told to have ended by.
            return Ok(Effect::Later);
        }
        match event {
            Event::Identify => self.while_idle(Phase::Identifying),
            Event::Begin(owner, set) => {
                // Its client has had the answer to the thaw and cannot know that writers still hear the rest.
                let is_unaware = (self.owner, *owner) == (Owner::Qga, Owner::Qga);
                if self.phase == Phase::Finishing && is_unaware {
                    return Ok(Effect::Later);
                }
                self.begin(Phase::Preparing, *owner, set)
            }
            Event::Restore(set) => self.begin(Phase::PreRestoring, Owner::Native, set),
            Event::Restored(set) => {
                self.expect(Owner::Native, set, Phase::Restoring)?;
                self.run(Phase::PostRestoring)
            }
            // It may be the very set that is about to be kept.
            Event::Complete if self.phase == Phase::Finishing => Ok(Effect::Later),
            Event::Complete => self.while_idle(Phase::Completing),
            Event::Freeze(owner, set) => {
                self.expect(*owner, set, Phase::Prepared)?;
                self.generation += 1;
                self.run(Phase::Freezing)
            }
            Event::Thaw(owner, set, generation) => self.thaw(*owner, set, *generation),
            Event::Finish(owner, set) => {
                self.expect(*owner, set, Phase::Thawed)?;
                self.run(Phase::Finishing)
            }
            Event::Abort(owner, set) => match self.open() {
                Some(open) if open == (*owner, set.as_str()) => Ok(self.end()),
                _ => Ok(Effect::Nothing),
            },
            Event::AbortAll(owner) => match self.open() {
                Some((other, _)) if other == *owner => Ok(self.end()),
                _ => Ok(Effect::Nothing),
            },
            Event::Broken {
                generation,
                still_frozen,
            } => Ok(self.broke(*generation, *still_frozen)),
            Event::Done => {
                self.phase = self.after();
                Ok(Effect::Nothing)
            }
            Event::Unwinding => {
                self.unwound_from = self.phase;
                self.phase = Phase::Unwinding;
                Ok(Effect::Nothing)
            }
            Event::Unwound(why) => {
                // Whoever asked for the freeze or the thaw that failed has been told already.
                if (self.phase, self.unwound_from) == (Phase::Unwinding, Phase::Frozen) {
                    let set = std::mem::take(&mut self.set);
                    self.begin_broken(self.owner, &set, why);
                }
                self.phase = Phase::Idle;
                Ok(Effect::Nothing)
            }
        }
    }

    /// Starts an operation that needs nothing but that none is open; after another such one if need be.
    fn while_idle(&mut self, phase: Phase) -> Result<Effect, Refusal> {
        if self.phase == Phase::Idle {
            self.run(phase)
        } else if self.phase.is_open() {
            Err(Refusal::InProgress)
        } else {
            Ok(Effect::Later)
        }
    }

    fn begin(&mut self, phase: Phase, owner: Owner, set: &str) -> Result<Effect, Refusal> {
        let effect = self.while_idle(phase)?;
        if effect == Effect::Run {
            self.owner = owner;
            set.clone_into(&mut self.set);
            self.forget_broken(Owner::Native);
            // The bridge must not take from a client of QEMU's protocol the error that it still is to hear.
            self.forget_broken(owner);
        }
        Ok(effect)
    }

    fn run(&mut self, phase: Phase) -> Result<Effect, Refusal> {
        self.phase = phase;
        Ok(Effect::Run)
    }

    fn expect(&self, owner: Owner, set: &str, phase: Phase) -> Result<(), Refusal> {
        match self.open() {
            Some(open) if open == (owner, set) => {
                if self.phase == phase {
                    Ok(())
                } else {
                    Err(Refusal::WrongStep(self.phase))
                }
            }
            _ => Err(self.not_found(owner, set)),
        }
    }

    fn not_found(&self, owner: Owner, set: &str) -> Refusal {
        let own = |broken: &&Broken| broken.owner == owner && broken.set == set;
        match self.broken.iter().find(own) {
            Some(broken) => Refusal::HoldBroken(broken.why.clone()),
            None => Refusal::NotFound,
        }
    }

    fn thaw(&mut self, owner: Owner, set: &str, generation: u64) -> Result<Effect, Refusal> {
        let found = self.expect(owner, set, Phase::Frozen);
        match (owner, found) {
            (Owner::Native, Ok(())) if generation != self.generation => Err(Refusal::NotFound),
            (_, Ok(())) => self.run(Phase::Thawing),
            // A client that gave up on its freeze thaws: the freeze must end, and there is nothing to thaw then.
            (Owner::Qga, Err(Refusal::WrongStep(_))) => Ok(self.end()),
            (Owner::Qga, Err(Refusal::HoldBroken(why))) => {
                // Told once; after that nothing is frozen, as with any QEMU guest agent.
                self.forget_broken(owner);
                Err(Refusal::HoldBroken(why))
            }
            (_, Err(refusal)) => Err(refusal),
        }
    }

    fn end(&self) -> Effect {
        match self.phase {
            Phase::Idle => Effect::Nothing,
            Phase::Identifying | Phase::Preparing | Phase::Freezing | Phase::PreRestoring => {
                Effect::Interrupt
            }
            // Short, and it thaws what is frozen, or ends the restore.
            Phase::Thawing
            | Phase::Finishing
            | Phase::Completing
            | Phase::PostRestoring
            | Phase::Unwinding => Effect::Later,
            Phase::Prepared | Phase::Frozen | Phase::Thawed | Phase::Restoring => Effect::Unwind,
        }
    }

    fn broke(&self, generation: u64, still_frozen: bool) -> Effect {
        if generation != self.generation {
            return Effect::Nothing;
        }
        if self.phase == Phase::Freezing {
            Effect::Interrupt
        } else if self.phase != Phase::Frozen {
            Effect::Nothing
        } else if self.owner == Owner::Qga && still_frozen {
            // Its clients take "thawed" for success, so what still holds goes on holding until they thaw.
            Effect::Mark
        } else {
            Effect::Unwind
        }
    }

    fn after(&self) -> Phase {
        match self.phase {
            Phase::Identifying
            | Phase::Finishing
            | Phase::Completing
            | Phase::PostRestoring
            | Phase::Unwinding
            | Phase::Idle => Phase::Idle,
            Phase::PreRestoring | Phase::Restoring => Phase::Restoring,
            Phase::Preparing | Phase::Prepared => Phase::Prepared,
            Phase::Freezing | Phase::Frozen => Phase::Frozen,
            Phase::Thawing | Phase::Thawed => Phase::Thawed,
        }
    }
}

#[cfg(test)]
mod tests;
