//! What a requester does with a set after it is made: says that the backup is complete, or restores from it.
//!
//! Called by `daemon` and `cli`. The writers' part alone; copying and replacing files is the requester's own.

mod restorable;

use self::restorable::{check_restorable, explicit, in_scope, what_it_needs, what_to_restore};
use super::{Found, Sets};
use crate::error::Error;
use crate::guest::{GuestClient, GuestError};
use crate::protocol::{RestoreBegun, SetPreRestore};
use crate::snapshot::document::{SetDocument, WriterRecord};
use crate::snapshot::intent::{Purpose, VmLock};
use crate::snapshot::{run, undo};
use guest_agent_wire::components::{FilesRestored, SelectedComponent};
use guest_agent_wire::host::{
    BackupComplete, ErrorCode, Restore, WriterComponents, WriterOutcomes, WritersSaid,
};
use std::time::Duration;

/// What QEMU's own agent lacks.
const NO_BACKUPS: &str = "has no words for backups and restores";

/// A restore that writers know of. Dropped without [`RestoreSession::end`] it is given up: the agent aborts it.
#[derive(Debug)]
pub struct RestoreSession {
    guest: GuestClient,
    restore: Restore,
    limit: Duration,
    _lock: VmLock,
}

impl Sets {
    /// Tells the writers of a kept set whether the backup succeeded; `components` are those that fared otherwise.
    ///
    /// # Errors
    /// [`Error::InvalidState`] if no writer waits for it, or if the agent has been started anew since: writers have then
    /// taken the backup for failed. [`Error::NotFound`] for a component that the set was not made of. [`Error::Guest`],
    /// [`Error::SetInProgress`].
    pub async fn complete(
        &self,
        id: &str,
        succeeded: bool,
        components: Vec<WriterOutcomes>,
    ) -> Result<SetDocument, Error> {
        let set = match self.find(id)? {
            Found::Set(document) => document.set,
            Found::Snapshot(..) => {
                let text = format!("{id} is a snapshot: a backup is of a set");
                return Err(Error::Usage(text));
            }
        };
        let vm = self.state.load(set)?.vm;
        let _lock = self.lock(&vm, Purpose::Sets)?;
        // Read again: somebody may have said so just now.
        let mut document = self.state.load(set)?;
        if !document.awaits_backup {
            return Err(Error::InvalidState(format!(
                "no writer of set {set} waits to hear of a backup"
            )));
        }
        check_picked(&document, &components)?;
        let guest = self.guest(&vm, NO_BACKUPS).await?;
        let outcome = BackupComplete {
            set: set.to_string(),
            succeeded,
            components,
        };
        match guest.backup_complete(outcome, self.limits.post).await {
            Ok(said) => {
                run::record(&mut document, said, |record, said| {
                    record.complete = Some(said);
                });
                document.awaits_backup = false;
                document.backup_succeeded = Some(succeeded);
                self.state.store(&document)?;
                Ok(document)
            }
            Err(GuestError::Refused(error)) if error.code == ErrorCode::SetNotFound => {
                let text =
                    "the agent was started anew since: writers have taken the backup for failed";
                document.awaits_backup = false;
                document.backup_succeeded = Some(false);
                document.notes.push(text.to_owned());
                self.state.store(&document)?;
                Err(Error::InvalidState(format!("set {set}: {text}")))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Tells the writers of a set that their files will be replaced by those of its copies; of these writers and components
    /// alone, if any are named. A set may have no writer that wants to know; the VM is kept free of sets all the same.
    ///
    /// # Errors
    /// [`Error::NotFound`] if the set has none of them; [`Error::Guest`] if one refuses; [`Error::SetInProgress`].
    pub async fn restore(
        &self,
        what: &SetPreRestore,
    ) -> Result<(RestoreSession, RestoreBegun), Error> {
        let document = self.find(&what.id)?.document();
        check_restorable(&document, &what.components)?;
        let restore = Restore {
            set: format!("restore-{}", document.set),
            writers: what_to_restore(&document, what)?,
            limit_ms: None,
        };
        if restore.writers.is_empty() && !what.writers.is_empty() {
            return Err(Error::NotFound(format!(
                "set {} has no such writer",
                document.set
            )));
        }
        let needs = what_it_needs(&document, &restore.writers);
        let lock = self.lock(&document.vm, Purpose::Restore)?;
        let guest = self.guest(&document.vm, NO_BACKUPS).await?;
        let said = guest
            .pre_restore(restore.clone(), self.limits.restore)
            .await?;
        let session = RestoreSession {
            guest,
            restore,
            limit: self.limits.restore,
            _lock: lock,
        };
        Ok((session, RestoreBegun { said, needs }))
    }

    /// Tells writers that nothing will come of a backup, as far as they can be told. The caller holds the lock.
    pub(super) async fn give_up_backup(&self, document: &SetDocument) {
        // QEMU's agent has no writers that wait, and would thaw what others froze.
        let Some(agent) = document
            .vm
            .agent
            .as_ref()
            .filter(|_| document.qemu_guest_agent.is_none())
        else {
            return;
        };
        let (set, limit) = (document.set, self.limits.hello_again);
        let told = undo::in_guest(agent, set, "the set was deleted", limit).await;
        tracing::info!("set {set} is deleted: {}", crate::shown::plain(&told.line));
    }
}

impl RestoreSession {
    /// Tells the same writers how it went.
    ///
    /// # Errors
    /// [`Error::Guest`].
    pub async fn end(mut self, restored: FilesRestored) -> Result<WritersSaid, Error> {
        let writers = self.restore.writers.iter_mut();
        for component in writers.flat_map(|writer| &mut writer.components) {
            component.restored = Some(restored);
        }
        Ok(self.guest.post_restore(self.restore, self.limit).await?)
    }
}

/// A component that was not picked would be passed over, and its writer believe that it is backed up.
fn check_picked(document: &SetDocument, outcomes: &[WriterOutcomes]) -> Result<(), Error> {
    for outcome in outcomes {
        for component in &outcome.components {
            let (path, name) = (&component.logical_path, &component.name);
            let called = in_scope(document).filter(|record| record.is_called(&outcome.writer));
            let mut explicit = called.flat_map(|record| explicit(document, record));
            let is_picked = !document.request.components.is_empty()
                && explicit.any(|(its_path, its_name)| (&its_path, &its_name) == (path, name));
            if !is_picked {
                return Err(Error::NotFound(format!(
                    "set {} was not made of component {path}/{name} of writer {}",
                    document.set, outcome.writer
                )));
            }
        }
    }
    Ok(())
}

/// A component as text: `WRITER=NAME` or `WRITER=PATH/NAME`.
///
/// # Errors
/// What is wrong, as a text.
pub fn parse_component(text: &str) -> Result<WriterComponents, String> {
    let (writer, component) = text
        .split_once('=')
        .ok_or("give WRITER=NAME or WRITER=PATH/NAME")?;
    let (logical_path, name) = component.rsplit_once('/').unwrap_or(("", component));
    if writer.is_empty() || name.is_empty() {
        return Err("the writer or the name is missing".to_owned());
    }
    Ok(WriterComponents {
        writer: writer.to_owned(),
        components: vec![SelectedComponent {
            logical_path: logical_path.to_owned(),
            name: name.to_owned(),
            previous_stamp: None,
        }],
    })
}

/// Gives each component the stamp that its writer gave it in an earlier set.
pub fn build_on(components: &mut [WriterComponents], earlier: &SetDocument) {
    for picked in components {
        let records = earlier.writers.iter();
        let said: Vec<_> = records
            .filter(|record| record.is_called(&picked.writer))
            .flat_map(WriterRecord::components)
            .collect();
        for component in &mut picked.components {
            component.previous_stamp = said
                .iter()
                .find(|said| {
                    (&said.logical_path, &said.name) == (&component.logical_path, &component.name)
                })
                .and_then(|said| said.stamp.clone());
        }
    }
}
