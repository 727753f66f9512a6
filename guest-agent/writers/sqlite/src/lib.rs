//! A snapshot writer for SQLite: any number of database files, in any journal mode.
//!
//! Called through the writer library (`guest_agent_wire::sdk`). Prepare checkpoints the write-ahead logs, as far as that goes
//! without waiting for anybody; freeze takes the write lock of every database with `BEGIN IMMEDIATE`; thaw rolls these empty
//! transactions back. Invariants: nothing is ever written to a database; `held` is said only if every transaction is still
//! open on the connection that began it, and the path still names the file that it is open on; a database file is never opened except by SQLite, since closing a descriptor of it
//! would drop the locks that this process holds.

use guest_agent::filesystem::plan::Sources;
use guest_agent_wire::components::ComponentReply;
use guest_agent_wire::metadata::{
    Component, FileSet, Metadata, RestoreMethod, Restoring, Source, Usage,
};
use guest_agent_wire::sdk::{Call, Held, Veto, Writer};
use guest_agent_wire::types::{Hold, Level};
use guest_agent_wire::writer::{
    BackupComplete, BackupShutdown, Freeze, PrepareBackup, PrepareSnapshot, Registration, Thaw,
};
use rusqlite::{Connection, ErrorCode, OpenFlags};
use serde_json::{Value, json};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Class of this writer; allow files name it.
pub const CLASS_ID: &str = "sqlite";
/// How long a checkpoint may wait for readers.
const CHECKPOINT_WAIT: Duration = Duration::from_millis(500);
/// Between two looks at a lock that somebody else has.
const BUSY_LOOK: Duration = Duration::from_micros(100);

/// Who this instance is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Unique in the guest.
    pub instance_id: String,
    /// For people.
    pub name: String,
    /// Freeze level.
    pub level: Level,
    /// Longest hold, milliseconds.
    pub freeze_timeout_ms: u64,
}

/// The writer.
#[derive(Debug)]
pub struct SqliteWriter {
    identity: Identity,
    databases: Vec<PathBuf>,
    sources: Sources,
    /// One for each database, from prepare to the end of the set.
    open: Vec<Open>,
}

/// An open database.
#[derive(Debug)]
struct Open {
    connection: Connection,
    /// Of the file that its path named before it was opened.
    file: FileId,
}

/// Names a file, whatever its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// Of the file at this path, which is not opened.
    fn of(path: &Path) -> std::io::Result<Self> {
        let stat = std::fs::metadata(path)?;
        Ok(Self {
            device: stat.dev(),
            inode: stat.ino(),
        })
    }
}

impl SqliteWriter {
    /// For these files. `sources` tells on which disks they lie.
    #[must_use]
    pub fn new(identity: Identity, databases: Vec<PathBuf>, sources: Sources) -> Self {
        Self {
            identity,
            databases,
            sources,
            open: Vec::new(),
        }
    }

    fn connect(&mut self) -> Result<(), Veto> {
        self.open.clear();
        for path in &self.databases {
            // Never created: a path that is wrong must not pass for an empty database.
            let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
            let file = FileId::of(path)
                .map_err(|error| Veto::retryable(format!("{}: {error}", path.display())))?;
            let connection = Connection::open_with_flags(path, flags)
                .map_err(|error| veto(path, "open", &error))?;
            self.open.push(Open { connection, file });
        }
        Ok(())
    }

    fn lock_all(&self, call: &Call<'_>) -> Result<(), Veto> {
        // A quarter is left for the answer: one that is late fails the set as well, but says less.
        let until = Instant::now() + call.remaining() * 3 / 4;
        for (path, open) in self.databases.iter().zip(&self.open) {
            begin_immediate(&open.connection, until)
                .map_err(|error| veto(path, "BEGIN IMMEDIATE", &error))?;
        }
        Ok(())
    }

