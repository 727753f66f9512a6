//! A split virtqueue in guest memory (virtio 1.2, 2.7): available ring, descriptor table, used ring.
//!
//! Called by `queue` on the queue's thread. A [`Ring`] is made for one pass from the memory map of that pass: the three areas
//! are looked up once, every access after that is a bounds check and a load or store. It knows positions only as its caller
//! names them; nothing that was read from the guest is believed twice.
//!
//! Every failure here means that the ring as a whole makes no sense ([`RingBroken`]); what is wrong with one chain is
//! [`BadChain`].

use super::chain::{
    BadChain, Chain, DESCRIPTOR_BYTES, DESCRIPTORS_MAX, Descriptor, FLAG_INDIRECT, FLAG_NEXT,
};
use std::sync::atomic::{Ordering, fence};
use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// Bytes of flags and index, before the entries of both rings.
const HEADER_BYTES: usize = 4;
/// Where the index is in both rings.
const INDEX: usize = 2;
/// Bytes of an entry of the available ring.
const AVAILABLE_BYTES: usize = 2;
/// Bytes of an entry of the used ring.
const USED_BYTES: usize = 8;
/// Bytes of `used_event` and `avail_event`, behind the entries.
const EVENT_BYTES: usize = 2;

/// Why a ring cannot be served any more. It stays so until the front end starts it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RingBroken {
    /// Part of it is not in guest memory.
    #[error("the ring is not in guest memory")]
    NotThere,
    /// More is available than the ring holds.
    #[error("the available index is {ahead} ahead of a ring of {size}")]
    Jumped {
        /// Entries.
        ahead: u16,
        /// Entries that there are.
        size: u16,
    },
    /// A head that the descriptor table does not have.
    #[error("descriptor {0} is not in the table")]
    NoSuchHead(u16),
    /// A head that the device has not given back yet.
    #[error("descriptor {0} is in flight already")]
    HeadInFlight(u16),
}

/// Where a ring is. Guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Entries, a power of two.
    pub(super) size: u16,
    /// Descriptor table.
    pub(super) table: u64,
    /// Available ring.
    pub(super) available: u64,
    /// Used ring.
    pub(super) used: u64,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub(super) event_idx: bool,
}

impl Layout {
    /// Length of the used ring.
    pub(super) fn used_bytes(&self) -> u64 {
        (HEADER_BYTES + usize::from(self.size) * USED_BYTES + EVENT_BYTES) as u64
    }
}

/// A ring as it lies in one memory map.
#[derive(Debug)]
pub(super) struct Ring<'m> {
    memory: &'m GuestMemoryMmap,
    layout: Layout,
    table: VolatileSlice<'m>,
    available: VolatileSlice<'m>,
    used: VolatileSlice<'m>,
}

impl<'m> Ring<'m> {
    /// Looks the ring up in a memory map.
    pub(super) fn new(memory: &'m GuestMemoryMmap, layout: Layout) -> Result<Self, RingBroken> {
        let entries = usize::from(layout.size);
        let area = |address, length| {
            memory
                .get_slice(GuestAddress(address), length)
                .map_err(|_| RingBroken::NotThere)
        };
        Ok(Self {
            table: area(layout.table, entries * DESCRIPTOR_BYTES)?,
            available: area(
                layout.available,
                HEADER_BYTES + entries * AVAILABLE_BYTES + EVENT_BYTES,
            )?,
            used: area(
                layout.used,
                HEADER_BYTES + entries * USED_BYTES + EVENT_BYTES,
            )?,
            memory,
            layout,
        })
    }

    /// Place of a free-running position within the ring.
    fn place(&self, position: u16) -> usize {
        usize::from(position & (self.layout.size - 1))
    }

    /// The driver's index: one past the newest available entry. What lies before it is visible to us afterwards.
    pub(super) fn available_index(&self) -> Result<u16, RingBroken> {
        load(&self.available, INDEX, Ordering::Acquire)
    }

    /// Number of entries from `position` on that are available.
    pub(super) fn available_from(&self, position: u16) -> Result<u16, RingBroken> {
        let ahead = self.available_index()?.wrapping_sub(position);
        if ahead > self.layout.size {
            return Err(RingBroken::Jumped {
                ahead,
                size: self.layout.size,
            });
        }
        Ok(ahead)
    }

    /// The head of the chain at `position`.
    pub(super) fn available_head(&self, position: u16) -> Result<u16, RingBroken> {
        let place = HEADER_BYTES + self.place(position) * AVAILABLE_BYTES;
        let head = load(&self.available, place, Ordering::Relaxed)?;
        if head >= self.layout.size {
            return Err(RingBroken::NoSuchHead(head));
        }
        Ok(head)
    }

