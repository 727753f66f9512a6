//! A descriptor chain becomes a request, or an answer at once (virtio 1.2, 5.2.6).
//!
//! Called by `queue` for every chain a guest makes available. Everything in a chain is chosen by a hostile guest:
//! addresses, lengths, flags, the header. Framing is not assumed: header and status may be split over or share descriptors with data
//! (`VIRTIO_F_VERSION_1` implies any layout).
//!
//! Invariants: what is handed to the engine lies inside guest memory and inside the disk, is whole sectors, and at most
//! [`DATA_BYTES_MAX`] long; nothing here allocates by a length that a guest has named. The header is copied once: what was
//! checked is what is used.

use super::chain::Chain;
use super::config_space::{CLEAR_SECTORS_MAX, SECTOR_BYTES};
use crate::engine::{GuestBuffers, GuestRange, Op, Outcome, Request};
use std::sync::Arc;
use vhost_blk_wire::types::ByteRange;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// `struct virtio_blk_req` before the data: type, reserved, sector.
const HEADER_BYTES: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`: sector, count, flags.
const CLEAR_SEGMENT_BYTES: usize = 16;
/// Longest data of a request. Linux sends at most a few MiB.
const DATA_BYTES_MAX: u64 = crate::engine::REQUEST_BYTES_MAX;

/// What to do with a chain.
#[derive(Debug)]
pub(super) enum Parsed {
    /// Give it to the engine.
    Engine(Request, Answer),
    /// Tell the guest at once.
    Now(Outcome, Answer),
    /// There is no place for a status: the chain goes back as it is.
    Unanswerable(&'static str),
}

/// Where the answer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// Guest-physical address of the status byte.
    pub(super) status: u64,
    /// Bytes the device writes before the status byte when all goes well.
    pub(super) data_bytes: u32,
}

impl Answer {
    /// Writes the status byte; answers how many bytes of the chain were written.
    pub(super) fn write(&self, memory: &GuestMemoryMmap, outcome: Outcome) -> u32 {
        use virtio_bindings::bindings::virtio_blk::{
            VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
        };
        let (status, data_bytes) = match outcome {
            Outcome::Done => (VIRTIO_BLK_S_OK, self.data_bytes),
            Outcome::Failed => (VIRTIO_BLK_S_IOERR, 0),
            Outcome::Unsupported => (VIRTIO_BLK_S_UNSUPP, 0),
        };
        let status = u8::try_from(status).unwrap_or(u8::MAX);
        match memory.write_obj(status, GuestAddress(self.status)) {
            Ok(()) => data_bytes.saturating_add(1),
            Err(_) => 0,
        }
    }
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Disk<'a> {
    /// Its length in bytes.
    pub(super) size_bytes: u64,
    /// The guest may not write.
    pub(super) read_only: bool,
    /// Its serial.
    pub(super) serial: &'a str,
}

/// Makes sense of a chain; cuts header and status off it.
pub(super) fn parse(memory: &Arc<GuestMemoryMmap>, chain: &mut Chain, disk: Disk<'_>) -> Parsed {
    let Some(status) = take_last_byte(&mut chain.writable) else {
        return Parsed::Unanswerable("there is no status byte");
    };
    if !memory.address_in_range(GuestAddress(status)) {
        return Parsed::Unanswerable("the status byte is not in guest memory");
    }
    let mut answer = Answer {
        status,
        data_bytes: 0,
    };
    match understand(memory, chain, disk, &mut answer) {
        Ok(Understood::Request(request)) => Parsed::Engine(request, answer),
        Ok(Understood::Answered) => Parsed::Now(Outcome::Done, answer),
        Err(outcome) => Parsed::Now(outcome, answer),
    }
}

enum Understood {
    Request(Request),
    Answered,
}

fn understand(
    memory: &Arc<GuestMemoryMmap>,
    chain: &mut Chain,
    disk: Disk<'_>,
    answer: &mut Answer,
) -> Result<Understood, Outcome> {
    let header = take_front::<HEADER_BYTES>(memory, &mut chain.readable).ok_or(Outcome::Failed)?;
    let [k0, k1, k2, k3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
    let kind = u32::from_le_bytes([k0, k1, k2, k3]);
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let (readable, writable) = (&mut chain.readable, &chain.writable);
    let request = match kind {
        VIRTIO_BLK_T_IN => {
            let data = buffers(memory, writable)?;
            answer.data_bytes = u32::try_from(data.length_bytes()).map_err(|_| Outcome::Failed)?;
            request(Op::Read, range(disk, sector, data.length_bytes())?, data)
        }
        VIRTIO_BLK_T_OUT if disk.read_only => return Err(Outcome::Failed),
        VIRTIO_BLK_T_OUT => {
            let data = buffers(memory, readable)?;
            request(Op::Write, range(disk, sector, data.length_bytes())?, data)
        }
        VIRTIO_BLK_T_FLUSH => {
            let nowhere = ByteRange {
                offset_bytes: 0,
                length_bytes: 0,
            };
            request(Op::Flush, nowhere, GuestBuffers::empty(Arc::clone(memory)))
        }
        VIRTIO_BLK_T_GET_ID => {
            let data = buffers(memory, writable)?;
            let mut id = [0_u8; VIRTIO_BLK_ID_BYTES as usize];
            for (to, from) in id.iter_mut().zip(disk.serial.bytes()) {
                *to = from;
            }
            let length = data.length_bytes().min(u64::from(VIRTIO_BLK_ID_BYTES));
            let known = usize::try_from(length)
                .ok()
                .and_then(|length| id.get(..length));
            data.write_at(0, known.unwrap_or_default())
                .map_err(|_| Outcome::Failed)?;
            answer.data_bytes = u32::try_from(length).unwrap_or(0);
            return Ok(Understood::Answered);
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if disk.read_only => {
            return Err(Outcome::Failed);
        }
        kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => {
            clear(memory, readable, disk, kind == VIRTIO_BLK_T_DISCARD)?
        }
        _ => return Err(Outcome::Unsupported),
    };
    Ok(Understood::Request(request))
}

/// Discard and write-zeroes. The device offers one segment per request.
fn clear(
    memory: &Arc<GuestMemoryMmap>,
    readable: &mut [GuestRange],
    disk: Disk<'_>,
    discard: bool,
) -> Result<Request, Outcome> {
    let segment = take_front::<CLEAR_SEGMENT_BYTES>(memory, readable).ok_or(Outcome::Failed)?;
    if readable.iter().any(|range| range.length_bytes > 0) {
        return Err(Outcome::Failed);
    }
    let [
        s0,
        s1,
        s2,
        s3,
        s4,
        s5,
        s6,
        s7,
        c0,
        c1,
        c2,
        c3,
        f0,
        f1,
        f2,
        f3,
    ] = segment;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let sectors = u32::from_le_bytes([c0, c1, c2, c3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    let may_unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    let op = match (discard, may_unmap) {
        // 5.2.6.2: UNSUPP if an unknown flag is set, and if unmap is set on a discard.
        _ if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 => return Err(Outcome::Unsupported),
        (true, true) => return Err(Outcome::Unsupported),
        (true, false) => Op::Discard,
        (false, may_unmap) => Op::WriteZeroes { may_unmap },
    };
    if sectors > CLEAR_SECTORS_MAX {
        return Err(Outcome::Failed);
    }
    let length_bytes = u64::from(sectors) * SECTOR_BYTES;
    let range = range(disk, sector, length_bytes)?;
    Ok(request(op, range, GuestBuffers::empty(Arc::clone(memory))))
}

fn request(op: Op, range: ByteRange, buffers: GuestBuffers) -> Request {
    Request { op, range, buffers }
}

fn buffers(memory: &Arc<GuestMemoryMmap>, ranges: &[GuestRange]) -> Result<GuestBuffers, Outcome> {
    GuestBuffers::new(Arc::clone(memory), ranges).map_err(|_| Outcome::Failed)
}

/// The bytes that a request names, if they are whole sectors of the disk, and some.
fn range(disk: Disk<'_>, sector: u64, length_bytes: u64) -> Result<ByteRange, Outcome> {
    let offset_bytes = sector.checked_mul(SECTOR_BYTES).ok_or(Outcome::Failed)?;
    let end_bytes = offset_bytes
        .checked_add(length_bytes)
        .ok_or(Outcome::Failed)?;
    if length_bytes == 0
        || length_bytes > DATA_BYTES_MAX
        || !length_bytes.is_multiple_of(SECTOR_BYTES)
        || end_bytes > disk.size_bytes
    {
        return Err(Outcome::Failed);
    }
    Ok(ByteRange {
        offset_bytes,
        length_bytes,
    })
}

/// Cuts the last byte off; answers its address.
fn take_last_byte(ranges: &mut Vec<GuestRange>) -> Option<u64> {
    loop {
        let last = ranges.last_mut()?;
        let Some(rest) = last.length_bytes.checked_sub(1) else {
            ranges.pop();
            continue;
        };
        last.length_bytes = rest;
        return last.address.checked_add(u64::from(rest));
    }
}

/// Copies the first bytes and cuts them off, leaving empty ranges; `None` if there are not so many in guest memory.
fn take_front<const N: usize>(
    memory: &GuestMemoryMmap,
    ranges: &mut [GuestRange],
) -> Option<[u8; N]> {
    let mut taken = [0; N];
    let mut rest = taken.as_mut_slice();
    for range in ranges {
        if rest.is_empty() {
            break;
        }
        let count = usize::try_from(range.length_bytes)
            .unwrap_or(usize::MAX)
            .min(rest.len());
        let (now, later) = rest.split_at_mut(count);
        memory.read_slice(now, GuestAddress(range.address)).ok()?;
        let count = u32::try_from(count).ok()?;
        range.address = range.address.checked_add(u64::from(count))?;
        range.length_bytes -= count;
        rest = later;
    }
    rest.is_empty().then_some(taken)
}

#[cfg(test)]
mod tests;
