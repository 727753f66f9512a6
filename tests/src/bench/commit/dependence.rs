//! What a commit depends on, or does not: the size of the disk, the snapshots there are, the volumes of its set.
//!
//! Called by `commit`.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow};
use serde_json::json;

use super::{FIGURE, commit, load, share};
use crate::bench::Bench;
use crate::bench::daemon::{Daemon, DaemonSpec, DiskSpec};
use crate::bench::job::{Job, Op};
use crate::bench::plot::{self, Series};
use crate::bench::report::Goal;

/// A directory on tmpfs, which takes files of any length.
fn on_tmpfs() -> Result<tempfile::TempDir> {
    Ok(tempfile::Builder::new()
        .prefix("vmshadow-bench-sparse-")
        .tempdir_in("/dev/shm")?)
}

/// A daemon with sparse disks of so many bytes each.
fn sparse(bench: &Bench, directory: &Path, disks: usize, bytes: u64) -> Result<Daemon> {
    let mut all = Vec::new();
    for number in 0..disks {
        let base = directory.join(format!("{number}.raw"));
        File::create(&base)?.set_len(bytes)?;
        all.push(DiskSpec {
            name: format!("d{number}"),
            base,
        });
    }
    Daemon::start(&DaemonSpec {
        program: &bench.vhost_blk,
        directory,
        disks: all,
        arguments: &[],
    })
}

fn names(disks: usize) -> Vec<String> {
    (0..disks).map(|number| format!("d{number}")).collect()
}

/// A daemon with its files, which are removed after it is killed.
type Served = (Daemon, tempfile::TempDir);

/// One with a single sparse disk of so many bytes.
fn served(bench: &Bench, bytes: u64) -> Result<Served> {
    let directory = on_tmpfs()?;
    Ok((sparse(bench, directory.path(), 1, bytes)?, directory))
}

/// Commits of all daemons in turns; the medians of each turn.
fn in_turns(bench: &Bench, all: &mut [Served]) -> Result<Vec<Vec<f64>>> {
    let mut medians = vec![Vec::new(); all.len()];
    let volumes = names(1);
    for _ in 0..bench.rounds {
        for ((daemon, _), medians) in all.iter_mut().zip(&mut medians) {
            let (mut took, mut sets) = (Vec::new(), Vec::new());
            for _ in 0..bench.size(25, 3) {
                let (set, one) = commit(daemon, &volumes)?;
                took.push(one.answered_us);
                sets.push(set);
            }
            for set in sets {
                daemon
                    .control()
                    .execute("snapshot-set-delete", json!({"set": set}))?;
            }
            medians.extend(share(&took, 0.5));
        }
    }
    Ok(medians)
}

/// A curve through the medians.
fn draw(bench: &mut Bench, what: &str, at: &[f64], medians: &[Vec<f64>]) {
    let of = |one: &Vec<f64>| share(one, 0.5).first().copied();
    let points = at.iter().zip(medians);
    let series = Series {
        name: "vmshadow".to_owned(),
        points: points
            .filter_map(|(at, one)| Some((*at, of(one)?)))
            .collect(),
    };
    let title = format!("one commit over {what}");
    let svg = plot::curves(&title, what, "us", &[series]);
    let name = what.split(' ').next().unwrap_or_default();
    bench.report.plot(&format!("commit-{name}"), svg);
}

pub(super) fn by_size(bench: &mut Bench) -> Result<()> {
    bench.say("commits on 1 GiB to 64 TiB");
    let sizes_gib = [1, 64, 4096, 65_536];
    let mut all = Vec::new();
    for gib in sizes_gib {
        all.push(served(bench, gib << 30)?);
    }
    let medians = in_turns(bench, &mut all)?;
    if let [small, .., large] = medians.as_slice() {
        bench.report.compare(
            FIGURE,
            "commit on 64 TiB sparse, tmpfs",
            "median us",
            large,
            "vmshadow, 1 GiB",
            small,
            Some(Goal::RatioAtMost(1.25)),
        );
    }
    draw(
        bench,
        "size of the disk, GiB",
        &sizes_gib.map(|gib| gib as f64),
        &medians,
    );
    Ok(())
}

pub(super) fn by_snapshots(bench: &mut Bench) -> Result<()> {
    let wanted = bench.size([1, 100, 1000, 10_000], [1, 10, 20, 50]);
    let mut all = Vec::new();
    for wanted in wanted {
        bench.say(&format!("making {wanted} snapshots"));
        let mut one = served(bench, 1 << 30)?;
        for _ in 0..wanted {
            commit(&mut one.0, &names(1))?;
        }
        all.push(one);
    }
    let medians = in_turns(bench, &mut all)?;
    if let ([few, .., many], [.., made]) = (medians.as_slice(), wanted.as_slice()) {
        bench.report.compare(
            FIGURE,
            &format!("commit with {made} snapshots, tmpfs"),
            "median us",
            many,
            "vmshadow, 1 snapshot",
            few,
            Some(Goal::RatioAtMost(1.25)),
        );
    }
    draw(
        bench,
        "snapshots there are",
        &wanted.map(f64::from),
        &medians,
    );
    Ok(())
}

pub(super) fn many_volumes(bench: &mut Bench) -> Result<()> {
    const VOLUMES: usize = 64;
    bench.say("sets of 64 volumes");
    let place = bench.ram.clone();
    let files = place.directory("many")?;
    let mut daemon = sparse(bench, files.path(), VOLUMES, 16 << 20)?;
    let mut clients = Vec::new();
    for name in names(VOLUMES).iter().step_by(VOLUMES / 4) {
        clients.push(daemon.client(name, 1)?);
    }
    let job = Job::random(Op::Write, 1, 16 << 20);
    let over = AtomicBool::new(false);
    let mut taken = Vec::new();
    thread::scope(|scope| {
        let loads: Vec<_> = clients
            .iter_mut()
            .map(|client| scope.spawn(|| load(client, &job, 0, &over)))
            .collect();
        let took = (0..bench.size(40, 3)).try_for_each(|_| -> Result<()> {
            let (set, one) = commit(&mut daemon, &names(VOLUMES))?;
            taken.push(one);
            let delete = json!({"set": set});
            daemon.control().execute("snapshot-set-delete", delete)?;
            Ok(())
        });
        over.store(true, Ordering::SeqCst);
        for load in loads {
            load.join().map_err(|_| anyhow!("a load has panicked"))??;
        }
        took
    })
    .with_context(|| daemon.said())?;
    let answered: Vec<f64> = taken.iter().map(|one| one.answered_us / 1000.0).collect();
    let held: Vec<f64> = taken.iter().map(|one| one.held_us / 1000.0).collect();
    let workload = "one set of 64 volumes, random write QD1 on 4 of them, RAM";
    let goal = Some(Goal::AtMost(20.0));
    let report = &mut bench.report;
    report.value(FIGURE, workload, "commit ms", &answered, goal);
    report.value(
        FIGURE,
        workload,
        "commit p99 ms",
        &share(&answered, 0.99),
        None,
    );
    report.value(FIGURE, workload, "writes held ms", &held, None);
    Ok(())
}
