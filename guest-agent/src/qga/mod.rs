//! The QEMU guest agent protocol, so that libvirt, Proxmox and KubeVirt freeze through the same writers and the same hold.
//!
//! Started by `main` on a thread of its own. `stream` cuts bytes into objects, `command` decides, `info` describes the guest.
//! Freeze and thaw go to `quiesce::service` and are answered when they are done; this thread goes on reading, so ping and
//! status are answered during a freeze. The end of a connection ends nothing: Proxmox opens one for each command.

pub mod command;
mod info;
pub mod stream;

use crate::quiesce::service::Service;
use crate::transport::{Connection, Endpoint, serve};
use command::Guest;
use stream::{Objects, Piece};

/// Serves the port for ever.
pub fn run(endpoint: &Endpoint, service: &Service, guest: &Guest) -> std::io::Error {
    serve(endpoint, |connection| converse(connection, service, guest))
}

fn converse(connection: &Connection, service: &Service, guest: &Guest) {
    let mut objects = Objects::default();
    let mut buffer = [0; 4096];
    while let Some(count) = connection.read(&mut buffer) {
        objects.take(buffer.get(..count).unwrap_or_default(), |piece| {
            let outbox = connection.outbox();
            match piece {
                Piece::Object(bytes) => {
                    command::hear(&bytes, service, guest, move |reply| outbox.send(reply));
                }
                Piece::TooLong => outbox.send(command::parse_error()),
            }
        });
    }
}
