//! What need not be in the copies (VSS: FilesNotToSnapshot) is left out of them.
//!
//! Called by `run` when the set is kept: the guest has said, while all was frozen, where it lies. Invariants: nothing that goes wrong here
//! undoes the set, and what could not be left out is in it; without the witnesses' word that file systems were held nothing is left out.

use super::super::level::Level;
use super::Run;
use super::daemons::{all, exempt_of};
use guest_agent_wire::host::NotToSnapshot;
use std::time::Duration;
use vhost_blk_wire::command::{AreasLeftOut, SnapshotSetLeaveOut};

/// Longest time for it. A store takes a sync for every 64 MiB.
const LIMIT: Duration = Duration::from_secs(60);

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
        let extents = &found.extents;
        let telling = all(&self.daemons, LIMIT, |part| SnapshotSetLeaveOut {
            set,
            areas: exempt_of(part, extents)
                .into_iter()
                .map(|area| AreasLeftOut {
                    volume: area.volume,
                    ranges: area.ranges,
                })
                .collect(),
        });
        let answers = match telling.await {
            Ok(answers) => answers,
            Err(failure) => {
                let note = format!(
                    "files that need not be in the copies are, or are not, in them: {}",
                    failure.message
                );
                self.doc.notes.push(note);
                return;
            }
        };
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
                found.names.join(", ")
            ));
        }
    }
}