    /// What changes whenever somebody commits: SQLite's own counter, the size, and the length of the write-ahead log. A
    /// checkpoint, which may run while the lock is held, changes none of them.
    fn evidence(&self) -> Result<Value, Veto> {
        let mut all = Vec::new();
        for (path, open) in self.databases.iter().zip(&self.open) {
            let pragma = |name: &str| -> Result<i64, Veto> {
                open.connection
                    .query_row(&format!("PRAGMA {name}"), [], |row| row.get(0))
                    .map_err(|error| veto(path, name, &error))
            };
            all.push(json!({
                "database": path.display().to_string(),
                "data_version": pragma("data_version")?,
                "page_count": pragma("page_count")?,
                "wal_bytes": wal_bytes(path),
            }));
        }
        Ok(Value::Array(all))
    }

    /// Nothing but this process can take its locks away, and while its transactions are open it does not; but somebody may put
    /// another file in the place of one, which nobody has locked.
    fn check_locks(&self) -> Result<(), String> {
        for (path, open) in self.databases.iter().zip(&self.open) {
            if open.connection.is_autocommit() {
                return Err(format!("{}: the transaction has ended", path.display()));
            }
            if FileId::of(path).ok() != Some(open.file) {
                return Err(format!("{}: it is another file now", path.display()));
            }
        }
        Ok(())
    }

    /// Rolls back what is open. True if a transaction was open on every connection, and each rolled back.
    fn unlock_all(&self) -> bool {
        let mut held = self.open.len() == self.databases.len();
        for Open { connection, .. } in &self.open {
            // Without a transaction there is nothing to roll back, and nothing was held.
            let is_locked = !connection.is_autocommit();
            held &= is_locked && connection.execute_batch("ROLLBACK").is_ok();
        }
        held
    }

    /// Refuses a set that leaves out a disk which a database lies on. A file of which that cannot be told is let pass.
    fn check_disks(&self, disks: &[String]) -> Result<(), Veto> {
        if disks.is_empty() {
            return Ok(());
        }
        for path in &self.databases {
            let extents = self.sources.extents_of(path).unwrap_or_default();
            let outside = extents
                .iter()
                .find(|extent| !extent.serial.is_empty() && !disks.contains(&extent.serial));
            if let Some(extent) = outside {
                return Err(Veto::inconsistent(format!(
                    "{} lies on disk {} ({}), which is not in the set",
                    path.display(),
                    extent.serial,
                    extent.disk
                )));
            }
        }
        Ok(())
    }
}

impl Writer for SqliteWriter {
    fn registration(&self) -> Registration {
        let identity = &self.identity;
        Registration {
            level: identity.level,
            freeze_timeout_ms: identity.freeze_timeout_ms,
            hold: Hold::App,
            ..Registration::new(CLASS_ID, &identity.instance_id, &identity.name)
        }
    }

    fn identify(&mut self, _: &Call<'_>) -> Result<Metadata, Veto> {
        let mut document = Metadata {
            version: rusqlite::version().to_owned(),
            usage: Usage::UserData,
            source: Source::TransactedDb,
            // The application has to be stopped by whoever restores: this writer does not know it.
            restore_method: Some(Restoring::by(RestoreMethod::RestoreIfCanReplace)),
            ..Metadata::default()
        };
        for path in &self.databases {
            let path = absolute(path)?;
            let (directory, file) = split(&path)?;
            let mut component = Component::database(directory, file);
            component.selectable_for_restore = true;
            component.database_files = vec![FileSet::new(directory, file)];
            component.log_files = ["-wal", "-journal"]
                .map(|suffix| FileSet::new(directory, format!("{file}{suffix}")))
                .into();
            document.components.push(component);
            // An index of the log in shared memory; made anew from it.
            let index = FileSet::new(directory, format!("{file}-shm"));
            document.excludes.push(index);
        }
        Ok(document)
    }

    fn prepare_backup(
        &mut self,
        _: &Call<'_>,
        backup: &PrepareBackup,
    ) -> Result<Vec<ComponentReply>, Veto> {
        self.check_disks(&backup.disks)?;
        Ok(Vec::new())
    }

