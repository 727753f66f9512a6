//! What a front end says on its connection (vhost-user specification, "Front-end message types").
//!
//! Made by `listener` for each front end; called by the vhost crate on the connection's thread, one message at a time. Knows the
//! queues' handles, not what their threads do.
//!
//! Invariants:
//! * A message is answered when it has taken effect: the queues' threads have obeyed.
//! * What would pull a running ring from under its thread (size, addresses, position, in-flight memory) is refused.
//! * A refusal ends the connection: some requests have no other way to say no, and a front end that did not ask for an
//!   acknowledgement would not hear of it.

use super::back_channel::{self, BackChannel, Offered};
use super::config_space::{self, QUEUE_SIZE_MAX};
use super::dirty_log::DirtyLog;
use super::handover::{self, MEMORY_REGIONS_MAX, Place, RingState, Session};
use super::inflight::Region;
use super::listener::Serving;
use super::queue::{Memory, Queue, Shared, Stop};
use crate::engine::{SizeWatcher, VolumeEngine};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vhost_user_backend::VringT;
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

/// How long GET_VRING_BASE waits for writes that are held, when the ring has in-flight memory. A hold ends by itself before that.
const HELD_PATIENCE: Duration = Duration::from_secs(12);

/// The device of one connection.
pub(super) struct Handler {
    shared: Arc<Shared>,
    queues: Vec<Queue>,
    /// Where the front end has guest memory in its own address space.
    mappings: Vec<Mapping>,
    tracking: Option<Arc<Region>>,
    /// Where pages that were written are marked, while the front end has switched that on.
    log: Option<Arc<DirtyLog>>,
    /// Where the front end is told of a new size, if it has given such a channel.
    back_channel: Option<Arc<BackChannel>>,
    /// Tells it when the size changes.
    size_watcher: Option<Arc<SizeWatcher>>,
    /// The size that the front end has read on this connection, in bytes.
    read_bytes: Option<u64>,
    owned: bool,
    features: u64,
    protocol_features: u64,
    /// Nothing starts any more.
    closing: bool,
}

impl fmt::Debug for Handler {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Handler")
            .field("shared", &self.shared)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    front_end: u64,
    guest: u64,
    length_bytes: u64,
}

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

