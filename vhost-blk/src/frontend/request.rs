//! A descriptor chain becomes a request, or an answer at once (virtio 1.2, 5.2.6).
//!
//! Called by `device` for every chain a guest makes available. Everything in a chain is chosen by a hostile guest:
//! addresses, lengths, flags, the header. Framing is not assumed: header and status may be split over or share descriptors with data
//! (`VIRTIO_F_VERSION_1` implies any layout).
//!
//! Invariants: what is handed to the engine lies inside guest memory and inside the disk, is whole sectors, and at most
//! [`DATA_BYTES_MAX`] long; nothing here allocates by a length that a guest has named.

use super::config_space::{CLEAR_SECTORS_MAX, SECTOR_BYTES};
use crate::engine::{GuestBuffers, GuestRange, Op, Outcome, Request};
use std::sync::Arc;
use vhost_blk_wire::types::ByteRange;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::GuestMemoryMmap;

/// `struct virtio_blk_req` before the data: type, reserved, sector.
const HEADER_BYTES: u64 = 16;
/// `struct virtio_blk_discard_write_zeroes`: sector, count, flags.
const CLEAR_SEGMENT_BYTES: u64 = 16;
/// Longest data of a request. Linux sends at most a few MiB.
const DATA_BYTES_MAX: u64 = crate::engine::REQUEST_BYTES_MAX;
/// Most descriptors of a chain: the longest ring.
const DESCRIPTORS_MAX: usize = 1024;

/// A descriptor as the guest wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RawDescriptor {
    /// Guest-physical address.
    pub(super) address: u64,
    /// Length in bytes.
    pub(super) length_bytes: u32,
    /// The device writes to it.
    pub(super) device_writes: bool,
}

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
#[derive(Clone, Debug)]
pub(super) struct Answer {
    /// The status byte.
    status: GuestBuffers,
    /// Bytes the device writes before the status byte when all goes well.
    pub(super) data_bytes: u32,
}

impl Answer {
    /// Writes the status byte; answers how many bytes of the chain were written.
    pub(super) fn write(&self, outcome: Outcome) -> u32 {
        use virtio_bindings::bindings::virtio_blk::{
            VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
        };
        let (status, data_bytes) = match outcome {
            Outcome::Done => (VIRTIO_BLK_S_OK, self.data_bytes),
            Outcome::Failed => (VIRTIO_BLK_S_IOERR, 0),
            Outcome::Unsupported => (VIRTIO_BLK_S_UNSUPP, 0),
        };
        let status = u8::try_from(status).unwrap_or(u8::MAX);
        match self.status.write_at(0, &[status]) {
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

/// Makes sense of a chain.
pub(super) fn parse(
    memory: &Arc<GuestMemoryMmap>,
    chain: impl Iterator<Item = RawDescriptor>,
    disk: Disk<'_>,
) -> Parsed {
    let mut readable = Vec::new();
    let mut writable = Vec::new();
    for (count, descriptor) in chain.enumerate() {
        if count >= DESCRIPTORS_MAX {
            return Parsed::Unanswerable("the chain has too many descriptors");
        }
        let range = GuestRange {
            address: descriptor.address,
            length_bytes: descriptor.length_bytes,
        };
        if descriptor.device_writes {
            writable.push(range);
        } else if writable.is_empty() {
            readable.push(range);
        } else {
            return Parsed::Unanswerable("a readable descriptor follows a writable one");
        }
    }
    let Some(status) = take_last_byte(&mut writable) else {
        return Parsed::Unanswerable("there is no status byte");
    };
    let Ok(status) = GuestBuffers::new(Arc::clone(memory), &[status]) else {
        return Parsed::Unanswerable("the status byte is not in guest memory");
    };
    let mut answer = Answer {
        status,
        data_bytes: 0,
    };
    match understand(memory, &mut readable, &writable, disk, &mut answer) {
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
    readable: &mut Vec<GuestRange>,
    writable: &[GuestRange],
    disk: Disk<'_>,
    answer: &mut Answer,
) -> Result<Understood, Outcome> {
    let header = take_front(readable, HEADER_BYTES).ok_or(Outcome::Failed)?;
    let header = buffers(memory, &header)?;
    let mut kind = [0_u8; 4];
    let mut sector = [0_u8; 8];
    header.read_at(0, &mut kind).map_err(|_| Outcome::Failed)?;
    header
        .read_at(8, &mut sector)
        .map_err(|_| Outcome::Failed)?;
    let sector = u64::from_le_bytes(sector);
    let request = match u32::from_le_bytes(kind) {
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
    readable: &[GuestRange],
    disk: Disk<'_>,
    discard: bool,
) -> Result<Request, Outcome> {
    let data = buffers(memory, readable)?;
    if data.length_bytes() != CLEAR_SEGMENT_BYTES {
        return Err(Outcome::Failed);
    }
    let mut sector = [0_u8; 8];
    let mut sectors = [0_u8; 4];
    let mut flags = [0_u8; 4];
    data.read_at(0, &mut sector).map_err(|_| Outcome::Failed)?;
    data.read_at(8, &mut sectors).map_err(|_| Outcome::Failed)?;
    data.read_at(12, &mut flags).map_err(|_| Outcome::Failed)?;
    let (sectors, flags) = (u32::from_le_bytes(sectors), u32::from_le_bytes(flags));
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
    let range = range(disk, u64::from_le_bytes(sector), length_bytes)?;
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

/// Cuts the last byte off.
fn take_last_byte(ranges: &mut Vec<GuestRange>) -> Option<GuestRange> {
    loop {
        let last = ranges.last_mut()?;
        let Some(rest) = last.length_bytes.checked_sub(1) else {
            ranges.pop();
            continue;
        };
        last.length_bytes = rest;
        return Some(GuestRange {
            address: last.address.checked_add(u64::from(rest))?,
            length_bytes: 1,
        });
    }
}

/// Cuts the first bytes off; `None` if there are not so many.
fn take_front(ranges: &mut Vec<GuestRange>, length_bytes: u64) -> Option<Vec<GuestRange>> {
    let mut left = u32::try_from(length_bytes).ok()?;
    let mut taken = Vec::new();
    let mut rest = Vec::with_capacity(ranges.len());
    for range in ranges.drain(..) {
        let now = range.length_bytes.min(left);
        left -= now;
        if now > 0 {
            taken.push(GuestRange {
                address: range.address,
                length_bytes: now,
            });
        }
        if range.length_bytes > now {
            rest.push(GuestRange {
                address: range.address.checked_add(u64::from(now))?,
                length_bytes: range.length_bytes - now,
            });
        }
    }
    *ranges = rest;
    (left == 0).then_some(taken)
}

#[cfg(test)]
mod tests;

#[cfg(test)]
pub(super) mod testing {
    //! An answer for tests of other rooms.
    use super::{Answer, GuestBuffers, GuestRange};
    use std::sync::Arc;
    use vm_memory::GuestMemoryMmap;

    /// An answer whose status byte is the first of `memory`.
    pub(crate) fn answer(memory: &Arc<GuestMemoryMmap>) -> Answer {
        let byte = GuestRange {
            address: 0,
            length_bytes: 1,
        };
        Answer {
            status: GuestBuffers::new(Arc::clone(memory), &[byte]).unwrap(),
            data_bytes: 0,
        }
    }
}
