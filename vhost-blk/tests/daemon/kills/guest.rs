//! A guest with two rings full of requests, and a front end that connects again as QEMU does.
//!
//! Used by the kill campaign. Guest memory, rings, kick and call descriptors and the in-flight region outlive the daemon; only the
//! connection does not. After an unexpected end QEMU takes the used index for the ring's position (`vhost_virtqueue_stop`), asks for
//! the in-flight region once and hands it over at every start (`vhost_user_blk_start`); so does this.
//!
//! Checked here: every request is answered once, with success, with the right length, and the guest is told of it.

use super::oracle::{ChangeId, Kind, Oracle, SECTOR_BYTES, Tick, content};
use crate::harness::{Daemon, Descriptor, PATIENCE};
use rand::Rng;
use rand::rngs::SmallRng;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Queues of the guest.
pub(super) const QUEUES: usize = 2;
/// Entries of a ring.
const RING: u16 = 256;
/// Requests in flight on each queue.
const SLOTS: u16 = 40;
/// Descriptors of a slot: header, two pieces of data, status.
const CHAIN: u16 = 4;
/// Largest request, in sectors.
const REQUEST_MAX: usize = 128;

/// Where the front end claims to have mapped guest memory.
const USER_ADDRESS: u64 = 0x7000_0000_0000;
/// Each queue's part of guest memory: table, available ring, used ring, then slots.
const QUEUE_BYTES: u64 = 4 << 20;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const SLOTS_START: u64 = 0x4000;
const SLOT_BYTES: u64 = 0x1_1000;
const RAM_BYTES: u64 = QUEUE_BYTES * QUEUES as u64;

/// How often a waiting guest looks whether the daemon was killed.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 5_000_000,
};

/// What a slot waits for.
#[derive(Clone, Copy, Debug)]
enum Request {
    Change(ChangeId),
    Read {
        begun: Tick,
        first: usize,
        count: usize,
    },
    Flush,
}

#[derive(Debug)]
struct Queue {
    kick: EventFd,
    call: EventFd,
    available: u16,
    used: u16,
    slots: Vec<Option<Request>>,
}

/// The guest.
pub(super) struct Guest {
    ram: File,
    queues: Vec<Queue>,
    inflight: Option<(VhostUserInflight, File)>,
    /// Dropping it ends the session.
    connection: Option<Frontend>,
    oracle: Arc<Mutex<Oracle>>,
    sectors: usize,
    pub(super) answered: u64,
    /// When the last answers came, and the longest time between two.
    last: Option<Instant>,
    pub(super) longest_stall: Duration,
}

impl Guest {
    pub(super) fn new(oracle: Arc<Mutex<Oracle>>, sectors: usize) -> Self {
        let ram = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ram.set_len(RAM_BYTES).unwrap();
        let queues = (0..QUEUES)
            .map(|_| Queue {
                kick: EventFd::new(EFD_NONBLOCK).unwrap(),
                call: EventFd::new(EFD_NONBLOCK).unwrap(),
                available: 0,
                used: 0,
                slots: vec![None; usize::from(SLOTS)],
            })
            .collect();
        Self {
            ram,
            queues,
            inflight: None,
            connection: None,
            oracle,
            sectors,
            answered: 0,
            last: None,
            longest_stall: Duration::ZERO,
        }
    }

    /// True if the daemon tracks requests in flight.
    pub(super) fn is_tracked(&self) -> bool {
        self.inflight.is_some()
    }

    pub(super) fn in_flight(&self) -> usize {
        let slots = self.queues.iter().flat_map(|queue| &queue.slots);
        slots.filter(|slot| slot.is_some()).count()
    }

