//! What is printed: one line per event, for people or as JSON.
//!
//! Called by all. A closed standard output ends nothing: the writer's work is elsewhere.

use crate::config::{Command, Kind};
use guest_agent::writer::script::event;
use guest_agent_wire::sdk::Veto;
use guest_agent_wire::writer::{EventKind, Registration};
use serde_json::{Value, json};
use std::io::Write as _;
use std::time::Instant;

/// Where lines go, and in which form.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Report {
    json: bool,
}

impl Report {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// An event and how it went.
    pub(crate) fn event<T>(self, kind: &EventKind, start: Instant, outcome: &Result<T, Veto>) {
        let (name, set) = (event::name(kind).unwrap_or_default(), event::set(kind));
        let ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        let veto = outcome.as_ref().err();
        if self.json {
            let mut line = json!({"event": name, "set": set, "ok": veto.is_none(), "ms": ms});
            if let Some(veto) = veto {
                line["code"] = json!(veto.code);
                line["message"] = json!(veto.message);
            }
            return print(&line.to_string());
        }
        let set = if set.is_empty() {
            String::new()
        } else {
            format!(" of set {set}")
        };
        match veto {
            None => print(&format!("{name}{set}: done in {ms} ms")),
            Some(veto) => print(&format!("{name}{set}: {:?}: {}", veto.code, veto.message)),
        }
    }

    /// Something that belongs to no event.
    pub(crate) fn note(self, what: &str) {
        if self.json {
            print(&json!({ "note": what }).to_string());
        } else {
            print(what);
        }
    }

    /// `--check`: who it is and what it runs.
    pub(crate) fn checked(self, registration: &Registration, kind: &Kind) {
        let commands: serde_json::Map<String, Value> = match kind {
            Kind::Session(line) => [("session".to_owned(), json!(line))].into_iter().collect(),
            Kind::Commands(commands) => commands
                .iter()
                .map(|(event, command)| {
                    let text = match command {
                        Command::Script(file) => json!(file),
                        Command::Shell(line) => json!(line),
                    };
                    ((*event).to_owned(), text)
                })
                .collect(),
        };
        if self.json {
            return print(&json!({"registration": registration, "commands": commands}).to_string());
        }
        print(&format!(
            "{} ({}, {:?}, frozen for at most {} ms)",
            registration.name,
            registration.instance_id,
            registration.level,
            registration.freeze_timeout_ms
        ));
        for (event, command) in commands {
            print(&format!(
                "  {event}: {}",
                command.as_str().unwrap_or_default()
            ));
        }
    }
}

fn print(line: &str) {
    writeln!(std::io::stdout(), "{line}").unwrap_or(());
}
