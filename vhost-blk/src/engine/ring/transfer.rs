//! One transfer of a ring: its memory, what is left of it, and what the kernel's answer means.
//!
//! Used by `ring` alone. Transfers that lie one behind the other in a file may be joined: one for the kernel, and a share of
//! it for each that was asked for.
//!
//! Invariants:
//! * `vectors` point into the memory of `shares`; a list of several lies on the heap, so that moving the transfer does not
//!   move what the kernel reads.
//! * The shares are in the order of the file and fill the span.

use super::super::buffers::{GuestBuffers, HostPiece};
use super::super::pool::PrivateBuffer;
use super::Completed;
use io_uring::{opcode, squeue, types};
use smallvec::{SmallVec, smallvec};
use std::io;
use std::sync::Arc;
use vhost_blk_store::DataFile;
use vm_memory::GuestMemoryMmap;

/// Longest vector list the kernel takes (`UIO_MAXIOV`).
const VECTORS_MAX: usize = 1024;

/// Most bytes of joined transfers: as many as devices commonly take in one command.
const JOINED_BYTES_MAX: u64 = 256 << 10;

/// Direction of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Direction {
    /// File to memory.
    FromFile,
    /// Memory to file.
    ToFile,
}

/// What a transfer moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Span {
    /// Which way.
    pub(in super::super) direction: Direction,
    /// First byte in the file.
    pub(in super::super) file_offset_bytes: u64,
    /// Number of bytes, not zero.
    pub(in super::super) length_bytes: u64,
}

/// Holds what the kernel reads or writes.
#[allow(dead_code, reason = "the guest's memory is only held")]
#[derive(Debug)]
pub(in super::super) enum Memory {
    /// The guest's.
    Guest(Arc<GuestMemoryMmap>),
    /// Our own.
    Private(PrivateBuffer),
    /// Given away.
    None,
}

/// Addresses of what is left to move.
#[derive(Debug)]
pub(super) enum Vectors {
    /// The usual single piece: told to the kernel by value.
    One(libc::iovec),
    /// On the heap: the kernel may read it after the submission.
    Many(Vec<libc::iovec>),
}

#[derive(Debug)]
pub(in super::super) struct Transfer {
    pub(in super::super) file: DataFile,
    pub(in super::super) span: Span,
    shares: SmallVec<[Share; 1]>,
    vectors: Vectors,
    left_bytes: u64,
}

/// What one caller asked for.
#[derive(Debug)]
struct Share {
    number: u64,
    length_bytes: u64,
    memory: Memory,
}

// SAFETY: the raw pointers in `vectors` point into the memory of `shares`, shared mappings which any thread may name, or
// buffers on the heap that stay where they are when the transfer moves; they are only handed to the kernel, never
// dereferenced here.
unsafe impl Send for Transfer {}

pub(super) enum Progress {
    Again,
    Over(io::Result<()>),
}

impl Vectors {
    pub(super) fn of_guest(
        buffers: &GuestBuffers,
        offset_bytes: u64,
        length_bytes: u64,
    ) -> io::Result<Self> {
        let pieces = buffers
            .host_pieces(offset_bytes, length_bytes)
            .map_err(io::Error::other)?;
        Ok(match pieces.as_slice() {
            [piece] => Self::One(vector(piece)),
            pieces => Self::Many(pieces.iter().map(vector).collect()),
        })
    }

    pub(super) fn of_private(buffer: &mut PrivateBuffer, length_bytes: u64) -> io::Result<Self> {
        let bytes = usize::try_from(length_bytes)
            .ok()
            .and_then(|length| buffer.bytes_mut().get_mut(..length))
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self::One(libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        }))
    }

    fn as_slice(&self) -> &[libc::iovec] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }

    fn append(&mut self, others: &Self) {
        if let Self::One(one) = self {
            *self = Self::Many(vec![*one]);
        }
        if let Self::Many(many) = self {
            many.extend_from_slice(others.as_slice());
        }
    }

    fn skip(&mut self, moved_bytes: usize) {
        let mut skip = moved_bytes;
        let mut cut = |vector: &mut libc::iovec| {
            let now = vector.iov_len.min(skip);
            skip -= now;
            vector.iov_base = vector.iov_base.wrapping_byte_add(now);
            vector.iov_len -= now;
            vector.iov_len > 0
        };
        match self {
            Self::One(vector) => {
                cut(vector);
            }
            Self::Many(vectors) => vectors.retain_mut(cut),
        }
    }
}

