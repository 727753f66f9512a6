//! Simulated files for tests of this crate and of others: feature `sim`.
//!
//! `memory_file` just holds bytes; `crash_file` records every write and sync and yields what a power cut
//! may leave; `failing_file` fails the n-th operation.

mod memory_file;

pub use memory_file::MemoryFile;
