//! Simulated files for tests of this crate and of others: feature `sim`.
//!
//! `memory_file` just holds bytes, as an `image`; `crash_file` records every write and sync and yields what a
//! power cut may leave; `failing_file` fails the n-th operation; `places` numbers a volume's files;
//! `trust` lets a fuzzer behind the checksums.

mod crash_file;
mod failing_file;
mod image;
mod memory_file;
mod places;
mod trust;

pub use crash_file::{CrashDisk, CrashPoint, Moment};
pub use failing_file::{FailingFile, Fault, FaultKind};
pub use image::Image;
pub use memory_file::MemoryFile;
pub use places::{
    BASE, FILE_NAMES, FILES, LOG, Part, SUPERBLOCK, contents, each_file, memory_volume, metadata,
    volume_files,
};
pub(crate) use trust::checksums_are_trusted;
pub use trust::trusting_checksums;
