//! What the writers for MariaDB and MySQL share: a session with the server that holds from prepare to the thaw, a second one that
//! looks whether the server still has the first, and the events of a set.
//!
//! Called through the writer library (`guest_agent_wire::sdk`). What is said to a server is its own room's ([`Statements`]).

mod layout;
mod session;

use clap::Args;
use database_writer::{Calls, Disks, Identity};
use guest_agent_wire::components::ComponentReply;
use guest_agent_wire::metadata::{Component, FileSet, Metadata, Source};
use guest_agent_wire::sdk::{Call, Held, Veto, Writer};
use guest_agent_wire::types::Hold;
use guest_agent_wire::writer::{
    BackupShutdown, Freeze, PrepareBackup, PrepareSnapshot, Registration, Thaw,
};
pub use layout::Layout;
use mysql_async::{Opts, OptsBuilder};
use serde_json::Value;
pub use session::Session;
use std::fmt::Debug;
use std::path::PathBuf;
use std::time::Duration;

/// How a server is reached.
#[derive(Args, Clone, Debug)]
pub struct Server {
    /// The server's socket.
    #[arg(long, default_value = "/run/mysqld/mysqld.sock")]
    pub server: PathBuf,
    /// The server's name for this user.
    #[arg(long, default_value = "mysql")]
    pub user: String,
    /// A file with the user's password in its first line; none is needed where the server goes by the socket.
    #[arg(long)]
    pub password_file: Option<PathBuf>,
}

impl Server {
    /// What the client library wants to know.
    ///
    /// # Errors
    /// The file with the password cannot be read.
    pub fn options(&self) -> std::io::Result<Opts> {
        let password = match &self.password_file {
            Some(path) => std::fs::read_to_string(path)?
                .lines()
                .next()
                .map(str::to_owned),
            None => None,
        };
        let options = OptsBuilder::default()
            .socket(Some(self.server.to_string_lossy()))
            .user(Some(&self.user))
            .pass(password);
        Ok(options.into())
    }
}

/// Who a server is to people and to the agent.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// Class of its writer; allow files name it.
    pub class_id: &'static str,
    /// Its name for people.
    pub name: &'static str,
    /// Its unit.
    pub service: &'static str,
    /// Who holds its writes.
    pub hold: Hold,
    /// Its table of sessions.
    pub processlist: &'static str,
    /// Files in its data directory that no copy needs, as a pattern of names.
    pub temporary: Option<&'static str>,
}

/// What is said to a server in a set. Each method may take as long as somebody waits for the answer to `call`, and ends with a veto if the
/// server says no.
#[allow(clippy::missing_errors_doc, reason = "the veto is told above")]
pub trait Statements: Debug {
    /// Which server.
    const KIND: Kind;

    /// Where its files lie.
    fn layout(session: &mut Session, calls: &Calls, call: &Call<'_>) -> Result<Layout, Veto>;

    /// Before the window: what takes long, and what keeps others from a backup.
    fn start(session: &mut Session, calls: &Calls, call: &Call<'_>) -> Result<(), Veto>;

    /// At the freeze.
    fn freeze(session: &mut Session, calls: &Calls, call: &Call<'_>) -> Result<(), Veto>;

    /// Undoes [`Self::freeze`] and [`Self::start`].
    fn end(session: &mut Session, calls: &Calls, call: &Call<'_>) -> Result<(), Veto>;

    /// Where its logs end: what every commit moves.
    fn position(session: &mut Session, calls: &Calls, call: &Call<'_>) -> Result<Value, Veto>;
}

/// The writer for a server.
#[derive(Debug)]
pub struct SessionWriter<S> {
    identity: Identity,
    options: Opts,
    disks: Disks,
    calls: Calls,
    /// From prepare to the end of the set.
    session: Option<Session>,
    /// Looks after the other from the freeze on; from prepare until then.
    watcher: Option<Session>,
    said: std::marker::PhantomData<S>,
}

impl<S: Statements> SessionWriter<S> {
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
            said: std::marker::PhantomData,
        })
    }

    /// Who makes its calls.
    #[must_use]
    pub fn calls(&self) -> &Calls {
        &self.calls
    }

    /// A new session with the server.
    ///
    /// # Errors
    /// No server, or it does not want this user.
    pub fn connect(&self, call: &Call<'_>) -> Result<Session, Veto> {
        Session::connect(self.options.clone(), &self.calls, call)
    }

    fn layout(&self, call: &Call<'_>) -> Result<Layout, Veto> {
        let mut session = self.connect(call)?;
        let layout = S::layout(&mut session, &self.calls, call);
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

impl<S: Statements> Writer for SessionWriter<S> {
    fn registration(&self) -> Registration {
        let kind = S::KIND;
        let address = address(&self.options);
        self.identity
            .registration(kind.class_id, kind.name, &address, kind.hold)
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
        let temporary = S::KIND.temporary.map(|pattern| FileSet {
            spec: pattern.to_owned(),
            ..FileSet::tree(layout.data.to_string_lossy())
        });
        Ok(Metadata {
            version: layout.version,
            source: Source::TransactedDb,
            restore_method: Some(self.identity.restoring(S::KIND.service)),
            excludes: temporary.into_iter().collect(),
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
        session.may_idle(&self.calls, call)?;
        S::start(&mut session, &self.calls, call)?;
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
            .holds_at_most(&self.calls, call, hold)
            .and_then(|()| S::freeze(session, &self.calls, call))
            .and_then(|()| S::position(session, &self.calls, call));
        session.watch_from(watcher, S::KIND.processlist, &self.calls);
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
        let evidence = S::position(session, &self.calls, call);
        let ended = S::end(session, &self.calls, call);
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

/// Of a server, for people and as a part of its instance's name.
fn address(options: &Opts) -> String {
    options.socket().map_or_else(
        || format!("{}:{}", options.ip_or_hostname(), options.tcp_port()),
        str::to_owned,
    )
}
