//! Feature bits and the configuration space of the disk (virtio 1.2, 5.2.3 and 5.2.4), serialised by hand.
//!
//! Called by `device`. Knows nothing of queues.

use crate::engine::VolumeEngine;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

/// Sector of virtio, in bytes: the unit of every address and length a guest names.
pub(super) const SECTOR_BYTES: u64 = 512;
/// Most queues of a device: as many as a thread mask of the vhost-user crate has bits, less what is sensible.
pub const QUEUES_MAX: u16 = 32;
/// Longest ring.
pub(super) const QUEUE_SIZE_MAX: usize = 1024;
/// Data segments per request: QEMU's rings have 128 entries, less header and status.
const SEGMENTS_MAX: u32 = 126;
/// Longest discard or write-zeroes, in sectors (32 MiB): bounds what one request preserves or punches at once.
pub(super) const CLEAR_SECTORS_MAX: u32 = 65_536;
/// Granularity of the store, in sectors.
const STORE_BLOCK_SECTORS: u32 = 8;
/// log2 of the physical block (4 KiB) over the logical block (512 bytes).
const PHYSICAL_BLOCK_EXP: u8 = 3;
/// Bytes of the largest configuration space any driver reads (with zoned fields, all zero here).
const SPACE_BYTES: usize = 96;
/// Where `writeback` is.
const WRITEBACK_OFFSET: u32 = 32;
/// Cloud Hypervisor up to v46 names offsets from here on, others from 0.
const OLD_CLOUD_HYPERVISOR_BASE: u32 = 0x100;

/// Device features, without `VHOST_USER_F_PROTOCOL_FEATURES`.
pub(super) fn features(volume: &VolumeEngine, queues: u16) -> u64 {
    let mut bits = vec![
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_F_VERSION_1,
    ];
    if queues > 1 {
        bits.push(VIRTIO_BLK_F_MQ);
    }
    if volume.settings.read_only {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.push(VIRTIO_BLK_F_DISCARD);
        bits.push(VIRTIO_BLK_F_WRITE_ZEROES);
    }
    bits.into_iter().fold(0, |set, bit| set | 1_u64 << bit)
}

/// A part of the configuration space: exactly `size_bytes` long, zeroes where the device has nothing.
pub(super) fn read(
    volume: &VolumeEngine,
    queues: u16,
    offset_bytes: u32,
    size_bytes: u32,
) -> Vec<u8> {
    let offset = relative(offset_bytes);
    let space = whole(volume, queues);
    let mut part = vec![0; usize::try_from(size_bytes).unwrap_or(0).min(4096)];
    let known = usize::try_from(offset)
        .ok()
        .and_then(|offset| space.get(offset..));
    if let Some(known) = known {
        for (to, from) in part.iter_mut().zip(known) {
            *to = *from;
        }
    }
    part
}

/// What a write to the configuration space asks for: the write cache on or off. Everything else is read-only.
pub(super) fn write_cache_written(offset_bytes: u32, bytes: &[u8]) -> Option<bool> {
    let place = WRITEBACK_OFFSET.checked_sub(relative(offset_bytes))?;
    let byte = bytes.get(usize::try_from(place).ok()?)?;
    Some(*byte != 0)
}

fn relative(offset_bytes: u32) -> u32 {
    offset_bytes
        .checked_sub(OLD_CLOUD_HYPERVISOR_BASE)
        .unwrap_or(offset_bytes)
}

/// `struct virtio_blk_config`.
fn whole(volume: &VolumeEngine, queues: u16) -> Vec<u8> {
    let clear_sectors_max = if volume.settings.read_only {
        0
    } else {
        CLEAR_SECTORS_MAX
    };
    let clear_segments_max = u32::from(!volume.settings.read_only);
    let mut space = Vec::with_capacity(SPACE_BYTES);
    space.extend((volume.size_bytes() / SECTOR_BYTES).to_le_bytes()); // capacity
    space.extend(0_u32.to_le_bytes()); // size_max
    space.extend(SEGMENTS_MAX.to_le_bytes()); // seg_max
    space.extend([0; 4]); // geometry
    space.extend(512_u32.to_le_bytes()); // blk_size
    space.push(PHYSICAL_BLOCK_EXP);
    space.push(0); // alignment_offset
    space.extend(8_u16.to_le_bytes()); // min_io_size, in logical blocks
    space.extend(0_u32.to_le_bytes()); // opt_io_size
    space.push(u8::from(volume.write_cache())); // writeback
    space.push(0); // unused0
    space.extend(queues.to_le_bytes()); // num_queues
    space.extend(clear_sectors_max.to_le_bytes()); // max_discard_sectors
    space.extend(clear_segments_max.to_le_bytes()); // max_discard_seg
    space.extend(STORE_BLOCK_SECTORS.to_le_bytes()); // discard_sector_alignment
    space.extend(clear_sectors_max.to_le_bytes()); // max_write_zeroes_sectors
    space.extend(clear_segments_max.to_le_bytes()); // max_write_zeroes_seg
    space.push(1); // write_zeroes_may_unmap
    space.resize(SPACE_BYTES, 0);
    space
}

#[cfg(test)]
mod tests;
