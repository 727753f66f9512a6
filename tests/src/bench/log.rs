//! Figure 5: a database's log after a snapshot: sequential 4 KiB writes, each followed by a flush.
//!
//! Called by the command. The first pass over the log's area redirects every block, the second finds them redirected: sync calls
//! per flush in both, and the rate.

use std::time::Duration;

use anyhow::Result;

use super::Bench;
use super::contestants::{Arrangement, Ours, OursSpec, Peer};
use super::job::{Job, Op, Pattern};
use super::peers::Overlay;
use super::place::Place;
use super::report::{Goal, Quantity};
use super::rounds::interleaved;

const FIGURE: u8 = 5;

/// Measures the figure.
pub fn run(bench: &mut Bench) -> Result<()> {
    for place in [bench.ram.clone(), bench.disk.clone()] {
        passes(bench, &place)?;
    }
    Ok(())
}

fn passes(bench: &mut Bench, place: &Place) -> Result<()> {
    let size_bytes = bench.size(256 << 20, 64 << 20);
    let area_bytes = bench.size(8 << 20, 1 << 20);
    let spec = OursSpec::plain("vmshadow", size_bytes);
    let mut ours = Ours::start(bench, place, spec)?;
    let mut raw = Peer::start(place, Arrangement::Raw, size_bytes, 1)?;
    let mut overlay = Peer::start(
        place,
        Arrangement::Overlay(Overlay::Clusters64K),
        size_bytes,
        1,
    )?;
    let device = place.device.as_ref().filter(|_| place.name == "RAM");
    for (pass, bound) in [("first", 1.1), ("second", 1.0)] {
        // What comes after the last snapshot of the first pass has every block of the area redirected.
        let is_first = pass == "first";
        ours.snapshot = is_first.then_some("row");
        overlay.fresh = is_first;
        let job = Job {
            name: format!("log: write and flush QD1, {pass} pass"),
            pattern: Pattern::Pass { area_bytes },
            ..Job::random(Op::Write, 1, area_bytes)
        }
        .limit(Duration::from_millis(1000));
        let job = Job {
            flush_every: Some(1),
            ..job
        };
        let measured = interleaved(
            bench,
            &mut [&mut ours, &mut raw, &mut overlay],
            &job,
            device,
        )?;
        let name = format!("{}, {}", job.name, place.name);
        // A call or two of the daemon's own housekeeping may fall into the round.
        let goals = [(Quantity::SyncsPerFlush, "", Goal::AtMost(bound + 0.005))];
        bench.report.contest(FIGURE, &name, &measured, &goals);
    }
    Ok(())
}
