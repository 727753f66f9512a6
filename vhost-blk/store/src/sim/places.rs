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
pub const FILE_NAMES: [&str; 7] = [
    "base",
    "superblock",
    "log",
    "journal.0",
    "journal.1",
    "index.0",
    "index.1",
];
/// Files of a volume.
pub const FILES: usize = FILE_NAMES.len();
/// Place of the base.
pub const BASE: usize = 0;
/// Place of the superblock.
pub const SUPERBLOCK: usize = 1;
/// Place of the log.
pub const LOG: usize = 2;
/// Places of the journals.
pub const JOURNALS: [usize; 2] = [3, 4];

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

/// Where the metadata of a volume is.
pub fn metadata(images: &[Image]) -> Vec<Part> {
    let whole = |place: usize, journal| Part {
        place,
        offset_bytes: 0,
        length_bytes: images.get(place).map_or(0, Image::len_bytes),
        journal,
    };
    (SUPERBLOCK..FILES)
        .filter(|place| *place != LOG)
        .map(|place| whole(place, JOURNALS.contains(&place)))
        .collect()
}

/// A volume's files, made one by one in the order of [`FILE_NAMES`].
pub fn volume_files(mut at: impl FnMut(usize) -> Arc<dyn BlockFile>) -> VolumeFiles {
    VolumeFiles {
        base: at(0),
        superblock: at(1),
        log: at(2),
        journal: [at(3), at(4)],
        index: [at(5), at(6)],
    }
}

/// The files of a volume in the order of [`FILE_NAMES`].
pub fn each_file(files: &VolumeFiles) -> [&Arc<dyn BlockFile>; FILES] {
    [
        &files.base,
        &files.superblock,
        &files.log,
        &files.journal[0],
        &files.journal[1],
        &files.index[0],
        &files.index[1],
    ]
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
