//! The writing side of a conversation: a bounded queue and a thread of its own.
//!
//! The actor must never wait for a host that does not read. If the queue is full or a write takes too long, the conversation
//! is closed: its reader sees that and treats the host as gone.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Messages that may wait.
const QUEUE: usize = 64;
/// Longest time that a message may wait for room, seconds.
const WRITE_SECONDS: i64 = 5;

/// Sends messages of one conversation, in order.
#[derive(Clone, Debug)]
pub struct Outbox {
    sender: SyncSender<Vec<u8>>,
    closed: Arc<AtomicBool>,
}

impl Outbox {
    pub(super) fn start(fd: Arc<OwnedFd>) -> io::Result<Self> {
        let (sender, receiver) = sync_channel(QUEUE);
        let closed = Arc::new(AtomicBool::new(false));
        let of_thread = Arc::clone(&closed);
        std::thread::Builder::new()
            .name("outbox".into())
            .spawn(move || deliver(&fd, &receiver, &of_thread))?;
        Ok(Self { sender, closed })
    }

    /// Sends a message, whole, or closes the conversation. Never waits.
    pub fn send(&self, message: Vec<u8>) {
        if !self.is_closed() && self.sender.try_send(message).is_err() {
            self.close();
        }
    }

    /// Nothing more is sent.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        // Wakes the thread; a full queue wakes it as well.
        self.sender.try_send(Vec::new()).unwrap_or(());
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }
}

fn deliver(fd: &OwnedFd, messages: &Receiver<Vec<u8>>, closed: &AtomicBool) {
    while let Ok(message) = messages.recv() {
        if closed.load(Ordering::SeqCst) {
            return;
        }
        if !write_all(fd, &message) {
            closed.store(true, Ordering::SeqCst);
            return;
        }
    }
}

fn write_all(fd: &OwnedFd, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let mut polled = [PollFd::new(fd, PollFlags::OUT)];
                let limit = Timespec {
                    tv_sec: WRITE_SECONDS,
                    tv_nsec: 0,
                };
                let writable = poll(&mut polled, Some(&limit)).is_ok_and(|count| count > 0);
                let [ref polled] = polled;
                if !writable || !polled.revents().contains(PollFlags::OUT) {
                    return false;
                }
            }
            Err(_) => return false,
        }
    }
    true
}
