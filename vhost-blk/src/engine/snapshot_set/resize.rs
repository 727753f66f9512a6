//! Growing a volume under load: holds its writes as a set does.
//!
//! Called by `control` on a thread that may block. The store does the growing; the front end hears of it through the volume.
//!
//! Invariants:
//! * No set is open on a volume that is being resized, and none is opened (`change`).
//! * Writes are held only for what cannot be done beside them; should that take longer than a hold may, they go on by themselves, and
//!   the store turns them back until it is through.

use super::super::volume::VolumeEngine;
use super::error::{SetError, store_error};
use super::sets::SnapshotSets;
use std::time::{Duration, Instant};
use vhost_blk_store::{StoreError, Volume};

/// Longest time until no write is in flight.
const HOLD_MAX: Duration = Duration::from_secs(10);

/// What a resize has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resized {
    /// Size of the disk now, in bytes.
    pub size_bytes: u64,
    /// From holding writes to releasing them.
    pub hold: Duration,
}

impl SnapshotSets {
    /// `block_resize`: the volume gets this size, which is not smaller than the one it has.
    ///
    /// # Errors
    /// See [`SetError`]; the size is the old one then, unless the volume is poisoned.
    pub fn resize(&self, name: &str, size_bytes: u64) -> Result<Resized, SetError> {
        let volume = self.volume(name)?;
        let changing = self.begin_change(volume)?;
        let failed = |error| store_error(volume, error);
        volume.store().prepare_grow(size_bytes).map_err(failed)?;
        let hold = if volume.size_bytes() == size_bytes {
            Duration::ZERO
        } else {
            // No background step that the growth would wait for with writes held.
            let quiet = volume.quiet_window();
            let hold = while_held(volume, |store| store.grow(size_bytes))?;
            drop(quiet);
            tracing::info!(volume = %name, size_bytes, hold_us = hold.as_micros(), "grown");
            volume.tell_size();
            hold
        };
        drop(changing);
        Ok(Resized { size_bytes, hold })
    }
}

/// Runs `work` with writes held and none in flight; for how long they were held.
fn while_held(
    volume: &VolumeEngine,
    work: impl FnOnce(&Volume) -> Result<(), StoreError>,
) -> Result<Duration, SetError> {
    let start = Instant::now();
    let hold = volume
        .barrier
        .hold(start + HOLD_MAX)
        .ok_or_else(|| SetError::InvalidState("writes are held already".to_owned()))?;
    let done = if volume.barrier.drain(hold) {
        work(volume.store()).map_err(|error| store_error(volume, error))
    } else {
        Err(SetError::InvalidState(
            "writes in flight did not end in time".to_owned(),
        ))
    };
    volume.barrier.release(hold);
    volume.wake_queues();
    done.map(|()| start.elapsed())
}
