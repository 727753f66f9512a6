//! Figures 2 and 3: the first write to a block after a snapshot, by redirecting (2) and by copying (3).
//!
//! Called by the command. Before each round ours takes a snapshot through the control socket and the storage daemon gets a fresh overlay or
//! copy-before-write target. Snapshots are deleted between workloads, never between rounds, and what follows in the background is
//! waited for. A round ends early at its limit: then the rate is that of the blocks it got to.

use std::time::Duration;

use anyhow::Result;

use super::Bench;
use super::contestants::{Arrangement, Ours, OursSpec, Peer};
use super::daemon;
use super::job::{DENSE_BYTES, Job};
use super::peers::Overlay;
use super::place::{Files, Place};
use super::relay::Relay;
use super::report::{Goal, Quantity};
use super::rounds::{Contestant, interleaved};

const RELAXED: &str = "--relaxed-order-for-measurement";

type Goals = &'static [(Quantity, &'static str, Goal)];

/// Depth of the queue, a flush after so many writes, dense or sparse, goals.
struct Workload {
    dense: bool,
    depth: usize,
    flush_every: Option<usize>,
    on_disk: bool,
    goals: Goals,
}

/// None of the data. What the file system reads of its own metadata, now and then a block, is not a read at the time of the write.
const NO_READ: Goal = Goal::AtMost(128.0);

const REDIRECT: &[Workload] = &[
    Workload {
        dense: false,
        depth: 32,
        flush_every: None,
        on_disk: true,
        goals: &[
            (Quantity::Rate, "QSD raw", Goal::RatioAtLeast(1.0)),
            (Quantity::Rate, "QSD overlay l2ext", Goal::RatioAtLeast(3.0)),
            (Quantity::Written, "", Goal::AtMost(4608.0)),
            (Quantity::BytesRead, "", NO_READ),
        ],
    },
    Workload {
        dense: true,
        depth: 32,
        flush_every: None,
        on_disk: true,
        goals: &[
            (Quantity::Rate, "QSD raw", Goal::RatioAtLeast(1.2)),
            (Quantity::Written, "", Goal::AtMost(4608.0)),
            (Quantity::BytesRead, "", NO_READ),
        ],
    },
    Workload {
        dense: false,
        depth: 1,
        flush_every: None,
        on_disk: false,
        goals: &[(Quantity::Rate, "QSD raw", Goal::RatioAtLeast(0.9))],
    },
    Workload {
        dense: false,
        depth: 32,
        flush_every: Some(32),
        on_disk: true,
        goals: &[(Quantity::Rate, "QSD raw", Goal::RatioAtLeast(0.8))],
    },
];

const COPY: &[Workload] = &[
    Workload {
        dense: false,
        depth: 32,
        flush_every: None,
        on_disk: true,
        goals: &[(Quantity::Rate, "QSD cbw", Goal::RatioAtLeast(4.0))],
    },
    Workload {
        dense: true,
        depth: 32,
        flush_every: None,
        on_disk: true,
        goals: &[(Quantity::Rate, "QSD cbw", Goal::RatioAtLeast(1.0))],
    },
    Workload {
        dense: false,
        depth: 1,
        flush_every: None,
        on_disk: false,
        goals: &[(Quantity::Rate, "QSD cbw", Goal::RatioAtLeast(1.5))],
    },
    Workload {
        dense: false,
        depth: 32,
        flush_every: Some(32),
        on_disk: true,
        goals: &[(Quantity::Rate, "QSD cbw", Goal::RatioAtLeast(2.0))],
    },
];

/// Figure 2.
pub fn redirect(bench: &mut Bench) -> Result<()> {
    let peers = [
        Arrangement::Raw,
        Arrangement::Overlay(Overlay::Clusters64K),
        Arrangement::Overlay(Overlay::ExtendedL2),
    ];
    for place in [bench.ram.clone(), bench.disk.clone()] {
        first_touch(bench, 2, &place, "row", &peers, REDIRECT)?;
    }
    bench.report.note(2, "QSD raw has no snapshot: its plain write is the measure; the overlays are QEMU's snapshots");
    bench.report.note(2, "\"bytes ahead and behind\" were written outside of the round: by our prepare and commit, by the making of an overlay, by checkpoints and segments written in advance in the background");
    Ok(())
}

