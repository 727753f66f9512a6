//! Figure 1: no snapshot. What the daemon adds to the file, beside the storage daemon on a raw file and fio on the file itself.
//!
//! Called by the command. One line is the machine's noise: a second daemon of ours, on its own file, beside the first.

use std::thread;
use std::time::Duration;

use anyhow::Result;

use super::Bench;
use super::contestants::{Arrangement, Fio, Ours, OursSpec, Peer};
use super::cost::{self, Device};
use super::daemon;
use super::job::{Job, Op, Pattern};
use super::place::Place;
use super::report::{Goal, Quantity};
use super::rounds::{Contestant, Measured, interleaved};

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
    bench.report.note(FIGURE, "\"fio and client\": 1 / (1 / fio + 1 / null-co), what a backend that costs nothing would reach with one request at a time");
    bench.report.note(FIGURE, "\"beyond the file\": the goal is more than fio and QSD do on the same file in the same run (at QD1: more than fio and the client allow together); it counts as not met");
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
    limit(bench, &workload, job, &measured);
    Ok(())
}

/// What no backend can exceed on this file: fio. One request at a time takes fio's time and then the client's and the ring's own, which
/// null-co shows, one behind the other.
fn limit(bench: &mut Bench, workload: &str, job: &Job, measured: &[Measured]) {
    const CEILING: &str = "fio and client";
    let rates = |name: &str| {
        let one = measured.iter().find(|one| one.name == name);
        one.map(|one| one.values(|turn| turn.per_second))
    };
    let Some(of_fio) = rates("fio") else { return };
    let report = &mut bench.report;
    if job.depth > 1 {
        report.limit(FIGURE, workload, measured, "fio", &of_fio);
        return;
    }
    let (Some(of_null), Some(ours)) = (rates(Arrangement::Null.name()), measured.first()) else {
        return;
    };
    let both = of_fio.iter().zip(&of_null);
    let ceiling: Vec<f64> = both
        .map(|(fio, null)| 1.0 / (1.0 / fio + 1.0 / null))
        .collect();
    report.limit(FIGURE, workload, measured, CEILING, &ceiling);
    let ours = ours.values(|turn| turn.per_second);
    let unit = Quantity::Rate.unit();
    report.compare(FIGURE, workload, unit, &ours, CEILING, &ceiling, None);
}

fn one_queue(bench: &mut Bench, place: &Place) -> Result<()> {
    let size_bytes = bench.size(512 << 20, 64 << 20);
    let spec = |name| OursSpec::plain(name, size_bytes);
    let mut ours = Ours::start(bench, place, spec("vmshadow"))?;
    let mut raw = Peer::start(place, Arrangement::Raw, size_bytes, 1)?;
    let mut fio = Fio::on(place, size_bytes)?;
    let mut beside = Beside::start(bench, place, size_bytes)?;
    for op in [Op::Read, Op::Write] {
        let goals = [
            (Quantity::Rate, "QSD raw", Goal::RatioAtLeast(1.5)),
            (Quantity::Rate, "fio", Goal::RatioAtLeast(0.9)),
            (Quantity::Processor, "QSD raw", Goal::RatioAtMost(0.75)),
        ];
        let mut all: Vec<&mut dyn Contestant> = vec![&mut ours, &mut raw, &mut fio];
        all.extend(beside.again.as_mut().map(|one| one as &mut dyn Contestant));
        all.push(&mut beside.null);
        let job = Job::random(op, 32, size_bytes);
        contest(bench, place, &job, &mut all, &goals)?;
    }
    for op in [Op::Read, Op::Write] {
        let goals = [(Quantity::Rate, "QSD raw", Goal::RatioAtLeast(1.3))];
        let mut all: Vec<&mut dyn Contestant> = vec![&mut ours, &mut raw, &mut fio];
        all.extend(
            beside
                .polling
                .as_mut()
                .map(|one| one as &mut dyn Contestant),
        );
        all.push(&mut beside.null);
        let job = Job::random(op, 1, size_bytes);
        contest(bench, place, &job, &mut all, &goals)?;
    }
    drop(beside);
    if place.name == RAM {
        idle(bench, &ours, &raw)?;
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
        contest(
            bench,
            place,
            &job,
            &mut [&mut ours, &mut raw, &mut fio],
            &goals,
        )?;
    }
    Ok(())
}

/// Who else is of interest in some workloads.
struct Beside {
    /// Ours once more: the machine's noise.
    again: Option<Ours>,
    /// Ours with polling, if it can.
    polling: Option<Ours>,
    /// What the client and the ring allow.
    null: Peer,
}

impl Beside {
    fn start(bench: &mut Bench, place: &Place, size_bytes: u64) -> Result<Self> {
        let in_memory = place.name == RAM;
        let spec = |name| OursSpec::plain(name, size_bytes);
        let again = in_memory.then(|| Ours::start(bench, place, spec("vmshadow again")));
        let null = Peer::start(place, Arrangement::Null, size_bytes, 1)?;
        let polls = daemon::takes(&bench.vhost_blk, POLLING)?;
        let polling = polls.then(|| {
            let arguments = &[POLLING, "32"];
            let spec = spec("vmshadow, polling");
            Ours::start(bench, place, OursSpec { arguments, ..spec })
        });
        if !polls && in_memory {
            let note = format!("this daemon has no {POLLING}: QD1 is without polling");
            bench.report.note(FIGURE, note);
        }
        Ok(Self {
            again: again.transpose()?,
            polling: polling.transpose()?,
            null,
        })
    }
}

/// What a daemon spends in a second in which nothing happens, right after it was busy.
fn idle(bench: &mut Bench, ours: &Ours, raw: &Peer) -> Result<()> {
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
    let of_ours = spent(ours.pid())?;
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
    let spec = |name| OursSpec {
        name,
        size_bytes,
        arguments: &[],
        queues: 2,
    };
    let device: Option<&Device> = None;
    let mut two = Ours::start(bench, place, spec("vmshadow two"))?;
    let mut one = Ours::start(bench, place, spec("vmshadow, 1 queue"))?;
    one.queues_max = 1;
    let mut raw = Peer::start(place, Arrangement::Raw, size_bytes, 2)?;
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
