//! A snapshot writer for MySQL 8.0.22 and later, on a client library of its protocol.
//!
//! Called through the writer library (`guest_agent_wire::sdk`). `LOCK INSTANCE FOR BACKUP` in prepare keeps tables from being made,
//! changed or dropped; everything else goes on until the file systems are frozen, which hold the writes (`hold: filesystem`): a copy of all
//! files of one instant is what a power cut leaves, from which InnoDB recovers by itself. At the freeze the server is made to flush its log,
//! for settings by which it acknowledges what is not flushed, and the position is recorded that a recovery must reach.
//!
//! Tables of MyISAM recover from nothing: where there are any, they are locked for reading at the freeze, each by name. A writer of the table
//! is waited for, a reader is not. (`FLUSH TABLES ... WITH READ LOCK`, for all or by name, waits for readers too, and whoever gives it up
//! leaves others waiting for them, in "Waiting for table flush".) Tables of engines whose files nobody makes whole refuse the set.

use database_writer::Calls;
use guest_agent_wire::sdk::{Call, Veto};
use guest_agent_wire::types::Hold;
use mysql_family::{Kind, Layout, Session, SessionWriter, Statements};
use serde_json::{Value, json};

/// The writer.
pub type MysqlWriter = SessionWriter<Mysql>;

/// Where files lie: what belongs to the server, then what is named with its whole path (tablespaces, undo logs).
const LAYOUT: &str = "SELECT @@version, @@datadir, @@innodb_data_home_dir, @@innodb_log_group_home_dir, @@innodb_undo_directory, \
     @@innodb_doublewrite_dir, @@log_bin_basename";
const FILES_ELSEWHERE: &str =
    "SELECT file_name FROM information_schema.files WHERE file_name LIKE '/%'";

/// Whether this user may see all tables: one of the server's own is only shown to whom a privilege on everything is given.
const SEES_ALL: &str = "SELECT COUNT(*) FROM information_schema.tables WHERE table_schema = 'mysql' AND table_name = 'user'";
/// Tables with data of their own on a disk that InnoDB does not keep: their names, quoted, and who does. The server's own logs are let be.
const NOT_IN_INNODB: &str = "SELECT CONCAT('`', REPLACE(table_schema, '`', '``'), '`.`', REPLACE(table_name, '`', '``'), '`'), engine \
     FROM information_schema.tables WHERE table_type = 'BASE TABLE' \
     AND engine NOT IN ('InnoDB', 'PERFORMANCE_SCHEMA', 'MEMORY', 'BLACKHOLE', 'FEDERATED') \
     AND NOT (table_schema = 'mysql' AND table_name IN ('general_log', 'slow_log'))";
/// Engines that write all they have to their files before a statement ends.
const WHOLE_WHEN_LOCKED: [&str; 3] = ["MyISAM", "MRG_MYISAM", "CSV"];

/// The session, and where all logs ended at one instant.
const POSITION: &str = "SELECT CONNECTION_ID(), server_uuid, \
     JSON_UNQUOTE(JSON_EXTRACT(local, '$.gtid_executed')), \
     JSON_UNQUOTE(JSON_EXTRACT(local, '$.binary_log_file')), \
     CAST(JSON_EXTRACT(local, '$.binary_log_position') AS UNSIGNED), \
     CAST(JSON_EXTRACT(storage_engines, '$.InnoDB.LSN') AS UNSIGNED) \
     FROM performance_schema.log_status";

/// What is said to MySQL.
#[derive(Debug)]
pub struct Mysql;

impl Mysql {
    /// Tables that only a lock makes whole.
    ///
    /// # Errors
    /// Some are not made whole even so, or this user does not see all.
    fn tables_to_lock(
        session: &mut Session,
        calls: &Calls,
        call: &Call<'_>,
    ) -> Result<Vec<String>, Veto> {
        let sees_all: Vec<u64> = session.rows(calls, call, SEES_ALL)?;
        if sees_all != [1] {
            return Err(Veto::nonretryable(
                "the user does not see all tables, so nobody knows whether InnoDB keeps them: GRANT SHOW VIEW ON *.*",
            ));
        }
        let tables: Vec<(String, String)> = session.rows(calls, call, NOT_IN_INNODB)?;
        let no_copy = tables
            .iter()
            .find(|(_, engine)| !WHOLE_WHEN_LOCKED.contains(&engine.as_str()));
        match no_copy {
            Some((table, engine)) => Err(Veto::nonretryable(format!(
                "{table} is kept by {engine}, whose files are not whole while the server runs"
            ))),
            None => Ok(tables.into_iter().map(|(table, _)| table).collect()),
        }
    }
}

impl Statements for Mysql {
    const KIND: Kind = Kind {
        class_id: "mysql",
        name: "MySQL",
        service: "mysql",
        hold: Hold::Filesystem,
        processlist: "performance_schema.processlist",
        temporary: None,
    };

    fn layout(session: &mut Session, calls: &Calls, call: &Call<'_>) -> Result<Layout, Veto> {
        type Settings = (
            String,
            String,
            Option<String>,
            Option<String>,
            Option<String>,
            Option<String>,
            Option<String>,
        );
        let settings: Vec<Settings> = session.rows(calls, call, LAYOUT)?;
        let files: Vec<String> = session.rows(calls, call, FILES_ELSEWHERE)?;
        let Some((version, data, system, log, undo, doublewrite, binlog)) =
            settings.into_iter().next()
        else {
            return Err(Veto::nonretryable(
                "the server does not tell its directories",
            ));
        };
        let directories = [system, log, undo, doublewrite].into_iter().flatten();
        // The binary log is a name.
        let files = binlog.into_iter().chain(files);
        Ok(Layout::new(version, data, directories, files))
    }

    fn start(session: &mut Session, calls: &Calls, call: &Call<'_>) -> Result<(), Veto> {
        session.run(calls, call, "LOCK INSTANCE FOR BACKUP")?;
        // What refuses the set is told before anything stands still.
        Self::tables_to_lock(session, calls, call).map(drop)
    }

    fn freeze(session: &mut Session, calls: &Calls, call: &Call<'_>) -> Result<(), Veto> {
        // Not for replicas, which flush for themselves.
        session.run(calls, call, "FLUSH LOCAL ENGINE LOGS")?;
        // No table can have become one since the instance was locked.
        let tables = Self::tables_to_lock(session, calls, call)?;
        if tables.is_empty() {
            return Ok(());
        }
        let lock = format!("LOCK TABLES {} READ", tables.join(" READ, "));
        session.run(calls, call, &lock)
    }

    fn end(session: &mut Session, calls: &Calls, call: &Call<'_>) -> Result<(), Veto> {
        session.run(calls, call, "UNLOCK TABLES")?;
        session.run(calls, call, "UNLOCK INSTANCE")
    }

    fn position(session: &mut Session, calls: &Calls, call: &Call<'_>) -> Result<Value, Veto> {
        type Logs = (
            u64,
            String,
            Option<String>,
            Option<String>,
            Option<u64>,
            Option<u64>,
        );
        let logs: Vec<Logs> = session.rows(calls, call, POSITION)?;
        let Some((session, server, gtid, file, position, lsn)) = logs.into_iter().next() else {
            return Err(Veto::nonretryable(
                "the server does not tell where its logs end (performance_schema.log_status)",
            ));
        };
        Ok(json!({
            "session": session,
            "server_uuid": server,
            "gtid_executed": gtid,
            "binlog_file": file,
            "binlog_position": position,
            "innodb_lsn": lsn,
        }))
    }
}

#[cfg(test)]
mod tests;
