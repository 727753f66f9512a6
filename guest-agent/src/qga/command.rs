//! Commands of the QEMU guest agent: which there are, who does them, what is allowed while frozen, and their replies.
//!
//! Called by `qga` with one object at a time. Replies are one compact line each, as Proxmox's client demands. Commands that
//! touch neither a disk nor a process are done at once, frozen or not: these are the ones a client needs to get out of a
//! freeze. All others are done by the `workshop` in the order they came, and are refused while anything is
//! frozen.
#![deny(clippy::indexing_slicing)]

use super::arguments::Arguments;
use super::clock;
use super::disks;
use super::failed::{Failed, Outcome};
use super::policy::Policy;
use super::power::{self, Sleep};
use super::workshop::{Answer, Job, Work, Workshop};
use super::{accounts, info, memory, network, processors, users};
use crate::quiesce::service::{Request, Service};
use serde_json::{Map, Value, json};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Sends a reply.
pub trait Reply: FnOnce(Vec<u8>) + Send + 'static {}
impl<F: FnOnce(Vec<u8>) + Send + 'static> Reply for F {}

/// What a command is done with.
#[derive(Debug)]
pub struct Desk {
    pub(super) service: Service,
    pub(super) policy: Policy,
    pub(super) work: SyncSender<Job>,
    pub(super) door: Door,
}

/// Counts thaws. What passes it goes to the actor in the order in which it was decided: no freeze that a thaw or a sync has
/// overtaken gets behind that, where nobody would thaw it.
#[derive(Clone, Debug, Default)]
pub(super) struct Door(Arc<Mutex<u64>>);

