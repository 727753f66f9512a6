//! What can be done with sets: create, list, show, delete, revert, find what to read, recover.
//!
//! Called by `cli` (the command works alone) and by `daemon`. It must not know options, tables or envelopes.

pub mod backup;

use crate::error::Error;
use crate::guest::{Guest, GuestClient};
use crate::protocol::ListedVolume;
use crate::snapshot::document::{Copy, CreateRequest, Outcome, SetDocument, StepTime, VmTarget};
use crate::snapshot::intent::{Purpose, StateDirectory, VmLock};
use crate::snapshot::run::{self, Limits, Surroundings};
use crate::snapshot::step::FaultPoint;
use crate::snapshot::undo;
use crate::storage::StorageClient;
use guest_agent_wire::host::Identified;
use serde::{Deserialize, Serialize};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};
use uuid::Uuid;
use vhost_blk_wire::command::{SnapshotDelete, SnapshotRevert, SnapshotSetDelete};
use vhost_blk_wire::qmp::ErrorClass;
use vhost_blk_wire::types::VolumeInfo;

/// Shortest beginning of an id that is accepted for it.
const ID_PREFIX_MIN: usize = 4;

/// What a daemon may take to hear of the end of a VM that has ended.
const LET_GO_MAX: Duration = Duration::from_secs(3);
/// How often it is asked meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A bridge on a state directory.
#[derive(Clone, Debug)]
pub struct Sets {
    state: StateDirectory,
    limits: Limits,
    faults: FaultPoint,
}

/// A set as `list` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ListedSet {
    /// The document.
    #[serde(flatten)]
    pub document: SetDocument,
    /// How many of its copies the daemons really have; absent if one of them cannot be asked.
    pub copies_found: Option<usize>,
}

/// A set, or one copy of it.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// The whole set.
    Set(SetDocument),
    /// One copy.
    Snapshot(SetDocument, Copy),
}

impl Found {
    /// The document.
    #[must_use]
    pub fn document(self) -> SetDocument {
        match self {
            Self::Set(document) | Self::Snapshot(document, _) => document,
        }
    }

    /// The copies that are meant.
    #[must_use]
    pub fn copies(&self) -> Vec<Copy> {
        match self {
            Self::Set(document) => document.copies.clone(),
            Self::Snapshot(_, copy) => vec![copy.clone()],
        }
    }
}

