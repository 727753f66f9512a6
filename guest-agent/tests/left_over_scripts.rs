//! What scripts of a killed agent, or of a killed writer, leave: children that still run, applications that stand still.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod rig;

use rig::{Rig, can_run, freeze_arguments, kill_9, wait_until};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A freeze that starts a child which leaves its process group and freezes late, if it lives: the script waits for it.
fn slow_freeze(child: &Path) -> String {
    format!(
        "setsid sh -c 'echo $$ > {0}.new; mv {0}.new {0}; exec sleep 600' & while [ ! -e {0} ]; do sleep 0.02; done; exec sleep 600",
        child.display()
    )
}

/// An undo that tells whether that child still runs.
fn undo(child: &Path, told: &Path) -> String {
    format!(
        "case $(cut -d' ' -f3 /proc/$(cat {0})/stat) in Z|'') echo dead ;; *) echo alive ;; esac > {1}.new; mv {1}.new {1}",
        child.display(),
        told.display()
    )
}

fn kill_child(child: &Path) {
    let pid = fs::read_to_string(child).unwrap().trim().parse().unwrap();
    if Path::new(&format!("/proc/{pid}")).exists() {
        kill_9(pid);
    }
}

#[test]
fn a_freeze_that_outlives_a_killed_agent_is_ended_before_it_is_undone() {
    if !can_run(&["setsid"]) {
        return;
    }
    let mut rig = Rig::with("ext4");
    let (child, told) = (rig.path("run/child"), rig.path("run/told"));
    rig.script("db", "freeze", &slow_freeze(&child));
    rig.script("db", "thaw", &undo(&child, &told));
    let mut bridge = rig.bridge();
    bridge.prepare();
    bridge.send("freeze", freeze_arguments(10_000));
    wait_until("the child runs", || child.exists());
    rig.kill_agent();
    rig.start();
    assert_eq!(fs::read_to_string(&told).unwrap().trim(), "dead");
    kill_child(&child);
}

#[test]
fn a_freeze_that_outlives_a_killed_writer_is_ended_before_it_is_undone() {
    if !can_run(&["setsid"]) {
        return;
    }
    let rig = Rig::with("ext4");
    let (child, told) = (rig.path("run/child"), rig.path("run/told"));
    let (freeze, thaw) = (slow_freeze(&child), undo(&child, &told));
    let mut writer = rig.writer("db", &["--freeze", &freeze, "--thaw", &thaw]);
    let mut bridge = rig.bridge();
    bridge.prepare();
    bridge.send("freeze", freeze_arguments(10_000));
    wait_until("the child runs", || child.exists());
    writer.kill();
    wait_until("the freeze is undone", || told.exists());
    assert_eq!(fs::read_to_string(&told).unwrap().trim(), "dead");
    kill_child(&child);
}

#[test]
fn what_a_killed_agent_had_frozen_is_undone_in_the_reverse_order_of_the_freezes() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::with("ext4");
    let order = rig.path("run/order");
    // By level c, a, b; by name a, b, c.
    for (name, level) in [("a", "BACK_END"), ("b", "SYSTEM"), ("c", "FRONT_END")] {
        rig.script(
            name,
            "freeze",
            &format!("echo +{name} >> {}", order.display()),
        );
        rig.script(
            name,
            "thaw",
            &format!("echo -{name} >> {}", order.display()),
        );
        let level = format!(r#"{{"level":"{level}"}}"#);
        rig.file(&format!("writers/{name}/writer.json"), &level);
    }
    let mut bridge = rig.bridge();
    bridge.prepare();
    bridge.freeze();
    rig.kill_agent();
    rig.start();
    let order = fs::read_to_string(&order).unwrap();
    assert_eq!(
        order.split_whitespace().collect::<Vec<_>>().join(" "),
        "+c +a +b -b -a -c"
    );
}

#[test]
fn a_mark_that_cannot_be_removed_is_told_and_keeps_no_application_standing_still() {
    if !can_run(&[]) {
        return;
    }
    let mut rig = Rig::with("ext4");
    let told = rig.path("run/told");
    for name in ["a", "b"] {
        rig.script(name, "freeze", "");
        let text = format!("echo {name} >> {}", told.display());
        rig.script(name, "thaw", &text);
    }
    let mut bridge = rig.bridge();
    bridge.prepare();
    bridge.freeze();
    rig.kill_agent();
    let wrong = ["hold.0", "script.0"].map(|name| rig.path(&format!("run/{name}")));
    for mark in &wrong {
        fs::create_dir(mark).unwrap();
    }
    let mut command = rig.command();
    let ended = command.arg("--thaw-leftovers").output().unwrap();
    assert_eq!(fs::read_to_string(&told).unwrap(), "b\na\n");
    assert!(!ended.status.success());
    let said = String::from_utf8(ended.stderr).unwrap();
    for mark in &wrong {
        assert!(said.contains(mark.to_str().unwrap()), "{said}");
        fs::remove_dir(mark).unwrap();
    }
    // Nothing is undone twice.
    let ended = rig.command().arg("--thaw-leftovers").output().unwrap();
    assert!(ended.status.success());
    assert_eq!(fs::read_to_string(&told).unwrap(), "b\na\n");
}

/// A control group (v2) of its own below that of this test, if one can be made.
fn another_control_group() -> Option<PathBuf> {
    let top = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .map(Path::new)
        .find(|top| top.join("cgroup.procs").exists())?;
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let group = top
        .join(own)
        .join(format!("elsewhere-{}", std::process::id()));
    fs::create_dir(&group).ok()?;
    Some(group)
}

#[test]
fn leftovers_that_are_undone_from_another_control_group_are_ended_first_all_the_same() {
    if !can_run(&["setsid"]) {
        return;
    }
    let Some(elsewhere) = another_control_group() else {
        eprintln!("skipped: no control group (v2) can be made here");
        return;
    };
    let mut rig = Rig::with("ext4");
    let (child, told) = (rig.path("run/child"), rig.path("run/told"));
    rig.script("db", "freeze", &slow_freeze(&child));
    rig.script("db", "thaw", &undo(&child, &told));
    let mut bridge = rig.bridge();
    bridge.prepare();
    bridge.send("freeze", freeze_arguments(10_000));
    wait_until("the child runs", || child.exists());
    rig.kill_agent();
    let agent = rig.command();
    // As from the shell of somebody who has logged in.
    let status = Command::new("sh")
        .args(["-c", r#"echo 0 > "$0/cgroup.procs" && exec "$@""#])
        .arg(&elsewhere)
        .arg(agent.get_program())
        .args(agent.get_args())
        .arg("--thaw-leftovers")
        .status()
        .unwrap();
    kill_child(&child);
    wait_until("the group is empty", || fs::remove_dir(&elsewhere).is_ok());
    assert!(status.success());
    assert_eq!(fs::read_to_string(&told).unwrap().trim(), "dead");
}