impl Transfer {
    pub(super) fn new(
        number: u64,
        file: DataFile,
        span: Span,
        vectors: Vectors,
        memory: Memory,
    ) -> Self {
        Self {
            file,
            span,
            shares: smallvec![Share {
                number,
                length_bytes: span.length_bytes,
                memory,
            }],
            vectors,
            left_bytes: span.length_bytes,
        }
    }

    /// True if `next` goes on where this one ends and both are not too long for one. Neither has been begun.
    pub(super) fn can_join(&self, next: &Self) -> bool {
        self.file == next.file
            && self.span.direction == next.span.direction
            && self.span.file_offset_bytes + self.span.length_bytes == next.span.file_offset_bytes
            && self.span.length_bytes + next.span.length_bytes <= JOINED_BYTES_MAX
            && self.vectors.as_slice().len() + next.vectors.as_slice().len() <= VECTORS_MAX
    }

    /// Takes over what `next` would have moved; [`Self::can_join`] was asked.
    pub(super) fn join(&mut self, next: Self) {
        self.span.length_bytes += next.span.length_bytes;
        self.left_bytes += next.left_bytes;
        self.vectors.append(&next.vectors);
        self.shares.extend(next.shares);
    }

    /// Tells each share how the whole ended.
    pub(super) fn end(self, outcome: io::Result<()>, completed: &mut Vec<Completed>) {
        let mut file_offset_bytes = self.span.file_offset_bytes;
        for share in self.shares {
            let span = Span {
                direction: self.span.direction,
                file_offset_bytes,
                length_bytes: share.length_bytes,
            };
            file_offset_bytes += share.length_bytes;
            completed.push(Completed {
                number: share.number,
                file: self.file,
                span,
                outcome: outcome
                    .as_ref()
                    .map_or_else(|error| Err(same(error)), |()| Ok(())),
                memory: share.memory,
            });
        }
    }

    /// True if no guest can change what is moved.
    #[cfg(test)]
    pub(in super::super) fn is_private(&self) -> bool {
        let mut shares = self.shares.iter();
        shares.all(|share| matches!(share.memory, Memory::Private(_)))
    }

    pub(super) fn entry(&self, place: u32) -> squeue::Entry {
        let fd = types::Fixed(match self.file {
            DataFile::Base => 0,
            DataFile::Log => 1,
        });
        let at = self.span.file_offset_bytes + (self.span.length_bytes - self.left_bytes);
        let entry = match (&self.vectors, self.span.direction) {
            (Vectors::One(one), Direction::FromFile) => {
                opcode::Read::new(fd, one.iov_base.cast(), length(one))
                    .offset(at)
                    .build()
            }
            (Vectors::One(one), Direction::ToFile) => {
                opcode::Write::new(fd, one.iov_base.cast_const().cast(), length(one))
                    .offset(at)
                    .build()
            }
            (Vectors::Many(many), Direction::FromFile) => {
                opcode::Readv::new(fd, many.as_ptr(), count(many))
                    .offset(at)
                    .build()
            }
            (Vectors::Many(many), Direction::ToFile) => {
                opcode::Writev::new(fd, many.as_ptr(), count(many))
                    .offset(at)
                    .build()
            }
        };
        entry.user_data(u64::from(place))
    }

    /// Takes the kernel's result into account.
    pub(super) fn advance(&mut self, result: i32) -> Progress {
        let Ok(moved) = u64::try_from(result) else {
            let error = io::Error::from_raw_os_error(result.saturating_neg());
            return match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => Progress::Again,
                _ => Progress::Over(Err(error)),
            };
        };
        if moved == 0 && self.left_bytes > 0 {
            return Progress::Over(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        self.left_bytes = self.left_bytes.saturating_sub(moved);
        if self.left_bytes == 0 {
            return Progress::Over(Ok(()));
        }
        self.vectors
            .skip(usize::try_from(moved).unwrap_or(usize::MAX));
        Progress::Again
    }
}

fn same(error: &io::Error) -> io::Error {
    let code = error.raw_os_error();
    code.map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}

/// A request is at most 64 MiB, so a piece fits.
fn length(vector: &libc::iovec) -> u32 {
    u32::try_from(vector.iov_len).unwrap_or(u32::MAX)
}

fn count(vectors: &[libc::iovec]) -> u32 {
    u32::try_from(vectors.len().min(VECTORS_MAX)).unwrap_or(0)
}

fn vector(piece: &HostPiece) -> libc::iovec {
    libc::iovec {
        iov_base: piece.pointer.cast(),
        iov_len: piece.length_bytes,
    }
}
