//! `store-fill`: makes a volume with many redirected blocks and snapshots, and measures opening one. For benches and tests.
//!
//! It goes the way of every write, plan and complete, but moves no data: base and log are sparse files, so that
//! terabytes are filled in seconds. What it leaves reads as zeroes and is otherwise like any other volume. It ends as a killed
//! daemon does, without closing, unless asked to.
//!
//! Prints one JSON object. Exit code 0: done; 2: usage, or something failed.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::{Parser, Subcommand};
use uuid::Uuid;
use vhost_blk_store::{
    BlockFile, ByteRange, Maintenance, Method, NewSnapshot, OpenOptions, RecoveryReport, View,
    Volume, VolumeFiles, WriteKind,
};

/// Make a volume with many redirected blocks, or measure opening one
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Directory of the base and of its shadow storage
    directory: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make the volume and redirect blocks at random
    Fill {
        /// Size of the disk
        #[arg(long, default_value_t = 1024)]
        gib: u64,
        /// Blocks of 4 KiB to redirect
        #[arg(long)]
        blocks: u64,
        /// Snapshots to spread them over
        #[arg(long, default_value_t = 512)]
        snapshots: u64,
        /// Close the volume in order
        #[arg(long)]
        close: bool,
    },
    /// Open the volume, read at random, and finish the background work
    Open {
        /// Random reads of 4 KiB
        #[arg(long, default_value_t = 100_000)]
        reads: u64,
        /// Then redirect so many blocks behind one more snapshot, which only the journal will know
        #[arg(long, default_value_t = 0)]
        unmerged: u64,
    },
}

/// A log that takes no space: what should be set aside stays a hole.
#[derive(Debug)]
struct SparseLog(Arc<dyn BlockFile>);

impl BlockFile for SparseLog {
    fn len_bytes(&self) -> io::Result<u64> {
        self.0.len_bytes()
    }

    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.0.read_at(buffer, offset_bytes)
    }

    fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset_bytes)
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn allocate(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        let end = offset_bytes + length_bytes;
        if self.0.len_bytes()? >= end {
            return Ok(());
        }
        self.0.write_at(&[0; 512], end - 512)
    }

    fn release(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        self.0.release(offset_bytes, length_bytes)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}

/// The same numbers every time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

fn resident_kib() -> io::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let words = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(words.and_then(|word| word.parse().ok()).unwrap_or(0))
}

fn open(arguments: &Arguments) -> Result<(Volume, RecoveryReport), Box<dyn Error>> {
    let options = OpenOptions {
        direct: false,
        segments_ahead: 0,
        ..OpenOptions::default()
    };
    let base = arguments.directory.join("base");
    let shadow = arguments.directory.join("shadow");
    let mut files = VolumeFiles::open(&base, &shadow, &options)?;
    files.log = Arc::new(SparseLog(files.log));
    Ok(Volume::open_files(files, &options)?)
}

fn print(
    arguments: &Arguments,
    volume: &Volume,
    took_ms: &[(&str, f64)],
) -> Result<(), Box<dyn Error>> {
    use std::os::unix::fs::MetadataExt;
    let index = std::fs::metadata(arguments.directory.join("shadow/index"))?;
    let mut line = serde_json::json!({
        "status": volume.status(),
        "resident_kib": resident_kib()?,
        "index_allocated_bytes": index.blocks() * 512,
        "index_length_bytes": index.len(),
    });
    for (name, value) in took_ms {
        line[*name] = serde_json::json!(value);
    }
    println!("{line}");
    Ok(())
}

/// What to make.
struct Wanted {
    gib: u64,
    blocks: u64,
    snapshots: u64,
    close: bool,
}

fn take_snapshot(volume: &Volume, number: u64) -> Result<(), Box<dyn Error>> {
    let set_id = Uuid::from_u128(u128::from(number) << 64 | 1).into();
    volume.take_snapshot(NewSnapshot {
        snapshot_id: Uuid::from_u128(u128::from(number) << 64 | 2).into(),
        set_id,
        members: vec![volume.id()],
        method: Method::RedirectOnWrite,
        created_unix_ms: number,
    })?;
    Ok(volume.keep_set(set_id)?)
}

