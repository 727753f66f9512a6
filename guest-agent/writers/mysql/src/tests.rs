//! The writer beside a real server on this machine (Debian unstable's, in target/mysql; skipped aloud where it is not). What it shares with
//! MariaDB's writer is tested there, too.

mod server;

use super::*;
use database_writer::Disks;
use guest_agent_wire::sdk::Writer as _;
use guest_agent_wire::types::WriterFailure;
use guest_agent_wire::writer::PrepareBackup;
use server::Server;
use std::time::{Duration, Instant};
use writer_tests::{DEADLINE, call, hold, identity, snapshot, thaw};

/// What the documents ask for, and nothing more.
const ACCOUNT: &str = "CREATE USER w@localhost; GRANT BACKUP_ADMIN, RELOAD, PROCESS, SHOW VIEW ON *.* TO w@localhost; \
     GRANT SELECT ON performance_schema.* TO w@localhost";

/// As a user of the server with the privileges that the documents ask for.
fn writer(server: &Server) -> MysqlWriter {
    server.ask(ACCOUNT);
    MysqlWriter::new(identity(), server.options("w"), Disks::default()).unwrap()
}

#[test]
fn tables_are_not_changed_from_prepare_to_the_thaw_and_rows_are() {
    let Some(server) = Server::start(&[]) else {
        return;
    };
    server.ask("CREATE DATABASE d; CREATE TABLE d.t (x INT PRIMARY KEY)");
    let mut writer = writer(&server);
    writer
        .prepare_backup(&call(), &PrepareBackup::default())
        .unwrap();
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    let mut change = server.begin("ALTER TABLE d.t ADD y INT DEFAULT 1");
    server.wait_for_state("backup lock");
    server.ask("INSERT INTO d.t VALUES (1)");
    let frozen = writer.freeze(&call(), &hold(10_000)).unwrap();
    // Held by the file system, which this one is not.
    server.ask("INSERT INTO d.t VALUES (2)");
    let held = writer.thaw(&call(), &thaw()).unwrap();
    assert!(held.held);
    assert!(change.wait().unwrap().success());
    assert_eq!(server.ask("SELECT sum(y) FROM d.t"), "2");
    // What was committed meanwhile lies behind the position of the freeze, and before that of the thaw.
    for word in ["binlog_position", "innodb_lsn"] {
        let [before, after] = [&frozen, &held.evidence].map(|said| said[word].as_u64().unwrap());
        assert!(before < after, "{word}: {before}, {after}");
    }
    assert_eq!(frozen["server_uuid"], held.evidence["server_uuid"]);
    let is_behind = format!(
        "SELECT GTID_SUBSET('{}', @@gtid_executed)",
        frozen["gtid_executed"].as_str().unwrap()
    );
    assert_eq!(server.ask(&is_behind), "1");
}

#[test]
fn what_was_acknowledged_without_a_flush_is_flushed_at_the_freeze() {
    let Some(server) = Server::start(&[
        "--innodb-flush-log-at-trx-commit=0",
        "--innodb-flush-log-at-timeout=2700",
        "--disable-log-bin",
    ]) else {
        return;
    };
    server.ask("CREATE DATABASE d; CREATE TABLE d.t (x INT PRIMARY KEY)");
    let mut writer = writer(&server);
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    server.ask("INSERT INTO d.t VALUES (1)");
    let behind = "SELECT (SELECT variable_value FROM performance_schema.global_status WHERE variable_name = 'innodb_redo_log_current_lsn') > \
         (SELECT variable_value FROM performance_schema.global_status WHERE variable_name = 'innodb_redo_log_flushed_to_disk_lsn')";
    assert_eq!(server.ask(behind), "1", "the server flushed by itself");
    let frozen = writer.freeze(&call(), &hold(10_000)).unwrap();
    let flushed = "SELECT variable_value FROM performance_schema.global_status WHERE variable_name = 'innodb_redo_log_flushed_to_disk_lsn'";
    let flushed: u64 = server.ask(flushed).parse().unwrap();
    assert!(
        flushed >= frozen["innodb_lsn"].as_u64().unwrap(),
        "{flushed}, {frozen}"
    );
    assert!(writer.thaw(&call(), &thaw()).unwrap().held);
}

#[test]
fn tables_that_innodb_does_not_keep_are_held_by_a_read_lock() {
    let Some(server) = Server::start(&[]) else {
        return;
    };
    server.ask("CREATE DATABASE d; CREATE TABLE d.t (x INT) ENGINE=MyISAM");
    server.ask("CREATE TABLE d.`a``b c` (x INT NOT NULL) ENGINE=CSV; CREATE TABLE d.u (x INT)");
    let mut writer = writer(&server);
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    let veto = writer.freeze(&call(), &hold(10_000)).unwrap_err();
    assert!(veto.message.contains("Access denied"), "{}", veto.message);
    server.ask("GRANT SELECT, LOCK TABLES ON d.* TO w@localhost");
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    server.ask("INSERT INTO d.t VALUES (1)");
    writer.freeze(&call(), &hold(10_000)).unwrap();
    let mut application = server.begin("INSERT INTO d.t VALUES (2)");
    server.wait_for_state("metadata lock");
    server.ask("INSERT INTO d.u VALUES (1)");
    assert_eq!(server.ask("SELECT max(x) FROM d.t"), "1", "reading goes on");
    assert!(writer.thaw(&call(), &thaw()).unwrap().held);
    assert!(application.wait().unwrap().success());
}

