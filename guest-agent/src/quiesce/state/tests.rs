//! Every event in every phase, for both owners: the rules that must hold in all of them, and the ways that people go.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

const PHASES: [Phase; 14] = [
    Phase::Idle,
    Phase::Identifying,
    Phase::Preparing,
    Phase::Prepared,
    Phase::Freezing,
    Phase::Frozen,
    Phase::Thawing,
    Phase::Thawed,
    Phase::Finishing,
    Phase::Completing,
    Phase::PreRestoring,
    Phase::Restoring,
    Phase::PostRestoring,
    Phase::Unwinding,
];
const OWNERS: [Owner; 2] = [Owner::Native, Owner::Qga];

/// A machine in this phase, its set `s` open for this owner.
fn machine(phase: Phase, owner: Owner) -> Machine {
    let mut machine = Machine::new(100);
    machine.phase = phase;
    machine.owner = owner;
    machine.set = "s".into();
    machine
}

/// Requests and interruptions, right and wrong ones.
fn events() -> Vec<Event> {
    let mut events = vec![Event::Identify, Event::Complete];
    for set in ["s", "other"] {
        events.push(Event::Restore(set.into()));
        events.push(Event::Restored(set.into()));
    }
    for owner in OWNERS {
        for set in ["s", "other"] {
            let set = set.to_owned();
            events.push(Event::Begin(owner, set.clone()));
            events.push(Event::Freeze(owner, set.clone()));
            events.push(Event::Finish(owner, set.clone()));
            events.push(Event::Abort(owner, set.clone()));
            for generation in [99, 100] {
                events.push(Event::Thaw(owner, set.clone(), generation));
            }
        }
        events.push(Event::AbortAll(owner));
    }
    for generation in [99, 100] {
        for still_frozen in [true, false] {
            events.push(Event::Broken {
                generation,
                still_frozen,
            });
        }
    }
    events
}

/// The actor is in an operation.
fn is_busy(phase: Phase) -> bool {
    match phase {
        Phase::Identifying
        | Phase::Preparing
        | Phase::Freezing
        | Phase::Thawing
        | Phase::Finishing
        | Phase::Completing
        | Phase::PreRestoring
        | Phase::PostRestoring
        | Phase::Unwinding => true,
        Phase::Idle | Phase::Prepared | Phase::Frozen | Phase::Thawed | Phase::Restoring => false,
    }
}

fn for_all(check: impl Fn(&Machine, &Event, &Machine, &Result<Effect, Refusal>)) {
    for phase in PHASES {
        for owner in OWNERS {
            for event in events() {
                let before = machine(phase, owner);
                let mut after = before.clone();
                let effect = after.step(&event);
                check(&before, &event, &after, &effect);
            }
        }
    }
}

#[test]
fn nothing_is_started_while_an_operation_runs() {
    for_all(|before, event, _, effect| {
        if is_busy(before.phase) {
            let starts = [Effect::Run, Effect::Unwind, Effect::Mark];
            assert!(
                !effect.as_ref().is_ok_and(|effect| starts.contains(effect)),
                "{before:?} {event:?} {effect:?}"
            );
        }
    });
}

#[test]
fn only_a_free_machine_is_told_to_unwind_and_only_a_busy_one_is_interrupted() {
    for_all(|before, event, _, effect| match effect {
        Ok(Effect::Unwind | Effect::Mark | Effect::Run) => assert!(!is_busy(before.phase)),
        Ok(Effect::Interrupt | Effect::Later) => {
            assert!(is_busy(before.phase), "{before:?} {event:?}");
        }
        Ok(Effect::Nothing) | Err(_) => {}
    });
}

#[test]
fn a_refused_or_ignored_event_changes_nothing() {
    for_all(|before, event, after, effect| {
        if *effect != Ok(Effect::Run) {
            assert_eq!(before.phase, after.phase, "{event:?}");
            assert_eq!(before.generation, after.generation);
            assert_eq!(before.set, after.set);
        }
    });
}

