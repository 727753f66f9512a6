//! The state directory: one record per set, written before the guest is frozen, and one lock per VM.
//!
//! Called by `run`, `undo` and `sets`. A record is a [`SetDocument`]; its outcome `open` is the intent. Invariants: a record
//! is replaced whole (temporary file, fsync, rename, fsync of the directory); who makes or undoes a set of a VM holds
//! that VM's lock, which the kernel drops when he dies; so an open record whose lock is free belongs to a dead bridge. A
//! restore lets reverts beside it, since they are what it may be for, and nothing else.

use super::document::SetDocument;
use rustix::fs::{FlockOperation, flock, fsync};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Where records are kept unless told otherwise.
pub const DEFAULT_STATE_DIRECTORY: &str = "/var/lib/vmshadow";

/// Longest record that is read, bytes: 64 volumes and hundreds of writers stay far below.
const RECORD_BYTES_MAX: u64 = 64 << 20;

/// Why the state directory does not serve.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file operation failed.
    #[error("{op} {}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A record cannot be read.
    #[error("{}: not a set document", path.display())]
    Corrupted {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// There is no such set.
    #[error("no set {0}")]
    NotFound(Uuid),
}

/// The directory.
#[derive(Clone, Debug)]
pub struct StateDirectory {
    sets: PathBuf,
    locks: PathBuf,
}

/// What the right to a VM is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To make, undo, complete or delete sets, or to speak to the guest: alone.
    Sets,
    /// To restore: no other restore, and nothing else but reverts.
    Restore,
    /// To revert disks: no other revert, and nothing else but a restore.
    Revert,
}

/// A right to one VM.
#[derive(Debug)]
pub struct VmLock {
    files: Vec<File>,
}

impl Drop for VmLock {
    /// By hand: a program that another thread is starting just now shares the open files until it is executed, and closing them
    /// here would leave them locked until then.
    fn drop(&mut self) {
        for file in &self.files {
            // What cannot be unlocked is unlocked by its closing.
            flock(file, FlockOperation::NonBlockingUnlock).unwrap_or(());
        }
    }
}

impl StateDirectory {
    /// Opens it, making what is missing (mode 0700).
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let directory = Self {
            sets: path.join("sets"),
            locks: path.join("locks"),
        };
        for path in [&directory.sets, &directory.locks] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .map_err(io_error("create", path))?;
        }
        Ok(directory)
    }

    /// Takes the lock of the VM behind this monitor; `None` if somebody has it for what goes not with this.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn lock(&self, qmp: &Path, purpose: Purpose) -> Result<Option<VmLock>, StateError> {
        let vm = file_name(&canonical(qmp));
        // No path is written with a `+`.
        let own = match purpose {
            Purpose::Sets => None,
            Purpose::Restore => Some(format!("{vm}+restore")),
            Purpose::Revert => Some(format!("{vm}+revert")),
        };
        let mut lock = VmLock { files: Vec::new() };
        let of_vm = if own.is_some() {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        let own = own.map(|own| (own, FlockOperation::NonBlockingLockExclusive));
        for (name, operation) in [Some((vm, of_vm)), own].into_iter().flatten() {
            let path = self.locks.join(name);
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(&path)
                .map_err(io_error("open", &path))?;
            match flock(&file, operation) {
                Ok(()) => lock.files.push(file),
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(errno) => return Err(io_error("lock", &path)(errno.into())),
            }
        }
        Ok(Some(lock))
    }

    /// Writes a record. Durable when it returns.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn store(&self, document: &SetDocument) -> Result<(), StateError> {
        let path = self.record(document.set);
        let temporary = path.with_extension("new");
        let text = serde_json::to_vec_pretty(document).map_err(|source| StateError::Corrupted {
            path: path.clone(),
            source,
        })?;
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(io_error("create", &temporary))?;
        file.write_all(&text)
            .map_err(io_error("write", &temporary))?;
        fsync(&file)
            .map_err(io::Error::from)
            .map_err(io_error("sync", &temporary))?;
        fs::rename(&temporary, &path).map_err(io_error("rename", &path))?;
        self.sync_directory()
    }

    /// Reads a record.
    ///
    /// # Errors
    /// [`StateError::NotFound`], [`StateError::Corrupted`], [`StateError::Io`].
    pub fn load(&self, set: Uuid) -> Result<SetDocument, StateError> {
        match read(&self.record(set)) {
            Err(StateError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Err(StateError::NotFound(set))
            }
            result => result,
        }
    }

    /// Reads all records, oldest first. What cannot be read is reported beside the rest.
    ///
    /// # Errors
    /// [`StateError::Io`] if the directory cannot be listed.
    pub fn load_all(&self) -> Result<(Vec<SetDocument>, Vec<StateError>), StateError> {
        let mut documents = Vec::new();
        let mut failures = Vec::new();
        let entries = fs::read_dir(&self.sets).map_err(io_error("list", &self.sets))?;
        for entry in entries {
            let path = entry.map_err(io_error("list", &self.sets))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read(&path) {
                Ok(document) => documents.push(document),
                // Removed between the listing and the reading.
                Err(StateError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(failure) => failures.push(failure),
            }
        }
        documents.sort_by_key(|document| (document.started_unix_ms, document.set));
        Ok((documents, failures))
    }

    /// Removes a record. Durable when it returns.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn remove(&self, set: Uuid) -> Result<(), StateError> {
        let path = self.record(set);
        match fs::remove_file(&path) {
            Ok(()) => self.sync_directory(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(io_error("remove", &path)(error)),
        }
    }

    fn record(&self, set: Uuid) -> PathBuf {
        self.sets.join(format!("{set}.json"))
    }

    fn sync_directory(&self) -> Result<(), StateError> {
        let directory = File::open(&self.sets).map_err(io_error("open", &self.sets))?;
        fsync(&directory)
            .map_err(io::Error::from)
            .map_err(io_error("sync", &self.sets))
    }
}

fn read(path: &Path) -> Result<SetDocument, StateError> {
    let file = File::open(path).map_err(io_error("open", path))?;
    let length = file.metadata().map_err(io_error("stat", path))?.len();
    if length > RECORD_BYTES_MAX {
        let error = io::Error::other(format!("longer than {RECORD_BYTES_MAX} bytes"));
        return Err(io_error("read", path)(error));
    }
    let text = fs::read(path).map_err(io_error("read", path))?;
    serde_json::from_slice(&text).map_err(|source| StateError::Corrupted {
        path: path.to_owned(),
        source,
    })
}

fn io_error<'a>(op: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StateError + 'a {
    move |source| StateError::Io {
        op,
        path: path.to_owned(),
        source,
    }
}

/// The canonical path of a monitor, also when its socket is gone: the lock of a VM that has just ended must be found by the
/// same name, or a set would be undone for dead while its maker lives.
fn canonical(qmp: &Path) -> PathBuf {
    let of_directory = || {
        let name = qmp.file_name()?;
        let directory = qmp.parent()?.canonicalize().ok()?;
        Some(directory.join(name))
    };
    qmp.canonicalize()
        .ok()
        .or_else(of_directory)
        .unwrap_or_else(|| qmp.to_owned())
}

/// A file name that stands for a path: what could be mistaken is written as its code.
fn file_name(path: &Path) -> String {
    let mut name = String::new();
    for byte in path.as_os_str().as_encoded_bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-') {
            name.push(char::from(*byte));
        } else {
            name.push_str(&format!("%{byte:02x}"));
        }
    }
    name
}

#[cfg(test)]
mod tests;
