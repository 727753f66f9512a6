//! What people read: one text per answer.
//!
//! Called by `cli`. Programs get JSON instead, so these texts may change.

use super::table::{Align, size, table, time};
use crate::protocol::{ListedVolume, Need};
use crate::sets::ListedSet;
use crate::shown::plain;
use crate::snapshot::document::{Outcome, SetDocument, StepTime};
use crate::snapshot::witness::{Testimony, Word};
use guest_agent_wire::host::{Identified, WritersSaid};
use guest_agent_wire::types::DiskExtent;
use vhost_blk_wire::types::Method;

/// One line of progress.
pub(crate) fn step(time: StepTime) -> String {
    format!("{:<16} {:>9.1} ms", time.step, time.took_ms)
}

/// Sets, one a line.
pub(crate) fn sets(sets: &[ListedSet]) -> String {
    let columns = [
        ("SET", Align::Left),
        ("VM", Align::Left),
        ("CREATED", Align::Left),
        ("OUTCOME", Align::Left),
        ("LEVEL", Align::Left),
        ("COPIES", Align::Right),
        ("SIZE", Align::Right),
        ("REASON", Align::Left),
    ];
    let rows: Vec<Vec<String>> = sets
        .iter()
        .map(|set| {
            let document = &set.document;
            let all = document.copies.len();
            let copies = match set.copies_found {
                Some(found) if found == all => all.to_string(),
                Some(found) => format!("{found} of {all}"),
                None => format!("? of {all}"),
            };
            let level = document
                .level_reached
                .filter(|_| document.outcome == Outcome::Kept);
            vec![
                document.set.to_string(),
                document.vm.name.clone(),
                time(document.started_unix_ms),
                document.outcome.as_str().to_owned(),
                level.map_or("-".to_owned(), |level| level.to_string()),
                copies,
                size(document.copies.iter().map(|copy| copy.size_bytes).sum()),
                document
                    .reason
                    .as_ref()
                    .map_or(String::new(), |reason| reason.code.name()),
            ]
        })
        .collect();
    if rows.is_empty() {
        return "no sets\n".to_owned();
    }
    table(&columns, &rows)
}

/// What the reader of copies has to know of what is not in them; empty if nothing is missing.
pub(crate) fn left_out(bytes: u64) -> String {
    if bytes == 0 {
        return String::new();
    }
    let bytes = size(bytes);
    format!(
        "{bytes} of files that need not be in a copy, and of swap, are not in it: they read as zeroes\n"
    )
}

