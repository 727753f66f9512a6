//! The writer beside a real server on this machine (Debian's `mariadb-server-core`; skipped aloud where it is not).

mod server;

use super::*;
use database_writer::Disks;
use guest_agent_wire::sdk::{self, Writer as _};
use guest_agent_wire::types::WriterFailure;
use guest_agent_wire::writer::{EventKind, Release, Reply};
use server::Server;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use writer_tests::{Agent, DEADLINE, backup, call, hold, identity, snapshot, thaw, why_lost};

fn writer(server: &Server) -> MariadbWriter {
    MariadbWriter::new(identity(), server.options(), Disks::default()).unwrap()
}

#[test]
fn no_commit_is_acknowledged_while_frozen_and_each_is_afterwards() {
    let Some(server) = Server::start() else {
        return;
    };
    server.ask(
        "CREATE DATABASE d; CREATE TABLE d.t (x INT) ENGINE=InnoDB; INSERT INTO d.t VALUES (1)",
    );
    let mut writer = writer(&server);
    writer.prepare_backup(&call(), &backup(&[])).unwrap();
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    server.ask("INSERT INTO d.t VALUES (2)");
    let evidence = writer.freeze(&call(), &hold(10_000)).unwrap();
    assert!(
        evidence["binlog_position"].as_u64().unwrap() > 0,
        "{evidence}"
    );
    let mut application = server.begin("INSERT INTO d.t VALUES (3)");
    server.wait_for_state("backup lock");
    assert_eq!(server.ask("SELECT max(x) FROM d.t"), "2", "reading goes on");
    let held = writer.thaw(&call(), &thaw()).unwrap();
    assert!(held.held);
    assert_eq!(held.evidence, evidence);
    assert!(application.wait().unwrap().success());
    assert_eq!(server.ask("SELECT max(x) FROM d.t"), "3");
}

#[test]
fn a_commit_moves_the_evidence() {
    let Some(server) = Server::start() else {
        return;
    };
    server.ask("CREATE DATABASE d; CREATE TABLE d.t (x INT) ENGINE=InnoDB");
    let writer = writer(&server);
    let mut session = writer.connect(&call()).unwrap();
    let before = Mariadb::position(&mut session, writer.calls(), &call()).unwrap();
    assert_eq!(
        Mariadb::position(&mut session, writer.calls(), &call()).unwrap(),
        before
    );
    server.ask("INSERT INTO d.t VALUES (1)");
    assert_ne!(
        Mariadb::position(&mut session, writer.calls(), &call()).unwrap(),
        before
    );
}

#[test]
fn a_session_that_was_lost_while_frozen_does_not_say_held() {
    let Some(server) = Server::start() else {
        return;
    };
    let mut writer = writer(&server);
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    let evidence = writer.freeze(&call(), &hold(10_000)).unwrap();
    server.ask(&format!("KILL {}", evidence["session"]));
    assert!(writer.thaw(&call(), &thaw()).is_err());
    server.ask("CREATE DATABASE d");
}

#[test]
fn a_session_or_a_server_that_is_killed_in_the_window_is_told_before_the_thaw() {
    let Some(server) = Server::start() else {
        return;
    };
    let mut writer = writer(&server);
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    let evidence = writer.freeze(&call(), &hold(60_000)).unwrap();
    server.wait_for_looks();
    assert_eq!(writer.still_holds(), Ok(()));
    server.ask(&format!("KILL {}", evidence["session"]));
    let why = why_lost(&mut writer);
    assert!(why.contains("has ended session"), "{why}");

    writer.abort("s", "lost");
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    writer.freeze(&call(), &hold(60_000)).unwrap();
    server.wait_for_looks();
    assert_eq!(writer.still_holds(), Ok(()));
    // It kills the server.
    drop(server);
    let why = why_lost(&mut writer);
    assert!(why.contains("looking for session"), "{why}");
}

