//! One io_uring of one queue: moves data between guest memory and the volume's files without a copy.
//!
//! Called by the worker of the queue, on the queue's own thread only (the ring is made there: `SINGLE_ISSUER`). Knows
//! nothing of requests or plans: a transfer carries a number that its completion gives back.
//!
//! Invariants:
//! * A transfer's memory map, vectors and file live in `transfers` until its completion was taken, so the kernel never
//!   sees memory that has been given back. Dropping the ring waits for all of them.
//! * A short transfer is continued from where it stopped; one that stops at nothing is an error.

#![allow(unsafe_code, reason = "the kernel is handed addresses of guest memory")]

use super::buffers::{GuestBuffers, HostPiece};
use super::kick::Kick;
use io_uring::{IoUring, opcode, squeue, types};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use vhost_blk_store::BlockFile;
use vm_memory::GuestMemoryMmap;

/// Entries of the submission queue. More transfers wait in `waiting`; the kernel may hold any number.
const SUBMISSION_ENTRIES: u32 = 128;
/// Longest vector list the kernel takes (`UIO_MAXIOV`).
const VECTORS_MAX: usize = 1024;

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub enum RingUnavailable {
    /// The kernel has no io_uring, or it is forbidden here.
    #[error("io_uring cannot be set up")]
    Setup(#[source] io::Error),
}

/// Direction of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// File to guest memory.
    FromFile,
    /// Guest memory to file.
    ToFile,
}

/// What a transfer moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// Which way.
    pub(super) direction: Direction,
    /// First byte in the file.
    pub(super) file_offset_bytes: u64,
    /// First byte in the buffers.
    pub(super) buffer_offset_bytes: u64,
    /// Number of bytes, not zero.
    pub(super) length_bytes: u64,
}

/// Transfers of one queue.
pub struct Ring {
    /// Dropped first, by its own `Drop` only after all transfers are over.
    uring: IoUring,
    transfers: Vec<Option<Transfer>>,
    free: Vec<usize>,
    /// Transfers that found no room in the submission queue, or have to be continued.
    waiting: VecDeque<usize>,
    in_kernel: usize,
    /// Keeps the registered eventfd open.
    _kick: Arc<Kick>,
}

struct Transfer {
    number: u64,
    direction: Direction,
    fd: RawFd,
    file_offset_bytes: u64,
    /// What is left to move; the kernel holds a pointer to these while the transfer is in flight.
    vectors: Vec<libc::iovec>,
    left_bytes: u64,
    _file: Arc<dyn BlockFile>,
    _memory: Arc<GuestMemoryMmap>,
}

// SAFETY: the raw pointers in `vectors` point into `_memory`, a shared mapping which any thread may name; they are only
// handed to the kernel, never dereferenced here.
unsafe impl Send for Transfer {}

impl std::fmt::Debug for Ring {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Ring")
            .field("in_kernel", &self.in_kernel)
            .field("waiting", &self.waiting)
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring for the calling thread, whose completions wake `kick`.
    ///
    /// # Errors
    /// [`RingUnavailable`] if the kernel refuses.
    pub fn new(kick: Arc<Kick>) -> Result<Self, RingUnavailable> {
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .build(SUBMISSION_ENTRIES)
            // Kernels before 6.0 do not know the flags.
            .or_else(|_| IoUring::new(SUBMISSION_ENTRIES))
            .map_err(RingUnavailable::Setup)?;
        uring
            .submitter()
            .register_eventfd(kick.as_raw_fd())
            .map_err(RingUnavailable::Setup)?;
        Ok(Self {
            uring,
            transfers: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            in_kernel: 0,
            _kick: kick,
        })
    }

