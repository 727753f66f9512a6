//! Writers inside the guest that read back what they wrote: `guest-writers DEVICE STOP`, until the file STOP exists.
//!
//! Started by scenarios through the guest's shell. Each writer owns a piece of the raw device and knows what every sector of it must
//! hold. Requests go straight to the device (O_DIRECT), have all sizes from one sector to 64 KiB, and are mixed with flushes, so that
//! they end in another order than they began. The first error, or the first sector that is not what it was, ends the program with
//! status 1; otherwise it prints how many requests were made, and how many microseconds the slowest took.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::fs::OFlags;

/// Writers, each with one request at a time.
const WRITERS: u64 = 16;
/// Bytes of each writer's piece.
const PIECE_BYTES: u64 = 2 << 20;
const SECTOR_BYTES: usize = 512;
/// Largest request, in sectors.
const REQUEST_MAX: u64 = 128;

/// What all writers have done.
#[derive(Default)]
struct Done {
    requests: AtomicU64,
    slowest_us: AtomicU64,
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: guest-writers DEVICE STOP";
    let device = PathBuf::from(arguments.next().context(usage)?);
    let stop = PathBuf::from(arguments.next().context(usage)?);
    let ended = Arc::new(AtomicBool::new(false));
    let done = Arc::<Done>::default();
    let writers: Vec<_> = (0..WRITERS)
        .map(|number| {
            let (device, stop) = (device.clone(), stop.clone());
            let (ended, done) = (Arc::clone(&ended), Arc::clone(&done));
            thread::spawn(move || {
                let result = write(number, &device, &stop, &ended, &done);
                // One that fails ends all.
                ended.store(true, Ordering::SeqCst);
                result.with_context(|| format!("writer {number}"))
            })
        })
        .collect();
    for writer in writers {
        writer.join().map_err(|_| anyhow::anyhow!("a panic"))??;
    }
    println!(
        "{} {}",
        done.requests.load(Ordering::SeqCst),
        done.slowest_us.load(Ordering::SeqCst)
    );
    Ok(())
}

/// Memory that O_DIRECT takes.
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn new() -> Self {
        let length = usize::try_from(REQUEST_MAX).unwrap_or(0) * SECTOR_BYTES;
        let bytes = vec![0; length + 4096];
        let start = bytes.as_ptr().align_offset(4096);
        Self { bytes, start }
    }

    fn sectors(&mut self, count: u64) -> Result<&mut [u8]> {
        let length = usize::try_from(count)? * SECTOR_BYTES;
        self.bytes
            .get_mut(self.start..self.start + length)
            .context("a request is longer than its buffer")
    }
}

fn fill(sector: &mut [u8], number: u64, place: u64, generation: u64) {
    for (index, word) in (0_u64..).zip(sector.chunks_exact_mut(8)) {
        let value = (generation << 24 | number << 16 | place).wrapping_mul(2 * index + 1);
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// A small generator (Knuth's MMIX constants): which requests are made matters to nobody.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

fn write(number: u64, device: &Path, stop: &Path, ended: &AtomicBool, done: &Done) -> Result<()> {
    let direct = i32::try_from(OFlags::DIRECT.bits())?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(direct)
        .open(device)?;
    let sectors = PIECE_BYTES / SECTOR_BYTES as u64;
    // 0: never written, all zero.
    let mut generations = vec![0_u64; usize::try_from(sectors)?];
    let mut random = Random(number);
    let mut buffer = Buffer::new();
    let mut expected = vec![0; SECTOR_BYTES];
    for generation in 1.. {
        if ended.load(Ordering::SeqCst) || stop.exists() {
            break;
        }
        let count = match random.below(4) {
            0 => 8,
            1 => 1 + random.below(8),
            2 => 8 * (1 + random.below(4)),
            _ => 1 + random.below(REQUEST_MAX),
        };
        let first = random.below(sectors - count);
        let offset = number * PIECE_BYTES + first * SECTOR_BYTES as u64;
        let range = usize::try_from(first)?..usize::try_from(first + count)?;
        let known = generations.get_mut(range).context("out of the piece")?;
        let bytes = buffer.sectors(count)?;
        let begin = Instant::now();
        if random.below(3) > 0 {
            for (place, sector) in (first..).zip(bytes.chunks_exact_mut(SECTOR_BYTES)) {
                fill(sector, number, place, generation);
            }
            file.write_all_at(bytes, offset)
                .with_context(|| format!("writing {count} sectors at {offset}"))?;
            known.fill(generation);
        } else {
            bytes.fill(0xee);
            file.read_exact_at(bytes, offset)
                .with_context(|| format!("reading {count} sectors at {offset}"))?;
            for ((place, sector), generation) in
                (first..).zip(bytes.chunks_exact(SECTOR_BYTES)).zip(known)
            {
                expected.fill(0);
                if *generation > 0 {
                    fill(&mut expected, number, place, *generation);
                }
                ensure!(
                    sector == expected,
                    "sector {place} is not of generation {generation}: {sector:02x?}"
                );
            }
        }
        if random.below(8) == 0 {
            rustix::fs::fdatasync(&file)?;
        }
        let took_us = u64::try_from(begin.elapsed().as_micros())?;
        done.slowest_us.fetch_max(took_us, Ordering::SeqCst);
        done.requests.fetch_add(1, Ordering::SeqCst);
    }
    Ok(())
}
