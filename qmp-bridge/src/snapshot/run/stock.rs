//! The guest's steps through QEMU's own agent.
//!
//! Called by `window` and `undoing` for a VM whose agent is `qga:..`. Invariants: nothing is sent between the answer to `freeze` and
//! the sending of `thaw`; what the agent cannot say is not made up for it, but is left to the witnesses.

use super::super::document::ReasonCode;
use super::super::level::Level;
use super::super::undo::Undone;
use super::Run;
use super::failure::{Failure, guest_failure, internal};
use crate::guest::{GuestError, StockClient, StockSystem};
use std::time::Duration;
use tokio::time::Instant;

impl Run<'_> {
    pub(super) async fn identify_stock(&mut self, guest: &StockClient) -> Result<(), Failure> {
        let asking = guest.identify(self.limits.identify);
        let said = self.watch.race(asking).await?;
        self.doc.qemu_guest_agent = Some(said.map_err(|e| guest_failure(&e))?);
        Ok(())
    }

    /// There is nothing to prepare: the agent knows no such step. What it can never reach is refused before it is frozen.
    pub(super) fn prepare_stock(&self, level: Level) -> Result<(), Failure> {
        let system = self.doc.qemu_guest_agent.as_ref().map(|said| said.system);
        match (level, system) {
            (Level::Application, Some(StockSystem::Unix)) => {
                let text = "QEMU's agent in a guest that is not Windows knows no writers: it reaches `filesystem` at most";
                Err(Failure::new(ReasonCode::LevelNotReached, text))
            }
            (Level::Application, Some(StockSystem::Windows))
                if !self.doc.request.exclude_writers.is_empty() =>
            {
                let text = "QEMU's agent cannot leave out single writers of VSS";
                Err(Failure::new(ReasonCode::BadRequest, text))
            }
            (Level::Application | Level::Filesystem | Level::Crash, Some(_)) => Ok(()),
            (Level::Application | Level::Filesystem | Level::Crash, None) => {
                Err(internal("the agent was not identified"))
            }
        }
    }

    pub(super) async fn freeze_stock(&mut self, guest: &StockClient) -> Result<(), Failure> {
        let Some(said) = &self.doc.qemu_guest_agent else {
            return Err(internal("the agent was not identified"));
        };
        let system = said.system;
        let left_out = &self.doc.request.exclude_filesystems;
        let points = (!left_out.is_empty()).then(|| {
            let points = said.filesystems.iter().map(|f| f.mountpoint.clone());
            points.filter(|point| !left_out.contains(point)).collect()
        });
        let limit_ms = match system {
            // All of it counts as hold, see below: what takes longer is worth nothing.
            StockSystem::Unix => self.limits.hold_ms,
            StockSystem::Windows => self.limits.writer_ms,
        };
        let limit = Duration::from_millis(limit_ms) + self.limits.query;
        let sent = Instant::now();
        self.window.freeze_sent = Some(sent);
        let result = self.watch.race(guest.freeze(points, limit)).await?;
        let answered = Instant::now();
        let frozen = result.map_err(|e| guest_failure(&e))?;
        if let Some(said) = &mut self.doc.qemu_guest_agent {
            said.frozen = Some(frozen);
        }
        self.window.stock_frozen = true;
        self.window.hold_start = Some(match system {
            // The agent tells no times, so the first file system may have been frozen at once.
            StockSystem::Unix => sent,
            // It answers from within VSS's commit, whose 10 s are kept by VSS and told by an error at the thaw.
            StockSystem::Windows => answered,
        });
        self.hold_left().map(drop)
    }

    /// Thaws; what is said, or that nothing is, goes to the verdict.
    pub(super) async fn thaw_stock(&mut self, guest: &StockClient, limit: Duration) {
        self.window.thaw_sent = Some(Instant::now());
        let result = guest.thaw(limit).await;
        self.window.thaw_answered = Some(Instant::now());
        let Some(said) = &mut self.doc.qemu_guest_agent else {
            return;
        };
        match result {
            Ok(thawed) => said.thawed = Some(thawed),
            Err(error) => {
                let failure = guest_failure(&error);
                self.window.thaw_failure = Some(failure.message.clone());
                self.window.thaw_code = Some(failure.code);
            }
        }
        // Nothing is held any more: this may take its time. The agent itself never looks at what the writers said.
        if said.system == StockSystem::Windows && guest.closed().is_none() {
            match guest.vss_writers(self.limits.identify).await {
                Ok(writers) => said.vss_writers = Some(writers),
                Err(error) => said.vss_writers_not_heard = Some(error.to_string()),
            }
        }
    }

    /// Thaws on the open conversation.
    pub(super) async fn undo_stock(guest: &StockClient, limit: Duration) -> Option<Undone> {
        match guest.thaw(limit).await {
            Ok(0) => Some(Undone::sure("guest: was not frozen")),
            Ok(count) => Some(Undone::sure(format!("guest: thawed {count}"))),
            // VSS ends its hold before it complains of it. Who refuses otherwise is asked.
            Err(error @ GuestError::Refused(_)) => match guest.is_thawed(limit).await {
                Ok(true) => Some(Undone::sure(format!("guest: thawed ({error})"))),
                Ok(false) | Err(_) => None,
            },
            Err(
                GuestError::Link(_)
                | GuestError::BadAnswer { .. }
                | GuestError::VersionMismatch { .. },
            ) => None,
        }
    }
}
