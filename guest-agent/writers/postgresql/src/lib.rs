//! A snapshot writer for PostgreSQL 15 and later, on its own client library.
//!
//! Called through the writer library (`guest_agent_wire::sdk`). The server goes on writing until its file systems are frozen:
//! they hold the writes (`hold: filesystem`), and a copy of all its files of one instant is what a power cut leaves, from which
//! the server recovers by itself. The writer makes that short (a checkpoint in prepare), forces what was acknowledged without
//! being flushed (`synchronous_commit = off`) into the log at the freeze, records the position that a recovery must reach, and
//! refuses a set that holds only some of the files. At the thaw the server must be the one that was there at the freeze, seen
//! through the same session.
//!
//! On wish it brackets the set with `pg_backup_start` and `pg_backup_stop` in one session (`layout`, [`OnlineBackup`]), for
//! copies that are not of one instant, or that shall be rolled forward from an archive; `backup_label` and `tablespace_map` are
//! returned and never written into the data directory.

mod layout;
mod session;

pub use layout::Layout;
pub use session::Position;

use clap::ValueEnum;
use database_writer::{Calls, Disks, Identity};
use guest_agent_wire::components::ComponentReply;
use guest_agent_wire::metadata::Metadata;
use guest_agent_wire::sdk::{Call, Held, Veto, Writer};
use guest_agent_wire::types::Hold;
use guest_agent_wire::writer::{
    BackupShutdown, Freeze, PostSnapshot, PrepareBackup, PrepareSnapshot, Registration, Thaw,
};
use serde_json::{Value, json};
use session::Session;
use tokio_postgres::Config;
use tokio_postgres::config::Host;

/// Class of this writer; allow files name it.
pub const CLASS_ID: &str = "postgresql";

/// When a set is bracketed with `pg_backup_start` and `pg_backup_stop`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum)]
pub enum OnlineBackup {
    /// Never: a set that holds only some of the files is refused.
    #[default]
    Never,
    /// If the set holds only some of the files: the others must be copied between its prepare and its end too.
    Split,
    /// Always: the copies can be rolled forward from an archive of the log.
    Always,
}

/// The writer.
#[derive(Debug)]
pub struct PostgresqlWriter {
    identity: Identity,
    config: Config,
    online_backup: OnlineBackup,
    disks: Disks,
    calls: Calls,
    /// The set's decision: bracketed or not.
    brackets: bool,
    /// From prepare to the end of the set.
    session: Option<Session>,
    frozen_at: Option<Position>,
}

impl PostgresqlWriter {
    /// For the server that `config` reaches; it connects at each set anew.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn new(
        identity: Identity,
        mut config: Config,
        online_backup: OnlineBackup,
        disks: Disks,
    ) -> std::io::Result<Self> {
        config.application_name("vmshadow");
        Ok(Self {
            identity,
            config,
            online_backup,
            disks,
            calls: Calls::new()?,
            brackets: false,
            session: None,
            frozen_at: None,
        })
    }

    fn layout(&self, call: &Call<'_>) -> Result<Layout, Veto> {
        Session::connect(&self.config, &self.calls, call)?.layout(&self.calls, call)
    }

    /// Decides whether the set is bracketed, or refuses it.
    fn check_disks(&self, disks: &[String], call: &Call<'_>) -> Result<bool, Veto> {
        let layout = self.layout(call)?;
        let outside = self.disks.not_held(disks, &layout.paths());
        match (self.online_backup, outside) {
            (OnlineBackup::Never, Some(why)) => Err(Veto::inconsistent(why)),
            (OnlineBackup::Never | OnlineBackup::Split, None) => Ok(false),
            (OnlineBackup::Split, Some(_)) | (OnlineBackup::Always, _) => Ok(true),
        }
    }
}

impl Writer for PostgresqlWriter {
    fn registration(&self) -> Registration {
        let hosts = self.config.get_hosts().iter().map(|host| match host {
            Host::Tcp(name) => name.clone(),
            Host::Unix(path) => path.display().to_string(),
        });
        let ports = self.config.get_ports().iter().map(u16::to_string);
        let address = hosts.chain(ports).collect::<Vec<_>>().join(":");
        self.identity
            .registration(CLASS_ID, "PostgreSQL", &address, Hold::Filesystem)
    }

    fn identify(&mut self, call: &Call<'_>) -> Result<Metadata, Veto> {
        let restoring = self.identity.restoring("postgresql");
        Ok(self.layout(call)?.metadata(restoring))
    }

    fn prepare_backup(
        &mut self,
        call: &Call<'_>,
        backup: &PrepareBackup,
    ) -> Result<Vec<ComponentReply>, Veto> {
        self.brackets = self.check_disks(&backup.disks, call)?;
        Ok(Vec::new())
    }

    fn prepare_snapshot(
        &mut self,
        call: &Call<'_>,
        snapshot: &PrepareSnapshot,
    ) -> Result<(), Veto> {
        self.frozen_at = None;
        let mut session = Session::connect(&self.config, &self.calls, call)?;
        if self.brackets {
            session.start_backup(&self.calls, &snapshot.set, call)?;
        } else {
            session.checkpoint(&self.calls, call)?;
        }
        self.session = Some(session);
        Ok(())
    }

    fn freeze(&mut self, call: &Call<'_>, hold: &Freeze) -> Result<Value, Veto> {
        let Some(session) = &self.session else {
            return Err(Veto::retryable("it was not prepared"));
        };
        session.flush(&self.calls, &hold.set, call)?;
        let position = session.position(&self.calls, call)?;
        let evidence = position.evidence();
        self.frozen_at = Some(position);
        Ok(evidence)
    }

    fn still_holds(&mut self) -> Result<(), String> {
        match &self.session {
            Some(session) if session.is_open() => Ok(()),
            Some(_) => Err("the server has ended the session".to_owned()),
            None => Err("there is no session with the server".to_owned()),
        }
    }

    fn thaw(&mut self, call: &Call<'_>, _: &Thaw) -> Result<Held, Veto> {
        let (Some(session), Some(frozen_at)) = (&self.session, self.frozen_at.take()) else {
            return Err(Veto::retryable("it was not frozen"));
        };
        let now = session.position(&self.calls, call)?;
        Ok(Held {
            held: now.is_same_server(&frozen_at),
            evidence: now.evidence(),
        })
    }

    fn post_snapshot(
        &mut self,
        call: &Call<'_>,
        _: &PostSnapshot,
    ) -> Result<Vec<ComponentReply>, Veto> {
        let Some(mut session) = self.session.take() else {
            return Ok(Vec::new());
        };
        let labels = session.stop_backup(&self.calls, call)?;
        Ok(labels
            .map(|labels| ComponentReply {
                name: layout::COMPONENT.to_owned(),
                metadata: json!({
                    "backup_label": labels.backup_label,
                    "tablespace_map": labels.tablespace_map,
                    "stop_lsn": labels.stop_lsn,
                }),
                ..ComponentReply::default()
            })
            .into_iter()
            .collect())
    }

    fn backup_shutdown(&mut self, _: &BackupShutdown) -> Result<(), Veto> {
        self.session = None;
        Ok(())
    }

    fn abort(&mut self, _: &str, _: &str) {
        // A backup that is open ends with its session.
        self.session = None;
        self.frozen_at = None;
    }
}

#[cfg(test)]
mod tests;
