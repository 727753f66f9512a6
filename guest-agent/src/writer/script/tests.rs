//! What is refused, and what becomes of scripts that fail or hang. Run as root or any other user.

use super::*;
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
        match scan(self.0.path()).remove(0) {
            Directory::Refused(_, why) => why,
            Directory::Writer(..) => panic!("it was trusted"),
        }
    }
}

/// In a unit test the binary is the test runner, which cannot become a script: run without a control group.
fn run_here(top: &Top, event: &str, limit_ms: u64) -> Result<Value, Failure> {
    let directory = top.0.path().join("w");
    let path = directory.join(event);
    trust::executable(&path).unwrap();
    let killer = Killer::default();
    let process = Process {
        path: &path,
        environment: &[("VSS_SET", "s")],
        limit: Duration::from_millis(limit_ms),
    };
    match process.run_without_group(&killer).unwrap() {
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
    let Directory::Writer(_, identity) = scan(top.0.path()).remove(0) else {
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
        scan(top.0.path()).remove(0),
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
fn links_empty_directories_and_unknown_settings_are_refused() {
    let top = Top::new();
    top.script("w", "freeze", "true");
    let freeze = top.0.path().join("w/freeze");
    fs::rename(&freeze, top.0.path().join("w/elsewhere")).unwrap();
    assert!(top.refusal().contains("none of"));
    symlink(top.0.path().join("w/elsewhere"), &freeze).unwrap();
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
