//! The writer beside a real server on this machine (Debian's `redis-server`; skipped aloud where it is not).

mod server;

use super::*;
use guest_agent_wire::sdk;
use guest_agent_wire::types::WriterFailure;
use guest_agent_wire::writer::{EventKind, Release, Reply};
use server::Server;
use std::os::unix::net::UnixStream;
use writer_tests::{Agent, DEADLINE, backup, call, hold, identity, snapshot, thaw, why_lost};

/// The two ways in which a server keeps its data.
const KINDS: [&[&str]; 2] = [&["--appendonly", "yes", "--appendfsync", "everysec"], &[]];

fn writer(server: &Server) -> RedisWriter {
    RedisWriter::new(identity(), server.client_of(), Disks::default()).unwrap()
}

#[test]
fn everything_acknowledged_is_in_the_files_while_frozen_and_nothing_else_comes() {
    for kind in KINDS {
        let Some(server) = Server::start(kind) else {
            return;
        };
        let mut writer = writer(&server);
        writer.prepare_backup(&call(), &backup(&[])).unwrap();
        writer.prepare_snapshot(&call(), &snapshot()).unwrap();
        for _ in 0..10 {
            server.client(&["INCR", "n"]);
        }
        let evidence = writer.freeze(&call(), &hold(60_000)).unwrap();
        let mut application = server.begin(&["INCR", "n"]);
        server.wait_for_blocked();
        assert_eq!(server.client(&["GET", "n"]), "10", "reading goes on");
        let copy = server.copy(kind);
        assert_eq!(copy.client(&["GET", "n"]), "10", "{kind:?}");
        let held = writer.thaw(&call(), &thaw()).unwrap();
        assert!(held.held);
        assert_eq!(held.evidence, evidence);
        assert!(application.wait().unwrap().success());
        assert_eq!(server.client(&["GET", "n"]), "11");
    }
}

#[test]
fn a_pause_that_somebody_ends_shows_in_the_evidence() {
    for kind in KINDS {
        let Some(server) = Server::start(kind) else {
            return;
        };
        let mut writer = writer(&server);
        writer.prepare_snapshot(&call(), &snapshot()).unwrap();
        let evidence = writer.freeze(&call(), &hold(60_000)).unwrap();
        server.client(&["CLIENT", "UNPAUSE"]);
        server.client(&["INCR", "n"]);
        let held = writer.thaw(&call(), &thaw()).unwrap();
        assert_ne!(held.evidence, evidence, "{kind:?}");
    }
}

#[test]
fn a_pause_that_ends_or_a_server_that_is_killed_in_the_window_is_told_before_the_thaw() {
    for kind in KINDS {
        let Some(server) = Server::start(kind) else {
            return;
        };
        let mut writer = writer(&server);
        let freeze = |writer: &mut RedisWriter, hold_ms| {
            writer.abort("s", "the one before");
            writer.prepare_snapshot(&call(), &snapshot()).unwrap();
            writer.freeze(&call(), &hold(hold_ms)).unwrap();
        };
        freeze(&mut writer, 60_000);
        let mut application = server.begin(&["INCR", "n"]);
        server.wait_for_blocked();
        assert_eq!(writer.still_holds(), Ok(()));
        server.client(&["CLIENT", "UNPAUSE"]);
        assert!(application.wait().unwrap().success());
        let why = why_lost(&mut writer);
        assert!(why.contains("the pause is over"), "{why}");
        assert!(!writer.thaw(&call(), &thaw()).unwrap().held);

        freeze(&mut writer, 200);
        let why = why_lost(&mut writer);
        assert!(why.contains("the pause is over"), "{why}");

        freeze(&mut writer, 60_000);
        assert_eq!(writer.still_holds(), Ok(()));
        // It kills the server.
        drop(server);
        let why = why_lost(&mut writer);
        assert!(why.contains("waiting for the end of the pause"), "{why}");
    }
}

