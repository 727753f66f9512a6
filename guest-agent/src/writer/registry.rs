//! All writers of the guest: those connected now, and those whose directory is there now.
//!
//! `socket` registers and removes; `quiesce` asks for all at the start of a set. Holds no lock while a writer is called.
//! Invariant: an instance id that a user had is never another user's, and no user takes the places of all others or of root.

use super::places::ROOT;
use super::script::{Directory, Line, Script, Sources};
use super::{Identity, Writer};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most connected writers at a time.
pub const CONNECTED_MAX: usize = 256;

/// Most of one user but root.
const OF_ONE_MAX: usize = 64;
/// Most of all users but root.
const OF_OTHERS_MAX: usize = CONNECTED_MAX - 64;
/// Instance ids that are remembered of a user.
const REMEMBERED_MAX: usize = 256;

/// Why a writer is not registered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The instance id is taken.
    #[error("a writer with instance id {0:?} is already connected")]
    Duplicate(String),
    /// The instance id was another user's.
    #[error("instance id {0:?} is that of a writer of user {1}")]
    Anothers(String, u32),
    /// There are too many.
    #[error("{CONNECTED_MAX} writers are connected already")]
    Full,
    /// There are too many of this user, or of all but root.
    #[error("user {0} has no place left for another writer")]
    NoPlace(u32),
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

/// Connected writers by their instance ids.
#[derive(Default)]
struct Connected {
    writers: BTreeMap<String, Arc<dyn Writer>>,
    /// Whose each id is, also of those that have gone.
    owners: BTreeMap<String, u32>,
}

impl Connected {
    fn check(&self, instance: &str, uid: u32) -> Result<(), Refused> {
        if self.writers.contains_key(instance) {
            return Err(Refused::Duplicate(instance.to_owned()));
        }
        // A writer that is started anew must find its name free, or a set would be taken without asking it.
        if let Some(owner) = self.owners.get(instance)
            && ![*owner, ROOT].contains(&uid)
        {
            return Err(Refused::Anothers(instance.to_owned(), *owner));
        }
        if self.writers.len() >= CONNECTED_MAX {
            return Err(Refused::Full);
        }
        let uids = self.writers.values().map(|writer| writer.identity().uid);
        let own = uids.clone().filter(|other| *other == uid).count();
        let others = uids.filter(|other| *other != ROOT).count();
        if uid != ROOT && (own >= OF_ONE_MAX || others >= OF_OTHERS_MAX) {
            return Err(Refused::NoPlace(uid));
        }
        Ok(())
    }

    fn insert(&mut self, instance: String, writer: Arc<dyn Writer>) {
        let uid = writer.identity().uid;
        let remembered = self.owners.values().filter(|owner| **owner == uid).count();
        if remembered >= REMEMBERED_MAX {
            // One that makes up ever new ids loses its own old ones, not memory and nobody else's.
            let writers = &self.writers;
            self.owners
                .retain(|known, owner| *owner != uid || writers.contains_key(known));
        }
        self.owners.insert(instance.clone(), uid);
        self.writers.insert(instance, writer);
    }
}

/// The writers.
#[derive(Default)]
pub struct Registry {
    connected: Mutex<Connected>,
    scripts: Sources,
    line: Arc<Line>,
    state_dir: PathBuf,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let connected: Vec<String> = self.lock().writers.keys().cloned().collect();
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
        connected.check(&instance, writer.identity().uid)?;
        if !greet() {
            return Err(Refused::Gone);
        }
        connected.insert(instance, writer);
        Ok(())
    }

    /// Removes a connected writer.
    pub fn remove(&self, identity: &Identity) {
        self.lock().writers.remove(&identity.instance_id);
    }

    /// All writers, in freeze order, and the directories that are refused.
    #[must_use]
    pub fn writers(&self) -> (Vec<Arc<dyn Writer>>, Vec<RefusedDirectory>) {
        let mut writers: Vec<Arc<dyn Writer>> = self.lock().writers.values().cloned().collect();
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

    fn lock(&self) -> MutexGuard<'_, Connected> {
        self.connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    //! Whose names and places are whose.
    use super::*;
    use crate::writer::Answer;
    use guest_agent_wire::types::{Hold, Level};
    use guest_agent_wire::writer::EventKind;

    struct Named(Identity);

    impl Writer for Named {
        fn identity(&self) -> &Identity {
            &self.0
        }

        fn begin(&self, _: EventKind, _: u64, _: Answer) {}

        fn is_resident(&self) -> bool {
            true
        }
    }

    fn add(registry: &Registry, instance: &str, uid: u32) -> Result<Identity, Refused> {
        let identity = Identity {
            class_id: "test".to_owned(),
            instance_id: instance.to_owned(),
            name: instance.to_owned(),
            level: Level::default(),
            freeze_timeout_ms: 1,
            prepare_timeout_ms: 1,
            hold: Hold::default(),
            uid,
        };
        registry.add_after(Arc::new(Named(identity.clone())), || true)?;
        Ok(identity)
    }

    fn add_all(registry: &Registry, uid: u32) -> usize {
        (0..CONNECTED_MAX)
            .take_while(|number| add(registry, &format!("{uid}-{number}"), uid).is_ok())
            .count()
    }

    #[test]
    fn the_instance_id_of_a_writer_that_has_gone_is_its_users_or_roots_and_nobody_elses() {
        let registry = Registry::default();
        let taken = Refused::Anothers("db".to_owned(), 70);
        let gone = add(&registry, "db", 70).unwrap();
        registry.remove(&gone);
        assert_eq!(add(&registry, "db", 33), Err(taken));
        registry.remove(&add(&registry, "db", 70).unwrap());
        registry.remove(&add(&registry, "db", ROOT).unwrap());
        let roots = Refused::Anothers("db".to_owned(), ROOT);
        assert_eq!(add(&registry, "db", 70), Err(roots));
    }

    #[test]
    fn a_user_with_all_its_places_and_all_users_together_leave_places_for_root() {
        let registry = Registry::default();
        assert_eq!(add_all(&registry, 1000), OF_ONE_MAX);
        let others: usize = (1001..1010).map(|uid| add_all(&registry, uid)).sum();
        assert_eq!(OF_ONE_MAX + others, OF_OTHERS_MAX);
        assert_eq!(add_all(&registry, ROOT), CONNECTED_MAX - OF_OTHERS_MAX);
    }

    #[test]
    fn one_that_makes_up_ever_new_ids_loses_its_own_and_no_others() {
        let registry = Registry::default();
        registry.remove(&add(&registry, "db", 70).unwrap());
        for number in 0..10 * REMEMBERED_MAX {
            registry.remove(&add(&registry, &number.to_string(), 33).unwrap());
        }
        assert!(registry.lock().owners.len() <= REMEMBERED_MAX + 1);
        assert!(add(&registry, "db", 33).is_err());
    }
}