/// One set with all that matters.
pub(crate) fn set(document: &SetDocument) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        text.push_str(&format!("{name:<10} {}\n", plain(value)));
    };
    line("set", &document.set.to_string());
    line("vm", &document.vm.name);
    line("created", &time(document.started_unix_ms));
    line("outcome", document.outcome.as_str());
    let reached = document
        .level_reached
        .map_or("none".to_owned(), |level| level.to_string());
    line(
        "level",
        &format!("{reached} (asked {})", document.level_asked),
    );
    if let Some(reason) = &document.reason {
        line(
            "reason",
            &format!(
                "{} before {}: {}{}",
                reason.code.name(),
                reason.step,
                reason.message,
                if reason.retryable {
                    " (another try may work)"
                } else {
                    ""
                }
            ),
        );
    }
    for attempt in &document.attempts {
        line(
            "attempt",
            &format!("{}: {}", attempt.level, attempt.reason.message),
        );
    }
    let timings = &document.timings;
    if let Some(ms) = timings.freeze_to_thaw_ms {
        line("frozen", &format!("{ms:.1} ms from freeze to thaw"));
    }
    if let Some(ms) = timings.hold_ms {
        line("held", &format!("{ms:.1} ms by the host's clock"));
    }
    let witnesses = &document.witnesses;
    for (name, testimony) in [
        ("files", &witnesses.filesystems),
        ("writers", &witnesses.writers),
        ("time", &witnesses.time),
        ("host", &witnesses.host),
    ] {
        line(name, &testimony_line(testimony));
    }
    for disk in &document.uncovered_disks {
        line("not in it", &format!("{}: {}", disk.device, disk.why));
    }
    if document.awaits_backup {
        let text = format!("writers wait for `vmshadow complete {}`", document.set);
        line("backup", &text);
    } else if let Some(succeeded) = document.backup_succeeded {
        let word = if succeeded { "complete" } else { "failed" };
        line("backup", &format!("writers were told: {word}"));
    }
    for note in &document.notes {
        line("note", note);
    }
    for undone in &document.undone {
        line("undone", undone);
    }
    if !document.copies.is_empty() {
        text.push('\n');
        let columns = [
            ("VOLUME", Align::Left),
            ("SNAPSHOT", Align::Left),
            ("METHOD", Align::Left),
            ("SIZE", Align::Right),
            ("LEFT OUT", Align::Right),
            ("READ WITH", Align::Left),
        ];
        let rows: Vec<Vec<String>> = document
            .copies
            .iter()
            .map(|copy| {
                vec![
                    copy.volume.clone(),
                    copy.snapshot.to_string(),
                    method(copy.method).to_owned(),
                    size(copy.size_bytes),
                    size(copy.left_out_bytes),
                    copy.read_with.clone(),
                ]
            })
            .collect();
        text.push_str(&table(&columns, &rows));
    }
    if !timings.steps.is_empty() {
        text.push('\n');
        let columns = [
            ("STEP", Align::Left),
            ("AT MS", Align::Right),
            ("TOOK MS", Align::Right),
        ];
        let rows: Vec<Vec<String>> = timings
            .steps
            .iter()
            .map(|time| {
                vec![
                    time.step.to_string(),
                    format!("{:.1}", time.at_ms),
                    format!("{:.1}", time.took_ms),
                ]
            })
            .collect();
        text.push_str(&table(&columns, &rows));
    }
    text
}

fn testimony_line(testimony: &Testimony) -> String {
    let word = match testimony.value {
        Word::Agrees => "agrees",
        Word::Disagrees => "DISAGREES",
        Word::NotHeard => "not heard",
    };
    format!("{word}: {}", testimony.evidence.join("; "))
}

fn method(method: Method) -> &'static str {
    match method {
        Method::Row => "row",
        Method::Cow => "cow",
    }
}

/// What can be picked with `--component`; empty if there is nothing.
fn components(identified: &Identified) -> String {
    let columns = [
        ("COMPONENT", Align::Left),
        ("TYPE", Align::Left),
        ("RESTORE", Align::Left),
        ("FILES", Align::Left),
    ];
    let mut rows = Vec::new();
    for writer in &identified.writers {
        let Some(metadata) = &writer.metadata else {
            continue;
        };
        let restore = metadata.restore_method.as_ref();
        for component in &metadata.components {
            let path = match component.logical_path.as_str() {
                "" => String::new(),
                path => format!("{path}/"),
            };
            let files: Vec<String> = component
                .file_sets()
                .map(|files| format!("{}/{}", files.path, files.spec))
                .collect();
            rows.push(vec![
                format!("{}={path}{}", writer.instance_id, component.name),
                word(&component.component_type),
                restore.map_or(String::new(), |restore| word(&restore.method)),
                files.join(" "),
            ]);
        }
    }
    if rows.is_empty() {
        return String::new();
    }
    format!("\n{}", table(&columns, &rows))
}

/// What a restored component lacks.
pub(crate) fn need(need: &Need) -> String {
    let place = if need.is_in_set {
        "is in the set and not restored with it"
    } else {
        "is not in the set"
    };
    plain(&format!(
        "{} depends on {}, which {place}",
        need.component, need.needs
    ))
}