#[test]
fn the_agent_hears_of_a_pause_that_somebody_ended_while_the_window_is_open() {
    let Some(server) = Server::start(&[]) else {
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
        assert!(frozen.ok, "{frozen:?}");
        server.client(&["CLIENT", "UNPAUSE"]);
        let release: Release = agent.read();
        assert!(release.release.contains("the pause is over"), "{release:?}");
        let thawed: Reply = agent.ask(EventKind::Thaw(thaw()));
        assert_ne!(thawed.held, Some(true), "{thawed:?}");
    });
}

#[test]
fn who_may_not_wait_for_the_end_of_the_pause_may_not_hold() {
    let Some(server) = Server::start(&[]) else {
        return;
    };
    server.client(&["ACL", "SETUSER", "default", "-publish"]);
    let mut writer = writer(&server);
    let veto = writer.prepare_snapshot(&call(), &snapshot()).unwrap_err();
    assert_eq!(veto.code, WriterFailure::Nonretryable, "{}", veto.message);
}

#[test]
fn a_pause_ends_by_itself_when_the_writer_does_not_come_back() {
    let Some(server) = Server::start(&[]) else {
        return;
    };
    let mut writer = writer(&server);
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    writer.freeze(&call(), &hold(200)).unwrap();
    // Returns when the pause is over.
    assert_eq!(server.client(&["INCR", "n"]), "1");
}

#[test]
fn an_abort_lets_writes_go_on_in_any_state() {
    let Some(server) = Server::start(&[]) else {
        return;
    };
    let mut writer = writer(&server);
    writer.abort("s", "early");
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    writer.freeze(&call(), &hold(60_000)).unwrap();
    writer.abort("s", "late");
    writer.abort("s", "again");
    assert_eq!(server.client(&["INCR", "n"]), "1");
    assert!(writer.thaw(&call(), &thaw()).is_err());
}

#[test]
fn a_server_that_cannot_write_its_files_is_a_veto() {
    let Some(server) = Server::start(&[]) else {
        return;
    };
    // A directory of the dump's name: saving fails.
    std::fs::create_dir(server.top.path().join("dump.rdb")).unwrap();
    let mut writer = writer(&server);
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    server.client(&["INCR", "n"]);
    let veto = writer
        .freeze(&Call::alone(Duration::from_secs(2)), &hold(60_000))
        .unwrap_err();
    assert_eq!(veto.code, WriterFailure::Timeout, "{}", veto.message);
    // Nothing is held, and the next set is refused before anything begins.
    let veto = writer.prepare_snapshot(&call(), &snapshot()).unwrap_err();
    assert!(
        veto.message.contains("rdb_last_bgsave_status"),
        "{}",
        veto.message
    );
    server.client(&["CONFIG", "SET", "stop-writes-on-bgsave-error", "no"]);
    assert_eq!(server.client(&["INCR", "n"]), "2");
}

#[test]
fn a_server_that_is_gone_or_another_does_not_say_held() {
    let Some(server) = Server::start(&[]) else {
        return;
    };
    let mut writer = writer(&server);
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    writer.freeze(&call(), &hold(60_000)).unwrap();
    drop(server);
    assert!(writer.thaw(&call(), &thaw()).is_err());
    let veto = writer.prepare_backup(&call(), &backup(&[])).unwrap_err();
    assert_eq!(veto.code, WriterFailure::Retryable, "{}", veto.message);
}

#[test]
fn the_metadata_document_names_what_the_server_keeps() {
    for (kind, has_log) in KINDS.into_iter().zip([true, false]) {
        let Some(server) = Server::start(kind) else {
            return;
        };
        let metadata = writer(&server).identify(&call()).unwrap();
        metadata.check().unwrap();
        assert!(
            metadata
                .version
                .starts_with(|first: char| first.is_ascii_digit())
        );
        assert_eq!(!metadata.components[0].log_files.is_empty(), has_log);
    }
}
