//! Figure 1: no snapshot. What the daemon adds to the file, beside the storage daemon on a raw file and fio on the file itself.
//!
//! Called by the command. All use one file in turn. One line is the machine's noise: ours beside itself.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::Result;

use super::Bench;
use super::contestants::{Arrangement, Fio, OursSpec, Peer, Visiting};
use super::cost::{self, Device};
use super::daemon;
use super::job::{Job, Op, Pattern};
use super::place::{Files, Place};
use super::relay::Relay;
use super::report::{Goal, Quantity};
use super::rounds::{Contestant, interleaved};

const FIGURE: u8 = 1;
const POLLING: &str = "--poll-max-us";
const RAM: &str = "RAM";

/// Measures the figure.
pub fn run(bench: &mut Bench) -> Result<()> {
    let ram = bench.ram.clone();
    let disk = bench.disk.clone();
    one_queue(bench, &ram)?;
    two_queues(bench, &ram)?;
    one_queue(bench, &disk)?;
    bench.report.note(FIGURE, "\"beyond fio\", \"beyond relay\": the goal is more than that, and QSD, do on the same file in the same run; it counts as not met. fio has no client; the relay is two threads, a client and a backend that only moves the data");
    Ok(())
}

type Goals<'a> = &'a [(Quantity, &'a str, Goal)];

fn contest(
    bench: &mut Bench,
    place: &Place,
    job: &Job,
    contestants: &mut [&mut dyn Contestant],
    goals: Goals<'_>,
) -> Result<()> {
    let device = place.device.as_ref().filter(|_| place.name == RAM);
    let measured = interleaved(bench, contestants, job, device)?;
    let workload = format!("{}, {}", job.name, place.name);
    bench.report.contest(FIGURE, &workload, &measured, goals);
    // What no backend can exceed on this file: without a client, and with one.
    for by in [Fio::NAME, Relay::NAME] {
        bench.report.limit(FIGURE, &workload, &measured, by);
    }
    Ok(())
}

/// A file that all contestants use in turn.
fn shared(place: &Place, size_bytes: u64) -> Result<(Files, PathBuf)> {
    let files = place.directory("shared")?;
    let base = files.path().join("base.raw");
    place.file(&base, size_bytes)?;
    Ok((files, base))
}

fn one_queue(bench: &mut Bench, place: &Place) -> Result<()> {
    let size_bytes = bench.size(512 << 20, 64 << 20);
    let (_files, base) = shared(place, size_bytes)?;
    let visiting = |name| Visiting::of(bench, place, &base, OursSpec::plain(name, size_bytes));
    let mut ours = visiting("vmshadow");
    let mut again = visiting("vmshadow again");
    let polls = daemon::takes(&bench.vhost_blk, POLLING)?;
    let mut sleeping = polls.then(|| {
        let arguments = &[POLLING, "0"];
        let spec = OursSpec::plain("vmshadow, no polling", size_bytes);
        Visiting::of(bench, place, &base, OursSpec { arguments, ..spec })
    });
    let mut raw = Peer::raw(place, &base, size_bytes, 1)?;
    let mut fio = Fio { file: base.clone() };
    let mut null = Peer::start(place, Arrangement::Null, size_bytes, 1)?;
    let mut relay = Relay::over(&base);
    for op in [Op::Read, Op::Write] {
        let goals = [
            (Quantity::Rate, "QSD raw", Goal::RatioAtLeast(1.5)),
            (Quantity::Rate, Fio::NAME, Goal::RatioAtLeast(0.9)),
            (Quantity::Processor, "QSD raw", Goal::RatioAtMost(0.75)),
        ];
        let mut all: Vec<&mut dyn Contestant> = vec![&mut ours, &mut raw, &mut fio];
        all.push(&mut again);
        all.push(&mut null);
        all.push(&mut relay);
        let job = Job::random(op, 32, size_bytes);
        contest(bench, place, &job, &mut all, &goals)?;
    }
    for op in [Op::Read, Op::Write] {
        let goals = [(Quantity::Rate, "QSD raw", Goal::RatioAtLeast(1.3))];
        let mut all: Vec<&mut dyn Contestant> = vec![&mut ours, &mut raw, &mut fio];
        all.extend(sleeping.as_mut().map(|one| one as &mut dyn Contestant));
        all.push(&mut null);
        all.push(&mut relay);
        let job = Job::random(op, 1, size_bytes);
        contest(bench, place, &job, &mut all, &goals)?;
    }
    drop(null);
    if place.name == RAM {
        idle(bench, &mut ours, &raw, size_bytes)?;
    }
    for op in [Op::Read, Op::Write] {
        let verb = if op == Op::Read { "read" } else { "write" };
        let job = Job {
            name: format!("sequential {verb} 1 MiB QD8"),
            pattern: Pattern::Sequential {
                area_bytes: size_bytes,
            },
            block_bytes: 1 << 20,
            ..Job::random(op, 8, size_bytes)
        };
        let goals = [(Quantity::Rate, "QSD raw", Goal::RatioAtLeast(1.0))];
        let mut all: Vec<&mut dyn Contestant> =
            vec![&mut ours, &mut raw, &mut fio, &mut again, &mut relay];
        contest(bench, place, &job, &mut all, &goals)?;
    }
    Ok(())
}

/// What a daemon spends in a second in which nothing happens, right after it was busy.
fn idle(bench: &mut Bench, ours: &mut Visiting, raw: &Peer, size_bytes: u64) -> Result<()> {
    const SPAN: Duration = Duration::from_secs(1);
    let spent = |pid: Option<u32>| -> Result<Vec<f64>> {
        let Some(pid) = pid else {
            return Ok(Vec::new());
        };
        cost::wait_quiet(pid, Duration::from_secs(30))?;
        let before = cost::processor_time(pid)?;
        thread::sleep(SPAN);
        let spent = cost::processor_time(pid)?.saturating_sub(before);
        Ok(vec![spent.as_secs_f64() * 1e6 / SPAN.as_secs_f64()])
    };
    let job = Job::random(Op::Read, 32, size_bytes);
    ours.make_ready(&job)?;
    ours.run(&job, 0)?;
    let of_ours = spent(ours.pid())?;
    ours.settle()?;
    let of_raw = spent(raw.pid())?;
    let unit = "CPU us per second";
    let goal = Some(Goal::AtMost(1000.0));
    bench
        .report
        .value(FIGURE, "idle after load, RAM", unit, &of_ours, goal);
    bench.report.compare(
        FIGURE,
        "idle after load, RAM",
        unit,
        &of_ours,
        "QSD raw",
        &of_raw,
        None,
    );
    Ok(())
}

fn two_queues(bench: &mut Bench, place: &Place) -> Result<()> {
    let size_bytes = bench.size(512 << 20, 64 << 20);
    let (_files, base) = shared(place, size_bytes)?;
    let visiting = |name, queues| {
        let spec = OursSpec::plain(name, size_bytes);
        Visiting::of(bench, place, &base, OursSpec { queues, ..spec })
    };
    let device: Option<&Device> = None;
    let mut two = visiting("vmshadow", 2);
    let mut one = visiting("vmshadow, 1 queue", 1);
    let mut raw = Peer::raw(place, &base, size_bytes, 2)?;
    for op in [Op::Read, Op::Write] {
        let job = Job {
            queues: 2,
            ..Job::random(op, 32, size_bytes)
        };
        let workload = format!("{} on each of 2 queues, {}", job.name, place.name);
        let all = interleaved(bench, &mut [&mut two, &mut raw, &mut one], &job, device)?;
        bench.report.contest(FIGURE, &workload, &all, &[]);
    }
    let cores = thread::available_parallelism()?;
    bench.report.note(
        FIGURE,
        format!("2 queues: two client threads, the backend's threads and the loop device's worker share {cores} cores, so this shows no scaling where one queue fills them"),
    );
    Ok(())
}
