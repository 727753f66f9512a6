//! The files of a volume by number, so that tests that record, damage or fail files need not know how
//! many there are.
//!
//! `CrashDisk` images, damaged copies and golden volumes are kept in this order.

use std::io;
use std::sync::Arc;

use super::{Image, MemoryFile};
use crate::io::BlockFile;
use crate::units::in_memory;
use crate::volume::VolumeFiles;

/// Names of a volume's files; a file's place is its index here.
pub const FILE_NAMES: [&str; 4] = ["base", "superblock", "log", "index"];
/// Files of a volume.
pub const FILES: usize = FILE_NAMES.len();
/// Place of the base.
pub const BASE: usize = 0;
/// Place of the superblock.
pub const SUPERBLOCK: usize = 1;
/// Place of the log, with the journals in it.
pub const LOG: usize = 2;

/// Parts of a volume's files that hold metadata: place, offset and length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Place of the file.
    pub place: usize,
    /// Where the part begins.
    pub offset_bytes: u64,
    /// How long it is; what was never written is left out at its end.
    pub length_bytes: u64,
    /// Whether it is a journal.
    pub journal: bool,
}

/// Where the metadata of a volume is, whose journal regions are so long.
pub fn metadata(images: &[Image], journal_region_bytes: u64) -> Vec<Part> {
    let length = |place: usize| images.get(place).map_or(0, Image::len_bytes);
    let whole = (SUPERBLOCK..FILES)
        .filter(|place| *place != LOG)
        .map(|place| Part {
            place,
            offset_bytes: 0,
            length_bytes: length(place),
            journal: false,
        });
    let regions = [0, journal_region_bytes].map(|offset_bytes| Part {
        place: LOG,
        offset_bytes,
        length_bytes: length(LOG)
            .saturating_sub(offset_bytes)
            .min(journal_region_bytes),
        journal: true,
    });
    whole.chain(regions).collect()
}

/// A volume's files, made one by one in the order of [`FILE_NAMES`]. The log has both of its handles on one.
pub fn volume_files(mut at: impl FnMut(usize) -> Arc<dyn BlockFile>) -> VolumeFiles {
    let (base, superblock, log) = (at(BASE), at(SUPERBLOCK), at(LOG));
    VolumeFiles {
        base,
        superblock,
        journal: Arc::clone(&log),
        log,
        index: at(3),
    }
}

/// The files of a volume in the order of [`FILE_NAMES`].
pub fn each_file(files: &VolumeFiles) -> [&Arc<dyn BlockFile>; FILES] {
    [&files.base, &files.superblock, &files.log, &files.index]
}

/// Files in memory with these contents, in the order of [`FILE_NAMES`]; empty where there are none.
pub fn memory_volume(images: Vec<Image>) -> VolumeFiles {
    let mut images = images.into_iter();
    volume_files(|_| Arc::new(MemoryFile::new(images.next().unwrap_or_default())))
}

/// What a volume's files hold, in the order of [`FILE_NAMES`].
pub fn contents(files: &VolumeFiles) -> io::Result<Vec<Image>> {
    each_file(files)
        .into_iter()
        .map(|file| {
            let mut bytes = vec![0; in_memory(file.len_bytes()?)];
            file.read_at(&mut bytes, 0)?;
            Ok(bytes.into())
        })
        .collect()
}
