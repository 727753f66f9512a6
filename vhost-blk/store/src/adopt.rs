//! Adoption: the files of a volume, their locks, and an empty format.
//!
//! `open` calls it. After adoption no file is made, renamed or removed; so no directory operation matters to
//! a crash later. The superblock comes last: until it is durable, nothing has been adopted (I7).

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{FileName, Result, StoreError};
use crate::io::{Access, BlockFile, DiskFile};
use crate::journal::{Journal, Place, Record};
use crate::layout::MAX_VOLUME_BYTES;
use crate::superblock::{self, Superblock, region_fits};
use crate::units::{Generation, Incarnation, SECTOR_BYTES, Sequence, VolumeId, in_memory};
use crate::volume::{OpenOptions, VolumeFiles};

/// How often a lock is tried while waiting for it.
const LOCK_POLL: Duration = Duration::from_millis(10);

pub(crate) fn io(op: &'static str, file: FileName) -> impl Fn(std::io::Error) -> StoreError {
    move |source| StoreError::Io {
        op,
        file,
        offset_bytes: 0,
        source,
    }
}

impl VolumeFiles {
    /// Opens, and unless read-only makes, the files of a volume.
    ///
    /// Unless read-only it takes exclusive locks: on the superblock against a second daemon, and on base and
    /// log against I/O that a killed one still has under way. The kernel drops a lock with the last
    /// reference to the open file, and a request in flight holds one; so when these locks are free, no
    /// late write can land in a block that is about to be given to somebody else.
    pub fn open(base: &Path, shadow_storage: &Path, options: &OpenOptions) -> Result<VolumeFiles> {
        let deadline = Instant::now() + options.lock_wait;
        let open = |path: &Path, file, direct, create| {
            let access = Access {
                direct,
                read_only: options.read_only,
                create: create && !options.read_only,
            };
            DiskFile::open(path, access).map_err(io("open", file))
        };
        let locked = |path: &Path, name, direct, create| -> Result<Arc<dyn BlockFile>> {
            let file = open(path, name, direct, create)?;
            while !options.read_only && !file.try_lock().map_err(io("lock", name))? {
                if Instant::now() >= deadline {
                    return Err(StoreError::InUse);
                }
                std::thread::sleep(LOCK_POLL);
            }
            Ok(Arc::new(file))
        };
        let base = locked(base, FileName::Base, options.direct, false)?;
        let directory = io("open", FileName::Directory);
        if !options.read_only {
            fs::create_dir_all(shadow_storage).map_err(&directory)?;
        }
        let superblock = &shadow_storage.join("superblock");
        let superblock = locked(superblock, FileName::Superblock, false, true)?;
        // Before any other file is made: a volume of another version stays as it is.
        if let Err(error @ StoreError::Unsupported { .. }) = superblock::load(&*superblock) {
            return Err(error);
        }
        let log = locked(
            &shadow_storage.join("log"),
            FileName::Log,
            options.direct,
            true,
        )?;
        let meta = |name: &str, file| -> Result<Arc<dyn BlockFile>> {
            Ok(Arc::new(open(
                &shadow_storage.join(name),
                file,
                false,
                true,
            )?))
        };
        let files = VolumeFiles {
            base,
            superblock,
            log,
            journal: {
                let journal = open(&shadow_storage.join("log"), FileName::Journal, false, true)?;
                journal.advise_random();
                Arc::new(journal)
            },
            index: meta("index", FileName::Index)?,
        };
        if !options.read_only {
            sync_directory(shadow_storage).map_err(&directory)?;
            if let Some(parent) = shadow_storage
                .parent()
                .filter(|p| !p.as_os_str().is_empty())
            {
                sync_directory(parent).map_err(&directory)?;
            }
        }
        Ok(files)
    }
}

/// Makes the names in a directory durable.
fn sync_directory(path: &Path) -> std::io::Result<()> {
    let directory = fs::File::open(path)?;
    Ok(rustix::fs::fsync(&directory)?)
}

/// Writes an empty volume. The superblock comes last: until it is there, nothing is adopted.
pub(crate) fn format(files: &VolumeFiles, size_bytes: u64, options: &OpenOptions) -> Result<()> {
    let id = options
        .volume_id
        .unwrap_or_else(|| VolumeId(uuid::Uuid::new_v4()));
    let region_bytes = options.journal_region_bytes;
    if !region_fits(region_bytes) {
        return Err(StoreError::Limit(
            "a journal region is 16 KiB to 1 GiB, in blocks of 4096 bytes",
        ));
    }
    // A page at a time, for the same reason that readahead is off: no large folios.
    let zeroes = vec![0; 4096];
    for start in [0, region_bytes] {
        let end = start + options.journal_prewritten_bytes.min(region_bytes);
        let mut at = start;
        while at < end {
            let part = in_memory((end - at).min(zeroes.len() as u64));
            files
                .journal
                .write_at(&zeroes[..part], at)
                .map_err(io("write", FileName::Journal))?;
            at += part as u64;
        }
    }
    let first = Sequence(1);
    let place = Place {
        generation: Generation(0),
        first,
        next: first,
        end_bytes: 0,
    };
    Journal::new(id, region_bytes, Generation(0), Incarnation(0), place).append(
        &*files.journal,
        &[Record::Start {
            generation: Generation(0),
        }],
    )?;
    files.log.sync_data().map_err(io("sync", FileName::Log))?;
    Superblock::empty(id, size_bytes, region_bytes).store(&*files.superblock)
}

/// Length of the base, if it can be a volume's.
pub(crate) fn base_length(files: &VolumeFiles) -> Result<u64> {
    let length_bytes = files
        .base
        .len_bytes()
        .map_err(io("measure", FileName::Base))?;
    let fits = length_bytes != 0
        && length_bytes.is_multiple_of(SECTOR_BYTES)
        && length_bytes <= MAX_VOLUME_BYTES;
    if fits {
        Ok(length_bytes)
    } else {
        Err(StoreError::BadBaseSize(length_bytes))
    }
}
