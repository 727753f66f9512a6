//! One quantity of one workload beside one peer: what was measured, what it should reach, what the file itself allows.
//!
//! `report` makes and keeps the lines; `words` says them.

use serde_json::{Value, json};

use super::words::number;
use crate::bench::contestants::Fio;
use crate::bench::rounds::Measured;
use crate::bench::statistics::Spread;

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// Reads or writes per second.
    Rate,
    /// 99th percentile of the latency.
    LatencyP99,
    /// The backend's processor time per read or write.
    Processor,
    /// The backend's system calls per read or write.
    SystemCalls,
    /// The backend's sync calls per read or write.
    Syncs,
    /// The backend's sync calls per flush of the guest.
    SyncsPerFlush,
    /// Bytes that reached the device per read or write.
    Written,
    /// Bytes that were read from the device per read or write.
    BytesRead,
    /// Bytes that were written before the round to make ready for it and behind it, per read or write of the round.
    Prepared,
}

impl Quantity {
    /// The unit, as tables and the report name it.
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            Self::Rate => "IOPS",
            Self::LatencyP99 => "p99 us",
            Self::Processor => "CPU us per I/O",
            Self::SystemCalls => "system calls per I/O",
            Self::Syncs => "sync calls per I/O",
            Self::SyncsPerFlush => "sync calls per flush",
            Self::Written => "bytes written per I/O",
            Self::BytesRead => "bytes read per I/O",
            Self::Prepared => "bytes ahead and behind per I/O",
        }
    }

    pub(super) fn values(self, measured: &Measured) -> Vec<f64> {
        match self {
            Self::Rate => measured.values(|turn| turn.per_second),
            Self::LatencyP99 => measured.values(|turn| turn.latency_p99_us),
            Self::Processor => measured.costs(|turn| turn.processor_us),
            Self::SystemCalls => measured.system_calls.into_iter().collect(),
            Self::Syncs => measured.syncs.into_iter().collect(),
            Self::SyncsPerFlush => measured.syncs_per_flush.into_iter().collect(),
            Self::Written => measured.costs(|turn| turn.written_bytes),
            Self::BytesRead => measured.costs(|turn| turn.read_bytes),
            Self::Prepared => measured.costs(|turn| turn.prepared_bytes),
        }
    }
}

/// All, in the order of the tables.
pub(super) const QUANTITIES: &[Quantity] = &[
    Quantity::Rate,
    Quantity::LatencyP99,
    Quantity::Processor,
    Quantity::SystemCalls,
    Quantity::Syncs,
    Quantity::SyncsPerFlush,
    Quantity::Written,
    Quantity::BytesRead,
    Quantity::Prepared,
];

/// What a line should reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// Ours by the peer's is at least so much.
    RatioAtLeast(f64),
    /// Ours by the peer's is at most so much.
    RatioAtMost(f64),
    /// Ours is at least so much.
    AtLeast(f64),
    /// Ours is at most so much.
    AtMost(f64),
}

impl Goal {
    pub(super) fn text(self) -> String {
        match self {
            Self::RatioAtLeast(bound) => format!(">= {bound}x"),
            Self::RatioAtMost(bound) => format!("<= {bound}x"),
            Self::AtLeast(bound) => format!(">= {}", number(bound)),
            Self::AtMost(bound) => format!("<= {}", number(bound)),
        }
    }

    /// Whether the first is further on the goal's side than the second.
    pub(super) fn is_better(self, one: f64, other: f64) -> bool {
        match self {
            Self::RatioAtLeast(_) | Self::AtLeast(_) => one > other,
            Self::RatioAtMost(_) | Self::AtMost(_) => one < other,
        }
    }

    pub(super) fn met(self, ours: f64, ratio: Option<f64>) -> Option<bool> {
        match self {
            Self::RatioAtLeast(bound) => ratio.map(|ratio| ratio >= bound),
            Self::RatioAtMost(bound) => ratio.map(|ratio| ratio <= bound),
            Self::AtLeast(bound) => Some(ours >= bound),
            Self::AtMost(bound) => Some(ours <= bound),
        }
    }
}

/// What nobody does better than in this run, beside a goal.
#[derive(Clone, Debug, PartialEq)]
pub struct Limit {
    /// What sets it: `fio`.
    pub by: String,
    /// It by the peer's: a goal that asks for more is out of reach.
    pub ratio: f64,
    /// Ours by it.
    pub reached: f64,
}

/// One quantity of one workload.
#[derive(Clone, Debug)]
pub struct Line {
    /// Figure, 1 to 9.
    pub figure: u8,
    /// The workload, with the place.
    pub workload: String,
    /// Unit of the values.
    pub unit: String,
    /// Ours.
    pub ours: Spread,
    /// The peer's name and values.
    pub peer: Option<(String, Spread)>,
    /// Ours by the peer's.
    pub ratio: Option<Spread>,
    /// What it should reach.
    pub goal: Option<Goal>,
    /// What can be reached, where that was measured beside it.
    pub limit: Option<Limit>,
}

impl Line {
    /// `None` without a goal.
    #[must_use]
    pub fn met(&self) -> Option<bool> {
        self.goal?
            .met(self.ours.median, self.ratio.map(|ratio| ratio.median))
    }

    /// Not met, and neither does what sets the limit reach the goal; nor does the peer, which shows that equality can be reached. fio does not
    /// show that: it has no client.
    #[must_use]
    pub fn is_beyond(&self) -> bool {
        let (Some(goal), Some(limit)) = (self.goal, &self.limit) else {
            return false;
        };
        let reaches = |ratio| goal.met(ratio, Some(ratio)) == Some(true);
        let shows_equality = |peer: &(String, Spread)| peer.0 != Fio::NAME;
        let is_reached =
            reaches(limit.ratio) || self.peer.as_ref().is_some_and(shows_equality) && reaches(1.0);
        self.met() == Some(false) && !is_reached
    }

    pub(super) fn json(&self) -> Value {
        let range = |spread: &Spread| json!([spread.low, spread.high]);
        json!({
            "figure": self.figure,
            "workload": self.workload,
            "unit": self.unit,
            "ours": self.ours.median,
            "ours_spread": range(&self.ours),
            "peer": self.peer.as_ref().map(|peer| &peer.0),
            "peer_value": self.peer.as_ref().map(|peer| peer.1.median),
            "peer_spread": self.peer.as_ref().map(|peer| range(&peer.1)),
            "ratio": self.ratio.map(|ratio| ratio.median),
            "ratio_spread": self.ratio.as_ref().map(range),
            "rounds": self.ours.rounds,
            "goal": self.goal.map(Goal::text),
            "met": self.met(),
            "limit": self.limit.as_ref().map(|limit| {
                json!({"by": limit.by, "ratio": limit.ratio, "ours_by_limit": limit.reached})
            }),
        })
    }
}