impl Handler {
    /// A device for the front end at the other end of `connection`.
    pub(super) fn new(
        volume: Arc<VolumeEngine>,
        serving: Serving,
        connection: UnixStream,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            volume,
            memory: Memory::new(GuestMemoryMmap::new()),
            connection,
            poll_max: serving.poll_max,
        });
        let size_max = u16::try_from(QUEUE_SIZE_MAX).unwrap_or(u16::MAX);
        let queues = (0..usize::from(serving.num_queues))
            .map(|index| Queue::new(&shared, index, size_max))
            .collect::<io::Result<_>>()?;
        Ok(Self {
            shared,
            queues,
            mappings: Vec::new(),
            tracking: None,
            log: None,
            back_channel: None,
            size_watcher: None,
            read_bytes: None,
            owned: false,
            features: 0,
            protocol_features: 0,
            closing: false,
        })
    }

    /// Stops all rings for good: the daemon ends, and what it has done is told before the front end is hung up on.
    pub(super) fn close(&mut self) {
        self.closing = true;
        self.stop_all(Stop::Publish {
            patience: Duration::ZERO,
        });
    }

    /// Stops all rings and describes the session, for another process to go on with. Nothing starts here any more.
    pub(super) fn hand_over(&mut self) -> io::Result<Session> {
        if self.switched_on_log().is_some() {
            return Err(io::Error::other("a live migration is under way"));
        }
        self.closing = true;
        // What is in flight for longer is held: with in-flight memory it is done again, without it the ring is turned back.
        let how = Stop::Publish {
            patience: Duration::ZERO,
        };
        let rings = self
            .queues
            .iter_mut()
            .map(|queue| {
                let position = queue.stop(how)?;
                let vring = queue.vring.get_ref();
                let ring = vring.get_queue();
                Ok(handover::Ring {
                    state: RingState {
                        size: ring.size(),
                        table: ring.desc_table(),
                        available: ring.avail_ring(),
                        used: ring.used_ring(),
                        position,
                        enabled: vring.is_enabled(),
                        started: ring.ready(),
                    },
                    kick: queue
                        .kick
                        .as_ref()
                        .map(|kick| kick.try_clone())
                        .transpose()?,
                    call: handover::copy(&queue.call)?,
                    error: queue.error_call.copy()?,
                })
            })
            .collect::<io::Result<_>>()?;
        let memory = self.shared.memory.memory();
        let regions = memory
            .iter()
            .map(|region| {
                let (guest, length_bytes) = (region.start_addr().0, region.len());
                let mapping = self.mappings.iter().find(|mapping| mapping.guest == guest);
                let (Some(file), Some(mapping)) = (region.file_offset(), mapping) else {
                    return Err(io::Error::other("guest memory without a file"));
                };
                Ok(handover::Region {
                    place: Place {
                        guest,
                        front_end: mapping.front_end,
                        length_bytes,
                        file_offset_bytes: file.start(),
                    },
                    file: file.file().try_clone()?,
                })
            })
            .collect::<io::Result<_>>()?;
        let tracking = self.tracking.as_ref().map(|region| region.give());
        Ok(Session {
            connection: self.shared.connection.try_clone()?,
            features: self.features,
            protocol_features: self.protocol_features,
            write_cache: self.shared.volume.write_cache(),
            read_bytes: self.read_bytes,
            back_channel: (self.back_channel.as_ref())
                .map(|channel| channel.copy())
                .transpose()?,
            regions,
            tracking: tracking
                .transpose()?
                .flatten()
                .map(|(shape, file)| ((&shape).into(), file)),
            rings,
        })
    }

    /// Takes everything from a session that another process has stopped, but the features, which come as messages. No ring runs
    /// before [`Self::start_taken_over`].
    pub(super) fn take_over(&mut self, session: &Session) -> Result<()> {
        self.owned = true;
        if session.rings.len() != self.queues.len() {
            return Err(Error::InvalidOperation("a session with other queues"));
        }
        if session.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            // Its rings would start as soon as they are there.
            return Err(Error::InvalidOperation(
                "a session without protocol features",
            ));
        }
        let mut regions = Vec::new();
        let mut files = Vec::new();
        for handover::Region { place, file } in &session.regions {
            regions.push(VhostUserMemoryRegion::new(
                place.guest,
                place.length_bytes,
                place.front_end,
                place.file_offset_bytes,
            ));
            files.push(file.try_clone().map_err(Error::ReqHandlerError)?);
        }
        self.set_mem_table(&regions, files, None)?;
        if let Some((shape, file)) = &session.tracking {
            let file = file.try_clone().map_err(Error::ReqHandlerError)?;
            self.set_inflight_fd(&(*shape).into(), file)?;
        }
        self.read_bytes = session.read_bytes;
        if let Some(channel) = &session.back_channel {
            let channel = channel.try_clone().map_err(Error::ReqHandlerError)?;
            self.keep_back_channel(
                BackChannel::new(channel.into()).map_err(Error::ReqHandlerError)?,
            );
        }
        for (index, ring) in (0_u8..).zip(&session.rings) {
            let handover::Ring {
                state,
                kick,
                call,
                error,
            } = ring;
            let copy = |file| handover::copy(file).map_err(Error::ReqHandlerError);
            self.set_vring_err(index, copy(error)?)?;
            self.set_vring_call(index, copy(call)?)?;
            if !state.started {
                continue;
            }
            self.set_vring_num(u32::from(index), u32::from(state.size))?;
            self.set_vring_base(u32::from(index), u32::from(state.position))?;
            self.queue(u32::from(index))?
                .vring
                .get_mut()
                .set_queue_info(state.table, state.available, state.used)
                .map_err(|_| Error::InvalidParam)?;
            if let Some(kick) = copy(kick)? {
                self.set_vring_kick(index, Some(kick))?;
            }
        }
        Ok(())
    }

    /// Starts the rings that ran: the other process has let go.
    pub(super) fn start_taken_over(&mut self, session: &Session) -> Result<()> {
        self.shared.volume.set_write_cache(session.write_cache);
        for (index, ring) in (0_u32..).zip(&session.rings) {
            if ring.state.enabled {
                self.set_vring_enable(index, true)?;
            }
        }
        Ok(())
    }

    /// SET_BACKEND_REQ_FD: the front end listens there.
    pub(super) fn take_back_channel(&mut self, offered: Offered) -> Result<()> {
        let has = |feature: VhostUserProtocolFeatures| self.protocol_features & feature.bits() != 0;
        if !has(VhostUserProtocolFeatures::BACKEND_REQ) {
            return Err(Error::InactiveOperation(
                VhostUserProtocolFeatures::BACKEND_REQ,
            ));
        }
        let needs_reply = offered.needs_reply && has(VhostUserProtocolFeatures::REPLY_ACK);
        self.keep_back_channel(offered.channel);
        if needs_reply {
            back_channel::acknowledge(&self.shared.connection).map_err(Error::SocketError)?;
        }
        Ok(())
    }

    fn keep_back_channel(&mut self, channel: BackChannel) {
        let channel = Arc::new(channel);
        let (told, name) = (
            Arc::clone(&channel),
            self.shared.volume.settings.name.clone(),
        );
        let watcher: Arc<SizeWatcher> = Arc::new(move || tell_size(&told, &name));
        self.shared.volume.watch_size(&watcher);
        (self.back_channel, self.size_watcher) = (Some(channel), Some(watcher));
    }

    /// A front end that has not read the size that the volume has: it believes another, from before the connection.
    fn tell_other_size(&mut self) {
        let size_bytes = self.shared.volume.size_bytes();
        if let Some(channel) = &self.back_channel
            && self.read_bytes != Some(size_bytes)
        {
            tell_size(channel, &self.shared.volume.settings.name);
            self.read_bytes = Some(size_bytes);
        }
    }

    /// Settles all queues: the front end has gone.
    pub(super) fn settle(&mut self) {
        self.closing = true;
        self.stop_all(Stop::Forget);
    }

    fn stop_all(&mut self, how: Stop) {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if let Err(error) = queue.stop(how) {
                let volume = &self.shared.volume.settings.name;
                tracing::error!(%volume, index, %error, "a queue does not settle");
            }
        }
    }

    fn queue(&mut self, index: u32) -> Result<&mut Queue> {
        usize::try_from(index)
            .ok()
            .and_then(|index| self.queues.get_mut(index))
            .ok_or(Error::InvalidParam)
    }

    /// A queue whose ring does not run.
    fn stopped_queue(&mut self, index: u32) -> Result<&mut Queue> {
        let queue = self.queue(index)?;
        if queue.vring.get_ref().get_queue().ready() {
            return Err(Error::InvalidOperation("the ring is running"));
        }
        Ok(queue)
    }

    fn switched_on_log(&self) -> Option<&Arc<DirtyLog>> {
        let switched_on = self.features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0;
        self.log.as_ref().filter(|_| switched_on)
    }

    /// Lets a queue's thread go by what has been set.
    fn refresh(&mut self, index: usize) -> Result<()> {
        if self.closing {
            return Err(Error::InvalidOperation("the daemon is stopping"));
        }
        let log = self.switched_on_log().cloned();
        let queue = self.queues.get_mut(index).ok_or(Error::InvalidParam)?;
        queue
            .refresh(self.tracking.as_ref(), log.as_ref())
            .map_err(Error::ReqHandlerError)
    }

    fn refresh_all(&mut self) -> Result<()> {
        (0..self.queues.len()).try_for_each(|index| self.refresh(index))
    }

    fn guest_address(&self, front_end: u64) -> Result<u64> {
        self.mappings
            .iter()
            .find_map(|mapping| {
                let offset = front_end.checked_sub(mapping.front_end)?;
                (offset < mapping.length_bytes).then(|| mapping.guest.checked_add(offset))?
            })
            .ok_or(Error::InvalidParam)
    }

    /// Replaces guest memory. Requests in flight keep the map they were made from; the threads use the new one when this is over.
    fn replace_memory(&mut self, memory: GuestMemoryMmap, mappings: Vec<Mapping>) -> Result<()> {
        self.shared
            .memory
            .lock()
            .map_err(|_| Error::InvalidOperation("guest memory is being replaced"))?
            .replace(memory);
        self.mappings = mappings;
        self.refresh_all()
    }

    fn num_queues_u16(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    fn offered(&self) -> u64 {
        config_space::features(&self.shared.volume, self.num_queues_u16())
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | VhostUserVirtioFeatures::LOG_ALL.bits()
    }

    fn stop_for_reset(&mut self) -> Result<()> {
        for queue in &mut self.queues {
            queue.vring.set_enabled(false);
            queue.vring.set_queue_ready(false);
            queue.stop(Stop::Reset).map_err(Error::ReqHandlerError)?;
        }
        if let Some(region) = &self.tracking {
            (0..region.queues()).for_each(|index| region.gate.leave(index));
        }
        Ok(())
    }
}

