//! Figure 6: commits under load: what the host takes, how long the guest's longest stall is, and what it depends on.
//!
//! Called by the command. Under load: one client writes at random while sets are taken and the one before is deleted, in turns with
//! equally long rounds without. "The disk's own flush" is a 4 KiB write and an fdatasync of a file beside the disk's,
//! right before each commit, under the same load.

mod dependence;

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rustix::fs::OFlags;
use serde_json::{Value, json};
use uuid::Uuid;

use super::Bench;
use super::client::Run;
use super::contestants::{Ours, OursSpec};
use super::daemon::Daemon;
use super::job::{Job, Op};
use super::place::Place;
use super::report::Goal;
use super::statistics::quantile;

const FIGURE: u8 = 6;
/// Bytes of the disk under load.
const DISK_BYTES: u64 = 256 << 20;
/// Requests in flight of the load.
const LOAD_DEPTH: usize = 8;
/// Longest time of one half of a turn.
const HALF_TURN: Duration = Duration::from_secs(60);

/// Measures the figure.
pub fn run(bench: &mut Bench) -> Result<()> {
    for place in [bench.ram.clone(), bench.disk.clone()] {
        under_load(bench, &place)?;
    }
    dependence::by_size(bench)?;
    dependence::by_snapshots(bench)?;
    dependence::many_volumes(bench)
}

/// What one commit took.
struct Commit {
    /// From the command to its answer, microseconds.
    answered_us: f64,
    /// Writes held, microseconds, by the daemon's word.
    held_us: f64,
}

/// Takes a set of all disks, and times the commit.
fn commit(daemon: &mut Daemon, volumes: &[String]) -> Result<(Uuid, Commit)> {
    let set = Uuid::new_v4();
    let control = daemon.control();
    let prepare = json!({"set": set, "volumes": volumes, "method": "row"});
    control.execute("snapshot-set-prepare", prepare)?;
    control.execute("snapshot-set-mark", json!({"set": set}))?;
    let begin = Instant::now();
    let answer = control.execute(
        "snapshot-set-commit",
        json!({"set": set, "limit-ms": 10_000}),
    )?;
    let answered_us = begin.elapsed().as_secs_f64() * 1e6;
    control.execute("snapshot-set-keep", json!({"set": set}))?;
    let held_us = microseconds(&answer, "hold-us")?;
    Ok((
        set,
        Commit {
            answered_us,
            held_us,
        },
    ))
}

fn microseconds(answer: &Value, field: &str) -> Result<f64> {
    answer[field]
        .as_f64()
        .with_context(|| format!("no {field}"))
}

/// The disk's own flush beside the disk.
struct Probe(File);

impl Probe {
    fn new(directory: &Path) -> Result<Self> {
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(i32::try_from(OFlags::DSYNC.bits())?)
            .open(directory.join("probe"))?;
        // A synchronous write is the write and the flush in one call; the first one allocates.
        file.write_all_at(&[1; 4096], 0)?;
        Ok(Self(file))
    }

    /// Microseconds.
    fn flush(&self) -> Result<f64> {
        let begin = Instant::now();
        self.0.write_all_at(&[2; 4096], 0)?;
        Ok(begin.elapsed().as_secs_f64() * 1e6)
    }
}

/// The longest latency of a round, in milliseconds.
pub(super) fn longest_ms(run: &Run) -> f64 {
    run.latencies.max() as f64 / 1e6
}

/// A share of unsorted values.
fn share(values: &[f64], share: f64) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile(&sorted, share).into_iter().collect()
}

fn under_load(bench: &mut Bench, place: &Place) -> Result<()> {
    let spec = OursSpec::plain("commits", DISK_BYTES);
    let mut ours = Ours::start(bench, place, spec)?;
    let (turns, commits) = (bench.size(10, 2), bench.size(100, 5));
    let beside = place.directory("probe")?;
    let probe = Probe::new(beside.path())?;
    let job = Job::random(Op::Write, LOAD_DEPTH, DISK_BYTES);
    let volumes = ["disk".to_owned()];
    let (mut with, mut without, mut flushes, mut taken) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    // The load is of the same kind in both halves: redirected blocks are there from the start.
    let mut last = commit(&mut ours.daemon, &volumes)?.0;
    ours.client().run(&job, 0)?;
    for turn in 0..turns {
        bench.say(&format!("{commits} commits under load, {}", place.name));
        let (client, daemon) = ours.parts();
        let over = AtomicBool::new(false);
        let begin = Instant::now();
        let run = thread::scope(|scope| {
            let load = scope.spawn(|| load(client, &job, turn, &over));
            let took = (0..commits).try_for_each(|_| -> Result<()> {
                flushes.push(probe.flush()?);
                let (set, took) = commit(daemon, &volumes)?;
                taken.push(took);
                let delete = json!({"set": std::mem::replace(&mut last, set)});
                daemon.control().execute("snapshot-set-delete", delete)?;
                Ok(())
            });
            over.store(true, Ordering::SeqCst);
            let run = load.join().map_err(|_| anyhow!("the load has panicked"))?;
            took.and(run)
        })?;
        with.push(run);
        // As long as that, without.
        let limit = begin.elapsed();
        let run = client.run(&job.clone().limit(limit), turn)?;
        without.push(longest_ms(&run));
    }
    let workload = format!(
        "{} commits, random write QD{LOAD_DEPTH}, {}",
        taken.len(),
        place.name
    );
    let report = &mut bench.report;
    let answered: Vec<f64> = taken.iter().map(|one| one.answered_us).collect();
    let held: Vec<f64> = taken.iter().map(|one| one.held_us).collect();
    for (name, part) in [("p50", 0.5), ("p99", 0.99)] {
        let (ours, flush) = (share(&answered, part), share(&flushes, part));
        let unit = format!("commit {name} us");
        report.compare(
            FIGURE,
            &workload,
            &unit,
            &ours,
            "write + fdatasync",
            &flush,
            None,
        );
        let beyond: Vec<f64> = ours
            .iter()
            .zip(&flush)
            .map(|(ours, flush)| ours - flush)
            .collect();
        let goal = (part > 0.9).then_some(Goal::AtMost(5000.0));
        let unit = format!("commit beyond it {name} us");
        report.value(FIGURE, &workload, &unit, &beyond, goal);
        let unit = format!("writes held {name} us");
        report.value(FIGURE, &workload, &unit, &share(&held, part), None);
    }
    report.compare(
        FIGURE,
        &workload,
        "longest stall ms",
        &share(&with, 1.0),
        "no commits",
        &share(&without, 1.0),
        Some(Goal::RatioAtMost(3.0)),
    );
    report.compare(
        FIGURE,
        &workload,
        "longest of a turn ms",
        &with,
        "no commits",
        &without,
        None,
    );
    Ok(())
}

/// Goes on until told to end; the longest stall, in milliseconds.
pub(super) fn load(
    client: &mut super::client::Client,
    job: &Job,
    seed: u64,
    over: &AtomicBool,
) -> Result<f64> {
    let mut longest: f64 = 0.0;
    let begin = Instant::now();
    while !over.load(Ordering::SeqCst) && begin.elapsed() < HALF_TURN {
        // In one piece of a quarter of a second after the other: a stall is inside one of them.
        let piece = job.clone().limit(Duration::from_millis(250));
        longest = longest.max(longest_ms(&client.run(&piece, seed)?));
    }
    Ok(longest)
}
