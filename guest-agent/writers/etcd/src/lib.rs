//! A snapshot writer for etcd 3.4 and later, on its gRPC interface.
//!
//! Called through the writer library (`guest_agent_wire::sdk`). The member goes on writing until its file systems are frozen: they
//! hold the writes (`hold: filesystem`), and a copy of all its files of one instant is what a power cut leaves, from which it
//! recovers by itself. The writer proves what the file system cannot: that these files are this member's and all in the set, that
//! the member has a leader and its cluster no alarm, and which revision a recovery must reach at least. At the thaw the member
//! must be the one that was there at the freeze, seen through the same connection.
//!
//! Nothing is saved, compacted or defragmented: none of that makes a copy better, and all of it makes a set slower.

mod api;
mod layout;
mod reach;
mod session;

pub use layout::Roots;
pub use reach::Reach;
pub use session::Position;

use database_writer::{Calls, Disks, Identity};
use guest_agent_wire::components::ComponentReply;
use guest_agent_wire::metadata::Metadata;
use guest_agent_wire::sdk::{Call, Held, Veto, Writer};
use guest_agent_wire::types::Hold;
use guest_agent_wire::writer::{
    BackupShutdown, Freeze, PostSnapshot, PrepareBackup, PrepareSnapshot, Registration, Thaw,
};
use serde_json::Value;
use session::Session;

/// Class of this writer; allow files name it.
pub const CLASS_ID: &str = "etcd";

/// The writer.
#[derive(Debug)]
pub struct EtcdWriter {
    identity: Identity,
    reach: Reach,
    roots: Roots,
    disks: Disks,
    calls: Calls,
    /// From prepare to the end of the set.
    session: Option<Session>,
    frozen_at: Option<Position>,
}

impl EtcdWriter {
    /// For the member that is reached so and has its files there; it connects at each set anew.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn new(
        identity: Identity,
        reach: Reach,
        roots: Roots,
        disks: Disks,
    ) -> std::io::Result<Self> {
        Ok(Self {
            identity,
            reach,
            roots,
            disks,
            calls: Calls::new()?,
            session: None,
            frozen_at: None,
        })
    }

    fn connect(&self, call: &Call<'_>) -> Result<Session, Veto> {
        Session::connect(&self.reach, &self.calls, call)
    }

    /// Who is there, if the files are its own.
    fn position(&self, call: &Call<'_>) -> Result<Position, Veto> {
        let position = self.connect(call)?.position(&self.calls, call)?;
        self.roots
            .are_of(position.member_id, position.cluster_id)
            .map_err(Veto::nonretryable)?;
        Ok(position)
    }
}

/// A copy of this one would be worth something.
fn is_whole(position: &Position) -> Result<(), Veto> {
    let member = position.member_id;
    if position.is_learner {
        let message = "is a learner and may lack what its cluster has";
        Err(Veto::retryable(format!("member {member:x} {message}")))
    } else if position.leader.is_none() {
        let message = "has no leader: its cluster lacks a quorum";
        Err(Veto::retryable(format!("member {member:x} {message}")))
    } else {
        Ok(())
    }
}

impl Writer for EtcdWriter {
    fn registration(&self) -> Registration {
        let address = self.reach.address();
        self.identity
            .registration(CLASS_ID, "etcd", &address, Hold::Filesystem)
    }

    fn identify(&mut self, call: &Call<'_>) -> Result<Metadata, Veto> {
        let restoring = self.identity.restoring("etcd");
        let version = self.position(call)?.version;
        Ok(self.roots.metadata(version, restoring))
    }

    fn prepare_backup(
        &mut self,
        call: &Call<'_>,
        backup: &PrepareBackup,
    ) -> Result<Vec<ComponentReply>, Veto> {
        self.position(call)?;
        let paths = [self.roots.snap(), self.roots.wal()];
        match self.disks.not_held(&backup.disks, &paths) {
            Some(why) => Err(Veto::inconsistent(why)),
            None => Ok(Vec::new()),
        }
    }

    fn prepare_snapshot(&mut self, call: &Call<'_>, _: &PrepareSnapshot) -> Result<(), Veto> {
        self.frozen_at = None;
        let mut session = self.connect(call)?;
        // First what it knows by itself: without a leader nobody answers the other question.
        is_whole(&session.position(&self.calls, call)?)?;
        session.no_alarm(&self.calls, call)?;
        self.session = Some(session);
        Ok(())
    }

    fn freeze(&mut self, call: &Call<'_>, _: &Freeze) -> Result<Value, Veto> {
        let Some(session) = &mut self.session else {
            return Err(Veto::retryable("it was not prepared"));
        };
        session.no_alarm(&self.calls, call)?;
        let position = session.position(&self.calls, call)?;
        is_whole(&position)?;
        let evidence = position.evidence();
        self.frozen_at = Some(position);
        Ok(evidence)
    }

    fn still_holds(&mut self) -> Result<(), String> {
        match &self.session {
            Some(session) if session.is_open() => Ok(()),
            Some(_) => Err("the member has ended the session".to_owned()),
            None => Err("there is no session with the member".to_owned()),
        }
    }

    fn thaw(&mut self, call: &Call<'_>, _: &Thaw) -> Result<Held, Veto> {
        let (Some(session), Some(frozen_at)) = (&mut self.session, self.frozen_at.take()) else {
            return Err(Veto::retryable("it was not frozen"));
        };
        let now = session.position(&self.calls, call)?;
        Ok(Held {
            held: now.follows(&frozen_at),
            evidence: now.evidence(),
        })
    }

    fn post_snapshot(
        &mut self,
        _: &Call<'_>,
        _: &PostSnapshot,
    ) -> Result<Vec<ComponentReply>, Veto> {
        self.session = None;
        Ok(Vec::new())
    }

    fn backup_shutdown(&mut self, _: &BackupShutdown) -> Result<(), Veto> {
        self.session = None;
        Ok(())
    }

    fn abort(&mut self, _: &str, _: &str) {
        self.session = None;
        self.frozen_at = None;
    }
}

#[cfg(test)]
mod tests;
