//! Figure 7: resident memory and the time from a start after kill -9 to the first I/O, on large disks with many redirected blocks.
//!
//! Called by the command. `store-fill`, which lies beside this program, redirects the blocks as the daemon would but moves no data: base and
//! log are sparse files on tmpfs, which takes files of any length. What is measured goes through the daemon: reads and writes
//! at random all over the disk, and the full journal that a start has to replay.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::Bench;
use super::cost;
use super::daemon::{Daemon, DaemonSpec, DiskSpec};
use super::job::{BLOCK_BYTES, Job, Op};
use super::report::Goal;

const FIGURE: u8 = 7;
const MIB: f64 = (1 << 20) as f64;
/// Requests in flight of the load.
const DEPTH: usize = 32;
/// Writes before each kill: a checkpoint takes the first 32,768 records, and the next one is almost due.
const BURST_BLOCKS: u64 = 65_000;
/// Most starts, for the sake of time.
const STARTS_MAX: usize = 5;

/// A disk to be made.
struct Large {
    name: &'static str,
    bytes: u64,
    blocks: u64,
}

/// Measures the figure.
pub fn run(bench: &mut Bench) -> Result<()> {
    let tebibyte = 1_u64 << 40;
    // One percent of the smaller; on the larger as many, for the sake of time.
    let blocks = bench.size(tebibyte / 100 / BLOCK_BYTES, 1 << 16);
    let disk = |name, bytes| Large {
        name,
        bytes,
        blocks,
    };
    let disks = [disk("1 TiB", tebibyte), disk("64 TiB", 64 * tebibyte)];
    let snapshots = bench.size(512, 8);
    let mut filling = Vec::new();
    for disk in &disks {
        bench.say(&format!(
            "{}: {} blocks behind {snapshots} snapshots",
            disk.name, disk.blocks
        ));
        let directory = tempfile::Builder::new()
            .prefix("vmshadow-bench-large-")
            .tempdir_in("/dev/shm")?;
        filling.push((Fill::start(disk, snapshots, directory.path())?, directory));
    }
    for (disk, (fill, directory)) in disks.iter().zip(filling) {
        fill.done()?;
        measure(bench, disk, snapshots, directory.path())?;
    }
    bench.report.note(FIGURE, "redirected by store-fill, without data; resident memory has that of the guest which the daemon has touched in it, and is bounded whatever the disk: by the records in memory (65,536, at four times as many writes wait), the index pages kept (16 MiB) and 16 bytes for each of at most 131,072 pages of the index");
    bench.report.note(FIGURE, "a start: kill -9 right after 65,000 writes at random behind a new snapshot, when the journal is as full as it becomes before the next checkpoint; then exec, replay, control socket, a new front end, and its first read");
    Ok(())
}

/// A running `store-fill`, killed on drop.
struct Fill(Child);

impl Fill {
    fn start(disk: &Large, snapshots: u64, directory: &Path) -> Result<Self> {
        let program = std::env::current_exe()?.with_file_name("store-fill");
        let child = Command::new(&program)
            .arg(directory)
            .arg("fill")
            .args(["--gib", &(disk.bytes >> 30).to_string()])
            .args(["--blocks", &disk.blocks.to_string()])
            .args(["--snapshots", &snapshots.to_string()])
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?;
        Ok(Self(child))
    }

    fn done(mut self) -> Result<()> {
        let status = self.0.wait()?;
        ensure!(status.success(), "store-fill: {status}");
        Ok(())
    }
}

impl Drop for Fill {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait()
            && let Err(error) = self.0.kill().and_then(|()| self.0.wait())
        {
            eprintln!("bench: cannot end store-fill: {error}");
        }
    }
}

