//! The device of one connection: what the vhost-user crate calls, and the thread of each queue.
//!
//! Made by `listener` for each front end. Knows the engine's worker and the guest's rings, not the disk.
//!
//! What the vhost-user-backend crate leaves to us, each a trap that was met:
//! * `handle_event` never answers `Err`: that would end the queue's thread silently.
//! * GET_VRING_BASE does not wait for a running `handle_event` or for I/O: `stop_vring` does both. Requests that are finished
//!   are published, the others (parked by a hold, say) are given back by turning the ring's position back.
//! * `enable_notification` goes on answering "there is more" for a ring with a bad index: a pass ends when it found nothing.

use super::completion::InOrder;
use super::config_space::{self, QUEUE_SIZE_MAX};
use super::request::{Disk, Parsed, RawDescriptor, parse};
use crate::engine::{Kick, Outcome, VolumeEngine, Worker};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

/// Guest memory as the front end shares it.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringMutex<Memory>;

/// Longest wait for a queue's thread to settle. Only a disk that hangs, or a thread that has died, takes so long.
const SETTLE_MAX: Duration = Duration::from_secs(60);

/// The device.
#[derive(Debug)]
pub(super) struct Device {
    volume: Arc<VolumeEngine>,
    memory: Memory,
    queues: Vec<Queue>,
    event_idx: AtomicBool,
    /// The crate forgets these when it drops; the listener closes them.
    exit_fds: Mutex<Vec<RawFd>>,
}

#[derive(Debug)]
struct Queue {
    kick: Arc<Kick>,
    work: Mutex<Work>,
    stop: Mutex<Option<Stop>>,
    stopped: Condvar,
}

#[derive(Debug)]
struct Work {
    worker: Worker,
    order: InOrder,
}

/// What a queue's thread is asked to do before anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// Settle, publish, and turn the ring back to the first unanswered request.
    GiveBack,
    /// Settle and forget: the device is reset.
    Reset,
}

impl Device {
    pub(super) fn new(
        volume: Arc<VolumeEngine>,
        memory: Memory,
        num_queues: u16,
    ) -> io::Result<Self> {
        let queues = (0..num_queues)
            .map(|_| {
                let kick = Arc::new(Kick::new()?);
                Ok(Queue {
                    work: Mutex::new(Work {
                        worker: Worker::new(Arc::clone(&volume), Arc::clone(&kick)),
                        order: InOrder::default(),
                    }),
                    kick,
                    stop: Mutex::new(None),
                    stopped: Condvar::new(),
                })
            })
            .collect::<io::Result<_>>()?;
        Ok(Self {
            volume,
            memory,
            queues,
            event_idx: AtomicBool::new(false),
            exit_fds: Mutex::new(Vec::new()),
        })
    }

    /// The wake-up of each queue, to be watched by its thread under the number [`Self::kick_event`].
    pub(super) fn kicks(&self) -> impl Iterator<Item = &Arc<Kick>> {
        self.queues.iter().map(|queue| &queue.kick)
    }

