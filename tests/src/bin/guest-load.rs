//! The load inside the guest: numbered SQLite transactions, as fast as they go, each acknowledged
//! to the host after its commit: `guest-load PORT DATABASE...`.
//!
//! Started by `harness::load` through the guest's shell. With several databases, transaction n is
//! committed to all of them, in their order, before n + 1 begins: copies taken at one instant can
//! then differ by one transaction at most, and only in that order.
//!
//! Every database has the journal in WAL mode and `synchronous=FULL`, so a commit that has
//! returned is durable by SQLite's own word. Acknowledgements are sent only after that, and are
//! dropped when the port has no reader or is full: the load never waits for the host. Transaction
//! n of a database that was there before follows its last one.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, ensure};
use rusqlite::{Connection, TransactionBehavior};
use rustix::fs::OFlags;
use rustix::time::{ClockId, clock_gettime};
use vmshadow_tests::guest_protocol::Ack;

/// Filling of each transaction, in bytes: a few of SQLite's pages, so that each touches new blocks.
const BODY_BYTES: usize = 6000;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let port = arguments
        .next()
        .context("usage: guest-load PORT DATABASE...")?;
    let mut port = OpenOptions::new()
        .write(true)
        .custom_flags(i32::try_from(OFlags::NONBLOCK.bits())?)
        .open(&port)
        .context(port)?;
    let mut databases = arguments
        .map(|path| open(&path))
        .collect::<Result<Vec<_>>>()?;
    ensure!(!databases.is_empty(), "no database named");
    let last = databases.iter().map(last_id).collect::<Result<Vec<_>>>()?;
    let mut id = last.iter().copied().max().unwrap_or(0);
    // A database whose last transaction is missing (power cut between two commits) catches up.
    for (database, from) in last.iter().enumerate() {
        for missing in from + 1..=id {
            let ack = commit(&mut databases, database, missing)?;
            acknowledge(&mut port, &ack)?;
        }
    }
    loop {
        id += 1;
        for database in 0..databases.len() {
            let ack = commit(&mut databases, database, id)?;
            acknowledge(&mut port, &ack)?;
        }
    }
}

fn open(path: &str) -> Result<Connection> {
    let connection = Connection::open(path).context(path.to_owned())?;
    connection.busy_timeout(std::time::Duration::from_secs(3600))?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    connection.pragma_update(None, "synchronous", "full")?;
    connection.execute(
        "CREATE TABLE IF NOT EXISTS tx(id INTEGER PRIMARY KEY, began_us INTEGER, body BLOB)",
        [],
    )?;
    Ok(connection)
}

fn last_id(connection: &Connection) -> Result<u64> {
    let id: i64 =
        connection.query_row("SELECT coalesce(max(id), 0) FROM tx", [], |row| row.get(0))?;
    Ok(u64::try_from(id)?)
}

fn commit(databases: &mut [Connection], database: usize, id: u64) -> Result<Ack> {
    let connection = databases.get_mut(database).context("no such database")?;
    let began_us = boottime_us()?;
    // A writer that holds the database (BEGIN IMMEDIATE while frozen) keeps us here.
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute(
        "INSERT INTO tx(id, began_us, body) VALUES (?1, ?2, randomblob(?3))",
        (
            i64::try_from(id)?,
            i64::try_from(began_us)?,
            i64::try_from(BODY_BYTES)?,
        ),
    )?;
    transaction.commit()?;
    Ok(Ack {
        database,
        id,
        began_us,
        acked_us: boottime_us()?,
    })
}

fn acknowledge(port: &mut File, ack: &Ack) -> Result<()> {
    let mut line = serde_json::to_string(ack)?;
    line.push('\n');
    match port.write(line.as_bytes()) {
        Ok(_) => Ok(()),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::BrokenPipe) => {
            Ok(())
        }
        Err(error) => Err(error).context("the port"),
    }
}

fn boottime_us() -> Result<u64> {
    let now = clock_gettime(ClockId::Boottime);
    Ok(u64::try_from(now.tv_sec)? * 1_000_000 + u64::try_from(now.tv_nsec)? / 1000)
}
