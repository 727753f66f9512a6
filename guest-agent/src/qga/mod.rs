//! The QEMU guest agent protocol, so that libvirt, Proxmox and KubeVirt find what they know, and freeze through the same
//! writers and the same hold.
//!
//! Started by `agent` on a thread of its own.
//!
//! | room | what it is |
//! |---|---|
//! | `stream` | cuts bytes into objects |
//! | `command` | which commands there are, who does them, replies |
//! | `workshop` | the thread that does what touches disks and processes |
//! | `arguments`, `failed`, `policy`, `program` | what every family of commands needs |
//! | `info`, `clock`, `users`, `accounts`, `network`, `disks`, `processors`, `memory`, `files`, `exec`, `power` | families of commands |
//!
//! Freeze and thaw go to `quiesce::service`. The end of a connection ends nothing: Proxmox opens one for each command.

mod accounts;
mod arguments;
mod clock;
pub mod command;
mod disks;
pub mod exec;
mod failed;
mod files;
mod info;
mod memory;
mod network;
pub mod policy;
mod power;
mod processors;
mod program;
pub mod stream;
mod users;
mod workshop;

use crate::filesystem::plan::Sources;
use crate::journal;
use crate::quiesce::service::Service;
use crate::transport::{Connection, Endpoint, serve};
use command::{Desk, Door, Syncs};
use policy::Policy;
use std::io;
use std::sync::mpsc::sync_channel;
use stream::{Objects, Piece};
use workshop::{WAITING_MAX, Workshop};

/// Serves the port for ever.
pub fn run(endpoint: &Endpoint, service: &Service, sources: &Sources, policy: Policy) -> io::Error {
    for name in policy.unknown(command::exists) {
        journal::note(format_args!("blocked or allowed, but no command: {name}"));
    }
    let (work, jobs) = sync_channel(WAITING_MAX);
    let mut workshop = Workshop::new(sources.clone());
    let of_thread = service.clone();
    let started = std::thread::Builder::new()
        .name("qga-work".into())
        .spawn(move || workshop.run(&jobs, &of_thread));
    if let Err(error) = started {
        return error;
    }
    let desk = Desk {
        service: service.clone(),
        policy,
        work,
        door: Door::default(),
    };
    serve(endpoint, |connection| converse(connection, &desk))
}

fn converse(connection: &Connection, desk: &Desk) {
    let mut objects = Objects::default();
    let syncs = Syncs::default();
    let mut buffer = [0; 4096];
    while let Some(count) = connection.read(&mut buffer) {
        objects.take(buffer.get(..count).unwrap_or_default(), |piece| {
            let outbox = connection.outbox();
            match piece {
                Piece::Object(bytes) => {
                    command::hear(&bytes, desk, &syncs, move |reply| outbox.send(reply));
                }
                Piece::TooLong => outbox.send(command::parse_error()),
            }
        });
    }
}
