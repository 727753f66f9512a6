//! `vmshadow read`: a snapshot's content into a file or a pipe.
//!
//! Called by `cli`. The daemon writes straight to the descriptor that it is given; no byte passes through here. A file is
//! new (or `--force`), durable when the command succeeds, and removed when it does not or is interrupted.

use super::args::Read;
use super::backend::Backend;
use super::show::left_out;
use super::table::size;
use crate::error::Error;
use crate::snapshot::document::Copy;
use crate::storage::StorageClient;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// To connect and to pass the descriptor.
const LIMIT: Duration = Duration::from_secs(5);
/// Between two progress lines where they do not overwrite each other.
const LINE_EVERY: Duration = Duration::from_secs(2);

pub(super) async fn read(backend: &Backend, read: &Read, json: bool) -> Result<(), Error> {
    let copy = choose(backend.copies(&read.id).await?, read)?;
    let client = StorageClient::connect(&copy.control, LIMIT).await?;
    if read.output == Path::new("-") {
        if json {
            let text = "--json and --output - both want standard output";
            return Err(Error::Usage(text.to_owned()));
        }
        let stdout = io::stdout().as_fd().try_clone_to_owned();
        let fd = stdout.map_err(io_error("standard output"))?;
        let mut progress = Progress::begin();
        client
            .read(copy.snapshot, fd, LIMIT, |done, total| {
                progress.show(done, total);
            })
            .await?;
        progress.end();
        return Ok(());
    }
    let mut cancel = super::on_signals()?;
    let file = open(read)?;
    let result = tokio::select! {
        result = fill(&client, &copy, &file) => result,
        _ = cancel.changed() => Err(Error::InvalidState("interrupted".to_owned())),
    };
    if let Err(error) = result {
        // Half a disk must not pass for one.
        if let Err(remove) = std::fs::remove_file(&read.output) {
            tracing::warn!("remove {}: {remove}", read.output.display());
        }
        return Err(error);
    }
    let done = result?;
    let answer = serde_json::json!({
        "snapshot": copy.snapshot,
        "volume": copy.volume,
        "output": read.output,
        "length-bytes": done.length_bytes,
        "data-bytes": done.data_bytes,
        "left-out-bytes": copy.left_out_bytes,
    });
    super::print(json, &answer, |_| {
        format!(
            "{}: {} of {}, {} of them not zero\n{}",
            read.output.display(),
            size(done.length_bytes),
            copy.volume,
            size(done.data_bytes),
            left_out(copy.left_out_bytes)
        )
    })
}

async fn fill(
    client: &StorageClient,
    copy: &Copy,
    file: &File,
) -> Result<vhost_blk_wire::command::SnapshotReadDone, Error> {
    let fd: OwnedFd = file
        .try_clone()
        .map_err(io_error("duplicate a descriptor"))?
        .into();
    let mut progress = Progress::begin();
    let done = client
        .read(copy.snapshot, fd, LIMIT, |done, total| {
            progress.show(done, total);
        })
        .await?;
    progress.end();
    rustix::fs::fsync(file)
        .map_err(io::Error::from)
        .map_err(io_error("sync the output"))?;
    Ok(done)
}

fn choose(copies: Vec<Copy>, read: &Read) -> Result<Copy, Error> {
    let mut chosen = copies.into_iter().filter(|copy| {
        read.disk
            .as_ref()
            .is_none_or(|disk| *disk == copy.volume || *disk == copy.serial)
    });
    match (chosen.next(), chosen.next()) {
        (Some(copy), None) => Ok(copy),
        (Some(first), Some(second)) => Err(Error::Usage(format!(
            "the set has several disks ({}, {}, ..): choose one by --disk",
            first.volume, second.volume
        ))),
        (None, _) => Err(Error::NotFound(format!(
            "no copy of {} in {}",
            read.disk.as_deref().unwrap_or("anything"),
            read.id
        ))),
    }
}

fn open(read: &Read) -> Result<File, Error> {
    let path = &read.output;
    if read.force
        && let Ok(metadata) = std::fs::metadata(path)
        && !metadata.is_file()
    {
        let text = format!("{} is no regular file", path.display());
        return Err(Error::InvalidState(text));
    }
    let mut options = OpenOptions::new();
    options.write(true).read(true).mode(0o600);
    if read.force {
        options.create(true).truncate(true);
    } else {
        options.create_new(true);
    }
    match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(Error::InvalidState(
            format!("{} exists; --force overwrites it", path.display()),
        )),
        result => result.map_err(io_error(&path.display().to_string())),
    }
}

fn io_error(what: &str) -> impl FnOnce(io::Error) -> Error + use<> {
    let what = what.to_owned();
    move |source| Error::Io { what, source }
}

/// Progress on standard error: one line that is overwritten on a terminal, a line now and then elsewhere.
struct Progress {
    began: Instant,
    shown: Option<Instant>,
    terminal: bool,
}

impl Progress {
    fn begin() -> Self {
        Self {
            began: Instant::now(),
            shown: None,
            terminal: io::stderr().is_terminal(),
        }
    }

    fn show(&mut self, done: u64, total: u64) {
        let last = self.shown.unwrap_or(self.began);
        if !self.terminal && last.elapsed() < LINE_EVERY {
            return;
        }
        self.shown = Some(Instant::now());
        let percent = (u128::from(done) * 100)
            .checked_div(u128::from(total))
            .unwrap_or(100);
        let text = format!("{} of {}, {percent} %", size(done), size(total));
        let mut stderr = io::stderr();
        // Progress is a courtesy: a closed standard error is no failure.
        drop(if self.terminal {
            write!(stderr, "\r{text:<40}")
        } else {
            writeln!(stderr, "{text}")
        });
    }

    fn end(&self) {
        if self.terminal && self.shown.is_some() {
            eprintln!();
        }
    }
}
