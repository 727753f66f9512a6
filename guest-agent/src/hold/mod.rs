//! The hold: a helper process that freezes file systems and is sure to thaw them.
//!
//! `quiesce` uses [`client::Holder`]; `main` runs [`helper::run`] in the helper and [`ledger::recover`] at start. Knows nothing
//! of sets, writers or the host.
//!
//! Who thaws when:
//!
//! | what happens | who thaws |
//! |---|---|
//! | the agent asks | helper |
//! | the hold limit passes (CLOCK_BOOTTIME) | helper |
//! | the agent dies | helper, on the closed socket |
//! | the helper dies | agent, through duplicates of the descriptors |
//! | the helper is silent past the limit | agent, likewise |
//! | both die | the next start (or `--thaw-leftovers`), by the ledger in the state directory |
//! | FIFREEZE returns after the end of its generation | the very thread that called it |

pub mod client;
pub mod helper;
pub mod ledger;
pub mod message;
mod slot;