#[test]
fn the_agent_hears_of_a_killed_session_while_the_window_is_open() {
    let Some(server) = Server::start() else {
        return;
    };
    let mut writer = writer(&server);
    let (agent, ours) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| sdk::serve(&mut writer, &ours));
        let mut agent = Agent::on(agent, DEADLINE);
        let prepared: Reply = agent.ask(EventKind::PrepareSnapshot(snapshot()));
        assert!(prepared.ok, "{prepared:?}");
        let frozen: Reply = agent.ask(EventKind::Freeze(hold(60_000)));
        server.ask(&format!("KILL {}", frozen.evidence["session"]));
        let release: Release = agent.read();
        assert!(release.release.contains("has ended session"), "{release:?}");
        // Commits go on, and the thaw that comes all the same does not say held.
        server.ask("CREATE DATABASE d");
        let thawed: Reply = agent.ask(EventKind::Thaw(thaw()));
        assert_ne!(thawed.held, Some(true), "{thawed:?}");
    });
}

#[test]
fn a_lock_that_somebody_keeps_is_a_veto_in_time_and_nothing_stays_locked() {
    let Some(server) = Server::start() else {
        return;
    };
    server.ask("CREATE DATABASE d; CREATE TABLE d.t (x INT) ENGINE=Aria");
    let mut writer = writer(&server);
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    let mut busy = server.begin("LOCK TABLES d.t WRITE; INSERT INTO d.t VALUES (SLEEP(600))");
    server.wait_for_state("User sleep");
    let veto = writer
        .freeze(&Call::alone(Duration::from_secs(2)), &hold(10_000))
        .unwrap_err();
    assert_eq!(veto.code, WriterFailure::Timeout, "{}", veto.message);
    busy.kill().unwrap();
    busy.wait().unwrap();
    server.ask("CREATE TABLE d.u (x INT) ENGINE=InnoDB; INSERT INTO d.u VALUES (1)");
}

#[test]
fn an_abort_lets_commits_go_on_in_any_state() {
    let Some(server) = Server::start() else {
        return;
    };
    let mut writer = writer(&server);
    writer.abort("s", "early");
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    writer.freeze(&call(), &hold(10_000)).unwrap();
    writer.abort("s", "late");
    writer.abort("s", "again");
    server.ask("CREATE DATABASE d");
    assert!(writer.thaw(&call(), &thaw()).is_err());
}

#[test]
fn a_writer_that_hangs_is_let_go_by_the_server() {
    let Some(server) = Server::start() else {
        return;
    };
    let mut writer = writer(&server);
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    writer.freeze(&call(), &hold(1000)).unwrap();
    // Nobody thaws: this returns when the server has ended the session.
    server.ask("CREATE DATABASE d");
    assert!(writer.thaw(&call(), &thaw()).is_err());
}

#[test]
fn every_directory_of_the_server_is_named_also_that_of_a_table_elsewhere() {
    let Some(server) = Server::start() else {
        return;
    };
    let elsewhere = server.top.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    server.ask(&format!(
        "CREATE DATABASE d; CREATE TABLE d.t (x INT) ENGINE=InnoDB DATA DIRECTORY='{}'",
        elsewhere.display()
    ));
    let writer = writer(&server);
    let mut session = writer.connect(&call()).unwrap();
    let layout = Mariadb::layout(&mut session, writer.calls(), &call()).unwrap();
    assert_eq!(layout.data, server.data());
    let has_table = layout
        .elsewhere
        .iter()
        .any(|found| found.starts_with(&elsewhere));
    assert!(has_table, "{layout:?}");
}

#[test]
fn the_metadata_document_is_whole() {
    let Some(server) = Server::start() else {
        return;
    };
    let metadata = writer(&server).identify(&call()).unwrap();
    metadata.check().unwrap();
    assert!(metadata.version.contains("MariaDB"), "{metadata:?}");
}

#[test]
fn a_server_that_is_not_there_is_a_veto_for_this_time() {
    let Some(server) = Server::start() else {
        return;
    };
    let mut writer = writer(&server);
    drop(server);
    let veto = writer.prepare_backup(&call(), &backup(&[])).unwrap_err();
    assert_eq!(veto.code, WriterFailure::Retryable, "{}", veto.message);
}
