//! An eventfd that wakes the thread of one queue.
//!
//! Called by everything that has news for a queue: the io_uring (completions), the hands (blocking work is done), the
//! barrier (writes may go on) and the device (stop). Knows nothing of why.
//!
//! Invariants: a wake-up that comes after [`Kick::clear`] makes the descriptor readable; a descriptor that is readable is
//! read by the next clear but one at the latest; a clear with nothing to take costs no system call.

use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Wakes one event loop; many kicks may be seen as one.
#[derive(Debug)]
pub struct Kick {
    fd: OwnedFd,
    /// Somebody has written since the last clear, or is about to.
    rung: AtomicBool,
    /// The kernel may write by itself now.
    kernel_may: AtomicBool,
    /// The kernel may have written since the last clear.
    kernel: AtomicBool,
}

impl Kick {
    /// A new eventfd.
    ///
    /// # Errors
    /// What `eventfd(2)` answers.
    pub fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self {
            fd,
            rung: AtomicBool::new(false),
            kernel_may: AtomicBool::new(false),
            kernel: AtomicBool::new(false),
        })
    }

    /// Wakes the event loop. Cannot fail in a way that loses the wake-up: a full counter is readable too.
    pub fn wake(&self) {
        // Said before and after: a clear in between may find nothing yet, and the next one has to look again.
        self.rung.store(true, Ordering::SeqCst);
        // Any number but zero will do, so the byte order is of no matter.
        if let Err(error) = rustix::io::write(&self.fd, &[1_u8; 8])
            && error != rustix::io::Errno::AGAIN
        {
            tracing::error!(%error, "cannot wake a queue");
        }
        self.rung.store(true, Ordering::SeqCst);
    }

    /// The kernel may write to the descriptor by itself from now on, or not any more: clears have to look as long as it may,
    /// and once after. On the thread that waits only.
    pub(super) fn let_kernel(&self, may: bool) {
        self.kernel_may.store(may, Ordering::Relaxed);
        if may {
            self.kernel.store(true, Ordering::Relaxed);
        }
    }

    /// Takes all wake-ups so far. On the thread that waits only.
    pub fn clear(&self) {
        let rung = self.rung.swap(false, Ordering::SeqCst);
        let may = self.kernel_may.load(Ordering::Relaxed);
        if !self.kernel.swap(may, Ordering::Relaxed) && !rung {
            return;
        }
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

#[cfg(test)]
mod tests {
    use super::Kick;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn is_readable(kick: &Kick) -> bool {
        let mut wait = [PollFd::new(kick, PollFlags::IN)];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut wait, Some(&at_once)).unwrap() == 1
    }

    #[test]
    fn every_wake_up_after_a_clear_is_seen_and_every_clear_takes_it() {
        let kick = Kick::new().unwrap();
        assert!(!is_readable(&kick));
        for _ in 0..3 {
            kick.wake();
            kick.wake();
            assert!(is_readable(&kick));
            kick.clear();
            assert!(!is_readable(&kick));
        }
    }

    #[test]
    fn no_wake_up_is_lost_between_two_threads() {
        let kick = Kick::new().unwrap();
        let sent = std::sync::atomic::AtomicU64::new(0);
        let rounds = 20_000;
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..rounds {
                        sent.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        kick.wake();
                    }
                });
            }
            let mut leave = false;
            while sent.load(std::sync::atomic::Ordering::SeqCst) < 2 * rounds {
                let mut wait = [PollFd::new(&kick, PollFlags::IN)];
                let long = Timespec {
                    tv_sec: 10,
                    tv_nsec: 0,
                };
                assert_eq!(
                    poll(&mut wait, Some(&long)).unwrap(),
                    1,
                    "a wake-up is lost"
                );
                leave = !leave;
                kick.let_kernel(leave);
                kick.clear();
            }
        });
    }

    #[test]
    fn what_the_kernel_writes_is_taken_as_long_as_it_may_and_once_after() {
        let kick = Kick::new().unwrap();
        let kernel_writes = || rustix::io::write(&kick, &[1_u8; 8]).unwrap();
        kick.let_kernel(true);
        kernel_writes();
        kick.clear();
        assert!(!is_readable(&kick));
        // Between a clear and the end of its leave.
        kernel_writes();
        kick.let_kernel(false);
        assert!(is_readable(&kick));
        kick.clear();
        assert!(!is_readable(&kick));
        kick.let_kernel(true);
        kick.clear();
        kick.wake();
        assert!(is_readable(&kick), "a leave is no wake-up");
    }
}
