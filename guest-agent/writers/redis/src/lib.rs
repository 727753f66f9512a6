//! A snapshot writer for Redis 6.2 and later, on its client library.
//!
//! Called through the writer library (`guest_agent_wire::sdk`). The server holds the writes (`hold: app`): `CLIENT PAUSE .. WRITE`
//! at the freeze, which ends by itself, and `CLIENT UNPAUSE` at the thaw. A
//! second connection publishes an empty message, which the server keeps back for as long as it holds writes: the answer tells of the end of
//! the pause, whoever ended it. What was acknowledged is then brought to its files: with
//! an append-only file the rest of its buffer (the frozen file system writes back what the kernel has); without one a `BGSAVE`
//! inside the pause, since a dump holds only what was there when it began. Evidence is what every write changes.
//!
//! No setting of the server is changed, so a writer that is killed leaves nothing behind but a pause that ends. Rewriting the
//! append-only file needs not be forbidden: a copy of one instant has either the old files or the new ones.

mod session;

use database_writer::{Calls, Disks, Identity};
use guest_agent_wire::components::ComponentReply;
use guest_agent_wire::metadata::{Component, FileSet, Metadata, Source};
use guest_agent_wire::sdk::{Call, Held, Veto, Writer};
use guest_agent_wire::types::Hold;
use guest_agent_wire::writer::{
    BackupShutdown, Freeze, PrepareBackup, PrepareSnapshot, Registration, Thaw,
};
use redis::Client;
use serde_json::Value;
use session::Session;
use std::time::Duration;

/// Class of this writer; allow files name it.
pub const CLASS_ID: &str = "redis";

/// Time for a server to end a pause; it ends by itself anyway.
const LETTING_GO: Duration = Duration::from_secs(5);

/// The writer.
#[derive(Debug)]
pub struct RedisWriter {
    identity: Identity,
    client: Client,
    disks: Disks,
    calls: Calls,
    /// From prepare to the end of the set.
    session: Option<Session>,
}

impl RedisWriter {
    /// For the server that `client` reaches; it connects at each set anew.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn new(identity: Identity, client: Client, disks: Disks) -> std::io::Result<Self> {
        Ok(Self {
            identity,
            client,
            disks,
            calls: Calls::new()?,
            session: None,
        })
    }

    fn connect(&self, call: &Call<'_>) -> Result<Session, Veto> {
        Session::connect(&self.client, &self.calls, call)
    }

    fn let_go(&mut self) {
        if let Some(mut session) = self.session.take() {
            // If it cannot be told, the pause ends by itself.
            drop(session.unpause(&self.calls, &Call::alone(LETTING_GO)));
        }
    }
}

impl Writer for RedisWriter {
    fn registration(&self) -> Registration {
        let address = self.client.get_connection_info().addr().to_string();
        self.identity
            .registration(CLASS_ID, "Redis", &address, Hold::App)
    }

    fn identify(&mut self, call: &Call<'_>) -> Result<Metadata, Veto> {
        let layout = self.connect(call)?.layout(&self.calls, call)?;
        let directory = layout.directory.to_string_lossy();
        let mut server = Component::database("", "server");
        server.selectable_for_restore = true;
        server.database_files = vec![FileSet::new(&*directory, &layout.dump)];
        if let Some(name) = &layout.append_only {
            server.log_files = vec![
                FileSet::tree(format!("{directory}/{name}")),
                // Before version 7 it was one file.
                FileSet::new(&*directory, name),
            ];
        }
        Ok(Metadata {
            version: layout.version,
            source: Source::TransactedDb,
            restore_method: Some(self.identity.restoring("redis-server")),
            // Dumps and logs that were not finished.
            exclude_from_snapshot: vec![FileSet::new(&*directory, "temp-*")],
            components: vec![server],
            ..Metadata::default()
        })
    }

    fn prepare_backup(
        &mut self,
        call: &Call<'_>,
        backup: &PrepareBackup,
    ) -> Result<Vec<ComponentReply>, Veto> {
        let layout = self.connect(call)?.layout(&self.calls, call)?;
        match self.disks.not_held(&backup.disks, &[layout.directory]) {
            Some(why) => Err(Veto::inconsistent(why)),
            None => Ok(Vec::new()),
        }
    }

    fn prepare_snapshot(&mut self, call: &Call<'_>, _: &PrepareSnapshot) -> Result<(), Veto> {
        let mut session = self.connect(call)?;
        session.check(&self.calls, call)?;
        self.session = Some(session);
        Ok(())
    }

    fn freeze(&mut self, call: &Call<'_>, hold: &Freeze) -> Result<Value, Veto> {
        let Some(session) = &mut self.session else {
            return Err(Veto::retryable("it was not prepared"));
        };
        let hold = Duration::from_millis(hold.hold_ms);
        // A quarter is left for the answer: one that is late fails the set as well, but says less.
        let settling = Call::alone(call.remaining() * 3 / 4);
        let frozen = session
            .pause(&self.calls, hold, call)
            .and_then(|()| session.settle(&self.calls, &settling))
            .and_then(|()| session.evidence(&self.calls, call));
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
        // Asked for before writes go on.
        let evidence = session.evidence(&self.calls, call);
        let held = session.still_holds().is_ok();
        let ended = session.unpause(&self.calls, call);
        self.session = None;
        ended?;
        Ok(Held {
            held,
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