#[test]
fn each_operation_starts_from_its_one_phase_for_its_own_set() {
    for_all(|before, event, after, effect| {
        if *effect != Ok(Effect::Run) {
            return;
        }
        let own = |owner: &Owner, set: &String| *owner == before.owner && set == "s";
        let right = match event {
            Event::Identify | Event::Begin(..) | Event::Complete | Event::Restore(_) => {
                before.phase == Phase::Idle
            }
            Event::Restored(set) => before.phase == Phase::Restoring && own(&Owner::Native, set),
            Event::Freeze(owner, set) => before.phase == Phase::Prepared && own(owner, set),
            Event::Thaw(owner, set, generation) => {
                before.phase == Phase::Frozen
                    && own(owner, set)
                    && (*owner == Owner::Qga || *generation == before.generation)
            }
            Event::Finish(owner, set) => before.phase == Phase::Thawed && own(owner, set),
            Event::Abort(..)
            | Event::AbortAll(_)
            | Event::Broken { .. }
            | Event::Done
            | Event::Unwinding
            | Event::Unwound(_) => false,
        };
        assert!(right, "{before:?} {event:?}");
        assert!(is_busy(after.phase));
    });
}

#[test]
fn the_host_can_end_its_own_set_from_every_phase_and_no_other() {
    for phase in PHASES {
        for owner in OWNERS {
            let ends = [Effect::Interrupt, Effect::Later, Effect::Unwind];
            let open = machine(phase, owner).open().is_some();
            let own = machine(phase, owner).step(&Event::AbortAll(owner));
            assert_eq!(
                own.is_ok_and(|effect| ends.contains(&effect)),
                open,
                "{phase:?}"
            );
            let other = OWNERS.into_iter().find(|other| *other != owner).unwrap();
            let others = machine(phase, owner).step(&Event::AbortAll(other));
            assert_eq!(others, Ok(Effect::Nothing));
        }
    }
}

#[test]
fn a_broken_hold_ends_only_its_own_generation() {
    for_all(|before, event, _, effect| {
        let Event::Broken {
            generation,
            still_frozen,
        } = event
        else {
            return;
        };
        let expected = match (before.phase, before.owner, still_frozen) {
            _ if *generation != 100 => Effect::Nothing,
            (Phase::Freezing, _, _) => Effect::Interrupt,
            (Phase::Frozen, Owner::Qga, true) => Effect::Mark,
            (Phase::Frozen, _, _) => Effect::Unwind,
            _ => Effect::Nothing,
        };
        assert_eq!(*effect, Ok(expected), "{before:?} {event:?}");
    });
}

#[test]
fn whatever_was_undone_leaves_no_set_open() {
    for phase in PHASES {
        for owner in OWNERS {
            let mut machine = machine(phase, owner);
            machine.step(&Event::Unwinding).unwrap();
            machine.step(&Event::Unwound("why".into())).unwrap();
            assert_eq!(machine.phase(), Phase::Idle);
            let thaw = machine.step(&Event::Thaw(owner, "s".into(), 100));
            let expected = if phase == Phase::Frozen {
                Refusal::HoldBroken("why".into())
            } else {
                Refusal::NotFound
            };
            assert_eq!(thaw, Err(expected), "{phase:?}");
        }
    }
}

#[test]
fn a_client_of_qemus_protocol_hears_once_of_a_broken_hold_the_bridge_until_its_next_set() {
    for (owner, second) in [
        (Owner::Qga, Refusal::NotFound),
        (Owner::Native, Refusal::HoldBroken("late".into())),
    ] {
        let mut machine = machine(Phase::Frozen, owner);
        machine.step(&Event::Unwinding).unwrap();
        machine.step(&Event::Unwound("late".into())).unwrap();
        let thaw = Event::Thaw(owner, "s".into(), 100);
        assert_eq!(machine.step(&thaw), Err(Refusal::HoldBroken("late".into())));
        assert_eq!(machine.step(&thaw), Err(second));
        machine.step(&Event::Begin(owner, "s".into())).unwrap();
        machine.step(&Event::Unwound("x".into())).unwrap();
        assert_eq!(machine.step(&thaw), Err(Refusal::NotFound));
    }
}