fn redirect(volume: &Volume, block: u64) -> Result<(), Box<dyn Error>> {
    let mut plans = [volume.plan_write(ByteRange::new(block << 12, 4096), WriteKind::Write)?];
    if plans.iter().any(|plan| plan.needs_prepare()) {
        volume.prepare_writes(&mut plans)?;
    }
    let [plan] = plans;
    Ok(volume.complete_write(plan)?)
}

fn fill(arguments: &Arguments, wanted: &Wanted) -> Result<(), Box<dyn Error>> {
    std::fs::create_dir_all(&arguments.directory)?;
    let base = std::fs::File::create(arguments.directory.join("base"))?;
    base.set_len(wanted.gib << 30)?;
    let (volume, _) = open(arguments)?;
    let (begun, mut numbers) = (Instant::now(), Numbers(0x9e37_79b9_7f4a_7c15));
    let (blocks, snapshots) = (wanted.gib << 18, wanted.snapshots.max(1));
    for number in 0..snapshots {
        take_snapshot(&volume, number)?;
        for write in 0..wanted.blocks / snapshots {
            redirect(&volume, numbers.below(blocks))?;
            if write % 65_536 == 0 {
                for _ in 0..64 {
                    if volume.maintain(4096)? == Maintenance::Idle {
                        break;
                    }
                }
            }
        }
    }
    volume.flush()?;
    let filled_ms = begun.elapsed().as_secs_f64() * 1e3;
    if wanted.close {
        volume.close()?;
    }
    print(arguments, &volume, &[("fill_ms", filled_ms)])
}

/// Look-ups of as many blocks anywhere on the disk.
fn look_up(volume: &Volume, numbers: &mut Numbers, count: u64) -> Result<(), Box<dyn Error>> {
    let blocks = volume.size_bytes() / 4096;
    for _ in 0..count {
        let range = ByteRange::new(numbers.below(blocks) << 12, 4096);
        volume.plan_read(View::Head, range)?;
    }
    Ok(())
}

fn measure(arguments: &Arguments, reads: u64, unmerged: u64) -> Result<(), Box<dyn Error>> {
    let begun = Instant::now();
    let (volume, report) = open(arguments)?;
    let mut numbers = Numbers(0x1234_5678_9abc_def1);
    let blocks = volume.size_bytes() / 4096;
    look_up(&volume, &mut numbers, 1)?;
    let open_ms = begun.elapsed().as_secs_f64() * 1e3;
    let opened_kib = resident_kib()?;
    let begun = Instant::now();
    look_up(&volume, &mut numbers, reads)?;
    let reads_ms = begun.elapsed().as_secs_f64() * 1e3;
    let begun = Instant::now();
    while volume.maintain(4096)? != Maintenance::Idle {}
    let settled_ms = begun.elapsed().as_secs_f64() * 1e3;
    let settled_kib = resident_kib()?;
    let begun = Instant::now();
    look_up(&volume, &mut numbers, reads)?;
    let warm_ms = begun.elapsed().as_secs_f64() * 1e3;
    if unmerged > 0 {
        // No other snapshot has this number.
        take_snapshot(&volume, 1 << 32 | u64::from(volume.status().epoch.0))?;
        for _ in 0..unmerged {
            redirect(&volume, numbers.below(blocks))?;
        }
        volume.flush()?;
    }
    let nanoseconds = |ms: f64| ms * 1e6 / (reads.max(1) as f64);
    print(
        arguments,
        &volume,
        &[
            ("replayed_records", report.replayed_records as f64),
            ("open_to_first_plan_ms", open_ms),
            ("resident_kib_when_opened", opened_kib as f64),
            ("first_look_ups_ns", nanoseconds(reads_ms)),
            ("background_ms", settled_ms),
            ("resident_kib_after_background", settled_kib as f64),
            ("look_up_ns", nanoseconds(warm_ms)),
        ],
    )
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.command {
        Command::Fill {
            gib,
            blocks,
            snapshots,
            close,
        } => {
            let wanted = Wanted {
                gib,
                blocks,
                snapshots,
                close,
            };
            fill(&arguments, &wanted)
        }
        Command::Open { reads, unmerged } => measure(&arguments, reads, unmerged),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("store-fill: {error}");
            ExitCode::from(2)
        }
    }
}
