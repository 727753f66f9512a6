//! The channel is taken, carries the message of the specification, and holds nobody up.

use super::*;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, sendmsg};
use std::io::{IoSlice, Read, Write};
use std::os::fd::AsFd;

/// Sends a message as a front end does, with these descriptors.
fn send_with(connection: &UnixStream, bytes: &[u8], descriptors: &[std::os::fd::BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
    let sent = sendmsg(
        connection,
        &[IoSlice::new(bytes)],
        &mut ancillary,
        SendFlags::empty(),
    );
    assert_eq!(sent.unwrap(), bytes.len());
}

#[test]
fn channel_is_taken_and_carries_the_message_of_the_specification() {
    for payload in [0, 8] {
        let (front_end, connection) = UnixStream::pair().unwrap();
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        let mut message = header(SET_BACKEND_REQ_FD, NEED_REPLY, payload);
        message.resize(12 + payload as usize, 0);
        send_with(&front_end, &message, &[ours.as_fd()]);
        drop(ours);
        let offered = take(&connection).unwrap().unwrap();
        assert!(offered.needs_reply);
        assert!(take(&connection).unwrap().is_none(), "nothing is left");
        offered.channel.tell_config_change().unwrap();
        let mut told = [0; 12];
        theirs.read_exact(&mut told).unwrap();
        assert_eq!(told, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        acknowledge(&connection).unwrap();
        let mut answer = [0; 20];
        (&front_end).read_exact(&mut answer).unwrap();
        assert_eq!(answer[..12], [21, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0]);
        assert_eq!(answer[12..], [0; 8]);
    }
}

#[test]
fn other_messages_stay_where_they_are() {
    let (mut front_end, mut connection) = UnixStream::pair().unwrap();
    let others = [
        header(1, 0, 0),
        header(SET_BACKEND_REQ_FD, 0, 9),
        vec![21, 0, 0, 0, 1],
    ];
    for message in others {
        front_end.write_all(&message).unwrap();
        assert!(take(&connection).unwrap().is_none(), "{message:?}");
        let mut found = vec![0; message.len()];
        connection.read_exact(&mut found).unwrap();
        assert_eq!(found, message);
    }
}

#[test]
fn what_is_no_channel_is_refused() {
    let file = tempfile::tempfile().unwrap();
    let (front_end, connection) = UnixStream::pair().unwrap();
    let message = header(SET_BACKEND_REQ_FD, 0, 0);
    (&front_end).write_all(&message).unwrap();
    assert!(take(&connection).is_err(), "no descriptor");
    send_with(&front_end, &message, &[file.as_fd()]);
    assert!(take(&connection).is_err(), "a file");
}

#[test]
fn front_end_that_does_not_read_is_not_waited_for() {
    let (theirs, ours) = UnixStream::pair().unwrap();
    let channel = BackChannel::new(ours.into()).unwrap();
    // The kernel's buffer is finite.
    let mut told = 0;
    while channel.tell_config_change().is_ok() {
        told += 1;
        assert!(told < 1_000_000);
    }
    drop(theirs);
    assert!(channel.tell_config_change().is_err(), "and no signal");
}
