//! Simulated files for tests of this crate and of others: feature `sim`.
//!
//! `memory_file` just holds bytes; `crash_file` records every write and sync and yields what a power cut
//! may leave; `failing_file` fails the n-th operation.

mod crash_file;
mod failing_file;
mod memory_file;

pub use crash_file::{CrashDisk, CrashPoint, Moment};
pub use failing_file::{FailingFile, Fault, FaultKind};
pub use memory_file::MemoryFile;
