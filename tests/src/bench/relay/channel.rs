//! Numbers from one thread to another, which is woken only if it sleeps: an available or used ring without its descriptors.
//!
//! Used by the relay's two sides, one sender and one receiver a channel. No more numbers are under way than it was made for.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::{read, write};

/// See the module.
#[derive(Debug)]
pub(super) struct Channel {
    entries: Vec<AtomicU64>,
    sent: AtomicUsize,
    taken: AtomicUsize,
    sleeps: AtomicBool,
    bell: OwnedFd,
}

impl Channel {
    /// For so many numbers at once, and one more that ends it.
    pub(super) fn new(numbers: usize) -> Result<Self> {
        Ok(Self {
            entries: (0..=numbers).map(|_| AtomicU64::new(0)).collect(),
            sent: AtomicUsize::new(0),
            taken: AtomicUsize::new(0),
            sleeps: AtomicBool::new(false),
            bell: eventfd(0, EventfdFlags::CLOEXEC)?,
        })
    }

    /// Puts one in; the receiver may sleep on until [`Self::ring`].
    pub(super) fn send(&self, number: u64) -> Result<()> {
        let sent = self.sent.load(Ordering::Relaxed);
        let under_way = sent - self.taken.load(Ordering::Acquire);
        ensure!(
            under_way < self.entries.len(),
            "the relay's channel is full"
        );
        let entry = self.entries.get(sent % self.entries.len());
        entry.context("an entry")?.store(number, Ordering::Relaxed);
        self.sent.store(sent + 1, Ordering::Release);
        Ok(())
    }

    /// Wakes the receiver if it sleeps and there is something for it.
    #[allow(
        clippy::host_endian_bytes,
        reason = "an eventfd counts in the machine's own order"
    )]
    pub(super) fn ring(&self) -> Result<()> {
        // The receiver says that it sleeps before it looks once more; we have sent before we look whether it does.
        fence(Ordering::SeqCst);
        if self.sleeps.load(Ordering::Relaxed) && !self.is_empty() {
            self.sleeps.store(false, Ordering::Relaxed);
            write(&self.bell, &1u64.to_ne_bytes())?;
        }
        Ok(())
    }

    /// The next number, if there is one.
    pub(super) fn take(&self) -> Option<u64> {
        let taken = self.taken.load(Ordering::Relaxed);
        if taken == self.sent.load(Ordering::Acquire) {
            return None;
        }
        let entry = self.entries.get(taken % self.entries.len())?;
        let number = entry.load(Ordering::Relaxed);
        self.taken.store(taken + 1, Ordering::Release);
        Some(number)
    }

    fn is_empty(&self) -> bool {
        self.taken.load(Ordering::Relaxed) == self.sent.load(Ordering::Acquire)
    }

    /// The receiver is about to sleep; false if there is something to take first.
    pub(super) fn may_sleep(&self) -> bool {
        self.sleeps.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.is_empty() {
            return true;
        }
        self.sleeps.store(false, Ordering::Relaxed);
        false
    }

    /// Sleeps until the bell.
    pub(super) fn sleep(&self) -> Result<()> {
        read(&self.bell, &mut [0; 8])?;
        self.sleeps.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// The next number, once there is one; looks for it for so long before it sleeps.
    pub(super) fn wait(&self, look: Duration) -> Result<u64> {
        let begin = Instant::now();
        loop {
            if let Some(number) = self.take() {
                return Ok(number);
            }
            if begin.elapsed() < look {
                std::hint::spin_loop();
            } else if self.may_sleep() {
                self.sleep()?;
            }
        }
    }

    /// What [`Self::sleep`] waits for.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
