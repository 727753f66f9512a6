//! Shadow storage is full: what happens while writes wait for room.
//!
//! Called by `upkeep` behind each step. First background work gives back what nobody needs any more. When that is through and
//! writes still wait, it is told, and then the oldest snapshot by copy-on-write is dropped, as VSS does: it was made
//! on those terms, and the guest's disk goes on. A snapshot by redirect-on-write is never dropped: its writes wait. An open set is
//! never dropped from under its coordinator: it is undone, which he is told.

use super::super::snapshot_set::SnapshotSets;
use super::super::volume::VolumeEngine;
use super::Outcome;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost_blk_wire::event::Event as WireEvent;

/// Pause before a look whether the room that was made is enough: the queues try again meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// A shortage is over when no write has been seen waiting for so long.
const OVER: Duration = Duration::from_secs(1);
/// Pause while nothing can be done: somebody has to delete a snapshot, or to make the file system larger.
const NOTHING_TO_DROP: Duration = Duration::from_millis(250);

/// How long there has been no room.
#[derive(Debug, Default)]
pub(super) struct Shortage {
    /// Looks at which writes waited and no work was left that could make room, since something was done about it.
    looks: u32,
    told: bool,
    last: Option<Instant>,
}

impl Shortage {
    /// No write waits at this moment; some may just be trying again.
    pub(super) fn look_past(&mut self) {
        if self.last.is_some_and(|last| last.elapsed() >= OVER) {
            *self = Self::default();
        }
    }

    /// Writes wait for room. `outcome`: of the step before. The answer is the pause before the next one.
    pub(super) fn care(
        &mut self,
        sets: &SnapshotSets,
        volume: &Arc<VolumeEngine>,
        outcome: Outcome,
    ) -> Duration {
        self.last = Some(Instant::now());
        volume.try_room_again();
        if matches!(outcome, Outcome::More | Outcome::Ahead) {
            return Duration::ZERO;
        }
        let is_failing = outcome == Outcome::Failed;
        if volume.store().is_reclaiming() && !is_failing {
            // It waits for I/O that was planned before.
            return LOOK_AGAIN;
        }
        self.looks += 1;
        if self.looks < 2 {
            // The queues may find room only now.
            return LOOK_AGAIN;
        }
        if !std::mem::replace(&mut self.told, true) {
            tracing::warn!(volume = %volume.settings.name, "there is no room: writes wait");
            volume.tell(WireEvent::ShadowStorageFull {
                volume: volume.settings.name.clone(),
            });
        }
        self.looks = 0;
        // What cannot be given back, or is of no use, need not be dropped.
        if !is_failing && volume.would_be_helped_by_room() && sets.drop_for_room(volume) {
            Duration::ZERO
        } else {
            NOTHING_TO_DROP
        }
    }
}
