//! What scripts of a killed agent left: children that still run, and applications that stand still.
//!
//! Called by `agent` at start and for `--thaw-leftovers`, and by the guard of `vmshadow-writer`. Invariant: nobody undoes a
//! freeze while somebody who may still be freezing runs.

use super::control_group::{ControlGroup, Purpose};
use super::maker::{Maker, VARIABLE};
use super::process::Killer;
use super::recipe::{Run, Step};
use super::{MARKER, failure};
use crate::clock::BootTime;
use crate::hold::ledger::boot_id;
use crate::journal;
use guest_agent_wire::host::Failure;
use guest_agent_wire::types::{BackupType, WriterFailure};
use guest_agent_wire::writer::{Abort, EventKind};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

/// Time for the undoing of a writer that a killed agent left frozen.
const UNDOING: Duration = Duration::from_secs(10);
/// How long killed processes are waited for: one that waits for a disk ends only when that answers.
const ENDING: Duration = Duration::from_secs(10);
/// How often it is looked whether they have ended.
const LOOK: Duration = Duration::from_millis(5);

/// What a writer that may be frozen notes in the state directory, behind a line with the boot's identity.
#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    /// What undoes it.
    event: String,
    step: Step,
    /// Its place in the order of all freezes of the agent.
    place: u64,
    /// Where the agent made its control groups: who undoes may run elsewhere (`--thaw-leftovers` from a shell).
    #[serde(default)]
    groups: Option<PathBuf>,
}

/// Notes what undoes this writer's freeze, for an agent that starts after this one was killed.
pub(super) fn mark(marker: &Path, event: &str, step: &Step) -> Result<(), Failure> {
    // Scripts freeze one after the other.
    static PLACE: AtomicU64 = AtomicU64::new(0);
    let mark = Mark {
        event: event.to_owned(),
        step: step.clone(),
        place: PLACE.fetch_add(1, Ordering::SeqCst),
        groups: ControlGroup::place(),
    };
    let mark = serde_json::to_string(&mark).map_err(io::Error::from);
    boot_id()
        .and_then(|boot| fs::write(marker, format!("{boot}\n{}\n", mark?)))
        .map_err(|error| failure(WriterFailure::Outofresources, error.to_string()))
}

/// Ends the scripts that a killed agent of this boot left behind, then undoes what they froze, the last first; returns how
/// many writers there were. A mark that cannot be removed is told and keeps no other.
pub fn recover(state_dir: &Path) -> io::Result<usize> {
    let boot = boot_id()?;
    let mut marks = Vec::new();
    let mut removed = Ok(());
    for entry in fs::read_dir(state_dir)?.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(MARKER) {
            continue;
        }
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        // One of an earlier boot, or one that was not written to its end: nothing had begun.
        let mark = text
            .strip_prefix(&boot)
            .and_then(|mark| serde_json::from_str::<Mark>(mark).ok());
        match mark {
            Some(mark) => marks.push((mark, entry.path())),
            None => removed = remove(&entry.path()).and(removed),
        }
    }
    kill_scripts_in(
        marks
            .iter()
            .filter_map(|(mark, _)| mark.groups.clone())
            .collect(),
    );
    marks.sort_by_key(|(mark, _)| std::cmp::Reverse(mark.place));
    for (mark, path) in &marks {
        undo(mark);
        removed = remove(path).and(removed);
    }
    removed.map(|()| marks.len())
}

fn remove(mark: &Path) -> io::Result<()> {
    fs::remove_file(mark).inspect_err(|error| {
        let mark = mark.display();
        journal::note(format_args!("{mark}: it cannot be removed: {error}"));
    })
}

fn undo(mark: &Mark) {
    let event = EventKind::Abort(Abort {
        set: String::new(),
        reason: "the agent was killed".to_owned(),
    });
    let run = Run {
        event: &event,
        backup_type: BackupType::default(),
        limit: UNDOING,
        killer: &Killer::default(),
        time: None,
    };
    if let Err(failed) = mark.step.run(&mark.event, &run) {
        let file = mark.step.file.display();
        journal::note(format_args!("{file}: {}", failed.message));
    }
}

