//! An eventfd that wakes the thread of one queue.
//!
//! Called by everything that has news for a queue: the io_uring (completions), the hands (blocking work is done), the
//! barrier (writes may go on) and the device (stop). Knows nothing of why.
//!
//! Invariant: every wake-up is an edge for an epoll, and makes the descriptor readable until the next [`Kick::clear`]. A thread
//! that waits for edges need not clear, which saves it a system call for every wake-up.

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

    /// Wakes the event loop.
    pub fn wake(&self) {
        // By one, so that the counter is never full: a full one would take no wake-up.
        #[allow(clippy::host_endian_bytes, reason = "the kernel's own number")]
        let one = 1_u64.to_ne_bytes();
        if let Err(error) = rustix::io::write(&self.fd, &one) {
            tracing::error!(%error, "cannot wake a queue");
        }
    }

    /// Takes all wake-ups so far, for who waits by `poll(2)`.
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

#[cfg(test)]
mod tests {
    use super::Kick;
    use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};

    const AT_ONCE: Timespec = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    const LONG: Timespec = Timespec {
        tv_sec: 10,
        tv_nsec: 0,
    };

    fn is_readable(kick: &Kick) -> bool {
        let mut wait = [PollFd::new(kick, PollFlags::IN)];
        poll(&mut wait, Some(&AT_ONCE)).unwrap() == 1
    }

    fn edges_of(kick: &Kick) -> rustix::fd::OwnedFd {
        let edges = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&edges, kick, epoll::EventData::new_u64(0), flags).unwrap();
        edges
    }

    fn has_edge(edges: &rustix::fd::OwnedFd, longest: &Timespec) -> bool {
        let mut events = [std::mem::MaybeUninit::uninit(); 2];
        let (found, _) = epoll::wait(edges, events.as_mut_slice(), Some(longest)).unwrap();
        !found.is_empty()
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
    fn every_wake_up_is_an_edge_although_nobody_clears() {
        let kick = Kick::new().unwrap();
        let edges = edges_of(&kick);
        for _ in 0..1000 {
            kick.wake();
            assert!(has_edge(&edges, &AT_ONCE));
            assert!(!has_edge(&edges, &AT_ONCE));
        }
    }

    #[test]
    fn no_wake_up_is_lost_between_two_threads() {
        let kick = Kick::new().unwrap();
        let edges = edges_of(&kick);
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
            let mut seen = 0;
            while seen < 2 * rounds {
                assert!(has_edge(&edges, &LONG), "a wake-up is lost");
                seen = sent.load(std::sync::atomic::Ordering::SeqCst);
            }
        });
    }
}
