//! Judges of a copy: a second machine that opens the databases, and file system checkers of the host.
//!
//! Called by scenarios and the demo with plain raw files. The judges are stock programs (sqlite3,
//! e2fsck, xfs_repair, QEMU's own block layer): none of them can share a fault with us.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::disk::{self, FileSystem};
use super::vm::{Vm, VmBuilder};
use crate::guest_protocol::Ack;

/// A restored disk with one database on it.
#[derive(Clone, Copy, Debug)]
pub struct Restored<'a> {
    /// The raw file. It is written to: mounting replays the journal.
    pub image: &'a Path,
    /// What is on it.
    pub file_system: FileSystem,
    /// The database's path below the mount point.
    pub database: &'a str,
}

/// What the second machine found in one database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The highest transaction, 0 if none.
    pub last: u64,
    /// How many there are: equal to `last` unless there is a gap.
    pub count: u64,
    /// SQLite's word; "ok" is the only good one.
    pub integrity: String,
    /// Of an SQLite database.
    pub size: Option<Size>,
}

/// What an SQLite database is long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// `PRAGMA page_count`, with what only its log has.
    pub page_count: u64,
    /// Its write-ahead log, before anybody opened the copy; 0 if there was none.
    pub wal_bytes: u64,
}

/// Has the stock `sqlite3` of a machine check and count a database of the load.
pub fn open_database(vm: &Vm, path: &str) -> Result<Found> {
    // Whoever closes it last takes the log away.
    let wal_bytes = vm.shell(&format!("stat -c %s {path}-wal 2>/dev/null || echo 0"))?;
    let page_count = vm.shell(&format!("sqlite3 {path} 'PRAGMA page_count'"))?;
    let integrity = vm.shell(&format!("sqlite3 {path} 'PRAGMA integrity_check'"))?;
    let counts = vm.shell(&format!(
        "sqlite3 {path} 'SELECT coalesce(max(id), 0), count(*) FROM tx'"
    ))?;
    let (last, count) = counts
        .trim()
        .split_once('|')
        .with_context(|| counts.clone())?;
    Ok(Found {
        last: last.parse()?,
        count: count.parse()?,
        integrity: integrity.trim().to_owned(),
        size: Some(Size {
            page_count: page_count.trim().parse()?,
            wal_bytes: wal_bytes.trim().parse()?,
        }),
    })
}

/// Boots a machine on the copies, opens every database, and then has the host's checkers read the images.
pub fn judge(copies: &[Restored<'_>]) -> Result<Vec<Found>> {
    for copy in copies {
        if copy.file_system == FileSystem::Ext4 {
            // A frozen ext4 has an empty journal: the copy is clean before anybody mounts it.
            disk::run("e2fsck", &["-fn"], copy.image)?;
        }
    }
    let mut builder = VmBuilder::new("oracle");
    for (number, copy) in copies.iter().enumerate() {
        builder = builder
            .file(&format!("copy{number}"), copy.image)
            .mounted(&format!("/mnt/{number}"), copy.file_system);
    }
    let vm = builder.boot()?;
    let mut found = Vec::new();
    for (number, copy) in copies.iter().enumerate() {
        let path = format!("/mnt/{number}/{}", copy.database);
        found.push(open_database(&vm, &path)?);
    }
    vm.shut_down()?;
    for copy in copies {
        match copy.file_system {
            FileSystem::Ext4 => disk::run("e2fsck", &["-fn"], copy.image)?,
            FileSystem::Xfs => disk::run("xfs_repair", &["-n"], copy.image)?,
        };
    }
    Ok(found)
}

/// When the set was taken, as the guest and the agent saw it.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// The guest's clock before the request, or when a long hold was to end, in microseconds: what was acknowledged by then is in
    /// the copy.
    pub asked_us: u64,
    /// The guest's clock after the answer, or when all was held: what was begun after it is not in the copy.
    pub answered_us: u64,
    /// How long the agent says that this database's file system was frozen at least, in milliseconds.
    pub hold_ms: u64,
}

/// Compares a database of the copy with what the running machine acknowledged.
///
/// Beyond "all from before, none from after", the copy must end exactly at the stall that the
/// freeze caused: either its last transaction was the last before the freeze (then the next one was
/// acknowledged a hold later), or it was the one in flight (then it was itself acknowledged a hold
/// after the one before).
pub fn compare(found: &Found, database: usize, acks: &[Ack], window: &Window) -> Result<()> {
    ensure!(
        found.integrity == "ok",
        "integrity_check: {}",
        found.integrity
    );
    ensure!(found.count == found.last, "a gap: {found:?}");
    let acks: Vec<_> = acks.iter().filter(|ack| ack.database == database).collect();
    let before = acks
        .iter()
        .filter(|ack| ack.acked_us <= window.asked_us)
        .map(|ack| ack.id)
        .max();
    let before = before.context("nothing was acknowledged before the set")?;
    ensure!(
        found.last >= before,
        "lost: {before} was acknowledged, the copy ends at {}",
        found.last
    );
    let after = acks
        .iter()
        .filter(|ack| ack.began_us > window.answered_us)
        .map(|ack| ack.id)
        .min();
    let after = after.context("nothing was acknowledged after the set")?;
    ensure!(
        found.last < after,
        "{after} was begun after the set, the copy ends at {}",
        found.last
    );
    let acked_at = |id: u64| acks.iter().find(|ack| ack.id == id).map(|ack| ack.acked_us);
    let gap_us = |from: u64| Some(acked_at(from + 1)?.saturating_sub(acked_at(from)?));
    let stall_us = gap_us(found.last).max(gap_us(found.last.saturating_sub(1)));
    let stall_us = stall_us.context("the acknowledgements around the copy's end are missing")?;
    ensure!(
        stall_us >= window.hold_ms * 1000,
        "the copy ends at {}, where the load stalled {stall_us} us, but the hold took {} ms",
        found.last,
        window.hold_ms
    );
    Ok(())
}
