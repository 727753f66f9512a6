//! The writer against real databases: what it holds, and what it owns up to.

use super::*;
use guest_agent_wire::types::WriterFailure;

const DEADLINE: Duration = Duration::from_millis(800);

fn sources() -> Sources {
    Sources {
        proc: "/proc".into(),
        sys: "/sys".into(),
        only_under: None,
    }
}

struct Bench {
    top: tempfile::TempDir,
    writer: SqliteWriter,
}

impl Bench {
    /// With these databases, in this journal mode.
    fn new(names: &[&str], mode: &str) -> Self {
        let top = tempfile::tempdir().unwrap();
        let mut databases = Vec::new();
        for name in names {
            let path = top.path().join(name);
            let connection = Connection::open(&path).unwrap();
            connection
                .query_row(&format!("PRAGMA journal_mode={mode}"), [], |_| Ok(()))
                .unwrap();
            connection
                .execute_batch("CREATE TABLE t (x); INSERT INTO t VALUES (1)")
                .unwrap();
            databases.push(path);
        }
        let identity = Identity {
            instance_id: "i".into(),
            name: "n".into(),
            level: Level::BackEnd,
            freeze_timeout_ms: 10_000,
        };
        Self {
            top,
            writer: SqliteWriter::new(identity, databases, sources()),
        }
    }

    fn application(&self, name: &str) -> Connection {
        let connection = Connection::open(self.top.path().join(name)).unwrap();
        connection.busy_timeout(Duration::ZERO).unwrap();
        connection
    }

    fn freeze(&mut self) -> Result<Value, Veto> {
        let snapshot = PrepareSnapshot { set: "s".into() };
        self.writer.prepare_snapshot(&call(), &snapshot).unwrap();
        self.writer.freeze(&call(), &hold())
    }
}

fn call() -> Call<'static> {
    Call::alone(DEADLINE)
}

fn hold() -> Freeze {
    Freeze {
        set: "s".into(),
        generation: 1,
        hold_ms: 10_000,
    }
}

fn thaw() -> Thaw {
    Thaw {
        set: "s".into(),
        generation: 1,
    }
}

fn insert(connection: &Connection) -> bool {
    connection.execute("INSERT INTO t VALUES (2)", []).is_ok()
}

#[test]
fn no_application_can_write_while_frozen_and_all_can_afterwards() {
    for mode in ["WAL", "DELETE"] {
        let mut bench = Bench::new(&["a", "b"], mode);
        let applications = [bench.application("a"), bench.application("b")];
        let evidence = bench.freeze().unwrap();
        for application in &applications {
            assert!(!insert(application), "{mode}");
            let count: i64 = application
                .query_row("SELECT count(*) FROM t", [], |row| row.get(0))
                .unwrap();
            assert_eq!(count, 1, "reading goes on");
        }
        let held = bench.writer.thaw(&call(), &thaw()).unwrap();
        assert!(held.held);
        assert_eq!(held.evidence, evidence);
        for application in &applications {
            assert!(insert(application), "{mode}");
        }
    }
}

#[test]
fn a_checkpoint_while_frozen_is_not_taken_for_a_write() {
    let mut bench = Bench::new(&["a"], "WAL");
    let application = bench.application("a");
    let reader = bench.application("a");
    // An old reader keeps the log from being emptied at prepare.
    reader.execute_batch("BEGIN").unwrap();
    reader
        .query_row("SELECT count(*) FROM t", [], |_| Ok(()))
        .unwrap();
    assert!(insert(&application));
    let evidence = bench.freeze().unwrap();
    reader.execute_batch("COMMIT").unwrap();
    application
        .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()))
        .unwrap();
    let held = bench.writer.thaw(&call(), &thaw()).unwrap();
    assert!(held.held);
    assert_eq!(held.evidence, evidence);
}

#[test]
fn a_database_that_is_busy_for_too_long_is_a_retryable_veto_and_nothing_stays_locked() {
    let mut bench = Bench::new(&["a", "b"], "WAL");
    let busy = bench.application("b");
    busy.execute_batch("BEGIN IMMEDIATE").unwrap();
    let veto = bench.freeze().unwrap_err();
    assert_eq!(veto.code, WriterFailure::Retryable);
    assert!(
        veto.message.contains("/b: BEGIN IMMEDIATE"),
        "{}",
        veto.message
    );
    assert!(insert(&bench.application("a")), "the first stayed locked");
}

#[test]
fn a_lost_transaction_is_owned_up_to() {
    let mut bench = Bench::new(&["a"], "WAL");
    bench.freeze().unwrap();
    assert_eq!(bench.writer.still_holds(), Ok(()));
    let lost = &bench.writer.open[0].connection;
    lost.execute_batch("ROLLBACK").unwrap();
    let why = bench.writer.still_holds().unwrap_err();
    assert!(why.contains("transaction has ended"), "{why}");
    assert!(!bench.writer.thaw(&call(), &thaw()).unwrap().held);
}

