//! Where a guest's agent is reached, and how a stream to it is opened.
//!
//! Called by `guest` and, for its words, by `config`, `cli` and the set document. It knows nothing of what is said on the
//! stream. Invariant: a stream over a hybrid socket has lost nothing but the line that answers `CONNECT`.

use crate::link::{self, LinkError, Stream};
use guest_agent_wire::host::VSOCK_PORT;
use nix::sys::socket::VsockAddr;
use rustix::net::sockopt::socket_error;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Between two tries while the agent does not listen yet.
const AGAIN: Duration = Duration::from_millis(200);
/// `OK` and a port number.
const ANSWER_BYTES_MAX: usize = 32;

/// Where an agent is reached. As text: a path, `vsock:CID[:PORT]`, `hybrid-vsock:PATH[:PORT]`, `qga:PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum AgentAddress {
    /// The Unix socket behind its virtio-serial port.
    Serial(PathBuf),
    /// The kernel's vsock (vhost-vsock).
    Vsock {
        /// Address of the guest.
        cid: u32,
        /// The agent's port.
        port: u32,
    },
    /// The Unix socket of Cloud Hypervisor, Firecracker or vhost-device-vsock.
    HybridVsock {
        /// The socket.
        socket: PathBuf,
        /// The agent's port.
        port: u32,
    },
    /// The Unix socket behind the port `org.qemu.guest_agent.0`, where QEMU's own guest agent is asked (a guest without
    /// an agent of ours, Linux or Windows).
    Qga(PathBuf),
}

/// Text that is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no agent's address: {why}")]
pub struct BadAddress {
    text: String,
    why: &'static str,
}

impl FromStr for AgentAddress {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        let bad = |why| BadAddress {
            text: text.to_owned(),
            why,
        };
        if let Some(rest) = text.strip_prefix("vsock:") {
            let (cid, port) = match rest.split_once(':') {
                Some((cid, port)) => (cid, port.parse()),
                None => (rest, Ok(VSOCK_PORT)),
            };
            let (Ok(cid), Ok(port)) = (cid.parse(), port) else {
                return Err(bad("vsock:CID or vsock:CID:PORT, in decimal numbers"));
            };
            return Ok(Self::Vsock { cid, port });
        }
        if let Some(rest) = text.strip_prefix("hybrid-vsock:") {
            // A path may contain colons: only a number behind the last one is a port.
            let (path, port) = match rest.rsplit_once(':').map(|(p, n)| (p, n.parse())) {
                Some((path, Ok(port))) => (path, port),
                Some((_, Err(_))) | None => (rest, VSOCK_PORT),
            };
            if path.is_empty() {
                return Err(bad("hybrid-vsock:PATH or hybrid-vsock:PATH:PORT"));
            }
            let socket = path.into();
            return Ok(Self::HybridVsock { socket, port });
        }
        if let Some(rest) = text.strip_prefix("qga:") {
            let path = rest.strip_prefix("unix:").unwrap_or(rest);
            if path.is_empty() {
                return Err(bad("qga:PATH"));
            }
            return Ok(Self::Qga(path.into()));
        }
        let path = text.strip_prefix("unix:").unwrap_or(text);
        if path.is_empty() {
            return Err(bad("a path, vsock:.., hybrid-vsock:.. or qga:.."));
        }
        Ok(Self::Serial(path.into()))
    }
}

impl fmt::Display for AgentAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // A path that would be read as something else.
            Self::Serial(path)
                if ["vsock:", "hybrid-vsock:", "unix:", "qga:"]
                    .iter()
                    .any(|p| path.to_string_lossy().starts_with(p)) =>
            {
                write!(f, "unix:{}", path.display())
            }
            Self::Serial(path) => write!(f, "{}", path.display()),
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
            Self::HybridVsock { socket, port } => {
                write!(f, "hybrid-vsock:{}:{port}", socket.display())
            }
            Self::Qga(path) => write!(f, "qga:{}", path.display()),
        }
    }
}

