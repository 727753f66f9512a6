//! Guest memory of one request: ranges that are known to be mapped, and the mapping that keeps them so.
//!
//! Made by the device from checked descriptors; used by the ring (addresses) and by the blocking path (copies). Every
//! clone holds the memory map it was made from, so that a front end that takes a region away while I/O is in flight
//! cannot pull memory from under the kernel.
//!
//! Invariant: all ranges lie inside one region each, and their lengths sum up to `length_bytes`.

use smallvec::SmallVec;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};

/// A range of guest-physical memory, not checked yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// Guest-physical address of the first byte.
    pub address: u64,
    /// Number of bytes.
    pub length_bytes: u32,
}

/// The guest named memory that it does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest memory at {0:#x} is not mapped")]
pub struct NotMapped(pub u64);

/// A piece of mapped memory of this process that belongs to the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostPiece {
    /// First byte.
    pub(super) pointer: *mut u8,
    /// Number of bytes, not zero.
    pub(super) length_bytes: usize,
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    address: GuestAddress,
    length_bytes: usize,
    /// Address in this process, valid as long as the map is held. Looked up once.
    host: usize,
}

/// Pieces of a request; the usual few need no allocation.
const INLINE: usize = 2;

/// Guest memory of one request.
#[derive(Clone)]
pub struct GuestBuffers {
    memory: Arc<GuestMemoryMmap>,
    pieces: SmallVec<[Piece; INLINE]>,
    length_bytes: u64,
}

impl std::fmt::Debug for GuestBuffers {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("GuestBuffers")
            .field("pieces", &self.pieces)
            .finish_non_exhaustive()
    }
}

impl GuestBuffers {
    /// Checks that all ranges are mapped. Empty ranges are dropped.
    ///
    /// # Errors
    /// [`NotMapped`] if a byte of them is not.
    pub fn new(memory: Arc<GuestMemoryMmap>, ranges: &[GuestRange]) -> Result<Self, NotMapped> {
        let mut pieces = SmallVec::with_capacity(ranges.len());
        let mut length_bytes = 0_u64;
        for range in ranges {
            let mut address = GuestAddress(range.address);
            let wanted =
                usize::try_from(range.length_bytes).map_err(|_| NotMapped(range.address))?;
            for slice in memory.get_slices(address, wanted) {
                let slice = slice.map_err(|_| NotMapped(range.address))?;
                let length = slice.len();
                pieces.push(Piece {
                    address,
                    length_bytes: length,
                    host: slice.ptr_guard_mut().as_ptr().expose_provenance(),
                });
                address = GuestAddress(address.0.wrapping_add(length as u64));
                length_bytes = length_bytes.saturating_add(length as u64);
            }
        }
        Ok(Self {
            memory,
            pieces,
            length_bytes,
        })
    }

    /// No memory at all, for requests without data.
    #[must_use]
    pub fn empty(memory: Arc<GuestMemoryMmap>) -> Self {
        Self {
            memory,
            pieces: SmallVec::new(),
            length_bytes: 0,
        }
    }

    /// Total length in bytes.
    #[must_use]
    pub fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// Copies from guest memory, starting `offset_bytes` into it.
    ///
    /// # Errors
    /// If the range is longer than the buffers.
    pub fn read_at(&self, offset_bytes: u64, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        let mut rest = into;
        for part in self.parts(offset_bytes, rest.len() as u64) {
            let (now, later) = rest.split_at_mut(part.length_bytes);
            self.memory.read_slice(now, part.address)?;
            rest = later;
        }
        if rest.is_empty() {
            Ok(())
        } else {
            Err(GuestMemoryError::InvalidBackendAddress)
        }
    }

    /// Copies to guest memory, starting `offset_bytes` into it.
    ///
    /// # Errors
    /// If the range is longer than the buffers.
    pub fn write_at(&self, offset_bytes: u64, from: &[u8]) -> Result<(), GuestMemoryError> {
        let mut rest = from;
        for part in self.parts(offset_bytes, rest.len() as u64) {
            let (now, later) = rest.split_at(part.length_bytes);
            self.memory.write_slice(now, part.address)?;
            rest = later;
        }
        if rest.is_empty() {
            Ok(())
        } else {
            Err(GuestMemoryError::InvalidBackendAddress)
        }
    }

    /// Fills a range of the buffers with zeroes.
    ///
    /// # Errors
    /// If the range is longer than the buffers.
    pub fn zero(&self, offset_bytes: u64, length_bytes: u64) -> Result<(), GuestMemoryError> {
        const ZEROES: [u8; 4096] = [0; 4096];
        let mut done = 0;
        while done < length_bytes {
            let now = (length_bytes - done).min(ZEROES.len() as u64);
            let zeroes = ZEROES.get(..usize::try_from(now).unwrap_or(ZEROES.len()));
            self.write_at(offset_bytes + done, zeroes.unwrap_or(&ZEROES))?;
            done += now;
        }
        Ok(())
    }

    /// True if every piece starts and ends on a multiple of `alignment_bytes` in this process.
    #[must_use]
    pub fn aligned_to(&self, alignment_bytes: u64) -> bool {
        self.pieces.iter().all(|piece| {
            (piece.length_bytes as u64).is_multiple_of(alignment_bytes)
                && (piece.host as u64).is_multiple_of(alignment_bytes)
        })
    }

    /// The memory map that has to live as long as pointers from [`Self::host_pieces`] are in use.
    pub(super) fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }

    /// Addresses in this process of a range of the buffers. They are valid as long as [`Self::memory`] is held.
    ///
    /// # Errors
    /// If the range is longer than the buffers.
    pub(super) fn host_pieces(
        &self,
        offset_bytes: u64,
        length_bytes: u64,
    ) -> Result<SmallVec<[HostPiece; INLINE]>, GuestMemoryError> {
        let mut found = SmallVec::new();
        let mut total = 0_u64;
        for part in self.parts(offset_bytes, length_bytes) {
            found.push(HostPiece {
                pointer: std::ptr::with_exposed_provenance_mut(part.host),
                length_bytes: part.length_bytes,
            });
            total += part.length_bytes as u64;
        }
        if total == length_bytes {
            Ok(found)
        } else {
            Err(GuestMemoryError::InvalidBackendAddress)
        }
    }

    /// The pieces of a range of the buffers, in order; shorter than asked if the buffers are.
    fn parts(&self, offset_bytes: u64, length_bytes: u64) -> impl Iterator<Item = Piece> + '_ {
        let mut skip = offset_bytes;
        let mut left = length_bytes;
        self.pieces.iter().filter_map(move |piece| {
            let length = piece.length_bytes as u64;
            if skip >= length {
                skip -= length;
                return None;
            }
            let take = (length - skip).min(left);
            if take == 0 {
                return None;
            }
            let before = usize::try_from(skip).ok()?;
            let part = Piece {
                address: GuestAddress(piece.address.0 + skip),
                // A part is no longer than its piece, whose length is a usize.
                length_bytes: usize::try_from(take).ok()?,
                host: piece.host + before,
            };
            skip = 0;
            left -= take;
            Some(part)
        })
    }
}
