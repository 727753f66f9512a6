//! One io_uring of one queue: moves data between memory and the volume's two data files without a copy.
//!
//! Called by the worker of the queue, on the queue's own thread only (the ring is made there: `SINGLE_ISSUER`). Knows
//! nothing of requests or plans: a transfer carries a number that its completion gives back, with its memory.
//!
//! Invariants:
//! * A transfer's memory and vectors live in `transfers` until its completion was taken, so the kernel never sees memory
//!   that has been given back. Dropping the ring waits for all of them.
//! * Only writes of private memory are joined, and none is kept back for it: the next submission takes all.
//! * A short transfer is continued from where it stopped; one that stops at nothing is an error.
//! * Completions wake the kick only between [`Ring::arm`] and [`Ring::disarm`]: a thread that is awake looks by itself, and
//!   a signal would cost a system call and another pass.

#![allow(unsafe_code, reason = "the kernel is handed addresses of guest memory")]

mod transfer;

use super::buffers::GuestBuffers;
use super::kick::Kick;
use super::slab::Slab;
use io_uring::IoUring;
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
pub(super) use transfer::{Direction, Memory, Span};
use transfer::{Progress, Transfer, Vectors};
use vhost_blk_store::{BlockFile, DataFile};

/// Entries of the submission queue. More transfers wait in `waiting`; the kernel may hold any number.
const SUBMISSION_ENTRIES: u32 = 256;

