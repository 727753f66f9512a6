//! Figure 7: resident memory and the time from a start after kill -9 to the first I/O, on large sparse disks.
//!
//! Called by the command. The disks are files on tmpfs, which takes files of any length. What is redirected is really written, so its amount is
//! bounded by the machine's memory; the workload's name says how much it was.

use std::fs::File;
use std::time::Instant;

use anyhow::Result;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::Bench;
use super::cost;
use super::daemon::{Daemon, DaemonSpec, DiskSpec};
use super::job::{BLOCK_BYTES, Job, Op};
use super::report::Goal;

const FIGURE: u8 = 7;
const MIB: f64 = (1 << 20) as f64;

/// Measures the figure.
pub fn run(bench: &mut Bench) -> Result<()> {
    let blocks = bench.size(1 << 18, 1 << 12);
    for (bytes, name) in [(1_u64 << 40, "1 TiB"), (64 << 40, "64 TiB")] {
        large(bench, bytes, name, blocks)?;
    }
    bench.report.note(FIGURE, "the goals are for 1 % of 1 TiB, 2.7 million blocks: ten times what is written here, since it has to fit into memory as well");
    Ok(())
}

fn large(bench: &mut Bench, bytes: u64, name: &str, blocks: u64) -> Result<()> {
    let snapshots = bench.size(512, 8);
    bench.say(&format!(
        "{name}: {blocks} blocks behind {snapshots} snapshots"
    ));
    let directory = tempfile::Builder::new()
        .prefix("vmshadow-bench-large-")
        .tempdir_in("/dev/shm")?;
    let base = directory.path().join("large.raw");
    File::create(&base)?.set_len(bytes)?;
    let mut daemon = Daemon::start(&DaemonSpec {
        program: &bench.vhost_blk,
        directory: directory.path(),
        disks: vec![DiskSpec {
            name: "disk".to_owned(),
            base,
        }],
        arguments: &[],
    })?;
    let mut client = daemon.client("disk", 1)?;
    let mut rng = SmallRng::seed_from_u64(7);
    for _ in 0..snapshots {
        daemon.snapshot("row")?;
        let offsets: Vec<u64> = (0..blocks / snapshots)
            .map(|_| rng.random_range(0..bytes / BLOCK_BYTES) * BLOCK_BYTES)
            .collect();
        client.write_at(&offsets)?;
    }
    daemon.wait_idle()?;
    let resident = cost::resident_bytes(daemon.pid())? as f64 / MIB;
    let mut starts = Vec::new();
    let mut after = Vec::new();
    for round in 0..bench.rounds as u64 {
        // Unmerged records are part of what a start has to read.
        let offsets: Vec<u64> = (0..1000)
            .map(|_| rng.random_range(0..bytes / BLOCK_BYTES) * BLOCK_BYTES)
            .collect();
        client.write_at(&offsets)?;
        daemon.kill()?;
        drop(client);
        let begin = Instant::now();
        daemon.restart()?;
        client = daemon.client("disk", 1)?;
        client.run(
            &Job::random(Op::Read, 1, bytes).limit(std::time::Duration::ZERO),
            round,
        )?;
        starts.push(begin.elapsed().as_secs_f64() * 1e3);
        daemon.wait_idle()?;
        after.push(cost::resident_bytes(daemon.pid())? as f64 / MIB);
    }
    let percent = (blocks * BLOCK_BYTES) as f64 * 100.0 / bytes as f64;
    let workload =
        format!("{name} sparse, {percent:.4} % redirected at random, {snapshots} snapshots, tmpfs");
    let report = &mut bench.report;
    let goal = Some(Goal::AtMost(64.0));
    report.value(FIGURE, &workload, "resident MiB", &[resident], goal);
    report.value(
        FIGURE,
        &workload,
        "resident MiB after a start",
        &after,
        goal,
    );
    let goal = Some(Goal::AtMost(200.0));
    report.value(
        FIGURE,
        &workload,
        "ms from start to first read",
        &starts,
        goal,
    );
    Ok(())
}
