//! Every path of a set, and what no path may do.

use super::{Effect, Event, Reason, State, step};
use proptest::prelude::*;

const OPEN: State = State::Open {
    marked: false,
    held: false,
};

/// Walks events from a state and collects the effects; panics where an event is refused.
fn walk(mut state: State, events: &[Event]) -> (State, Vec<Effect>) {
    let mut effects = Vec::new();
    for event in events {
        let (next, mut done) = step(state, event.clone()).unwrap();
        state = next;
        effects.append(&mut done);
    }
    (state, effects)
}

#[test]
fn a_set_that_goes_well_is_counted_taken_and_kept() {
    let (state, effects) = walk(
        State::Preparing { doomed: None },
        &[
            Event::Prepared,
            Event::Mark,
            Event::Commit,
            Event::Committed,
            Event::Keep,
            Event::Kept,
        ],
    );
    assert_eq!(state, State::Gone);
    assert_eq!(
        effects,
        [
            Effect::StartCounting,
            Effect::TakeSnapshots,
            Effect::TellCommitted,
            Effect::KeepSnapshots,
            Effect::TellKept,
            Effect::Forget
        ]
    );
}

#[test]
fn a_commit_without_a_mark_counts_from_its_own_start() {
    let (_, effects) = walk(OPEN, &[Event::Commit]);
    assert_eq!(effects, [Effect::StartCounting, Effect::TakeSnapshots]);
}

#[test]
fn a_late_commit_is_undone() {
    let (state, effects) = walk(
        OPEN,
        &[
            Event::Mark,
            Event::Commit,
            Event::CommitFailed(Reason::HoldBroken),
        ],
    );
    assert_eq!(state, State::Undoing);
    assert_eq!(
        effects.last(),
        Some(&Effect::DropSnapshots(Reason::HoldBroken))
    );
}

#[test]
fn an_owner_that_goes_during_the_commit_dooms_it() {
    let (state, effects) = walk(OPEN, &[Event::Commit, Event::OwnerGone, Event::Committed]);
    assert_eq!(state, State::Undoing);
    assert_eq!(
        effects.last(),
        Some(&Effect::DropSnapshots(Reason::OwnerGone))
    );
    assert!(!effects.contains(&Effect::TellCommitted));
}

#[test]
fn an_owner_that_goes_while_preparing_dooms_the_set() {
    let (state, _) = walk(
        State::Preparing { doomed: None },
        &[Event::OwnerGone, Event::Prepared],
    );
    assert_eq!(state, State::Undoing);
}

#[test]
fn an_owner_that_goes_after_the_commit_undoes_it() {
    let (state, effects) = walk(OPEN, &[Event::Commit, Event::Committed, Event::OwnerGone]);
    assert_eq!(state, State::Undoing);
    assert_eq!(
        effects.last(),
        Some(&Effect::DropSnapshots(Reason::OwnerGone))
    );
}

#[test]
fn a_hold_that_expires_ends_the_set_and_releases_writes_first() {
    for events in [
        vec![Event::Hold, Event::HoldExpired],
        vec![
            Event::Hold,
            Event::Commit,
            Event::Committed,
            Event::HoldExpired,
        ],
        vec![
            Event::Hold,
            Event::Commit,
            Event::HoldExpired,
            Event::Committed,
        ],
    ] {
        let (state, effects) = walk(OPEN, &events);
        assert_eq!(state, State::Undoing);
        let tail: Vec<_> = effects.iter().rev().take(2).rev().cloned().collect();
        assert_eq!(
            tail,
            [
                Effect::ReleaseWrites,
                Effect::DropSnapshots(Reason::HoldBroken)
            ]
        );
    }
}

#[test]
fn nothing_undoes_a_set_once_keep_was_asked_for() {
    let (state, _) = walk(OPEN, &[Event::Commit, Event::Committed, Event::Keep]);
    assert!(step(state.clone(), Event::Abort("late".to_owned())).is_err());
    let (state, effects) = walk(
        state,
        &[Event::OwnerGone, Event::KeepFailed, Event::OwnerGone],
    );
    assert_eq!((state.clone(), effects), (State::HalfKept, vec![]));
    assert!(step(state.clone(), Event::Abort("late".to_owned())).is_err());
    let (state, _) = walk(state, &[Event::Keep, Event::Kept]);
    assert_eq!(state, State::Gone);
}

#[test]
fn a_second_commit_is_refused() {
    let (state, _) = walk(OPEN, &[Event::Commit]);
    assert!(step(state, Event::Commit).is_err());
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::Prepared),
        Just(Event::PrepareFailed("disk".to_owned())),
        Just(Event::Mark),
        Just(Event::Hold),
        Just(Event::Release),
        Just(Event::HoldExpired),
        Just(Event::Commit),
        Just(Event::Committed),
        Just(Event::CommitFailed(Reason::HoldBroken)),
        Just(Event::Keep),
        Just(Event::Kept),
        Just(Event::KeepFailed),
        Just(Event::Abort("test".to_owned())),
        Just(Event::OwnerGone),
        Just(Event::Undone),
    ]
}

proptest! {
    /// Writes are never left held, a set is never both kept and dropped, and every set that ends is forgotten once.
    #[test]
    fn no_order_of_events_breaks_the_promises(events in proptest::collection::vec(any_event(), 0..30)) {
        let mut state = State::Preparing { doomed: None };
        let (mut held, mut kept, mut dropped, mut forgotten) = (false, false, false, 0);
        for event in events {
            let before = state.clone();
            let (next, effects) = match step(state, event) {
                Ok(step) => step,
                Err(refusal) => {
                    prop_assert_eq!(&refusal.state, &before);
                    state = before;
                    continue;
                }
            };
            state = next;
            for effect in effects {
                match effect {
                    Effect::HoldWrites => { prop_assert!(!held); held = true; }
                    Effect::ReleaseWrites => { prop_assert!(held); held = false; }
                    Effect::KeepSnapshots => { prop_assert!(!dropped); kept = true; }
                    Effect::DropSnapshots(_) => { prop_assert!(!kept); dropped = true; }
                    Effect::Forget => forgotten += 1,
                    Effect::StartCounting | Effect::TakeSnapshots | Effect::TellCommitted | Effect::TellKept => {}
                }
            }
            if matches!(state, State::Gone | State::Undoing | State::Keeping | State::HalfKept) {
                prop_assert!(!held);
            }
            prop_assert_eq!(forgotten, u32::from(state == State::Gone));
        }
    }
}
