//! Script writers in order, and the hooks of QEMU, VMware and Azure as those programs read them, in real sets.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use rig::{Bridge, Rig, can_run, freeze_arguments, is_frozen, wait_until};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::PathBuf;

/// A rig whose scripts write what they do into one file on a tmpfs.
struct Hooks {
    rig: Rig,
    order: PathBuf,
}

impl Hooks {
    fn new() -> Self {
        let rig = Rig::with("ext4");
        let order = rig.path("run/order");
        Self { rig, order }
    }

    /// An executable below the directory that stands for `/`, which first notes its name and arguments.
    fn hook(&self, path: &str, text: &str) -> PathBuf {
        let file = self.rig.path("root").join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        let order = self.order.display();
        let text = format!("#!/bin/sh\necho ${{0##*/}} \"$@\" >> {order}\n{text}\n");
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o700)).unwrap();
        file
    }

    /// A file that nobody runs.
    fn file(&self, path: &str, text: &str, mode: u32) -> PathBuf {
        let file = self.rig.path("root").join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    /// What was done since the last time.
    fn done(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.order).unwrap_or_default();
        fs::remove_file(&self.order).unwrap_or(());
        text.lines().map(str::to_owned).collect()
    }

    fn whole_set(&self) -> Value {
        let mut bridge = self.rig.bridge();
        bridge.prepare();
        let frozen = bridge.freeze();
        assert!(is_frozen(&self.rig.mountpoint("a")));
        let thawed = bridge.thaw(&frozen);
        bridge.ok("post_snapshot", json!({"set": "s", "kept": true}));
        thawed
    }

    fn refused_freeze(&self) -> Value {
        let mut bridge = self.rig.bridge();
        bridge.prepare();
        let error = bridge.error("freeze", freeze_arguments(10_000));
        assert!(!is_frozen(&self.rig.mountpoint("a")));
        error
    }

    fn refused_prepare(&self) -> Value {
        let mut bridge = self.rig.bridge();
        bridge.error("prepare", json!({"set": "s", "limit_ms": 20_000}))
    }
}

fn message(error: &Value) -> &str {
    error["message"].as_str().unwrap()
}

/// Names of the writers with their metadata documents.
fn identified(bridge: &mut Bridge) -> Vec<(String, Value)> {
    let said = bridge.ok("identify", json!({}));
    said["writers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|writer| {
            let name = writer["instance_id"].as_str().unwrap().to_owned();
            (name, writer["metadata"].clone())
        })
        .collect()
}

/// What QEMU ships as its hook, as Debian installs it: it runs the directory, and hides what the scripts answer.
const SHIPPED: &str = "/etc/qemu/fsfreeze-hook";

/// `None`, said aloud, where it is not installed; in CI that is a failure.
fn shipped() -> Option<String> {
    let text = fs::read_to_string(SHIPPED).ok();
    if text.is_none() {
        assert!(std::env::var("CI").is_err(), "no {SHIPPED} (`make deps`)");
        eprintln!("SKIPPED: no {SHIPPED} (package qemu-guest-agent)");
    }
    text
}

#[test]
fn scripts_freeze_ascending_and_thaw_descending_one_after_the_other() {
    if !can_run(&[]) {
        return;
    }
    let hooks = Hooks::new();
    let order = hooks.order.display();
    for name in ["30-c", "10-a", "20-b"] {
        for event in ["freeze", "thaw"] {
            let text = format!("echo +{name} >> {order}; sleep 0.05; echo -{name} >> {order}");
            hooks.rig.script(name, event, &text);
        }
    }
    assert_eq!(hooks.whole_set()["held"], true);
    let ascending = ["+10-a", "-10-a", "+20-b", "-20-b", "+30-c", "-30-c"];
    let descending = ["+30-c", "-30-c", "+20-b", "-20-b", "+10-a", "-10-a"];
    assert_eq!(hooks.done(), [ascending, descending].concat());
}

#[test]
fn after_a_veto_only_what_was_begun_is_undone_and_that_in_descending_order() {
    if !can_run(&[]) {
        return;
    }
    let hooks = Hooks::new();
    let order = hooks.order.display();
    for (name, end) in [("10-a", "true"), ("20-b", "false"), ("30-c", "true")] {
        hooks.rig.script(
            name,
            "freeze",
            &format!("echo freeze {name} >> {order}; {end}"),
        );
        hooks
            .rig
            .script(name, "thaw", &format!("echo thaw {name} >> {order}"));
    }
    let error = hooks.refused_freeze();
    assert_eq!(error["code"], "WRITER_VETO");
    assert!(message(&error).contains("20-b"));
    let done = hooks.done();
    assert_eq!(done[..2], ["freeze 10-a", "freeze 20-b"]);
    // The next in the line may have begun before the veto was heard; then it is undone as well.
    let rest: Vec<&str> = done[2..].iter().map(String::as_str).collect();
    let allowed = [
        vec!["thaw 20-b", "thaw 10-a"],
        vec!["freeze 30-c", "thaw 30-c", "thaw 20-b", "thaw 10-a"],
    ];
    assert!(allowed.contains(&rest), "{done:?}");
}

