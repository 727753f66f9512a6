//! A volume that is changed as a whole, resized or reverted: no set is open on it meanwhile, and none is opened.
//!
//! `resize` and `stored` begin it; `sets` asks before it opens a set.
//!
//! Invariant: which of the two was first is decided under the lock of all sets.

use super::super::volume::VolumeEngine;
use super::error::SetError;
use super::sets::SnapshotSets;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The volume is being resized or reverted as long as this lives.
pub(super) struct Changing<'a>(&'a VolumeEngine);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.changing.store(false, Ordering::SeqCst);
    }
}

impl SnapshotSets {
    /// Keeps sets away from a volume.
    ///
    /// # Errors
    /// [`SetError::InProgress`] with the set that is open on it, [`SetError::InvalidState`] if it is being changed already.
    pub(super) fn begin_change<'a>(
        &self,
        volume: &'a Arc<VolumeEngine>,
    ) -> Result<Changing<'a>, SetError> {
        let sets = self.lock();
        if let Some(set) = sets.values().find(|set| set.has(volume)) {
            let name = volume.settings.name.clone();
            return Err(SetError::InProgress(set.id, name));
        }
        if volume.changing.swap(true, Ordering::SeqCst) {
            return Err(SetError::InvalidState(
                "it is being resized or reverted".to_owned(),
            ));
        }
        Ok(Changing(volume))
    }
}
