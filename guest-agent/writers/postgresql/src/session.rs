//! A session with the server: the statements of a set, each with a limit.
//!
//! Called by the writer. A session that is dropped is closed, and with it a backup that it has begun.

use crate::layout::Layout;
use database_writer::Calls;
use guest_agent_wire::sdk::{Call, Veto};
use guest_agent_wire::types::WriterFailure;
use serde_json::{Value, json};
use std::path::PathBuf;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Config, Error, NoTls, Row};

/// Where the log stands, and who says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// Process of the session.
    pub session_pid: i32,
    /// When the server was started, seconds since the epoch as the server prints them.
    pub started: String,
    /// Flushed up to here; of a replica: replayed up to here.
    pub lsn: String,
    /// Timeline of the log.
    pub timeline: i32,
    /// Names the cluster.
    pub system_identifier: String,
    /// The server is a replica.
    pub replica: bool,
}

impl Position {
    /// Seen through the same session with a server that was not restarted in between.
    #[must_use]
    pub fn is_same_server(&self, before: &Self) -> bool {
        (self.session_pid, &self.started, &self.system_identifier)
            == (
                before.session_pid,
                &before.started,
                &before.system_identifier,
            )
    }

    /// For the set's document.
    #[must_use]
    pub fn evidence(&self) -> Value {
        json!({
            "lsn": self.lsn,
            "timeline": self.timeline,
            "system_identifier": self.system_identifier,
            "replica": self.replica,
            "session_pid": self.session_pid,
            "started": self.started,
        })
    }
}

/// What `pg_backup_stop` returns; a restore needs the two files in the data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Labels {
    /// Where the backup ended: the log is needed up to here.
    pub(crate) stop_lsn: String,
    /// Contents of `backup_label`.
    pub(crate) backup_label: String,
    /// Contents of `tablespace_map`; empty if there is no tablespace.
    pub(crate) tablespace_map: String,
}

/// An open session.
pub(crate) struct Session {
    client: Client,
    has_backup: bool,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Session")
            .field("has_backup", &self.has_backup)
            .finish_non_exhaustive()
    }
}

const LAYOUT: &str = "SELECT current_setting('server_version'), current_setting('data_directory'), \
     current_setting('config_file'), current_setting('hba_file'), current_setting('ident_file')";
const TABLESPACES: &str = "SELECT spcname::text, pg_tablespace_location(oid) FROM pg_tablespace \
     WHERE pg_tablespace_location(oid) <> ''";
const POSITION: &str = "SELECT pg_backend_pid(), extract(epoch FROM pg_postmaster_start_time())::text, \
     (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END)::text, \
     (SELECT timeline_id FROM pg_control_checkpoint()), \
     (SELECT system_identifier::text FROM pg_control_system()), pg_is_in_recovery()";
/// A transaction that is in the log leaves nothing in it unflushed that was acknowledged before it. A replica has none.
const FLUSH: &str = "SELECT CASE WHEN NOT pg_is_in_recovery() \
     THEN pg_logical_emit_message(true, 'vmshadow', $1::text)::text END";
const START: &str = "SELECT pg_backup_start($1::text, fast => true)::text";
const STOP: &str =
    "SELECT lsn::text, labelfile, spcmapfile FROM pg_backup_stop(wait_for_archive => false)";

impl Session {
    pub(crate) fn connect(config: &Config, calls: &Calls, call: &Call<'_>) -> Result<Self, Veto> {
        let (client, connection) =
            calls.within(call, "connecting", judge, config.connect(NoTls))?;
        // How it ends is seen by the next statement.
        calls.beside(async { drop(connection.await) });
        let session = Self {
            client,
            has_backup: false,
        };
        // The transaction of the flush must not wait for replicas.
        let settings = format!(
            "SET synchronous_commit = local; SET statement_timeout = {}",
            call.remaining().as_millis().max(1)
        );
        calls.within(
            call,
            "settings",
            judge,
            session.client.batch_execute(&settings),
        )?;
        Ok(session)
    }