#[test]
fn all_events_of_a_set_and_of_a_restore_reach_a_script() {
    if !can_run(&[]) {
        return;
    }
    let hooks = Hooks::new();
    let order = hooks.order.display();
    let events = [
        "identify",
        "prepare-backup",
        "prepare",
        "freeze",
        "thaw",
        "post-snapshot",
        "backup-complete",
        "backup-shutdown",
        "abort",
        "pre-restore",
        "post-restore",
    ];
    for event in events {
        hooks.rig.script(
            "db",
            event,
            &format!("echo ${{0##*/}} $VSS_EVENT $VSS_SET >> {order}"),
        );
    }
    hooks.whole_set();
    let mut bridge = hooks.rig.bridge();
    // The conversation that made the set has ended: nobody will tell how its backup went.
    wait_until("the shutdown is told", || {
        fs::read_to_string(&hooks.order).is_ok_and(|text| text.contains("backup-shutdown"))
    });
    let line = |event: &str, set: &str| format!("{event} {event} {set}").trim_end().to_owned();
    let of_set = |events: &[&str], set: &str| -> Vec<String> {
        events.iter().map(|event| line(event, set)).collect()
    };
    let mut set = vec![
        "prepare-backup",
        "prepare",
        "freeze",
        "thaw",
        "post-snapshot",
    ];
    set.push("backup-shutdown");
    assert_eq!(hooks.done(), of_set(&set, "s"));

    bridge.prepare();
    let frozen = bridge.freeze();
    bridge.thaw(&frozen);
    bridge.ok("post_snapshot", json!({"set": "s", "kept": true}));
    bridge.ok("backup_complete", json!({"set": "s", "succeeded": true}));
    set.pop();
    set.push("backup-complete");
    assert_eq!(hooks.done(), of_set(&set, "s"));

    let restore = json!({"set": "r", "writers": [{"writer": "db"}]});
    bridge.ok("pre_restore", restore.clone());
    bridge.ok("post_restore", restore);
    assert_eq!(hooks.done(), of_set(&["pre-restore", "post-restore"], "r"));

    bridge.prepare();
    bridge.abort();
    assert_eq!(
        hooks.done(),
        of_set(&["prepare-backup", "prepare", "abort"], "s")
    );
    bridge.ok("identify", json!({}));
    assert_eq!(hooks.done(), ["identify identify"]);
}

#[test]
fn scripts_beside_qemus_own_hook_are_run_directly_once_and_can_refuse() {
    if !can_run(&[]) {
        return;
    }
    let Some(shipped) = shipped() else {
        return;
    };
    let hooks = Hooks::new();
    hooks.file("etc/qemu/fsfreeze-hook", &shipped, 0o755);
    hooks.hook("etc/qemu/fsfreeze-hook.d/10-mysql.sh", "");
    hooks.hook("etc/qemu/fsfreeze-hook.d/20-app", "");
    hooks.hook("etc/qemu/fsfreeze-hook.d/20-app.dpkg-old", "");
    hooks.hook("etc/qemu/fsfreeze-hook.d/20-app~", "");
    hooks.file("etc/qemu/fsfreeze-hook.d/README", "read me", 0o644);
    assert_eq!(hooks.whole_set()["held"], true);
    let expected = [
        "10-mysql.sh freeze",
        "20-app freeze",
        "20-app thaw",
        "10-mysql.sh thaw",
    ];
    assert_eq!(hooks.done(), expected);

    let known = identified(&mut hooks.rig.bridge());
    let names: Vec<&str> = known.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["qemu:10-mysql.sh", "qemu:20-app"]);
    let info = &known[0].1["components"][0]["info"];
    assert_eq!(info["origin"], "fsfreeze hook of QEMU's guest agent");
    assert!(
        info["path"]
            .as_str()
            .unwrap()
            .ends_with("fsfreeze-hook.d/10-mysql.sh")
    );

    // QEMU's hook would have hidden this.
    hooks.hook(
        "etc/qemu/fsfreeze-hook.d/20-app",
        "echo tables are locked >&2; [ $1 = thaw ]",
    );
    let error = hooks.refused_freeze();
    assert!(message(&error).contains("tables are locked"), "{error:#}");
    let expected = [
        "10-mysql.sh freeze",
        "20-app freeze",
        "20-app thaw",
        "10-mysql.sh thaw",
    ];
    assert_eq!(hooks.done(), expected);
}