impl Sets {
    /// Opens the state directory.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn open(state_dir: &Path, limits: Limits, faults: FaultPoint) -> Result<Self, Error> {
        Ok(Self {
            state: StateDirectory::open(state_dir)?,
            limits,
            faults,
        })
    }

    /// Ends the records of dead bridges. Records whose VM is being worked on, and those whose daemons cannot be reached,
    /// stay. Returns what was ended.
    ///
    /// # Errors
    /// [`Error::State`].
    pub async fn recover(&self) -> Result<Vec<SetDocument>, Error> {
        let mut ended = Vec::new();
        for document in self.documents()? {
            if !is_unfinished(&document) {
                continue;
            }
            // The lock says whether its maker lives.
            if let Some(_lock) = self.state.lock(&document.vm.qmp, Purpose::Sets)? {
                ended.extend(self.end_record(document.set).await?);
            }
        }
        Ok(ended)
    }

    /// Ends one record; the caller holds the lock. It is read again, for its maker may have ended it just now.
    async fn end_record(&self, set: Uuid) -> Result<Option<SetDocument>, Error> {
        let mut document = self.state.load(set)?;
        if !is_unfinished(&document) {
            return Ok(None);
        }
        undo::of_the_dead(&self.state, &mut document, &self.limits).await?;
        Ok((!is_unfinished(&document)).then_some(document))
    }

    /// Makes a set. The document tells what became of it; an error means that nothing was begun.
    ///
    /// # Errors
    /// [`Error::SetInProgress`], [`Error::State`].
    pub async fn create(
        &self,
        vm: VmTarget,
        request: CreateRequest,
        progress: mpsc::UnboundedSender<StepTime>,
        cancel: watch::Receiver<bool>,
    ) -> Result<SetDocument, Error> {
        let _lock = self.lock(&vm, Purpose::Sets)?;
        for document in self.documents()? {
            if is_unfinished(&document) && document.vm.qmp == vm.qmp {
                self.end_record(document.set).await?;
            }
        }
        let mut document = SetDocument::begin(Uuid::new_v4(), vm, request, unix_ms());
        self.state.store(&document)?;
        let around = Surroundings {
            limits: self.limits,
            faults: self.faults,
            progress,
            cancel,
        };
        run::make(&self.state, &mut document, around).await;
        Ok(document)
    }

    /// All documents, oldest first. What cannot be read is logged.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn documents(&self) -> Result<Vec<SetDocument>, Error> {
        let (documents, failures) = self.state.load_all()?;
        for failure in failures {
            tracing::warn!("{failure}");
        }
        Ok(documents)
    }

    /// All sets, oldest first, each compared with what the daemons have.
    ///
    /// # Errors
    /// [`Error::State`].
    pub async fn list(&self, vm: Option<&str>) -> Result<Vec<ListedSet>, Error> {
        let mut there: BTreeMap<PathBuf, Option<BTreeSet<Uuid>>> = BTreeMap::new();
        let mut listed = Vec::new();
        for document in self.documents()? {
            if vm.is_some_and(|name| name != document.vm.name) {
                continue;
            }
            let mut found = Some(0_usize);
            for copy in &document.copies {
                if let Entry::Vacant(entry) = there.entry(copy.control.clone()) {
                    entry.insert(self.snapshots_at(&copy.control).await);
                }
                found = match (found, there.get(&copy.control)) {
                    (Some(count), Some(Some(ids))) => {
                        Some(count + usize::from(ids.contains(&copy.snapshot)))
                    }
                    (_, _) => None,
                };
            }
            listed.push(ListedSet {
                document,
                copies_found: found,
            });
        }
        Ok(listed)
    }

    async fn snapshots_at(&self, control: &Path) -> Option<BTreeSet<Uuid>> {
        let client = StorageClient::connect(control, self.limits.query)
            .await
            .ok()?;
        let snapshots = client.snapshots(self.limits.query).await.ok()?;
        Some(snapshots.into_iter().map(|s| s.snapshot).collect())
    }

    /// The set or snapshot of that id, or of the only id that begins so.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Usage`] if several begin so.
    pub fn find(&self, id: &str) -> Result<Found, Error> {
        let id = id.to_ascii_lowercase();
        if id.len() < ID_PREFIX_MIN {
            let text = format!("{id}: give at least {ID_PREFIX_MIN} characters of the id");
            return Err(Error::Usage(text));
        }
        let mut found = Vec::new();
        for document in self.documents()? {
            for copy in &document.copies {
                if copy.snapshot.to_string().starts_with(&id) {
                    found.push(Found::Snapshot(document.clone(), copy.clone()));
                }
            }
            if document.set.to_string().starts_with(&id) {
                found.push(Found::Set(document));
            }
        }
        let last = found.pop();
        match (last, found.is_empty()) {
            (Some(only), true) => Ok(only),
            (Some(_), false) => Err(Error::Usage(format!("{id}: several ids begin so"))),
            (None, _) => Err(Error::NotFound(format!("no set or snapshot {id}"))),
        }
    }

    /// Deletes a set with its record, or one copy. `forget` gives up on daemons that cannot be reached: what they
    /// have of the set stays there, and no record tells of it.
    ///
    /// # Errors
    /// [`Error::InvalidState`] while it is being made; [`Error::SetInProgress`] while another is, or a restore is open;
    /// [`Error::Storage`].
    pub async fn delete(&self, id: &str, forget: bool) -> Result<(), Error> {
        let found = self.find(id)?.document();
        // A kept one that is not finished, too: its maker still has to store its record, and would bring it back.
        if !forget && is_unfinished(&found) {
            let text = format!(
                "set {} is being made, or waits for `vmshadow recover`; --forget gives it up",
                found.set
            );
            return Err(Error::InvalidState(text));
        }
        let _lock = self.lock(&found.vm, Purpose::Sets)?;
        // Read again: somebody may have changed it just now.
        let found = self.find(id)?;
        if forget {
            let document = found.document();
            for control in &document.vm.vhost_blk {
                let reason = "the set is forgotten";
                let undone =
                    undo::at_daemon(control, document.set, reason, self.limits.abort).await;
                if let Err(error) = undone {
                    tracing::warn!("set {} may be left there: {error}", document.set);
                }
            }
            return Ok(self.state.remove(document.set)?);
        }
        let copies = found.copies();
        let whole = matches!(found, Found::Set(_));
        let mut document = found.document();
        if whole && document.awaits_backup {
            self.give_up_backup(&document).await;
        }
        if whole {
            let controls: BTreeSet<PathBuf> = copies.into_iter().map(|c| c.control).collect();
            for control in controls {
                let client = StorageClient::connect(&control, self.limits.query).await?;
                let command = SnapshotSetDelete { set: document.set };
                match client.call(&command, self.limits.keep).await {
                    Err(error) if !error.is(ErrorClass::SetNotFound) => return Err(error.into()),
                    Ok(_) | Err(_) => {}
                }
            }
            self.state.remove(document.set)?;
            return Ok(());
        }
        for copy in copies {
            let client = StorageClient::connect(&copy.control, self.limits.query).await?;
            let snapshot = copy.snapshot;
            let command = SnapshotDelete { snapshot };
            match client.call(&command, self.limits.keep).await {
                Err(error) if !error.is(ErrorClass::SnapshotNotFound) => return Err(error.into()),
                Ok(_) | Err(_) => {}
            }
            document.copies.retain(|c| c.snapshot != snapshot);
            let text = format!("the copy of {} was deleted", copy.volume);
            document.notes.push(text);
        }
        if document.copies.is_empty() {
            self.state.remove(document.set)?;
        } else {
            self.state.store(&document)?;
        }
        Ok(())
    }

    /// Makes the disks what they were at a set, or one disk what it was at a snapshot. Checks all disks before it
    /// touches one. Newer copies of these disks are gone afterwards, and their records say so. A VM that was stopped just now may
    /// be followed at once: its disks get three seconds to be let go.
    ///
    /// # Errors
    /// [`Error::InvalidState`] if a front end stays connected; [`Error::SetInProgress`]; [`Error::Storage`].
    pub async fn revert(&self, id: &str) -> Result<(), Error> {
        let found = self.find(id)?;
        let copies = found.copies();
        let vm = found.document().vm;
        if copies.is_empty() {
            return Err(Error::InvalidState(format!("{id} has no copies")));
        }
        let _lock = self.lock(&vm, Purpose::Revert)?;
        let deadline = Instant::now() + LET_GO_MAX;
        let mut clients = Vec::new();
        for copy in &copies {
            let client = StorageClient::connect(&copy.control, self.limits.query).await?;
            match self.let_go(&client, &copy.volume, deadline).await? {
                Some(volume) if volume.connected => {
                    return Err(Error::InvalidState(format!(
                        "{} is in use: a running guest would not notice that its disk has changed; stop the VM",
                        copy.volume
                    )));
                }
                Some(volume) if volume.id != copy.volume_id => {
                    return Err(Error::InvalidState(format!(
                        "{} is another volume than the one that was copied",
                        copy.volume
                    )));
                }
                Some(_) => clients.push((client, copy)),
                None => {
                    return Err(Error::NotFound(format!("no volume {}", copy.volume)));
                }
            }
        }
        for (client, copy) in clients {
            let command = SnapshotRevert {
                snapshot: copy.snapshot,
            };
            client.call(&command, self.limits.prepare).await?;
        }
        self.forget_what_is_gone().await
    }

    /// What a daemon says of a volume once no front end is connected to it, or at the deadline.
    async fn let_go(
        &self,
        client: &StorageClient,
        name: &str,
        deadline: Instant,
    ) -> Result<Option<VolumeInfo>, Error> {
        loop {
            let volumes = client.volumes(self.limits.query).await?;
            let found = volumes.into_iter().find(|volume| volume.volume == name);
            let is_connected = found.as_ref().is_some_and(|volume| volume.connected);
            if !is_connected || Instant::now() > deadline {
                return Ok(found);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Takes from the records the copies that their daemons no longer have.
    async fn forget_what_is_gone(&self) -> Result<(), Error> {
        let mut there: BTreeMap<PathBuf, Option<BTreeSet<Uuid>>> = BTreeMap::new();
        for mut document in self.documents()? {
            if document.outcome != Outcome::Kept {
                continue;
            }
            for control in document.copies.iter().map(|c| c.control.clone()) {
                if let Entry::Vacant(entry) = there.entry(control.clone()) {
                    entry.insert(self.snapshots_at(&control).await);
                }
            }
            let before = document.copies.len();
            document.copies.retain(|copy| {
                // A daemon that cannot be asked may still have it.
                there
                    .get(&copy.control)
                    .and_then(Option::as_ref)
                    .is_none_or(|ids| ids.contains(&copy.snapshot))
            });
            if document.copies.is_empty() && before > 0 {
                self.state.remove(document.set)?;
            } else if document.copies.len() < before {
                let gone = before - document.copies.len();
                document
                    .notes
                    .push(format!("{gone} copies were dropped by a revert"));
                self.state.store(&document)?;
            }
        }
        Ok(())
    }

    /// Writers and file systems of a guest.
    ///
    /// # Errors
    /// [`Error::Usage`] without an agent socket; [`Error::Guest`]; [`Error::SetInProgress`].
    pub async fn writers(&self, vm: &VmTarget) -> Result<Identified, Error> {
        // A second conversation would end the set of the first.
        let _lock = self.lock(vm, Purpose::Sets)?;
        let lacks = "lists no writers; `vssadmin list writers` in a Windows guest does";
        let guest = self.guest(vm, lacks).await?;
        Ok(guest.identify(self.limits.identify).await?)
    }

    /// A conversation with our agent; `lacks` says what another cannot do.
    async fn guest(&self, vm: &VmTarget, lacks: &str) -> Result<GuestClient, Error> {
        let Some(agent) = &vm.agent else {
            let text = format!("no agent socket is known for {}", vm.name);
            return Err(Error::Usage(text));
        };
        match Guest::connect(agent, self.limits.hello).await? {
            Guest::Native(guest) => Ok(guest),
            Guest::Stock(_) => Err(Error::Usage(format!(
                "{} is asked through QEMU's own agent, which {lacks}",
                vm.name
            ))),
        }
    }

    fn lock(&self, vm: &VmTarget, purpose: Purpose) -> Result<VmLock, Error> {
        self.state
            .lock(&vm.qmp, purpose)?
            .ok_or_else(|| Error::SetInProgress {
                vm: vm.name.clone(),
            })
    }

    /// Volumes of a VM's daemons.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub async fn volumes(&self, controls: &[PathBuf]) -> Result<Vec<ListedVolume>, Error> {
        let mut listed = Vec::new();
        for control in controls {
            let client = StorageClient::connect(control, self.limits.query).await?;
            for volume in client.volumes(self.limits.query).await? {
                listed.push(ListedVolume {
                    control: control.clone(),
                    volume,
                });
            }
        }
        Ok(listed)
    }
}

fn is_unfinished(document: &SetDocument) -> bool {
    document.outcome == Outcome::Open || (document.outcome == Outcome::Kept && !document.finished)
}

fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        })
}
