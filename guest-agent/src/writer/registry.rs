//! All writers of the guest: those connected now, and those whose directory is there now.
//!
//! `socket` registers and removes; `quiesce` asks for all at the start of a set. Holds no lock while a writer is called.

use super::script::{Directory, Line, Script, Sources};
use super::{Identity, Writer};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most connected writers at a time.
pub const CONNECTED_MAX: usize = 256;

/// Why a writer is not registered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The instance id is taken.
    #[error("a writer with instance id {0:?} is already connected")]
    Duplicate(String),
    /// There are too many.
    #[error("{CONNECTED_MAX} writers are connected already")]
    Full,
    /// It hung up at once.
    #[error("it does not listen")]
    Gone,
}

/// A directory that may be a writer's, but is not trusted or understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedDirectory {
    /// Its name.
    pub name: String,
    /// What is wrong with it.
    pub why: String,
}

/// The writers.
#[derive(Default)]
pub struct Registry {
    connected: Mutex<BTreeMap<String, Arc<dyn Writer>>>,
    scripts: Sources,
    line: Arc<Line>,
    state_dir: PathBuf,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let connected: Vec<String> = self.lock().keys().cloned().collect();
        out.debug_struct("Registry")
            .field("connected", &connected)
            .field("scripts", &self.scripts)
            .finish_non_exhaustive()
    }
}

impl Registry {
    /// Writers by socket, and scripts where `scripts` says.
    #[must_use]
    pub fn new(scripts: Sources, state_dir: PathBuf) -> Self {
        Self {
            connected: Mutex::default(),
            scripts,
            line: Arc::default(),
            state_dir,
        }
    }

    /// Adds a connected writer once there is a place for it and `greet` has told it so.
    pub fn add_after(
        &self,
        writer: Arc<dyn Writer>,
        greet: impl FnOnce() -> bool,
    ) -> Result<(), Refused> {
        let instance = writer.identity().instance_id.clone();
        let mut connected = self.lock();
        if connected.contains_key(&instance) {
            return Err(Refused::Duplicate(instance));
        }
        if connected.len() >= CONNECTED_MAX {
            return Err(Refused::Full);
        }
        if !greet() {
            return Err(Refused::Gone);
        }
        connected.insert(instance, writer);
        Ok(())
    }

    /// Removes a connected writer.
    pub fn remove(&self, identity: &Identity) {
        self.lock().remove(&identity.instance_id);
    }

    /// All writers, in freeze order, and the directories that are refused.
    #[must_use]
    pub fn writers(&self) -> (Vec<Arc<dyn Writer>>, Vec<RefusedDirectory>) {
        let mut writers: Vec<Arc<dyn Writer>> = self.lock().values().cloned().collect();
        let mut refused = Vec::new();
        for found in self.scripts.scan() {
            match found {
                Directory::Writer(recipe, identity) => {
                    let line = Arc::clone(&self.line);
                    let script = Script::new(*recipe, identity, &self.state_dir, line);
                    writers.push(Arc::new(script));
                }
                Directory::Refused(name, why) => refused.push(RefusedDirectory { name, why }),
            }
        }
        writers.sort_by(|a, b| {
            let (a, b) = (a.identity(), b.identity());
            // Scripts take turns in this order; for them the instance is the name of the directory or file.
            (a.level, &a.instance_id).cmp(&(b.level, &b.instance_id))
        });
        (writers, refused)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<dyn Writer>>> {
        self.connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
