//! The client of every vhost-user backend: libblkio's, in this process, in a closed loop.
//!
//! Called by `daemon` and `peers`. A queue has a thread, a piece of shared memory and so many requests in flight; it sleeps
//! for the backend's interrupt when nothing has completed, as a guest's idle processor would. The same code drives every
//! program, so what it costs itself is the same for all.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use hdrhistogram::Histogram;
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};

use super::job::{BLOCK_BYTES, Job, Op};
use crate::harness::wait;

/// Bytes of shared memory of a queue: the most that its job may have in flight.
const QUEUE_MEMORY_BYTES: usize = 16 << 20;
/// Longest wait for any request.
const PATIENCE: Duration = Duration::from_secs(60);
/// No latency is longer, in nanoseconds.
const LATENCY_NS_MAX: u64 = 60_000_000_000;

/// A connection to one disk. It stays open between rounds.
pub struct Client {
    // Before `blkio`: queues go first.
    queues: Vec<Queue>,
    blkio: Blkio,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = formatter.debug_struct("Client");
        shown
            .field("queues", &self.queues.len())
            .finish_non_exhaustive()
    }
}

/// What a round was for the client.
#[derive(Clone, Debug)]
pub struct Run {
    /// Reads and writes that ended.
    pub ios: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Flushes that ended.
    pub flushes: u64,
    /// From the first request to the last completion.
    pub elapsed: Duration,
    /// Of reads and writes, nanoseconds.
    pub latencies: Histogram<u64>,
    /// Of flushes, nanoseconds.
    pub flush_latencies: Histogram<u64>,
}

impl Run {
    /// Nothing done yet.
    pub fn new() -> Result<Self> {
        let histogram = || Histogram::new_with_bounds(1, LATENCY_NS_MAX, 2);
        Ok(Self {
            ios: 0,
            bytes: 0,
            flushes: 0,
            elapsed: Duration::ZERO,
            latencies: histogram()?,
            flush_latencies: histogram()?,
        })
    }

    /// Reads and writes per second.
    #[must_use]
    pub fn per_second(&self) -> f64 {
        self.ios as f64 / self.elapsed.as_secs_f64()
    }

    /// Adds what another queue did in the same time.
    fn join(&mut self, other: &Self) -> Result<()> {
        self.ios += other.ios;
        self.bytes += other.bytes;
        self.flushes += other.flushes;
        self.elapsed = self.elapsed.max(other.elapsed);
        self.latencies.add(&other.latencies)?;
        self.flush_latencies.add(&other.flush_latencies)?;
        Ok(())
    }
}

/// One queue with its memory.
struct Queue {
    queue: Blkioq,
    address: usize,
    /// Where completions are put; kept so that waiting allocates nothing.
    space: Vec<MaybeUninit<Completion>>,
}

impl Client {
    /// Connects, trying again until the backend is there.
    pub fn connect(socket: &Path, queues: usize) -> Result<Self> {
        let begin = Instant::now();
        let mut last = String::new();
        wait::until(
            &format!("a backend on {}", socket.display()),
            wait::STEP,
            || match Self::try_connect(socket, queues) {
                Ok(client) => Ok(Some(client)),
                Err(error) if begin.elapsed() < Duration::from_secs(20) => {
                    last = format!("{error:#}");
                    Ok(None)
                }
                Err(error) => Err(error),
            },
        )
        .with_context(|| last)
    }

    fn try_connect(socket: &Path, queues: usize) -> Result<Self> {
        let failed = |error: blkio::Error| anyhow!("libblkio: {}", error.message());
        let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(failed)?;
        let path = socket.to_str().context("the socket's path")?;
        blkio.set_str("path", path).map_err(failed)?;
        blkio.connect().map_err(failed)?;
        blkio
            .set_i32("num-queues", i32::try_from(queues)?)
            .map_err(failed)?;
        let outcome = blkio.start().map_err(failed)?;
        let mut connected = Vec::new();
        for (number, queue) in outcome.queues.into_iter().enumerate() {
            let region = blkio.alloc_mem_region(QUEUE_MEMORY_BYTES).map_err(failed)?;
            blkio.map_mem_region(&region).map_err(failed)?;
            fill(&region, number as u64)?;
            let address = region.addr;
            connected.push(Queue {
                queue,
                address,
                space: Vec::new(),
            });
        }
        Ok(Self {
            queues: connected,
            blkio,
        })
    }

    /// Bytes of the disk.
    pub fn capacity(&self) -> Result<u64> {
        let failed = |error: blkio::Error| anyhow!("libblkio: {}", error.message());
        self.blkio.get_u64("capacity").map_err(failed)
    }

    /// Runs one round on the first queues of the connection. Any failed request fails the round.
    pub fn run(&mut self, job: &Job, seed: u64) -> Result<Run> {
        let in_use = self.queues.get_mut(..job.queues);
        let in_use = in_use.with_context(|| format!("{} queues are not connected", job.queues))?;
        ensure!(
            usize::try_from(job.block_bytes)? * job.depth <= QUEUE_MEMORY_BYTES,
            "more in flight than there is memory"
        );
        if let [only] = in_use {
            return only.run(job, seed, 0);
        }
        let runs: Vec<Result<Run>> = thread::scope(|scope| {
            let threads: Vec<_> = in_use
                .iter_mut()
                .enumerate()
                .map(|(number, queue)| scope.spawn(move || queue.run(job, seed, number)))
                .collect();
            let ended = threads.into_iter().map(|thread| match thread.join() {
                Ok(run) => run,
                Err(_) => Err(anyhow!("a client's thread has panicked")),
            });
            ended.collect()
        });
        let mut all = Run::new()?;
        for run in runs {
            all.join(&run?)?;
        }
        Ok(all)
    }

