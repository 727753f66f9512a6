//! Two connections at one set: what one of them has begun when the other ends it.

use super::super::snapshot_state::Event;
use super::super::testing::volume;
use super::{OwnerId, SnapshotSets};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

#[test]
fn a_hold_that_comes_after_its_set_was_undone_or_released_holds_nothing() {
    let (volume, _directory) = volume(4 << 20);
    let sets = SnapshotSets::new(vec![Arc::clone(&volume)]);
    for undone in [true, false] {
        let id = Uuid::new_v4();
        sets.prepare(id, OwnerId(1), &["vda".to_owned()], None)
            .unwrap();
        let set = sets.find(id).unwrap();
        // The state says "held", and the other connection is faster than the hold itself.
        set.step(Event::Hold).unwrap();
        if undone {
            sets.owner_gone(OwnerId(1));
        } else {
            sets.release(id).unwrap();
        }
        assert!(!set.hold_writes(Instant::now() + Duration::from_secs(60)));
        assert!(volume.barrier.enter().is_some(), "undone: {undone}");
    }
}
