//! The writer beside a real member on this machine (Debian's `etcd-server`; skipped aloud where it is not).

mod server;

use super::*;
use guest_agent_wire::types::WriterFailure;
use server::{Server, Wanted};
use std::time::{Duration, Instant};
use writer_tests::{backup, guest, hold, identity, snapshot, thaw, why_lost};

const DEADLINE: Duration = Duration::from_secs(120);

fn call() -> Call<'static> {
    Call::alone(DEADLINE)
}

fn writer_of(reach: Reach, roots: Roots, disks: Disks) -> EtcdWriter {
    EtcdWriter::new(identity(), reach, roots, disks).unwrap()
}

fn writer(server: &Server) -> EtcdWriter {
    writer_of(server.reach(), server.roots(), Disks::default())
}

fn started() -> Option<Server> {
    Server::start(&Wanted::default())
}

/// The revision of the keys, as the stock client sees it.
fn revision(server: &Server) -> i64 {
    let answer = server.ask(&["get", "nothing", "-w", "json"]);
    let answer: Value = serde_json::from_str(&answer).unwrap();
    answer["header"]["revision"].as_i64().unwrap()
}

#[test]
fn a_copy_of_the_window_recovers_to_the_revision_of_the_freeze_or_later() {
    let Some(server) = started() else {
        return;
    };
    let mut writer = writer(&server);
    writer.prepare_backup(&call(), &backup(&[])).unwrap();
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    for number in 0..5 {
        server.ask(&["put", "before", &number.to_string()]);
    }
    let acknowledged = revision(&server);
    let frozen = writer.freeze(&call(), &hold(10_000)).unwrap();
    let recorded = frozen["revision"].as_i64().unwrap();
    assert_eq!(recorded, acknowledged, "{frozen}");
    assert_eq!(writer.still_holds(), Ok(()));
    let copy = server.copy();
    // It goes on writing when its file systems go on.
    server.ask(&["put", "after", "1"]);
    let thawed = writer.thaw(&call(), &thaw()).unwrap();
    assert!(thawed.held, "{frozen} {}", thawed.evidence);
    assert_eq!(thawed.evidence["member_id"], frozen["member_id"]);
    assert!(thawed.evidence["revision"].as_i64() > Some(recorded));
    let replies = writer.post_snapshot(&call(), &PostSnapshot::default());
    assert_eq!(replies.unwrap(), []);

    let copy = server.restart_from(copy, &[]);
    assert!(revision(&copy) >= recorded);
    assert_eq!(copy.ask(&["get", "before", "--print-value-only"]), "4");
    assert_eq!(copy.ask(&["get", "after"]), "");
}

#[test]
fn a_set_without_the_disk_of_the_log_is_inconsistent() {
    let wanted = Wanted {
        log_apart: true,
        ..Wanted::default()
    };
    let Some(server) = Server::start(&wanted) else {
        return;
    };
    let roots = server.roots();
    let apart = roots.wal_dir.clone().unwrap();
    let (_guest, disks) = guest(&apart);
    let mut writer = writer_of(server.reach(), roots.clone(), disks);
    let mut ask = |disks: &[&str]| writer.prepare_backup(&call(), &backup(disks));
    ask(&["data", "fast"]).unwrap();
    ask(&[]).unwrap();
    for part in ["data", "fast"] {
        let veto = ask(&[part]).unwrap_err();
        assert_eq!(veto.code, WriterFailure::Inconsistentsnapshot, "{veto:?}");
    }
    let metadata = writer.identify(&call()).unwrap();
    metadata.check().unwrap();
    let log = &metadata.components[0].log_files[0];
    assert_eq!(log.path, apart.to_string_lossy());
    assert!(metadata.version.starts_with("3."), "{}", metadata.version);
}

