//! The mark of a freeze by a client of the QEMU guest agent protocol: a file in the state directory (a tmpfs).
//!
//! Kept by the actor from before such a freeze until the client has been told how it ended. Its thaw answers a number, and 0 is no
//! error: an agent that is started anew would tell it that a hold lasted which ended with the last agent.

use crate::hold::ledger::boot_id;
use std::fs::{File, remove_file};
use std::io;
use std::path::{Path, PathBuf};

/// See the file's head.
#[derive(Debug)]
pub(super) struct QgaMark {
    path: PathBuf,
    is_set: bool,
}

impl QgaMark {
    /// As the last agent of this boot left it. Another boot's has another name.
    pub(super) fn find(state_dir: &Path) -> Self {
        let boot = boot_id().unwrap_or_default();
        let path = state_dir.join(format!("qga-frozen.{boot}"));
        let is_set = path.exists();
        Self { path, is_set }
    }

    pub(super) fn is_set(&self) -> bool {
        self.is_set
    }

    /// Without room for it nothing may be frozen.
    pub(super) fn set(&mut self) -> io::Result<()> {
        File::create(&self.path)?;
        self.is_set = true;
        Ok(())
    }

    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.is_set) {
            remove_file(&self.path).unwrap_or(());
        }
    }
}
