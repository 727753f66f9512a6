//! `MemoryFile`: bytes in memory behind `BlockFile`, with no crashes and no failures.

use std::io;
use std::sync::Mutex;

use super::Image;
use crate::io::BlockFile;
use crate::volume::lock;

/// A file in memory.
#[derive(Debug, Default)]
pub struct MemoryFile {
    image: Mutex<Image>,
}

impl MemoryFile {
    /// A file of these bytes.
    pub fn new(image: impl Into<Image>) -> MemoryFile {
        MemoryFile {
            image: Mutex::new(image.into()),
        }
    }

    /// A copy of what it holds.
    pub fn to_image(&self) -> Image {
        lock(&self.image).clone()
    }
}

impl BlockFile for MemoryFile {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(lock(&self.image).len_bytes())
    }

    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        lock(&self.image).read(buffer, offset_bytes);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset_bytes: u64) -> io::Result<()> {
        lock(&self.image).write(data, offset_bytes);
        Ok(())
    }

    fn write_zeroes(&self, offset_bytes: u64, length_bytes: u64, _unmap: bool) -> io::Result<()> {
        lock(&self.image).fill(0, offset_bytes, length_bytes);
        Ok(())
    }

    fn allocate(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        let mut image = lock(&self.image);
        let end = offset_bytes + length_bytes;
        if image.len_bytes() < end {
            image.set_len(end);
        }
        Ok(())
    }

    fn release(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        self.write_zeroes(offset_bytes, length_bytes, true)
    }

    fn set_len(&self, length_bytes: u64) -> io::Result<()> {
        lock(&self.image).set_len(length_bytes);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
}
