//! The one decision in which redirect-on-write and copy-on-write differ: what a write does to a block.
//!
//! `plan` asks it for every block of a request. It is pure.
//! Invariant I3: what a snapshot sees is never overwritten: a block that was not superseded since the
//! newest snapshot is redirected or preserved before anything changes.

use crate::index::{BlockState, Location};
use crate::plan::WriteKind;
use crate::snapshot_table::Method;

/// What happens to one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The data goes where the live version is.
    InPlace(Location),
    /// The data goes to a new log block, which becomes the live version; with `history` the old one
    /// stays for the snapshots.
    Redirect { history: bool },
    /// The old data is copied to a new log block for the snapshots, then as [`Step::InPlace`].
    Preserve(Location),
    /// The live version becomes zeroes without any I/O.
    ToZero { history: bool },
    /// Nothing at all.
    Nothing,
}

/// Decides for a block in `state`; `whole` if the request covers all of it, `method` of the newest
/// snapshot, `in_doubt` if its live version is in the log and its bytes must not change yet (I10).
pub(crate) fn decide(
    kind: WriteKind,
    whole: bool,
    state: BlockState,
    method: Option<Method>,
    in_doubt: bool,
) -> Step {
    match decide_confirmed(kind, whole, state, method) {
        Step::InPlace(_) if in_doubt => Step::Redirect { history: false },
        Step::Preserve(_) if in_doubt => Step::Redirect { history: true },
        step @ (Step::InPlace(_)
        | Step::Redirect { .. }
        | Step::Preserve(_)
        | Step::ToZero { .. }
        | Step::Nothing) => step,
    }
}

fn decide_confirmed(
    kind: WriteKind,
    whole: bool,
    state: BlockState,
    method: Option<Method>,
) -> Step {
    let needed_by = if state.touched { None } else { method };
    match (kind, whole) {
        (WriteKind::Write, _) => match (state.live, needed_by) {
            (Location::Zero, None) => Step::Redirect { history: false },
            (Location::Base | Location::Log(_), None) => Step::InPlace(state.live),
            (Location::Zero, Some(_)) | (_, Some(Method::RedirectOnWrite)) => {
                Step::Redirect { history: true }
            }
            (Location::Base | Location::Log(_), Some(Method::CopyOnWrite)) => {
                Step::Preserve(state.live)
            }
        },
        // Zeroes onto zeroes, and a discard of part of a block, change nothing.
        (WriteKind::WriteZeroes { .. } | WriteKind::Discard, _) if state.live == Location::Zero => {
            Step::Nothing
        }
        (WriteKind::Discard, false) => Step::Nothing,
        (WriteKind::WriteZeroes { .. }, false) => {
            decide_confirmed(WriteKind::Write, whole, state, method)
        }
        (WriteKind::WriteZeroes { may_unmap }, true) => match (state.live, needed_by) {
            (Location::Log(_), None) if may_unmap => Step::ToZero { history: false },
            (_, None) => Step::InPlace(state.live),
            (Location::Log(_), Some(_)) | (_, Some(Method::RedirectOnWrite)) => {
                Step::ToZero { history: true }
            }
            (Location::Base | Location::Zero, Some(Method::CopyOnWrite)) => {
                Step::Preserve(state.live)
            }
        },
        (WriteKind::Discard, true) => match (state.live, needed_by) {
            (Location::Log(_), None) => Step::ToZero { history: false },
            (_, None) => Step::InPlace(state.live),
            (_, Some(Method::RedirectOnWrite)) => Step::ToZero { history: true },
            // A discard is advice: copying data in order to forget it would be the wrong price.
            (_, Some(Method::CopyOnWrite)) => Step::Nothing,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::LogBlock;

    #[test]
    fn nothing_a_snapshot_sees_is_ever_written_in_place_unprotected() {
        let kinds = [
            WriteKind::Write,
            WriteKind::WriteZeroes { may_unmap: true },
            WriteKind::WriteZeroes { may_unmap: false },
            WriteKind::Discard,
        ];
        let lives = [Location::Base, Location::Zero, Location::Log(LogBlock(7))];
        for kind in kinds {
            for live in lives {
                for method in [Method::RedirectOnWrite, Method::CopyOnWrite] {
                    for whole in [false, true] {
                        let state = BlockState {
                            live,
                            touched: false,
                        };
                        match decide(kind, whole, state, Some(method), false) {
                            Step::InPlace(_) => panic!("{kind:?} {live:?} {method:?}"),
                            Step::Redirect { history } | Step::ToZero { history } => {
                                assert!(history);
                            }
                            Step::Preserve(_) => assert_eq!(method, Method::CopyOnWrite),
                            Step::Nothing => assert_ne!(kind, WriteKind::Write),
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn touched_blocks_cost_no_history() {
        let live = Location::Log(LogBlock(7));
        let state = BlockState {
            live,
            touched: true,
        };
        for method in [
            None,
            Some(Method::RedirectOnWrite),
            Some(Method::CopyOnWrite),
        ] {
            assert_eq!(
                decide(WriteKind::Write, false, state, method, false),
                Step::InPlace(live)
            );
        }
    }

    #[test]
    fn data_in_doubt_never_changes_in_place() {
        let live = Location::Log(LogBlock(7));
        let kinds = [
            WriteKind::Write,
            WriteKind::WriteZeroes { may_unmap: true },
            WriteKind::WriteZeroes { may_unmap: false },
            WriteKind::Discard,
        ];
        let methods = [
            None,
            Some(Method::RedirectOnWrite),
            Some(Method::CopyOnWrite),
        ];
        for kind in kinds {
            for method in methods {
                for (whole, touched) in [(false, false), (false, true), (true, false), (true, true)]
                {
                    let state = BlockState { live, touched };
                    let needed = !touched && method.is_some();
                    match decide(kind, whole, state, method, true) {
                        Step::InPlace(_) | Step::Preserve(_) => panic!("{kind:?} {method:?}"),
                        Step::Redirect { history } | Step::ToZero { history } => {
                            assert_eq!(history, needed, "{kind:?} {method:?}");
                        }
                        Step::Nothing => {}
                    }
                }
            }
        }
    }
}
