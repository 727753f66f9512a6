//! A session with the server: the statements of a set, each with a limit.
//!
//! Called by the writer. The server releases what a session holds when it ends.

use database_writer::{Calls, Watch};
use guest_agent_wire::sdk::{Call, Veto};
use guest_agent_wire::types::WriterFailure;
use mysql_async::prelude::{FromRow, Queryable};
use mysql_async::{Conn, Error, Opts};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest time between prepare and freeze, in which the session is idle.
const IDLE_S: u64 = 900;

/// Time for a server to end a session.
const CLOSING: Duration = Duration::from_secs(5);

/// Between two looks whether the server still has the session.
const LOOK: Duration = Duration::from_millis(50);

/// An open session.
#[derive(Debug)]
pub(crate) struct Session {
    connection: Conn,
    /// From the freeze on.
    watch: Option<Watch>,
}

/// A server's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) version: String,
    /// Data directory.
    pub(crate) data: PathBuf,
    /// Other directories that a copy must hold for the server to start from it.
    pub(crate) elsewhere: Vec<PathBuf>,
}

impl Layout {
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        [&self.data]
            .into_iter()
            .chain(&self.elsewhere)
            .cloned()
            .collect()
    }
}

/// Where files lie: what belongs to the server, then tables with a directory of their own.
const LAYOUT: &str = "SELECT @@version, @@datadir, @@innodb_data_home_dir, @@innodb_log_group_home_dir, @@innodb_undo_directory, \
     @@log_bin_basename";
const TABLES_ELSEWHERE: &str =
    "SELECT filename FROM information_schema.innodb_sys_tablespaces WHERE filename LIKE '/%'";

impl Session {
    pub(crate) fn connect(options: Opts, calls: &Calls, call: &Call<'_>) -> Result<Self, Veto> {
        let connection = calls.within(call, "connecting", judge, Conn::new(options))?;
        Ok(Self {
            connection,
            watch: None,
        })
    }

    /// From now on `other` looks whether the server still has this session. It is another one, since each statement of this one
    /// would put off the server's own dead man.
    pub(crate) fn watch_from(&mut self, other: Self, calls: &Calls) {
        let lost = until_ended(self.connection.id(), other.connection);
        self.watch = Some(calls.watch(lost));
    }

    /// The server was not seen to have ended it. Never waits.
    pub(crate) fn still_holds(&self) -> Result<(), String> {
        match &self.watch {
            Some(watch) => watch.still_holds(),
            None => Err("it is not frozen".to_owned()),
        }
    }

    /// The server has released everything when this returns, or does not answer.
    pub(crate) fn close(self, calls: &Calls) {
        let call = Call::alone(CLOSING);
        drop(calls.within(&call, "closing", judge, self.connection.disconnect()));
    }

    fn run(&mut self, calls: &Calls, call: &Call<'_>, statement: &str) -> Result<(), Veto> {
        let asked = self.connection.query_drop(statement);
        calls.within(call, statement, judge, asked)
    }

