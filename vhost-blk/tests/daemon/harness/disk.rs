//! A front end without a VM: libblkio's vhost-user client.

use super::PATIENCE;
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

/// A connection to one disk.
pub(crate) struct Disk {
    // Before `blkio`: queues go first.
    pub(crate) queues: Vec<Queue>,
    blkio: Blkio,
}

/// Memory that is shared with the daemon, reached through its descriptor.
pub(crate) struct SharedMemory {
    file: File,
    address: usize,
}

impl SharedMemory {
    fn new(region: &MemoryRegion) -> Self {
        let path = format!("/proc/self/fd/{}", region.fd);
        let file = File::options().read(true).write(true).open(path).unwrap();
        Self {
            file,
            address: region.addr,
        }
    }

    pub(crate) fn fill(&self, offset: usize, bytes: &[u8]) {
        self.file.write_all_at(bytes, offset as u64).unwrap();
    }

    pub(crate) fn take(&self, offset: usize, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, offset as u64).unwrap();
        bytes
    }

    pub(crate) fn pointer(&self, offset: usize) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.address + offset)
    }
}

/// One queue with a piece of shared memory of its own.
pub(crate) struct Queue {
    queue: Blkioq,
    pub(crate) memory: SharedMemory,
}

/// Bytes of shared memory of each queue.
pub(crate) const QUEUE_MEMORY_BYTES: usize = 16 << 20;

impl Disk {
    /// Connects, with as many queues.
    pub(crate) fn connect(socket: &Path, queues: i32) -> Result<Self, String> {
        Self::connect_as(socket, queues, false)
    }

    fn connect_as(socket: &Path, queues: i32, read_only: bool) -> Result<Self, String> {
        let failed = |error: blkio::Error| error.message().to_owned();
        let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(failed)?;
        blkio
            .set_str("path", socket.to_str().unwrap())
            .map_err(failed)?;
        blkio.set_bool("read-only", read_only).map_err(failed)?;
        blkio.connect().map_err(failed)?;
        blkio.set_i32("num-queues", queues).map_err(failed)?;
        let outcome = blkio.start().map_err(failed)?;
        let mut regions = Vec::new();
        for _ in 0..queues {
            let region = blkio.alloc_mem_region(QUEUE_MEMORY_BYTES).map_err(failed)?;
            blkio.map_mem_region(&region).map_err(failed)?;
            regions.push(region);
        }
        let queues = outcome
            .queues
            .into_iter()
            .zip(&regions)
            .map(|(queue, region)| Queue {
                queue,
                memory: SharedMemory::new(region),
            })
            .collect();
        Ok(Self { queues, blkio })
    }

    /// Connects, tried again while the daemon starts or has not noticed that the last one went.
    pub(crate) fn attach(socket: &Path, queues: i32) -> Self {
        Self::attach_as(socket, queues, false)
    }

    /// The same for a disk that the daemon serves read-only.
    pub(crate) fn attach_read_only(socket: &Path) -> Self {
        Self::attach_as(socket, 1, true)
    }

    fn attach_as(socket: &Path, queues: i32, read_only: bool) -> Self {
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            match Self::connect_as(socket, queues, read_only) {
                Ok(disk) => return disk,
                Err(why) if std::time::Instant::now() > deadline => panic!("no connection: {why}"),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.blkio.get_u64("capacity").unwrap()
    }

    pub(crate) fn first(&mut self) -> &mut Queue {
        &mut self.queues[0]
    }
}

impl Queue {
    /// Starts a read into `memory[place..]`.
    pub(crate) fn start_read(&mut self, offset: u64, place: usize, length: usize, id: usize) {
        let pointer = self.memory.pointer(place);
        self.queue
            .read(offset, pointer, length, id, ReqFlags::empty());
    }

    /// Starts a write from `memory[place..]`.
    pub(crate) fn start_write(&mut self, offset: u64, place: usize, length: usize, id: usize) {
        let pointer = self.memory.pointer(place);
        self.queue
            .write(offset, pointer, length, id, ReqFlags::empty());
    }

    pub(crate) fn start_flush(&mut self, id: usize) {
        self.queue.flush(id, ReqFlags::empty());
    }

    pub(crate) fn start_discard(&mut self, offset: u64, length: u64, id: usize) {
        self.queue.discard(offset, length, id, ReqFlags::empty());
    }

    /// Waits for at least `count` completions: their ids and results (negative errno).
    pub(crate) fn complete(&mut self, count: usize) -> Vec<(usize, i32)> {
        let done = self.complete_within(count, PATIENCE);
        assert!(
            done.len() >= count,
            "only {} of {count} requests ended in time",
            done.len()
        );
        done
    }

    /// Takes what completes within the time.
    pub(crate) fn complete_within(
        &mut self,
        count: usize,
        mut time: Duration,
    ) -> Vec<(usize, i32)> {
        let mut completions: Vec<MaybeUninit<Completion>> =
            (0..count.max(1)).map(|_| MaybeUninit::uninit()).collect();
        let mut done = Vec::new();
        while done.len() < count {
            let wanted = count - done.len();
            let space = completions.get_mut(..wanted).unwrap();
            match self
                .queue
                .do_io(space, wanted.min(1), Some(&mut time), None)
            {
                Ok(number) => {
                    for completion in completions.iter().take(number) {
                        #[allow(unsafe_code, reason = "libblkio fills what it counts")]
                        // SAFETY: do_io has initialised the first `number` entries.
                        let completion = unsafe { completion.assume_init_ref() };
                        done.push((completion.user_data, completion.ret));
                    }
                }
                Err(_) => break,
            }
        }
        done
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), i32> {
        self.memory.fill(0, bytes);
        self.start_write(offset, 0, bytes.len(), 0);
        self.one()
    }

    pub(crate) fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>, i32> {
        self.start_read(offset, 0, length, 0);
        self.one()?;
        Ok(self.memory.take(0, length))
    }

    pub(crate) fn flush(&mut self) -> Result<(), i32> {
        self.start_flush(0);
        self.one()
    }

    pub(crate) fn discard(&mut self, offset: u64, length: u64) -> Result<(), i32> {
        self.start_discard(offset, length, 0);
        self.one()
    }

    pub(crate) fn write_zeroes(&mut self, offset: u64, length: u64) -> Result<(), i32> {
        self.queue
            .write_zeroes(offset, length, 0, ReqFlags::empty());
        self.one()
    }

    fn one(&mut self) -> Result<(), i32> {
        match self.complete(1).as_slice() {
            [(_, 0)] => Ok(()),
            [(_, error)] => Err(*error),
            other => panic!("{other:?}"),
        }
    }
}