/// The most memory that a process had while something ran, in MiB.
fn most_resident<T>(pid: u32, run: impl FnOnce() -> Result<T>) -> Result<f64> {
    const LOOK: Duration = Duration::from_millis(20);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let watch = scope.spawn(|| -> Result<u64> {
            let mut most = 0;
            loop {
                let is_over = over.load(Ordering::SeqCst);
                most = most.max(cost::resident_bytes(pid)?);
                if is_over {
                    return Ok(most);
                }
                thread::sleep(LOOK);
            }
        });
        let ran = run();
        over.store(true, Ordering::SeqCst);
        let most = watch.join().map_err(|_| anyhow!("the watch panicked"))?;
        ran.and(Ok(most? as f64 / MIB))
    })
}

/// Records that the daemon's last start had to read.
fn replayed(daemon: &Daemon) -> Result<f64> {
    let said = daemon.said();
    let (_, rest) = said
        .split_once("replayed_records: ")
        .with_context(|| format!("no report of a start in {said:?}"))?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next();
    Ok(digits.unwrap_or_default().parse()?)
}

fn measure(bench: &mut Bench, disk: &Large, snapshots: u64, directory: &Path) -> Result<()> {
    bench.say(&format!("{} under random load", disk.name));
    fs::rename(directory.join("shadow"), directory.join("disk.shadow"))?;
    let mut daemon = Daemon::start(&DaemonSpec {
        program: &bench.vhost_blk,
        directory,
        disks: vec![DiskSpec {
            name: "disk".to_owned(),
            base: directory.join("base"),
        }],
        arguments: &[],
    })?;
    let mut client = daemon.client("disk", 1)?;
    let limit = bench.size(Duration::from_secs(2), Duration::from_millis(500));
    daemon.snapshot("row")?;
    let under_load = most_resident(daemon.pid(), || {
        for (seed, op) in [(1, Op::Read), (2, Op::Write), (3, Op::Read)] {
            client.run(&Job::random(op, DEPTH, disk.bytes).limit(limit), seed)?;
        }
        daemon.wait_idle()
    })?;
    bench.say(&format!("{}: starts after kill -9", disk.name));
    let mut rng = SmallRng::seed_from_u64(7);
    let (mut starts, mut records, mut after) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..bench.rounds.min(STARTS_MAX) as u64 {
        daemon.snapshot("row")?;
        let offsets: Vec<u64> = (0..bench.size(BURST_BLOCKS, 1000))
            .map(|_| rng.random_range(0..disk.bytes / BLOCK_BYTES) * BLOCK_BYTES)
            .collect();
        client.write_at(&offsets)?;
        daemon.kill()?;
        drop(client);
        let begin = Instant::now();
        daemon.restart()?;
        client = daemon.client("disk", 1)?;
        let first = Job::random(Op::Read, 1, disk.bytes).limit(Duration::ZERO);
        client.run(&first, round)?;
        starts.push(begin.elapsed().as_secs_f64() * 1e3);
        records.push(replayed(&daemon)?);
        after.push(most_resident(daemon.pid(), || daemon.wait_idle())?);
    }
    let percent = (disk.blocks * BLOCK_BYTES) as f64 * 100.0 / disk.bytes as f64;
    let workload = format!(
        "{}, {} blocks ({percent:.2} %) redirected at random, {snapshots} snapshots, tmpfs",
        disk.name, disk.blocks
    );
    let report = &mut bench.report;
    let memory = Some(Goal::AtMost(64.0));
    let unit = "most MiB resident under random load";
    report.value(FIGURE, &workload, unit, &[under_load], memory);
    let unit = "most MiB resident after a start";
    report.value(FIGURE, &workload, unit, &after, memory);
    let unit = "ms from start after kill -9 to first read";
    report.value(FIGURE, &workload, unit, &starts, Some(Goal::AtMost(200.0)));
    let longest = starts.iter().copied().fold(0.0, f64::max);
    report.value(
        FIGURE,
        &workload,
        "the longest of them, ms",
        &[longest],
        None,
    );
    report.value(FIGURE, &workload, "records replayed by it", &records, None);
    Ok(())
}
