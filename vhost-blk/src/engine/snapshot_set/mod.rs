//! Snapshot sets over the daemon's volumes: carries out what `snapshot_state` decides.
//!
//! * `sets`: the commands of the life of a set.
//! * `window`: one open set; holding, taking, releasing.
//! * `stored`: snapshots that are on disk.
//! * `change`: what keeps sets away from a volume that is resized or reverted.
//! * `resize`: a volume that grows.
//! * `error`: why a command failed.

mod change;
mod error;
mod resize;
mod sets;
mod stored;
mod window;

pub use error::SetError;
pub use resize::Resized;
pub use sets::SnapshotSets;
pub use window::{Committed, OwnerId};

#[cfg(test)]
mod tests;
