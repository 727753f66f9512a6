//! The example writer in Python, made from PROTOCOL.md alone, against the real agent: sets, loss of the agent, its own timer,
//! a restore.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use rig::{Bridge, Rig, can_run, wait_until};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The example, ended with the test.
struct Log {
    process: Child,
    file: PathBuf,
}

impl Log {
    fn start(rig: &Rig, freeze_timeout_ms: u64) -> Self {
        let file = rig.mountpoint("a").join("log");
        let example = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/log_writer.py");
        let process = Command::new("python3")
            .arg(example)
            .arg(&file)
            .arg("--socket")
            .arg(rig.path("run/writers.sock"))
            .arg("--freeze-timeout-ms")
            .arg(freeze_timeout_ms.to_string())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let log = Self { process, file };
        log.registered(rig);
        log.grows();
        log
    }

    fn registered(&self, rig: &Rig) {
        wait_until("it registers", || {
            rig.bridge().status()["writers"][0]["class_id"] == "example-log"
        });
    }

    fn grows(&self) {
        let before = lines(&self.file);
        wait_until("the application writes", || lines(&self.file) > before);
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.process.kill().unwrap_or(());
        self.process.wait().map(drop).unwrap_or(());
    }
}

fn lines(file: &Path) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    u64::try_from(text.lines().count()).unwrap()
}

fn position(writers: &Value) -> u64 {
    let position = &writers[0]["evidence"]["position"];
    position.as_u64().unwrap()
}

fn prepare(bridge: &mut Bridge) {
    bridge.prepare();
}

#[test]
fn the_copy_holds_every_line_that_was_written_and_no_other() {
    if !can_run(&["python3"]) {
        return;
    }
    let mut rig = Rig::with("ext4");
    let log = Log::start(&rig, 20_000);
    let mut bridge = rig.bridge();
    let identified = bridge.ok("identify", json!({}));
    let component = &identified["writers"][0]["metadata"]["components"][0];
    assert_eq!(component["name"], "log");
    assert_eq!(
        component["database_files"][0]["path"],
        rig.mountpoint_text("a")
    );
    let picked = json!([{"writer": "example-log", "components": [{"name": "log"}]}]);
    bridge.ok(
        "prepare",
        json!({"set": "s", "limit_ms": 20_000, "component_mode": true, "components": picked}),
    );
    let frozen = bridge.freeze();
    let at_freeze = position(&frozen["writers"]);
    let image = rig.path("copy.img");
    fs::copy(rig.path("a.img"), &image).unwrap();
    let thawed = bridge.thaw(&frozen);
    assert_eq!(thawed["held"], true, "{thawed:#}");
    log.grows();
    let said = bridge.ok("post_snapshot", json!({"set": "s", "kept": true}));
    let stamp = &said["writers"][0]["components"][0]["stamp"];
    assert_eq!(*stamp, at_freeze.to_string(), "{said:#}");
    bridge.ok("backup_complete", json!({"set": "s", "succeeded": true}));
    log.grows();
    let file = image.to_str().unwrap().to_owned();
    let copy = rig.mount_with("copy", &["-o", "loop", &file]);
    let text = fs::read_to_string(copy.join("log")).unwrap();
    assert!(text.ends_with(&format!("{at_freeze}\n")), "{at_freeze}");
    assert_eq!(lines(&copy.join("log")), at_freeze);
}

#[test]
fn it_refuses_what_it_cannot_do_and_nothing_is_held_afterwards() {
    if !can_run(&["python3"]) {
        return;
    }
    let rig = Rig::with("ext4");
    let log = Log::start(&rig, 20_000);
    let mut bridge = rig.bridge();
    let arguments = json!({"set": "s", "limit_ms": 20_000, "backup_type": "log"});
    let refused = bridge.error("prepare", arguments);
    assert_eq!(refused["code"], "WRITER_VETO");
    assert_eq!(refused["retryable"], false);
    log.grows();
    prepare(&mut bridge);
    bridge.freeze();
    bridge.abort();
    log.grows();
}

#[test]
fn it_goes_on_when_the_agent_is_killed_and_registers_with_the_next_one() {
    if !can_run(&["python3"]) {
        return;
    }
    let mut rig = Rig::with("ext4");
    let log = Log::start(&rig, 20_000);
    let mut bridge = rig.bridge();
    prepare(&mut bridge);
    bridge.freeze();
    rig.kill_agent();
    log.grows();
    rig.start();
    log.registered(&rig);
    let mut bridge = rig.bridge();
    prepare(&mut bridge);
    let frozen = bridge.freeze();
    assert_eq!(bridge.thaw(&frozen)["held"], true);
}

#[test]
fn its_own_timer_lets_the_application_go_when_the_agent_is_stuck() {
    if !can_run(&["python3"]) {
        return;
    }
    let rig = Rig::with("ext4");
    let log = Log::start(&rig, 1_500);
    let mut bridge = rig.bridge();
    prepare(&mut bridge);
    let frozen = bridge.ok(
        "freeze",
        json!({"set": "s", "hold_ms": 1_000, "writer_ms": 60_000}),
    );
    let pid = rig.agent_pid().to_string();
    rig::run("kill", &["-STOP", &pid]);
    // The helper thaws the file system; only the writer itself can let the application go.
    log.grows();
    rig::run("kill", &["-CONT", &pid]);
    let thaw = json!({"set": "s", "generation": frozen["generation"]});
    assert_eq!(bridge.error("thaw", thaw)["code"], "HOLD_BROKEN");
}

#[test]
fn it_lets_go_of_its_file_for_a_restore_and_takes_up_what_it_finds() {
    if !can_run(&["python3"]) {
        return;
    }
    let rig = Rig::with("ext4");
    let log = Log::start(&rig, 20_000);
    let mut bridge = rig.bridge();
    let restore = |restored: Value| {
        let mut component = json!({"name": "log"});
        if !restored.is_null() {
            component["restored"] = restored;
        }
        json!({"set": "r", "writers": [{"writer": "example-log", "components": [component]}]})
    };
    bridge.ok("pre_restore", restore(Value::Null));
    let new = rig.mountpoint("a").join("new");
    fs::write(&new, "1\n2\n3\n").unwrap();
    fs::rename(&new, &log.file).unwrap();
    bridge.ok("post_restore", restore(json!("ALL")));
    wait_until("it goes on from there", || {
        fs::read_to_string(&log.file)
            .unwrap()
            .starts_with("1\n2\n3\n4\n")
    });
    // Given up in the middle: it goes on as well.
    bridge.ok("pre_restore", restore(Value::Null));
    drop(bridge);
    log.grows();
}
