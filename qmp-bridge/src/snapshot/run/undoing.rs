//! What follows a failure: undo in reverse, end the record.
//!
//! Called by `run`. Invariant: a record that is not open says the truth, which is that nothing is left.

use super::super::document::Outcome;
use super::super::step::Step;
use super::super::undo::{self, Undone};
use super::Run;
use super::failure::{Failure, chain};
use crate::guest::{Guest, GuestError};
use guest_agent_wire::host::{AgentError, ErrorCode};
use std::time::Duration;
use vhost_blk_wire::command::SnapshotSetAbort;

impl Run<'_> {
    /// Keeps what writers and file systems said in a refusal.
    pub(super) fn note_refusal(&mut self, error: &GuestError, step: Step) {
        let GuestError::Refused(refused) = error else {
            return;
        };
        let AgentError {
            writers,
            filesystems,
            ..
        } = refused.as_ref();
        for report in writers {
            if let Some(record) = self.doc.writer(&report.instance_id) {
                let place = match step {
                    Step::Prepared => &mut record.prepare,
                    Step::Frozen => &mut record.freeze,
                    Step::Thawed => &mut record.thaw,
                    Step::Intent
                    | Step::Identified
                    | Step::StoragePrepared
                    | Step::Marked
                    | Step::Committed
                    | Step::Verdict
                    | Step::Kept
                    | Step::Finished => continue,
                };
                *place = Some(report.clone());
            }
        }
        for report in filesystems {
            if let Some(record) = self.doc.filesystem(&report.mountpoint) {
                if step == Step::Thawed {
                    record.thaw = Some(report.clone());
                } else {
                    record.freeze = Some(report.clone());
                }
            }
        }
    }

    /// Before an attempt at a lower level: the guest must be as if there had been none.
    pub(super) async fn leave_guest(&mut self, why: &str) {
        if let Some(undone) = self.undo_guest(why).await {
            self.doc.undone.push(undone.line);
        }
        self.watch.events = None;
        self.watch.disturbances.clear();
        self.guest = None;
        self.guest_touched = false;
    }

    pub(super) async fn undo_guest(&mut self, why: &str) -> Option<Undone> {
        if !self.guest_touched {
            return None;
        }
        let set = self.doc.set;
        let guest = self.guest.clone();
        if let Some(Guest::Stock(guest)) = guest.as_deref()
            && guest.closed().is_none()
            && let Some(undone) = Self::undo_stock(guest, self.limits.abort).await
        {
            return Some(undone);
        }
        if let Some(Guest::Native(guest)) = guest.as_deref()
            && guest.closed().is_none()
        {
            let aborting = guest.abort(set.to_string(), why.to_owned(), self.limits.abort);
            match aborting.await {
                Ok(()) => return Some(Undone::sure("guest: aborted")),
                Err(GuestError::Refused(error)) if error.code == ErrorCode::SetNotFound => {
                    return Some(Undone::sure("guest: had aborted"));
                }
                Err(_) => {}
            }
        }
        // The port takes one host at a time.
        drop(guest);
        self.guest = None;
        let agent = self.doc.vm.agent.clone()?;
        Some(undo::in_guest(&agent, set, why, self.limits.hello_again).await)
    }

    /// Undoes in reverse and ends the record.
    pub(super) async fn fail(&mut self, failure: Failure) {
        let reason = self.reason(&failure);
        let why = failure.message.clone();
        let mut unsure = Vec::new();
        if self.storage_touched {
            // A frozen guest waits behind this: a daemon that hangs gets no more than its share.
            let frozen = self.window.freeze_sent.is_some() && self.window.thaw_answered.is_none();
            let limit = if frozen {
                self.limits.abort.min(Duration::from_secs(1))
            } else {
                self.limits.abort
            };
            for daemon in self.daemons.iter().rev() {
                let control = daemon.part.control.clone();
                let abort = SnapshotSetAbort {
                    set: self.doc.set,
                    reason: why.clone(),
                };
                let result = daemon.client.call(&abort, limit).await;
                match result {
                    Ok(_) => self
                        .doc
                        .undone
                        .push(format!("storage {}: aborted", control.display())),
                    Err(_) => unsure.push(control),
                }
            }
        }
        let mut open = false;
        if let Some(undone) = self.undo_guest(&why).await {
            open = !undone.sure;
            self.doc.undone.push(undone.line);
        }
        // Closing the connections makes every daemon undo what it still has; then each is asked.
        self.daemons.clear();
        for control in unsure {
            match undo::at_daemon(&control, self.doc.set, &why, self.limits.abort).await {
                Ok(()) => self
                    .doc
                    .undone
                    .push(format!("storage {}: nothing left", control.display())),
                Err(error) => {
                    open = true;
                    self.doc
                        .notes
                        .push(format!("not yet undone, recovery will try again: {error}"));
                }
            }
        }
        self.doc.copies.clear();
        self.doc.reason = Some(reason);
        self.doc.outcome = match (open, failure.code.is_about_the_level()) {
            (true, _) => Outcome::Open,
            (false, true) => Outcome::Refused,
            (false, false) => Outcome::Failed,
        };
        self.doc.finished = !open;
        if let Err(error) = self.state.store(self.doc) {
            let text = format!("the record could not be written: {}", chain(&error));
            self.doc.notes.push(text);
        }
    }
}
