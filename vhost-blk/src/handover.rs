//! One daemon gives everything to the next: the message between them, and who serves when one of them fails.
//!
//! Called by `daemon`. Knows sessions as things that are taken apart and put together, and nothing of what is in them.
//!
//! The old daemon has closed its stores when it sends; the new one opens them, prepares the sessions and then says `TAKEN`. Until then
//! the old one keeps every descriptor, and takes up again what it has given if the other end closes, fails or says nothing in time.
//! So at every moment exactly one of them may touch rings and disks, and the guest is never left without a disk in silence: if both die,
//! its connection closes.
//!
//! The message: magic (8 bytes), length of the text and number of descriptors (u32 each), the text (JSON), then the descriptors in
//! pieces of `PIECE`, each with one byte. Descriptors are in the order of the text: of each disk its listener and its session's, at last
//! the control listener.

use crate::config::Config;
use crate::control::HAND_OVER_VERSION;
use crate::frontend::{BadSession, Session, SessionState};
use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;
use vhost_blk_wire::command::{Command, Getfd, HandOver, HandOverVolume, QmpCapabilities};
use vhost_blk_wire::frame::JsonStream;
use vhost_blk_wire::qmp::ServerMessage;

const MAGIC: [u8; 8] = *b"vmshadow";
/// Bytes of text.
const TEXT_MAX: usize = 4 << 20;
/// Descriptors of one message of the kernel (its limit is 253).
const PIECE: usize = 128;
/// Descriptors of a hand-over.
const DESCRIPTORS_MAX: usize = 64 * 1024;
/// The new daemon's word that it serves.
const TAKEN: u8 = b'T';
/// Longest wait of each for the other: the new one opens all disks meanwhile.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why nothing was handed over.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// `--replace` without a control socket to ask on.
    #[error("--replace needs --control, the socket of the daemon that is to be replaced")]
    NoControl,
    /// The other daemon does not want to, and goes on.
    #[error("the running daemon refuses: {0}")]
    Refused(String),
    /// What came is not a hand-over.
    #[error("not a hand-over: {0}")]
    Malformed(String),
    /// A session in it is not whole.
    #[error("not a hand-over")]
    Session(#[from] BadSession),
    /// This daemon, as it was told to serve the disk, could not have got such a session from a front end.
    #[error("disk {volume}: its front end's session does not fit")]
    Unfit {
        /// The disk.
        volume: String,
        /// What does not.
        #[source]
        source: io::Error,
    },
    /// The connection to the other daemon.
    #[error("the other daemon cannot be reached")]
    Io(#[from] io::Error),
}

/// A disk that is handed over.
#[derive(Debug)]
pub struct GivenDisk {
    /// Name in the control protocol.
    pub volume: String,
    /// Its vhost-user socket.
    pub listener: UnixListener,
    /// The front end's session, if one is connected.
    pub session: Option<Session>,
}

/// Everything that one daemon gives to the next.
#[derive(Debug)]
pub struct Given {
    /// All disks, in the order of the configuration.
    pub disks: Vec<GivenDisk>,
    /// The control socket.
    pub control: Option<UnixListener>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    version: u32,
    disks: Vec<DiskText>,
    control: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DiskText {
    volume: String,
    session: Option<SessionState>,
}

/// What became of what was given.
#[derive(Debug)]
pub enum Outcome {
    /// The other daemon serves.
    Taken,
    /// It does not and will not: the giver has to go on.
    Kept(String),
}

impl Given {
    /// Gives everything to the daemon at the other end and waits for its word.
    pub fn give(&self, to: &UnixStream) -> Outcome {
        let kept = |error: &io::Error| Outcome::Kept(error.to_string());
        if let Err(error) = to
            .set_read_timeout(Some(PATIENCE))
            .and_then(|()| to.set_write_timeout(Some(PATIENCE)))
            .and_then(|()| self.send(to))
        {
            return kept(&error);
        }
        let mut word = [0];
        match retry_on_intr(|| rustix::io::read(to, &mut word)) {
            Ok(1) if word == [TAKEN] => return Outcome::Taken,
            Ok(_) => return Outcome::Kept("the other daemon gave up".to_owned()),
            Err(error) => tracing::warn!(%error, "no word from the other daemon"),
        }
        // From here on it cannot say that it has taken over; but it may just have.
        if let Err(error) = to.shutdown(Shutdown::Both) {
            tracing::debug!(%error, "the other daemon has gone");
        }
        match retry_on_intr(|| rustix::io::read(to, &mut word)) {
            Ok(1) if word == [TAKEN] => Outcome::Taken,
            Ok(_) => Outcome::Kept("the other daemon took too long".to_owned()),
            Err(error) => kept(&error.into()),
        }
    }

    fn send(&self, to: &UnixStream) -> io::Result<()> {
        let mut descriptors: Vec<BorrowedFd<'_>> = Vec::new();
        let mut disks = Vec::new();
        for disk in &self.disks {
            descriptors.push(disk.listener.as_fd());
            let session = disk.session.as_ref().map(|session| {
                let (state, of_session) = session.take_apart();
                descriptors.extend(of_session);
                state
            });
            disks.push(DiskText {
                volume: disk.volume.clone(),
                session,
            });
        }
        descriptors.extend(self.control.as_ref().map(AsFd::as_fd));
        let text = serde_json::to_vec(&Text {
            version: HAND_OVER_VERSION,
            disks,
            control: self.control.is_some(),
        })?;
        let number = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
        let mut head = MAGIC.to_vec();
        head.extend(number(text.len()));
        head.extend(number(descriptors.len()));
        head.extend(text);
        (&*to).write_all(&head)?;
        for piece in descriptors.chunks(PIECE) {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PIECE))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !ancillary.push(SendAncillaryMessage::ScmRights(piece)) {
                return Err(io::Error::other("no room for descriptors"));
            }
            sendmsg(
                to,
                &[IoSlice::new(&[0])],
                &mut ancillary,
                SendFlags::NOSIGNAL,
            )?;
        }
        Ok(())
    }

    /// Receives what [`Self::give`] sends.
    ///
    /// # Errors
    /// [`HandoverError`].
    pub fn receive(from: &UnixStream) -> Result<Self, HandoverError> {
        let malformed = |what: &str| HandoverError::Malformed(what.to_owned());
        from.set_read_timeout(Some(PATIENCE))?;
        let mut head = [0; 16];
        (&*from).read_exact(&mut head)?;
        let Some((magic, numbers)) = head.split_first_chunk::<8>() else {
            return Err(malformed("its head"));
        };
        if *magic != MAGIC {
            return Err(malformed("another magic"));
        }
        let number = |bytes: &[u8]| {
            let bytes = <[u8; 4]>::try_from(bytes).unwrap_or([0xff; 4]);
            usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(usize::MAX)
        };
        let (text_bytes, count) = numbers.split_at(4);
        let (text_bytes, count) = (number(text_bytes), number(count));
        if text_bytes > TEXT_MAX || count > DESCRIPTORS_MAX {
            return Err(malformed("more than there can be"));
        }
        let mut text = vec![0; text_bytes];
        (&*from).read_exact(&mut text)?;
        let mut descriptors = Vec::new();
        while descriptors.len() < count {
            receive_some(from, &mut descriptors)?;
        }
        let text: Text =
            serde_json::from_slice(&text).map_err(|error| malformed(&error.to_string()))?;
        if text.version != HAND_OVER_VERSION {
            return Err(malformed("another version"));
        }
        let mut descriptors = descriptors.into_iter();
        let mut disks = Vec::new();
        for disk in text.disks {
            let listener = descriptors.next().ok_or(BadSession::Descriptors)?;
            let session = disk.session;
            let session = session.map(|state| Session::put_together(state, &mut descriptors));
            disks.push(GivenDisk {
                volume: disk.volume,
                listener: listener.into(),
                session: session.transpose()?,
            });
        }
        let control = match text.control {
            true => Some(descriptors.next().ok_or(BadSession::Descriptors)?.into()),
            false => None,
        };
        if descriptors.next().is_some() {
            return Err(malformed("descriptors that nobody asked for"));
        }
        Ok(Self { disks, control })
    }
}

