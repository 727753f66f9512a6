//! What a command is told of an event: the name of the event, the environment, standard input.
//!
//! Called by `script` and by the program `vmshadow-writer`. The whole event is on standard input as one line of JSON; the
//! environment has what a shell script mostly needs of it.

use guest_agent_wire::types::BackupType;
use guest_agent_wire::writer::EventKind;

/// The events by their names for commands, in the order of a set.
pub const EVENTS: [&str; 11] = [
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

/// Name of an event; none for what is no event to a command.
#[must_use]
pub fn name(event: &EventKind) -> Option<&'static str> {
    Some(match event {
        EventKind::Welcome(_) => return None,
        EventKind::Identify {} => "identify",
        EventKind::PrepareBackup(_) => "prepare-backup",
        EventKind::PrepareSnapshot(_) => "prepare",
        EventKind::Freeze(_) => "freeze",
        EventKind::Thaw(_) => "thaw",
        EventKind::PostSnapshot(_) => "post-snapshot",
        // A command that runs may truncate logs without asking how the backup went: one that failed is no backup.
        EventKind::BackupComplete(outcome) if !outcome.succeeded => "backup-shutdown",
        EventKind::BackupComplete(_) => "backup-complete",
        EventKind::BackupShutdown(_) => "backup-shutdown",
        EventKind::Abort(_) => "abort",
        EventKind::PreRestore(_) => "pre-restore",
        EventKind::PostRestore(_) => "post-restore",
    })
}

/// The set, or the restore, that an event belongs to; empty for `identify`.
#[must_use]
pub fn set(event: &EventKind) -> &str {
    match event {
        EventKind::Welcome(_) | EventKind::Identify {} => "",
        EventKind::PrepareBackup(of) => &of.set,
        EventKind::PrepareSnapshot(of) => &of.set,
        EventKind::Freeze(of) => &of.set,
        EventKind::Thaw(of) => &of.set,
        EventKind::PostSnapshot(of) => &of.set,
        EventKind::BackupComplete(of) => &of.set,
        EventKind::BackupShutdown(of) => &of.set,
        EventKind::Abort(of) => &of.set,
        EventKind::PreRestore(of) | EventKind::PostRestore(of) => &of.set,
    }
}

/// Environment of a command: `VSS_EVENT`, `VSS_SET`, `VSS_TYPE` (the kind of backup), `VSS_DEADLINE_MS` always;
/// `VSS_GENERATION`, `VSS_HOLD_MS`, `VSS_MOUNT`, `VSS_REASON` where the event has them.
#[must_use]
pub fn environment(
    event: &EventKind,
    backup_type: BackupType,
    deadline_ms: u64,
) -> Vec<(&'static str, String)> {
    let backup_type = serde_json::to_value(backup_type).unwrap_or_default();
    let mut environment = vec![
        ("VSS_EVENT", name(event).unwrap_or_default().to_owned()),
        ("VSS_SET", set(event).to_owned()),
        (
            "VSS_TYPE",
            backup_type.as_str().unwrap_or_default().to_owned(),
        ),
        ("VSS_DEADLINE_MS", deadline_ms.to_string()),
    ];
    match event {
        EventKind::Freeze(freeze) => {
            environment.push(("VSS_GENERATION", freeze.generation.to_string()));
            environment.push(("VSS_HOLD_MS", freeze.hold_ms.to_string()));
        }
        EventKind::Thaw(thaw) => {
            environment.push(("VSS_GENERATION", thaw.generation.to_string()));
        }
        EventKind::PostSnapshot(snapshot) => {
            let mount = snapshot.mount.clone();
            environment.extend(mount.map(|mount| ("VSS_MOUNT", mount)));
        }
        EventKind::Abort(abort) => environment.push(("VSS_REASON", abort.reason.clone())),
        EventKind::Welcome(_)
        | EventKind::Identify {}
        | EventKind::PrepareBackup(_)
        | EventKind::PrepareSnapshot(_)
        | EventKind::BackupComplete(_)
        | EventKind::BackupShutdown(_)
        | EventKind::PreRestore(_)
        | EventKind::PostRestore(_) => {}
    }
    // A string from the host must not keep a command from running: no environment has a NUL.
    for (_, value) in &mut environment {
        value.retain(|letter| letter != '\0');
    }
    environment
}

/// Standard input of a command: the event as a line of JSON.
#[must_use]
pub fn input(event: &EventKind) -> Vec<u8> {
    let mut line = serde_json::to_vec(event).unwrap_or_default();
    line.push(b'\n');
    line
}