#[test]
fn a_hook_of_ones_own_is_run_instead_of_the_directory_and_by_qemus_protocol_too() {
    if !can_run(&[]) {
        return;
    }
    let hooks = Hooks::new();
    hooks.hook(
        "etc/qemu/fsfreeze-hook",
        "for f in /nowhere/fsfreeze-hook.d/*; do true; done",
    );
    hooks.hook("etc/qemu/fsfreeze-hook.d/10-app", "");
    let mut qga = hooks.rig.qga();
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-freeze\"}"),
        "{\"return\":1}\n"
    );
    assert!(is_frozen(&hooks.rig.mountpoint("a")));
    assert_eq!(hooks.done(), ["fsfreeze-hook freeze"]);
    assert_eq!(
        qga.ask("{\"execute\":\"guest-fsfreeze-thaw\"}"),
        "{\"return\":1}\n"
    );
    assert_eq!(hooks.done(), ["fsfreeze-hook thaw"]);
}

#[test]
fn while_qemus_agent_holds_a_freeze_its_hooks_are_left_alone() {
    if !can_run(&[]) {
        return;
    }
    let hooks = Hooks::new();
    hooks.hook("etc/qemu/fsfreeze-hook.d/10-app", "");
    let held = hooks.file("run/qga.state.isfrozen", "", 0o644);
    let error = hooks.refused_freeze();
    assert_eq!(error["retryable"], true);
    assert!(message(&error).contains("another program has frozen it"));
    assert!(
        hooks.done().is_empty(),
        "a thaw would have let go what is not ours"
    );
    fs::remove_file(held).unwrap();
    assert_eq!(hooks.whole_set()["held"], true);
}

#[test]
fn hooks_that_others_can_change_or_exchange_refuse_the_set_unless_excluded() {
    if !can_run(&[]) {
        return;
    }
    let hooks = Hooks::new();
    let script = hooks.hook("etc/qemu/fsfreeze-hook.d/10-app", "");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o722)).unwrap();
    let error = hooks.refused_prepare();
    assert!(message(&error).contains("can be changed"), "{error:#}");
    fs::remove_file(&script).unwrap();
    let elsewhere = hooks.hook("opt/app", "");
    symlink(&elsewhere, &script).unwrap();
    let beside = elsewhere.parent().unwrap();
    fs::set_permissions(beside, fs::Permissions::from_mode(0o777)).unwrap();
    let error = hooks.refused_prepare();
    assert!(message(&error).contains("can be changed"), "{error:#}");
    let mut bridge = hooks.rig.bridge();
    bridge.ok(
        "prepare",
        json!({"set": "s", "limit_ms": 20_000, "exclude_writers": ["qemu:10-app"]}),
    );
    bridge.abort();
    assert!(hooks.done().is_empty());
    drop(bridge);
    // As QEMU's own hook follows links.
    fs::set_permissions(beside, fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(hooks.whole_set()["held"], true);
    assert_eq!(hooks.done().len(), 2, "{:?}", hooks.done());
}

#[test]
fn vmwares_scripts_freeze_in_order_and_hear_freeze_fail_or_thaw_in_reverse() {
    if !can_run(&[]) {
        return;
    }
    let hooks = Hooks::new();
    hooks.hook("usr/sbin/pre-freeze-script", "");
    hooks.hook("usr/sbin/post-thaw-script", "");
    hooks.hook("etc/vmware-tools/backupScripts.d/10-db.sh", "");
    hooks.hook("etc/vmware-tools/backupScripts.d/20-app.sh", "");
    assert_eq!(hooks.whole_set()["held"], true);
    let expected = [
        "pre-freeze-script freeze",
        "10-db.sh freeze",
        "20-app.sh freeze",
        "20-app.sh thaw",
        "10-db.sh thaw",
        "post-thaw-script thaw",
    ];
    assert_eq!(hooks.done(), expected);

    hooks.hook(
        "etc/vmware-tools/backupScripts.d/20-app.sh",
        "[ $1 != freeze ]",
    );
    let error = hooks.refused_freeze();
    assert_eq!(error["code"], "WRITER_VETO");
    let expected = [
        "pre-freeze-script freeze",
        "10-db.sh freeze",
        "20-app.sh freeze",
        "20-app.sh freezeFail",
        "10-db.sh freezeFail",
        "post-thaw-script freezeFail",
    ];
    assert_eq!(hooks.done(), expected);

    // Its tools would fail to run it, and so fail the freeze.
    hooks.file("etc/vmware-tools/backupScripts.d/30-notes", "", 0o644);
    assert!(message(&hooks.refused_prepare()).contains("not executable"));
}

