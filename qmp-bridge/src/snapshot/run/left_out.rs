//! What need not be in the copies (VSS: FilesNotToSnapshot) is left out of them.
//!
//! Called by `run` when the set is kept: the guest has said, while all was frozen, where it lies. Invariants: nothing that goes wrong here
//! undoes the set, and what could not be left out is in it; without the witnesses' word that file systems were held nothing is left out;
//! nor is more than the requester allows, whatever the guest names.

use super::super::level::Level;
use super::Run;
use super::daemons::{all, exempt_of};
use super::failure::chain;
use guest_agent_wire::host::NotToSnapshot;
use guest_agent_wire::types::DiskExtent;
use std::time::Duration;
use vhost_blk_wire::command::{AreasLeftOut, SnapshotSetLeaveOut};

/// Longest time for it by the stores' clocks. A store takes a sync for every 64 MiB.
const LIMIT_MS: u64 = 55_000;
/// The same for the answers.
const LIMIT: Duration = Duration::from_secs(60);
/// Share of the disks that may be left out, unless the requester says otherwise. COORDINATION.md argues it.
const PERCENT: u8 = 75;

/// For the record: the places are of use at this moment only.
pub(super) fn without_places(found: &NotToSnapshot) -> Box<NotToSnapshot> {
    Box::new(NotToSnapshot {
        extents: Vec::new(),
        ..found.clone()
    })
}

impl Run<'_> {
    /// Tells the stores; how many bytes went stands with each copy.
    pub(super) async fn leave_out(&mut self) {
        let frozen = self.window.frozen.as_ref();
        let Some(found) = frozen.and_then(|frozen| frozen.not_to_snapshot.as_ref()) else {
            return;
        };
        // Where file systems were not held to the end, the places may be others' by now.
        let was_held = self.doc.level_reached >= Some(Level::Filesystem);
        if found.extents.is_empty() || !was_held {
            return;
        }
        let set = self.doc.set;
        let (extents, names) = (&found.extents.clone(), found.names.clone());
        if let Some((named, note)) = self.too_much(extents) {
            self.doc.leave_out_refused_bytes = named;
            self.doc.notes.push(note);
            return;
        }
        // A bridge that dies meanwhile, or never hears what came of it, must not leave a record by which nothing went.
        for copy in &mut self.doc.copies {
            copy.left_out_bytes = bytes_on(&copy.serial, copy.size_bytes, extents);
        }
        let most: u64 = self.doc.copies.iter().map(|copy| copy.left_out_bytes).sum();
        let may_be =
            format!("up to {most} bytes need not be in the copies, and may read as zeroes there");
        self.doc.notes.push(may_be.clone());
        if let Err(error) = self.state.store(self.doc) {
            let note = format!("all is in the copies: {}", chain(&error));
            self.nothing_went(&may_be);
            self.doc.notes.push(note);
            return;
        }
        let telling = all(&self.daemons, LIMIT, |part| SnapshotSetLeaveOut {
            set,
            areas: exempt_of(part, extents)
                .into_iter()
                .map(|area| AreasLeftOut {
                    volume: area.volume,
                    ranges: area.ranges,
                })
                .collect(),
            limit_ms: Some(LIMIT_MS),
        });
        let answers = match telling.await {
            Ok(answers) => answers,
            Err(failure) => {
                let note = format!("how much went is not known: {}", failure.message);
                self.doc.notes.push(note);
                return;
            }
        };
        self.nothing_went(&may_be);
        let mut bytes = 0;
        for (daemon, answer) in self.daemons.iter().zip(answers) {
            for left in answer.volumes {
                let mut copies = self.doc.copies.iter_mut();
                let copy = copies
                    .find(|copy| copy.control == daemon.part.control && copy.volume == left.volume);
                if let Some(copy) = copy {
                    copy.left_out_bytes = left.left_out_bytes;
                    bytes += left.left_out_bytes;
                }
            }
        }
        if bytes > 0 {
            self.doc.notes.push(format!(
                "{bytes} bytes need not be in the copies, and read as zeroes there: {}",
                names.join(", ")
            ));
        }
        if let Err(error) = self.state.store(self.doc) {
            // What is there says more than went, and `finish` tries again.
            tracing::warn!("set {set}: {}", crate::shown::plain(&chain(&error)));
        }
    }

    fn nothing_went(&mut self, may_be: &str) {
        self.doc.notes.retain(|note| note != may_be);
        for copy in &mut self.doc.copies {
            copy.left_out_bytes = 0;
        }
    }

    /// How much the guest names, and a note of it, if that is more than the requester allows.
    fn too_much(&self, extents: &[DiskExtent]) -> Option<(u64, String)> {
        let percent = self.doc.request.leave_out_percent.unwrap_or(PERCENT);
        let (mut named, mut all) = (0_u64, 0_u64);
        for copy in &self.doc.copies {
            named += bytes_on(&copy.serial, copy.size_bytes, extents);
            all += copy.size_bytes;
        }
        let is_too_much = u128::from(named) * 100 > u128::from(all) * u128::from(percent);
        is_too_much.then(|| {
            let note = format!(
                "all is in the copies: of their {all} bytes the guest names {named} that need not be, and at most {percent} % may be left out"
            );
            (named, note)
        })
    }
}

/// Bytes of a disk that extents cover, each once.
fn bytes_on(serial: &str, size_bytes: u64, extents: &[DiskExtent]) -> u64 {
    let mut spans: Vec<(u64, u64)> = extents
        .iter()
        .filter(|extent| extent.serial == serial && !serial.is_empty())
        .map(|extent| {
            let end = extent.start_bytes.saturating_add(extent.length_bytes);
            (extent.start_bytes, end.min(size_bytes))
        })
        .collect();
    spans.sort_unstable();
    let (mut bytes, mut behind) = (0, 0);
    for (start, end) in spans {
        let start = start.max(behind);
        if start < end {
            bytes += end - start;
            behind = end;
        }
    }
    bytes
}
