//! What was compared with what, and where: the first thing a reader of the tables needs.
//!
//! Called by the command.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde_json::{Value, json};

use super::Bench;
use super::place;

/// Programs, options, machine and file systems, by name.
pub fn describe(bench: &Bench) -> Result<Vec<(&'static str, String)>> {
    let version = |program: &Path, argument: &str| -> String {
        let said = place::run(Command::new(program).arg(argument));
        let first = said
            .ok()
            .and_then(|text| text.lines().next().map(str::to_owned));
        first.unwrap_or_else(|| "not there".to_owned())
    };
    let of = |name: &str| version(Path::new(name), "--version");
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let processor = text("/proc/cpuinfo")
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map(|rest| rest.trim_start_matches([' ', '\t', ':']).to_owned());
    let cores = std::thread::available_parallelism()?;
    Ok(vec![
        ("vmshadow", version(&bench.vhost_blk, "--version") + ": vhost-blk serve, O_DIRECT, io_uring"),
        ("QSD", of("qemu-storage-daemon")),
        ("QSD raw", "driver=file,cache.direct=on,aio=io_uring, one queue, no iothread: it sleeps between requests, ours may poll for 32 us".to_owned()),
        ("QSD null-co", "no file behind it: what the client and the ring alone allow on this machine".to_owned()),
        ("QSD overlay", "fresh qcow2 over raw, clusters of 64 KiB; files as in QSD raw".to_owned()),
        ("QSD overlay l2ext", "the same with clusters of 128 KiB and extended_l2".to_owned()),
        ("QSD cbw", "copy-before-write filter over raw into a fresh qcow2, clusters of 64 KiB; does not sync the copy".to_owned()),
        ("fio", of("fio") + ": io_uring, O_DIRECT, on the file itself, no virtio"),
        ("relay", "two threads, a client and a backend that only moves the data: no virtqueue, no requests, no disk; the backend looks 32 us for single requests, an io_uring as ours beyond one".to_owned()),
        ("order relaxed", "--relaxed-order-for-measurement: copy-on-write that overwrites before its copy is durable, a figure only".to_owned()),
        ("client", "libblkio 0.5 (Rust), virtio-blk-vhost-user, closed loop, sleeps for interrupts; the same for all but fio".to_owned()),
        ("RAM", bench.ram.description.clone()),
        ("disk", bench.disk.description.clone()),
        ("kernel", text("/proc/sys/kernel/osrelease").trim().to_owned()),
        ("processor", format!("{cores} x {}", processor.unwrap_or_default())),
        ("idle processors", if bench.awake.is_some() {
            "look for work and do not halt (/dev/cpu_dma_latency 0): the wake-up of a halted virtual processor is longer than a request"
        } else { "halt as they like" }.to_owned()),
        ("load when begun", text("/proc/loadavg").trim().to_owned()),
        ("rounds", format!("{} of each workload and contestant, in turns; medians, quartiles as spread", bench.rounds)),
        ("costs", "CPU: /proc/PID/task/*/schedstat; bytes: the block device's stat after syncfs; calls: perf stat in a round of their own".to_owned()),
    ])
}

/// For people.
#[must_use]
pub fn table(setup: &[(&'static str, String)]) -> String {
    setup
        .iter()
        .map(|(name, text)| format!("{name:18} {text}\n"))
        .collect()
}

/// For programs.
#[must_use]
pub fn json(setup: &[(&'static str, String)]) -> Value {
    setup
        .iter()
        .map(|(name, text)| json!({ "name": name, "value": text }))
        .collect()
}
