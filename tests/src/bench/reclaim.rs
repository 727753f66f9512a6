//! Figure 8: deleting snapshots: how soon it returns, what the guest feels while space comes back, what metadata costs, and that the base is
//! a plain raw file at the end.
//!
//! Called by the command.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngCore, SeedableRng};
use serde_json::json;

use super::Bench;
use super::contestants::{Ours, OursSpec};
use super::job::{BLOCK_BYTES, Job, Op};
use super::place::Place;
use super::report::Goal;
use crate::harness::wait;

const FIGURE: u8 = 8;
/// Bytes of the disk.
const DISK_BYTES: u64 = 512 << 20;
/// Requests in flight of the guest meanwhile.
const GUEST_DEPTH: usize = 4;
/// Longest wait for the base to be plain.
const PLAIN: Duration = Duration::from_secs(180);
/// One round of the guest.
const ROUND: Duration = Duration::from_millis(500);

/// Measures the figure.
pub fn run(bench: &mut Bench) -> Result<()> {
    for place in [bench.ram.clone(), bench.disk.clone()] {
        for method in ["row", "cow"] {
            reclaim(bench, &place, method)?;
        }
    }
    Ok(())
}

fn reclaim(bench: &mut Bench, place: &Place, method: &'static str) -> Result<()> {
    bench.say(&format!(
        "writing behind snapshots, {method}, {}",
        place.name
    ));
    let spec = OursSpec::plain("reclaim", DISK_BYTES);
    let mut ours = Ours::start(bench, place, spec)?;
    let snapshots = bench.size(16, 4);
    let mut rng = SmallRng::seed_from_u64(8);
    for _ in 0..snapshots {
        ours.daemon.snapshot(method)?;
        // A sixteenth of the disk at random behind each.
        let offsets: Vec<u64> = (0..DISK_BYTES / BLOCK_BYTES / 16)
            .map(|_| rng.next_u64() % (DISK_BYTES / BLOCK_BYTES) * BLOCK_BYTES)
            .collect();
        ours.client().write_at(&offsets)?;
    }
    ours.daemon.wait_idle()?;
    // Closing writes all of the index.
    let used_bytes = ours.daemon.volume("disk")?["shadow-used-bytes"]
        .as_u64()
        .context("bytes in use")?;
    let mut ours = ours.restarted()?;
    let index_bytes = allocated_bytes(&ours.daemon.shadow_storage("disk"), "index")?;
    let workload = format!("{snapshots} snapshots, {method}, {}", place.name);
    let percent = index_bytes as f64 * 100.0 / used_bytes as f64;
    let goal = Some(Goal::AtMost(1.0));
    bench
        .report
        .value(FIGURE, &workload, "index, % of blocks", &[percent], goal);

    bench.say("the guest before, and while space comes back");
    let job = Job::random(Op::Write, GUEST_DEPTH, DISK_BYTES).limit(ROUND);
    ours.client().run(&job, 0)?;
    ours.daemon.wait_idle()?;
    let p99 = |run: &super::client::Run| run.latencies.value_at_quantile(0.99) as f64 / 1e3;
    let mut before = Vec::new();
    for seed in 0..bench.rounds as u64 {
        before.push(p99(&ours.client().run(&job, seed)?));
    }
    let mut all: Vec<_> = ours.daemon.snapshots()?;
    all.shuffle(&mut rng);
    let (mut returned, mut meanwhile) = (Vec::new(), Vec::new());
    let begin = Instant::now();
    let mut is_plain = false;
    while !is_plain {
        ensure!(
            begin.elapsed() < PLAIN,
            "the disk is not plain after {PLAIN:?}"
        );
        // Two between the rounds, then the rest comes back.
        for one in all.split_off(all.len().saturating_sub(2)) {
            let delete = json!({"snapshot": one["snapshot"]});
            let begin = Instant::now();
            ours.daemon.control().execute("snapshot-delete", delete)?;
            returned.push(begin.elapsed().as_secs_f64() * 1e3);
        }
        let seed = 100 + meanwhile.len() as u64;
        meanwhile.push(p99(&ours.client().run(&job, seed)?));
        is_plain = ours.daemon.volume("disk")?["plain"] == true;
        if meanwhile.len() >= bench.size(60, 10) && all.is_empty() {
            // Enough of the guest: it rests, and the rest is done at full speed.
            wait::until("a plain disk", PLAIN, || {
                Ok((ours.daemon.volume("disk")?["plain"] == true).then_some(()))
            })?;
            is_plain = true;
        }
    }
    let took = begin.elapsed().as_secs_f64();
    let report = &mut bench.report;
    report.value(FIGURE, &workload, "delete returns ms", &returned, None);
    report.compare(
        FIGURE,
        &workload,
        "guest p99 us",
        &meanwhile,
        "before the deletes",
        &before,
        Some(Goal::RatioAtMost(2.0)),
    );
    report.value(FIGURE, &workload, "s until plain", &[took], None);
    plain_is_true(bench, ours, &workload)
}

/// Bytes that the file takes on its file system.
fn allocated_bytes(directory: &Path, prefix: &str) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            bytes += entry.metadata()?.blocks() * 512;
        }
    }
    Ok(bytes)
}

/// What is written now, and all that was, is in the base when the daemon has ended.
fn plain_is_true(bench: &mut Bench, mut ours: Ours, workload: &str) -> Result<()> {
    let offsets: Vec<u64> = (0..64).map(|number| number * (DISK_BYTES / 64)).collect();
    ours.client().write_at(&offsets)?;
    let base = ours.base().to_owned();
    let (mut daemon, _files) = ours.hung_up();
    daemon.stop()?;
    // The client writes its memory's slots, which are noise; a hole or an old block would differ from any of them.
    let file = File::open(base)?;
    let mut slots: Vec<Vec<u8>> = Vec::new();
    for offset in offsets {
        let mut block = vec![0; usize::try_from(BLOCK_BYTES)?];
        file.read_exact_at(&mut block, offset)?;
        if !slots.contains(&block) {
            slots.push(block);
        }
    }
    let is_so = slots.len() <= 32;
    bench.report.value(
        FIGURE,
        workload,
        "base plain and current (1 = yes)",
        &[f64::from(u8::from(is_so))],
        Some(Goal::AtLeast(1.0)),
    );
    Ok(())
}