#[test]
fn the_bridges_sets_and_restores_take_no_word_from_a_client_of_qemus_protocol() {
    for begin in [
        Event::Begin(Owner::Native, "n".into()),
        Event::Restore("n".into()),
    ] {
        let mut machine = machine(Phase::Frozen, Owner::Qga);
        machine.step(&Event::Unwinding).unwrap();
        machine.step(&Event::Unwound("late".into())).unwrap();
        assert_eq!(machine.step(&begin), Ok(Effect::Run));
        assert!(machine.owes_qga_a_word());
        machine.step(&Event::Done).unwrap();
        // Also a hold of the bridge that breaks.
        machine.phase = Phase::Frozen;
        machine.step(&Event::Unwinding).unwrap();
        machine.step(&Event::Unwound("its own".into())).unwrap();
        let of_bridge = machine.step(&Event::Thaw(Owner::Native, "n".into(), 100));
        assert_eq!(of_bridge, Err(Refusal::HoldBroken("its own".into())));
        let thaw = Event::Thaw(Owner::Qga, "s".into(), 0);
        assert_eq!(machine.step(&thaw), Err(Refusal::HoldBroken("late".into())));
        assert!(!machine.owes_qga_a_word());
        assert_eq!(machine.step(&thaw), Err(Refusal::NotFound));
    }
}

#[test]
fn a_set_goes_its_way_and_each_hold_has_a_generation_of_its_own() {
    let mut machine = Machine::new(100);
    let set = || "s".to_owned();
    let mut generations = BTreeSet::new();
    for _ in 0..2 {
        for (event, phase) in [
            (Event::Begin(Owner::Native, set()), Phase::Prepared),
            (Event::Freeze(Owner::Native, set()), Phase::Frozen),
        ] {
            assert_eq!(machine.step(&event), Ok(Effect::Run));
            machine.step(&Event::Done).unwrap();
            assert_eq!(machine.phase(), phase);
        }
        let generation = machine.generation();
        assert!(generations.insert(generation));
        for (event, phase) in [
            (Event::Thaw(Owner::Native, set(), generation), Phase::Thawed),
            (Event::Finish(Owner::Native, set()), Phase::Idle),
        ] {
            assert_eq!(machine.step(&event), Ok(Effect::Run));
            machine.step(&Event::Done).unwrap();
            assert_eq!(machine.phase(), phase);
        }
    }
}

#[test]
fn a_restore_goes_its_way_and_leaves_what_was_broken_before_forgotten() {
    let mut machine = machine(Phase::Frozen, Owner::Native);
    machine.step(&Event::Unwinding).unwrap();
    machine.step(&Event::Unwound("late".into())).unwrap();
    for (event, phase) in [
        (Event::Restore("r".into()), Phase::Restoring),
        (Event::Restored("r".into()), Phase::Idle),
    ] {
        assert_eq!(machine.step(&event), Ok(Effect::Run));
        machine.step(&Event::Done).unwrap();
        assert_eq!(machine.phase(), phase);
    }
    let thaw = machine.step(&Event::Thaw(Owner::Native, "s".into(), 100));
    assert_eq!(thaw, Err(Refusal::NotFound));
}