/// Puts a database of its own in the place of this one, as an application does that writes a new file and renames it.
fn replace(bench: &Bench, name: &str) {
    let new = bench.top.path().join("new");
    std::fs::copy(bench.top.path().join(name), &new).unwrap();
    std::fs::rename(&new, bench.top.path().join(name)).unwrap();
}

#[test]
fn a_file_that_was_replaced_is_not_locked_and_that_is_owned_up_to() {
    let mut bench = Bench::new(&["a", "b"], "DELETE");
    bench.freeze().unwrap();
    replace(&bench, "b");
    assert!(insert(&bench.application("b")), "nobody holds the new one");
    let why = bench.writer.still_holds().unwrap_err();
    assert!(why.contains("/b: it is another file now"), "{why}");
    assert!(!bench.writer.thaw(&call(), &thaw()).unwrap().held);

    // Between prepare and freeze it is a veto, with nothing locked.
    let snapshot = PrepareSnapshot { set: "s".into() };
    bench.writer.prepare_snapshot(&call(), &snapshot).unwrap();
    replace(&bench, "b");
    let veto = bench.writer.freeze(&call(), &hold()).unwrap_err();
    assert_eq!(veto.code, WriterFailure::Retryable, "{}", veto.message);
    assert!(insert(&bench.application("a")));
    bench.freeze().unwrap();
}

#[test]
fn an_abort_lets_everybody_write_in_any_state_and_the_thaw_after_it_held_nothing() {
    let mut bench = Bench::new(&["a"], "DELETE");
    bench.writer.abort("s", "early");
    bench.freeze().unwrap();
    bench.writer.abort("s", "late");
    bench.writer.abort("s", "again");
    assert!(insert(&bench.application("a")));
    assert!(!bench.writer.thaw(&call(), &thaw()).unwrap().held);
}

#[test]
fn a_missing_database_is_a_veto_and_is_not_made() {
    let mut bench = Bench::new(&["a"], "WAL");
    let missing = bench.top.path().join("missing");
    bench.writer.databases.push(missing.clone());
    let snapshot = PrepareSnapshot { set: "s".into() };
    assert!(bench.writer.prepare_snapshot(&call(), &snapshot).is_err());
    assert!(!missing.exists());
}

#[test]
fn a_file_that_is_no_database_is_a_veto_for_good() {
    let mut bench = Bench::new(&[], "WAL");
    let path = bench.top.path().join("text");
    std::fs::write(
        &path,
        "no database at all, but long enough to have a header ".repeat(40),
    )
    .unwrap();
    bench.writer.databases.push(path);
    let veto = bench.freeze().unwrap_err();
    assert_eq!(veto.code, WriterFailure::Nonretryable, "{}", veto.message);
}

/// A guest whose only file system lies on a disk with serial `data`.
fn guest_with_one_disk() -> tempfile::TempDir {
    let guest = tempfile::tempdir().unwrap();
    let write = |path: &str, text: &str| {
        let path = guest.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("proc/1/mountinfo", "1 1 254:0 / / rw - ext4 /dev/vda rw\n");
    write("sys/dev/block/254:0/size", "8\n");
    write("sys/dev/block/254:0/serial", "data\n");
    guest
}

#[test]
fn a_set_without_the_databases_disk_is_inconsistent() {
    let mut bench = Bench::new(&["a"], "WAL");
    let guest = guest_with_one_disk();
    bench.writer.sources = Sources {
        proc: guest.path().join("proc"),
        sys: guest.path().join("sys"),
        only_under: None,
    };
    let mut ask = |disks: &[&str]| {
        let disks: Vec<String> = disks.iter().map(|disk| (*disk).to_owned()).collect();
        let backup = PrepareBackup {
            disks,
            ..PrepareBackup::default()
        };
        bench.writer.prepare_backup(&call(), &backup)
    };
    assert_eq!(ask(&[]), Ok(Vec::new()));
    assert_eq!(ask(&["other", "data"]), Ok(Vec::new()));
    let veto = ask(&["other"]).unwrap_err();
    assert_eq!(veto.code, WriterFailure::Inconsistentsnapshot);
    assert!(veto.message.contains("data"));
}

#[test]
fn the_document_names_every_file_that_a_database_is_made_of() {
    let mut bench = Bench::new(&["a", "b"], "WAL");
    let document = bench.writer.identify(&call()).unwrap();
    assert_eq!(document.check(), Ok(()));
    let top = bench.top.path().to_str().unwrap();
    let component = document.component(top, "b").unwrap();
    let names: Vec<&str> = component
        .file_sets()
        .map(|files| files.spec.as_str())
        .collect();
    assert_eq!(names, ["b", "b-wal", "b-journal"]);
    assert!(component.file_sets().all(|files| files.path == top));
    assert_eq!(document.excludes[1].spec, "b-shm");
}
