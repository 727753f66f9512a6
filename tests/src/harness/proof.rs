//! The proof of a database's writer: sets under load, and servers that start on the copies.
//!
//! Called by the databases' scenarios. The load runs in the machine while sets are taken; each copy is then mounted in a second
//! machine, where the stock server recovers and its own checker looks at it. Of every client of the load, each transaction
//! acknowledged before the set is there, none begun after it, no half one, and the log reaches the position that the
//! writer recorded.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::database::Kind;
use super::disk::FileSystem;
use super::oracle;
use super::requires;
use super::site::{Site, Taken};
use super::vm::VmBuilder;

/// How long writes are held: far longer than a transaction takes, so that only the freeze can have made the clients' longest wait, and the
/// copy must end there.
const HOLD: Duration = Duration::from_secs(1);
/// Clients of the load.
const CLIENTS: usize = 3;
/// Copies in one second machine.
pub const BATCH: usize = 5;

/// How many sets: `VMSHADOW_DATABASE_SETS`, by default 2.
pub fn sets() -> Result<usize> {
    match std::env::var("VMSHADOW_DATABASE_SETS") {
        Ok(text) => text.parse().context("VMSHADOW_DATABASE_SETS"),
        Err(_) => Ok(2),
    }
}

/// Takes sets of a database and has each copy judged.
pub fn of(kind: Kind) -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let site = Site::start_database(kind)?;
    site.database_writer(kind)?;
    let sets = sets()?;
    let mut done = 0;
    while done < sets {
        let count = BATCH.min(sets - done);
        batch(&site, kind, done, count)
            .with_context(|| format!("sets {done} to {}", done + count))?;
        done += count;
        eprintln!("{}: {done} of {sets} sets hold", kind.name());
    }
    Ok(())
}

fn batch(site: &Site, kind: Kind, first: usize, count: usize) -> Result<()> {
    let load = super::load::Load::start_clients(&site.vm, kind.name(), CLIENTS)?;
    let mut taken = Vec::new();
    for number in first..first + count {
        taken.push(site.create_held(&["--method", method(number)], HOLD)?);
        // What was begun after the set is acknowledged, to every client.
        load.wait_for_more(20 * CLIENTS)?;
    }
    let acks = load.stop(&site.vm)?;
    let mut files = Vec::new();
    for (number, set) in taken.iter().enumerate() {
        files.extend(site.read_back(&set.answer, &format!("set{number}"))?);
    }
    let mut second = VmBuilder::new("second").with_databases();
    for (number, file) in files.iter().enumerate() {
        super::disk::run("e2fsck", &["-fn"], file)?;
        second = second
            .file(&format!("copy{number}"), file)
            .mounted(&format!("/mnt/{number}"), FileSystem::Ext4);
    }
    let second = second.boot()?;
    for (number, set) in taken.iter().enumerate() {
        let evidence = evidence(set)?;
        let found = kind
            .judge(
                &site.vm,
                &second,
                &format!("/mnt/{number}"),
                evidence,
                CLIENTS,
            )
            .with_context(|| format!("{:#}", set.answer.document))?;
        ensure!(found.len() == CLIENTS, "{found:?}");
        for (client, found) in found.iter().enumerate() {
            oracle::compare(found, client, &acks, &set.window).with_context(|| {
                format!("client {client}: {found:?}, {:?}, {evidence}", set.window)
            })?;
        }
    }
    second.power_cut()?;
    for (file, set) in files.iter().zip(&taken) {
        forget(site, set, std::slice::from_ref(file))?;
    }
    Ok(())
}

/// The same for SQLite: a database on each of two disks, one of them XFS, held by one writer; the judge is the stock `sqlite3`.
pub fn of_sqlite() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let site = Site::start("sqlite", &[("a", FileSystem::Ext4), ("b", FileSystem::Xfs)])?;
    let sets = sets()?;
    let mut done = 0;
    while done < sets {
        let count = BATCH.min(sets - done);
        sqlite_batch(&site, done, count)
            .with_context(|| format!("sets {done} to {}", done + count))?;
        done += count;
        eprintln!("sqlite: {done} of {sets} sets hold");
    }
    Ok(())
}

fn sqlite_batch(site: &Site, first: usize, count: usize) -> Result<()> {
    let load = site.load()?;
    if first == 0 {
        // The databases must be there before it is.
        site.sqlite_writer()?;
    }
    let mut taken = Vec::new();
    for number in first..first + count {
        taken.push(site.create_held(&["--method", method(number)], HOLD)?);
        load.wait_for_more(40)?;
    }
    let acks = load.stop(&site.vm)?;
    for set in &taken {
        let files = site.read_back(&set.answer, "set")?;
        let found = site.judge(&files)?;
        site.compare(&found, &acks, &set.window)?;
        for (number, found) in found.iter().enumerate() {
            let evidence = &evidence(set)?[number];
            let size = found.size.context("no size")?;
            ensure!(
                evidence["page_count"] == size.page_count
                    && evidence["wal_bytes"] == size.wal_bytes,
                "{found:?}, recorded {evidence}"
            );
        }
        forget(site, set, &files)?;
    }
    Ok(())
}

fn method(number: usize) -> &'static str {
    if number.is_multiple_of(2) {
        "row"
    } else {
        "cow"
    }
}

/// Gives the room of a set back: there may be a hundred.
pub fn forget(site: &Site, set: &Taken, files: &[PathBuf]) -> Result<()> {
    for file in files {
        std::fs::remove_file(file)?;
    }
    let id = set.answer.at("/set")?.as_str().context("set")?.to_owned();
    site.bridge.run(&["delete", &id])?.succeeded()?;
    Ok(())
}

/// What the writer recorded at the freeze.
fn evidence(set: &Taken) -> Result<&Value> {
    set.answer.at("/writers/0/freeze/evidence")
}