/// Says that the configuration has changed; the size is all that ever does.
fn tell_size(channel: &BackChannel, volume: &str) {
    if let Err(error) = channel.tell_config_change() {
        tracing::warn!(%volume, %error, "a front end cannot be told of the new size");
    }
}

fn region(
    description: &VhostUserMemoryRegion,
    file: File,
) -> Result<(Arc<GuestRegionMmap>, Mapping)> {
    // Memory that the file does not have would kill this process when it is touched.
    let end_bytes = description
        .mmap_offset
        .checked_add(description.memory_size)
        .ok_or(Error::InvalidParam)?;
    let metadata = file.metadata().map_err(Error::ReqHandlerError)?;
    if metadata.is_file() && end_bytes > metadata.len() {
        return Err(Error::ReqHandlerError(io::Error::other(format!(
            "guest memory up to byte {end_bytes} of a file of {} bytes",
            metadata.len()
        ))));
    }
    let mapped = GuestRegionMmap::new(
        description.mmap_region(file)?,
        GuestAddress(description.guest_phys_addr),
    )
    .ok_or(Error::InvalidParam)?;
    let mapping = Mapping {
        front_end: description.user_addr,
        guest: description.guest_phys_addr,
        length_bytes: description.memory_size,
    };
    Ok((Arc::new(mapped), mapping))
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        if self.owned {
            return Err(Error::InvalidOperation("there is an owner already"));
        }
        self.owned = true;
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.owned = false;
        self.features = 0;
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_for_reset()?;
        self.features = 0;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.offered() != 0 {
            return Err(Error::InvalidParam);
        }
        self.features = features;
        // Virtio 1.2, 5.2.5.1: a driver that took neither expects every write to be durable when it is answered.
        let either = 1 << VIRTIO_BLK_F_CONFIG_WCE | 1 << VIRTIO_BLK_F_FLUSH;
        self.shared
            .volume
            .set_driver_flushes(features & either != 0);
        for queue in &self.queues {
            queue
                .vring
                .set_queue_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        }
        // "Ring states": without the protocol features there is no message to enable rings by.
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            for queue in &self.queues {
                queue.vring.set_enabled(true);
            }
        }
        // The dirty log is switched on and off here, while rings run.
        self.refresh_all()
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        if regions.len() != files.len() {
            return Err(Error::InvalidParam);
        }
        let (mapped, mappings): (Vec<_>, Vec<_>) = regions
            .iter()
            .zip(files)
            .map(|(description, file)| region(description, file))
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .unzip();
        let memory = GuestMemoryMmap::from_arc_regions(mapped).map_err(refused)?;
        self.replace_memory(memory, mappings)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let queue = self.stopped_queue(index)?;
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        // The crate's `set_size` would refuse in silence.
        queue
            .vring
            .get_mut()
            .get_queue_mut()
            .try_set_size(size)
            .map_err(|_| Error::InvalidParam)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let table = self.guest_address(descriptor)?;
        let available = self.guest_address(available)?;
        let used = self.guest_address(used)?;
        let queue = self.queue(index)?;
        let mut vring = queue.vring.get_mut();
        let ring = vring.get_queue();
        if ring.ready() {
            // QEMU repeats the addresses of a running ring when it switches the dirty log.
            let same = (ring.desc_table(), ring.avail_ring(), ring.used_ring())
                == (table, available, used);
            return if same {
                Ok(())
            } else {
                Err(Error::InvalidOperation("the ring is running"))
            };
        }
        vring
            .set_queue_info(table, available, used)
            .map_err(|_| Error::InvalidParam)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.stopped_queue(index)?.vring.set_queue_next_avail(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let patience = HELD_PATIENCE;
        let queue = self.queue(index)?;
        queue.vring.set_queue_ready(false);
        let position = queue
            .stop(Stop::Publish { patience })
            .map_err(Error::ReqHandlerError)?;
        queue.vring.set_call(None);
        queue.call = None;
        queue.kick = None;
        queue.refresh(None, None).map_err(Error::ReqHandlerError)?;
        if let Some(region) = &self.tracking
            && let Ok(index) = usize::try_from(index)
        {
            region.gate.leave(index);
        }
        Ok(VhostUserVringState::new(index, u32::from(position)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let queue = self.queue(u32::from(index))?;
        if file.is_none() {
            return Err(Error::InvalidOperation("a ring without kicks"));
        }
        queue.kick = file.map(Arc::new);
        queue.vring.set_queue_ready(true);
        self.refresh(usize::from(index))
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let queue = self.queue(u32::from(index))?;
        queue.call = handover::copy(&file).map_err(Error::ReqHandlerError)?;
        queue.vring.set_call(file);
        // What was published before may have been told on a descriptor that nobody listens to.
        let vring = queue.vring.get_ref();
        if vring.get_queue().ready()
            && let Err(error) = vring.signal_used_queue()
        {
            tracing::debug!(%error, "a guest cannot be interrupted");
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.queue(u32::from(index))?.error_call.set(file);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::BACKEND_REQ)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        // Each of them shows itself by its messages; kept for who takes the session over.
        self.protocol_features = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.num_queues_u16()))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        if self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(Error::InactiveFeature(
                VhostUserVirtioFeatures::PROTOCOL_FEATURES,
            ));
        }
        self.queue(index)?.vring.set_enabled(enable);
        self.refresh(usize::try_from(index).map_err(|_| Error::InvalidParam)?)?;
        if enable {
            self.tell_other_size();
        }
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let queues = self.num_queues_u16();
        // Before it is read: should it change in between, the front end is told of it.
        self.read_bytes = Some(self.shared.volume.size_bytes());
        Ok(config_space::read(
            &self.shared.volume,
            queues,
            offset,
            size,
        ))
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        if let Some(on) = config_space::write_cache_written(offset, buf) {
            let volume = &self.shared.volume;
            tracing::info!(volume = %volume.settings.name, on, "write cache");
            volume.set_write_cache(on);
        }
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("a disk has no display"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("a disk has no shared objects"))
    }

    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        let (_, answer, file) = Region::create(inflight).map_err(refused)?;
        Ok((answer, file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        if self
            .queues
            .iter()
            .any(|queue| queue.vring.get_ref().get_queue().ready())
        {
            return Err(Error::InvalidOperation("a ring is running"));
        }
        let region = Region::map(inflight, file).map_err(refused)?;
        // Nobody serves what is named of queues that the device does not have.
        (self.queues.len()..region.queues()).for_each(|index| region.gate.leave(index));
        self.tracking = Some(region);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MEMORY_REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        description: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        if self.mappings.len() >= MEMORY_REGIONS_MAX {
            return Err(Error::InvalidParam);
        }
        let (mapped, mapping) = region(description, file)?;
        let memory = self
            .shared
            .memory
            .memory()
            .insert_region(mapped)
            .map_err(refused)?;
        let mut mappings = self.mappings.clone();
        mappings.push(mapping);
        self.replace_memory(memory, mappings)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, description: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (guest, length_bytes) = (description.guest_phys_addr, description.memory_size);
        let (memory, _) = self
            .shared
            .memory
            .memory()
            .remove_region(GuestAddress(guest), length_bytes)
            .map_err(refused)?;
        let mut mappings = self.mappings.clone();
        mappings.retain(|mapping| mapping.guest != guest);
        self.replace_memory(memory, mappings)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("a disk has no device state"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("a disk has no device state"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("a disk shares no memory"))
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        self.log = Some(DirtyLog::map(log, file).map_err(Error::ReqHandlerError)?);
        self.refresh_all()
    }
}