/// A transfer of so many bytes goes to the kernel by itself: the disk works on it while the next one is made ready.
const LONG_BYTES: u64 = 256 << 10;

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub enum RingUnavailable {
    /// The kernel has no io_uring, or it is forbidden here.
    #[error("io_uring cannot be set up")]
    Setup(#[source] io::Error),
}

/// A transfer that is over.
#[derive(Debug)]
pub(super) struct Completed {
    /// The number it was started with.
    pub(super) number: u64,
    /// Where.
    pub(super) file: DataFile,
    /// What it moved, and which way.
    pub(super) span: Span,
    /// How it ended.
    pub(super) outcome: io::Result<()>,
    /// What it moved from or to.
    pub(super) memory: Memory,
}

/// Transfers of one queue.
pub struct Ring {
    /// Dropped first, by its own `Drop` only after all transfers are over.
    uring: IoUring,
    transfers: Slab<Transfer>,
    /// Transfers that found no room in the submission queue, or have to be continued.
    waiting: VecDeque<u32>,
    /// Writes of private memory since the last submission, which may be neighbours.
    gathered: Vec<Transfer>,
    in_kernel: usize,
    /// Keeps the registered eventfd open.
    _kick: Arc<Kick>,
    /// Keep the registered files open.
    _files: [Arc<dyn BlockFile>; 2],
    /// Tests put results of their own in the kernel's place.
    #[cfg(test)]
    pub(super) fault: Fault,
}

/// What a test makes of the kernel's result for a transfer.
#[cfg(test)]
#[derive(Default)]
pub(super) struct Fault(pub(super) Option<FaultHook>);
#[cfg(test)]
type FaultHook = Box<dyn FnMut(&Transfer, i32) -> i32 + Send>;

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
    /// A ring for the calling thread over base and log, whose completions wake `kick` while it is armed.
    ///
    /// # Errors
    /// [`RingUnavailable`] if the kernel refuses, or a file has no descriptor.
    pub(super) fn new(
        kick: Arc<Kick>,
        files: [Arc<dyn BlockFile>; 2],
    ) -> Result<Self, RingUnavailable> {
        let uring = build().map_err(RingUnavailable::Setup)?;
        let mut descriptors = [-1; 2];
        for (descriptor, file) in descriptors.iter_mut().zip(&files) {
            *descriptor = file
                .raw_fd()
                .map(|fd| fd.as_raw_fd())
                .ok_or_else(|| RingUnavailable::Setup(io::ErrorKind::Unsupported.into()))?;
        }
        uring
            .submitter()
            .register_files(&descriptors)
            .map_err(RingUnavailable::Setup)?;
        uring
            .submitter()
            .register_eventfd(kick.as_raw_fd())
            .map_err(RingUnavailable::Setup)?;
        let mut ring = Self {
            uring,
            transfers: Slab::default(),
            waiting: VecDeque::new(),
            gathered: Vec::new(),
            in_kernel: 0,
            _kick: kick,
            _files: files,
            #[cfg(test)]
            fault: Fault::default(),
        };
        ring.disarm();
        Ok(ring)
    }

    /// Whether the kernel has io_uring for us.
    ///
    /// # Errors
    /// [`RingUnavailable`] if not.
    pub fn probe() -> Result<(), RingUnavailable> {
        build().map(drop).map_err(RingUnavailable::Setup)
    }

    /// Queues a transfer between guest memory and a file; it starts with the next [`Self::submit`].
    ///
    /// # Errors
    /// If the buffers are shorter than the transfer.
    pub(super) fn start_guest(
        &mut self,
        number: u64,
        file: DataFile,
        buffers: &GuestBuffers,
        buffer_offset_bytes: u64,
        span: Span,
    ) -> io::Result<()> {
        let vectors = Vectors::of_guest(buffers, buffer_offset_bytes, span.length_bytes)?;
        let memory = Memory::Guest(Arc::clone(buffers.memory()));
        self.start(Transfer::new(number, file, span, vectors, memory));
        Ok(())
    }

    /// Queues a transfer between the first bytes of a private buffer and a file. Of those to a file that are queued between
    /// two submissions, neighbours go as one, whose error is the error of each.
    ///
    /// # Errors
    /// If the buffer is shorter than the transfer.
    pub(super) fn start_private(
        &mut self,
        number: u64,
        file: DataFile,
        mut buffer: super::pool::PrivateBuffer,
        span: Span,
    ) -> io::Result<()> {
        let vectors = Vectors::of_private(&mut buffer, span.length_bytes)?;
        let memory = Memory::Private(buffer);
        let transfer = Transfer::new(number, file, span, vectors, memory);
        match span.direction {
            // A read that fails must not fail others: old data that nobody has to read may be bad beside it.
            Direction::FromFile => self.start(transfer),
            Direction::ToFile => self.gathered.push(transfer),
        }
        Ok(())
    }

    fn start(&mut self, transfer: Transfer) {
        let place = self.transfers.insert(transfer);
        self.waiting.push_back(place);
    }

    /// One transfer for each stretch of what was gathered: requests come in any order, but the log is filled in one.
    fn join_neighbours(&mut self) {
        let mut gathered = std::mem::take(&mut self.gathered);
        gathered.sort_unstable_by_key(|transfer| transfer.span.file_offset_bytes);
        let mut stretch: Option<Transfer> = None;
        for transfer in gathered.drain(..) {
            match &mut stretch {
                Some(stretch) if stretch.can_join(&transfer) => stretch.join(transfer),
                Some(_) | None => {
                    if let Some(ended) = stretch.replace(transfer) {
                        self.start(ended);
                    }
                }
            }
        }
        if let Some(ended) = stretch {
            self.start(ended);
        }
        self.gathered = gathered;
    }

    /// Hands waiting transfers to the kernel, as many as it takes, and lets it finish what is ready; no system call if there
    /// is neither. Answers whether it was entered, and took what there was.
    ///
    /// # Errors
    /// What `io_uring_enter(2)` answers, but for `EBUSY` and `EAGAIN`, after which the next call tries again.
    pub(super) fn submit(&mut self) -> io::Result<bool> {
        self.join_neighbours();
        let mut entered = false;
        loop {
            let mut submission = self.uring.submission();
            while let Some(&place) = self.waiting.front() {
                let Some(transfer) = self.transfers.get(place) else {
                    self.waiting.pop_front();
                    continue;
                };
                let entry = transfer.entry(place);
                let is_long = transfer.span.length_bytes >= LONG_BYTES;
                // SAFETY: memory and vectors of the entry lie in `transfers[place]` (vectors that the kernel reads later on
                // the heap), which stays until its completion is taken.
                if unsafe { submission.push(&entry) }.is_err() {
                    break;
                }
                self.waiting.pop_front();
                self.in_kernel += 1;
                if is_long {
                    break;
                }
            }
            let ready = submission.taskrun() || submission.cq_overflow();
            let queued = !submission.is_empty();
            drop(submission);
            if !queued && !ready {
                return Ok(entered);
            }
            if self.enter(0)? == 0 {
                // Either there was only something to finish, or the kernel takes no more before completions are taken.
                return Ok(entered || !queued);
            }
            entered = true;
        }
    }

    /// True if there are transfers that the kernel does not have yet.
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty() || !self.gathered.is_empty()
    }

    /// Takes what is complete.
    pub(super) fn take_completed(&mut self, completed: &mut Vec<Completed>) {
        for entry in self.uring.completion() {
            self.in_kernel = self.in_kernel.saturating_sub(1);
            let Ok(place) = u32::try_from(entry.user_data()) else {
                continue;
            };
            let Some(transfer) = self.transfers.get_mut(place) else {
                continue;
            };
            let result = entry.result();
            #[cfg(test)]
            let result = match &mut self.fault.0 {
                Some(fault) => fault(transfer, result),
                None => result,
            };
            match transfer.advance(result) {
                Progress::Again => self.waiting.push_back(place),
                Progress::Over(outcome) => {
                    if let Some(transfer) = self.transfers.remove(place) {
                        transfer.end(outcome, completed);
                    }
                }
            }
        }
    }

    /// From now on completions wake the kick. Answers true if there is something to take already.
    pub(super) fn arm(&mut self) -> bool {
        let completion = self.uring.completion();
        completion.enable_eventfd();
        // The kernel looks at the flag after it has made a completion known, we look for one after we have set it.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        drop(completion);
        let news = !self.uring.completion().is_empty();
        let waiting = self.has_waiting();
        let submission = self.uring.submission();
        let left = waiting || !submission.is_empty();
        news || left || submission.taskrun() || submission.cq_overflow()
    }

    /// Completions do not wake the kick any more.
    pub(super) fn disarm(&mut self) {
        self.uring.completion().disable_eventfd();
    }

    /// True if nothing is in flight or waiting.
    #[must_use]
    pub(super) fn is_idle(&self) -> bool {
        self.in_kernel == 0 && !self.has_waiting()
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

/// With all that saves work, or with what an older kernel knows (6.1, 6.0, anything).
fn build() -> io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(SUBMISSION_ENTRIES)
        .or_else(|_| {
            IoUring::builder()
                .setup_single_issuer()
                .setup_coop_taskrun()
                .setup_taskrun_flag()
                .build(SUBMISSION_ENTRIES)
        })
        .or_else(|_| IoUring::new(SUBMISSION_ENTRIES))
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

#[cfg(test)]
mod tests;