#[test]
fn files_that_are_not_the_members_own_are_refused() {
    let (Some(server), Some(other)) = (started(), started()) else {
        return;
    };
    let refused = |roots: Roots| {
        let mut writer = writer_of(server.reach(), roots, Disks::default());
        let veto = writer.prepare_backup(&call(), &backup(&[])).unwrap_err();
        assert_eq!(veto.code, WriterFailure::Nonretryable, "{veto:?}");
        veto.message
    };
    let why = refused(other.roots());
    assert!(why.contains("but the server is member"), "{why}");
    // The files of an earlier time, that it has left.
    let copy = server.copy();
    let data_dir = copy.path().join("data");
    let why = refused(Roots {
        data_dir,
        wal_dir: None,
    });
    assert!(why.contains("no server has this log open"), "{why}");
    refused(Roots {
        data_dir: "/nowhere".into(),
        wal_dir: None,
    });
}

#[test]
fn a_member_whose_quota_is_reached_is_refused() {
    let wanted = Wanted {
        options: vec!["--quota-backend-bytes=65536".to_owned()],
        ..Wanted::default()
    };
    let Some(server) = Server::start(&wanted) else {
        return;
    };
    let mut writer = writer(&server);
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    let value = "x".repeat(60_000);
    let until = Instant::now() + DEADLINE;
    while server.has_room_for(&value) {
        assert!(Instant::now() < until, "it takes whatever comes");
    }
    while server.ask(&["alarm", "list"]).is_empty() {
        assert!(Instant::now() < until, "no alarm");
    }
    // Between prepare and freeze, and before.
    for veto in [
        writer.freeze(&call(), &hold(10_000)).unwrap_err(),
        writer.prepare_snapshot(&call(), &snapshot()).unwrap_err(),
    ] {
        assert_eq!(veto.code, WriterFailure::Outofresources, "{veto:?}");
        assert!(veto.message.contains("NOSPACE"), "{veto:?}");
    }
    server.ask(&["alarm", "disarm"]);
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
}

#[test]
fn a_member_without_a_quorum_is_refused_and_a_copy_from_before_begins_a_new_cluster() {
    let Some([server, other]) = Server::start_two() else {
        return;
    };
    let mut writer = writer(&server);
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    // Acknowledged by the other member, it is in this one's files all the same.
    other.ask(&["put", "before", "1"]);
    let frozen = writer.freeze(&call(), &hold(10_000)).unwrap();
    assert_ne!(frozen["leader"], Value::Null, "{frozen}");
    let copy = server.copy();
    writer.abort("s", "enough");
    drop(other);
    // A leader that is alone needs a while to know it; until then, its log does not answer.
    let until = Instant::now() + DEADLINE;
    loop {
        let soon = Call::alone(Duration::from_secs(1));
        let veto = writer.prepare_snapshot(&soon, &snapshot()).unwrap_err();
        if veto.message.contains("lacks a quorum") {
            assert_eq!(veto.code, WriterFailure::Retryable, "{veto:?}");
            break;
        }
        assert!(Instant::now() < until, "{veto:?}");
    }
    // As the metadata document tells a person to.
    let alone = server.restart_from(copy, &["--force-new-cluster"]);
    assert_eq!(alone.ask(&["get", "before", "--print-value-only"]), "1");
    assert!(revision(&alone) >= frozen["revision"].as_i64().unwrap());
}

#[test]
fn a_member_that_dies_in_the_window_is_told_before_the_thaw_and_does_not_say_held_when_it_is_back()
{
    let Some(server) = started() else {
        return;
    };
    let mut writer = writer(&server);
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    writer.freeze(&call(), &hold(10_000)).unwrap();
    assert_eq!(writer.still_holds(), Ok(()));
    let server = server.restart();
    why_lost(&mut writer);
    let veto = writer.thaw(&call(), &thaw()).unwrap_err();
    assert_eq!(veto.code, WriterFailure::Retryable, "{veto:?}");
    // The next set finds it.
    writer.abort("s", "lost");
    writer.prepare_snapshot(&call(), &snapshot()).unwrap();
    writer.freeze(&call(), &hold(10_000)).unwrap();
    assert!(writer.thaw(&call(), &thaw()).unwrap().held);
    drop(server);
}