/// The same as [`kill_scripts`], once this process is gone, named as [`this_process`] does.
pub fn kill_scripts_of(maker: &str) {
    let until = BootTime::now().plus_ms(u64::try_from(ENDING.as_millis()).unwrap_or(u64::MAX));
    let maker: Result<Maker, _> = maker.parse();
    // A process that ends closes its pipes first.
    while maker.is_ok_and(|maker| !maker.is_gone()) && !until.is_past() {
        thread::sleep(LOOK);
    }
    kill_scripts();
}

/// The name of this process for [`kill_scripts_of`].
pub fn this_process() -> io::Result<String> {
    Maker::this_process().map(|maker| maker.to_string())
}

/// Kills the scripts whose makers are gone, with all their children, and waits for their end, 10 s at most.
pub fn kill_scripts() {
    kill_scripts_in(BTreeSet::new());
}

/// The same, in these places of control groups as well.
fn kill_scripts_in(mut places: BTreeSet<PathBuf>) {
    places.extend(ControlGroup::place());
    let until = BootTime::now().plus_ms(u64::try_from(ENDING.as_millis()).unwrap_or(u64::MAX));
    let groups: Vec<ControlGroup> = places
        .iter()
        .flat_map(|place| ControlGroup::left_of_scripts(place))
        .collect();
    for group in &groups {
        group.kill();
    }
    while !groups.iter().all(ControlGroup::remove) && !until.is_past() {
        thread::sleep(LOOK);
    }
    if !groups.iter().all(ControlGroup::remove) {
        journal::note(format_args!(
            "a script of a killed agent does not end: what it freezes later, nobody thaws"
        ));
    }
    if ControlGroup::create(Purpose::Script).is_none() {
        // In a thread: the environment of a process that waits for a dead disk may never be read.
        let (sender, done) = channel();
        thread::spawn(move || {
            while kill_marked() > 0 && !until.is_past() {
                thread::sleep(LOOK);
            }
            sender.send(()).unwrap_or(());
        });
        done.recv_timeout(until.remaining()).unwrap_or(());
    }
}

/// Where no control group can be made: kills the processes whose environment tells of a maker that is gone; returns how many
/// there still were.
fn kill_marked() -> usize {
    let own = std::process::id();
    let mut found = 0;
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(|pid| pid.parse().ok());
        let Some(pid) = pid.filter(|pid: &i32| u32::try_from(*pid) != Ok(own)) else {
            continue;
        };
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        if maker(&environment).is_some_and(Maker::is_gone)
            && let Some(pid) = Pid::from_raw(pid)
        {
            found += 1;
            kill_process(pid, Signal::KILL).unwrap_or(());
        }
    }
    found
}

fn maker(environment: &[u8]) -> Option<Maker> {
    let variables = environment.split(|byte| *byte == 0);
    variables
        .filter_map(|variable| std::str::from_utf8(variable).ok())
        .filter_map(|variable| variable.split_once('='))
        .find(|(name, _)| *name == VARIABLE)
        .and_then(|(_, value)| value.parse().ok())
}

#[test]
fn without_control_groups_the_children_of_who_is_gone_are_killed_and_others_are_not() {
    use std::process::{Child, Command};
    let start = |value: String| -> Child {
        let mut sleep = Command::new("sleep");
        sleep.arg("600").env(VARIABLE, value).spawn().unwrap()
    };
    let here = Maker::this_process().unwrap();
    let mut left = start(format!("{}-1", std::process::id()));
    let mut other = start(here.to_string());
    // An agent that starts beside this test may be quicker, and kill it for us.
    kill_marked();
    assert!(!left.wait().unwrap().success());
    assert_eq!(
        other.try_wait().unwrap(),
        None,
        "a script in use was killed"
    );
    other.kill().unwrap();
    other.wait().unwrap();
}
