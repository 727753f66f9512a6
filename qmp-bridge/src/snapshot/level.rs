//! The three levels of consistency, ordered.
//!
//! Called by everything that speaks of a set. Invariant: a set is never called by a higher level than its witnesses
//! support (design promise 1); [`crate::snapshot::witness::level_reached`] is the only place that decides it.

use serde::{Deserialize, Serialize};
use std::fmt;

/// How consistent a set is. A greater value promises everything that a smaller one does.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// All disks at one instant, as after a power cut.
    Crash,
    /// File systems were flushed and held.
    Filesystem,
    /// Applications agreed to it, and it was proven that nothing was written.
    #[default]
    Application,
}

impl Level {
    /// The word that people and programs see.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Crash => "crash",
            Self::Filesystem => "filesystem",
            Self::Application => "application",
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
