//! A backend that does nothing but its duty, one request at a time: woken by an eventfd, it reads or writes the file, and wakes the client by another.
//!
//! Called by `plain`. It has no ring, no queue and no disk to keep, and three system calls a request: what a backend that sleeps between
//! requests can reach at most with a client that does too, on this machine and this file.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Result, anyhow, ensure};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::{read, write};

use super::client::Run;
use super::job::{Job, Op};
use super::rounds::{Contestant, Turn};

/// Offset that ends the backend.
const END: u64 = u64::MAX;

/// See the module.
#[derive(Debug)]
pub struct Relay {
    file: PathBuf,
}

impl Relay {
    /// Name in the tables.
    pub const NAME: &'static str = "relay";

    /// Over a file that others use as well.
    #[must_use]
    pub fn over(file: &Path) -> Self {
        Self {
            file: file.to_owned(),
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
        ensure!(job.depth == 1, "the relay has one request at a time");
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(OFlags::DIRECT.bits().cast_signed())
            .open(&self.file)?;
        let kick = eventfd(0, EventfdFlags::CLOEXEC)?;
        let call = eventfd(0, EventfdFlags::CLOEXEC)?;
        let at = AtomicU64::new(0);
        thread::scope(|scope| {
            let backend = scope.spawn(|| serve(&file, job, &at, &kick, &call));
            let run = drive(job, seed, &at, &kick, &call);
            at.store(END, Ordering::Release);
            signal(&kick)?;
            let served = backend.join();
            served.map_err(|_| anyhow!("the relay's thread has panicked"))??;
            Ok(Turn::from(&run?))
        })
    }
}

#[allow(
    clippy::host_endian_bytes,
    reason = "an eventfd counts in the machine's own order"
)]
fn signal(event: &OwnedFd) -> Result<()> {
    write(event, &1u64.to_ne_bytes())?;
    Ok(())
}

fn wait(event: &OwnedFd) -> Result<()> {
    read(event, &mut [0; 8])?;
    Ok(())
}

fn drive(job: &Job, seed: u64, at: &AtomicU64, kick: &OwnedFd, call: &OwnedFd) -> Result<Run> {
    let mut run = Run::new()?;
    let begin = Instant::now();
    for offset in job.offsets(seed, 0) {
        let start = Instant::now();
        at.store(offset, Ordering::Release);
        signal(kick)?;
        wait(call)?;
        let now = Instant::now();
        run.latencies
            .record(u64::try_from((now - start).as_nanos())?)?;
        run.ios += 1;
        run.bytes += job.block_bytes;
        if now - begin >= job.limit {
            break;
        }
    }
    run.elapsed = begin.elapsed();
    Ok(run)
}

/// The backend's side. Should the file fail, the client is let go all the same, and the round fails with it.
fn serve(file: &File, job: &Job, at: &AtomicU64, kick: &OwnedFd, call: &OwnedFd) -> Result<()> {
    let length = usize::try_from(job.block_bytes)?;
    // Twice as much as is needed holds an aligned part.
    let mut memory = vec![0x5a; length * 2];
    let skip = memory.as_ptr().align_offset(length);
    let buffer = memory
        .get_mut(skip..skip + length)
        .ok_or_else(|| anyhow!("no aligned part"))?;
    let mut outcome = Ok(());
    loop {
        wait(kick)?;
        let offset = at.load(Ordering::Acquire);
        if offset == END {
            return Ok(outcome?);
        }
        let done = match job.op {
            Op::Read => file.read_exact_at(buffer, offset),
            Op::Write => file.write_all_at(buffer, offset),
        };
        outcome = outcome.and(done);
        signal(call)?;
    }
}
