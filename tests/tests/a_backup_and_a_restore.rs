//! What a backup program does with a machine, from end to end: a full backup of components, an incremental one that builds on it, one
//! that fails, one that is given up, a restore that is refused, and one that puts a disk back while the machine runs.
//!
//! The application adds a line to a file on disk `b` as often as it can; its writer is `vmshadow-writer` with a script per event. A
//! database with its own writer goes on on disk `a`: it is in no backup here, so that nobody waits for it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::load::Load;
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::{requires, wait};

/// Writes line n + 1 behind line n. While /run/notes/hold has a word it writes nothing, and says that word in /run/notes/held.
const APPLICATION: &str = r#"
while :; do
    word=$(cat /run/notes/hold 2>/dev/null)
    if [ -n "$word" ]; then
        echo "$word" >/run/notes/held
    else
        echo $(($(tail -n 1 /mnt/b/notes) + 1)) >>/mnt/b/notes
    fi
    usleep 10000
done"#;

/// Every script notes what it heard: the event, a blank, the line of JSON.
const HEARD: &str = r#"echo "$VSS_EVENT $(cat)" >>/run/notes/heard"#;
/// Waits until the application holds.
const HOLD: &str = r#"
hold() {
    echo "$1" >/run/notes/hold
    until [ "$(cat /run/notes/held)" = "$1" ]; do usleep 10000; done
}
line() { tail -n 1 /mnt/b/notes; }
mounted() { grep -q ' /mnt/b ' /proc/mounts; }
mount_again() {
    for disk in /sys/block/vd*; do
        [ "$(cat $disk/serial)" = b ] && mount -t ext4 /dev/${disk##*/} /mnt/b
    done
    mounted
}"#;

const SCRIPTS: &[(&str, &str)] = &[
    (
        "identify",
        r#"cat <<END
{"version": "1", "source": "TRANSACTED_DB", "stamps": true, "backup_types": ["incremental"],
 "restore_method": {"method": "RESTORE_IF_CAN_REPLACE"},
 "components": [
  {"type": "database", "logical_path": "srv", "name": "notes", "selectable_for_restore": true,
   "database_files": [{"path": "/mnt/b", "spec": "notes"}],
   "dependencies": [{"class_id": "command:notes", "logical_path": "srv", "name": "index"}, {"class_id": "users", "name": "people"}]},
  {"type": "filegroup", "logical_path": "srv", "name": "index", "files": [{"path": "/mnt/b", "spec": "index"}]}]}
END"#,
    ),
    ("prepare-backup", ""),
    ("prepare", ""),
    (
        "freeze",
        r#"hold $VSS_GENERATION; line >/run/notes/line; echo "{\"line\": $(line)}""#,
    ),
    (
        "thaw",
        r#"echo "{\"line\": $(line)}"; echo >/run/notes/hold"#,
    ),
    (
        "post-snapshot",
        r#"n=$(cat /run/notes/line)
echo "{\"components\": [{\"logical_path\": \"srv\", \"name\": \"notes\", \"stamp\": \"line $n\", \"metadata\": {\"line\": $n}}]}""#,
    ),
    ("backup-complete", ""),
    ("backup-shutdown", ""),
    ("abort", "mounted || mount_again; echo >/run/notes/hold"),
    (
        "pre-restore",
        r#"[ ! -e /run/notes/busy ] || { echo somebody reads the notes >&2; exit 1; }
hold restore; umount /mnt/b"#,
    ),
    (
        "post-restore",
        "mount_again || exit 1; line >/run/notes/restored; echo >/run/notes/hold",
    ),
];

/// The application and its writer on a running machine.
struct Notes {
    site: Site,
    load: Load,
}

impl Notes {
    fn start() -> Result<Self> {
        let disks = [("a", FileSystem::Ext4), ("b", FileSystem::Ext4)];
        let site = Site::start_with_slots("backup", &disks)?;
        site.vm
            .shell("mkdir /run/notes && echo 0 >/mnt/b/notes && touch /run/notes/held")?;
        site.vm.guest()?.start(APPLICATION)?;
        let scripts: Vec<_> = SCRIPTS
            .iter()
            .map(|(event, body)| {
                // It is asked all the time, and says nothing of a set.
                let head = if *event == "identify" { "" } else { HEARD };
                (*event, format!("{HOLD}\n{head}\n{body}"))
            })
            .collect();
        let scripts: Vec<_> = scripts
            .iter()
            .map(|(e, body)| (*e, body.as_str()))
            .collect();
        site.scripts("/etc/notes", &scripts)?;
        let writer =
            "vmshadow-writer --name notes --scripts /etc/notes --level back-end --hold app";
        site.writer(writer, "notes")?;
        let load = Load::start(&site.vm, &["/mnt/a/load.db"])?;
        site.writer("sqlite-writer --database /mnt/a/load.db", "SQLite")?;
        Ok(Self { site, load })
    }

    fn last_line(&self) -> Result<u64> {
        Ok(self
            .site
            .vm
            .shell("tail -n 1 /mnt/b/notes")?
            .trim()
            .parse()?)
    }

    /// The application writes.
    fn goes_on(&self) -> Result<()> {
        let before = self.last_line()?;
        wait::until("the application to write", wait::STEP, || {
            Ok((self.last_line()? > before).then_some(()))
        })
    }

    /// What the writer has heard since it was asked last: event and line.
    fn heard(&self) -> Result<Vec<(String, Value)>> {
        let text = self
            .site
            .vm
            .shell("cat /run/notes/heard && rm /run/notes/heard")?;
        text.lines()
            .map(|line| {
                let (event, said) = line.split_once(' ').context("no event")?;
                Ok((event.to_owned(), serde_json::from_str(said)?))
            })
            .collect()
    }

    /// A set of the notes alone.
    fn back_up(&self, kind: &str, more: &[&str]) -> Result<Value> {
        let mut arguments = vec!["create", "--disk", "b", "--type", kind];
        arguments.extend(["--component", "notes=srv/notes"]);
        arguments.extend(more);
        let answer = self.site.bridge.run(&arguments)?.succeeded()?;
        ensure!(answer.at("/level-reached")? == "application", "{answer:#?}");
        ensure!(answer.at("/awaits-backup")? == true, "{answer:#?}");
        Ok(answer.document)
    }
}

fn events(heard: &[(String, Value)]) -> Vec<&str> {
    heard.iter().map(|(event, _)| event.as_str()).collect()
}

fn said<'a>(heard: &'a [(String, Value)], event: &str) -> Result<&'a Value> {
    let found = heard.iter().find(|(name, _)| name == event);
    found
        .map(|(_, said)| said)
        .with_context(|| format!("no {event} in {heard:#?}"))
}