    /// Connects and starts the rings where they are. An error: the daemon went away meanwhile.
    pub(super) fn connect(&mut self, socket: &Path) -> vhost::Result<()> {
        self.disconnect();
        let queues = QUEUES as u64;
        let mut front = Frontend::connect(socket, queues)?;
        front.set_owner()?;
        let features = front.get_features()?;
        let offered = front.get_protocol_features()?;
        let inflight = offered & VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        front.set_protocol_features(
            VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::MQ
                | inflight,
        )?;
        // Everything but EVENT_IDX: each answer has to be told.
        front.set_features(features & !(1 << 29))?;
        if !inflight.is_empty() {
            if self.inflight.is_none() {
                let wanted = VhostUserInflight {
                    mmap_size: 0,
                    mmap_offset: 0,
                    num_queues: QUEUES as u16,
                    queue_size: RING,
                };
                self.inflight = Some(front.get_inflight_fd(&wanted)?);
            }
            if let Some((shape, file)) = &self.inflight {
                front.set_inflight_fd(shape, file.as_raw_fd())?;
            }
        }
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: RAM_BYTES,
            userspace_addr: USER_ADDRESS,
            mmap_offset: 0,
            mmap_handle: self.ram.as_raw_fd(),
        };
        front.set_mem_table(&[region])?;
        for (index, queue) in self.queues.iter().enumerate() {
            let start = USER_ADDRESS + index as u64 * QUEUE_BYTES;
            let ring = VringConfigData {
                queue_max_size: RING,
                queue_size: RING,
                flags: 0,
                desc_table_addr: start,
                used_ring_addr: start + USED,
                avail_ring_addr: start + AVAILABLE,
                log_addr: None,
            };
            front.set_vring_num(index, RING)?;
            front.set_vring_base(index, self.used_index(index))?;
            front.set_vring_addr(index, &ring)?;
            front.set_vring_kick(index, &queue.kick)?;
            front.set_vring_call(index, &queue.call)?;
        }
        for index in 0..QUEUES {
            front.set_vring_enable(index, true)?;
        }
        self.connection = Some(front);
        Ok(())
    }

    pub(super) fn disconnect(&mut self) {
        self.connection = None;
    }

    /// Measures stalls from here on; the longest so far.
    pub(super) fn reset_stall(&mut self) -> Duration {
        self.last = None;
        std::mem::take(&mut self.longest_stall)
    }

    /// Stops both rings in order; where the daemon says they stand.
    pub(super) fn stop(&mut self) -> Vec<u32> {
        let front = self.connection.take().unwrap();
        (0..QUEUES)
            .map(|index| front.get_vring_base(index).unwrap())
            .collect()
    }

    fn used_index(&self, queue: usize) -> u16 {
        let mut bytes = [0; 2];
        let place = queue as u64 * QUEUE_BYTES + USED + 2;
        self.ram.read_exact_at(&mut bytes, place).unwrap();
        u16::from_le_bytes(bytes)
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.ram.write_all_at(bytes, address).unwrap();
    }

    /// Fills free slots with requests drawn at random and tells the daemon; answers how many there were.
    pub(super) fn offer(&mut self, random: &mut SmallRng, mix: Mix) -> usize {
        let mut offered = 0;
        for index in 0..QUEUES {
            let before = self.queues[index].available;
            for slot in 0..SLOTS {
                if self.queues[index].slots[usize::from(slot)].is_none() {
                    let (request, kind, first, count) = self.draw(random, mix);
                    self.put(index, slot, kind, first, count, request, random);
                    offered += 1;
                }
            }
            let queue = &self.queues[index];
            if queue.available != before {
                queue.kick.write(1).unwrap();
            }
        }
        offered
    }

    /// Reads the whole disk, with nothing else in flight.
    pub(super) fn sweep(&mut self, random: &mut SmallRng, killed: &AtomicBool) -> bool {
        assert_eq!(self.in_flight(), 0);
        let mut first = 0;
        while first < self.sectors {
            let count = REQUEST_MAX.min(self.sectors - first);
            let slot = self.queues.iter().enumerate().find_map(|(index, queue)| {
                let slot = queue.slots.iter().position(Option::is_none)?;
                Some((index, u16::try_from(slot).unwrap()))
            });
            match slot {
                Some((index, slot)) => {
                    let begun = self.oracle.lock().unwrap().begin_read();
                    let request = Request::Read {
                        begun,
                        first,
                        count,
                    };
                    self.put(index, slot, 0, first, count, request, random);
                    self.queues[index].kick.write(1).unwrap();
                    first += count;
                }
                None if self.wait(killed) => {}
                None => return false,
            }
        }
        self.finish(killed)
    }

    /// Waits until nothing is in flight.
    pub(super) fn finish(&mut self, killed: &AtomicBool) -> bool {
        while self.in_flight() > 0 {
            if !self.wait(killed) {
                return false;
            }
        }
        true
    }

    fn draw(&self, random: &mut SmallRng, mix: Mix) -> (Request, u32, usize, usize) {
        let whole_blocks = mix == Mix::Blocks || random.random_bool(0.6);
        let mut count = match random.random_range(0..10) {
            0..4 => 8,
            4..6 => random.random_range(1..8),
            6..9 => random.random_range(8..33),
            _ => REQUEST_MAX,
        };
        let mut first = random.random_range(0..self.sectors - count);
        if whole_blocks {
            first &= !7;
            count = count.next_multiple_of(8).min(self.sectors - first);
        }
        let mut oracle = self.oracle.lock().unwrap();
        let mut change = |kind, number| {
            (
                Request::Change(oracle.ask(kind, first, count)),
                number,
                first,
                count,
            )
        };
        match (mix, random.random_range(0..100)) {
            (Mix::Blocks, _) | (Mix::Writes, 0..90) | (Mix::All, 0..55) => change(Kind::Write, 1),
            (Mix::All, 55..60) => change(Kind::Discard, 11),
            (Mix::All, 60..65) => change(Kind::Zero, 13),
            (Mix::Writes, 97..) | (Mix::All, 95..) => (Request::Flush, 4, 0, 0),
            (Mix::Writes | Mix::All, _) => {
                let begun = oracle.begin_read();
                let request = Request::Read {
                    begun,
                    first,
                    count,
                };
                (request, 0, first, count)
            }
        }
    }

    #[allow(clippy::too_many_arguments, reason = "a request has as many parts")]
    fn put(
        &mut self,
        index: usize,
        slot: u16,
        kind: u32,
        first: usize,
        count: usize,
        request: Request,
        random: &mut SmallRng,
    ) {
        let start = index as u64 * QUEUE_BYTES;
        let place = start + SLOTS_START + u64::from(slot) * SLOT_BYTES;
        let (status, data) = (place + 0x800, place + 0x1000);
        let mut header = kind.to_le_bytes().to_vec();
        header.extend(0_u32.to_le_bytes());
        let sector = if kind < 2 { first as u64 } else { 0 };
        header.extend(sector.to_le_bytes());
        self.write(place, &header);
        self.write(status, &[0xee]);
        let mut bytes = Vec::new();
        match (kind, request) {
            (1, Request::Change(id)) => {
                for sector in first..first + count {
                    bytes.extend(content(id, sector));
                }
            }
            (0, _) => bytes.resize(count * SECTOR_BYTES, 0xdd),
            (11 | 13, _) => {
                bytes.extend((first as u64).to_le_bytes());
                bytes.extend(u32::try_from(count).unwrap().to_le_bytes());
                bytes.extend(0_u32.to_le_bytes());
            }
            _ => {}
        }
        self.write(data, &bytes);
        // Data in one piece or two, cut at any sector.
        let data_flag = if kind == 0 { 2 } else { 0 };
        let cut = if kind < 2 && count > 1 && random.random_bool(0.3) {
            random.random_range(1..count) * SECTOR_BYTES
        } else {
            bytes.len()
        };
        let mut pieces = vec![(place, 16, 0)];
        pieces.push((data, cut, data_flag));
        pieces.push((data + cut as u64, bytes.len() - cut, data_flag));
        pieces.push((status, 1, 2));
        pieces.retain(|(_, length, _)| *length > 0);
        let head = slot * CHAIN;
        for (number, (address, length, flags)) in (head..).zip(&pieces) {
            let is_last = usize::from(number - head) + 1 == pieces.len();
            let descriptor = Descriptor {
                address: *address,
                length: u32::try_from(*length).unwrap(),
                flags: flags | u16::from(!is_last),
                next: if is_last { 0 } else { number + 1 },
            };
            let mut entry = descriptor.address.to_le_bytes().to_vec();
            entry.extend(descriptor.length.to_le_bytes());
            entry.extend(descriptor.flags.to_le_bytes());
            entry.extend(descriptor.next.to_le_bytes());
            self.write(start + u64::from(number) * 16, &entry);
        }
        let position = self.queues[index].available;
        let entry = AVAILABLE + 4 + u64::from(position % RING) * 2;
        self.write(start + entry, &head.to_le_bytes());
        let next = position.wrapping_add(1);
        self.write(start + AVAILABLE + 2, &next.to_le_bytes());
        let queue = &mut self.queues[index];
        queue.available = next;
        queue.slots[usize::from(slot)] = Some(request);
    }

    /// Waits to be told of answers and takes them; false if the daemon was killed meanwhile.
    pub(super) fn wait(&mut self, killed: &AtomicBool) -> bool {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if self.told() {
                if self.take() > 0 {
                    let now = Instant::now();
                    if let Some(last) = self.last.replace(now) {
                        self.longest_stall = self.longest_stall.max(now - last);
                    }
                    return true;
                }
            } else if killed.load(Ordering::SeqCst) {
                return false;
            } else if Instant::now() > deadline {
                let taken = self.take();
                panic!(
                    "not told of anything for {PATIENCE:?}, with {} requests in flight and {taken} answered",
                    self.in_flight()
                );
            }
        }
    }

    /// Waits until the daemon answers again or has ended: whether it answers.
    pub(super) fn settled(&mut self, daemon: &mut Daemon) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while daemon.ended().is_none() {
            assert!(
                Instant::now() < deadline,
                "neither answers nor ends, with {} requests in flight",
                self.in_flight()
            );
            if self.told() && self.take() > 0 {
                return true;
            }
        }
        false
    }

    fn told(&self) -> bool {
        #[allow(unsafe_code, reason = "EventFd has a number only")]
        let calls: Vec<BorrowedFd<'_>> = self
            .queues
            .iter()
            // SAFETY: the descriptor belongs to `self`, which outlives the borrow.
            .map(|queue| unsafe { BorrowedFd::borrow_raw(queue.call.as_raw_fd()) })
            .collect();
        let mut fds: Vec<_> = calls
            .iter()
            .map(|fd| PollFd::new(fd, PollFlags::IN))
            .collect();
        let told = rustix::event::poll(&mut fds, Some(&LOOK)).unwrap_or(0) > 0;
        for queue in &self.queues {
            // Nothing to read: not told on this one.
            drop(queue.call.read());
        }
        told
    }

    /// Takes what was answered; how many there were.
    pub(super) fn take(&mut self) -> usize {
        let mut taken = 0;
        for index in 0..QUEUES {
            let end = self.used_index(index);
            let start = index as u64 * QUEUE_BYTES;
            while self.queues[index].used != end {
                let position = self.queues[index].used;
                let mut entry = [0; 8];
                let place = start + USED + 4 + u64::from(position % RING) * 8;
                self.ram.read_exact_at(&mut entry, place).unwrap();
                let head = u32::from_le_bytes(entry[..4].try_into().unwrap());
                let length = u32::from_le_bytes(entry[4..].try_into().unwrap());
                self.queues[index].used = position.wrapping_add(1);
                self.answer(index, head, length);
                taken += 1;
            }
        }
        self.answered += taken as u64;
        taken
    }

    fn answer(&mut self, index: usize, head: u32, length: u32) {
        assert!(
            head.is_multiple_of(u32::from(CHAIN)) && head / u32::from(CHAIN) < u32::from(SLOTS),
            "queue {index}: no request begins at descriptor {head}"
        );
        let slot = head / u32::from(CHAIN);
        let place = index as u64 * QUEUE_BYTES + SLOTS_START + u64::from(slot) * SLOT_BYTES;
        let request = self.queues[index].slots[slot as usize].take();
        let request = request.unwrap_or_else(|| {
            panic!("queue {index}: slot {slot} was answered twice (or unasked)")
        });
        let mut status = [0];
        self.ram.read_exact_at(&mut status, place + 0x800).unwrap();
        assert_eq!(status, [0], "queue {index}, slot {slot}: {request:?}");
        let mut oracle = self.oracle.lock().unwrap();
        match request {
            Request::Flush => assert_eq!(length, 1),
            Request::Change(id) => {
                assert_eq!(length, 1);
                oracle.answer(id);
            }
            Request::Read {
                begun,
                first,
                count,
            } => {
                let mut bytes = vec![0; count * SECTOR_BYTES];
                assert_eq!(length as usize, bytes.len() + 1);
                self.ram.read_exact_at(&mut bytes, place + 0x1000).unwrap();
                let judged = oracle.end_read(begun, first, &bytes);
                drop(oracle);
                judged.unwrap_or_else(|why| panic!("a read: {why}"));
            }
        }
    }
}

/// What the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mix {
    All,
    /// Mostly writes: first writes behind a snapshot.
    Writes,
    /// Nothing but writes of whole blocks, which go straight to the device.
    Blocks,
}
