//! A buffer whose bytes start at a 4 KiB boundary, as O_DIRECT asks.
//!
//! `file` bounces unaligned requests through it; `write_path` and `settle` copy blocks with it.
//! It over-allocates and skips to the boundary, so it needs no `unsafe`.

use std::ops::{Deref, DerefMut};

const ALIGNMENT_BYTES: usize = 4096;

/// Zeroed bytes at an aligned address.
#[derive(Debug)]
pub struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
    length_bytes: usize,
}

impl AlignedBuffer {
    /// A zeroed buffer of `length_bytes`.
    pub fn new(length_bytes: usize) -> AlignedBuffer {
        let bytes = vec![0; length_bytes + ALIGNMENT_BYTES];
        let start = bytes
            .as_ptr()
            .align_offset(ALIGNMENT_BYTES)
            .min(ALIGNMENT_BYTES);
        AlignedBuffer {
            bytes,
            start,
            length_bytes,
        }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length_bytes]
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length_bytes]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffer_starts_at_a_page_boundary() {
        for length_bytes in [0, 1, 512, 4096, 70_000] {
            let buffer = AlignedBuffer::new(length_bytes);
            assert_eq!(buffer.as_ptr() as usize % ALIGNMENT_BYTES, 0);
            assert_eq!(buffer.len(), length_bytes);
        }
    }
}
