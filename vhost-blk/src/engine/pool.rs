//! Private aligned memory of one queue, for what must not change while it is checked and written, and for copies.
//!
//! Used by the worker. A guest may change its buffers while a write is under way; bytes that a checksum vouches for are
//! therefore copied here first.
//!
//! Invariant: no more than [`POOL_BYTES_MAX`] are handed out at a time, whatever a guest sends: who gets nothing goes the
//! way that needs none.

use vhost_blk_store::{AlignedBuffer, BLOCK_BYTES};

/// Most bytes handed out at a time.
const POOL_BYTES_MAX: usize = 8 << 20;
/// Most free buffers of each size that are kept.
const KEPT_MAX: usize = 64;

/// One block of the store, in bytes.
const SINGLE_BYTES: usize = 4096;
const _: () = assert!(SINGLE_BYTES as u64 == BLOCK_BYTES);

/// Longest buffer, in bytes: the longest run that one record may seal.
pub(super) const PRIVATE_BYTES_MAX: usize = 16 * SINGLE_BYTES;

/// Bytes at an aligned address that nobody else sees.
#[derive(Debug)]
pub(super) struct PrivateBuffer {
    bytes: Box<AlignedBuffer>,
}

impl PrivateBuffer {
    /// The bytes; whatever was in them last.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes, to be changed.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

/// Free buffers of one block, and of [`PRIVATE_BYTES_MAX`].
#[derive(Debug, Default)]
pub(super) struct Pool {
    single: Vec<PrivateBuffer>,
    long: Vec<PrivateBuffer>,
    out_bytes: usize,
}

impl Pool {
    /// True if buffers of all these lengths can be had now.
    pub(super) fn has(&self, lengths: impl Iterator<Item = usize>) -> bool {
        let mut out_bytes = self.out_bytes;
        for length_bytes in lengths {
            out_bytes = out_bytes.saturating_add(size_for(length_bytes));
            if length_bytes > PRIVATE_BYTES_MAX || out_bytes > POOL_BYTES_MAX {
                return false;
            }
        }
        true
    }

    /// A buffer of at least so many bytes; `None` if that is too long, or too much is in use.
    pub(super) fn take(&mut self, length_bytes: usize) -> Option<PrivateBuffer> {
        let size = size_for(length_bytes);
        if length_bytes > size || self.out_bytes + size > POOL_BYTES_MAX {
            return None;
        }
        self.out_bytes += size;
        let kept = if size == SINGLE_BYTES {
            self.single.pop()
        } else {
            self.long.pop()
        };
        Some(kept.unwrap_or_else(|| PrivateBuffer {
            bytes: Box::new(AlignedBuffer::new(size)),
        }))
    }

    /// Gives a buffer back.
    pub(super) fn give_back(&mut self, buffer: PrivateBuffer) {
        let size = buffer.bytes.len();
        self.out_bytes = self.out_bytes.saturating_sub(size);
        let kept = if size == SINGLE_BYTES {
            &mut self.single
        } else {
            &mut self.long
        };
        if kept.len() < KEPT_MAX {
            kept.push(buffer);
        }
    }
}

fn size_for(length_bytes: usize) -> usize {
    if length_bytes <= SINGLE_BYTES {
        SINGLE_BYTES
    } else {
        PRIVATE_BYTES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_bounded_and_come_back() {
        let mut pool = Pool::default();
        assert!(pool.take(PRIVATE_BYTES_MAX + 1).is_none());
        let mut taken = Vec::new();
        while let Some(buffer) = pool.take(PRIVATE_BYTES_MAX) {
            assert_eq!(buffer.bytes().as_ptr().addr() % 4096, 0);
            taken.push(buffer);
        }
        assert_eq!(taken.len() * PRIVATE_BYTES_MAX, POOL_BYTES_MAX);
        assert!(pool.take(1).is_none());
        assert!(!pool.has([1].into_iter()));
        for buffer in taken {
            pool.give_back(buffer);
        }
        assert!(pool.has([1, PRIVATE_BYTES_MAX].into_iter()));
        assert!(pool.take(1).is_some());
    }
}