    /// Queues a transfer between buffers and a file; it starts with the next [`Self::submit`].
    ///
    /// # Errors
    /// If the buffers are shorter than the transfer, or the file has no descriptor.
    pub(super) fn start(
        &mut self,
        number: u64,
        file: &Arc<dyn BlockFile>,
        buffers: &GuestBuffers,
        span: Span,
    ) -> io::Result<()> {
        let fd = file
            .raw_fd()
            .map(|fd| fd.as_raw_fd())
            .ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))?;
        let pieces = buffers
            .host_pieces(span.buffer_offset_bytes, span.length_bytes)
            .map_err(io::Error::other)?;
        let transfer = Transfer {
            number,
            direction: span.direction,
            fd,
            file_offset_bytes: span.file_offset_bytes,
            vectors: pieces.iter().map(vector).collect(),
            left_bytes: span.length_bytes,
            _file: Arc::clone(file),
            _memory: Arc::clone(buffers.memory()),
        };
        let place = self.free.pop().unwrap_or(self.transfers.len());
        if let Some(slot) = self.transfers.get_mut(place) {
            *slot = Some(transfer);
        } else {
            self.transfers.push(Some(transfer));
        }
        self.waiting.push_back(place);
        Ok(())
    }

    /// Hands waiting transfers to the kernel, as many as it takes.
    ///
    /// # Errors
    /// What `io_uring_enter(2)` answers, but for `EBUSY` and `EAGAIN`, after which the next call tries again.
    pub fn submit(&mut self) -> io::Result<()> {
        while let Some(&place) = self.waiting.front() {
            let Some(Some(transfer)) = self.transfers.get(place) else {
                self.waiting.pop_front();
                continue;
            };
            let entry = transfer.entry(place);
            // SAFETY: the entry's pointers lie in `transfers[place]`, which stays until its completion is taken.
            let pushed = unsafe { self.uring.submission().push(&entry) };
            if pushed.is_ok() {
                self.waiting.pop_front();
                self.in_kernel += 1;
            } else if self.enter(0)? == 0 {
                // The kernel took nothing: it is short of memory. Completions will wake us again.
                return Ok(());
            }
        }
        self.enter(0)?;
        Ok(())
    }

    /// Takes what is complete: the number of each transfer, and how it ended.
    pub fn take_completed(&mut self, completed: &mut Vec<(u64, io::Result<()>)>) {
        let arrived: Vec<(usize, i32)> = self
            .uring
            .completion()
            .map(|entry| {
                (
                    usize::try_from(entry.user_data()).unwrap_or(usize::MAX),
                    entry.result(),
                )
            })
            .collect();
        for (place, result) in arrived {
            self.in_kernel = self.in_kernel.saturating_sub(1);
            let Some(Some(transfer)) = self.transfers.get_mut(place) else {
                continue;
            };
            match transfer.advance(result) {
                Progress::Again => self.waiting.push_back(place),
                Progress::Over(outcome) => {
                    completed.push((transfer.number, outcome));
                    if let Some(slot) = self.transfers.get_mut(place) {
                        *slot = None;
                    }
                    self.free.push(place);
                }
            }
        }
    }

    /// True if nothing is in flight or waiting.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.in_kernel == 0 && self.waiting.is_empty()
    }

    /// Enters the kernel; waits for `wanted` completions. Answers how many entries it took.
    fn enter(&mut self, wanted: usize) -> io::Result<usize> {
        loop {
            match self.uring.submit_and_wait(wanted) {
                Ok(taken) => return Ok(taken),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => {
                    return Ok(0);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The memory of the transfers is given back after this, so the kernel has to be done with it.
        let mut completed = Vec::new();
        self.waiting.clear();
        while self.in_kernel > 0 {
            if let Err(error) = self.enter(1) {
                tracing::error!(%error, "cannot wait for I/O in flight: its memory is kept for good");
                #[allow(clippy::mem_forget, reason = "the kernel may still write to it")]
                std::mem::forget(std::mem::take(&mut self.transfers));
                return;
            }
            self.take_completed(&mut completed);
            self.waiting.clear();
        }
    }
}

enum Progress {
    Again,
    Over(io::Result<()>),
}

impl Transfer {
    fn entry(&self, place: usize) -> squeue::Entry {
        let count = u32::try_from(self.vectors.len().min(VECTORS_MAX)).unwrap_or(0);
        let fd = types::Fd(self.fd);
        match self.direction {
            Direction::FromFile => opcode::Readv::new(fd, self.vectors.as_ptr(), count)
                .offset(self.file_offset_bytes)
                .build(),
            Direction::ToFile => opcode::Writev::new(fd, self.vectors.as_ptr(), count)
                .offset(self.file_offset_bytes)
                .build(),
        }
        .user_data(place as u64)
    }

    /// Takes the kernel's result into account.
    fn advance(&mut self, result: i32) -> Progress {
        let moved = match u64::try_from(result) {
            Ok(moved) => moved,
            Err(_) => {
                let error = io::Error::from_raw_os_error(result.saturating_neg());
                return match error.raw_os_error() {
                    Some(libc::EAGAIN | libc::EINTR) => Progress::Again,
                    _ => Progress::Over(Err(error)),
                };
            }
        };
        if moved == 0 && self.left_bytes > 0 {
            return Progress::Over(Err(io::Error::from(io::ErrorKind::UnexpectedEof)));
        }
        self.left_bytes = self.left_bytes.saturating_sub(moved);
        self.file_offset_bytes = self.file_offset_bytes.saturating_add(moved);
        if self.left_bytes == 0 {
            return Progress::Over(Ok(()));
        }
        let mut skip = usize::try_from(moved).unwrap_or(usize::MAX);
        self.vectors.retain_mut(|vector| {
            let now = vector.iov_len.min(skip);
            skip -= now;
            vector.iov_base = vector.iov_base.wrapping_byte_add(now);
            vector.iov_len -= now;
            vector.iov_len > 0
        });
        Progress::Again
    }
}

fn vector(piece: &HostPiece) -> libc::iovec {
    libc::iovec {
        iov_base: piece.pointer.cast(),
        iov_len: piece.length_bytes,
    }
}
