//! `make bench`: every figure beside its peers, in one run; writes `target/bench/report.json`, the tables and the drawings.
//!
//! Started by make. The exit code says whether all of it ran, not whether the goals were reached: those are in the tables.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use rustix::fs::{FlockOperation, flock};
use vmshadow_tests::bench::cost::NoHalt;
use vmshadow_tests::bench::place::{self, Place};
use vmshadow_tests::bench::relay::Relay;
use vmshadow_tests::bench::report::{Line, Report};
use vmshadow_tests::bench::{Bench, FIGURES, plot, setup};
use vmshadow_tests::harness::image;

/// Bytes of the file system in memory; only what is written takes memory.
const RAM_BYTES: u64 = 7 << 30;

/// Measures vmshadow beside its peers.
#[derive(Debug, Parser)]
struct Args {
    /// Only this figure (may be repeated)
    #[arg(long, value_name = "N")]
    figure: Vec<u8>,
    /// Small and few rounds: shows that it runs, measures nothing
    #[arg(long)]
    quick: bool,
    /// Print the report instead of tables
    #[arg(long)]
    json: bool,
    /// Rounds of each workload and contestant
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// The daemon to measure [default: the static release build, built if needed]
    #[arg(long, value_name = "PATH")]
    vhost_blk: Option<PathBuf>,
    /// Where report, tables and drawings go [default: target/bench]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    place::enter_namespace()?;
    let output = args
        .output
        .clone()
        .unwrap_or_else(|| image::target().join("bench"));
    fs::create_dir_all(&output)?;
    let lock = File::create(image::target().join("bench.lock"))?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive)
        .context("another bench is running here")?;
    remove_leftovers(&image::target().join("bench"))?;
    let vhost_blk = match &args.vhost_blk {
        Some(path) => std::path::absolute(path)?,
        None => image::program("vhost-blk")?,
    };
    let awake = NoHalt::hold()
        .inspect_err(|error| eprintln!("bench: idle processors halt: {error:#}"))
        .ok();
    let mut bench = Bench {
        awake,
        quick: args.quick,
        rounds: if args.quick { 2 } else { args.rounds.max(1) },
        ram: Place::ram(RAM_BYTES)?,
        disk: Place::disk()?,
        vhost_blk,
        report: Report::default(),
        begin: Instant::now(),
    };
    let described = setup::describe(&bench)?;
    let mut text = setup::table(&described);
    if !args.json {
        print!("{text}");
    }
    let mut failed = Vec::new();
    for (number, title, run) in FIGURES {
        if !args.figure.is_empty() && !args.figure.contains(number) {
            continue;
        }
        bench.say(&format!("figure {number}: {title}"));
        if let Err(error) = run(&mut bench) {
            eprintln!("bench: figure {number} ended early: {error:#}");
            bench
                .report
                .note(*number, format!("ended early: {error:#}"));
            failed.push(number.to_string());
        }
        bench.disk.emptied()?;
        let most_bytes = bench.ram.emptied()?;
        bench.say(&format!("files took {} MiB of memory", most_bytes >> 20));
        draw_ratios(&mut bench.report, *number, title);
        let table = bench.report.table(*number, title);
        if !args.json {
            print!("{table}");
        }
        text += &table;
        // What there is stays, whatever happens to the rest.
        bench.report.write(&output)?;
    }
    let summary = bench.report.summary();
    text += &summary;
    fs::write(output.join("tables.md"), &text)?;
    fs::write(
        output.join("setup.json"),
        serde_json::to_string_pretty(&setup::json(&described))? + "\n",
    )?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&bench.report.json())?);
    } else {
        print!("{summary}");
        println!(
            "\n{} and {}",
            output.join("report.json").display(),
            output.join("tables.md").display()
        );
    }
    bench.say("done");
    if !failed.is_empty() {
        bail!(
            "these figures did not run to their end: {}",
            failed.join(", ")
        );
    }
    Ok(())
}

/// Removes the files of a run that was killed. Younger ones may belong to a test of the harness, which takes no lock.
fn remove_leftovers(directory: &Path) -> Result<()> {
    const OLD: Duration = Duration::from_secs(600);
    for entry in fs::read_dir(directory).into_iter().flatten() {
        let entry = entry?;
        let is_old = entry
            .metadata()?
            .modified()?
            .elapsed()
            .is_ok_and(|age| age > OLD);
        if is_old && entry.file_name().to_string_lossy().starts_with("files-") {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// Bars of all rates of a figure that have a peer. What is no disk but a bound stands in the table only.
fn draw_ratios(report: &mut Report, figure: u8, title: &str) {
    const BOUNDS: [&str; 2] = ["QSD null-co", Relay::NAME];
    let of_rates = |line: &&Line| {
        let is_bound = |peer: &(String, _)| BOUNDS.contains(&peer.0.as_str());
        line.figure == figure
            && line.unit == "IOPS"
            && line.ratio.is_some()
            && !line.peer.as_ref().is_some_and(is_bound)
    };
    let lines: Vec<&Line> = report.lines().iter().filter(of_rates).collect();
    if lines.is_empty() {
        return;
    }
    let svg = plot::ratio_bars(&format!("Figure {figure}: {title}"), &lines);
    report.plot(&format!("figure{figure}"), svg);
}