/// Figure 3.
pub fn copy(bench: &mut Bench) -> Result<()> {
    let peers = [Arrangement::CopyBeforeWrite, Arrangement::Raw];
    for place in [bench.ram.clone(), bench.disk.clone()] {
        first_touch(bench, 3, &place, "cow", &peers, COPY)?;
    }
    bench.report.note(3, "QEMU's copy-before-write does not sync the copy before it overwrites: after a power cut its snapshot may be lost, ours may not. The sync calls beside the rates are that difference");
    bench.report.note(3, "\"order relaxed\": ours told to overwrite before the copy is durable, as QEMU's does; the copy still goes by the threads that would wait for its sync, so this is not the most that could be had without an order");
    bench.report.note(3, "\"relay\" copies, syncs and overwrites by plain calls of one thread, and keeps no index: the least that the durable order takes");
    Ok(())
}

/// The least that copying in durable order takes.
fn relay(place: &Place, size_bytes: u64) -> Result<(Relay, Files)> {
    let files = place.directory(Relay::NAME)?;
    let (base, log) = (files.path().join("base.raw"), files.path().join("log"));
    place.file(&base, size_bytes)?;
    place.file(&log, DENSE_BYTES)?;
    Ok((Relay::copying(&base, &log), files))
}

fn first_touch(
    bench: &mut Bench,
    figure: u8,
    place: &Place,
    method: &'static str,
    peers: &[Arrangement],
    workloads: &[Workload],
) -> Result<()> {
    let on_disk = place.name == "disk";
    let size_bytes = bench.size(512 << 20, 64 << 20);
    let spec = OursSpec::plain("vmshadow", size_bytes);
    let mut ours = Ours::start(bench, place, spec)?;
    // What the durable order costs, beside it: a figure only, nobody should run it so.
    let relaxes = method == "cow" && daemon::takes(&bench.vhost_blk, RELAXED)?;
    let mut relaxed = relaxes
        .then(|| {
            let (name, arguments) = ("vmshadow, order relaxed", &[RELAXED][..]);
            let spec = OursSpec {
                name,
                arguments,
                ..spec
            };
            Ours::start(bench, place, spec)
        })
        .transpose()?;
    let mut others = Vec::new();
    for arrangement in peers {
        others.push(Peer::start(place, *arrangement, size_bytes, 1)?);
    }
    let device = place.device.as_ref().filter(|_| !on_disk);
    for workload in workloads
        .iter()
        .filter(|workload| workload.on_disk || !on_disk)
    {
        let mut job = if workload.dense {
            Job::dense(workload.depth)
        } else {
            Job::sparse(workload.depth, size_bytes)
        };
        if let Some(every) = workload.flush_every {
            job = job.flush_every(every);
        }
        let job = job.limit(Duration::from_millis(600));
        ours.snapshot = Some(method);
        let mut relay = (method == "cow" && workload.depth == 1)
            .then(|| relay(place, size_bytes))
            .transpose()?;
        let mut all: Vec<&mut dyn Contestant> = vec![&mut ours];
        all.extend(others.iter_mut().map(|peer| peer as &mut dyn Contestant));
        if let Some(relaxed) = &mut relaxed {
            relaxed.snapshot = Some(method);
            all.push(relaxed);
        }
        all.extend(
            relay
                .as_mut()
                .map(|(relay, _)| relay as &mut dyn Contestant),
        );
        let measured = interleaved(bench, &mut all, &job, device)?;
        let name = format!("{} after a {method} snapshot, {}", job.name, place.name);
        bench
            .report
            .contest(figure, &name, &measured, workload.goals);
        bench.report.limit(figure, &name, &measured, Relay::NAME);
        for ours in std::iter::once(&mut ours).chain(&mut relaxed) {
            ours.daemon.delete_snapshots()?;
        }
    }
    Ok(())
}
