//! The SQLite writer, the agent and a busy application together: the image of the frozen disk holds exactly what the
//! application was told is committed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use guest_agent::filesystem::plan::Sources;
use guest_agent_wire::sdk;
use guest_agent_wire::types::Level;
use rig::{Rig, can_run, wait_until};
use rusqlite::Connection;
use serde_json::json;
use sqlite_writer::{Identity, SqliteWriter};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

fn rows(database: &Path) -> (u64, String) {
    let connection = Connection::open(database).unwrap();
    let check = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0));
    let count = connection.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0));
    (u64::try_from(count.unwrap()).unwrap(), check.unwrap())
}

#[test]
fn the_frozen_image_holds_every_acknowledged_transaction_and_no_other() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::with("ext4");
    let database = rig.mountpoint("a").join("app.db");
    let setup = Connection::open(&database).unwrap();
    setup
        .query_row("PRAGMA journal_mode=WAL", [], |_| Ok(()))
        .unwrap();
    setup.execute_batch("CREATE TABLE t (x)").unwrap();
    drop(setup);

    let socket = rig.path("run/writers.sock");
    let files = vec![database.clone()];
    // Ends with the test's process: the library serves for ever.
    std::thread::spawn(move || {
        let identity = Identity {
            instance_id: "sqlite:test".into(),
            name: "SQLite".into(),
            level: Level::BackEnd,
            freeze_timeout_ms: 20_000,
        };
        let sources = Sources {
            proc: "/proc".into(),
            sys: "/sys".into(),
            only_under: None,
        };
        sdk::run(&mut SqliteWriter::new(identity, files, sources), &socket)
    });
    wait_until("the writer registers", || {
        rig.bridge().status()["writers"][0]["name"] == "SQLite"
    });

    let acknowledged = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let (count, over, path) = (
        Arc::clone(&acknowledged),
        Arc::clone(&stop),
        database.clone(),
    );
    let application = std::thread::spawn(move || {
        let connection = Connection::open(path).unwrap();
        connection.busy_timeout(Duration::from_secs(60)).unwrap();
        while !over.load(Ordering::SeqCst) {
            connection.execute("INSERT INTO t VALUES (1)", []).unwrap();
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    wait_until("it is busy", || acknowledged.load(Ordering::SeqCst) > 20);

    let mut bridge = rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    let image = rig.path("copy.img");
    std::fs::copy(rig.path("a.img"), &image).unwrap();
    // Nobody is told of a commit between the copy and the thaw, so this is what was told before the freeze.
    let before_thaw = acknowledged.load(Ordering::SeqCst);
    let thawed = bridge.thaw(&frozen);
    assert_eq!(thawed["held"], true, "{thawed:#}");
    bridge.ok("post_snapshot", json!({"set": "s", "kept": true}));
    wait_until("it goes on", || {
        acknowledged.load(Ordering::SeqCst) > before_thaw
    });
    stop.store(true, Ordering::SeqCst);
    application.join().unwrap();

    let file = image.to_str().unwrap().to_owned();
    let copy = rig.mount_with("copy", &["-o", "loop", &file]);
    let (count, check) = rows(&copy.join("app.db"));
    assert_eq!(check, "ok");
    assert_eq!(count, before_thaw);
}
