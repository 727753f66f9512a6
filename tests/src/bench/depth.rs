//! Figure 4: random reads of the head with many snapshots behind it, and of an old snapshot beside the head.
//!
//! Called by the command. Every disk has the same number of blocks redirected, spread over 1, 64, 512 or 4096 snapshots, so that only the
//! number of snapshots differs. Peers: chains of overlays with as many blocks.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use super::Bench;
use super::client::Client;
use super::contestants::{Ours, OursSpec};
use super::job::{BLOCK_BYTES, Job, Op};
use super::peers::{self, StorageDaemon};
use super::place::{Files, Place};
use super::plot::{self, Series};
use super::report::{Goal, Quantity};
use super::rounds::{Contestant, Turn, interleaved};

const FIGURE: u8 = 4;
/// Bytes of each disk.
const DISK_BYTES: u64 = 256 << 20;
/// Blocks that are redirected on each disk: an eighth of it.
const REDIRECTED: usize = 1 << 13;

/// Measures the figure.
pub fn run(bench: &mut Bench) -> Result<()> {
    let place = bench.ram.clone();
    let depths: &[usize] = bench.size(&[1, 64, 512, 4096], &[1, 16]);
    let chains: &[usize] = bench.size(&[1, 64, 128], &[1, 8]);
    let mut ours = Vec::new();
    for depth in depths {
        bench.say(&format!("making {depth} snapshots"));
        match deep(bench, &place, *depth) {
            Ok(deep) => ours.push((*depth, deep)),
            Err(error) => bench.report.note(
                FIGURE,
                format!("{depth} snapshots could not be made: {error:#}"),
            ),
        }
    }
    let mut chained = Vec::new();
    for depth in chains {
        bench.say(&format!("making a chain of {depth} overlays"));
        chained.push((*depth, Chain::make(&place, *depth)?));
    }
    let mut curves = Vec::new();
    for queue_depth in [32, 1] {
        let job = Job::random(Op::Read, queue_depth, DISK_BYTES);
        let mut all: Vec<&mut dyn Contestant> = Vec::new();
        // The deepest is the one that is compared with the others.
        all.extend(
            ours.iter_mut()
                .rev()
                .map(|deep| &mut deep.1 as &mut dyn Contestant),
        );
        all.extend(
            chained
                .iter_mut()
                .map(|chain| &mut chain.1 as &mut dyn Contestant),
        );
        let measured = interleaved(bench, &mut all, &job, place.device.as_ref())?;
        let deepest = ours.last().map_or(0, |deep| deep.0);
        let shallow = name(1);
        let goals = [(Quantity::Rate, shallow.as_str(), Goal::RatioAtLeast(0.95))];
        let workload = format!("{}, {deepest} snapshots, {}", job.name, place.name);
        bench.report.contest(FIGURE, &workload, &measured, &goals);
        let of = |name: String| measured.iter().find(|one| one.name == name);
        let points = |names: Vec<(usize, String)>| -> Vec<(f64, f64)> {
            let found = names.into_iter().filter_map(|(depth, name)| {
                let rates = of(name)?.values(|turn| turn.per_second);
                Some((depth as f64, super::statistics::spread(&rates)?.median))
            });
            found.collect()
        };
        curves.push(Series {
            name: format!("vmshadow QD{queue_depth}"),
            points: points(ours.iter().map(|deep| (deep.0, deep.1.name())).collect()),
        });
        curves.push(Series {
            name: format!("QSD chain QD{queue_depth}"),
            points: points(
                chained
                    .iter()
                    .map(|chain| (chain.0, chain.1.name()))
                    .collect(),
            ),
        });
    }
    let title = "random 4 KiB reads of the head over snapshots behind it";
    bench.report.plot(
        "depth",
        plot::curves(
            title,
            "snapshots (overlays) behind the head",
            "IOPS",
            &curves,
        ),
    );
    if let Some((depth, deep)) = ours.iter_mut().rev().find(|deep| deep.0 <= 512) {
        old_snapshot(bench, *depth, deep)?;
    }
    Ok(())
}

fn name(depth: usize) -> String {
    format!("vmshadow, {depth} behind")
}

