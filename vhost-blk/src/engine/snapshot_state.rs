//! The life of a snapshot set as a pure function: `step(state, event) -> (state, effects)`.
//!
//! Called by `snapshot_set`, which carries the effects out and reports back by further events. Knows no volume, no clock
//! and no thread, so that every path can be tested.
//!
//! ```text
//!            Prepared            Commit               Committed            Keep           Kept
//! Preparing ---------> Open ------------> Committing -----------> Provisional -----> Keeping -----> Gone
//!     |                 | ^ Mark, Hold,       |  (doomed:            | ^ Release       |   ^
//!     |                 | | Release           |   as if failed)      | +---            |   | Keep
//!     |                 | +----               | CommitFailed         |                 v   |
//!     | Abort,          | Abort,              |                      | Abort,         HalfKept
//!     | OwnerGone:      | OwnerGone,          |                      | OwnerGone,       KeepFailed: some volumes may
//!     |  doomed         | HoldExpired         |                      | HoldExpired      have kept; only keep is left
//!     v                 v                     v                      v
//!     +---------------> Undoing <-------------+----------------------+
//!                          | Undone
//!                          v
//!                         Gone
//! ```
//!
//! Invariants:
//! * Every path out of a state with writes held releases them first; `Undoing` drops whatever snapshots were taken.
//! * After `Keep` was asked for, nothing undoes the set: one volume may have kept already.

/// Why a set is undone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Somebody asked for it.
    Aborted(String),
    /// The connection that prepared it has closed.
    OwnerGone,
    /// Writes could not be held long enough.
    HoldBroken,
    /// Preparing or committing failed.
    Failed(String),
}

impl std::fmt::Display for Reason {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Aborted(why) => write!(formatter, "aborted: {why}"),
            Self::OwnerGone => {
                formatter.write_str("the connection that prepared the set has closed")
            }
            Self::HoldBroken => formatter.write_str("writes could not be held until the commit"),
            Self::Failed(why) => write!(formatter, "failed: {why}"),
        }
    }
}

/// Where a set stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Volumes are flushed and make room.
    Preparing {
        /// It has to be undone when that is over.
        doomed: Option<Reason>,
    },
    /// Ready; marked or held, maybe.
    Open {
        /// The guest has said frozen.
        marked: bool,
        /// Writes are held by `snapshot-set-hold`.
        held: bool,
    },
    /// The snapshots are being taken.
    Committing {
        /// Writes stay held after the commit.
        held: bool,
        /// It has to be undone when that is over.
        doomed: Option<Reason>,
    },
    /// The snapshots are on disk; the verdict is open.
    Provisional {
        /// Writes are still held.
        held: bool,
    },
    /// Being kept.
    Keeping,
    /// Keeping has failed on a volume.
    HalfKept,
    /// Being undone.
    Undoing,
    /// Over.
    Gone,
}

impl State {
    /// True if writes may be held: whatever ends this state lets them go.
    #[must_use]
    pub fn may_hold(&self) -> bool {
        match self {
            Self::Open { held, .. } | Self::Provisional { held } => *held,
            Self::Committing { .. } => true,
            Self::Preparing { .. }
            | Self::Keeping
            | Self::HalfKept
            | Self::Undoing
            | Self::Gone => false,
        }
    }
}

/// What happens to a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Preparing is over.
    Prepared,
    /// Preparing has failed.
    PrepareFailed(String),
    /// `snapshot-set-mark`.
    Mark,
    /// `snapshot-set-hold`.
    Hold,
    /// `snapshot-set-release`.
    Release,
    /// The longest time of a hold is over.
    HoldExpired,
    /// `snapshot-set-commit`.
    Commit,
    /// The snapshots are taken, in time and with the hold unbroken.
    Committed,
    /// They are not.
    CommitFailed(Reason),
    /// `snapshot-set-keep`.
    Keep,
    /// All volumes have kept.
    Kept,
    /// At least one has not.
    KeepFailed,
    /// `snapshot-set-abort`.
    Abort(String),
    /// The connection that prepared the set has closed.
    OwnerGone,
    /// Nothing of it is left.
    Undone,
}

/// What has to be done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Count writes from now on; a count from before is given up.
    StartCounting,
    /// Hold writes on all volumes.
    HoldWrites,
    /// Take the snapshots, holding writes meanwhile.
    TakeSnapshots,
    /// Let writes go on.
    ReleaseWrites,
    /// Keep the snapshots, durably.
    KeepSnapshots,
    /// Drop whatever snapshots of the set there are, durably; then tell why.
    DropSnapshots(Reason),
    /// Tell that the snapshots are taken.
    TellCommitted,
    /// Tell that the set is kept.
    TellKept,
    /// Forget the set.
    Forget,
}

/// The event does not fit the state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot {event:?} a set that is {state:?}")]
pub struct Refusal {
    /// Where the set stands.
    pub state: State,
    /// What was asked.
    pub event: Event,
}

