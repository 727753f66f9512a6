//! `make bench`: what the disk costs beside its peers, in one interleaved run.
//!
//! Called by `src/bin/bench.rs`. Every program is driven by the same client (`client`) in the same rounds (`rounds`): the contestants take
//! turns, so that whatever else the machine does falls on all of them. A figure is one module with `run(&mut Bench)`:
//!
//! 1. make files on a place (`place`), start who competes (`daemon`, `peers`, `fio`),
//! 2. `rounds::interleaved(..)` for each workload (`job`), which also reads what a round cost (`cost`),
//! 3. `bench.report.contest(..)` or `.compare(..)` or `.value(..)` with the goals.
//!
//! `report` prints one table per figure and writes `target/bench/report.json`; `plot` draws from the same lines. This room must not know
//! how the programs work inside.

pub mod client;
pub mod commit;
pub mod contestants;
pub mod cost;
pub mod daemon;
pub mod depth;
pub mod fio;
pub mod first_touch;
pub mod job;
pub mod log;
pub mod peers;
pub mod place;
pub mod plain;
pub mod plot;
pub mod reclaim;
pub mod relay;
pub mod replacement;
pub mod report;
pub mod rounds;
pub mod scale;
pub mod setup;
pub mod statistics;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;

use cost::NoHalt;
use place::Place;
use report::Report;

/// What every figure works with.
#[derive(Debug)]
pub struct Bench {
    /// Fewer and smaller rounds: to see that all of it runs, not to measure.
    pub quick: bool,
    /// Rounds of each workload and contestant.
    pub rounds: usize,
    /// Files in memory.
    pub ram: Place,
    /// Files on the machine's disk.
    pub disk: Place,
    /// The daemon under test.
    pub vhost_blk: PathBuf,
    /// Keeps processors awake; `None` where that cannot be had.
    pub awake: Option<NoHalt>,
    /// What came out so far.
    pub report: Report,
    /// When the run began, for the progress lines.
    pub begin: Instant,
}

impl Bench {
    /// Says on standard error what is being done, with the time since the run began.
    pub fn say(&self, what: &str) {
        eprintln!("[{:5.0} s] {what}", self.begin.elapsed().as_secs_f64());
    }

    /// `full`, or `quick` in a quick run.
    pub fn size<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}

/// A figure: its number, what it is about, and what measures it.
pub type Figure = (u8, &'static str, fn(&mut Bench) -> Result<()>);

/// Every figure in the order in which they run.
pub const FIGURES: &[Figure] = &[
    (1, "no snapshot: as fast as the file", plain::run),
    (
        2,
        "first touch after a snapshot, redirect-on-write",
        first_touch::redirect,
    ),
    (
        3,
        "first touch after a snapshot, copy-on-write",
        first_touch::copy,
    ),
    (4, "random reads with many snapshots", depth::run),
    (
        5,
        "write and flush after a snapshot: a database's log",
        log::run,
    ),
    (6, "commits under full load", commit::run),
    (7, "memory, and the start after a kill", scale::run),
    (8, "deleting snapshots, and settling", reclaim::run),
    (9, "the daemon replaced under load", replacement::run),
];
