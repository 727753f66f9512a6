//! What an error of QEMU's agent means: the texts of qemu-ga (`qga/vss-win32/requester.cpp`, `qga/commands-posix.c`) and the
//! numbers of VSS (vss.h, vswriter.h), read as the codes that our own agent gives.
//!
//! Called by `stock`. Invariant: what is not recognised keeps its own words and is never taken for something retryable.

use super::{GuestError, refusal};
use guest_agent_wire::host::{AgentError, ErrorCode};
use serde_json::Value;

/// VSS's results that the agent passes on: name, code, another try may work.
const RESULTS: [(u32, &str, ErrorCode, bool); 21] = {
    use ErrorCode as E;
    [
        (0x8004_2301, "VSS_E_BAD_STATE", E::FreezeFailed, false),
        (0x8004_2306, "VSS_E_PROVIDER_VETO", E::FreezeFailed, false),
        (
            0x8004_2308,
            "VSS_E_OBJECT_NOT_FOUND",
            E::FreezeFailed,
            false,
        ),
        (
            0x8004_230c,
            "VSS_E_VOLUME_NOT_SUPPORTED",
            E::FreezeFailed,
            false,
        ),
        (
            0x8004_230e,
            "VSS_E_VOLUME_NOT_SUPPORTED_BY_PROVIDER",
            E::FreezeFailed,
            false,
        ),
        (
            0x8004_230f,
            "VSS_E_UNEXPECTED_PROVIDER_ERROR",
            E::FreezeFailed,
            false,
        ),
        (
            0x8004_2312,
            "VSS_E_MAXIMUM_NUMBER_OF_VOLUMES_REACHED",
            E::FreezeFailed,
            false,
        ),
        (
            0x8004_2313,
            "VSS_E_FLUSH_WRITES_TIMEOUT",
            E::FlushWritesTimeout,
            true,
        ),
        (
            0x8004_2314,
            "VSS_E_HOLD_WRITES_TIMEOUT",
            E::HoldBroken,
            true,
        ),
        (
            0x8004_2315,
            "VSS_E_UNEXPECTED_WRITER_ERROR",
            E::WriterVeto,
            false,
        ),
        (
            0x8004_2316,
            "VSS_E_SNAPSHOT_SET_IN_PROGRESS",
            E::SnapshotSetInProgress,
            true,
        ),
        (
            0x8004_2317,
            "VSS_E_MAXIMUM_NUMBER_OF_SNAPSHOTS_REACHED",
            E::FreezeFailed,
            false,
        ),
        (
            0x8004_2318,
            "VSS_E_WRITER_INFRASTRUCTURE",
            E::WriterNotResponding,
            false,
        ),
        (
            0x8004_2319,
            "VSS_E_WRITER_NOT_RESPONDING",
            E::WriterNotResponding,
            true,
        ),
        (
            0x8004_231f,
            "VSS_E_INSUFFICIENT_STORAGE",
            E::FreezeFailed,
            false,
        ),
        (
            0x8004_23f0,
            "VSS_E_WRITERERROR_INCONSISTENTSNAPSHOT",
            E::WriterVeto,
            false,
        ),
        (
            0x8004_23f1,
            "VSS_E_WRITERERROR_OUTOFRESOURCES",
            E::WriterVeto,
            true,
        ),
        (
            0x8004_23f2,
            "VSS_E_WRITERERROR_TIMEOUT",
            E::WriterVeto,
            true,
        ),
        (
            0x8004_23f3,
            "VSS_E_WRITERERROR_RETRYABLE",
            E::WriterVeto,
            true,
        ),
        (
            0x8004_23f4,
            "VSS_E_WRITERERROR_NONRETRYABLE",
            E::WriterVeto,
            false,
        ),
        (
            0x8004_23f5,
            "VSS_E_WRITERERROR_RECOVERY_FAILED",
            E::WriterVeto,
            false,
        ),
    ]
};

/// Texts of the agent, looked for where no number is known. The numbers come first: a text may stand before any of them.
const TEXTS: [(&str, ErrorCode, bool); 9] = {
    use ErrorCode as E;
    [
        ("couldn't hold writes", E::HoldBroken, true),
        // VSS did not come to the commit within the agent's 10 s: writers or the flush took too long.
        ("couldn't receive Frozen event", E::FlushWritesTimeout, true),
        // VSS gave up before the commit: a writer's veto shows so, but also anything else. The agent does not look.
        (
            "DoSnapshotSet exited without Frozen event",
            E::FreezeFailed,
            true,
        ),
        ("unexpected error in VSS provider", E::FreezeFailed, false),
        ("fsfreeze hook has failed", E::WriterVeto, false),
        ("failed to freeze", E::FreezeFailed, false),
        ("to snapshot set", E::FreezeFailed, false),
        ("agent is in frozen state", E::SnapshotSetInProgress, true),
        ("command is not allowed", E::Internal, false),
    ]
};

/// The agent's error object as a refusal.
pub(super) fn refused(command: &str, error: &Value) -> GuestError {
    let member = |name| error.get(name).and_then(Value::as_str).unwrap_or_default();
    let (class, desc) = (member("class"), member("desc"));
    let (code, retryable, name) = read(desc);
    let mut message = format!("qemu-ga: {command}: {desc}");
    if let Some(name) = name.filter(|name| !desc.contains(name)) {
        message.push_str(&format!(" ({name})"));
    }
    if class == "CommandNotFound" || class == "CommandDisabled" {
        message.push_str(": the agent lacks the command, or it was switched off");
    }
    refusal(AgentError {
        code,
        message,
        retryable,
        writers: Vec::new(),
        filesystems: Vec::new(),
    })
}

pub(super) fn in_progress(message: String) -> GuestError {
    refusal(AgentError {
        code: ErrorCode::SnapshotSetInProgress,
        message,
        retryable: true,
        writers: Vec::new(),
        filesystems: Vec::new(),
    })
}

/// Code, whether another try may work, and VSS's name for it.
fn read(desc: &str) -> (ErrorCode, bool, Option<&'static str>) {
    let number = numbers(desc).find_map(|n| RESULTS.iter().find(|result| result.0 == n));
    // The agent says so also where VSS blames the provider: its own provider had waited too long.
    let held_too_long = desc.contains("couldn't hold writes");
    if let Some((_, name, code, retryable)) = number
        && !held_too_long
    {
        return (*code, *retryable, Some(name));
    }
    let text = TEXTS.iter().find(|text| desc.contains(text.0));
    let (code, retryable) = text.map_or((ErrorCode::Internal, false), |text| (text.1, text.2));
    (code, retryable, number.map(|result| result.1))
}

/// Numbers of eight hexadecimal digits, with or without `0x`.
fn numbers(text: &str) -> impl Iterator<Item = u32> {
    text.split(|c: char| !c.is_ascii_alphanumeric())
        .map(|word| {
            word.strip_prefix("0x")
                .or_else(|| word.strip_prefix("0X"))
                .unwrap_or(word)
        })
        .filter(|word| word.len() == 8)
        .filter_map(|word| u32::from_str_radix(word, 16).ok())
}

#[cfg(test)]
mod tests;
