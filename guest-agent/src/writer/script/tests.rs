//! What is refused, and what becomes of scripts that fail or hang. Run as root or any other user.

use super::process::{Job, Outcome};
use super::*;
use guest_agent_wire::types::Level;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::time::Instant;

struct Top(tempfile::TempDir);

impl Top {
    fn new() -> Self {
        let top = tempfile::tempdir().unwrap();
        fs::set_permissions(top.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self(top)
    }

    fn script(&self, writer: &str, event: &str, text: &str) -> PathBuf {
        let directory = self.0.path().join(writer);
        fs::create_dir_all(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
        let path = directory.join(event);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn refusal(&self) -> String {
        match own::scan(self.0.path()).remove(0) {
            Directory::Refused(_, why) => why,
            Directory::Writer(..) => panic!("it was trusted"),
        }
    }
}

/// In a unit test the binary is the test runner, which cannot become a script: run without a control group.
fn run_here(top: &Top, event: &str, limit_ms: u64) -> Result<Value, Failure> {
    let job = Job {
        program: &top.0.path().join("w").join(event),
        arguments: &[],
        environment: &[("VSS_SET", "s".to_owned())],
        input: b"{}\n",
        limit: Duration::from_millis(limit_ms),
    };
    match job.run_plain(&Killer::default(), None).unwrap() {
        Outcome::Succeeded { output } => Ok(as_value(&output)),
        Outcome::Failed { status, message } => Err(failure(
            WriterFailure::Retryable,
            format!("{status}: {message}"),
        )),
        Outcome::Killed => Err(failure(WriterFailure::NotResponding, "killed")),
    }
}

#[test]
fn a_directory_is_a_writer_with_the_settings_of_its_json() {
    let top = Top::new();
    top.script("db", "freeze", "true");
    let json = top.0.path().join("db/writer.json");
    fs::write(&json, r#"{"level":"BACK_END","freeze_timeout_ms":500}"#).unwrap();
    fs::set_permissions(&json, fs::Permissions::from_mode(0o644)).unwrap();
    let Directory::Writer(_, identity) = own::scan(top.0.path()).remove(0) else {
        panic!("it was refused");
    };
    assert_eq!(identity.level, Level::BackEnd);
    assert_eq!(identity.freeze_timeout_ms, 500);
    assert_eq!(identity.instance_id, "script:db");
}

#[test]
fn what_others_can_change_is_refused() {
    let top = Top::new();
    let script = top.script("w", "freeze", "true");
    assert!(matches!(
        own::scan(top.0.path()).remove(0),
        Directory::Writer(..)
    ));
    for mode in [0o775, 0o757] {
        fs::set_permissions(&script, fs::Permissions::from_mode(mode)).unwrap();
        assert!(top.refusal().contains("can be changed"));
    }
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let directory = top.0.path().join("w");
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(top.refusal().contains("can be changed"));
}

#[test]
fn a_directory_above_that_others_can_change_is_no_better() {
    let top = Top::new();
    let inner = top.0.path().join("inner");
    fs::create_dir_all(inner.join("w")).unwrap();
    fs::write(inner.join("w/freeze"), "#!/bin/sh\n").unwrap();
    for path in [inner.join("w/freeze"), inner.join("w"), inner.clone()] {
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    assert!(matches!(own::scan(&inner).remove(0), Directory::Writer(..)));
    fs::set_permissions(top.0.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let Directory::Refused(_, why) = own::scan(&inner).remove(0) else {
        panic!("it was trusted");
    };
    assert!(why.contains("can be changed"), "{why}");
}

#[test]
fn what_belongs_to_another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can give a file away");
        return;
    }
    let top = Top::new();
    let script = top.script("w", "freeze", "true");
    std::os::unix::fs::chown(&script, Some(65_534), None).unwrap();
    assert!(top.refusal().contains("does not belong to root"));
}

#[test]
fn a_command_reads_the_event_and_one_that_does_not_read_is_not_held_up() {
    let top = Top::new();
    top.script("w", "freeze", "read line; echo \"$line\"");
    assert_eq!(run_here(&top, "freeze", 5_000).unwrap(), json!({}));
    let long = vec![b'x'; 900_000];
    let job = Job {
        program: "/bin/true".as_ref(),
        arguments: &[],
        environment: &[],
        input: &long,
        limit: Duration::from_secs(30),
    };
    let outcome = job.run_plain(&Killer::default(), None).unwrap();
    assert!(matches!(outcome, Outcome::Succeeded { .. }));
}

#[test]
fn a_command_that_was_given_up_before_its_start_is_not_started() {
    let top = Top::new();
    let ran = top.0.path().join("ran");
    let script = top.script("w", "freeze", &format!("touch {}", ran.display()));
    let killer = Killer::default();
    let time = killer.kill();
    let job = Job {
        program: &script,
        arguments: &[],
        environment: &[],
        input: &[],
        limit: Duration::from_secs(30),
    };
    killer.kill();
    assert!(matches!(
        job.run_plain(&killer, Some(time)),
        Ok(Outcome::Killed)
    ));
    assert!(!ran.exists());
}

#[test]
fn places_in_the_line_are_taken_in_order_and_a_lost_one_holds_up_nobody() {
    let line = Arc::new(Line::default());
    let (first, lost, last) = (line.join(), line.join(), line.join());
    let (sender, order) = std::sync::mpsc::channel();
    let of_last = sender.clone();
    let waits = std::thread::spawn(move || {
        last.wait();
        of_last.send("last").unwrap();
    });
    drop(lost);
    first.wait();
    sender.send("first").unwrap();
    drop(first);
    waits.join().unwrap();
    assert_eq!(order.try_iter().collect::<Vec<_>>(), ["first", "last"]);
}

#[test]
fn a_link_is_followed_where_nobody_else_can_change_where_it_leads() {
    let top = Top::new();
    top.script("w", "freeze", "true");
    let freeze = top.0.path().join("w/freeze");
    // A link to a link in another directory, by a relative way.
    let (by, target) = (top.0.path().join("by"), top.0.path().join("target"));
    for directory in [&by, &target] {
        fs::create_dir(directory).unwrap();
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::rename(&freeze, target.join("real")).unwrap();
    symlink("../target/real", by.join("link")).unwrap();
    symlink("../by/link", &freeze).unwrap();
    check_executable(&freeze).unwrap();
    assert!(matches!(
        own::scan(&top.0.path().join("w/..")).last(),
        Some(Directory::Writer(..))
    ));
    // Whoever can change a directory on the way can exchange the link there, though the file and where it lies are sound.
    fs::set_permissions(&by, fs::Permissions::from_mode(0o777)).unwrap();
    let why = check_executable(&freeze).unwrap_err();
    assert!(why.contains("can be changed"), "{why}");
    fs::set_permissions(&by, fs::Permissions::from_mode(0o755)).unwrap();
    fs::remove_file(by.join("link")).unwrap();
    symlink("link", by.join("link")).unwrap();
    let why = check_executable(&freeze).unwrap_err();
    assert!(why.contains("too many links"), "{why}");
}

#[test]
fn a_link_in_the_way_to_a_script_that_others_can_exchange_is_refused() {
    let top = Top::new();
    top.script("w", "freeze", "true");
    let open = top.0.path().join("open");
    fs::create_dir(&open).unwrap();
    symlink(top.0.path().join("w"), open.join("w")).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    let why = check_executable(&open.join("w/freeze")).unwrap_err();
    assert!(why.contains("open can be changed"), "{why}");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
    check_executable(&open.join("w/freeze")).unwrap();
}

#[test]
fn links_to_nothing_empty_directories_and_unknown_settings_are_refused() {
    let top = Top::new();
    top.script("w", "freeze", "true");
    let freeze = top.0.path().join("w/freeze");
    fs::rename(&freeze, top.0.path().join("w/elsewhere")).unwrap();
    assert!(top.refusal().contains("none of"));
    symlink(top.0.path().join("w/nothing"), &freeze).unwrap();
    assert!(top.refusal().contains("none of"));
    fs::remove_file(&freeze).unwrap();
    symlink(top.0.path(), &freeze).unwrap();
    assert!(top.refusal().contains("not a plain file"));
    fs::remove_file(&freeze).unwrap();
    fs::rename(top.0.path().join("w/elsewhere"), &freeze).unwrap();
    let json = top.0.path().join("w/writer.json");
    fs::write(&json, r#"{"levle":"BACK_END"}"#).unwrap();
    fs::set_permissions(&json, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(top.refusal().contains("levle"));
}

#[test]
fn output_is_evidence_and_standard_error_is_the_veto() {
    let top = Top::new();
    top.script("w", "thaw", "echo '{\"lsn\": 5}'");
    assert_eq!(
        run_here(&top, "thaw", 5_000).unwrap(),
        serde_json::json!({"lsn": 5})
    );
    top.script("w", "freeze", "echo tables are busy >&2; exit 3");
    let failed = run_here(&top, "freeze", 5_000).unwrap_err();
    assert!(failed.message.contains("tables are busy"));
    assert!(failed.message.contains('3'));
}

#[test]
fn a_script_that_hangs_is_killed_with_its_children() {
    let top = Top::new();
    let file = top.0.path().join("child");
    top.script(
        "w",
        "freeze",
        &format!("sleep 600 & echo $! > {}; wait", file.display()),
    );
    let start = Instant::now();
    let failed = run_here(&top, "freeze", 500).unwrap_err();
    assert_eq!(failed.code, WriterFailure::NotResponding);
    assert!(start.elapsed() < Duration::from_secs(10));
    let child = fs::read_to_string(&file).unwrap();
    let stat = PathBuf::from(format!("/proc/{}/stat", child.trim()));
    let limit = Instant::now() + Duration::from_secs(10);
    while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z")) {
        assert!(Instant::now() < limit, "the child lives");
        std::thread::yield_now();
    }
}

#[test]
fn a_child_that_keeps_the_pipes_open_is_not_waited_for() {
    let top = Top::new();
    top.script("w", "freeze", "sleep 600 & echo done");
    let start = Instant::now();
    assert_eq!(run_here(&top, "freeze", 60_000).unwrap(), "done");
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn endless_output_is_cut() {
    let top = Top::new();
    top.script("w", "freeze", "head -c 1000000 /dev/zero | tr '\\0' x");
    let Value::String(text) = run_here(&top, "freeze", 20_000).unwrap() else {
        panic!("no text");
    };
    assert_eq!(text.len(), 64 * 1024);
}
