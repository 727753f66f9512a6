//! The ring against temporary files, with the kernel's answers changed where a test says so.

use super::{Completed, Direction, Ring, Span};
use crate::engine::testing::memory;
use crate::engine::{GuestBuffers, GuestRange, Kick};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::sync::Arc;
use vhost_blk_store::{Access, BlockFile, DataFile, DiskFile};
use vm_memory::{Bytes, GuestAddress};

struct Bed {
    ring: Ring,
    kick: Arc<Kick>,
    base: Arc<dyn BlockFile>,
    _directory: tempfile::TempDir,
}

fn bed() -> Bed {
    let directory = tempfile::tempdir().unwrap();
    let access = Access {
        direct: false,
        read_only: false,
        create: true,
    };
    let file = |name: &str| -> Arc<dyn BlockFile> {
        let file = DiskFile::open(&directory.path().join(name), access).unwrap();
        file.write_at(&[7; 65536], 0).unwrap();
        Arc::new(file)
    };
    let (base, log) = (file("base"), file("log"));
    let kick = Arc::new(Kick::new().unwrap());
    let ring = Ring::new(Arc::clone(&kick), [Arc::clone(&base), log]).unwrap();
    Bed {
        ring,
        kick,
        base,
        _directory: directory,
    }
}

/// Guest memory in as many pieces as there are ranges.
fn buffers(ranges: &[(u64, u32)]) -> GuestBuffers {
    let memory = memory();
    for page in 0..16 {
        memory
            .write_slice(&[page + 1; 4096], GuestAddress(u64::from(page) * 4096))
            .unwrap();
    }
    let ranges: Vec<_> = ranges
        .iter()
        .map(|(address, length_bytes)| GuestRange {
            address: *address,
            length_bytes: *length_bytes,
        })
        .collect();
    GuestBuffers::new(memory, &ranges).unwrap()
}

impl Bed {
    fn write(&mut self, number: u64, buffers: &GuestBuffers, file_offset_bytes: u64) {
        let span = Span {
            direction: Direction::ToFile,
            file_offset_bytes,
            length_bytes: buffers.length_bytes(),
        };
        self.ring
            .start_guest(number, DataFile::Base, buffers, 0, span)
            .unwrap();
    }

    /// Passes as the worker makes them, until `count` transfers are over.
    fn finish(&mut self, count: usize) -> Vec<Completed> {
        let mut completed = Vec::new();
        while completed.len() < count {
            self.kick.clear();
            self.ring.disarm();
            self.ring.submit().unwrap();
            self.ring.take_completed(&mut completed);
            if completed.len() < count && !self.ring.arm() {
                let time = Timespec {
                    tv_sec: 10,
                    tv_nsec: 0,
                };
                let mut wait = [PollFd::new(&*self.kick, PollFlags::IN)];
                assert_eq!(
                    poll(&mut wait, Some(&time)).unwrap(),
                    1,
                    "nobody wakes the thread"
                );
            }
        }
        assert!(self.ring.is_idle());
        completed
    }

    fn content(&self, offset_bytes: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.base.read_at(&mut bytes, offset_bytes).unwrap();
        bytes
    }
}

#[test]
fn short_transfers_go_on_where_they_stopped_in_one_piece_and_in_several() {
    for ranges in [
        &[(0, 8192)][..],
        &[(0, 4096), (8192, 512), (4096, 3584)],
        &[(0, 512), (512, 512), (1024, 7168)],
    ] {
        let mut bed = bed();
        // The kernel moves all of it; the ring is told of 512 bytes each time, and moves the rest again.
        let mut told = 0;
        bed.ring.fault.0 = Some(Box::new(move |_, result| {
            told += 1;
            assert_eq!(result, 8192 - 512 * (told - 1));
            512
        }));
        let buffers = buffers(ranges);
        bed.write(9, &buffers, 4096);
        let completed = bed.finish(1);
        assert!(matches!(
            completed.as_slice(),
            [Completed {
                number: 9,
                outcome: Ok(()),
                ..
            }]
        ));
        let mut expected = vec![0; 8192];
        buffers.read_at(0, &mut expected).unwrap();
        assert!(bed.content(4096, 8192) == expected);
    }
}

#[test]
fn an_error_and_a_transfer_of_nothing_end_it_and_interruptions_do_not() {
    let mut bed = bed();
    let mut answers = vec![-libc::EIO, 4096, -libc::EINTR, -libc::EAGAIN];
    bed.ring.fault.0 = Some(Box::new(move |_, _| answers.pop().unwrap()));
    let buffers = buffers(&[(0, 4096)]);
    bed.write(1, &buffers, 0);
    assert!(matches!(
        bed.finish(1).as_slice(),
        [Completed {
            outcome: Ok(()),
            ..
        }]
    ));
    bed.write(2, &buffers, 0);
    let completed = bed.finish(1);
    let error = completed.first().unwrap().outcome.as_ref().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    bed.ring.fault.0 = Some(Box::new(|_, _| 0));
    bed.write(3, &buffers, 0);
    let completed = bed.finish(1);
    let error = completed.first().unwrap().outcome.as_ref().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
}

#[test]
fn more_transfers_than_the_queue_holds_all_end() {
    let mut bed = bed();
    let buffers = buffers(&[(0, 512)]);
    for number in 0..2000 {
        bed.write(number, &buffers, number % 128 * 512);
    }
    let mut numbers: Vec<u64> = bed
        .finish(2000)
        .iter()
        .map(|completed| completed.number)
        .collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..2000).collect::<Vec<_>>());
}

#[test]
fn a_completion_wakes_only_a_thread_that_asked_for_it() {
    let mut bed = bed();
    let buffers = buffers(&[(0, 512)]);
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    bed.write(1, &buffers, 0);
    bed.ring.submit().unwrap();
    let mut completed = Vec::new();
    while completed.is_empty() {
        bed.ring.submit().unwrap();
        bed.ring.take_completed(&mut completed);
    }
    let mut wait = [PollFd::new(&*bed.kick, PollFlags::IN)];
    assert_eq!(poll(&mut wait, Some(&at_once)).unwrap(), 0);
}
