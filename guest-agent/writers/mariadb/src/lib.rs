//! A snapshot writer for MariaDB 10.4 and later, on a client library of its protocol.
//!
//! Called through the writer library (`guest_agent_wire::sdk`). The server itself holds the writes (`hold: app`): `BACKUP STAGE
//! START` in prepare, `BLOCK_COMMIT` at the freeze, from which no commit is acknowledged, and `END` at the thaw, all in one session,
//! whose end releases the lock; a second session looks that the server still has it. Evidence is the position of the binary log, which every commit moves, and the session's number.
//! A writer that hangs is let go by the server itself, which ends an idle session after `wait_timeout`.
//!
//! InnoDB recovers a copy of one instant by itself; the stages also keep Aria, MyISAM and the definitions of tables whole.

use database_writer::Calls;
use guest_agent_wire::sdk::{Call, Veto};
use guest_agent_wire::types::Hold;
use mysql_family::{Kind, Layout, Session, SessionWriter, Statements};
use serde_json::{Value, json};

/// The writer.
pub type MariadbWriter = SessionWriter<Mariadb>;

/// Where files lie: what belongs to the server, then tables with a directory of their own.
const LAYOUT: &str = "SELECT @@version, @@datadir, @@innodb_data_home_dir, @@innodb_log_group_home_dir, @@innodb_undo_directory, \
     @@log_bin_basename";
const TABLES_ELSEWHERE: &str =
    "SELECT filename FROM information_schema.innodb_sys_tablespaces WHERE filename LIKE '/%'";

/// What is said to MariaDB.
#[derive(Debug)]
pub struct Mariadb;

impl Statements for Mariadb {
    const KIND: Kind = Kind {
        class_id: "mariadb",
        name: "MariaDB",
        service: "mariadb",
        hold: Hold::App,
        processlist: "information_schema.processlist",
        temporary: Some("#sql*"),
    };

    fn layout(session: &mut Session, calls: &Calls, call: &Call<'_>) -> Result<Layout, Veto> {
        type Settings = (
            String,
            String,
            Option<String>,
            Option<String>,
            Option<String>,
            Option<String>,
        );
        let settings: Vec<Settings> = session.rows(calls, call, LAYOUT)?;
        let tables: Vec<String> = session.rows(calls, call, TABLES_ELSEWHERE)?;
        let Some((version, data, system, log, undo, binlog)) = settings.into_iter().next() else {
            return Err(Veto::nonretryable(
                "the server does not tell its directories",
            ));
        };
        let directories = [system, log, undo].into_iter().flatten();
        // The binary log is a name, and so are tables.
        let files = binlog.into_iter().chain(tables);
        Ok(Layout::new(version, data, directories, files))
    }

    /// Keeps others from beginning a backup, and lets the server do what takes long.
    fn start(session: &mut Session, calls: &Calls, call: &Call<'_>) -> Result<(), Veto> {
        session.run(calls, call, "BACKUP STAGE START")
    }

    /// Holds all commits. The stages that were skipped run by themselves.
    fn freeze(session: &mut Session, calls: &Calls, call: &Call<'_>) -> Result<(), Veto> {
        session.run(calls, call, "BACKUP STAGE BLOCK_COMMIT")
    }

    /// Lets commits go on.
    fn end(session: &mut Session, calls: &Calls, call: &Call<'_>) -> Result<(), Veto> {
        session.run(calls, call, "BACKUP STAGE END")
    }

    /// What every commit moves, if there is a binary log; and the session, which the lock belongs to.
    fn position(session: &mut Session, calls: &Calls, call: &Call<'_>) -> Result<Value, Veto> {
        let ids: Vec<(u64, Option<String>)> =
            session.rows(calls, call, "SELECT CONNECTION_ID(), @@gtid_binlog_pos")?;
        let logs: Vec<(String, u64, String, String)> =
            session.rows(calls, call, "SHOW MASTER STATUS")?;
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

#[cfg(test)]
mod tests;