#[test]
fn a_table_that_somebody_writes_is_a_veto_in_time_and_nothing_stays_locked() {
    let Some(server) = Server::start(&[]) else {
        return;
    };
    server.ask(
        "CREATE DATABASE d; CREATE TABLE d.t (x INT) ENGINE=MyISAM; INSERT INTO d.t VALUES (1)",
    );
    let mut writer = writer(&server);
    server.ask("GRANT SELECT, LOCK TABLES ON d.* TO w@localhost");

    let mut reader = server.begin("SELECT SLEEP(600) FROM d.t");
    server.wait_for_state("User sleep");
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    writer.freeze(&call(), &hold(10_000)).unwrap();
    assert!(
        writer.thaw(&call(), &thaw()).unwrap().held,
        "readers are waited for"
    );
    reader.kill().unwrap();
    reader.wait().unwrap();
    server.kill_all("User sleep");

    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    let mut busy = server.begin("UPDATE d.t SET x = SLEEP(600)");
    server.wait_for_state("User sleep");
    let short = Call::alone(Duration::from_secs(2));
    let veto = writer.freeze(&short, &hold(10_000)).unwrap_err();
    assert_eq!(veto.code, WriterFailure::Timeout, "{}", veto.message);
    server.kill_all("User sleep");
    busy.wait().unwrap();
    server.ask("INSERT INTO d.t VALUES (2); CREATE TABLE d.u (x INT)");
}

#[test]
fn a_table_that_nothing_makes_whole_refuses_the_set() {
    let Some(server) = Server::start(&[]) else {
        return;
    };
    server.ask("CREATE DATABASE d; CREATE TABLE d.t (x INT) ENGINE=ARCHIVE");
    let mut writer = writer(&server);
    let veto = writer.prepare_snapshot(&call(), &snapshot()).unwrap_err();
    assert_eq!(veto.code, WriterFailure::Nonretryable, "{}", veto.message);
    assert!(veto.message.contains("ARCHIVE"), "{}", veto.message);
    server.ask("DROP TABLE d.t");
}

#[test]
fn a_session_that_was_lost_does_not_say_held() {
    let Some(server) = Server::start(&[]) else {
        return;
    };
    let mut writer = writer(&server);
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    let frozen = writer.freeze(&call(), &hold(60_000)).unwrap();
    assert_eq!(writer.still_holds(), Ok(()));
    server.ask(&format!("KILL {}", frozen["session"]));
    let until = Instant::now() + DEADLINE;
    let why = loop {
        match writer.still_holds() {
            Err(why) => break why,
            Ok(()) => assert!(Instant::now() < until, "it still says that it holds"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(why.contains("has ended session"), "{why}");
    assert!(writer.thaw(&call(), &thaw()).is_err());
    server.ask("CREATE DATABASE d");
}

#[test]
fn an_abort_unlocks_in_any_state_and_a_writer_that_hangs_is_let_go_by_the_server() {
    let Some(server) = Server::start(&[]) else {
        return;
    };
    let mut writer = writer(&server);
    writer.abort("s", "early");
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    writer.freeze(&call(), &hold(10_000)).unwrap();
    writer.abort("s", "late");
    server.ask("CREATE DATABASE d");
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    writer.freeze(&call(), &hold(1000)).unwrap();
    // Nobody thaws: this returns when the server has ended the session.
    server.ask("CREATE TABLE d.t (x INT)");
    assert!(writer.thaw(&call(), &thaw()).is_err());
}

#[test]
fn a_user_without_a_privilege_that_is_needed_is_told_which() {
    let Some(server) = Server::start(&[]) else {
        return;
    };
    for (privilege, code) in [
        ("BACKUP_ADMIN", WriterFailure::Nonretryable),
        ("RELOAD", WriterFailure::Nonretryable),
        ("SHOW VIEW", WriterFailure::Nonretryable),
    ] {
        let mut writer = writer(&server);
        server.ask(&format!("REVOKE {privilege} ON *.* FROM w@localhost"));
        let prepared = writer.prepare_snapshot(&call(), &snapshot());
        let frozen = prepared.and_then(|()| writer.freeze(&call(), &hold(10_000)).map(drop));
        let veto = frozen.unwrap_err();
        assert_eq!(veto.code, code, "{}", veto.message);
        assert!(veto.message.contains(privilege), "{}", veto.message);
        writer.abort("s", "refused");
        server.ask("DROP USER w@localhost");
    }
}

#[test]
fn every_directory_of_the_server_is_named_also_that_of_a_tablespace_elsewhere() {
    let elsewhere = tempfile::tempdir().unwrap();
    let known = format!("--innodb-directories={}", elsewhere.path().display());
    let Some(server) = Server::start(&[&known]) else {
        return;
    };
    server.ask(&format!(
        "CREATE DATABASE d; CREATE TABLE d.t (x INT) DATA DIRECTORY='{}'",
        elsewhere.path().display()
    ));
    let mut writer = writer(&server);
    let mut session = writer.connect(&call()).unwrap();
    let layout = Mysql::layout(&mut session, writer.calls(), &call()).unwrap();
    assert_eq!(layout.data, server.data());
    let has_table = layout
        .elsewhere
        .iter()
        .any(|found| found.starts_with(elsewhere.path()));
    assert!(has_table, "{layout:?}");
    let metadata = writer.identify(&call()).unwrap();
    metadata.check().unwrap();
    assert!(!metadata.version.is_empty(), "{metadata:?}");
}
