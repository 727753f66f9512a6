//! `snapshot-read`: a snapshot's content to a descriptor.
//!
//! Called by `handler` on a thread that may block. A regular file is made sparse, a pipe or socket gets every byte.
//!
//! A reader that stops reading cannot hold the daemon: the job gives up as soon as its client has gone.

use super::connection::Client;
use super::handler::generic;
use crate::engine::SetError;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::FileType;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use vhost_blk_store::{StoreError, View};
use vhost_blk_wire::command::{SnapshotRead, SnapshotReadDone};
use vhost_blk_wire::event::Event;
use vhost_blk_wire::qmp::QmpError;
use vhost_blk_wire::types::ByteRange;

/// Bytes that are read at once.
const PIECE_BYTES: u64 = 1 << 20;
/// Granularity at which zeroes are found, in bytes.
const BLOCK_BYTES: usize = 4096;
/// Sector, in bytes: what a range has to be made of.
const SECTOR_BYTES: u64 = 512;
/// Bytes between two `JOB_PROGRESS` events.
const PROGRESS_BYTES: u64 = 256 << 20;
/// How often a blocked writer looks whether its client is still there.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};

/// Copies the snapshot out.
pub(super) fn snapshot_read(
    client: &Client,
    command: &SnapshotRead,
) -> Result<SnapshotReadDone, QmpError> {
    let descriptor = client
        .named()
        .remove(&command.fdname)
        .ok_or_else(|| generic(format!("no descriptor named {:?}", command.fdname)))?;
    let (volume, snapshot) = client.server.sets.find_snapshot(command.snapshot)?;
    let range = command.range.unwrap_or(ByteRange {
        offset_bytes: 0,
        length_bytes: snapshot.size_bytes,
    });
    let end = range.offset_bytes.checked_add(range.length_bytes);
    if end.is_none_or(|end| end > snapshot.size_bytes)
        || !range.offset_bytes.is_multiple_of(SECTOR_BYTES)
        || !range.length_bytes.is_multiple_of(SECTOR_BYTES)
    {
        return Err(generic("the range is not whole sectors inside the disk"));
    }
    let mut sink =
        Sink::new(descriptor, range.length_bytes).map_err(|error| cannot_write(&error))?;
    let view = View::Snapshot(command.snapshot.into());
    let job = client.server.next_number();
    let mut buffer = vec![0_u8; usize::try_from(PIECE_BYTES.min(range.length_bytes)).unwrap_or(0)];
    let (mut done, mut data, mut told) = (0, 0, 0);
    while done < range.length_bytes {
        if client.gone.load(Ordering::SeqCst) {
            return Err(generic("the client has gone"));
        }
        let length = PIECE_BYTES.min(range.length_bytes - done);
        let Some(piece) = usize::try_from(length)
            .ok()
            .and_then(|length| buffer.get_mut(..length))
        else {
            return Err(generic("a piece is longer than its buffer"));
        };
        volume
            .store()
            .read_at(view, range.offset_bytes + done, piece)
            .map_err(|error| {
                if matches!(error, StoreError::NoSuchSnapshot(_)) {
                    // It was deleted while it was read.
                    QmpError::from(SetError::NoSuchSnapshot(command.snapshot))
                } else {
                    generic(format!("cannot read: {error}"))
                }
            })?;
        data += sink
            .put(client, piece)
            .map_err(|error| cannot_write(&error))?;
        done += length;
        if done - told >= PROGRESS_BYTES || done == range.length_bytes {
            told = done;
            client.server.events.tell(&Event::JobProgress {
                job,
                done_bytes: done,
                total_bytes: range.length_bytes,
            });
        }
    }
    Ok(SnapshotReadDone {
        length_bytes: range.length_bytes,
        data_bytes: data,
    })
}

fn cannot_write(error: &io::Error) -> QmpError {
    generic(format!("cannot write to the descriptor: {error}"))
}

/// Where the bytes go.
struct Sink {
    descriptor: OwnedFd,
    /// Next byte of a regular file; `None`: a stream.
    place: Option<u64>,
}

impl Sink {
    fn new(descriptor: OwnedFd, length_bytes: u64) -> io::Result<Self> {
        let status = rustix::fs::fstat(&descriptor)?;
        let place = match FileType::from_raw_mode(status.st_mode) {
            FileType::RegularFile => {
                if status.st_size != 0 {
                    return Err(io::Error::new(
                        io::ErrorKind::AlreadyExists,
                        "the file is not empty",
                    ));
                }
                rustix::fs::ftruncate(&descriptor, length_bytes)?;
                Some(0)
            }
            FileType::Fifo | FileType::Socket => None,
            FileType::Directory
            | FileType::Symlink
            | FileType::CharacterDevice
            | FileType::BlockDevice
            | FileType::Unknown => {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "neither a regular file nor a pipe nor a socket",
                ));
            }
        };
        Ok(Self { descriptor, place })
    }

    /// Takes bytes; answers how many of them are data (in blocks that are not all zero).
    fn put(&mut self, client: &Client, bytes: &[u8]) -> io::Result<u64> {
        let mut data_bytes = 0_u64;
        for block in bytes.chunks(BLOCK_BYTES) {
            let is_zero = block.iter().all(|byte| *byte == 0);
            if !is_zero {
                data_bytes += block.len() as u64;
            }
            match &mut self.place {
                Some(place) => {
                    if !is_zero {
                        write_at(&self.descriptor, block, *place)?;
                    }
                    *place += block.len() as u64;
                }
                None => self.stream(client, block)?,
            }
        }
        Ok(data_bytes)
    }

    fn stream(&self, client: &Client, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = [PollFd::new(&self.descriptor, PollFlags::OUT)];
            match rustix::event::poll(&mut ready, Some(&LOOK)) {
                Ok(0) | Err(rustix::io::Errno::INTR) if !client.gone.load(Ordering::SeqCst) => {
                    continue;
                }
                Ok(0) | Err(rustix::io::Errno::INTR) => {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
            // A pipe that polls writable takes a block of 4 KiB (PIPE_BUF) without waiting.
            match rustix::io::write(self.descriptor.as_fd(), bytes) {
                Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn write_at(descriptor: &OwnedFd, mut bytes: &[u8], mut place: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(descriptor, bytes, place) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                place += written as u64;
                bytes = bytes.get(written..).unwrap_or_default();
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