/// The blocks of each snapshot, oldest first: any of the disk, the same number of blocks in all whatever the depth.
fn writes(depth: usize) -> Vec<Vec<u64>> {
    let mut rng = SmallRng::seed_from_u64(depth as u64);
    let blocks = DISK_BYTES / BLOCK_BYTES;
    let mut one = || rng.random_range(0..blocks) * BLOCK_BYTES;
    (0..depth)
        .map(|_| (0..REDIRECTED / depth).map(|_| one()).collect())
        .collect()
}

/// A disk of ours with so many snapshots, each with its own writes behind it.
fn deep(bench: &Bench, place: &Place, depth: usize) -> Result<Ours> {
    let own = name(depth);
    let spec = OursSpec {
        name: &own,
        size_bytes: DISK_BYTES,
        arguments: &[],
        queues: 1,
    };
    let mut ours = Ours::start(bench, place, spec)?;
    for offsets in writes(depth) {
        ours.daemon.snapshot("row")?;
        ours.client().write_at(&offsets)?;
    }
    ours.daemon.wait_idle()?;
    Ok(ours)
}

/// The storage daemon over a chain of overlays.
#[derive(Debug)]
struct Chain {
    depth: usize,
    // Hangs up before the daemon is killed.
    client: Client,
    daemon: StorageDaemon,
    // Removed after the daemon is killed.
    _files: Files,
}

impl Chain {
    fn make(place: &Place, depth: usize) -> Result<Self> {
        let files = place.directory(&format!("chain-{depth}"))?;
        place.file(&files.path().join(peers::BASE), DISK_BYTES)?;
        peers::make_chain(files.path(), DISK_BYTES, &writes(depth))?;
        let daemon = StorageDaemon::chain(files.path(), depth)?;
        let client = daemon.client(1)?;
        Ok(Self {
            depth,
            client,
            daemon,
            _files: files,
        })
    }
}

impl Contestant for Chain {
    fn name(&self) -> String {
        format!("QSD chain of {}", self.depth)
    }

    fn pid(&self) -> Option<u32> {
        Some(self.daemon.pid())
    }

    fn run(&mut self, job: &Job, seed: u64) -> Result<Turn> {
        Ok(Turn::from(&self.client.run(job, seed)?))
    }
}

/// The oldest and the newest snapshot read out in turns; nothing was written since the newest, so it is what the head is.
fn old_snapshot(bench: &mut Bench, depth: usize, deep: &mut Ours) -> Result<()> {
    bench.say("reading the oldest snapshot");
    deep.daemon.snapshot("row")?;
    let snapshots = deep.daemon.snapshots()?;
    let oldest = snapshots.first().context("the oldest")?["snapshot"].clone();
    let newest = snapshots.last().context("the newest")?["snapshot"].clone();
    let mut rates = [Vec::new(), Vec::new()];
    for _ in 0..bench.rounds {
        for (snapshot, rates) in [&oldest, &newest].into_iter().zip(&mut rates) {
            rates.push(
                DISK_BYTES as f64 / f64::from(1 << 20) / read_out(deep, snapshot)?.as_secs_f64(),
            );
        }
    }
    let [old, head] = rates;
    let workload = format!("reading out the oldest of {depth} snapshots, RAM");
    let goal = Some(Goal::RatioAtLeast(0.8));
    bench.report.compare(
        FIGURE,
        &workload,
        "MiB/s",
        &old,
        "vmshadow, the head",
        &head,
        goal,
    );
    bench.report.note(FIGURE, "an old snapshot is read by snapshot-read, sequentially; \"the head\" is a snapshot just taken, read the same way");
    Ok(())
}

/// The time in which a snapshot's content goes through a pipe.
fn read_out(ours: &mut Ours, snapshot: &Value) -> Result<Duration> {
    let control = ours.daemon.control();
    control.set_deadline(Duration::from_secs(60))?;
    let (from, to) = rustix::pipe::pipe()?;
    control.pass("pipe", to.as_fd())?;
    drop(to);
    let begin = Instant::now();
    let reader = thread::spawn(move || io::copy(&mut File::from(from), &mut io::sink()));
    control.execute(
        "snapshot-read",
        json!({"snapshot": snapshot, "fdname": "pipe"}),
    )?;
    let bytes = reader
        .join()
        .map_err(|_| anyhow!("the reader has panicked"))??;
    ensure!(bytes == DISK_BYTES, "{bytes} bytes were read out");
    Ok(begin.elapsed())
}