    /// Walks the chain that starts at `head`.
    pub(super) fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), BadChain> {
        chain.clear();
        let mut index = head;
        // A chain has at most as many descriptors as the table, or it goes round in a circle.
        for _ in 0..self.layout.size {
            if index >= self.layout.size {
                return Err(BadChain("a descriptor is not in the table"));
            }
            let bytes: [u8; DESCRIPTOR_BYTES] = self
                .table
                .read_obj(usize::from(index) * DESCRIPTOR_BYTES)
                .map_err(|_| BadChain("the descriptor table cannot be read"))?;
            let descriptor = Descriptor::from_bytes(bytes);
            if descriptor.has(FLAG_INDIRECT) {
                if descriptor.has(FLAG_NEXT) {
                    return Err(BadChain("a descriptor is indirect and has a next"));
                }
                return self.walk_indirect(descriptor, chain);
            }
            chain.push(descriptor)?;
            if !descriptor.has(FLAG_NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(BadChain("the chain goes round in a circle"))
    }

    /// The table is copied first: what was checked is what is used.
    fn walk_indirect(&self, outer: Descriptor, chain: &mut Chain) -> Result<(), BadChain> {
        let length = usize::try_from(outer.length_bytes).unwrap_or(usize::MAX);
        if length == 0
            || !length.is_multiple_of(DESCRIPTOR_BYTES)
            || length > DESCRIPTORS_MAX * DESCRIPTOR_BYTES
        {
            return Err(BadChain("an indirect table has a bad length"));
        }
        let mut table = std::mem::take(&mut chain.table);
        table.resize(length, 0);
        let read = self
            .memory
            .read_slice(&mut table, GuestAddress(outer.address))
            .map_err(|_| BadChain("an indirect table is not in guest memory"));
        let walked = read.and_then(|()| walk_table(&table, chain));
        chain.table = table;
        walked
    }

    /// Writes an entry of the used ring. The driver does not look at it before [`Self::publish`].
    pub(super) fn write_used(
        &self,
        position: u16,
        head: u16,
        length_bytes: u32,
    ) -> Result<(), RingBroken> {
        let entry = u64::from(head) | u64::from(length_bytes) << 32;
        let place = HEADER_BYTES + self.place(position) * USED_BYTES;
        self.used
            .write_obj(entry.to_le_bytes(), place)
            .map_err(|_| RingBroken::NotThere)
    }

    /// The device's index, as the guest sees it.
    pub(super) fn used_index(&self) -> Result<u16, RingBroken> {
        load(&self.used, INDEX, Ordering::Relaxed)
    }

    /// Tells the driver that all entries before `index` are used. Everything written before is visible to it then.
    pub(super) fn publish(&self, index: u16) -> Result<(), RingBroken> {
        store(&self.used, INDEX, index, Ordering::Release)
    }

    /// True if the driver wants to be told that the used index went from `old` to `new` (virtio 1.2, 2.7.7).
    pub(super) fn wants_interrupt(&self, old: u16, new: u16) -> Result<bool, RingBroken> {
        // The driver writes its wish and then looks at the index; we write the index and then look at its wish.
        fence(Ordering::SeqCst);
        if self.layout.event_idx {
            let place = HEADER_BYTES + usize::from(self.layout.size) * AVAILABLE_BYTES;
            let event = load(&self.available, place, Ordering::Relaxed)?;
            let since_event = new.wrapping_sub(event).wrapping_sub(1);
            return Ok(since_event < new.wrapping_sub(old));
        }
        let flags = load(&self.available, 0, Ordering::Relaxed)?;
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks the driver to tell of what becomes available from `position` on; true if something has already.
    pub(super) fn ask_for_kicks(&self, position: u16) -> Result<bool, RingBroken> {
        if self.layout.event_idx {
            let place = HEADER_BYTES + usize::from(self.layout.size) * USED_BYTES;
            store(&self.used, place, position, Ordering::Relaxed)?;
        } else {
            store(&self.used, 0, 0, Ordering::Relaxed)?;
        }
        // The counterpart of the driver's barrier between its index and its look at our wish.
        fence(Ordering::SeqCst);
        Ok(self.available_index()? != position)
    }

    /// Asks the driver not to tell, since we look by ourselves. With `EVENT_IDX` an old position says so already.
    pub(super) fn ask_for_no_kicks(&self) -> Result<(), RingBroken> {
        if self.layout.event_idx {
            return Ok(());
        }
        let flag = u16::try_from(VRING_USED_F_NO_NOTIFY).unwrap_or(1);
        store(&self.used, 0, flag, Ordering::Relaxed)
    }
}

fn walk_table(table: &[u8], chain: &mut Chain) -> Result<(), BadChain> {
    let (descriptors, _) = table.as_chunks::<DESCRIPTOR_BYTES>();
    let mut index = 0;
    for _ in 0..descriptors.len() {
        let bytes = descriptors
            .get(index)
            .ok_or(BadChain("a descriptor is not in the indirect table"))?;
        let descriptor = Descriptor::from_bytes(*bytes);
        if descriptor.has(FLAG_INDIRECT) {
            return Err(BadChain("an indirect table within another"));
        }
        chain.push(descriptor)?;
        if !descriptor.has(FLAG_NEXT) {
            return Ok(());
        }
        index = usize::from(descriptor.next);
    }
    Err(BadChain("the indirect chain goes round in a circle"))
}

fn load(area: &VolatileSlice<'_>, place: usize, order: Ordering) -> Result<u16, RingBroken> {
    area.load(place, order)
        .map(u16::from_le)
        .map_err(|_| RingBroken::NotThere)
}

fn store(
    area: &VolatileSlice<'_>,
    place: usize,
    value: u16,
    order: Ordering,
) -> Result<(), RingBroken> {
    area.store(value.to_le(), place, order)
        .map_err(|_| RingBroken::NotThere)
}

#[cfg(test)]
mod tests;
