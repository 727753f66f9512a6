//! fio with io_uring on the plain file: what the file itself gives, without virtio.
//!
//! Called by the figures. fio is started anew for each round; its own start is not in the time it reports.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::job::{Job, Op, Pattern};
use super::place;

/// What fio reports of a round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FioRun {
    /// Requests that ended.
    pub ios: u64,
    /// Time.
    pub elapsed: Duration,
    /// User and system time of its job.
    pub processor: Duration,
    /// Median latency, microseconds.
    pub latency_us: f64,
    /// 99th percentile of the latency, microseconds.
    pub latency_p99_us: f64,
}

/// Runs a job of one queue on a file.
pub fn run(file: &Path, job: &Job, seed: u64) -> Result<FioRun> {
    let (random, area_bytes) = match job.pattern {
        Pattern::Random { area_bytes } => (true, area_bytes),
        Pattern::Sequential { area_bytes } => (false, area_bytes),
        Pattern::Once { .. } | Pattern::Pass { .. } => bail!("fio has no job like {}", job.name),
    };
    let mode = match (job.op, random) {
        (Op::Read, true) => "randread",
        (Op::Write, true) => "randwrite",
        (Op::Read, false) => "read",
        (Op::Write, false) => "write",
    };
    let mut command = Command::new("fio");
    command.args([
        "--name=bench",
        "--direct=1",
        "--ioengine=io_uring",
        "--time_based",
        "--norandommap",
    ]);
    command.args(["--output-format=json", "--thread=0", "--group_reporting"]);
    command.arg(format!("--filename={}", file.display()));
    command.arg(format!("--rw={mode}"));
    command.arg(format!("--bs={}", job.block_bytes));
    command.arg(format!("--size={area_bytes}"));
    command.arg(format!("--iodepth={}", job.depth));
    command.arg(format!("--numjobs={}", job.queues));
    command.arg(format!("--runtime={}ms", job.limit.as_millis()));
    command.arg(format!("--randseed={seed}"));
    if let Some(every) = job.flush_every {
        command.arg(format!("--fdatasync={every}"));
    }
    let text = place::run(&mut command)?;
    // Warnings may stand before the report.
    let begin = text.find('{').context("fio's report")?;
    let report: Value = serde_json::from_str(text.get(begin..).unwrap_or_default())?;
    parse(&report, job.op).with_context(|| format!("fio's report: {report}"))
}

fn parse(report: &Value, op: Op) -> Option<FioRun> {
    let job = report.pointer("/jobs/0")?;
    let side = job.get(match op {
        Op::Read => "read",
        Op::Write => "write",
    })?;
    let ios = side["total_ios"].as_u64()?;
    let elapsed =
        Duration::from_secs_f64(ios as f64 / side["iops"].as_f64().filter(|iops| *iops > 0.0)?);
    let system = elapsed.mul_f64(job["sys_cpu"].as_f64()? / 100.0);
    let user = elapsed.mul_f64(job["usr_cpu"].as_f64()? / 100.0);
    let percentile = |name: &str| Some(side["clat_ns"]["percentile"][name].as_f64()? / 1e3);
    Some(FioRun {
        ios,
        elapsed,
        processor: user + system,
        latency_us: percentile("50.000000")?,
        latency_p99_us: percentile("99.000000")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_report_of_fio_is_understood() {
        let report = json!({"jobs": [{"usr_cpu": 10.0, "sys_cpu": 30.0, "write": {
            "total_ios": 5000, "iops": 10000.0,
            "clat_ns": {"percentile": {"50.000000": 90000, "99.000000": 400000}}}}]});
        let run = parse(&report, Op::Write).expect("a whole report");
        assert_eq!(run.ios, 5000);
        assert_eq!(run.elapsed, Duration::from_millis(500));
        assert_eq!(run.processor, Duration::from_millis(200));
        assert_eq!((run.latency_us, run.latency_p99_us), (90.0, 400.0));
        assert_eq!(parse(&report, Op::Read), None);
    }
}