fn receive_some(from: &UnixStream, descriptors: &mut Vec<OwnedFd>) -> Result<(), HandoverError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PIECE))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut buffers = [IoSliceMut::new(&mut byte)];
    let received = recvmsg(from, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC);
    let length = received.map_err(io::Error::from)?.bytes;
    let before = descriptors.len();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = message {
            descriptors.extend(some);
        }
    }
    if length == 0 || descriptors.len() == before {
        return Err(HandoverError::Malformed(
            "descriptors are missing".to_owned(),
        ));
    }
    Ok(())
}

/// A hand-over to us that has begun.
#[derive(Debug)]
pub struct Taking {
    peer: UnixStream,
}

impl Taking {
    /// Asks the daemon on the control socket of `config` for everything.
    ///
    /// # Errors
    /// [`HandoverError`]; it goes on then.
    pub fn ask(config: &Config) -> Result<(Self, Given), HandoverError> {
        let control = config.control.as_deref().ok_or(HandoverError::NoControl)?;
        let (peer, theirs) = UnixStream::pair()?;
        ask(control, config, theirs)?;
        let given = Given::receive(&peer)?;
        let same = given.disks.iter().map(|disk| &disk.volume);
        if !same.eq(config.disks.iter().map(|disk| &disk.name)) {
            return Err(HandoverError::Malformed("other disks".to_owned()));
        }
        Ok((Self { peer }, given))
    }