impl Door {
    fn lock(&self) -> MutexGuard<'_, u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A freeze's place behind other commands, lost to a thaw of any conversation and to a sync of its own.
#[derive(Debug)]
pub(super) struct Turn {
    door: Door,
    thaws: u64,
    syncs: Syncs,
    asked: u64,
}

impl Turn {
    /// `None`: it was given up.
    pub(super) fn begin(&self, ask: impl FnOnce()) -> Option<()> {
        let thaws = self.door.lock();
        (*thaws == self.thaws && self.syncs.count() == self.asked).then(ask)
    }
}

/// A conversation's count of syncs. A client that syncs has given up what it asked before: a reply that comes after all would
/// be taken for that of its next command.
#[derive(Clone, Debug, Default)]
pub struct Syncs(Arc<AtomicU64>);

impl Syncs {
    fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    fn begin_anew(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Who does a command.
#[derive(Clone, Copy)]
enum By {
    /// The thread that reads, at once.
    Reader(fn(&mut Arguments, &Desk) -> Outcome),
    /// The same, as a new beginning.
    Sync,
    /// The workshop, in order.
    Workshop(fn(&mut Arguments, &mut Workshop) -> Outcome),
    /// The actor, in order.
    Freeze(fn(&mut Arguments) -> Result<Request, Failed>),
    /// The actor, at once.
    Thaw,
    /// Nobody: QEMU's agent has it on other systems and names it here as disabled.
    Nobody,
}

impl By {
    fn is_allowed_while_frozen(self) -> bool {
        match self {
            Self::Reader(_) | Self::Sync | Self::Thaw => true,
            Self::Workshop(_) | Self::Freeze(_) | Self::Nobody => false,
        }
    }
}

struct Command {
    name: &'static str,
    by: By,
    /// It is answered when it succeeds; a failure always is.
    answers: bool,
}

const fn command(name: &'static str, by: By) -> Command {
    Command {
        name,
        by,
        answers: true,
    }
}

const fn silent(name: &'static str, by: By) -> Command {
    Command {
        name,
        by,
        answers: false,
    }
}

const COMMANDS: &[Command] = &[
    command("guest-sync-delimited", By::Sync),
    command("guest-sync", By::Sync),
    command("guest-ping", By::Reader(ping)),
    command("guest-info", By::Reader(about)),
    command("guest-fsfreeze-status", By::Reader(status)),
    command("guest-fsfreeze-thaw", By::Thaw),
    command("guest-fsfreeze-freeze", By::Freeze(freeze)),
    command("guest-fsfreeze-freeze-list", By::Freeze(freeze_list)),
    command("guest-get-time", By::Workshop(|a, _| clock::time(a))),
    command("guest-set-time", By::Workshop(|a, _| clock::set(a))),
    command(
        "guest-get-timezone",
        By::Workshop(|a, _| clock::time_zone(a)),
    ),
    command(
        "guest-get-osinfo",
        By::Workshop(|a, _| info::operating_system(a)),
    ),
    command(
        "guest-get-host-name",
        By::Workshop(|a, _| info::host_name(a)),
    ),
    command("guest-get-users", By::Workshop(|a, _| users::list(a))),
    command(
        "guest-get-fsinfo",
        By::Workshop(|a, w| disks::filesystems(a, &w.sources)),
    ),
    command(
        "guest-get-disks",
        By::Workshop(|a, w| disks::disks(a, &w.sources)),
    ),
    command(
        "guest-get-diskstats",
        By::Workshop(|a, _| disks::statistics(a)),
    ),
    command(
        "guest-fstrim",
        By::Workshop(|a, w| disks::fstrim(a, &w.sources)),
    ),
    command(
        "guest-network-get-interfaces",
        By::Workshop(|a, _| network::interfaces(a)),
    ),
    command("guest-get-vcpus", By::Workshop(|a, _| processors::list(a))),
    command("guest-set-vcpus", By::Workshop(|a, _| processors::set(a))),
    command(
        "guest-get-cpustats",
        By::Workshop(|a, _| processors::statistics(a)),
    ),
    command("guest-get-load", By::Workshop(|a, _| processors::load(a))),
    command(
        "guest-get-memory-blocks",
        By::Workshop(|a, _| memory::list(a)),
    ),
    command(
        "guest-set-memory-blocks",
        By::Workshop(|a, _| memory::set(a)),
    ),
    command(
        "guest-get-memory-block-info",
        By::Workshop(|a, _| memory::block_info(a)),
    ),
    command("guest-file-open", By::Workshop(|a, w| w.files.open(a))),
    command("guest-file-close", By::Workshop(|a, w| w.files.close(a))),
    command("guest-file-read", By::Workshop(|a, w| w.files.read(a))),
    command("guest-file-write", By::Workshop(|a, w| w.files.write(a))),
    command("guest-file-seek", By::Workshop(|a, w| w.files.seek(a))),
    command("guest-file-flush", By::Workshop(|a, w| w.files.flush(a))),
    command("guest-exec", By::Workshop(|a, w| w.children.start(a))),
    command(
        "guest-exec-status",
        By::Workshop(|a, w| w.children.status(a)),
    ),
    command(
        "guest-set-user-password",
        By::Workshop(|a, _| accounts::set_password(a)),
    ),
    command(
        "guest-ssh-get-authorized-keys",
        By::Workshop(|a, _| accounts::keys(a)),
    ),
    command(
        "guest-ssh-add-authorized-keys",
        By::Workshop(|a, _| accounts::add_keys(a)),
    ),
    command(
        "guest-ssh-remove-authorized-keys",
        By::Workshop(|a, _| accounts::remove_keys(a)),
    ),
    silent("guest-shutdown", By::Workshop(|a, _| power::shut_down(a))),
    silent(
        "guest-suspend-disk",
        By::Workshop(|a, _| power::suspend(a, Sleep::Disk)),
    ),
    silent(
        "guest-suspend-ram",
        By::Workshop(|a, _| power::suspend(a, Sleep::Ram)),
    ),
    silent(
        "guest-suspend-hybrid",
        By::Workshop(|a, _| power::suspend(a, Sleep::Hybrid)),
    ),
    command("guest-get-devices", By::Nobody),
];

/// There is a command of this name.
#[must_use]
pub fn exists(name: &str) -> bool {
    COMMANDS.iter().any(|command| command.name == name)
}

/// Name and arguments of a request; first, its id, which is given back whatever is wrong with the rest.
fn open(bytes: &[u8]) -> (Option<Value>, Result<(String, Arguments), Failed>) {
    let Ok(Value::Object(mut members)) = serde_json::from_slice(bytes) else {
        return (None, Err(Failed::generic("JSON parse error")));
    };
    let id = members.remove("id");
    (id, read(members))
}

fn read(mut members: Map<String, Value>) -> Result<(String, Arguments), Failed> {
    let member = |words: &str| Failed::generic(format!("QMP input member {words}"));
    let name = match members.remove("execute") {
        None => None,
        Some(Value::String(name)) => Some(name),
        Some(_) => return Err(member("'execute' must be a string")),
    };
    let arguments = match members.remove("arguments") {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return Err(member("'arguments' must be an object")),
    };
    if let Some(name) = members.keys().next() {
        return Err(member(&format!("'{name}' is unexpected")));
    }
    let name = name.ok_or_else(|| Failed::generic("QMP input lacks member 'execute'"))?;
    Ok((name, Arguments::new(arguments)))
}

/// Takes one object and replies, now or when it is done.
pub fn hear(bytes: &[u8], desk: &Desk, syncs: &Syncs, reply: impl Reply) {
    let (id, opened) = open(bytes);
    let allowed = opened.and_then(|(name, arguments)| {
        let command = allow(&name, &desk.policy, desk.service.is_frozen())?;
        Ok((command, arguments))
    });
    let (command, mut arguments) = match allowed {
        Ok(allowed) => allowed,
        Err(failed) => return reply(line(Err(failed), id, false)),
    };
    let name = command.name;
    let work = match command.by {
        By::Reader(function) => {
            return reply(line(function(&mut arguments, desk), id, false));
        }
        By::Sync => {
            let outcome = sync(&mut arguments);
            if outcome.is_ok() {
                let _thaws = desk.door.lock();
                syncs.begin_anew();
            }
            return reply(line(outcome, id, name == "guest-sync-delimited"));
        }
        By::Thaw => Err(arguments.end()),
        By::Freeze(function) => Ok(function(&mut arguments).map(|request| {
            let turn = Turn {
                door: desk.door.clone(),
                thaws: *desk.door.lock(),
                syncs: syncs.clone(),
                asked: syncs.count(),
            };
            Work::Freeze(request, turn)
        })),
        By::Workshop(function) => Ok(Ok(Work::Function(function, arguments))),
        By::Nobody => return reply(line(Err(disabled(name)), id, false)),
    };
    let (asked, syncs, answers) = (syncs.count(), syncs.clone(), command.answers);
    let answer: Answer = Box::new(move |outcome| {
        if syncs.count() == asked && (answers || outcome.is_err()) {
            reply(line(outcome, id, false));
        }
    });
    match work {
        Ok(Ok(work)) => desk.give(Job { name, work, answer }),
        Ok(Err(failed)) | Err(Err(failed)) => answer(Err(failed)),
        Err(Ok(())) => {
            let mut thaws = desk.door.lock();
            *thaws += 1;
            thaw(&desk.service, answer);
        }
    }
}

impl Desk {
    fn give(&self, job: Job) {
        if let Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) =
            self.work.try_send(job)
        {
            (job.answer)(Err(Failed::generic("too many commands are waiting")));
        }
    }
}

/// The reply to what is not a command.
#[must_use]
pub fn parse_error() -> Vec<u8> {
    line(Err(Failed::generic("JSON parse error")), None, false)
}

fn disabled(name: &str) -> Failed {
    Failed::command_not_found(format!("Command {name} has been disabled"))
}

/// The refusal of a command that does not go while anything is frozen.
pub(super) fn refused_while_frozen(name: &str) -> Failed {
    Failed::command_not_found(format!(
        "Command {name} has been disabled: the agent is in frozen state"
    ))
}

fn allow(name: &str, policy: &Policy, frozen: bool) -> Result<&'static Command, Failed> {
    let command = COMMANDS.iter().find(|command| command.name == name);
    let Some(command) = command else {
        return Err(Failed::command_not_found(format!(
            "The command {name} has not been found"
        )));
    };
    if !policy.allows(name) || matches!(command.by, By::Nobody) {
        return Err(disabled(name));
    }
    if frozen && !command.by.is_allowed_while_frozen() {
        return Err(refused_while_frozen(name));
    }
    Ok(command)
}

fn sync(arguments: &mut Arguments) -> Outcome {
    let id = arguments.integer("id")?;
    arguments.end()?;
    Ok(json!(id))
}

fn ping(arguments: &mut Arguments, _desk: &Desk) -> Outcome {
    arguments.end()?;
    Ok(json!({}))
}

fn status(arguments: &mut Arguments, desk: &Desk) -> Outcome {
    arguments.end()?;
    Ok(json!(if desk.service.is_frozen() {
        "frozen"
    } else {
        "thawed"
    }))
}

fn about(arguments: &mut Arguments, desk: &Desk) -> Outcome {
    arguments.end()?;
    let frozen = desk.service.is_frozen();
    let commands: Vec<Value> = COMMANDS
        .iter()
        .map(|command| {
            let enabled = allow(command.name, &desk.policy, frozen).is_ok();
            json!({"name": command.name, "enabled": enabled, "success-response": command.answers})
        })
        .collect();
    Ok(json!({"version": env!("CARGO_PKG_VERSION"), "supported_commands": commands}))
}

fn freeze(arguments: &mut Arguments) -> Result<Request, Failed> {
    arguments.end()?;
    Ok(Request::QgaFreeze { only: None })
}

fn freeze_list(arguments: &mut Arguments) -> Result<Request, Failed> {
    let only = arguments.maybe_texts("mountpoints")?;
    arguments.end()?;
    Ok(Request::QgaFreeze { only })
}

fn thaw(service: &Service, answer: Answer) {
    service.ask(Request::QgaThaw, move |outcome| {
        answer(outcome.map_err(|error| {
            // The words of QEMU's agent for Windows, which clients know.
            Failed::generic(format!("couldn't hold writes: {}", error.message))
        }));
    });
}

fn line(outcome: Outcome, id: Option<Value>, delimited: bool) -> Vec<u8> {
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
