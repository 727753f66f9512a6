//! A front end that says whatever a test wants: vhost-user messages and a ring written byte by byte.
//!
//! Guest memory is a memfd that is never mapped here: tests read and write it through the descriptor.

use super::PATIENCE;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Entries of the ring.
pub(crate) const RING: u16 = 16;
/// Bytes of guest memory.
pub(crate) const RAM_BYTES: u64 = 4 << 20;
/// Where the front end claims to have mapped guest memory.
const USER_ADDRESS: u64 = 0x7000_0000_0000;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
/// How far behind those of queue 0 the places of queue 1 are.
const SECOND_RING: u64 = 0x4000;
/// First byte that tests may use for headers and data.
pub(crate) const FREE: u64 = 0x1_0000;

/// What this front end takes of the protocol.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::CONFIG
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::MQ)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::LOG_SHMFD);

/// Flags of a descriptor.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;

/// A descriptor as the device reads it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) length: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// Guest memory; outlives connections, as a VM does.
pub(crate) struct SharedRam {
    file: File,
    /// Where the places of the ring begin that is written by [`Self::describe`] and the like.
    ring: u64,
}

impl SharedRam {
    pub(crate) fn new() -> Arc<Self> {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(RAM_BYTES).unwrap();
        Arc::new(Self { file, ring: 0 })
    }

    /// The same memory with the ring of queue 1.
    fn second_ring(&self) -> Arc<Self> {
        let file = self.file.try_clone().unwrap();
        let ring = SECOND_RING;
        Arc::new(Self { file, ring })
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, address).unwrap();
    }

    pub(crate) fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, address).unwrap();
        bytes
    }

    /// All of it.
    pub(crate) fn pages(&self) -> Vec<[u8; 4096]> {
        (0..RAM_BYTES / 4096)
            .map(|page| self.read(page * 4096))
            .collect()
    }

    pub(crate) fn describe(&self, index: u16, descriptor: Descriptor) {
        let mut bytes = Vec::new();
        bytes.extend(descriptor.address.to_le_bytes());
        bytes.extend(descriptor.length.to_le_bytes());
        bytes.extend(descriptor.flags.to_le_bytes());
        bytes.extend(descriptor.next.to_le_bytes());
        self.write(self.ring + TABLE + u64::from(index) * 16, &bytes);
    }

    pub(crate) fn set_available(&self, position: u16, head: u16) {
        self.write(
            self.ring + AVAILABLE + 4 + u64::from(position % RING) * 2,
            &head.to_le_bytes(),
        );
    }

    pub(crate) fn set_available_index(&self, index: u16) {
        self.write(self.ring + AVAILABLE + 2, &index.to_le_bytes());
    }

    pub(crate) fn used_index(&self) -> u16 {
        u16::from_le_bytes(self.read(self.ring + USED + 2))
    }

    pub(crate) fn used_head(&self, position: u16) -> u32 {
        let entry = self.ring + USED + 4 + u64::from(position % RING) * 8;
        u32::from_le_bytes(self.read(entry))
    }
}

/// In-flight memory; outlives daemons, as a front end keeps it.
pub(crate) struct InFlightMemory {
    pub(crate) shape: VhostUserInflight,
    pub(crate) file: File,
}

/// A connection with one running queue.
pub(crate) struct RawFrontEnd {
    pub(crate) frontend: Frontend,
    /// Number of the queue.
    queue: usize,
    pub(crate) ram: Arc<SharedRam>,
    kick: EventFd,
    call: EventFd,
}

impl RawFrontEnd {
    /// Connects and starts queue 0 at the ring position `base`.
    pub(crate) fn start(socket: &Path, ram: Arc<SharedRam>, base: u16) -> Self {
        let guest = Self::connect(socket, ram);
        guest.start_ring(base);
        guest
    }

    /// Connects and starts queue 0 with in-flight memory, which the daemon makes if there is none yet. The position is what
    /// QEMU says after it has lost a daemon: the used index.
    pub(crate) fn start_tracked(
        socket: &Path,
        ram: Arc<SharedRam>,
        memory: &mut Option<InFlightMemory>,
    ) -> Self {
        let mut guest = Self::connect(socket, ram);
        let memory = memory.get_or_insert_with(|| {
            let wanted = VhostUserInflight::new(0, 0, 1, RING);
            let (shape, file) = guest.frontend.get_inflight_fd(&wanted).unwrap();
            InFlightMemory { shape, file }
        });
        guest
            .frontend
            .set_inflight_fd(&memory.shape, memory.file.as_raw_fd())
            .unwrap();
        guest.start_ring(guest.ram.used_index());
        guest
    }

