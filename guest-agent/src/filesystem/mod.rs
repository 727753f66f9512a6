//! File systems of the guest: which there are, where they lie, in what order they freeze, and the freeze itself.
//!
//! Called by `quiesce` (plan) and `hold` (freeze and thaw). Knows nothing of sets, writers or the host.

pub mod devices;
pub mod freeze;
pub mod mounts;
pub mod plan;