    /// Writes one 4 KiB block at each offset, all at once and any number of times the same.
    pub fn write_at(&mut self, offsets: &[u64]) -> Result<()> {
        const IN_FLIGHT: usize = 32;
        let length = usize::try_from(BLOCK_BYTES)?;
        let queue = self.queues.first_mut().context("no queue")?;
        let mut done = Vec::new();
        for group in offsets.chunks(IN_FLIGHT) {
            for (slot, offset) in group.iter().enumerate() {
                let pointer = std::ptr::with_exposed_provenance_mut(queue.address + slot * length);
                queue
                    .queue
                    .write(*offset, pointer, length, slot, ReqFlags::empty());
            }
            done.clear();
            while done.len() < group.len() {
                queue.wait(group.len() - done.len(), &mut done)?;
            }
        }
        Ok(())
    }

    /// Flushes the disk.
    pub fn flush(&mut self) -> Result<()> {
        let queue = self.queues.first_mut().context("no queue")?;
        queue.queue.flush(0, ReqFlags::empty());
        let mut done = Vec::new();
        queue.wait(1, &mut done)
    }
}

/// Writes noise, so that no backend finds zeroes to leave out. The memory is reached by its descriptor.
fn fill(region: &MemoryRegion, seed: u64) -> Result<()> {
    let path = format!("/proc/self/fd/{}", region.fd);
    let file = File::options().write(true).open(path)?;
    let mut bytes = vec![0; region.len];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    file.write_all_at(&bytes, region.fd_offset.unsigned_abs())?;
    Ok(())
}

impl Queue {
    fn run(&mut self, job: &Job, seed: u64, number: usize) -> Result<Run> {
        let length = usize::try_from(job.block_bytes)?;
        let mut run = Run::new()?;
        let mut offsets = job.offsets(seed, number);
        let mut free: Vec<usize> = (0..job.depth).rev().collect();
        let begin = Instant::now();
        let mut started = vec![begin; job.depth];
        let mut done = Vec::with_capacity(job.depth);
        let mut since_flush = 0;
        let is_due = |writes: usize| job.flush_every.is_some_and(|every| writes >= every);
        let mut over = false;
        loop {
            while !over && !is_due(since_flush) {
                let Some(slot) = free.pop() else { break };
                let Some(offset) = offsets.next() else {
                    free.push(slot);
                    over = true;
                    break;
                };
                let place = self.address + slot * length;
                let pointer = std::ptr::with_exposed_provenance_mut(place);
                if let Some(start) = started.get_mut(slot) {
                    *start = Instant::now();
                }
                match job.op {
                    Op::Read => self
                        .queue
                        .read(offset, pointer, length, slot, ReqFlags::empty()),
                    Op::Write => {
                        self.queue
                            .write(offset, pointer, length, slot, ReqFlags::empty());
                        since_flush += 1;
                    }
                }
            }
            if free.len() == job.depth {
                if !is_due(since_flush) {
                    break;
                }
                let start = Instant::now();
                self.queue.flush(job.depth, ReqFlags::empty());
                self.wait(1, &mut done)?;
                done.clear();
                run.flush_latencies.record(nanoseconds(start.elapsed()))?;
                run.flushes += 1;
                since_flush = 0;
                if over {
                    break;
                }
                continue;
            }
            self.wait(job.depth - free.len(), &mut done)?;
            let now = Instant::now();
            for slot in done.drain(..) {
                let start = started.get(slot).context("a request that was not sent")?;
                run.latencies.record(nanoseconds(now - *start))?;
                run.ios += 1;
                run.bytes += job.block_bytes;
                free.push(slot);
            }
            over |= now - begin >= job.limit;
        }
        run.elapsed = begin.elapsed();
        Ok(run)
    }

    /// Sends what was queued and waits for at least one completion of at most `in_flight`.
    fn wait(&mut self, in_flight: usize, done: &mut Vec<usize>) -> Result<()> {
        self.space.resize_with(in_flight, MaybeUninit::uninit);
        let mut patience = PATIENCE;
        let number = self
            .queue
            .do_io(&mut self.space, 1, Some(&mut patience), None)
            .map_err(|error| anyhow!("libblkio: {}", error.message()))?;
        for completion in self.space.iter().take(number) {
            #[allow(unsafe_code, reason = "libblkio fills what it counts")]
            // SAFETY: do_io has initialised the first `number` entries.
            let completion = unsafe { completion.assume_init_ref() };
            ensure!(
                completion.ret == 0,
                "a request failed: {}",
                std::io::Error::from_raw_os_error(-completion.ret)
            );
            done.push(completion.user_data);
        }
        Ok(())
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).map_or(LATENCY_NS_MAX, |ns| ns.clamp(1, LATENCY_NS_MAX))
}
