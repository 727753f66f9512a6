//! The writer beside a real server on this machine (Debian's `postgresql-15`; skipped aloud where it is not).

mod server;

use super::*;
use guest_agent_wire::types::WriterFailure;
use server::Server;
use writer_tests::{backup, call, guest, hold, identity, snapshot, thaw, why_lost};

fn writer(server: &Server, online_backup: OnlineBackup, disks: Disks) -> PostgresqlWriter {
    PostgresqlWriter::new(identity(), server.config(), online_backup, disks).unwrap()
}

/// As text: it is compared with what the server itself compares.
fn lsn(evidence: &Value) -> String {
    evidence["lsn"].as_str().unwrap().to_owned()
}

#[test]
fn the_position_at_the_freeze_is_behind_everything_acknowledged_even_unflushed() {
    let Some(server) = Server::start() else {
        return;
    };
    let mut writer = writer(&server, OnlineBackup::Never, Disks::default());
    writer.prepare_backup(&call(), &backup(&[])).unwrap();
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    // Acknowledged before it is flushed: the log's writer would do that 200 ms later.
    server.ask("SET synchronous_commit = off; CREATE TABLE t (x int); INSERT INTO t VALUES (1)");
    let inserted = server.ask("SELECT pg_current_wal_insert_lsn()");
    let frozen = writer.freeze(&call(), &hold(10_000)).unwrap();
    let is_behind = format!("SELECT '{}'::pg_lsn >= '{inserted}'::pg_lsn", lsn(&frozen));
    assert_eq!(server.ask(&is_behind), "t", "{frozen} {inserted}");
    // It goes on writing until its file systems are frozen.
    server.ask("INSERT INTO t VALUES (2)");
    let thawed = writer.thaw(&call(), &thaw()).unwrap();
    assert!(thawed.held);
    assert_eq!(thawed.evidence["session_pid"], frozen["session_pid"]);
    let replies = writer
        .post_snapshot(&call(), &PostSnapshot::default())
        .unwrap();
    assert_eq!(replies, []);
}

#[test]
fn a_session_that_was_lost_while_frozen_does_not_say_held() {
    let Some(server) = Server::start() else {
        return;
    };
    let mut writer = writer(&server, OnlineBackup::Never, Disks::default());
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    let frozen = writer.freeze(&call(), &hold(10_000)).unwrap();
    server.ask(&format!(
        "SELECT pg_terminate_backend({})",
        frozen["session_pid"]
    ));
    assert!(writer.thaw(&call(), &thaw()).is_err());
}

#[test]
fn a_session_or_a_server_that_ends_in_the_window_is_told_before_the_thaw() {
    let Some(server) = Server::start() else {
        return;
    };
    let mut writer = writer(&server, OnlineBackup::Never, Disks::default());
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    let frozen = writer.freeze(&call(), &hold(10_000)).unwrap();
    server.ask("SELECT 1");
    assert_eq!(writer.still_holds(), Ok(()));
    server.ask(&format!(
        "SELECT pg_terminate_backend({})",
        frozen["session_pid"]
    ));
    why_lost(&mut writer);

    writer.abort("s", "lost");
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    writer.freeze(&call(), &hold(10_000)).unwrap();
    assert_eq!(writer.still_holds(), Ok(()));
    drop(server);
    why_lost(&mut writer);
}

#[test]
fn another_server_or_session_is_not_the_one_that_was_frozen() {
    let before = Position {
        session_pid: 7,
        started: "1.5".into(),
        lsn: "0/1".into(),
        timeline: 1,
        system_identifier: "1".into(),
        replica: false,
    };
    let later = Position {
        lsn: "0/2".into(),
        ..before.clone()
    };
    assert!(later.is_same_server(&before));
    let restarted = Position {
        started: "2.5".into(),
        ..later.clone()
    };
    assert!(!restarted.is_same_server(&before));
    let session = Position {
        session_pid: 8,
        ..later
    };
    assert!(!session.is_same_server(&before));
}

#[test]
fn a_server_that_is_not_there_is_a_veto_for_this_time() {
    let Some(server) = Server::start() else {
        return;
    };
    let mut writer = writer(&server, OnlineBackup::Never, Disks::default());
    drop(server);
    let veto = writer.prepare_backup(&call(), &backup(&[])).unwrap_err();
    assert_eq!(veto.code, WriterFailure::Retryable, "{}", veto.message);
}

#[test]
fn a_set_without_the_disk_of_a_tablespace_or_of_the_log_is_inconsistent() {
    let Some(server) = Server::start() else {
        return;
    };
    let apart = server.tablespace("apart");
    let (_guest, disks) = guest(&apart);
    let mut writer = writer(&server, OnlineBackup::Never, disks);
    let mut ask = |disks: &[&str]| writer.prepare_backup(&call(), &backup(disks));
    ask(&["data", "fast"]).unwrap();
    ask(&[]).unwrap();
    for part in ["data", "fast"] {
        let veto = ask(&[part]).unwrap_err();
        assert_eq!(veto.code, WriterFailure::Inconsistentsnapshot, "{veto:?}");
    }
    let layout = writer.layout(&call()).unwrap();
    assert_eq!(layout.tablespaces, [("apart".to_owned(), apart)]);
    let metadata = writer.identify(&call()).unwrap();
    metadata.check().unwrap();
    assert_eq!(metadata.components[0].database_files.len(), 2);
}

#[test]
fn a_bracketed_set_returns_labels_from_which_a_copy_of_no_one_instant_recovers() {
    let Some(server) = Server::start() else {
        return;
    };
    let apart = server.tablespace("apart");
    let (_guest, disks) = guest(&apart);
    let mut writer = writer(&server, OnlineBackup::Split, disks);
    writer.prepare_backup(&call(), &backup(&["data"])).unwrap();
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    writer.freeze(&call(), &hold(10_000)).unwrap();
    assert!(writer.thaw(&call(), &thaw()).unwrap().held);
    server.ask("CREATE TABLE t (x int); INSERT INTO t SELECT generate_series(1, 1000)");
    // Files are copied one after the other, while the server writes.
    let copy = server.copy_files();
    server.ask("INSERT INTO t VALUES (1001)");
    let replies = writer
        .post_snapshot(&call(), &PostSnapshot::default())
        .unwrap();
    let labels = &replies[0].metadata;
    let map = labels["tablespace_map"].as_str().unwrap();
    assert!(map.contains(&*apart.to_string_lossy()), "{map}");
    let label = labels["backup_label"].as_str().unwrap();
    let copy = server.start_copy(&copy, label);
    let count: i64 = copy.ask("SELECT count(*) FROM t").parse().unwrap();
    assert!(count >= 1000, "{count}");
    assert!(
        copy.log().contains("consistent recovery state reached"),
        "{}",
        copy.log()
    );
}

#[test]
fn a_set_that_holds_everything_is_bracketed_only_on_wish() {
    let Some(server) = Server::start() else {
        return;
    };
    for (online_backup, expected) in [
        (OnlineBackup::Never, false),
        (OnlineBackup::Split, false),
        (OnlineBackup::Always, true),
    ] {
        let mut writer = writer(&server, online_backup, Disks::default());
        writer.prepare_backup(&call(), &backup(&[])).unwrap();
        writer.prepare_snapshot(&call(), &snapshot()).unwrap();
        let replies = writer
            .post_snapshot(&call(), &PostSnapshot::default())
            .unwrap();
        assert_eq!(!replies.is_empty(), expected, "{online_backup:?}");
        // An abort in any state, more than once, leaves no backup behind.
        writer.abort("s", "now");
        writer.abort("s", "again");
    }
}