fn text<'a>(document: &'a Value, pointer: &str) -> Result<&'a str> {
    let found = document.pointer(pointer).and_then(Value::as_str);
    found.with_context(|| format!("no {pointer} in {document:#}"))
}

/// What the writer of the notes put on its component.
fn component(document: &Value) -> Result<&Value> {
    let writers = document["writers"].as_array().into_iter().flatten();
    let mut of_notes = writers.filter(|writer| writer["instance-id"] == "command:notes");
    of_notes
        .next()
        .and_then(|writer| writer.pointer("/post/components/0"))
        .with_context(|| format!("no component in {document:#}"))
}

#[test]
fn a_requester_backs_up_fails_gives_up_and_restores() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let notes = Notes::start()?;
    let bridge = &notes.site.bridge;
    let with_snapshot = [
        "prepare-backup",
        "prepare",
        "freeze",
        "thaw",
        "post-snapshot",
    ];

    // A full backup; one of two components is in it.
    let more = ["--component", "notes=srv/index"];
    let full = notes.back_up("full", &more)?;
    let full_id = text(&full, "/set")?;
    let heard = notes.heard()?;
    ensure!(events(&heard) == with_snapshot, "{heard:#?}");
    let asked = said(&heard, "prepare-backup")?;
    ensure!(asked["backup_type"] == "full", "{asked:#}");
    ensure!(asked["disks"] == json!(["b"]), "{asked:#}");
    let stamp = text(component(&full)?, "/stamp")?.to_owned();
    notes.goes_on()?;
    let complete = ["complete", full_id, "--failed-component", "notes=srv/index"];
    bridge.run(&complete)?.succeeded()?;
    let heard = notes.heard()?;
    let outcome = said(&heard, "backup-complete")?;
    ensure!(events(&heard) == ["backup-complete"], "{heard:#?}");
    let succeeded = |name: &str| {
        let mut all = outcome["components"].as_array().into_iter().flatten();
        all.find(|one| one["name"] == name)
            .map(|one| &one["succeeded"])
    };
    ensure!(succeeded("notes") == Some(&json!(true)), "{outcome:#}");
    ensure!(succeeded("index") == Some(&json!(false)), "{outcome:#}");
    let again = bridge.run(&["complete", full_id])?;
    ensure!(again.code == 1, "completed twice: {again:#?}");

    // An incremental one hears what it builds on, and then that it failed.
    let incremental = notes.back_up("incremental", &["--since", full_id])?;
    let heard = notes.heard()?;
    let asked = said(&heard, "prepare-backup")?;
    let previous = &asked["components"][0]["previous_stamp"];
    ensure!(previous == &json!(stamp), "{asked:#}");
    let newer = text(component(&incremental)?, "/stamp")?;
    ensure!(newer != stamp, "the stamp of two backups is the same");
    bridge
        .run(&["complete", text(&incremental, "/set")?, "--failed"])?
        .succeeded()?;
    ensure!(events(&notes.heard()?) == ["backup-shutdown"]);

    // One that is deleted while its writers wait.
    let given_up = notes.back_up("incremental", &["--since", full_id])?;
    notes.heard()?;
    bridge
        .run(&["delete", text(&given_up, "/set")?])?
        .succeeded()?;
    ensure!(events(&notes.heard()?) == ["abort"]);
    notes.goes_on()?;

    restores(&notes, &full)?;
    // Nobody has asked the database for anything.
    notes.load.wait_for_more(10)
}

