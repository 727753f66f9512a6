//! A backend that does nothing but its duty: a thread that takes offsets, reads or writes the file there, and says so.
//!
//! Called by `plain` and `first_touch`. It has no virtqueue, no requests to parse, no disk to keep: what a backend can reach at most, on
//! this machine and this file, with a client that is another thread. One request at a time it makes plain calls; more of them go by an
//! io_uring set up as ours is (`deep`). Both sides wake each other only if the other sleeps (`channel`), as a virtqueue's do.

mod channel;
mod deep;

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::fs::{OFlags, fdatasync};
use rustix::time::{ClockId, clock_gettime};

use self::channel::Channel;
use super::client::Run;
use super::job::{BLOCK_BYTES, Job, Op};
use super::rounds::{Contestant, Turn};

/// How long the backend looks for the next of single requests before it sleeps, as ours may; the client sleeps at once, as libblkio's does.
const LOOK: Duration = Duration::from_micros(32);

/// Sent instead of a request, ends the backend.
const END: u64 = u64::MAX;

/// See the module.
#[derive(Debug)]
pub struct Relay {
    file: PathBuf,
    log: Option<PathBuf>,
}

impl Relay {
    /// Name in the tables.
    pub const NAME: &'static str = "relay";

    /// Over a file that others use as well.
    #[must_use]
    pub fn over(file: &Path) -> Self {
        Self {
            file: file.to_owned(),
            log: None,
        }
    }

    /// One that, before it overwrites a block, copies the old one to the next place of `log`, a file full of data, and syncs that: what
    /// copy-on-write in durable order cannot do without.
    #[must_use]
    pub fn copying(file: &Path, log: &Path) -> Self {
        Self {
            log: Some(log.to_owned()),
            ..Self::over(file)
        }
    }
}

impl Contestant for Relay {
    fn name(&self) -> String {
        Self::NAME.to_owned()
    }

    fn pid(&self) -> Option<u32> {
        None
    }

    fn run(&mut self, job: &Job, seed: u64) -> Result<Turn> {
        ensure!(
            job.queues == 1 && job.flush_every.is_none(),
            "the relay has one queue and no flush"
        );
        let file = direct(&self.file)?;
        let log = self.log.as_deref().map(Log::open).transpose()?;
        let requests = Channel::new(job.depth)?;
        let answers = Channel::new(job.depth)?;
        thread::scope(|scope| {
            let backend = scope.spawn(|| {
                match (job.depth, log) {
                    (1, log) => serve(&file, log, job, &requests, &answers)?,
                    (_, None) => deep::serve(&file, job, &requests, &answers)?,
                    (_, Some(_)) => bail!("the relay copies one block at a time"),
                }
                // The thread is as old as the round.
                let spent = clock_gettime(ClockId::ThreadCPUTime);
                Duration::try_from(spent).context("a thread's processor time")
            });
            let run = drive(job, seed, &requests, &answers);
            requests.send(END)?;
            requests.ring()?;
            let served = backend.join();
            let spent = served.map_err(|_| anyhow!("the relay's thread has panicked"))??;
            let run = run?;
            Ok(Turn {
                processor_us: Some(spent.as_secs_f64() * 1e6 / run.ios as f64),
                ..Turn::from(&run)
            })
        })
    }
}

fn direct(path: &Path) -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// A request is its offset, a multiple of 4 KiB, with its slot in the bits below.
fn request(offset: u64, slot: usize) -> u64 {
    offset + slot as u64
}

fn slot(request: u64) -> Result<usize> {
    Ok(usize::try_from(request % BLOCK_BYTES)?)
}

fn offset(request: u64) -> u64 {
    request - request % BLOCK_BYTES
}

fn drive(job: &Job, seed: u64, requests: &Channel, answers: &Channel) -> Result<Run> {
    let mut run = Run::new()?;
    let mut offsets = job.offsets(seed, 0);
    let mut free: Vec<usize> = (0..job.depth).rev().collect();
    let begin = Instant::now();
    let mut started = vec![begin; job.depth];
    let mut over = false;
    loop {
        while let Some(slot) = free.pop_if(|_| !over) {
            let Some(offset) = offsets.next() else {
                free.push(slot);
                over = true;
                break;
            };
            *started.get_mut(slot).context("a slot")? = Instant::now();
            requests.send(request(offset, slot))?;
        }
        requests.ring()?;
        if free.len() == job.depth {
            run.elapsed = begin.elapsed();
            return Ok(run);
        }
        let mut answer = Some(answers.wait(Duration::ZERO)?);
        let now = Instant::now();
        while let Some(request) = answer {
            ensure!(request != END, "the relay's backend has failed");
            let slot = slot(request)?;
            let start = started.get(slot).context("a slot")?;
            run.latencies
                .record(u64::try_from((now - *start).as_nanos())?)?;
            run.ios += 1;
            run.bytes += job.block_bytes;
            free.push(slot);
            answer = answers.take();
        }
        over |= now - begin >= job.limit;
    }
}

/// Memory for so many bytes, at a multiple of 4 KiB within the vector: that, and where it begins.
fn aligned(length_bytes: u64) -> Result<(Vec<u8>, usize)> {
    let block = usize::try_from(BLOCK_BYTES)?;
    let memory = vec![0x5a; usize::try_from(length_bytes)? + block];
    let skip = memory.as_ptr().align_offset(block);
    Ok((memory, skip))
}

/// Where old blocks go.
#[derive(Debug)]
struct Log {
    file: File,
    blocks: u64,
    next: u64,
}

impl Log {
    fn open(path: &Path) -> Result<Self> {
        let file = direct(path)?;
        let blocks = file.metadata()?.len() / BLOCK_BYTES;
        ensure!(blocks > 0, "the relay's log is empty");
        Ok(Self {
            file,
            blocks,
            next: 0,
        })
    }

    fn keep(&mut self, block: &[u8]) -> Result<()> {
        self.file.write_all_at(block, self.next * BLOCK_BYTES)?;
        fdatasync(&self.file)?;
        self.next = (self.next + 1) % self.blocks;
        Ok(())
    }
}

/// The backend's side, one request at a time.
fn serve(
    file: &File,
    mut log: Option<Log>,
    job: &Job,
    requests: &Channel,
    answers: &Channel,
) -> Result<()> {
    let length = usize::try_from(job.block_bytes)?;
    let (mut memory, skip) = aligned(job.block_bytes)?;
    let buffer = memory
        .get_mut(skip..skip + length)
        .context("an aligned part")?;
    let (mut old, old_skip) = aligned(job.block_bytes)?;
    let old = old
        .get_mut(old_skip..old_skip + length)
        .context("an aligned part")?;
    let mut one = |at: u64| -> Result<()> {
        match job.op {
            Op::Read => file.read_exact_at(buffer, at)?,
            Op::Write => {
                if let Some(log) = &mut log {
                    file.read_exact_at(old, at)?;
                    log.keep(old)?;
                }
                file.write_all_at(buffer, at)?;
            }
        }
        Ok(())
    };
    loop {
        let request = requests.wait(LOOK)?;
        if request == END {
            return Ok(());
        }
        let done = one(offset(request));
        answers.send(if done.is_ok() { request } else { END })?;
        answers.ring()?;
        done?;
    }
}

#[cfg(test)]
mod tests;
