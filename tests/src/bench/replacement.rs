//! Figure 9: a daemon that is replaced by another under load: the guest's longest stall beside one of an equally long time without. Ours only:
//! no peer hands its connections over.
//!
//! Called by the command. The client stays connected all the time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::Bench;
use super::commit::{load, longest_ms};
use super::contestants::{Ours, OursSpec};
use super::job::{Job, Op};
use super::place::Place;

const FIGURE: u8 = 9;
/// Bytes of the disk.
const DISK_BYTES: u64 = 256 << 20;
/// Requests in flight of the load.
const DEPTH: usize = 8;
/// Load before the replacement is started, and after the old daemon has ended.
const AROUND: Duration = Duration::from_millis(300);

/// Measures the figure.
pub fn run(bench: &mut Bench) -> Result<()> {
    for place in [bench.ram.clone(), bench.disk.clone()] {
        for op in [Op::Read, Op::Write] {
            under_load(bench, &place, op)?;
        }
    }
    bench.report.note(FIGURE, "the client stays connected; \"whole\" is from the start of the new program to the end of the old one");
    Ok(())
}

fn under_load(bench: &mut Bench, place: &Place, op: Op) -> Result<()> {
    let job = Job::random(op, DEPTH, DISK_BYTES);
    let workload = format!("replaced under {}, {}", job.name, place.name);
    bench.say(&workload);
    let spec = OursSpec::plain("replaced", DISK_BYTES);
    let mut ours = Ours::start(bench, place, spec)?;
    // There is something to hand over: a snapshot with blocks redirected behind it.
    ours.daemon.snapshot("row")?;
    ours.client()
        .run(&Job::random(Op::Write, DEPTH, DISK_BYTES), 0)?;
    ours.daemon.wait_idle()?;
    let (mut with, mut without, mut whole) = (Vec::new(), Vec::new(), Vec::new());
    for turn in 0..bench.rounds as u64 {
        let (client, daemon) = ours.parts();
        let over = AtomicBool::new(false);
        let begin = Instant::now();
        let stall = thread::scope(|scope| {
            let load = scope.spawn(|| load(client, &job, turn, &over));
            thread::sleep(AROUND);
            let begin = Instant::now();
            let replaced = daemon.replace();
            whole.push(begin.elapsed().as_secs_f64() * 1e3);
            thread::sleep(AROUND);
            over.store(true, Ordering::SeqCst);
            let stall = load.join().map_err(|_| anyhow!("the load has panicked"))?;
            replaced.and(stall)
        })?;
        with.push(stall);
        let limit = begin.elapsed();
        without.push(longest_ms(&client.run(&job.clone().limit(limit), turn)?));
    }
    let report = &mut bench.report;
    let (unit, peer) = ("longest stall ms", "no replacement");
    report.compare(FIGURE, &workload, unit, &with, peer, &without, None);
    let longest = |all: &[f64]| vec![all.iter().copied().fold(0.0, f64::max)];
    let unit = "the longest of all ms";
    let (with, without) = (longest(&with), longest(&without));
    report.compare(FIGURE, &workload, unit, &with, peer, &without, None);
    report.value(FIGURE, &workload, "whole ms", &whole, None);
    Ok(())
}