/// What writers said of a restore.
pub(crate) fn restored(after: &WritersSaid) -> String {
    let lines = after.writers.iter().map(|writer| match &writer.failure {
        None => format!("{}: {}\n", plain(&writer.name), word(&writer.state)),
        Some(failure) => format!(
            "{}: {}: {}: {}\n",
            plain(&writer.name),
            word(&writer.state),
            word(&failure.code),
            plain(&failure.message)
        ),
    });
    lines.collect()
}

/// Writers with their components, then file systems.
pub(crate) fn writers(identified: &Identified) -> String {
    let columns = [
        ("WRITER", Align::Left),
        ("INSTANCE", Align::Left),
        ("LEVEL", Align::Left),
        ("STATE", Align::Left),
        ("LIMIT", Align::Right),
        ("LAST ERROR", Align::Left),
    ];
    let rows: Vec<Vec<String>> = identified
        .writers
        .iter()
        .map(|writer| {
            vec![
                writer.name.clone(),
                writer.instance_id.clone(),
                word(&writer.level),
                word(&writer.state),
                format!("{} ms", writer.freeze_timeout_ms),
                writer
                    .last_failure
                    .as_ref()
                    .map_or("no error".to_owned(), |failure| {
                        format!("{}: {}", word(&failure.code), failure.message)
                    }),
            ]
        })
        .collect();
    let mut text = if rows.is_empty() {
        "no writers\n".to_owned()
    } else {
        table(&columns, &rows)
    };
    text.push_str(&components(identified));
    let columns = [
        ("FILE SYSTEM", Align::Left),
        ("TYPE", Align::Left),
        ("DEVICE", Align::Left),
        ("FREEZES", Align::Left),
        ("SIZE", Align::Right),
    ];
    let rows: Vec<Vec<String>> = identified
        .filesystems
        .iter()
        .map(|filesystem| {
            let freezes = match (&filesystem.why_not, filesystem.read_only) {
                (_, true) => "read-only".to_owned(),
                (Some(why), false) => format!("no: {why}"),
                (None, false) if filesystem.freezable => "yes".to_owned(),
                (None, false) => "no".to_owned(),
            };
            vec![
                filesystem.mountpoint.clone(),
                filesystem.fstype.clone(),
                filesystem.device.clone(),
                freezes,
                size(bytes_of(&filesystem.extents)),
            ]
        })
        .collect();
    if !rows.is_empty() {
        text.push('\n');
        text.push_str(&table(&columns, &rows));
    }
    text
}

/// A guest may say what it likes: the sum stays a number.
fn bytes_of(extents: &[DiskExtent]) -> u64 {
    let lengths = extents.iter().map(|extent| extent.length_bytes);
    lengths.fold(0, u64::saturating_add)
}

/// The wire's own word for a value of an enum.
fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word.to_ascii_lowercase().replace('_', "-"),
        Ok(_) | Err(_) => "?".to_owned(),
    }
}

/// Volumes.
pub(crate) fn volumes(volumes: &[ListedVolume]) -> String {
    let columns = [
        ("VOLUME", Align::Left),
        ("SERIAL", Align::Left),
        ("SIZE", Align::Right),
        ("METHOD", Align::Left),
        ("CONNECTED", Align::Left),
        ("SNAPSHOTS", Align::Right),
        ("SHADOW USED", Align::Right),
        ("BASE", Align::Left),
    ];
    let rows: Vec<Vec<String>> = volumes
        .iter()
        .map(|listed| {
            let volume = &listed.volume;
            let connected = match (volume.poisoned, volume.connected) {
                (true, _) => "poisoned",
                (false, true) => "yes",
                (false, false) => "no",
            };
            vec![
                volume.volume.clone(),
                volume.serial.clone(),
                size(volume.size_bytes),
                method(volume.method).to_owned(),
                connected.to_owned(),
                volume.snapshots.to_string(),
                size(volume.shadow_used_bytes),
                volume.base.clone(),
            ]
        })
        .collect();
    if rows.is_empty() {
        return "no volumes\n".to_owned();
    }
    table(&columns, &rows)
}
