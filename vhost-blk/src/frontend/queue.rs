//! The handle of one queue: starts its thread, gives it orders, hears of its death.
//!
//! Owned by `handler`, used on the thread of the connection. What the thread does is in `serving`.
//!
//! Invariants:
//! * An order is over when the thread has said so: after `refresh` it goes by the new settings and by the new memory map, after
//!   `stop` nothing of the ring is in flight.
//! * A thread that dies is told: to the log, to the control socket, and to the front end, whose connection is cut.

use super::dirty_log::DirtyLog;
use super::handover;
use super::inflight::Region;
use super::serving::Server;
use crate::engine::{Kick, VolumeEngine};
use std::fs::File;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vhost_blk_wire::event::Event as WireEvent;
use vhost_user_backend::{VringMutex, VringT};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// Guest memory as the front end shares it; the map is replaced as a whole.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
/// What the front end has said about a ring, and how to interrupt the guest. Locked when it is set up and once for each
/// interrupt, never for a request.
pub(super) type Vring = VringMutex<Memory>;

/// Longest wait for a queue's thread to settle. Only a disk that hangs takes so long.
const SETTLE_MAX: Duration = Duration::from_secs(60);

/// What all queues of a connection share.
#[derive(Debug)]
pub(super) struct Shared {
    /// The disk.
    pub(super) volume: Arc<VolumeEngine>,
    /// Guest memory.
    pub(super) memory: Memory,
    /// The front end's connection.
    pub(super) connection: UnixStream,
    /// Longest time a thread looks for work before it sleeps.
    pub(super) poll_max: Duration,
}

impl Shared {
    /// Tells the log and the control socket that a queue is of no use any more.
    pub(super) fn tell_failure(&self, queue: usize, reason: String) {
        tracing::error!(volume = %self.volume.settings.name, queue, reason, "a queue has failed");
        self.volume.tell(WireEvent::QueueFailed {
            volume: self.volume.settings.name.clone(),
            queue: u16::try_from(queue).unwrap_or(u16::MAX),
            reason,
        });
    }

    /// Tells that new requests are taken before all that a killed daemon left is done again.
    pub(super) fn tell_overtaken(&self, left: usize) {
        let volume = &self.volume.settings.name;
        tracing::warn!(%volume, left, "new requests go before some that a killed daemon left");
        self.volume.tell(WireEvent::RequestsOvertaken {
            volume: volume.clone(),
            requests: u32::try_from(left).unwrap_or(u32::MAX),
        });
    }
}

/// How a ring is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// Settle and publish. What is held gets so long to finish, then it is left for who starts the ring again: in the
    /// in-flight memory, or by turning the ring's position back.
    Publish {
        /// With in-flight memory only.
        patience: Duration,
    },
    /// Settle and publish nothing: the front end has gone, and counts what was published itself.
    Forget,
    /// Settle and forget what is in flight: the device is reset.
    Reset,
}

/// What a queue's thread is told to do.
#[derive(Debug)]
pub(super) enum Order {
    /// Look at the vring and at guest memory anew; start the ring if it is ready.
    Refresh {
        /// What the guest kicks by.
        kick: Option<Arc<File>>,
        /// In-flight memory for a ring that starts now.
        tracking: Option<Arc<Region>>,
        /// Where to mark what is written.
        log: Option<Arc<DirtyLog>>,
    },
    /// Stop the ring.
    Stop(Stop),
}

/// An order, and where its end is told, with the ring's position.
#[derive(Debug)]
pub(super) struct Ask {
    /// What to do.
    pub(super) order: Order,
    /// Where to tell.
    pub(super) done: SyncSender<u16>,
}

/// The front end's error descriptor.
#[derive(Clone, Debug, Default)]
pub(super) struct ErrorCall(Arc<Mutex<Option<File>>>);

impl ErrorCall {
    pub(super) fn set(&self, file: Option<File>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = file;
    }

