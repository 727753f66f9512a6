//! The thread of one queue: takes chains from the ring, lets the worker do them, publishes what is done, sleeps.
//!
//! Started by `queue`, which gives it orders. It owns everything that a request needs, so no lock is taken for one. Knows the
//! engine's worker, not the disk.
//!
//! Invariants:
//! * Orders are obeyed between passes: nothing is read from or written to the ring while one is.
//! * A ring that makes no sense is left alone until it is started again; what it had in flight is carried to its end, untold.
//! * After a killed daemon nothing new is taken before what it left is done, on any queue (`gate`).
//! * The thread never sleeps without having asked the guest for a kick and looked once more.

use super::chain::Chain;
use super::completion::{InFlight, Order as Publication};
use super::dirty_log::DirtyLog;
use super::gate::Look;
use super::inflight::{BadTracking, Recovered, Region, Tracker};
use super::polling::Polling;
use super::queue::{Ask, ErrorCall, Order, Shared, Stop, Vring};
use super::request::{Disk, Parsed, parse};
use super::ring::{Layout, Ring, RingBroken};
use crate::engine::{Kick, Outcome, Worker};
use rustix::event::{PollFd, PollFlags, Timespec, epoll};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

/// Why a ring is not served any more.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// The guest's doing.
    #[error(transparent)]
    Ring(#[from] RingBroken),
    /// The front end's doing.
    #[error(transparent)]
    Tracking(#[from] BadTracking),
}

/// What the thread owns.
pub(super) struct Server {
    shared: Arc<Shared>,
    index: usize,
    vring: Vring,
    error_call: ErrorCall,
    /// Woken by orders, completions, and the barrier.
    wake: Arc<Kick>,
    /// Watches `wake` and `guest_kick` for edges: they need not be read then.
    epoll: OwnedFd,
    guest_kick: Option<Arc<File>>,
    worker: Worker,
    chain: Chain,
    /// Heads of a publication, kept for their room.
    batch: Vec<u16>,
    running: Option<Running>,
    log: Option<Arc<DirtyLog>>,
    polling: Polling,
}

/// A ring that has been started.
#[derive(Debug)]
struct Running {
    layout: Layout,
    next_available: u16,
    next_used: u16,
    in_flight: InFlight,
    tracker: Option<Tracker>,
    /// Nothing new is taken before the gate is open; looked at again then at the latest.
    waits_until: Option<Instant>,
    /// Disabled rings take nothing new.
    enabled: bool,
    broken: bool,
}

impl Server {
    /// Made by `queue`, moved to the thread.
    pub(super) fn new(
        shared: Arc<Shared>,
        index: usize,
        vring: Vring,
        error_call: ErrorCall,
        wake: Arc<Kick>,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        watch(&epoll, &*wake)?;
        Ok(Self {
            worker: Worker::new(Arc::clone(&shared.volume), Arc::clone(&wake)),
            polling: Polling::new(shared.poll_max),
            shared,
            index,
            vring,
            error_call,
            wake,
            epoll,
            guest_kick: None,
            chain: Chain::default(),
            batch: Vec::new(),
            running: None,
            log: None,
        })
    }

    /// Serves until nobody can give orders any more.
    pub(super) fn run(mut self, asks: &Receiver<Ask>) -> io::Result<()> {
        loop {
            loop {
                match asks.try_recv() {
                    Ok(Ask { order, done }) => {
                        let position = self.obey(order)?;
                        if done.send(position).is_err() {
                            tracing::debug!("who gave the order has lost patience");
                        }
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        self.stop(Stop::Forget);
                        return Ok(());
                    }
                }
            }
            if let Some(done) = self.pass() {
                self.polling.worked(done);
                continue;
            }
            let in_flight = self.running.as_ref().map_or(0, |one| one.in_flight.len());
            if self.polling.look_again(in_flight) {
                Polling::pause();
                continue;
            }
            if self.has_more() || self.worker.arm() {
                continue;
            }
            self.sleep()?;
        }
    }

    fn obey(&mut self, order: Order) -> io::Result<u16> {
        match order {
            Order::Refresh {
                kick,
                tracking,
                log,
            } => {
                self.watch_guest(kick)?;
                self.log = log;
                self.refresh(tracking);
                Ok(self.vring.queue_next_avail())
            }
            Order::Stop(how) => Ok(self.stop(how)),
        }
    }

    fn watch_guest(&mut self, kick: Option<Arc<File>>) -> io::Result<()> {
        if let Some(old) = self.guest_kick.take() {
            epoll::delete(&self.epoll, &*old)?;
        }
        if let Some(new) = &kick {
            watch(&self.epoll, &**new)?;
        }
        self.guest_kick = kick;
        Ok(())
    }

    fn refresh(&mut self, tracking: Option<Arc<Region>>) {
        let (ready, enabled, base, layout) = {
            let state = self.vring.get_ref();
            let queue = state.get_queue();
            let layout = Layout {
                size: queue.size(),
                table: queue.desc_table(),
                available: queue.avail_ring(),
                used: queue.used_ring(),
                event_idx: queue.event_idx_enabled(),
            };
            let ready = queue.ready() && self.guest_kick.is_some();
            (ready, state.is_enabled(), queue.next_avail(), layout)
        };
        if let Some(running) = &mut self.running {
            running.enabled = enabled;
        } else if ready && enabled {
            match self.start(layout, base, tracking.clone()) {
                Ok(running) => self.running = Some(running),
                Err(failure) => {
                    if let Some(region) = tracking {
                        region.gate.leave(self.index);
                    }
                    self.fail(&failure);
                }
            }
        }
    }

    /// Starts the ring; does again what the daemon before this one had in flight.
    fn start(
        &mut self,
        layout: Layout,
        base: u16,
        tracking: Option<Arc<Region>>,
    ) -> Result<Running, Failure> {
        let memory = self.shared.memory.memory().into_inner();
        let ring = Ring::new(&memory, layout)?;
        let next_used = ring.used_index()?;
        let mut tracker = tracking
            .map(|region| Tracker::new(region, self.index, layout.size))
            .transpose()?;
        let recovered = match &mut tracker {
            Some(tracker) => tracker.recover(next_used, layout.size)?,
            None => Recovered::Fresh,
        };
        let order = if tracker.is_some() {
            Publication::OfCompletion
        } else {
            Publication::OfArrival
        };
        let mut running = Running {
            layout,
            next_available: base,
            next_used,
            in_flight: InFlight::new(layout.size, order),
            waits_until: tracker.as_ref().map(|_| Instant::now()),
            tracker,
            enabled: true,
            broken: false,
        };
        if let Recovered::InFlight(heads) = recovered {
            let count = u16::try_from(heads.len()).unwrap_or(u16::MAX);
            running.next_available = next_used.wrapping_add(count);
            if count > 0 {
                tracing::info!(volume = %self.shared.volume.settings.name, queue = self.index, count, "requests are done again");
            }
            for head in heads {
                self.accept(&ring, &memory, &mut running, head)?;
            }
        }
        if let Some(tracker) = &running.tracker {
            let left = running.in_flight.len();
            tracker.gate().join(self.index, left, &self.wake);
        }
        // The guest may have been answered by a daemon that died before it could interrupt.
        self.interrupt();
        Ok(running)
    }

    /// One pass over the ring; if it found anything to do, how many requests it has told to be done.
    fn pass(&mut self) -> Option<usize> {
        let Some(mut running) = self.running.take() else {
            self.worker.poll();
            return None;
        };
        let result = self.serve(&mut running);
        let found = *result.as_ref().unwrap_or(&None);
        if let Err(failure) = result {
            running.broken = true;
            if let Some(tracker) = &running.tracker {
                tracker.gate().leave(self.index);
            }
            self.fail(&failure);
        }
        self.running = Some(running);
        found
    }

    fn serve(&mut self, running: &mut Running) -> Result<Option<usize>, Failure> {
        if running.broken {
            self.worker.poll();
            drop(self.worker.take_done());
            return Ok(None);
        }
        let memory = self.shared.memory.memory().into_inner();
        let ring = Ring::new(&memory, running.layout)?;
        let arrived = self.take(&ring, &memory, running)?;
        self.worker.poll();
        let published = self.publish(&ring, &memory, running)?;
        Ok((arrived > 0 || published > 0).then_some(published))
    }

    /// Takes all chains that the guest has made available; answers how many there were.
    fn take(
        &mut self,
        ring: &Ring<'_>,
        memory: &Arc<GuestMemoryMmap>,
        running: &mut Running,
    ) -> Result<u16, Failure> {
        if !self.may_take(running) || !running.enabled {
            return Ok(0);
        }
        let available = ring.available_from(running.next_available)?;
        let taken = available.min(running.room());
        if taken > 0 {
            ring.ask_for_no_kicks()?;
            self.mark_used(running.layout);
        }
        for _ in 0..taken {
            let head = ring.available_head(running.next_available)?;
            if let Some(tracker) = &mut running.tracker {
                tracker.mark(head)?;
            }
            running.next_available = running.next_available.wrapping_add(1);
            self.accept(ring, memory, running, head)?;
        }
        Ok(taken)
    }

    /// Whether what a killed daemon has left is done again, on all queues.
    fn may_take(&self, running: &mut Running) -> bool {
        let waits = running.waits_until.is_some();
        let Some(tracker) = running.tracker.as_ref().filter(|_| waits) else {
            return true;
        };
        // Nothing new has been taken, so what is in flight is what is left.
        let look = tracker.gate().look(self.index, running.in_flight.len());
        running.waits_until = match look {
            Look::Open => None,
            Look::Closed { until } => Some(until),
            Look::Overdue { left } => {
                self.shared.tell_overtaken(left);
                None
            }
        };
        running.waits_until.is_none()
    }

    /// Understands a chain and hands it to the worker.
    fn accept(
        &mut self,
        ring: &Ring<'_>,
        memory: &Arc<GuestMemoryMmap>,
        running: &mut Running,
        head: u16,
    ) -> Result<(), Failure> {
        let volume = &self.shared.volume;
        let token = running
            .in_flight
            .arrive(head)
            .map_err(|_| RingBroken::HeadInFlight(head))?;
        let disk = Disk {
            size_bytes: volume.size_bytes(),
            read_only: volume.settings.read_only,
            serial: &volume.settings.serial,
        };
        let parsed = match ring.walk(head, &mut self.chain) {
            Ok(()) => parse(memory, &mut self.chain, disk),
            Err(bad) => Parsed::Unanswerable(bad.0),
        };
        match parsed {
            Parsed::Engine(request, answer) => {
                let written = &self.chain.writable;
                running.in_flight.will_answer(token, answer, written);
                self.worker.submit(token, request);
            }
            Parsed::Now(outcome, answer) => {
                let written = &self.chain.writable;
                running.in_flight.will_answer(token, answer, written);
                running.in_flight.finish(token, outcome);
                if outcome == Outcome::Failed {
                    tracing::debug!(volume = %volume.settings.name, "a request was refused");
                }
            }
            Parsed::Unanswerable(why) => {
                tracing::warn!(volume = %volume.settings.name, why, "a broken request");
                running.in_flight.finish(token, Outcome::Failed);
            }
        }
        Ok(())
    }

    /// Moves what is done to the used ring: one store of its index and one look at the guest's wish for interrupts, however much
    /// there is. Answers how many there were. For the order of the stores see `inflight`.
    fn publish(
        &mut self,
        ring: &Ring<'_>,
        memory: &GuestMemoryMmap,
        running: &mut Running,
    ) -> Result<usize, Failure> {
        for (token, outcome) in self.worker.take_done() {
            running.in_flight.finish(token, outcome);
        }
        self.batch.clear();
        let before = running.next_used;
        while let Some(finished) = running.in_flight.next_finished() {
            let length_bytes = finished
                .answer
                .map_or(0, |answer| answer.write(memory, finished.outcome));
            if let Some(log) = &self.log {
                for range in &finished.written {
                    log.mark(range.address, u64::from(range.length_bytes));
                }
                if let Some(answer) = finished.answer {
                    log.mark(answer.status, 1);
                }
            }
            if let Some(tracker) = &mut running.tracker {
                tracker.batch(finished.head)?;
            }
            ring.write_used(running.next_used, finished.head, length_bytes)?;
            running.next_used = running.next_used.wrapping_add(1);
            self.batch.push(finished.head);
        }
        if self.batch.is_empty() {
            return Ok(0);
        }
        ring.publish(running.next_used)?;
        self.mark_used(running.layout);
        if let Some(tracker) = &mut running.tracker {
            tracker.clear(&self.batch, running.next_used)?;
        }
        if ring.wants_interrupt(before, running.next_used)? {
            self.interrupt();
        }
        Ok(self.batch.len())
    }

    /// The used ring was written.
    fn mark_used(&self, layout: Layout) {
        if let Some(log) = &self.log {
            log.mark(layout.used, layout.used_bytes());
        }
    }

    fn interrupt(&self) {
        if let Err(error) = self.vring.signal_used_queue() {
            tracing::debug!(%error, "a guest cannot be interrupted");
        }
    }

    /// Asks the guest for a kick; true if something has come meanwhile.
    fn has_more(&mut self) -> bool {
        let Some(running) = &self.running else {
            return false;
        };
        // A ring with no room has to wait for its own requests, one that may take nothing new for the gate, whatever its index says.
        let is_shut = running.room() == 0 || running.waits_until.is_some();
        if running.broken || !running.enabled || is_shut {
            return false;
        }
        let memory = self.shared.memory.memory();
        let asked = Ring::new(&memory, running.layout)
            .and_then(|ring| ring.ask_for_kicks(running.next_available));
        self.mark_used(running.layout);
        // What is wrong with the ring the next pass finds out.
        asked.unwrap_or(true)
    }

    fn sleep(&self) -> io::Result<()> {
        let mut events = [MaybeUninit::uninit(); 2];
        let longest = self.running.as_ref().and_then(Running::waits);
        match epoll::wait(&self.epoll, events.as_mut_slice(), longest.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Stops the ring, if it runs; answers its position.
    fn stop(&mut self, how: Stop) -> u16 {
        let Some(mut running) = self.running.take() else {
            return self.vring.queue_next_avail();
        };
        self.worker.settle();
        let stopped = match how {
            Stop::Publish { patience } => self.publish_last(&mut running, patience),
            Stop::Forget => Ok(()),
            Stop::Reset => running
                .tracker
                .as_mut()
                .map_or(Ok(()), |tracker| tracker.forget().map_err(Failure::from)),
        };
        if let Err(failure) = stopped {
            self.fail(&failure);
        }
        drop(self.worker.take_done());
        self.worker.forget_parked();
        let left = u16::try_from(running.in_flight.len()).unwrap_or(u16::MAX);
        let position = if running.tracker.is_some() {
            // What is left is in the in-flight memory, and is done when the ring starts again.
            running.next_available
        } else {
            running.next_available.wrapping_sub(left)
        };
        self.vring.set_queue_next_avail(position);
        position
    }

    /// Publishes what is done; with in-flight memory waits for what is held, since nothing but the memory would tell of it.
    fn publish_last(&mut self, running: &mut Running, patience: Duration) -> Result<(), Failure> {
        if running.broken {
            return Ok(());
        }
        let memory = self.shared.memory.memory().into_inner();
        let ring = Ring::new(&memory, running.layout)?;
        self.publish(&ring, &memory, running)?;
        let deadline = Instant::now() + patience;
        while running.tracker.is_some() && !running.in_flight.is_empty() {
            self.worker.run();
            self.publish(&ring, &memory, running)?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.worker.settle();
                self.publish(&ring, &memory, running)?;
                tracing::warn!(volume = %self.shared.volume.settings.name, queue = self.index,
                    count = running.in_flight.len(), "held requests are left in flight");
                return Ok(());
            }
            if !running.in_flight.is_empty() {
                self.wait_for_news(left);
            }
        }
        Ok(())
    }

    fn wait_for_news(&self, longest: Duration) {
        let longest = Timespec::try_from(longest).ok();
        let mut wait = [PollFd::new(&*self.wake, PollFlags::IN)];
        if let Err(error) = rustix::event::poll(&mut wait, longest.as_ref())
            && error != rustix::io::Errno::INTR
        {
            tracing::error!(%error, "cannot wait for held requests");
        }
        self.wake.clear();
    }

    fn fail(&self, failure: &Failure) {
        self.shared.tell_failure(self.index, failure.to_string());
        self.error_call.signal();
    }
}

impl Running {
    /// Requests that may still be taken. A guest that makes the same entries available again and again gets no more than its
    /// ring holds.
    fn room(&self) -> u16 {
        let in_flight = u16::try_from(self.in_flight.len()).unwrap_or(u16::MAX);
        self.layout.size.saturating_sub(in_flight)
    }

    /// How long the thread may sleep; `None`: until it is woken.
    fn waits(&self) -> Option<Timespec> {
        let until = self.waits_until.filter(|_| !self.broken)?;
        Timespec::try_from(until.saturating_duration_since(Instant::now())).ok()
    }
}

fn watch(epoll: &OwnedFd, event: impl std::os::fd::AsFd) -> io::Result<()> {
    let edges = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(epoll, event, epoll::EventData::new_u64(0), edges)?;
    Ok(())
}