    fn rows<T: FromRow + Send + 'static>(
        &mut self,
        calls: &Calls,
        call: &Call<'_>,
        statement: &str,
    ) -> Result<Vec<T>, Veto> {
        let asked = self.connection.query(statement);
        calls.within(call, statement, judge, asked)
    }

    pub(crate) fn layout(&mut self, calls: &Calls, call: &Call<'_>) -> Result<Layout, Veto> {
        type Settings = (
            String,
            String,
            Option<String>,
            Option<String>,
            Option<String>,
            Option<String>,
        );
        let settings: Vec<Settings> = self.rows(calls, call, LAYOUT)?;
        let tables: Vec<String> = self.rows(calls, call, TABLES_ELSEWHERE)?;
        let Some((version, data, system, log, undo, binlog)) = settings.into_iter().next() else {
            return Err(Veto::nonretryable(
                "the server does not tell its directories",
            ));
        };
        // The binary log is a name, and so are tables: what counts is the directory.
        let parents = binlog.into_iter().chain(tables);
        let parents = parents.filter_map(|path| Path::new(&path).parent().map(Path::to_path_buf));
        let data = PathBuf::from(data);
        let mut elsewhere: Vec<PathBuf> = [system, log, undo]
            .into_iter()
            .flatten()
            .map(PathBuf::from)
            .chain(parents)
            // Most are relative to the data directory, and in it.
            .map(|path| data.join(path))
            .filter(|path| !path.starts_with(&data))
            .collect();
        elsewhere.sort();
        elsewhere.dedup();
        Ok(Layout {
            version,
            data,
            elsewhere,
        })
    }

    /// May say nothing from prepare to the freeze.
    pub(crate) fn may_idle(&mut self, calls: &Calls, call: &Call<'_>) -> Result<(), Veto> {
        self.limits(calls, call, IDLE_S)
    }

    /// Keeps others from beginning a backup, and lets the server do what takes long.
    pub(crate) fn start(&mut self, calls: &Calls, call: &Call<'_>) -> Result<(), Veto> {
        self.may_idle(calls, call)?;
        self.run(calls, call, "BACKUP STAGE START")
    }

    /// Holds all commits. The stages that were skipped run by themselves.
    pub(crate) fn block(
        &mut self,
        calls: &Calls,
        hold: Duration,
        call: &Call<'_>,
    ) -> Result<(), Veto> {
        // The server's own dead man: a session that says nothing for longer than the hold may last is ended.
        self.limits(calls, call, hold.as_secs() + 1)?;
        self.run(calls, call, "BACKUP STAGE BLOCK_COMMIT")
    }

    fn limits(&mut self, calls: &Calls, call: &Call<'_>, idle_s: u64) -> Result<(), Veto> {
        // A quarter is left for the answer: one that is late fails the set as well, but says less.
        let wait_s = (call.remaining() * 3 / 4).as_secs().max(1);
        let settings = format!("SET SESSION lock_wait_timeout = {wait_s}, wait_timeout = {idle_s}");
        self.run(calls, call, &settings)
    }

    /// Lets commits go on.
    pub(crate) fn end(&mut self, calls: &Calls, call: &Call<'_>) -> Result<(), Veto> {
        self.run(calls, call, "BACKUP STAGE END")
    }

    /// What every commit moves, if there is a binary log; and the session, which the lock belongs to.
    pub(crate) fn position(&mut self, calls: &Calls, call: &Call<'_>) -> Result<Value, Veto> {
        let ids: Vec<(u64, Option<String>)> =
            self.rows(calls, call, "SELECT CONNECTION_ID(), @@gtid_binlog_pos")?;
        let logs: Vec<(String, u64, String, String)> =
            self.rows(calls, call, "SHOW MASTER STATUS")?;
        let (session, gtid) = ids.into_iter().next().unwrap_or_default();
        let log = logs.into_iter().next();
        let (file, position) = log.map(|(file, position, ..)| (file, position)).unzip();
        Ok(json!({
            "session": session,
            "gtid_binlog_pos": gtid,
            "binlog_file": file,
            "binlog_position": position,
        }))
    }
}

/// Looks through `other` until the server has ended a session, or is told to; says so. A server that does not answer has ended nothing.
async fn until_ended(session: u32, mut other: Conn) -> String {
    let is_there = format!(
        "SELECT COUNT(*) FROM information_schema.processlist WHERE id = {session} AND command <> 'Killed'"
    );
    loop {
        match other.query_first::<u64, _>(is_there.as_str()).await {
            Ok(Some(1)) => tokio::time::sleep(LOOK).await,
            Ok(_) => return format!("the server has ended session {session}, which held commits"),
            Err(error) => return format!("looking for session {session}: {error}"),
        }
    }
}

/// Whether it may work another time.
fn judge(error: &Error) -> WriterFailure {
    match error {
        // Access denied, for a user, a database, a statement; no such statement.
        Error::Server(error) if [1045, 1044, 1227, 1064].contains(&error.code) => {
            WriterFailure::Nonretryable
        }
        // A lock was not to be had in time.
        Error::Server(error) if [1205, 1969].contains(&error.code) => WriterFailure::Timeout,
        Error::Server(error) if error.code == 1040 => WriterFailure::Outofresources,
        Error::Server(_) | Error::Driver(_) | Error::Io(_) | Error::Other(_) | Error::Url(_) => {
            WriterFailure::Retryable
        }
    }
}
