//! A snapshot writer for MariaDB 10.4 and later, on a client library of its protocol.
//!
//! Called through the writer library (`guest_agent_wire::sdk`). The server itself holds the writes (`hold: app`): `BACKUP STAGE
//! START` in prepare, `BLOCK_COMMIT` at the freeze, from which no commit is acknowledged, and `END` at the thaw, all in one session,
//! whose end releases the lock; a second session looks that the server still has it. Evidence is the position of the binary log, which every commit moves, and the session's number.
//! A writer that hangs is let go by the server itself, which ends an idle session after `wait_timeout`.
//!
//! InnoDB recovers a copy of one instant by itself; the stages also keep Aria, MyISAM and the definitions of tables whole.

mod session;

use database_writer::{Calls, Disks, Identity};
use guest_agent_wire::components::ComponentReply;
use guest_agent_wire::metadata::{Component, FileSet, Metadata, Source};
use guest_agent_wire::sdk::{Call, Held, Veto, Writer};
use guest_agent_wire::types::Hold;
use guest_agent_wire::writer::{
    BackupShutdown, Freeze, PrepareBackup, PrepareSnapshot, Registration, Thaw,
};
use mysql_async::Opts;
use serde_json::Value;
use session::{Layout, Session};
use std::time::Duration;

/// Class of this writer; allow files name it.
pub const CLASS_ID: &str = "mariadb";

/// The writer.
#[derive(Debug)]
pub struct MariadbWriter {
    identity: Identity,
    options: Opts,
    disks: Disks,
    calls: Calls,
    /// From prepare to the end of the set.
    session: Option<Session>,
    /// Looks after the other from the freeze on; from prepare until then.
    watcher: Option<Session>,
}

impl MariadbWriter {
    /// For the server that `options` reach; it connects at each set anew.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn new(identity: Identity, options: Opts, disks: Disks) -> std::io::Result<Self> {
        Ok(Self {
            identity,
            options,
            disks,
            calls: Calls::new()?,
            session: None,
            watcher: None,
        })
    }

    fn connect(&self, call: &Call<'_>) -> Result<Session, Veto> {
        Session::connect(self.options.clone(), &self.calls, call)
    }

    fn layout(&self, call: &Call<'_>) -> Result<Layout, Veto> {
        let mut session = self.connect(call)?;
        let layout = session.layout(&self.calls, call);
        session.close(&self.calls);
        layout
    }

    /// Lets go: a session that ends releases its locks.
    fn let_go(&mut self) {
        self.watcher = None;
        if let Some(session) = self.session.take() {
            session.close(&self.calls);
        }
    }
}

impl Writer for MariadbWriter {
    fn registration(&self) -> Registration {
        let address = self.options.socket().map_or_else(
            || {
                format!(
                    "{}:{}",
                    self.options.ip_or_hostname(),
                    self.options.tcp_port()
                )
            },
            str::to_owned,
        );
        self.identity
            .registration(CLASS_ID, "MariaDB", &address, Hold::App)
    }

    fn identify(&mut self, call: &Call<'_>) -> Result<Metadata, Veto> {
        let layout = self.layout(call)?;
        let mut server = Component::database("", "server");
        server.selectable_for_restore = true;
        server.database_files = layout
            .paths()
            .iter()
            .map(|path| FileSet::tree(path.to_string_lossy()))
            .collect();
        let temporary = FileSet {
            spec: "#sql*".to_owned(),
            ..FileSet::tree(layout.data.to_string_lossy())
        };
        Ok(Metadata {
            version: layout.version,
            source: Source::TransactedDb,
            restore_method: Some(self.identity.restoring("mariadb")),
            excludes: vec![temporary],
            components: vec![server],
            ..Metadata::default()
        })
    }

    fn prepare_backup(
        &mut self,
        call: &Call<'_>,
        backup: &PrepareBackup,
    ) -> Result<Vec<ComponentReply>, Veto> {
        let layout = self.layout(call)?;
        match self.disks.not_held(&backup.disks, &layout.paths()) {
            Some(why) => Err(Veto::inconsistent(why)),
            None => Ok(Vec::new()),
        }
    }

    fn prepare_snapshot(&mut self, call: &Call<'_>, _: &PrepareSnapshot) -> Result<(), Veto> {
        self.let_go();
        let mut watcher = self.connect(call)?;
        watcher.may_idle(&self.calls, call)?;
        let mut session = self.connect(call)?;
        session.start(&self.calls, call)?;
        self.session = Some(session);
        self.watcher = Some(watcher);
        Ok(())
    }

    fn freeze(&mut self, call: &Call<'_>, hold: &Freeze) -> Result<Value, Veto> {
        let (Some(session), Some(watcher)) = (&mut self.session, self.watcher.take()) else {
            return Err(Veto::retryable("it was not prepared"));
        };
        let hold = Duration::from_millis(hold.hold_ms);
        let frozen = session
            .block(&self.calls, hold, call)
            .and_then(|()| session.position(&self.calls, call));
        session.watch_from(watcher, &self.calls);
        if frozen.is_err() {
            self.let_go();
        }
        frozen
    }

    fn still_holds(&mut self) -> Result<(), String> {
        match &self.session {
            Some(session) => session.still_holds(),
            None => Err("there is no session with the server".to_owned()),
        }
    }

    fn thaw(&mut self, call: &Call<'_>, _: &Thaw) -> Result<Held, Veto> {
        let Some(session) = &mut self.session else {
            return Err(Veto::retryable("it was not frozen"));
        };
        // Asked for before commits go on.
        let evidence = session.position(&self.calls, call);
        let ended = session.end(&self.calls, call);
        self.let_go();
        ended?;
        Ok(Held {
            held: true,
            evidence: evidence?,
        })
    }

    fn backup_shutdown(&mut self, _: &BackupShutdown) -> Result<(), Veto> {
        self.let_go();
        Ok(())
    }

    fn abort(&mut self, _: &str, _: &str) {
        self.let_go();
    }
}

#[cfg(test)]
mod tests;
