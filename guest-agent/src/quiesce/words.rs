//! How much of what writers say has room in the answers to the host, which are one line each.
//!
//! Used by `participant` and `writers`. Invariant: the reports of all writers that may be connected fit into one line,
//! whatever they say; nobody is cut short in silence but in a text for people.

use crate::writer::failure;
use guest_agent_wire::MESSAGE_BYTES_MAX;
use guest_agent_wire::host::{Failure, WriterInfo};
use guest_agent_wire::types::WriterFailure;
use guest_agent_wire::writer::{Reply, WORDS_BYTES_MAX};
use serde::Serialize;

/// Evidence and components of all writers of a set. What else is in their reports is at most 2.4 KiB for each of 256.
const ALL_BYTES_MAX: usize = 384 << 10;

/// Room for all metadata documents in one answer.
pub(super) const DOCUMENTS_BYTES_MAX: usize = MESSAGE_BYTES_MAX / 2;

/// Longest text for people, bytes.
const TEXT_BYTES_MAX: usize = 500;

/// Length of a value on the wire.
pub(super) fn bytes(value: &impl Serialize) -> usize {
    serde_json::to_vec(value).map_or(usize::MAX, |text| text.len())
}

/// What is left for one writer when the others of the set have said so much.
pub(super) fn room_beside(others_bytes: usize) -> usize {
    ALL_BYTES_MAX.saturating_sub(others_bytes)
}

/// The reply, if it has room beside what the writer said before of its components. A refusal always has: without them.
pub(super) fn fit(
    mut reply: Reply,
    said_before: usize,
    room_bytes: usize,
) -> Result<Reply, Failure> {
    let components_bytes = if reply.components.is_empty() {
        0
    } else {
        bytes(&reply.components)
    };
    let said = [components_bytes, bytes(&reply.evidence), said_before];
    let said = said.into_iter().fold(0, usize::saturating_add);
    let room_bytes = room_bytes.min(WORDS_BYTES_MAX);
    if said <= room_bytes {
        return Ok(reply);
    }
    if !reply.ok {
        reply.components.clear();
        return Ok(reply);
    }
    let why = format!("its evidence and components of {said} bytes have no room in {room_bytes}");
    Err(failure(WriterFailure::Outofresources, why))
}

/// Leaves out documents that have no room in one answer: each had some when it was given, but not beside all others.
pub(super) fn fit_documents(writers: &mut [WriterInfo]) {
    let mut room_bytes = DOCUMENTS_BYTES_MAX;
    for writer in writers {
        let bytes = writer.metadata.as_ref().map_or(0, bytes);
        match room_bytes.checked_sub(bytes) {
            Some(left) => room_bytes = left,
            None => writer.metadata = None,
        }
    }
}

/// A text of a writer's for people: one line, and not endless.
pub(super) fn for_people(text: &str) -> String {
    let mut line = String::new();
    for letter in text.chars() {
        if line.len() + letter.len_utf8() > TEXT_BYTES_MAX {
            line.push('\u{2026}');
            break;
        }
        line.push(if letter.is_control() { ' ' } else { letter });
    }
    line
}

#[cfg(test)]
mod tests {
    //! The bounds add up.
    use super::*;
    use crate::writer::registry::CONNECTED_MAX;
    use crate::writer::socket::NAME_BYTES_MAX;
    use guest_agent_wire::host::WriterReport;
    use guest_agent_wire::types::WriterState;
    use serde_json::Value;

    #[test]
    fn the_longest_reports_of_as_many_writers_as_can_connect_fit_into_an_answer() {
        // A quote takes two bytes on the wire.
        let name = "\"".repeat(NAME_BYTES_MAX);
        let report = WriterReport {
            instance_id: name.clone(),
            name,
            state: WriterState::FailedAtBackupComplete,
            held: Some(false),
            evidence: Value::Null,
            components: Vec::new(),
            failure: Some(failure(
                WriterFailure::Inconsistentsnapshot,
                for_people(&"\"".repeat(10_000)),
            )),
            took_ms: u64::MAX,
        };
        let keys = "\"evidence\":,\"components\":,,".len();
        let all = CONNECTED_MAX * (bytes(&report) + keys) + ALL_BYTES_MAX;
        // File systems have the rest.
        assert!(all < MESSAGE_BYTES_MAX - (16 << 10), "{all}");
    }

    #[test]
    fn a_text_for_people_is_one_line_and_cut_between_letters() {
        assert_eq!(for_people("disk\nfull\u{1}"), "disk full ");
        let cut = for_people(&"\u{20ac}".repeat(1000));
        assert_eq!(cut.chars().count(), 500 / 3 + 1);
    }
}