    fn prepare_snapshot(&mut self, _: &Call<'_>, _: &PrepareSnapshot) -> Result<(), Veto> {
        self.connect()?;
        for Open { connection, .. } in &self.open {
            // Best effort: a busy database is as consistent with a long log as with a short one, it only opens more slowly.
            for (mode, wait) in [("PASSIVE", Duration::ZERO), ("TRUNCATE", CHECKPOINT_WAIT)] {
                let checkpoint = format!("PRAGMA wal_checkpoint({mode})");
                connection
                    .busy_timeout(wait)
                    .and_then(|()| connection.query_row(&checkpoint, [], |_| Ok(())))
                    .unwrap_or(());
            }
        }
        Ok(())
    }

    fn freeze(&mut self, call: &Call<'_>, _: &Freeze) -> Result<Value, Veto> {
        if self.open.len() != self.databases.len() {
            self.connect()?;
        }
        let evidence = self
            .lock_all(call)
            .and_then(|()| self.check_locks().map_err(Veto::retryable))
            .and_then(|()| self.evidence());
        if evidence.is_err() {
            self.open.clear();
        }
        evidence
    }

    fn still_holds(&mut self) -> Result<(), String> {
        self.check_locks()
    }

    fn thaw(&mut self, _: &Call<'_>, _: &Thaw) -> Result<Held, Veto> {
        // Asked for before the locks are let go.
        let evidence = self.evidence();
        let was_locked = self.check_locks().is_ok();
        let held = self.unlock_all() && was_locked;
        Ok(Held {
            held,
            evidence: evidence?,
        })
    }

    fn backup_complete(&mut self, _: &Call<'_>, _: &BackupComplete) -> Result<(), Veto> {
        self.open.clear();
        Ok(())
    }

    fn backup_shutdown(&mut self, _: &BackupShutdown) -> Result<(), Veto> {
        self.open.clear();
        Ok(())
    }

    fn abort(&mut self, _: &str, _: &str) {
        // Closing a connection rolls its transaction back.
        self.open.clear();
    }
}

/// Takes the write lock as soon as it is free. SQLite's own waiting sleeps up to 100 ms between two looks, in which an
/// application that writes without a pause takes the lock again hundreds of times: it was seen to wait 20 s in vain.
fn begin_immediate(connection: &Connection, until: Instant) -> rusqlite::Result<()> {
    connection.busy_timeout(Duration::ZERO)?;
    loop {
        match connection.execute_batch("BEGIN IMMEDIATE") {
            Err(error)
                if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy)
                    && Instant::now() < until =>
            {
                std::thread::sleep(BUSY_LOOK);
            }
            done => return done,
        }
    }
}

fn veto(path: &Path, what: &str, error: &rusqlite::Error) -> Veto {
    let message = format!("{}: {what}: {error}", path.display());
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => Veto::nonretryable(message),
        // Busy above all; and a file that is not there may be there next time.
        Some(_) | None => Veto::retryable(message),
    }
}

fn absolute(path: &Path) -> Result<PathBuf, Veto> {
    std::path::absolute(path).map_err(|error| Veto::nonretryable(error.to_string()))
}

/// Directory and name of a file, as text.
fn split(path: &Path) -> Result<(&str, &str), Veto> {
    let directory = path.parent().and_then(Path::to_str);
    let file = path.file_name().and_then(|name| name.to_str());
    directory
        .zip(file)
        .ok_or_else(|| Veto::nonretryable(format!("{} is not UTF-8", path.display())))
}

fn beside(path: &Path, suffix: &str) -> String {
    format!("{}{suffix}", path.display())
}

fn wal_bytes(path: &Path) -> u64 {
    std::fs::metadata(beside(path, "-wal")).map_or(0, |stat| stat.len())
}

#[cfg(test)]
mod tests;