#[test]
fn scripts_and_hooks_have_not_the_agents_score_for_the_killer() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::new();
    rig.mount("a", "ext4");
    // The agent lowers its own, if it may; one that may not keeps what it was started with. Neither is 0.
    let raised = [
        "/bin/sh",
        "-c",
        "echo 500 >/proc/self/oom_score_adj; exec \"$0\" \"$@\"",
    ];
    rig.start_by(&raised, &rig.path("run/log"));
    let hooks = Hooks {
        order: rig.path("run/order"),
        rig,
    };
    let score = format!("cat /proc/self/oom_score_adj >> {}", hooks.order.display());
    hooks.rig.script("db", "freeze", &score);
    hooks.hook("etc/qemu/fsfreeze-hook.d/10-app", &score);
    let agent = format!("/proc/{}/oom_score_adj", hooks.rig.agent_pid());
    let own = fs::read_to_string(agent).unwrap();
    assert!(["-900\n", "500\n"].contains(&&*own), "{own}");
    hooks.whole_set();
    let done = hooks.done();
    assert_eq!(done, ["0", "10-app freeze", "0", "10-app thaw", "0"]);
}

/// Azure's settings with these scripts.
fn azure(hooks: &Hooks, pre: &str, post: &str, continues: bool) {
    let settings = azures_settings(pre, post, continues);
    hooks.file(AZURES_FILE, &settings.to_string(), 0o600);
}

/// The same with this limit or, if null, none; a failure is a veto and is not tried again.
fn azure_within(hooks: &Hooks, seconds: Value) {
    let mut settings = azures_settings("pre.sh", "post.sh", false);
    settings["preScriptNoOfRetries"] = json!(0);
    settings["timeoutInSeconds"] = seconds;
    if settings["timeoutInSeconds"].is_null() {
        settings.as_object_mut().unwrap().remove("timeoutInSeconds");
    }
    hooks.file(AZURES_FILE, &settings.to_string(), 0o600);
}

const AZURES_FILE: &str = "etc/azure/VMSnapshotScriptPluginConfig.json";

fn azures_settings(pre: &str, post: &str, continues: bool) -> Value {
    let path = |name: &str| {
        if name.is_empty() {
            String::new()
        } else {
            format!("/opt/{name}")
        }
    };
    // As Azure hands them out, with the scripts filled in.
    json!({
        "pluginName": "ScriptRunner",
        "preScriptLocation": path(pre),
        "postScriptLocation": path(post),
        "preScriptParams": ["one", "two words", 3, true],
        "postScriptParams": [],
        "preScriptNoOfRetries": 1,
        "postScriptNoOfRetries": 0,
        "timeoutInSeconds": 30,
        "continueBackupOnFailure": continues,
        // File systems are frozen whatever it says.
        "fsFreezeEnabled": false,
    })
}

#[test]
fn azures_scripts_get_their_parameters_and_a_warning_is_no_failure() {
    if !can_run(&[]) {
        return;
    }
    let hooks = Hooks::new();
    azure(&hooks, "", "", true);
    assert!(
        identified(&mut hooks.rig.bridge()).is_empty(),
        "nobody has filled it in"
    );
    azure(&hooks, "pre.sh", "post.sh", false);
    hooks.hook("opt/pre.sh", "[ \"$2\" = 'two words' ] && exit 2");
    hooks.hook("opt/post.sh", "");
    assert_eq!(hooks.whole_set()["held"], true);
    assert_eq!(hooks.done(), ["pre.sh one two words 3 true", "post.sh"]);
    let known = identified(&mut hooks.rig.bridge());
    assert_eq!(known[0].0, "azure:ScriptRunner");
}

