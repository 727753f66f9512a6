//! File systems of the guest: which there are, where they lie, in what order they freeze, and the freeze itself.
//!
//! Called by `quiesce` (plan), `hold` (freeze and thaw) and `qga` (descriptions, trim). Knows nothing of sets, writers or the host.

pub mod devices;
pub mod freeze;
pub mod mounts;
pub mod not_to_snapshot;
pub mod plan;
pub mod trim;
