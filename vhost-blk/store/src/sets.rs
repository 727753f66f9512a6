//! Snapshot sets over several volumes: what is left of one when a daemon died in the middle.
//!
//! The daemon calls it once after opening its volumes.
//! Invariant: KEEP is written only after every member's snapshot is durable; so one KEEP decides for
//! all, and without one the set was never promised to anybody (I9).

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Result, StoreError};
use crate::snapshot_table::SnapshotState;
use crate::units::{SetId, VolumeId};
use crate::volume::Volume;

/// What became of an undecided set.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SetResolution {
    /// The set.
    pub set_id: SetId,
    /// Its fate.
    pub outcome: SetOutcome,
}

/// Fate of a set.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SetOutcome {
    /// One member knew it was kept: kept on all that are here.
    Kept,
    /// All members are here and none was kept: discarded on all.
    Discarded,
    /// Not all members are here, and none of these was kept: left provisional.
    Unresolved {
        /// Members that are not here.
        missing: Vec<VolumeId>,
    },
}

#[derive(Default)]
struct Found {
    members: BTreeSet<VolumeId>,
    kept: bool,
    provisional: bool,
}

/// Decides every set that has a provisional snapshot on one of `volumes`. Durable when it returns;
/// running it again changes nothing.
pub fn resolve_sets(volumes: &[&Volume]) -> Result<Vec<SetResolution>> {
    let mut sets: BTreeMap<SetId, Found> = BTreeMap::new();
    for snapshot in volumes.iter().flat_map(|volume| volume.snapshots()) {
        let found = sets.entry(snapshot.set_id).or_default();
        found.members.extend(snapshot.members);
        match snapshot.state {
            SnapshotState::Provisional => found.provisional = true,
            SnapshotState::Kept => found.kept = true,
        }
    }
    let present: BTreeSet<VolumeId> = volumes.iter().map(|volume| volume.id()).collect();
    let mut resolutions = Vec::new();
    for (set_id, found) in sets {
        if !found.provisional {
            continue;
        }
        let missing: Vec<VolumeId> = found.members.difference(&present).copied().collect();
        let outcome = if found.kept {
            for volume in volumes {
                match volume.keep_set(set_id) {
                    // Not a member, or its snapshot was deleted since.
                    Ok(()) | Err(StoreError::NoSuchSet(_)) => {}
                    Err(error) => return Err(error),
                }
            }
            SetOutcome::Kept
        } else if missing.is_empty() {
            for volume in volumes {
                volume.discard_set(set_id)?;
            }
            SetOutcome::Discarded
        } else {
            SetOutcome::Unresolved { missing }
        };
        resolutions.push(SetResolution { set_id, outcome });
    }
    Ok(resolutions)
}