    /// A copy of it.
    pub(super) fn copy(&self) -> io::Result<Option<File>> {
        handover::copy(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Tells the front end that a ring is broken.
    pub(super) fn signal(&self) {
        let file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut file) = file.as_ref()
            && let Err(error) = file.write_all(&[1; 8])
        {
            tracing::debug!(%error, "a front end cannot be told of a broken ring");
        }
    }
}

/// One queue of a connection.
pub(super) struct Queue {
    shared: Arc<Shared>,
    index: usize,
    /// Settings. Written by `handler`, read by the thread when it is told to.
    pub(super) vring: Vring,
    /// What the guest kicks by.
    pub(super) kick: Option<Arc<File>>,
    /// How the guest is interrupted: what `vring` has, which does not give it back.
    pub(super) call: Option<File>,
    /// How the front end is told of a broken ring.
    pub(super) error_call: ErrorCall,
    thread: Option<Thread>,
}

#[derive(Debug)]
struct Thread {
    asks: Sender<Ask>,
    wake: Arc<Kick>,
    handle: JoinHandle<()>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Queue")
            .field("index", &self.index)
            .field("thread", &self.thread)
            .finish_non_exhaustive()
    }
}

impl Queue {
    /// Queue number `index`; its thread is started with its ring.
    pub(super) fn new(shared: &Arc<Shared>, index: usize, size_max: u16) -> io::Result<Self> {
        let vring = Vring::new(shared.memory.clone(), size_max).map_err(io::Error::other)?;
        Ok(Self {
            shared: Arc::clone(shared),
            index,
            vring,
            kick: None,
            call: None,
            error_call: ErrorCall::default(),
            thread: None,
        })
    }

    /// Lets the thread go by what has been set since; starts thread and ring if they can start.
    pub(super) fn refresh(
        &mut self,
        tracking: Option<&Arc<Region>>,
        log: Option<&Arc<DirtyLog>>,
    ) -> io::Result<()> {
        if self.thread.is_none() {
            if self.kick.is_none() {
                return Ok(());
            }
            self.thread = Some(self.start_thread()?);
        }
        let order = Order::Refresh {
            kick: self.kick.clone(),
            tracking: tracking.map(Arc::clone),
            log: log.map(Arc::clone),
        };
        self.ask(order)?;
        Ok(())
    }

    /// Stops the ring; answers its position in the available ring.
    pub(super) fn stop(&mut self, how: Stop) -> io::Result<u16> {
        match self.ask(Order::Stop(how))? {
            Some(position) => Ok(position),
            None => Ok(self.vring.queue_next_avail()),
        }
    }

    fn start_thread(&self) -> io::Result<Thread> {
        let wake = Arc::new(Kick::new()?);
        let (asks, incoming) = channel();
        let server = Server::new(
            Arc::clone(&self.shared),
            self.index,
            self.vring.clone(),
            self.error_call.clone(),
            Arc::clone(&wake),
        )?;
        let handle = spawn(
            Arc::clone(&self.shared),
            self.index,
            incoming,
            move |incoming| server.run(incoming),
        )?;
        Ok(Thread { asks, wake, handle })
    }

    /// Gives an order and waits for its end; `None` if there is no thread.
    fn ask(&mut self, order: Order) -> io::Result<Option<u16>> {
        let Some(thread) = &self.thread else {
            return Ok(None);
        };
        let died = || io::Error::other("the queue's thread has died");
        let (done, answer) = sync_channel(1);
        thread.asks.send(Ask { order, done }).map_err(|_| died())?;
        thread.wake.wake();
        match answer.recv_timeout(SETTLE_MAX) {
            Ok(position) => Ok(Some(position)),
            Err(RecvTimeoutError::Timeout) => Err(io::ErrorKind::TimedOut.into()),
            Err(RecvTimeoutError::Disconnected) => Err(died()),
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let Some(Thread { asks, wake, handle }) = self.thread.take() else {
            return;
        };
        // The thread sees that nobody can give orders any more, settles and ends.
        drop(asks);
        wake.wake();
        let deadline = Instant::now() + SETTLE_MAX;
        while !handle.is_finished() {
            if Instant::now() > deadline {
                tracing::error!(queue = self.index, "a queue's thread does not end");
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // A panic has been told when it happened.
        drop(handle.join());
    }
}

/// Runs `serve` on a thread of its own, and tells if it fails.
fn spawn(
    shared: Arc<Shared>,
    index: usize,
    incoming: Receiver<Ask>,
    serve: impl FnOnce(&Receiver<Ask>) -> io::Result<()> + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let name = format!("queue {index}");
    std::thread::Builder::new().name(name).spawn(move || {
        let reason = match catch_unwind(AssertUnwindSafe(|| serve(&incoming))) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "its thread has panicked".to_owned(),
        };
        shared.tell_failure(index, reason);
        if let Err(error) = shared.connection.shutdown(Shutdown::Both) {
            tracing::debug!(%error, "the front end has gone already");
        }
    })
}

#[cfg(test)]
mod tests;
