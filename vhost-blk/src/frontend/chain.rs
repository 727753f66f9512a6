//! A descriptor chain, walked from its head: what the guest lets the device read, and what it lets it write.
//!
//! Filled by `ring` for every request, read by `request`. Everything in it is chosen by a hostile guest. One [`Chain`] serves
//! a queue for as long as it runs, so that a request costs no allocation here.
//!
//! Invariants: at most [`DESCRIPTORS_MAX`] descriptors; readable ones come first (virtio 1.2, 2.7.4.2).

use crate::engine::GuestRange;

/// Most descriptors of a chain: the longest ring.
pub(super) const DESCRIPTORS_MAX: usize = 1024;
/// Bytes of a descriptor (`struct virtq_desc`).
pub(super) const DESCRIPTOR_BYTES: usize = 16;

/// Another descriptor follows.
pub(super) const FLAG_NEXT: u16 = 1;
/// The device writes to it.
pub(super) const FLAG_WRITE: u16 = 2;
/// It names a table of descriptors.
pub(super) const FLAG_INDIRECT: u16 = 4;

/// What is wrong with a chain. It goes back to the guest as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct BadChain(pub(super) &'static str);

/// A descriptor as the guest wrote it (virtio 1.2, 2.7.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// Guest-physical address.
    pub(super) address: u64,
    /// Length in bytes.
    pub(super) length_bytes: u32,
    /// `FLAG_`s.
    pub(super) flags: u16,
    /// Index of the next one, with [`FLAG_NEXT`].
    pub(super) next: u16,
}

impl Descriptor {
    /// From its bytes in guest memory.
    pub(super) fn from_bytes(bytes: [u8; DESCRIPTOR_BYTES]) -> Self {
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            l0,
            l1,
            l2,
            l3,
            f0,
            f1,
            n0,
            n1,
        ] = bytes;
        Self {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            length_bytes: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    /// True if `flag` is set.
    pub(super) fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// The ranges of one chain.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// What the device reads, in order.
    pub(super) readable: Vec<GuestRange>,
    /// What the device writes, in order.
    pub(super) writable: Vec<GuestRange>,
    /// Copy of an indirect table.
    pub(super) table: Vec<u8>,
}

impl Chain {
    /// Begins another chain.
    pub(super) fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
    }

    /// Adds what a descriptor names.
    pub(super) fn push(&mut self, descriptor: Descriptor) -> Result<(), BadChain> {
        if self.readable.len() + self.writable.len() >= DESCRIPTORS_MAX {
            return Err(BadChain("the chain has too many descriptors"));
        }
        let range = GuestRange {
            address: descriptor.address,
            length_bytes: descriptor.length_bytes,
        };
        if descriptor.has(FLAG_WRITE) {
            self.writable.push(range);
        } else if self.writable.is_empty() {
            self.readable.push(range);
        } else {
            return Err(BadChain("a readable descriptor follows a writable one"));
        }
        Ok(())
    }
}
