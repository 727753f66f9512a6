//! Reads what `vssadmin list writers` prints on Windows.
//!
//! Called by `stock`. The words are in the language of the guest, so none of them is read: a writer's name stands in single
//! quotes, its class and instance in braces, the number of its state (VSS_WRITER_STATE) in brackets, and its last error behind the
//! colon on the line after that. Invariant: a list that cannot be followed to its end is no list.

use serde::{Deserialize, Serialize};

/// Most writers that are believed.
const WRITERS_MAX: usize = 1024;
/// VSS_WS_STABLE.
const STABLE: u32 = 1;
/// VSS_WS_WAITING_FOR_BACKUP_COMPLETE.
const WAITING_FOR_BACKUP_COMPLETE: u32 = 5;

/// A writer of VSS in a Windows guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VssWriter {
    /// Its name.
    pub name: String,
    /// Names what kind of writer it is.
    pub class_id: String,
    /// Names this instance.
    pub instance_id: String,
    /// VSS_WRITER_STATE.
    pub state: u32,
    /// Its last error in the guest's language, or that there was none.
    pub last_error: String,
}

impl VssWriter {
    /// It has been through the whole set: after a thaw no other state is one of success.
    #[must_use]
    pub fn took_part(&self) -> bool {
        self.state == STABLE || self.state == WAITING_FOR_BACKUP_COMPLETE
    }

    /// Its state by VSS's name.
    #[must_use]
    pub fn state_name(&self) -> &'static str {
        match self.state {
            1 => "STABLE",
            2 => "WAITING_FOR_FREEZE",
            3 => "WAITING_FOR_THAW",
            4 => "WAITING_FOR_POST_SNAPSHOT",
            5 => "WAITING_FOR_BACKUP_COMPLETE",
            6 => "FAILED_AT_IDENTIFY",
            7 => "FAILED_AT_PREPARE_BACKUP",
            8 => "FAILED_AT_PREPARE_SNAPSHOT",
            9 => "FAILED_AT_FREEZE",
            10 => "FAILED_AT_THAW",
            11 => "FAILED_AT_POST_SNAPSHOT",
            12 => "FAILED_AT_BACKUP_COMPLETE",
            13 => "FAILED_AT_PRE_RESTORE",
            14 => "FAILED_AT_POST_RESTORE",
            15 => "FAILED_AT_BACKUPSHUTDOWN",
            _ => "UNKNOWN",
        }
    }
}

/// The writers in the output.
///
/// # Errors
/// What is wrong with it, if anything is.
pub(super) fn writers(output: &str) -> Result<Vec<VssWriter>, String> {
    let mut found: Vec<VssWriter> = Vec::new();
    let mut open: Option<VssWriter> = None;
    let mut braces = 0;
    let mut state_seen = false;
    for line in output.lines().map(str::trim).filter(|l| !l.is_empty()) {
        if let Some(name) = between(line, '\'', '\'')
            && line.ends_with('\'')
        {
            if let Some(writer) = &open {
                return Err(format!("nothing of the state of {}", writer.name));
            }
            if found.len() >= WRITERS_MAX {
                return Err(format!("more than {WRITERS_MAX} writers"));
            }
            open = Some(VssWriter {
                name: name.to_owned(),
                class_id: String::new(),
                instance_id: String::new(),
                state: 0,
                last_error: String::new(),
            });
            (braces, state_seen) = (0, false);
            continue;
        }
        let Some(writer) = &mut open else {
            // The program's own heading.
            continue;
        };
        if let Some(id) = between(line, '{', '}') {
            match braces {
                0 => writer.class_id = id.to_owned(),
                1 => writer.instance_id = id.to_owned(),
                _ => return Err(format!("{}: more ids than two", writer.name)),
            }
            braces += 1;
        } else if state_seen {
            writer.last_error = line
                .split_once(':')
                .map_or(line, |(_, error)| error)
                .trim()
                .to_owned();
            found.extend(open.take());
        } else if let Some(state) = between(line, '[', ']') {
            writer.state = state
                .parse()
                .map_err(|_| format!("{}: state [{state}]", writer.name))?;
            state_seen = true;
        }
    }
    match open {
        Some(writer) => Err(format!("nothing of the last error of {}", writer.name)),
        None if found.is_empty() => Err("no writer in it".to_owned()),
        None => Ok(found),
    }
}

/// What stands between the first of one character and the last of another behind it.
fn between(line: &str, first: char, last: char) -> Option<&str> {
    let (_, rest) = line.split_once(first)?;
    rest.rsplit_once(last).map(|(inside, _)| inside)
}

#[cfg(test)]
mod tests;