    /// The server has not ended it, nor itself. Asks nothing of it: the client reads the connection by itself.
    pub(crate) fn is_open(&self) -> bool {
        !self.client.is_closed()
    }

    fn row(
        &self,
        calls: &Calls,
        call: &Call<'_>,
        statement: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, Veto> {
        calls.within(
            call,
            statement,
            judge,
            self.client.query_one(statement, parameters),
        )
    }

    pub(crate) fn layout(&self, calls: &Calls, call: &Call<'_>) -> Result<Layout, Veto> {
        let row = self.row(calls, call, LAYOUT, &[])?;
        let data = PathBuf::from(column::<String>(&row, 1)?);
        let wal = data.join("pg_wal");
        let wal = std::fs::canonicalize(&wal)
            .map_err(|error| Veto::nonretryable(format!("{}: {error}", wal.display())))?;
        let rows = self.client.query(TABLESPACES, &[]);
        let tablespaces = calls
            .within(call, TABLESPACES, judge, rows)?
            .iter()
            .map(|row| Ok((column(row, 0)?, column::<String>(row, 1)?.into())))
            .collect::<Result<_, Veto>>()?;
        let configuration = (2..5)
            .map(|place| Ok(column::<String>(&row, place)?.into()))
            .collect::<Result<_, Veto>>()?;
        Ok(Layout {
            version: column(&row, 0)?,
            data,
            wal,
            tablespaces,
            configuration,
        })
    }

    pub(crate) fn position(&self, calls: &Calls, call: &Call<'_>) -> Result<Position, Veto> {
        let row = self.row(calls, call, POSITION, &[])?;
        Ok(Position {
            session_pid: column(&row, 0)?,
            started: column(&row, 1)?,
            lsn: column(&row, 2)?,
            timeline: column(&row, 3)?,
            system_identifier: column(&row, 4)?,
            replica: column(&row, 5)?,
        })
    }

    pub(crate) fn checkpoint(&self, calls: &Calls, call: &Call<'_>) -> Result<(), Veto> {
        let asked = self.client.batch_execute("CHECKPOINT");
        calls.within(call, "CHECKPOINT", judge, asked)
    }

    pub(crate) fn flush(&self, calls: &Calls, set: &str, call: &Call<'_>) -> Result<(), Veto> {
        self.row(calls, call, FLUSH, &[&set])?;
        Ok(())
    }

    pub(crate) fn start_backup(
        &mut self,
        calls: &Calls,
        set: &str,
        call: &Call<'_>,
    ) -> Result<(), Veto> {
        self.row(calls, call, START, &[&format!("vmshadow {set}")])?;
        self.has_backup = true;
        Ok(())
    }

    /// Ends the backup that this session has begun; `None` if there is none.
    pub(crate) fn stop_backup(
        &mut self,
        calls: &Calls,
        call: &Call<'_>,
    ) -> Result<Option<Labels>, Veto> {
        if !std::mem::take(&mut self.has_backup) {
            return Ok(None);
        }
        let row = self.row(calls, call, STOP, &[])?;
        Ok(Some(Labels {
            stop_lsn: column(&row, 0)?,
            backup_label: column(&row, 1)?,
            tablespace_map: column(&row, 2)?,
        }))
    }
}

fn column<'a, T: tokio_postgres::types::FromSql<'a>>(
    row: &'a Row,
    place: usize,
) -> Result<T, Veto> {
    row.try_get(place)
        .map_err(|error| Veto::nonretryable(format!("the server's answer: {error}")))
}

/// Whether it may work another time.
fn judge(error: &Error) -> WriterFailure {
    let code = error.code();
    let never = [
        SqlState::INSUFFICIENT_PRIVILEGE,
        SqlState::INVALID_PASSWORD,
        SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
    ];
    if code.is_some_and(|code| never.contains(code)) {
        WriterFailure::Nonretryable
    } else if code == Some(&SqlState::TOO_MANY_CONNECTIONS) {
        WriterFailure::Outofresources
    } else if code == Some(&SqlState::QUERY_CANCELED) {
        WriterFailure::Timeout
    } else {
        WriterFailure::Retryable
    }
}