#[test]
fn a_backup_is_completed_beside_no_open_set_and_after_the_set_that_is_being_kept() {
    for phase in PHASES {
        let expected = match phase {
            Phase::Idle => Ok(Effect::Run),
            Phase::Identifying | Phase::Completing | Phase::Finishing => Ok(Effect::Later),
            Phase::Preparing
            | Phase::Prepared
            | Phase::Freezing
            | Phase::Frozen
            | Phase::Thawing
            | Phase::Thawed
            | Phase::PreRestoring
            | Phase::Restoring
            | Phase::PostRestoring
            | Phase::Unwinding => Err(Refusal::InProgress),
        };
        let effect = machine(phase, Owner::Native).step(&Event::Complete);
        assert_eq!(effect, expected, "{phase:?}");
    }
}

#[test]
fn a_second_set_is_refused_while_one_is_open() {
    for phase in PHASES {
        let begin = Event::Begin(Owner::Qga, "guest-fsfreeze".into());
        let effect = machine(phase, Owner::Native).step(&begin);
        let expected = match phase {
            Phase::Idle => Ok(Effect::Run),
            Phase::Identifying | Phase::Completing => Ok(Effect::Later),
            Phase::Preparing
            | Phase::Prepared
            | Phase::Freezing
            | Phase::Frozen
            | Phase::Thawing
            | Phase::Thawed
            | Phase::Finishing
            | Phase::PreRestoring
            | Phase::Restoring
            | Phase::PostRestoring
            | Phase::Unwinding => Err(Refusal::InProgress),
        };
        assert_eq!(effect, expected);
    }
}

proptest! {
    /// An actor that does what the machine says: interrupts and unwinds end in `Idle`, and a frozen phase is only ever left
    /// through a thaw or an unwinding.
    #[test]
    fn any_walk_leaves_frozen_only_through_thaw_or_unwinding(steps in proptest::collection::vec((0usize..40, any::<bool>()), 1..80)) {
        let all = events();
        let mut machine = Machine::new(100);
        for (index, succeeds) in steps {
            let before = machine.phase();
            let mut event = all[index % all.len()].clone();
            if let Event::Thaw(_, _, generation) = &mut event {
                *generation = machine.generation();
            }
            let effect = machine.step(&event);
            if before == Phase::Frozen && machine.phase() != Phase::Frozen {
                prop_assert_eq!(machine.phase(), Phase::Thawing);
            }
            match effect {
                Ok(Effect::Run) => {
                    let end = if succeeds { Event::Done } else { Event::Unwound("failed".into()) };
                    machine.step(&end).unwrap();
                    prop_assert!(!is_busy(machine.phase()));
                }
                Ok(Effect::Interrupt | Effect::Unwind) => {
                    machine.step(&Event::Unwinding).unwrap();
                    prop_assert!(is_busy(machine.phase()));
                    machine.step(&Event::Unwound("ended".into())).unwrap();
                    prop_assert_eq!(machine.phase(), Phase::Idle);
                }
                Ok(Effect::Later | Effect::Mark | Effect::Nothing) | Err(_) => {}
            }
        }
    }
}

/// Unwinding takes time: a writer may need seconds for its abort. A host that thaws meanwhile must hear why, not that it came
/// at a wrong step, and must not start anything.
#[test]
fn a_thaw_that_comes_while_the_hold_is_being_undone_is_answered_when_it_is() {
    for owner in OWNERS {
        let mut machine = machine(Phase::Frozen, owner);
        let thaw = Event::Thaw(owner, "s".into(), 100);
        machine.step(&Event::Unwinding).unwrap();
        assert!(machine.is_frozen());
        for event in events() {
            let effect = machine.step(&event);
            assert!(
                matches!(
                    effect,
                    Ok(Effect::Later | Effect::Nothing) | Err(Refusal::InProgress)
                ),
                "{event:?}: {effect:?}"
            );
            assert_eq!(machine.phase(), Phase::Unwinding);
        }
        assert_eq!(machine.step(&thaw), Ok(Effect::Later));
        machine.step(&Event::Unwound("late".into())).unwrap();
        assert_eq!(machine.step(&thaw), Err(Refusal::HoldBroken("late".into())));
    }
}
