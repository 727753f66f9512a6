//! `MemoryFile`: bytes in memory behind `BlockFile`, with no crashes and no failures.

use std::io;
use std::sync::Mutex;

use crate::io::BlockFile;
use crate::units::in_memory;
use crate::volume::lock;

/// A file in memory.
#[derive(Debug, Default)]
pub struct MemoryFile {
    bytes: Mutex<Vec<u8>>,
}

impl MemoryFile {
    /// A file of these bytes.
    pub fn new(bytes: Vec<u8>) -> MemoryFile {
        MemoryFile {
            bytes: Mutex::new(bytes),
        }
    }

    /// A copy of its bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        lock(&self.bytes).clone()
    }
}

/// Fills `buffer` from `bytes`, zeroes behind their end.
pub(super) fn read_bytes(bytes: &[u8], buffer: &mut [u8], offset_bytes: u64) {
    let start = in_memory(offset_bytes).min(bytes.len());
    let count = buffer.len().min(bytes.len() - start);
    let (there, behind) = buffer.split_at_mut(count);
    there.copy_from_slice(&bytes[start..start + count]);
    behind.fill(0);
}

/// Writes into `bytes`, growing them.
pub(super) fn write_bytes(bytes: &mut Vec<u8>, data: &[u8], offset_bytes: u64) {
    let start = in_memory(offset_bytes);
    if bytes.len() < start + data.len() {
        bytes.resize(start + data.len(), 0);
    }
    bytes[start..start + data.len()].copy_from_slice(data);
}

impl BlockFile for MemoryFile {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(lock(&self.bytes).len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        read_bytes(&lock(&self.bytes), buffer, offset_bytes);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset_bytes: u64) -> io::Result<()> {
        write_bytes(&mut lock(&self.bytes), data, offset_bytes);
        Ok(())
    }

    fn write_zeroes(&self, offset_bytes: u64, length_bytes: u64, _unmap: bool) -> io::Result<()> {
        self.write_at(&vec![0; in_memory(length_bytes)], offset_bytes)
    }

    fn allocate(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        let mut bytes = lock(&self.bytes);
        let end = in_memory(offset_bytes + length_bytes);
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        Ok(())
    }

    fn release(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        self.write_zeroes(offset_bytes, length_bytes, true)
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
}