    /// Number of the wake-up event. The crate uses numbers up to the number of queues itself.
    pub(super) fn kick_event(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX - 1) + 1
    }

    /// Settles all queues. Called when the front end has gone, while the queues' threads still run.
    pub(super) fn settle(&self) {
        for index in 0..self.queues.len() {
            if let Err(error) = self.stop(index, Stop::Reset) {
                tracing::error!(volume = %self.volume.settings.name, index, %error, "a queue does not settle");
            }
        }
    }

    /// Descriptors that the crate has leaked by dropping its event loops.
    pub(super) fn take_exit_fds(&self) -> Vec<RawFd> {
        std::mem::take(&mut *self.exit_fds.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn num_queues_u16(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    /// Asks the queue's thread to stop and waits until it has.
    fn stop(&self, index: usize, how: Stop) -> io::Result<()> {
        let queue = self.queues.get(index).ok_or(io::ErrorKind::InvalidInput)?;
        let mut stop = queue.lock_stop();
        *stop = Some(how);
        queue.kick.wake();
        let deadline = Instant::now() + SETTLE_MAX;
        while stop.is_some() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            stop = queue
                .stopped
                .wait_timeout(stop, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    /// One pass of a queue's thread.
    fn pass(&self, queue: &Queue, vring: &Vring) {
        queue.kick.clear();
        // Read once: a stop that is asked for later has its own wake-up.
        let stop = *queue.lock_stop();
        let mut work = queue.work.lock().unwrap_or_else(PoisonError::into_inner);
        let mut published = 0;
        loop {
            work.worker.run();
            published += work.publish(vring);
            let arrived = if stop.is_some() {
                0
            } else {
                self.take_chains(&mut work, vring)
            };
            if arrived == 0 {
                break;
            }
        }
        if let Some(how) = stop {
            published += stop_here(&mut work, vring, how);
        }
        drop(work);
        if published > 0 {
            notify(vring);
        }
        if stop.is_some() {
            *queue.lock_stop() = None;
            queue.stopped.notify_all();
        }
    }

    /// Takes all chains that the guest has made available; answers how many there were.
    fn take_chains(&self, work: &mut Work, vring: &Vring) -> usize {
        let memory = self.memory.memory().into_inner();
        let disk = Disk {
            size_bytes: self.volume.size_bytes(),
            read_only: self.volume.settings.read_only,
            serial: &self.volume.settings.serial,
        };
        let mut arrived = 0;
        let mut looked_again = false;
        loop {
            let mut found = Vec::new();
            {
                let mut state = vring.get_mut();
                if !state.is_enabled() || !state.get_queue().ready() {
                    return arrived;
                }
                // A guest that makes the same entries available again and again gets no more than its ring holds.
                let room = usize::from(state.get_queue().size()).saturating_sub(work.order.len());
                if let Err(error) = state.disable_notification() {
                    tracing::warn!(%error, "a guest ring cannot be reached");
                    return arrived;
                }
                while found.len() < room
                    && let Some(chain) = state
                        .get_queue_mut()
                        .pop_descriptor_chain(Arc::clone(&memory))
                {
                    found.push(chain);
                }
                if found.is_empty() {
                    // A chain may have come between looking and asking to be told, so look once more. Not for
                    // ever: a ring whose index is broken says "there is more" each time.
                    match state.enable_notification() {
                        Ok(true) if !looked_again && room > 0 => {
                            looked_again = true;
                            continue;
                        }
                        Ok(_) => return arrived,
                        Err(error) => {
                            tracing::warn!(%error, "a guest ring cannot be reached");
                            return arrived;
                        }
                    }
                }
            }
            looked_again = false;
            arrived += found.len();
            for chain in found {
                let head = chain.head_index();
                let descriptors = chain.map(|descriptor| RawDescriptor {
                    address: descriptor.addr().0,
                    length_bytes: descriptor.len(),
                    device_writes: descriptor.is_write_only(),
                });
                match parse(&memory, descriptors, disk) {
                    Parsed::Engine(request, answer) => {
                        let token = work.order.arrive(head, Some(answer));
                        work.worker.submit(token, request);
                    }
                    Parsed::Now(outcome, answer) => {
                        let token = work.order.arrive(head, Some(answer));
                        work.order.finish(token, outcome);
                        if outcome == Outcome::Failed {
                            tracing::debug!(volume = %self.volume.settings.name, "a request was refused");
                        }
                    }
                    Parsed::Unanswerable(why) => {
                        tracing::warn!(volume = %self.volume.settings.name, why, "a broken request");
                        work.order.arrive(head, None);
                    }
                }
            }
        }
    }
}

impl Queue {
    fn lock_stop(&self) -> MutexGuard<'_, Option<Stop>> {
        self.stop.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Work {
    /// Moves what is done to the used ring, in order.
    fn publish(&mut self, vring: &Vring) -> usize {
        for (token, outcome) in self.worker.take_done() {
            self.order.finish(token, outcome);
        }
        let mut state = vring.get_mut();
        self.order.publish(|head, length| {
            if let Err(error) = state.add_used(head, length) {
                tracing::warn!(%error, head, "a guest ring takes no answer");
            }
        })
    }
}

/// Answers how many requests were published.
fn stop_here(work: &mut Work, vring: &Vring, how: Stop) -> usize {
    work.worker.settle();
    let published = match how {
        Stop::GiveBack => work.publish(vring),
        Stop::Reset => 0,
    };
    work.worker.forget_parked();
    let unanswered = work.order.give_back();
    match how {
        Stop::GiveBack => {
            let unanswered = u16::try_from(unanswered).unwrap_or(u16::MAX);
            let next = vring.queue_next_avail().wrapping_sub(unanswered);
            vring.set_queue_next_avail(next);
        }
        Stop::Reset => vring.set_queue_ready(false),
    }
    published
}

fn notify(vring: &Vring) {
    match vring.needs_notification() {
        Ok(false) => {}
        Ok(true) | Err(_) => {
            if let Err(error) = vring.signal_used_queue() {
                tracing::debug!(%error, "a guest cannot be notified");
            }
        }
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.queues.len()
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE_MAX
    }

    fn features(&self) -> u64 {
        config_space::features(&self.volume, self.num_queues_u16())
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
        // Virtio 1.2, 5.2.5.1: a driver that took neither expects every write to be durable when it is answered.
        let either = 1 << VIRTIO_BLK_F_CONFIG_WCE | 1 << VIRTIO_BLK_F_FLUSH;
        self.volume.set_driver_flushes(features & either != 0);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        self.settle();
    }

    fn set_event_idx(&self, enabled: bool) {
        self.event_idx.store(enabled, Ordering::Relaxed);
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        config_space::read(&self.volume, self.num_queues_u16(), offset, size)
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        if let Some(on) = config_space::write_cache_written(offset, bytes) {
            tracing::info!(volume = %self.volume.settings.name, on, "write cache");
            self.volume.set_write_cache(on);
        }
        Ok(())
    }

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        // The crate replaces the map inside the one we hold. Requests in flight keep the map they were made from.
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues.len()).map(|index| 1 << index).collect()
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Without one, dropping the daemon would wait for its threads for ever.
        let (consumer, notifier) =
            new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)
                .inspect_err(|error| tracing::error!(%error, "no exit event"))
                .ok()?;
        self.exit_fds
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(consumer.as_raw_fd());
        Some((consumer, notifier))
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        let index = usize::try_from(queue_index).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.stop(index, Stop::GiveBack)
    }

    fn handle_event(
        &self,
        _device_event: u16,
        _events: EventSet,
        vrings: &[Self::Vring],
        thread_id: usize,
    ) -> io::Result<()> {
        // One queue per thread, so the thread's number is the queue's.
        if let (Some(queue), Some(vring)) = (self.queues.get(thread_id), vrings.first()) {
            self.pass(queue, vring);
        }
        Ok(())
    }
}
