//! An eventfd that wakes the thread of one queue.
//!
//! Called by everything that has news for a queue: the io_uring (completions), the hands (blocking work is done), the
//! barrier (writes may go on) and the device (stop). Knows nothing of why.

use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// Wakes one event loop; many kicks may be seen as one.
#[derive(Debug)]
pub struct Kick {
    fd: OwnedFd,
}

impl Kick {
    /// A new eventfd.
    ///
    /// # Errors
    /// What `eventfd(2)` answers.
    pub fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self { fd })
    }

    /// Wakes the event loop. Cannot fail in a way that loses the wake-up: a full counter is readable too.
    pub fn wake(&self) {
        // Any number but zero will do, so the byte order is of no matter.
        if let Err(error) = rustix::io::write(&self.fd, &[1_u8; 8])
            && error != rustix::io::Errno::AGAIN
        {
            tracing::error!(%error, "cannot wake a queue");
        }
    }

    /// Takes all wake-ups so far.
    pub fn clear(&self) {
        let mut count = [0_u8; 8];
        if let Err(error) = rustix::io::read(&self.fd, &mut count)
            && error != rustix::io::Errno::AGAIN
        {
            tracing::error!(%error, "cannot read a wake-up");
        }
    }
}

impl AsFd for Kick {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Kick {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
