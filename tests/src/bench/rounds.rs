//! Rounds: contestants take turns, and each turn is measured the same way.
//!
//! Called by the figures. A turn is: make ready (not measured), read the counters, run, read the counters. The order turns
//! with every round, so that nobody always follows the same neighbour. After the rounds each has a turn more under
//! `perf stat`, for the calls; that one's speed is not used.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::Bench;
use super::client::Run;
use super::cost::{self, CallCounter, Device};
use super::job::Job;

/// Time after which a workload gets no further round, so that the whole run stays bounded on a busy machine. The report tells the rounds
/// of each line.
const WORKLOAD_MAX: Duration = Duration::from_secs(35);
/// Rounds that a workload gets however long they take.
const ROUNDS_MIN: usize = 3;

/// Who competes: a running program with a connected client, or something that is started for each round.
pub trait Contestant: Debug {
    /// Name in the tables; ours is `vmshadow`.
    fn name(&self) -> String;

    /// What has to be done before a round, such as a fresh snapshot. Not measured.
    fn make_ready(&mut self, _job: &Job) -> Result<()> {
        Ok(())
    }

    /// Waits for what a round has left to be done in the background, so that it does not fall on the next contestant. Not measured.
    fn settle(&mut self) -> Result<()> {
        Ok(())
    }

    /// The process whose processor time and calls count.
    fn pid(&self) -> Option<u32>;

    /// One round.
    fn run(&mut self, job: &Job, seed: u64) -> Result<Turn>;
}

/// What a round was.
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    /// Reads and writes that ended.
    pub ios: u64,
    /// Flushes that ended.
    pub flushes: u64,
    /// Reads and writes per second.
    pub per_second: f64,
    /// Median latency, microseconds.
    pub latency_us: f64,
    /// 99th percentile of the latency, microseconds.
    pub latency_p99_us: f64,
    /// The longest latency, microseconds.
    pub latency_max_us: f64,
    /// Processor microseconds per read or write.
    pub processor_us: Option<f64>,
    /// Bytes that reached the device per read or write.
    pub written_bytes: Option<f64>,
    /// Bytes read from the device per read or write.
    pub read_bytes: Option<f64>,
    /// Bytes that were written before the round to make ready for it, and behind it in the background, per read or write.
    pub prepared_bytes: Option<f64>,
}

impl From<&Run> for Turn {
    fn from(run: &Run) -> Self {
        let at = |quantile: f64| run.latencies.value_at_quantile(quantile) as f64 / 1e3;
        Self {
            ios: run.ios,
            flushes: run.flushes,
            per_second: run.per_second(),
            latency_us: at(0.5),
            latency_p99_us: at(0.99),
            latency_max_us: run.latencies.max() as f64 / 1e3,
            processor_us: None,
            written_bytes: None,
            read_bytes: None,
            prepared_bytes: None,
        }
    }
}

/// All rounds of one contestant.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The contestant.
    pub name: String,
    /// In the order of the rounds.
    pub turns: Vec<Turn>,
    /// System calls per read or write.
    pub system_calls: Option<f64>,
    /// Sync calls per read or write.
    pub syncs: Option<f64>,
    /// Sync calls per flush of the guest.
    pub syncs_per_flush: Option<f64>,
}

impl Measured {
    /// One value of every round.
    pub fn values(&self, of: impl Fn(&Turn) -> f64) -> Vec<f64> {
        self.turns.iter().map(of).collect()
    }

    /// One value of every round that has it.
    pub fn costs(&self, of: impl Fn(&Turn) -> Option<f64>) -> Vec<f64> {
        self.turns.iter().filter_map(of).collect()
    }
}

/// Lets them take turns. `device` is what their files lie on.
pub fn interleaved(
    bench: &Bench,
    contestants: &mut [&mut dyn Contestant],
    job: &Job,
    device: Option<&Device>,
) -> Result<Vec<Measured>> {
    bench.say(&job.name);
    let mut all: Vec<Measured> = contestants
        .iter()
        .map(|contestant| Measured {
            name: contestant.name(),
            turns: Vec::new(),
            system_calls: None,
            syncs: None,
            syncs_per_flush: None,
        })
        .collect();
    let count = contestants.len();
    let begin = Instant::now();
    for round in 0..bench.rounds {
        if round >= ROUNDS_MIN && begin.elapsed() > WORKLOAD_MAX {
            bench.say(&format!(
                "slow machine: {round} rounds instead of {}",
                bench.rounds
            ));
            break;
        }
        for place in 0..count {
            let number = (round + place) % count;
            let contestant = contestants.get_mut(number).context("a contestant")?;
            let turn = measured(&mut **contestant, job, seed(round), device)
                .with_context(|| format!("{} by {}", job.name, contestant.name()))?;
            all.get_mut(number)
                .context("a contestant")?
                .turns
                .push(turn);
        }
    }
    for (contestant, measured) in contestants.iter_mut().zip(&mut all) {
        count_calls(&mut **contestant, job, seed(bench.rounds), measured)?;
    }
    Ok(all)
}

fn seed(round: usize) -> u64 {
    0x5eed + round as u64
}

/// One turn with what it cost.
pub fn measured(
    contestant: &mut dyn Contestant,
    job: &Job,
    seed: u64,
    device: Option<&Device>,
) -> Result<Turn> {
    let device_at_first = device.map(Device::settled).transpose()?;
    contestant.make_ready(job)?;
    let device_before = device.map(Device::settled).transpose()?;
    let pid = contestant.pid();
    let processor_before = pid.map(cost::processor_time).transpose()?;
    let mut turn = contestant.run(job, seed)?;
    let ios = turn.ios as f64;
    let per_io = |now: Duration, before| now.saturating_sub(before).as_secs_f64() * 1e6 / ios;
    if let (Some(pid), Some(before)) = (pid, processor_before) {
        turn.processor_us = Some(per_io(cost::processor_time(pid)?, before));
    }
    if let (Some(device), Some(first), Some(before)) = (device, device_at_first, device_before) {
        let end = device.settled()?;
        let done = end.since(before);
        turn.written_bytes = Some(done.written_bytes as f64 / ios);
        turn.read_bytes = Some(done.read_bytes as f64 / ios);
        contestant.settle()?;
        let ahead = before.since(first).written_bytes;
        let behind = device.settled()?.since(end).written_bytes;
        turn.prepared_bytes = Some((ahead + behind) as f64 / ios);
    } else {
        contestant.settle()?;
    }
    Ok(turn)
}

/// One turn under `perf stat`.
fn count_calls(
    contestant: &mut dyn Contestant,
    job: &Job,
    seed: u64,
    measured: &mut Measured,
) -> Result<()> {
    contestant.make_ready(job)?;
    let Some(pid) = contestant.pid() else {
        return Ok(());
    };
    let counter = match CallCounter::start(pid) {
        Ok(counter) => counter,
        Err(error) => {
            eprintln!("bench: calls are not counted: {error:#}");
            return contestant.settle();
        }
    };
    let turn = contestant.run(job, seed)?;
    let calls = counter.stop()?;
    contestant.settle()?;
    measured.system_calls = Some(calls.system_calls as f64 / turn.ios as f64);
    measured.syncs = Some(calls.syncs as f64 / turn.ios as f64);
    if turn.flushes > 0 {
        measured.syncs_per_flush = Some(calls.syncs as f64 / turn.flushes as f64);
    }
    Ok(())
}