    /// Tells the other daemon that this one serves from now on.
    ///
    /// # Errors
    /// If it cannot be told: it may be serving again, and nothing may be touched.
    pub fn taken(self) -> io::Result<()> {
        (&self.peer).write_all(&[TAKEN])
    }
}

/// Says `hand-over` on a control socket.
fn ask(control: &Path, config: &Config, theirs: UnixStream) -> Result<(), HandoverError> {
    const NAME: &str = "peer";
    let stream = UnixStream::connect(control)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let volumes = config
        .disks
        .iter()
        .map(|disk| HandOverVolume {
            volume: disk.name.clone(),
            socket: disk.socket.display().to_string(),
            base: disk.path.display().to_string(),
            shadow_storage: disk.shadow_storage.display().to_string(),
        })
        .collect();
    let hand_over = HandOver {
        fdname: NAME.to_owned(),
        version: HAND_OVER_VERSION,
        volumes,
    };
    let getfd = Getfd {
        fdname: NAME.to_owned(),
    };
    let mut answers = Answers {
        stream: &stream,
        frames: JsonStream::new(),
    };
    say(&stream, &QmpCapabilities::default(), None)?;
    answers.next()?;
    say(&stream, &getfd, Some(theirs.as_fd()))?;
    answers.next()?;
    // Ours closes with the other daemon's, so that its end is seen.
    drop(theirs);
    say(&stream, &hand_over, None)?;
    match answers.next() {
        // It ends its connections when it begins.
        Ok(()) | Err(HandoverError::Io(_)) => Ok(()),
        Err(refused) => Err(refused),
    }
}

fn say<C: Command>(
    stream: &UnixStream,
    command: &C,
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let text = serde_json::json!({ "execute": C::NAME, "arguments": command }).to_string();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> = descriptor.into_iter().collect();
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    let bytes = text.as_bytes();
    let sent = sendmsg(
        stream,
        &[IoSlice::new(bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    let mut stream = stream;
    stream.write_all(bytes.get(sent..).unwrap_or_default())
}

/// What the other daemon says on its control socket.
struct Answers<'a> {
    stream: &'a UnixStream,
    frames: JsonStream,
}

impl Answers<'_> {
    /// Waits for the answer of the last command.
    fn next(&mut self) -> Result<(), HandoverError> {
        loop {
            let value = self
                .frames
                .next_value()
                .map_err(|error| HandoverError::Malformed(error.to_string()))?;
            let Some(value) = value else {
                let mut bytes = [0; 4096];
                let length = retry_on_intr(|| rustix::io::read(self.stream, &mut bytes))
                    .map_err(io::Error::from)?;
                let read = bytes.get(..length).unwrap_or_default();
                if read.is_empty() {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                }
                self.frames
                    .push(read)
                    .map_err(|error| HandoverError::Malformed(error.to_string()))?;
                continue;
            };
            // The greeting is none of these.
            match serde_json::from_value(value) {
                Ok(ServerMessage::Return { .. }) => return Ok(()),
                Ok(ServerMessage::Error { error, .. }) => {
                    return Err(HandoverError::Refused(error.desc));
                }
                Ok(ServerMessage::Event { .. }) | Err(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests;