    /// Connects and negotiates, with guest memory but no ring.
    pub(crate) fn connect(socket: &Path, ram: Arc<SharedRam>) -> Self {
        let deadline = Instant::now() + PATIENCE;
        let mut frontend = loop {
            // A connection that is turned away fails at the first answer.
            let tried = Frontend::connect(socket, 2)
                .and_then(|frontend| frontend.get_features().map(|_| frontend));
            match tried {
                Ok(frontend) => break frontend,
                Err(error) if Instant::now() > deadline => panic!("no connection: {error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(PROTOCOL_FEATURES).unwrap();
        // What can be acknowledged is: a message has taken effect when its call returns.
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        // Everything but EVENT_IDX, so that notifications need no bookkeeping here.
        frontend.set_features(features & !(1 << 29)).unwrap();
        let guest = Self {
            frontend,
            queue: 0,
            ram,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
        };
        guest.share_memory();
        guest
    }

    /// Gives the daemon a channel to speak on; the other end of it.
    pub(crate) fn give_back_channel(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut frontend = self.frontend.clone();
        frontend
            .set_protocol_features(PROTOCOL_FEATURES | VhostUserProtocolFeatures::BACKEND_REQ)
            .unwrap();
        frontend.set_backend_request_fd(&theirs).unwrap();
        ours
    }

    /// Queue 1 of the same connection; it does not run yet. Slots are shared: use others.
    pub(crate) fn second(&self) -> Self {
        Self {
            frontend: self.frontend.clone(),
            queue: 1,
            ram: self.ram.second_ring(),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    /// Sends the memory table, for the first time or again.
    pub(crate) fn share_memory(&self) {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: RAM_BYTES,
            userspace_addr: USER_ADDRESS,
            mmap_offset: 0,
            mmap_handle: self.ram.file.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).unwrap();
    }

    /// Sends a memory table with a region that is longer than its file.
    pub(crate) fn share_more_than_there_is(&self) -> vhost::Result<()> {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: RAM_BYTES + 4096,
            userspace_addr: USER_ADDRESS,
            mmap_offset: 0,
            mmap_handle: self.ram.file.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).map(|_| ())
    }

    /// SET_VRING_ADDR, so many bytes behind the usual places.
    pub(crate) fn move_ring(&self, by: u64) -> vhost::Result<()> {
        let ring = VringConfigData {
            queue_max_size: RING,
            queue_size: RING,
            flags: 0,
            desc_table_addr: USER_ADDRESS + self.ram.ring + TABLE + by,
            used_ring_addr: USER_ADDRESS + self.ram.ring + USED + by,
            avail_ring_addr: USER_ADDRESS + self.ram.ring + AVAILABLE + by,
            log_addr: None,
        };
        self.frontend.set_vring_addr(self.queue, &ring)
    }

    /// Gives the daemon a log of written pages, a bit for each.
    pub(crate) fn log(&self) -> File {
        let file = File::from(memfd_create("log", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(RAM_BYTES / 4096 / 8).unwrap();
        let region = VhostUserDirtyLogRegion {
            mmap_size: RAM_BYTES / 4096 / 8,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        self.frontend.set_log_base(0, Some(region)).unwrap();
        file
    }

    /// SET_FEATURES, with or without `VHOST_F_LOG_ALL`.
    pub(crate) fn switch_log(&self, on: bool) {
        let features = self.frontend.get_features().unwrap() & !(1 << 29);
        let log = u64::from(!on) << 26;
        self.frontend.set_features(features & !log).unwrap();
    }

    /// Asks for in-flight memory and gives it back to the daemon.
    pub(crate) fn track(&mut self) -> vhost::Result<()> {
        let wanted = VhostUserInflight::new(0, 0, 1, RING);
        let (shape, file) = self.frontend.get_inflight_fd(&wanted)?;
        self.frontend.set_inflight_fd(&shape, file.as_raw_fd())
    }

    /// Starts the queue.
    pub(crate) fn start_ring(&self, base: u16) {
        let queue = self.queue;
        self.frontend.set_vring_num(queue, RING).unwrap();
        self.move_ring(0).unwrap();
        self.frontend.set_vring_base(queue, base).unwrap();
        self.frontend.set_vring_call(queue, &self.call).unwrap();
        self.frontend.set_vring_kick(queue, &self.kick).unwrap();
        self.enable_ring(true);
    }

    /// SET_VRING_ENABLE.
    pub(crate) fn enable_ring(&self, enable: bool) {
        let mut frontend = self.frontend.clone();
        frontend.set_vring_enable(self.queue, enable).unwrap();
    }

    /// Gives the running ring another descriptor to kick by.
    pub(crate) fn change_kick(&mut self) {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        self.frontend.set_vring_kick(0, &kick).unwrap();
        self.kick = kick;
    }

    /// Takes the interrupts so far; false if there was none.
    pub(crate) fn take_interrupts(&self) -> bool {
        self.call.read().is_ok()
    }

    pub(crate) fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Puts a write of one sector-aligned piece into slot `slot` of descriptors (three each), and makes it available at
    /// `position`.
    pub(crate) fn offer_write(&self, position: u16, slot: u16, sector: u64, bytes: &[u8]) {
        self.ram.write(data_place(slot), bytes);
        self.offer(
            position,
            slot,
            1,
            sector,
            u32::try_from(bytes.len()).unwrap(),
        );
    }

    /// The same for a read; what was read is in [`Self::data`].
    pub(crate) fn offer_read(&self, position: u16, slot: u16, sector: u64, length: u32) {
        self.offer(position, slot, 0, sector, length);
    }

    fn offer(&self, position: u16, slot: u16, kind: u32, sector: u64, length: u32) {
        let place = place(slot);
        let mut header = Vec::new();
        header.extend(kind.to_le_bytes());
        header.extend(0_u32.to_le_bytes());
        header.extend(sector.to_le_bytes());
        self.ram.write(place, &header);
        self.forget_status(slot);
        let first = slot * 3;
        let data_flags = if kind == 0 { NEXT | WRITE } else { NEXT };
        let chain = [
            Descriptor {
                address: place,
                length: 16,
                flags: NEXT,
                next: first + 1,
            },
            Descriptor {
                address: data_place(slot),
                length,
                flags: data_flags,
                next: first + 2,
            },
            Descriptor {
                address: place + 0x100,
                length: 1,
                flags: WRITE,
                next: 0,
            },
        ];
        for (index, descriptor) in (first..).zip(chain) {
            self.ram.describe(index, descriptor);
        }
        self.ram.set_available(position, first);
        self.ram.set_available_index(position.wrapping_add(1));
    }

    /// Makes the status byte of a slot one that no device writes.
    pub(crate) fn forget_status(&self, slot: u16) {
        self.ram.write(place(slot) + 0x100, &[0xee]);
    }

    /// First bytes of a slot's data.
    pub(crate) fn data<const N: usize>(&self, slot: u16) -> [u8; N] {
        self.ram.read(data_place(slot))
    }

    /// Status byte of a slot; 0xee: not answered.
    pub(crate) fn status(&self, slot: u16) -> u8 {
        let [status] = self.ram.read(place(slot) + 0x100);
        status
    }

    pub(crate) fn wait_used(&self, index: u16) {
        super::wait_until("the used index", || self.ram.used_index() == index);
    }

    pub(crate) fn config(&mut self, offset: u32, length: u32) -> Vec<u8> {
        let buffer = vec![0; length as usize];
        let answer =
            self.frontend
                .get_config(offset, length, VhostUserConfigFlags::WRITABLE, &buffer);
        answer.unwrap().1
    }

    pub(crate) fn set_config(&mut self, offset: u32, bytes: &[u8]) {
        self.frontend
            .set_config(offset, VhostUserConfigFlags::WRITABLE, bytes)
            .unwrap();
    }
}

fn place(slot: u16) -> u64 {
    FREE + u64::from(slot) * 0x2_0000
}

fn data_place(slot: u16) -> u64 {
    place(slot) + 0x1000
}
