//! QMP client: for QEMU's monitor, for vhost-blk's control socket and for the bridge's own socket.
//!
//! Called by `vm`, `storage` and the command line. It follows the JSON stream (not lines), tolerates events and members
//! it does not know, and keeps a deadline per call; a connection whose call timed out is thrown away. QEMU's commands are
//! `qapi`'s types, ours the wire crate's: both come down to a name and arguments.

use crate::link::{self, Decode, Incoming, Link, LinkError};
use rustix::net::sockopt::socket_peercred;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;
use tokio::sync::broadcast;
use vhost_blk_wire::command::Command as WireCommand;
use vhost_blk_wire::frame::JsonStream;
use vhost_blk_wire::qmp::QmpError;

/// Why a command has no result.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// The connection failed.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The peer refused.
    #[error(transparent)]
    Refused(QmpError),
    /// The peer's answer is not what the command promises.
    #[error("{command}: unexpected answer: {why}")]
    BadAnswer {
        /// The command.
        command: String,
        /// What is wrong.
        why: String,
    },
}

/// A negotiated QMP connection.
#[derive(Debug)]
pub struct QmpClient {
    link: Link,
    peer_pid: Option<i32>,
}

struct QmpDecoder {
    stream: JsonStream,
}

impl Decode for QmpDecoder {
    fn decode(&mut self, bytes: &[u8]) -> Result<Vec<Incoming>, String> {
        self.stream.push(bytes).map_err(|error| error.to_string())?;
        let mut messages = Vec::new();
        while let Some(mut value) = self.stream.next_value().map_err(|e| e.to_string())? {
            let id = value.get("id").and_then(Value::as_u64);
            let result = match value.as_object_mut() {
                None => None,
                Some(object) => match (object.remove("return"), object.get("error")) {
                    (Some(value), _) => Some(Ok(value)),
                    (None, Some(error)) => Some(Err(error.clone())),
                    (None, None) => None,
                },
            };
            messages.push(match (id, result) {
                (Some(id), Some(result)) => Incoming::Answer { id, result },
                (Some(_) | None, _) => Incoming::Unasked(value),
            });
        }
        Ok(messages)
    }
}

impl QmpClient {
    /// Connects, reads the greeting and leaves negotiation mode, all within `limit`.
    ///
    /// # Errors
    /// Nobody listens, or he does not speak QMP.
    pub async fn connect(path: &Path, limit: Duration) -> Result<Self, CallError> {
        let connecting = async {
            let stream = link::connect(path, limit).await?;
            let peer_pid = socket_peercred(&stream)
                .ok()
                .map(|peer| peer.pid.as_raw_nonzero().get());
            let decoder = QmpDecoder {
                stream: JsonStream::new(),
            };
            let (link, mut unasked) = Link::new(stream, decoder, 1);
            let client = Self { link, peer_pid };
            // A receiver that sees its end has seen the connection's.
            while let Ok(message) = unasked.recv().await {
                if message.get("QMP").is_some() {
                    let none = json!({});
                    client.execute("qmp_capabilities", none, None, None).await?;
                    return Ok(client);
                }
            }
            let closed = || LinkError::Closed {
                why: "closed".to_owned(),
            };
            Err(client.link.closed().unwrap_or_else(closed).into())
        };
        match tokio::time::timeout(limit, connecting).await {
            Ok(result) => result,
            Err(_elapsed) => Err(CallError::Link(LinkError::Deadline {
                limit_ms: limit.as_millis(),
            })),
        }
    }

    /// The process at the other end.
    #[must_use]
    pub fn peer_pid(&self) -> Option<i32> {
        self.peer_pid
    }

    /// Everything the peer says unasked from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Value> {
        self.link.subscribe()
    }

    /// Why the connection is closed, if it is.
    #[must_use]
    pub fn closed(&self) -> Option<String> {
        self.link.closed().map(|error| error.to_string())
    }

    /// Runs a command by name. `fd` travels with it. Without a limit it waits as long as the connection lives.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn execute(
        &self,
        name: &str,
        arguments: Value,
        fd: Option<OwnedFd>,
        limit: Option<Duration>,
    ) -> Result<Value, CallError> {
        let encode = |id: u64| {
            let mut bytes = json!({"execute": name, "arguments": arguments, "id": id})
                .to_string()
                .into_bytes();
            bytes.push(b'\n');
            bytes
        };
        match self.link.call(encode, fd, limit).await? {
            Ok(value) => Ok(value),
            Err(error) => Err(match serde_json::from_value(error) {
                Ok(error) => CallError::Refused(error),
                Err(error) => bad_answer(name, &error),
            }),
        }
    }

    /// Runs one of QEMU's commands.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn qemu<C: qapi::Command>(
        &self,
        command: &C,
        limit: Duration,
    ) -> Result<C::Ok, CallError> {
        let arguments = arguments(C::NAME, command)?;
        self.typed(C::NAME, arguments, None, Some(limit)).await
    }

    /// Runs one of our own commands.
    ///
    /// # Errors
    /// See [`CallError`].
    pub fn ours<C: WireCommand>(
        &self,
        command: &C,
        fd: Option<OwnedFd>,
        limit: Option<Duration>,
    ) -> impl Future<Output = Result<C::Return, CallError>> + Send + use<'_, C>
    where
        C::Return: Send,
    {
        // Encoded at once, so that the future holds no command.
        let arguments = arguments(C::NAME, command);
        async move { self.typed(C::NAME, arguments?, fd, limit).await }
    }

    async fn typed<T: DeserializeOwned>(
        &self,
        name: &str,
        arguments: Value,
        fd: Option<OwnedFd>,
        limit: Option<Duration>,
    ) -> Result<T, CallError> {
        let value = self.execute(name, arguments, fd, limit).await?;
        serde_json::from_value(value).map_err(|error| bad_answer(name, &error))
    }
}

fn arguments(name: &str, command: &impl Serialize) -> Result<Value, CallError> {
    match serde_json::to_value(command) {
        Ok(Value::Null) => Ok(json!({})),
        Ok(arguments) => Ok(arguments),
        Err(error) => Err(bad_answer(name, &error)),
    }
}

fn bad_answer(command: &str, error: &serde_json::Error) -> CallError {
    CallError::BadAnswer {
        command: command.to_owned(),
        why: error.to_string(),
    }
}
