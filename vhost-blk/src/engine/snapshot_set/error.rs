//! Why a command on sets or snapshots failed, one variant per class of the control socket or decision of its caller.
//!
//! Returned by the other rooms of `snapshot_set`.

use super::super::snapshot_state::{Reason, Refusal};
use super::super::volume::VolumeEngine;
use uuid::Uuid;
use vhost_blk_store::StoreError;

/// Why a command on sets or snapshots failed.
#[derive(Debug, thiserror::Error)]
pub enum SetError {
    /// No such volume.
    #[error("no volume {0:?}")]
    NoSuchVolume(String),
    /// No such set, or it was undone.
    #[error("no snapshot set {0}")]
    NoSuchSet(Uuid),
    /// No such snapshot.
    #[error("no snapshot {0}")]
    NoSuchSnapshot(Uuid),
    /// A set is open on one of the volumes.
    #[error("snapshot set {0} is open on volume {1:?}")]
    InProgress(Uuid, String),
    /// The command does not fit.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The command does not fit, for another reason.
    #[error("{0}")]
    InvalidState(String),
    /// Writes could not be held until the commit; the set is undone.
    #[error("writes could not be held until the commit: {0}; the set is undone")]
    HoldBroken(&'static str),
    /// The set was undone meanwhile.
    #[error("the set was undone: {0}")]
    Undone(Reason),
    /// Shadow storage is full.
    #[error("no room in the shadow storage of volume {0:?}")]
    NoSpace(String),
    /// A disk has failed.
    #[error("volume {0:?} is poisoned")]
    Poisoned(String),
    /// The arguments make no sense.
    #[error("{0}")]
    BadArgument(String),
    /// The store failed.
    #[error("volume {volume:?}: {error}")]
    Store {
        /// Volume by name.
        volume: String,
        /// What it said.
        #[source]
        error: StoreError,
    },
}

/// What an error of a volume's store means to the caller.
pub(super) fn store_error(volume: &VolumeEngine, error: StoreError) -> SetError {
    let name = volume.settings.name.clone();
    if matches!(error, StoreError::NoSpace) {
        SetError::NoSpace(name)
    } else if matches!(error, StoreError::Poisoned) {
        SetError::Poisoned(name)
    } else if let StoreError::NoSuchSnapshot(id) = error {
        SetError::NoSuchSnapshot(id.into())
    } else if let StoreError::SetKept(id) = error {
        SetError::InvalidState(format!("set {id} is kept: delete it"))
    } else if matches!(error, StoreError::BadSize { .. }) {
        SetError::BadArgument(error.to_string())
    } else {
        SetError::Store {
            volume: name,
            error,
        }
    }
}