/// A restore that the writer refuses, and one that it does not.
fn restores(notes: &Notes, full: &Value) -> Result<()> {
    let (site, set) = (&notes.site, text(full, "/set")?);
    let daemon = site.bridge.through_daemon()?;
    let began = site.directory().join("began");
    let done = site.directory().join("done");
    let command = wait_for(&began, &done);
    let of = |component| {
        let begin = ["restore", set, "--component", component];
        [&begin[..], &["--", "sh", "-c", &command]].concat()
    };
    let restore = of("notes=srv/notes");

    site.vm.shell("touch /run/notes/busy")?;
    for bridge in [&site.bridge, &daemon] {
        // There is no such component: the writer hears nothing.
        let unknown = bridge.run(&of("notes=srv/drafts"))?;
        let there = "command:notes=srv/notes, command:notes=srv/index";
        ensure!(
            unknown.code == 1 && unknown.stderr.contains(there),
            "{unknown:#?}"
        );
        let refused = bridge.run(&restore)?;
        ensure!(refused.code == 1, "{refused:#?}");
        ensure!(
            refused.stderr.contains("notes") && refused.stderr.contains("somebody reads"),
            "{refused:#?}"
        );
        ensure!(
            !began.exists(),
            "files were replaced although a writer said no"
        );
        ensure!(events(&notes.heard()?) == ["pre-restore", "abort"]);
        notes.goes_on()?;
    }
    site.vm.shell("rm /run/notes/busy")?;

    let restoring = daemon.start(&restore, None)?;
    wait::until("the restore to begin", wait::STEP, || {
        Ok(began.exists().then_some(()))
    })?;
    // No set may be made meanwhile, through the daemon or beside it.
    for bridge in [&site.bridge, &daemon] {
        let busy = bridge.run(&["create", "--level", "crash"])?;
        ensure!(
            busy.code == 1 && busy.stderr.contains("SNAPSHOT_SET_IN_PROGRESS"),
            "{busy:#?}"
        );
    }
    site.pull(1)?;
    site.bridge.run(&["revert", set])?.succeeded()?;
    site.put_back(1)?;
    std::fs::write(&done, "")?;
    let restored = restoring.wait(Duration::from_secs(180))?.succeeded()?;
    ensure!(restored.at("/restored")? == "ALL", "{restored:#?}");
    // What the component depends on was not restored with it, and that is told.
    let needs = restored.at("/needs")?;
    let expected = [("command:notes=srv/index", true), ("users=people", false)].map(|(other, is_in_set)| {
        json!({"component": "command:notes=srv/notes", "needs": other, "is-in-set": is_in_set})
    });
    ensure!(needs == &json!(expected), "{needs:#}");

    let heard = notes.heard()?;
    ensure!(
        events(&heard) == ["pre-restore", "post-restore"],
        "{heard:#?}"
    );
    let stored = component(full)?;
    for (event, restored) in [("pre-restore", Value::Null), ("post-restore", json!("ALL"))] {
        let components = &said(&heard, event)?["components"];
        let components = components.as_array().context("components")?;
        let [of_notes] = components.as_slice() else {
            anyhow::bail!("not the one component: {components:#?}");
        };
        ensure!(of_notes["name"] == "notes", "{of_notes:#}");
        ensure!(of_notes["stamp"] == stored["stamp"], "{of_notes:#}");
        ensure!(of_notes["metadata"] == stored["metadata"], "{of_notes:#}");
        ensure!(of_notes["restored"] == restored, "{of_notes:#}");
    }
    // The writer found the line at which the application was held for the full backup; later ones are gone. It goes on from there.
    let number = |file: &str| -> Result<u64> {
        let text = site.vm.shell(&format!("cat /run/notes/{file}"))?;
        Ok(text.trim().parse()?)
    };
    let line = stored["metadata"]["line"].as_u64().context("line")?;
    ensure!(number("restored")? == line, "restored to another line");
    ensure!(
        number("line")? > line,
        "the later backups held at no later line"
    );
    notes.goes_on()?;
    let lines = site.vm.shell("cat /mnt/b/notes")?;
    let last = notes.last_line()?;
    let expected: String = (0..=last).map(|n| format!("{n}\n")).collect();
    ensure!(
        expected.starts_with(&lines),
        "the file is not whole: {lines}"
    );
    Ok(())
}

/// A command that says that it runs, and ends when it is told to, or when the test has gone.
fn wait_for(began: &Path, done: &Path) -> String {
    let (began, done) = (began.display(), done.display());
    format!(
        "touch {began}; until [ -e {done} ] || [ ! -e {began} ]; do sleep 0.1; done; [ -e {done} ]"
    )
}
