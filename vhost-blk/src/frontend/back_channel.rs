//! The channel on which the device speaks first (vhost-user specification, "Back-end communication" and "Back-end message types"), and
//! the one thing it says there: that its configuration has changed.
//!
//! `listener` takes the channel off the connection, `handler` keeps it. The vhost crate reads SET_BACKEND_REQ_FD as well, but keeps the
//! descriptor to itself, knows no VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, and could not hand the channel over to another daemon.
//!
//! Invariants: nothing here waits for the front end, which may never read; a message that is no SET_BACKEND_REQ_FD stays where it is.

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketType,
    recv, recvmsg, send, sockopt,
};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

/// `VHOST_USER_SET_BACKEND_REQ_FD`.
const SET_BACKEND_REQ_FD: u32 = 21;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE: u32 = 2;
/// Flags of a message: version 1, in the lowest two bits.
const VERSION: u32 = 1;
/// Flag: this is an answer.
const REPLY: u32 = 1 << 2;
/// Flag: an answer is wanted.
const NEED_REPLY: u32 = 1 << 3;
/// Request, flags, size of the payload.
const HEADER_BYTES: usize = 12;
/// The request has no payload; a number is passed over.
const PAYLOAD_MAX: usize = 8;

/// The device's own end.
#[derive(Debug)]
pub(super) struct BackChannel(UnixStream);

/// A front end has sent a channel.
#[derive(Debug)]
pub(super) struct Offered {
    pub(super) channel: BackChannel,
    /// It wants to hear whether it was taken, if that was negotiated.
    pub(super) needs_reply: bool,
}

fn number(bytes: &[u8], place: usize) -> Option<u32> {
    let word = bytes.chunks_exact(4).nth(place)?;
    Some(u32::from_le_bytes(word.try_into().ok()?))
}

fn header(request: u32, flags: u32, payload_bytes: u32) -> Vec<u8> {
    [request, VERSION | flags, payload_bytes]
        .map(u32::to_le_bytes)
        .concat()
}

/// Takes SET_BACKEND_REQ_FD off the connection; `None`, and nothing is taken, if something else comes next.
///
/// # Errors
/// If the message has no stream socket with it, or the connection fails.
pub(super) fn take(connection: &UnixStream) -> io::Result<Option<Offered>> {
    let mut bytes = [0; HEADER_BYTES + PAYLOAD_MAX];
    let head = bytes.get_mut(..HEADER_BYTES).unwrap_or_default();
    let (_, peeked) = match recv(connection, head, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Err(rustix::io::Errno::AGAIN) => return Ok(None),
        peeked => peeked?,
    };
    let payload = number(&bytes, 2).and_then(|size| usize::try_from(size).ok());
    let (Some(flags), Some(payload)) = (number(&bytes, 1), payload) else {
        return Ok(None);
    };
    if peeked < HEADER_BYTES
        || number(&bytes, 0) != Some(SET_BACKEND_REQ_FD)
        || payload > PAYLOAD_MAX
    {
        return Ok(None);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let whole = bytes.get_mut(..HEADER_BYTES + payload).unwrap_or_default();
    let length = whole.len();
    let received = recvmsg(
        connection,
        &mut [IoSliceMut::new(whole)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL,
    )?;
    let descriptor = ancillary.drain().find_map(|message| {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            descriptors.next()
        } else {
            None
        }
    });
    let descriptor = descriptor.filter(|_| received.bytes == length);
    let descriptor =
        descriptor.ok_or_else(|| io::Error::other("SET_BACKEND_REQ_FD without a descriptor"))?;
    Ok(Some(Offered {
        channel: BackChannel::new(descriptor)?,
        needs_reply: flags & NEED_REPLY != 0,
    }))
}

/// Answers SET_BACKEND_REQ_FD: taken.
pub(super) fn acknowledge(connection: &UnixStream) -> io::Result<()> {
    let mut bytes = header(SET_BACKEND_REQ_FD, REPLY, 8);
    bytes.extend(0_u64.to_le_bytes());
    say(connection, &bytes)
}

/// Sends a whole message without waiting.
fn say(to: &UnixStream, bytes: &[u8]) -> io::Result<()> {
    let sent = send(to, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
    if sent == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

impl BackChannel {
    /// A channel over what a front end, or another daemon, has sent.
    ///
    /// # Errors
    /// If it is no Unix stream socket.
    pub(super) fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let is_channel = sockopt::socket_domain(&descriptor)? == AddressFamily::UNIX
            && sockopt::socket_type(&descriptor)? == SocketType::STREAM;
        if is_channel {
            Ok(Self(UnixStream::from(descriptor)))
        } else {
            Err(io::Error::other("a back-end channel that is no socket"))
        }
    }

    /// Another handle on the same channel.
    pub(super) fn copy(&self) -> io::Result<UnixStream> {
        self.0.try_clone()
    }

    /// Tells that the configuration has changed: the front end reads it again, and tells the guest. No answer is asked for.
    pub(super) fn tell_config_change(&self) -> io::Result<()> {
        say(&self.0, &header(CONFIG_CHANGE, 0, 0))
    }
}

#[cfg(test)]
mod tests;
