//! The test rig: real VMs under stock QEMU, the programs under test as processes, and judges of
//! what they left on the disks.
//!
//! Called by the scenarios in `tests/tests`, by the demo and by the measuring commands in
//! `src/bin`. It must not know how the programs work inside: it starts them and reads what they
//! say, as a user would. `harness` is for the host; `guest_protocol` is what host and guest say to
//! each other; `bench` measures the daemon beside its peers.

pub mod bench;
pub mod guest_protocol;
pub mod harness;