impl TryFrom<String> for AgentAddress {
    type Error = BadAddress;

    fn try_from(text: String) -> Result<Self, BadAddress> {
        text.parse()
    }
}

impl From<AgentAddress> for String {
    fn from(address: AgentAddress) -> Self {
        address.to_string()
    }
}

impl AgentAddress {
    /// The same with an absolute path, for records that outlive a working directory.
    ///
    /// # Errors
    /// There is no working directory.
    pub fn absolute(self) -> io::Result<Self> {
        Ok(match self {
            Self::Serial(path) => Self::Serial(std::path::absolute(path)?),
            Self::Vsock { cid, port } => Self::Vsock { cid, port },
            Self::HybridVsock { socket, port } => Self::HybridVsock {
                socket: std::path::absolute(socket)?,
                port,
            },
            Self::Qga(path) => Self::Qga(std::path::absolute(path)?),
        })
    }

    /// Opens a stream to the agent. Over vsock it tries until `limit`, since a guest that boots listens late; the socket of a
    /// serial port is there as long as the VM, whoever listens in it.
    pub(super) async fn connect(&self, limit: Duration) -> Result<Stream, LinkError> {
        if let Self::Serial(path) | Self::Qga(path) = self {
            return link::connect(path, limit).await;
        }
        let mut last = None;
        let trying = async {
            loop {
                let tried = match self {
                    Self::Serial(path) | Self::Qga(path) => link::connect(path, limit).await,
                    Self::Vsock { cid, port } => dial(*cid, *port).await.map_err(closed),
                    Self::HybridVsock { socket, port } => {
                        match link::connect(socket, limit).await {
                            Ok(stream) => pass_through(stream, *port).await.map_err(closed),
                            Err(error) => Err(error),
                        }
                    }
                };
                match tried {
                    Ok(stream) => break stream,
                    Err(error) => last = Some(error),
                }
                tokio::time::sleep(AGAIN).await;
            }
        };
        match tokio::time::timeout(limit, trying).await {
            Ok(stream) => Ok(stream),
            Err(_elapsed) => Err(last.unwrap_or(LinkError::Deadline {
                limit_ms: limit.as_millis(),
            })),
        }
    }
}

fn closed(error: io::Error) -> LinkError {
    LinkError::Closed {
        why: format!("connect: {error}"),
    }
}

/// Connects by the kernel's vsock.
async fn dial(cid: u32, port: u32) -> io::Result<Stream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    match nix::sys::socket::connect(socket.as_raw_fd(), &VsockAddr::new(cid, port)) {
        Ok(()) | Err(nix::Error::EINPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    let stream = UnixStream::from_std(net::UnixStream::from(socket))?;
    // Once it is connected or has failed.
    stream.writable().await?;
    socket_error(&stream)??;
    Ok(stream)
}

/// Asks the other end of a hybrid socket for a port of the guest.
async fn pass_through(stream: Stream, port: u32) -> io::Result<Stream> {
    let line = format!("CONNECT {port}\n");
    // The first bytes of a fresh socket always fit.
    let write = || rustix::io::write(&stream, line.as_bytes()).map_err(io::Error::from);
    let written = stream.async_io(Interest::WRITABLE, write).await?;
    if written != line.len() {
        return Err(io::Error::other("CONNECT was cut"));
    }
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        // One byte at a time: what follows the line is the agent's.
        let mut byte = [0];
        if answer.len() >= ANSWER_BYTES_MAX || link::read(&stream, &mut byte).await? == 0 {
            return Err(io::Error::other(format!(
                "nobody listens on port {port} of the guest"
            )));
        }
        answer.extend(byte);
    }
    if !answer.starts_with(b"OK ") {
        return Err(io::Error::other("CONNECT was not answered by OK"));
    }
    Ok(stream)
}

#[cfg(test)]
mod tests;
