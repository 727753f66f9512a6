//! `make window-figures`: how long the window is, step by step, over many sets under load.
//!
//! Started by make; writes `target/bench/window-figures.json` and prints a table. Times are those of the set documents,
//! which the host, the guest and the daemon each measured by their own clock, and the wall clock around `vmshadow`.

use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::figures::Figures;
use vmshadow_tests::harness::image;
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::vm::VmBuilder;

const BOOTS: usize = 10;
const SETS: usize = 50;

fn main() -> Result<()> {
    let mut figures = Figures::default();
    for _ in 0..BOOTS {
        let vm = VmBuilder::new("boot").boot()?;
        figures.add("boot to ready", vm.boot_time().as_secs_f64() * 1e3);
    }
    let site = Site::start("figures", &[("a", FileSystem::Ext4)])?;
    let load = site.load()?;
    site.sqlite_writer()?;
    let mut refused = 0;
    for number in 0..SETS {
        let method = if number % 2 == 0 { "row" } else { "cow" };
        let set = match site.create(&["--method", method]) {
            Ok(taken) => taken.answer,
            Err(error) => {
                eprintln!("set {number} was refused: {error:#}");
                refused += 1;
                continue;
            }
        };
        if number % 10 == 0 {
            eprintln!("set {number} of {SETS}");
        }
        figures.add("vmshadow create, wall clock", set.took.as_secs_f64() * 1e3);
        figures.add(
            "freeze to thaw",
            number_at(set.at("/timings/freeze-to-thaw-ms")?)?,
        );
        figures.add(
            "hold, guest's clock",
            number_at(set.at("/timings/guest/hold-ms")?)?,
        );
        for (name, field) in [
            ("hold", "hold-us"),
            ("drain", "drain-us"),
            ("record", "record-us"),
        ] {
            let value = number_at(set.at(&format!("/timings/storage/0/{field}"))?)?;
            figures.add(&format!("{name} at the host, {method}"), value / 1e3);
        }
        for step in set.at("/timings/steps")?.as_array().context("steps")? {
            let name = step["step"].as_str().context("step")?;
            figures.add(&format!("step {name}"), number_at(&step["took-ms"])?);
        }
        load.wait_for_more(10)?;
    }
    print!("{}", figures.table());
    println!("{SETS} sets, {refused} refused");
    let directory = image::target().join("bench");
    fs::create_dir_all(&directory)?;
    let summaries: serde_json::Map<String, Value> = figures
        .summaries()
        .into_iter()
        .map(|(name, summary)| Ok((name, serde_json::to_value(summary)?)))
        .collect::<Result<_>>()?;
    let report = json!({
        "accelerator": image::accelerator()?.name(),
        "sets": SETS,
        "refused": refused,
        "unit": "ms",
        "figures": summaries,
    });
    let path = directory.join("window-figures.json");
    fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")?;
    println!("{}", path.display());
    Ok(())
}

fn number_at(value: &Value) -> Result<f64> {
    value
        .as_f64()
        .with_context(|| format!("not a number: {value}"))
}
