//! `FailingFile`: a file behind a fault that strikes once, at the n-th operation of a kind.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::io::BlockFile;

/// Which operations a fault counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// Reads: EIO.
    Read,
    /// Writes, zeroing and allocation: EIO, and nothing landed.
    Write,
    /// The same: EIO, and a part landed.
    ShortWrite,
    /// The same: ENOSPC.
    WriteNoSpace,
    /// Syncs: EIO.
    Sync,
}

/// Strikes once, at the n-th operation it counts, whichever file it is on.
#[derive(Debug)]
pub struct Fault {
    kind: FaultKind,
    left: AtomicU64,
    struck: AtomicBool,
    counted: AtomicU64,
}

impl Fault {
    /// Strikes at operation number `after` (0 is the first).
    pub fn new(kind: FaultKind, after: u64) -> Arc<Fault> {
        Arc::new(Fault {
            kind,
            left: AtomicU64::new(after + 1),
            struck: AtomicBool::new(false),
            counted: AtomicU64::new(0),
        })
    }

    /// Operations of its kind so far.
    pub fn counted(&self) -> u64 {
        self.counted.load(Ordering::SeqCst)
    }

    /// Whether it struck.
    pub fn struck(&self) -> bool {
        self.struck.load(Ordering::SeqCst)
    }

    fn strike(&self, kinds: &[FaultKind]) -> io::Result<()> {
        if !kinds.contains(&self.kind) {
            return Ok(());
        }
        self.counted.fetch_add(1, Ordering::SeqCst);
        let before = self
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                Some(left.saturating_sub(1))
            });
        if before != Ok(1) {
            return Ok(());
        }
        self.struck.store(true, Ordering::SeqCst);
        Err(match self.kind {
            FaultKind::Read | FaultKind::Write | FaultKind::ShortWrite | FaultKind::Sync => {
                io::Error::from_raw_os_error(5)
            }
            FaultKind::WriteNoSpace => io::Error::from_raw_os_error(28),
        })
    }
}

const WRITES: [FaultKind; 3] = [
    FaultKind::Write,
    FaultKind::ShortWrite,
    FaultKind::WriteNoSpace,
];

/// A file that passes everything on until its fault strikes.
#[derive(Debug)]
pub struct FailingFile {
    file: Arc<dyn BlockFile>,
    fault: Arc<Fault>,
}

impl FailingFile {
    /// `file` behind `fault`.
    pub fn new(file: Arc<dyn BlockFile>, fault: Arc<Fault>) -> FailingFile {
        FailingFile { file, fault }
    }
}

impl BlockFile for FailingFile {
    fn len_bytes(&self) -> io::Result<u64> {
        self.file.len_bytes()
    }

    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.fault.strike(&[FaultKind::Read])?;
        self.file.read_at(buffer, offset_bytes)
    }

    fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()> {
        if let Err(error) = self.fault.strike(&WRITES) {
            if self.fault.kind != FaultKind::Write {
                let part = bytes.len() / 1024 * 512;
                self.file.write_at(bytes.split_at(part).0, offset_bytes)?;
            }
            return Err(error);
        }
        self.file.write_at(bytes, offset_bytes)
    }

    fn write_zeroes(
        &self,
        offset_bytes: u64,
        length_bytes: u64,
        may_unmap: bool,
    ) -> io::Result<()> {
        self.fault.strike(&WRITES)?;
        self.file
            .write_zeroes(offset_bytes, length_bytes, may_unmap)
    }

    fn allocate(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        self.fault.strike(&WRITES)?;
        self.file.allocate(offset_bytes, length_bytes)
    }

    fn release(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        self.fault.strike(&WRITES)?;
        self.file.release(offset_bytes, length_bytes)
    }

    fn set_len(&self, length_bytes: u64) -> io::Result<()> {
        self.fault.strike(&WRITES)?;
        self.file.set_len(length_bytes)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.fault.strike(&[FaultKind::Sync])?;
        self.file.sync_data()
    }
}
