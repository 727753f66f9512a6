//! Listens on vsock: the host's way to a guest without a virtio-serial port.
//!
//! Called by `endpoint` alone. Invariants: only the host (CID 2) is ever talked to, since any process of the guest, and of a
//! guest inside this one, can dial the port too; conversations are bounded, and the oldest gives way, because a connection
//! whose host end died without a word stays open here for ever.

use super::endpoint::{Connection, talk};
use crate::journal;
use nix::sys::socket::{VsockAddr, bind, getpeername};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Shutdown, SocketFlags, SocketType, accept_with, listen, shutdown, socket_with,
};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread::Scope;
use std::time::Duration;

/// The host, as every guest sees it (`VMADDR_CID_HOST`).
const HOST: u32 = 2;
/// Any address of our own (`VMADDR_CID_ANY`).
const ANY: u32 = u32::MAX;
/// Conversations at once. The bridge needs one; a second is there before the end of the first is noticed.
const CONVERSATIONS: usize = 4;
/// Connections that the kernel keeps for us.
const BACKLOG: i32 = 8;
/// The device may come late, and another program may leave the port: ask again after this.
const RETRY: Duration = Duration::from_secs(2);

/// Listens for ever; each conversation has a thread of its own.
pub(super) fn serve(port: u32, converse: &(impl Fn(&Connection) + Sync)) -> io::Error {
    let mut said = None;
    std::thread::scope(|scope| {
        loop {
            // A guest without vsock has no such device, and must not be made to load the module.
            let listened = if Path::new("/dev/vsock").exists() {
                listen_on(port)
            } else {
                Err(Errno::NODEV.into())
            };
            let error = match listened {
                Ok(listener) => accept_from(&listener, scope, converse),
                Err(error) => error,
            };
            let told = error.to_string();
            if said.as_ref() != Some(&told) {
                journal::note(format_args!("vsock port {port}: {told}"));
                said = Some(told);
            }
            std::thread::sleep(RETRY);
        }
    })
}

fn listen_on(port: u32) -> io::Result<OwnedFd> {
    let listener = socket_with(
        AddressFamily::VSOCK,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    bind(listener.as_raw_fd(), &VsockAddr::new(ANY, port))?;
    listen(&listener, BACKLOG)?;
    Ok(listener)
}

fn accept_from<'scope>(
    listener: &OwnedFd,
    scope: &'scope Scope<'scope, '_>,
    converse: &'scope (impl Fn(&Connection) + Sync),
) -> io::Error {
    let mut open: Vec<Arc<OwnedFd>> = Vec::new();
    let mut turned_away = None;
    loop {
        let stream = match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(stream) => Arc::new(stream),
            Err(Errno::INTR | Errno::CONNABORTED) => continue,
            Err(error) => return error.into(),
        };
        match getpeername::<VsockAddr>(stream.as_raw_fd()) {
            Ok(peer) if is_host(peer.cid()) => {}
            Ok(peer) => {
                let cid = peer.cid();
                // Told once, or a stranger could fill the log.
                if turned_away.replace(cid) != Some(cid) {
                    journal::note(format_args!("vsock: CID {cid} was turned away"));
                }
                continue;
            }
            // Gone already.
            Err(_) => continue,
        }
        // A conversation that has ended keeps no descriptor but the one here.
        open.retain(|fd| Arc::strong_count(fd) > 1);
        if open.len() >= CONVERSATIONS {
            // Its reader sees the end and gives it up.
            shutdown(open.remove(0), Shutdown::Both).unwrap_or(());
        }
        open.push(Arc::clone(&stream));
        let started = std::thread::Builder::new()
            .name("vsock".into())
            .spawn_scoped(scope, move || talk(&stream, converse));
        if let Err(error) = started {
            journal::note(format_args!("no thread for a conversation: {error}"));
        }
    }
}

fn is_host(cid: u32) -> bool {
    cid == HOST
}

#[cfg(test)]
mod tests {
    //! Who is let in; that the kernel tells the truth about it is seen in a real guest.
    use super::*;

    #[test]
    fn only_the_host_is_let_in() {
        assert!(is_host(HOST));
        // The hypervisor (reserved), the guest itself over loopback, guests.
        for stranger in [0, 1, 3, 42, ANY] {
            assert!(!is_host(stranger), "{stranger}");
        }
    }
}
