//! The agent's end of the hold: starts the helper, asks it, and thaws in its place if it dies.
//!
//! Owned by `quiesce::actor`; a thread turns the helper's messages into [`FromHelper`]s for it. Keeps a duplicate of each
//! descriptor and remembers what the helper froze, for [`Holder::thaw_by_hand`].

use super::helper::ARGUMENT;
use super::message::{Ask, MESSAGE_BYTES_MAX, SLOTS_MAX, Tell};
use crate::filesystem::freeze;
use crate::filesystem::plan::Filesystem;
use crate::journal;
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_send_buffer_size_force;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags,
    SocketType, recvmsg, send, socketpair,
};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

/// Room for what each end may say while the other does not listen, so that with hundreds of file systems nothing is lost and
/// nobody waits.
const SOCKET_BYTES: usize = 8 << 20;

/// What the helper told, or that it is gone.
#[derive(Debug)]
pub enum FromHelper {
    /// A message; with `Opened` comes a duplicate of the descriptor.
    Told(Tell, Option<OwnedFd>),
    /// This helper (they are numbered) has closed its socket.
    Died(u64),
}

/// A helper process.
#[derive(Debug)]
pub struct Holder {
    state_dir: PathBuf,
    socket: Arc<OwnedFd>,
    child: Child,
    number: u64,
    duplicates: Vec<Option<OwnedFd>>,
}

/// Called for each message, on the holder's own thread.
pub type Sink = Box<dyn Fn(FromHelper) + Send>;

impl Holder {
    /// Starts a helper. `number` tells it from earlier ones.
    pub fn start(state_dir: &Path, number: u64, sink: Sink) -> io::Result<Self> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        for end in [&ours, &theirs] {
            // Refused to all but root; then the usual room must do.
            set_socket_send_buffer_size_force(end, SOCKET_BYTES).unwrap_or(());
        }
        let child = Command::new("/proc/self/exe")
            .arg(ARGUMENT)
            .arg("--state-dir")
            .arg(state_dir)
            // One heap for all threads, locked as a whole.
            .env("MALLOC_ARENA_MAX", "1")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let socket = Arc::new(ours);
        let of_thread = Arc::clone(&socket);
        std::thread::Builder::new()
            .name("hold".into())
            .spawn(move || listen(&of_thread, number, &sink))?;
        Ok(Self {
            state_dir: state_dir.to_owned(),
            socket,
            child,
            number,
            duplicates: Vec::new(),
        })
    }

    /// Process id of the helper.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Number given at the start.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Starts another helper in place of a dead one.
    pub fn restart(&mut self, sink: Sink) -> io::Result<()> {
        let state_dir = self.state_dir.clone();
        *self = Self::start(&state_dir, self.number + 1, sink)?;
        Ok(())
    }

    /// Ends a helper that is dead or silent. What it held must be thawed by hand.
    pub fn kill(&mut self) {
        // It may be gone already.
        self.child.kill().unwrap_or(());
    }

    /// Asks it to open these file systems, in this order. Answered by one `Opened` each.
    pub fn open(&mut self, filesystems: &[&Filesystem]) -> Result<(), Errno> {
        if filesystems.len() > SLOTS_MAX {
            return Err(Errno::TOOBIG);
        }
        self.duplicates = filesystems.iter().map(|_| None).collect();
        for (slot, filesystem) in filesystems.iter().enumerate() {
            let slot = u32::try_from(slot).map_err(|_| Errno::TOOBIG)?;
            let mut message = Ask::Open {
                slot,
                step: filesystem.step,
                device: filesystem.device,
            }
            .encode()
            .to_vec();
            let head = message.len();
            for path in &filesystem.mountpoints {
                let bytes = path.as_os_str().as_bytes();
                if message.len() + bytes.len() >= MESSAGE_BYTES_MAX {
                    break;
                }
                if message.len() > head {
                    message.push(0);
                }
                message.extend_from_slice(bytes);
            }
            self.send(&message)?;
        }
        Ok(())
    }

    /// Keeps the duplicate that came with `Opened`.
    pub fn keep(&mut self, slot: u32, duplicate: Option<OwnedFd>) {
        let place = usize::try_from(slot).ok();
        if let Some(place) = place.and_then(|slot| self.duplicates.get_mut(slot)) {
            *place = duplicate;
        }
    }

    /// Asks it.
    pub fn ask(&self, ask: Ask) -> Result<(), Errno> {
        self.send(&ask.encode())
    }

    /// Drops the duplicates and asks the helper to forget all file systems.
    pub fn close(&mut self) {
        self.duplicates.clear();
        // A dead helper has forgotten already.
        self.ask(Ask::Close).unwrap_or(());
    }

    /// Thaws these slots without the helper, the last first; returns each one's errno. A thread each, so that one that does
    /// not return keeps no other frozen; such a one is not waited for and answers ETIMEDOUT.
    pub fn thaw_by_hand(&self, slots: &[u32], patience: std::time::Duration) -> Vec<(u32, i32)> {
        let (done, answers) = std::sync::mpsc::channel();
        let mut results: Vec<(u32, i32)> = slots
            .iter()
            .rev()
            .map(|slot| (*slot, Errno::TIMEDOUT.raw_os_error()))
            .collect();
        let mut asked = 0;
        for (slot, _) in &results {
            let place = usize::try_from(*slot).ok();
            let fd = place.and_then(|slot| self.duplicates.get(slot)?.as_ref());
            let Some(Ok(fd)) = fd.map(OwnedFd::try_clone) else {
                continue;
            };
            let (slot, done) = (*slot, done.clone());
            let thread = std::thread::Builder::new().spawn(move || {
                let errno = freeze::thaw(fd).map_or_else(Errno::raw_os_error, |()| 0);
                done.send((slot, errno)).unwrap_or(());
            });
            asked += usize::from(thread.is_ok());
        }
        for _ in 0..asked {
            let Ok((slot, errno)) = answers.recv_timeout(patience) else {
                break;
            };
            if let Some(result) = results.iter_mut().find(|result| result.0 == slot) {
                result.1 = errno;
            }
        }
        results
    }

    fn send(&self, bytes: &[u8]) -> Result<(), Errno> {
        // A helper that is stopped must not stop the agent too.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        send(&*self.socket, bytes, flags).map(drop)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // Ends the listening thread, and the helper, which thaws first if need be.
        rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Both).unwrap_or(());
        if self.child.wait().is_err() {
            journal::note(format_args!("the helper could not be waited for"));
        }
    }
}

fn listen(socket: &OwnedFd, number: u64, sink: &Sink) {
    let mut bytes = [0; 256];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        let length = match received {
            Ok(received) => received.bytes,
            Err(Errno::INTR) => continue,
            Err(_) => 0,
        };
        let fd = control.drain().find_map(|message| {
            if let RecvAncillaryMessage::ScmRights(mut fds) = message {
                fds.next()
            } else {
                None
            }
        });
        match bytes.get(..length).and_then(Tell::decode) {
            Some(tell) => sink(FromHelper::Told(tell, fd)),
            None => {
                sink(FromHelper::Died(number));
                return;
            }
        }
    }
}