#[test]
fn azures_failed_pre_script_refuses_the_set_or_takes_its_word_from_it() {
    if !can_run(&[]) {
        return;
    }
    let hooks = Hooks::new();
    hooks.hook("opt/pre.sh", "echo no connection >&2; exit 1");
    hooks.hook("opt/post.sh", "");
    azure(&hooks, "pre.sh", "post.sh", false);
    let error = hooks.refused_freeze();
    assert!(message(&error).contains("no connection"), "{error:#}");
    // Once more as the settings say, and the post-script all the same.
    let pre = "pre.sh one two words 3 true";
    assert_eq!(hooks.done(), [pre, pre, "post.sh"]);

    azure(&hooks, "pre.sh", "post.sh", true);
    let mut bridge = hooks.rig.bridge();
    bridge.prepare();
    let frozen = bridge.freeze();
    let thawed = bridge.thaw(&frozen);
    assert_eq!(
        thawed["held"], false,
        "the copy would be called application-consistent"
    );
    assert!(
        thawed["why_not"].as_str().unwrap().contains("azure"),
        "{thawed:#}"
    );
    assert_eq!(hooks.done(), [pre, pre, "post.sh"]);
    bridge.ok("post_snapshot", json!({"set": "s", "kept": true}));
}

#[test]
fn azures_timeout_ends_a_pre_script_and_is_a_second_at_least_and_a_minute_at_most() {
    if !can_run(&[]) {
        return;
    }
    let hooks = Hooks::new();
    let told = hooks.rig.path("run/limit");
    hooks.hook("opt/post.sh", "");
    // Longer than everybody's patience, were it not killed.
    let limit = format!("echo $VSS_DEADLINE_MS > {}", told.display());
    hooks.hook("opt/pre.sh", &format!("{limit}; exec sleep 600"));
    azure_within(&hooks, json!(2));
    let error = hooks.refused_freeze();
    assert_eq!(error["code"], "WRITER_NOT_RESPONDING", "{error:#}");
    let pre = "pre.sh one two words 3 true";
    assert_eq!(hooks.done(), [pre, "post.sh"]);
    assert_eq!(fs::read_to_string(&told).unwrap(), "2000\n");

    hooks.hook("opt/pre.sh", &limit);
    // A minute is the window of a writer, of which a little is over when its turn comes.
    for (seconds, expected) in [
        (json!(0), 1_000..=1_000),
        (json!(null), 10_000..=10_000),
        (json!(3_600), 30_000..=60_000),
    ] {
        azure_within(&hooks, seconds.clone());
        assert_eq!(hooks.whole_set()["held"], true);
        let limit_ms = fs::read_to_string(&told).unwrap();
        let limit_ms: u64 = limit_ms.trim().parse().unwrap();
        assert!(expected.contains(&limit_ms), "{seconds}: {limit_ms}");
    }
    azure_within(&hooks, json!(-1));
    assert!(message(&hooks.refused_prepare()).contains("-1"));
}

#[test]
fn azures_rules_of_trust_are_kept() {
    if !can_run(&[]) {
        return;
    }
    let hooks = Hooks::new();
    azure(&hooks, "pre.sh", "post.sh", true);
    let pre = hooks.hook("opt/pre.sh", "");
    assert!(message(&hooks.refused_prepare()).contains("post.sh is not there"));
    hooks.hook("opt/post.sh", "");
    fs::set_permissions(&pre, fs::Permissions::from_mode(0o750)).unwrap();
    assert!(message(&hooks.refused_prepare()).contains("for its owner alone"));
    fs::set_permissions(&pre, fs::Permissions::from_mode(0o700)).unwrap();
    hooks.rig.file(&format!("root/{AZURES_FILE}"), "{}");
    assert!(message(&hooks.refused_prepare()).contains("for its owner alone"));
    assert!(hooks.done().is_empty());
}

#[test]
fn hooks_are_undone_after_the_agent_was_killed_and_not_asked_when_switched_off() {
    if !can_run(&[]) {
        return;
    }
    let mut hooks = Hooks::new();
    hooks.hook("etc/qemu/fsfreeze-hook.d/10-app", "");
    hooks.hook("etc/vmware-tools/backupScripts.d/20-db", "");
    let mut bridge = hooks.rig.bridge();
    bridge.prepare();
    bridge.freeze();
    hooks.done();
    hooks.rig.kill_agent();
    wait_until("the helper has thawed", || {
        !is_frozen(&hooks.rig.mountpoint("a"))
    });
    hooks.rig.option("--foreign-hooks", "vmware");
    hooks.rig.start();
    assert_eq!(hooks.done(), ["20-db freezeFail", "10-app thaw"]);
    assert_eq!(hooks.whole_set()["held"], true);
    assert_eq!(hooks.done(), ["20-db freeze", "20-db thaw"]);
}
