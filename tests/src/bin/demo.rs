//! `make demo`: the main job on a real machine, narrated for a person, and `target/demo/report.json` for a program.
//!
//! Started by make. It does what a user would do, with the programs a user has, and believes none of them: what a set is
//! worth is decided by a second machine that boots on the copies.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vmshadow_tests::harness::bridge::Answer;
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::image;
use vmshadow_tests::harness::site::{Site, Taken};

fn main() -> Result<()> {
    let begin = Instant::now();
    say("vmshadow: an application-consistent copy of a running machine's disks");
    let accelerator = image::accelerator()?.name();
    say(&format!(
        "Booting Linux under stock QEMU ({accelerator}); vhost-blk serves an ext4 and an XFS disk"
    ));
    let site = Site::start(
        "demo",
        &[("data", FileSystem::Ext4), ("logs", FileSystem::Xfs)],
    )?;
    let boot_ms = site.vm.boot_time().as_millis();
    line(&format!("ready after {boot_ms} ms"));

    say(
        "A database is busy on each disk: SQLite, WAL, synchronous=FULL, every commit acknowledged to the host",
    );
    let load = site.load()?;
    site.sqlite_writer()?;
    line(&format!(
        "{} transactions acknowledged so far",
        load.acks().len()
    ));

    let mut sets = Vec::new();
    for (method, words) in [("row", "redirect-on-write"), ("cow", "copy-on-write")] {
        say(&format!(
            "vmshadow create --method {method}   ({words}, both disks at one instant)"
        ));
        let set = site.create(&["--method", method])?;
        narrate(&set.answer)?;
        sets.push((method, set));
        load.wait_for_more(100)?;
        line("the load goes on, and writes over blocks of the copy");
    }

    say("vmshadow list");
    println!("{}", site.bridge.text(&["list"])?);

    say("Reading the copies back with `vmshadow read`, while the machine is still running");
    let mut files = Vec::new();
    for (method, set) in &sets {
        for file in site.read_back(&set.answer, method)? {
            line(&format!(
                "{} ({} MiB)",
                file.display(),
                fs::metadata(&file)?.len() >> 20
            ));
            files.push(file);
        }
    }
    let acks = load.stop(&site.vm)?;

    say(
        "Booting a second machine on the copies (QEMU's own block layer, nothing of vmshadow in the path)",
    );
    let found = site.judge(&files)?;
    let mut report_sets = Vec::new();
    for ((method, set), found) in sets.iter().zip(found.chunks(site.disks.len())) {
        site.compare(found, &acks, &set.window)?;
        let mut verified = Vec::new();
        for (number, (found, disk)) in found.iter().zip(&site.disks).enumerate() {
            let total = acks.iter().filter(|ack| ack.database == number).count();
            line(&format!(
                "{method} {}: integrity_check {}, transactions 1 to {} without a gap, of {total} acknowledged in all",
                disk.name, found.integrity, found.last
            ));
            verified.push(json!({
                "disk": disk.name,
                "file-system": disk.file_system.name(),
                "last-transaction": found.last,
                "how": [
                    "a second machine booted on the copy and mounted it",
                    "sqlite3 PRAGMA integrity_check: ok; no gap in the transactions",
                    "every transaction acknowledged before the request is there, none begun after the answer is",
                    "the copy ends at the stall that the freeze caused in the acknowledgements",
                    "the databases of both disks are of one instant",
                    match disk.file_system {
                        FileSystem::Ext4 => "e2fsck -fn before and after: clean",
                        FileSystem::Xfs => "xfs_repair -n after: clean",
                    },
                ],
            }));
        }
        report_sets.push(report_of(method, set, verified)?);
    }

    say("A writer that does not agree");
    site.script_writer(
        "accounting",
        &[("freeze", "echo 'month end is running' >&2; exit 1")],
    )?;
    let load = site.load()?;
    let refused = site.try_create(&[])?;
    site.was_refused(&refused, &["WRITER_VETO"])?;
    line(&format!(
        "exit code {}: {}",
        refused.code,
        text(&refused, "/reason/message")?
    ));
    load.wait_for_more(20)?;
    line("nothing of the set is left, the machine goes on");
    ensure!(
        site.daemon.snapshots()?.len() == files.len(),
        "the refused set left a snapshot"
    );

    let report = json!({
        "guest": {"accelerator": accelerator, "boot-to-ready-ms": boot_ms},
        "sets": report_sets,
        "refused": [{
            "exit-code": refused.code,
            "level-asked": refused.at("/level-asked")?,
            "reason": refused.at("/reason")?,
        }],
        "took-ms": begin.elapsed().as_millis(),
    });
    let directory = image::target().join("demo");
    fs::create_dir_all(&directory)?;
    let path = directory.join("report.json");
    fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")?;
    say(&format!(
        "All of it holds. {} s; the figures are in {}",
        begin.elapsed().as_secs(),
        path.display()
    ));
    Ok(())
}

fn say(sentence: &str) {
    println!("\n== {sentence}");
}

fn line(sentence: &str) {
    println!("   {sentence}");
}

fn text(answer: &Answer, pointer: &str) -> Result<String> {
    let value = answer.at(pointer)?;
    Ok(value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned))
}

fn narrate(answer: &Answer) -> Result<()> {
    line(&format!(
        "set {}: {} consistent",
        text(answer, "/set")?,
        text(answer, "/level-reached")?
    ));
    for witness in ["filesystems", "writers", "time", "host"] {
        line(&format!(
            "witness {witness:12} {}",
            text(answer, &format!("/witnesses/{witness}/value"))?
        ));
        let evidence = answer.at(&format!("/witnesses/{witness}/evidence"))?;
        for word in evidence
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
        {
            line(&format!("        {word}"));
        }
    }
    let steps = answer.at("/timings/steps")?.as_array().context("steps")?;
    for step in steps {
        let name = step["step"].as_str().unwrap_or_default();
        line(&format!(
            "step {name:18} {:9.1} ms",
            step["took-ms"].as_f64().unwrap_or_default()
        ));
    }
    let freeze_to_thaw = answer
        .at("/timings/freeze-to-thaw-ms")?
        .as_f64()
        .unwrap_or_default();
    line(&format!("freeze to thaw          {freeze_to_thaw:9.1} ms"));
    let hold_us = answer
        .at("/timings/storage/0/hold-us")?
        .as_f64()
        .unwrap_or_default();
    line(&format!(
        "hold at the host        {:9.1} ms",
        hold_us / 1000.0
    ));
    Ok(())
}

fn report_of(method: &str, set: &Taken, verified: Vec<Value>) -> Result<Value> {
    Ok(json!({
        "set": set.answer.at("/set")?,
        "method": method,
        "level-asked": set.answer.at("/level-asked")?,
        "level-reached": set.answer.at("/level-reached")?,
        "witnesses": set.answer.at("/witnesses")?,
        "timings": set.answer.at("/timings")?,
        "verified": verified,
    }))
}
