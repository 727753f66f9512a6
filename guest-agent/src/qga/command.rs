//! Commands of the QEMU guest agent: which there are, what is allowed while frozen, and their replies.
//!
//! Called by `qga` with one object at a time. Replies are one compact line each, as Proxmox's client demands.
#![deny(clippy::indexing_slicing)]

use super::info;
use crate::filesystem::plan::Sources;
use crate::quiesce::service::{Request, Service};
use serde::Deserialize;
use serde_json::{Value, json};

/// What the informative commands look at.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Where file systems are found.
    pub sources: Sources,
}

/// Sends a reply.
pub trait Reply: FnOnce(Vec<u8>) + Send + 'static {}
impl<F: FnOnce(Vec<u8>) + Send + 'static> Reply for F {}

/// All commands; second, whether it is allowed while frozen.
const COMMANDS: &[(&str, bool)] = &[
    ("guest-sync-delimited", true),
    ("guest-sync", true),
    ("guest-ping", true),
    ("guest-info", true),
    ("guest-fsfreeze-status", true),
    ("guest-fsfreeze-thaw", true),
    ("guest-fsfreeze-freeze", false),
    ("guest-fsfreeze-freeze-list", false),
    ("guest-get-fsinfo", false),
    ("guest-get-osinfo", false),
    ("guest-get-host-name", false),
    ("guest-get-time", false),
];

#[derive(Debug, Deserialize)]
struct Envelope {
    execute: String,
    #[serde(default)]
    arguments: Value,
    #[serde(default)]
    id: Option<Value>,
}

/// A failure as QEMU words it.
#[derive(Debug, PartialEq, Eq)]
struct Failed {
    class: &'static str,
    desc: String,
}

fn generic(desc: impl Into<String>) -> Failed {
    Failed {
        class: "GenericError",
        desc: desc.into(),
    }
}

/// Takes one object and replies, now or when it is done.
pub fn hear(bytes: &[u8], service: &Service, guest: &Guest, reply: impl Reply) {
    let envelope: Envelope = match serde_json::from_slice(bytes) {
        Ok(envelope) => envelope,
        Err(_) => {
            reply(parse_error());
            return;
        }
    };
    let id = envelope.id;
    let name = envelope.execute.as_str();
    let answered = allow(name, service.is_frozen()).and_then(|()| match name {
        "guest-fsfreeze-freeze" => Ok(Some(Request::QgaFreeze { only: None })),
        "guest-fsfreeze-freeze-list" => freeze_list(&envelope.arguments).map(Some),
        "guest-fsfreeze-thaw" => Ok(Some(Request::QgaThaw)),
        _ => Ok(None),
    });
    match answered {
        Err(failed) => reply(line(Err(failed), id, false)),
        Ok(None) => {
            let value = at_once(name, &envelope.arguments, service, guest);
            reply(line(value, id, name == "guest-sync-delimited"));
        }
        Ok(Some(request)) => {
            let is_thaw = matches!(request, Request::QgaThaw);
            service.ask(request, move |answer| {
                let value = answer.map_err(|error| {
                    generic(if is_thaw {
                        // The words of QEMU's agent for Windows, which clients know.
                        format!("couldn't hold writes: {}", error.message)
                    } else {
                        error.message
                    })
                });
                reply(line(value, id, false));
            });
        }
    }
}

/// The reply to what is not a command.
#[must_use]
pub fn parse_error() -> Vec<u8> {
    line(Err(generic("JSON parse error")), None, false)
}

fn allow(name: &str, frozen: bool) -> Result<(), Failed> {
    match COMMANDS.iter().find(|(command, _)| *command == name) {
        None => Err(Failed {
            class: "CommandNotFound",
            desc: format!("The command {name} has not been found"),
        }),
        Some((_, false)) if frozen => Err(Failed {
            class: "CommandNotFound",
            desc: format!("Command {name} has been disabled: the agent is in frozen state"),
        }),
        Some(_) => Ok(()),
    }
}

fn freeze_list(arguments: &Value) -> Result<Request, Failed> {
    let only =
        match arguments.get("mountpoints") {
            None => None,
            Some(list) => Some(serde_json::from_value(list.clone()).map_err(|_| {
                generic("Invalid parameter type for 'mountpoints', expected: array")
            })?),
        };
    Ok(Request::QgaFreeze { only })
}

fn at_once(
    name: &str,
    arguments: &Value,
    service: &Service,
    guest: &Guest,
) -> Result<Value, Failed> {
    match name {
        "guest-sync" | "guest-sync-delimited" => match arguments.get("id") {
            Some(id) if id.is_i64() || id.is_u64() => Ok(id.clone()),
            Some(_) => Err(generic(
                "Invalid parameter type for 'id', expected: integer",
            )),
            None => Err(generic("Parameter 'id' is missing")),
        },
        "guest-ping" => Ok(json!({})),
        "guest-info" => Ok(about(service.is_frozen())),
        "guest-fsfreeze-status" => Ok(json!(if service.is_frozen() {
            "frozen"
        } else {
            "thawed"
        })),
        "guest-get-fsinfo" => info::filesystems(&guest.sources).map_err(|e| generic(e.to_string())),
        "guest-get-osinfo" => Ok(info::operating_system()),
        "guest-get-host-name" => info::host_name().map_err(|error| generic(error.to_string())),
        "guest-get-time" => info::time().map_err(|error| generic(error.to_string())),
        // Named in COMMANDS but not here; the test below forbids it.
        _ => Err(generic(format!("{name} does nothing"))),
    }
}

fn about(frozen: bool) -> Value {
    let commands: Vec<Value> = COMMANDS
        .iter()
        .map(|(name, while_frozen)| {
            json!({"name": name, "enabled": *while_frozen || !frozen, "success-response": true})
        })
        .collect();
    json!({"version": env!("CARGO_PKG_VERSION"), "supported_commands": commands})
}

fn line(outcome: Result<Value, Failed>, id: Option<Value>, delimited: bool) -> Vec<u8> {
    let mut object = match outcome {
        Ok(value) => json!({ "return": value }),
        Err(failed) => json!({"error": {"class": failed.class, "desc": failed.desc}}),
    };
    if let (Some(id), Some(object)) = (id, object.as_object_mut()) {
        object.insert("id".to_owned(), id);
    }
    let mut bytes = if delimited { vec![0xff] } else { Vec::new() };
    bytes.extend_from_slice(object.to_string().as_bytes());
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
mod tests;