#[test]
fn a_member_that_is_not_there_is_a_veto_for_this_time() {
    let Some(server) = started() else {
        return;
    };
    let mut writer = writer(&server);
    drop(server);
    for veto in [
        writer.prepare_backup(&call(), &backup(&[])).unwrap_err(),
        writer.prepare_snapshot(&call(), &snapshot()).unwrap_err(),
    ] {
        assert_eq!(veto.code, WriterFailure::Retryable, "{veto:?}");
    }
}

#[test]
fn a_wrong_password_is_a_veto_for_good() {
    let Some(server) = started() else {
        return;
    };
    server.ask(&["user", "add", "root:right"]);
    server.ask(&["user", "grant-role", "root", "root"]);
    server.ask(&["auth", "enable"]);
    let password = server.top.path().join("password");
    let reach = Reach {
        user: Some("root".to_owned()),
        password_file: Some(password.clone()),
        ..server.reach()
    };
    let mut writer = writer_of(reach, server.roots(), Disks::default());
    let mut try_it = |text: &str| {
        std::fs::write(&password, text).unwrap();
        writer.prepare_snapshot(&call(), &snapshot())
    };
    let veto = try_it("wrong\n").unwrap_err();
    assert_eq!(veto.code, WriterFailure::Nonretryable, "{veto:?}");
    assert!(veto.message.contains("authentication failed"), "{veto:?}");
    try_it("right\n").unwrap();
    writer.freeze(&call(), &hold(10_000)).unwrap();
    assert!(writer.thaw(&call(), &thaw()).unwrap().held);
}

#[test]
fn certificates_are_asked_for_both_ways() {
    let wanted = Wanted {
        tls: true,
        ..Wanted::default()
    };
    let Some(server) = Server::start(&wanted) else {
        return;
    };
    let prepare = |reach: Reach| {
        let mut writer = writer_of(reach, server.roots(), Disks::default());
        let prepared = writer.prepare_snapshot(&call(), &snapshot());
        prepared.map(|()| writer)
    };
    let mut writer = prepare(server.reach()).unwrap();
    writer.freeze(&call(), &hold(10_000)).unwrap();
    assert_eq!(writer.still_holds(), Ok(()));
    assert!(writer.thaw(&call(), &thaw()).unwrap().held);

    let refuse = |reach: Reach| {
        let veto = prepare(reach).unwrap_err();
        assert_eq!(veto.code, WriterFailure::Nonretryable, "{veto:?}");
        veto.message
    };
    // An authority that the member's certificate is not of.
    let why = refuse(Reach {
        cacert: Some(server.pki("stranger.pem")),
        ..server.reach()
    });
    assert!(why.contains("certificate"), "{why}");
    // A certificate that the member does not know, and none.
    let (cert, key) = (server.pki("stranger.pem"), server.pki("stranger.key"));
    let strange = Reach {
        cert: Some(cert),
        key: Some(key),
        ..server.reach()
    };
    let none = Reach {
        cert: None,
        key: None,
        ..server.reach()
    };
    for reach in [strange, none] {
        // It may have no more to say of it than the end of the connection.
        prepare(reach).unwrap_err();
    }
    let missing = refuse(Reach {
        cacert: Some("/nowhere".into()),
        ..server.reach()
    });
    assert!(missing.contains("/nowhere"), "{missing}");
    refuse(Reach {
        cacert: None,
        ..server.reach()
    });
}

#[test]
fn another_member_or_an_earlier_one_is_not_the_one_that_was_frozen() {
    let before = Position {
        member_id: 7,
        cluster_id: 8,
        version: "3.4.23".into(),
        revision: 10,
        raft_term: 2,
        raft_index: 20,
        raft_applied_index: 20,
        leader: Some(7),
        is_learner: false,
        db_bytes: 1,
    };
    let later = Position {
        revision: 11,
        raft_term: 3,
        raft_index: 21,
        raft_applied_index: 21,
        leader: None,
        ..before.clone()
    };
    assert!(before.follows(&before) && later.follows(&before));
    assert!(!before.follows(&later));
    for other in [
        Position {
            member_id: 9,
            ..later.clone()
        },
        Position {
            cluster_id: 9,
            ..later
        },
    ] {
        assert!(!other.follows(&before));
    }
}