/// The next state, and what to do.
///
/// # Errors
/// [`Refusal`] if the event does not fit; the state stays as it was.
pub fn step(state: State, event: Event) -> Result<(State, Vec<Effect>), Refusal> {
    use {Effect as Do, Event as On, State as In};
    let undo = |held: bool, reason: Reason| {
        let mut effects = Vec::new();
        if held {
            effects.push(Do::ReleaseWrites);
        }
        effects.push(Do::DropSnapshots(reason));
        Ok((In::Undoing, effects))
    };
    match (state, event) {
        (In::Preparing { doomed: None }, On::Prepared) => Ok((
            In::Open {
                marked: false,
                held: false,
            },
            vec![],
        )),
        (
            In::Preparing {
                doomed: Some(reason),
            },
            On::Prepared,
        ) => undo(false, reason),
        (In::Preparing { .. }, On::PrepareFailed(why)) => undo(false, Reason::Failed(why)),
        (In::Preparing { doomed }, On::Abort(why)) => Ok((
            In::Preparing {
                doomed: doomed.or(Some(Reason::Aborted(why))),
            },
            vec![],
        )),
        (In::Preparing { doomed }, On::OwnerGone) => Ok((
            In::Preparing {
                doomed: doomed.or(Some(Reason::OwnerGone)),
            },
            vec![],
        )),

        (In::Open { held, .. }, On::Mark) => {
            Ok((In::Open { marked: true, held }, vec![Do::StartCounting]))
        }
        (
            In::Open {
                marked,
                held: false,
            },
            On::Hold,
        ) => Ok((In::Open { marked, held: true }, vec![Do::HoldWrites])),
        (In::Open { marked, held: true }, On::Release) => Ok((
            In::Open {
                marked,
                held: false,
            },
            vec![Do::ReleaseWrites],
        )),
        (In::Open { marked, held }, On::Commit) => {
            let mut effects = Vec::new();
            if !marked {
                // Without a mark the window is the commit itself.
                effects.push(Do::StartCounting);
            }
            effects.push(Do::TakeSnapshots);
            Ok((In::Committing { held, doomed: None }, effects))
        }
        (In::Open { held, .. }, On::Abort(why)) => undo(held, Reason::Aborted(why)),
        (In::Open { held, .. }, On::OwnerGone) => undo(held, Reason::OwnerGone),
        (In::Open { held: true, .. }, On::HoldExpired) => undo(true, Reason::HoldBroken),

        (In::Committing { held, doomed: None }, On::Committed) => {
            Ok((In::Provisional { held }, vec![Do::TellCommitted]))
        }
        (
            In::Committing {
                held,
                doomed: Some(reason),
            },
            On::Committed,
        ) => undo(held, reason),
        (In::Committing { held, .. }, On::CommitFailed(reason)) => undo(held, reason),
        (In::Committing { held, doomed }, On::Abort(why)) => {
            let doomed = doomed.or(Some(Reason::Aborted(why)));
            Ok((In::Committing { held, doomed }, vec![]))
        }
        (In::Committing { held, doomed }, On::OwnerGone) => {
            let doomed = doomed.or(Some(Reason::OwnerGone));
            Ok((In::Committing { held, doomed }, vec![]))
        }
        (In::Committing { held: true, doomed }, On::HoldExpired) => {
            let doomed = doomed.or(Some(Reason::HoldBroken));
            Ok((In::Committing { held: true, doomed }, vec![]))
        }

        (In::Provisional { held: true }, On::Release) => {
            Ok((In::Provisional { held: false }, vec![Do::ReleaseWrites]))
        }
        (In::Provisional { held: true }, On::HoldExpired) => undo(true, Reason::HoldBroken),
        (In::Provisional { held }, On::Abort(why)) => undo(held, Reason::Aborted(why)),
        (In::Provisional { held }, On::OwnerGone) => undo(held, Reason::OwnerGone),
        (In::Provisional { held }, On::Keep) => {
            let mut effects = Vec::new();
            if held {
                effects.push(Do::ReleaseWrites);
            }
            effects.push(Do::KeepSnapshots);
            Ok((In::Keeping, effects))
        }

        (In::Keeping, On::Kept) => Ok((In::Gone, vec![Do::TellKept, Do::Forget])),
        (In::Keeping, On::KeepFailed) => Ok((In::HalfKept, vec![])),
        (In::HalfKept, On::Keep) => Ok((In::Keeping, vec![Do::KeepSnapshots])),

        (In::Undoing, On::Undone) => Ok((In::Gone, vec![Do::Forget])),

        // What comes too late changes nothing: the set is on its way out, or is kept whoever goes away.
        (state @ (In::Undoing | In::Gone), On::OwnerGone | On::HoldExpired)
        | (state @ (In::Keeping | In::HalfKept), On::OwnerGone | On::HoldExpired)
        | (
            state @ (In::Open { held: false, .. }
            | In::Committing { held: false, .. }
            | In::Provisional { held: false }
            | In::Preparing { .. }),
            On::HoldExpired,
        ) => Ok((state, vec![])),

        (
            state @ (In::Preparing { .. }
            | In::Open { .. }
            | In::Committing { .. }
            | In::Provisional { .. }
            | In::Keeping
            | In::HalfKept
            | In::Undoing
            | In::Gone),
            event,
        ) => Err(Refusal { state, event }),
    }
}

#[cfg(test)]
mod tests;
