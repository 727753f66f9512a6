//! Clients of the guest's agent: of ours by its native protocol, over the host end of its virtio-serial port or over vsock;
//! of QEMU's (`stock`) in guests that have none of ours.
//!
//! Called by `run` and `recover`. Invariants: a lost connection or a late answer ends the conversation, and with it the
//! set, because the agent thaws when its host side goes away; nothing is retried on a new connection except `abort`.

mod address;
mod dialling;
mod lines;
mod stock;

pub use address::{AgentAddress, BadAddress};
pub use stock::{StockClient, StockFilesystem, StockGuest, StockSystem, VssWriter};

use crate::link::{Link, LinkError};
use guest_agent_wire::host::{
    AgentError, BackupComplete, Command, Frozen, Hello, Identified, PROTOCOL_VERSIONS,
    PostSnapshot, Prepared, Request, Restore, Thawed, WritersSaid,
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// Most writers, file systems and exempt extents that are believed: each is compared with others, and the exempt ones with every
/// request of the disks while the guest is frozen.
const WRITERS_MAX: usize = 1024;
const FILESYSTEMS_MAX: usize = 4096;
const EXEMPT_MAX: usize = 256;
/// Places of what need not be in a copy.
const LEFT_OUT_MAX: usize = 4096;

/// While an answer is waited for: how often the agent is asked whether it is still the same.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Why the agent gave no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum GuestError {
    /// The connection failed, or the answer came too late.
    #[error("guest agent: {0}")]
    Link(#[from] LinkError),
    /// The agent refused, and told per writer and file system why.
    #[error("guest agent: {0}")]
    Refused(Box<AgentError>),
    /// The answer is not what the protocol promises.
    #[error("guest agent: unexpected answer to {command}: {why}")]
    BadAnswer {
        /// The request.
        command: &'static str,
        /// What is wrong.
        why: String,
    },
    /// There is no version of the protocol that both speak.
    #[error(
        "VERSION_MISMATCH: this bridge speaks versions {PROTOCOL_VERSIONS:?} of the agent's protocol; {agent}"
    )]
    VersionMismatch {
        /// What the agent says of itself.
        agent: String,
    },
}

/// A conversation with whichever agent the guest has.
#[derive(Debug)]
pub enum Guest {
    /// Ours.
    Native(GuestClient),
    /// QEMU's.
    Stock(StockClient),
}

impl Guest {
    /// Connects and waits until the agent answers, since a guest that boots opens its port late.
    ///
    /// # Errors
    /// Nobody answers within `limit`, or he speaks no common version.
    pub async fn connect(address: &AgentAddress, limit: Duration) -> Result<Self, GuestError> {
        Ok(match address {
            AgentAddress::Serial(_)
            | AgentAddress::Vsock { .. }
            | AgentAddress::HybridVsock { .. } => {
                Self::Native(GuestClient::connect(address, limit).await?)
            }
            AgentAddress::Qga(_) => Self::Stock(StockClient::connect(address, limit).await?),
        })
    }

    /// Why the conversation is over, if it is.
    #[must_use]
    pub fn closed(&self) -> Option<String> {
        match self {
            Self::Native(guest) => guest.closed(),
            Self::Stock(guest) => guest.closed(),
        }
    }
}

/// An open conversation with our own agent.
#[derive(Debug)]
pub struct GuestClient {
    link: Link,
    hello: Hello,
}

impl GuestClient {
    /// Connects and says hello, again and again: a guest that boots opens its port late.
    ///
    /// # Errors
    /// Nobody answers within `limit`, or he speaks no common version.
    pub async fn connect(address: &AgentAddress, limit: Duration) -> Result<Self, GuestError> {
        let (link, hello) = dialling::until_answered(address, limit, dialling::greet).await?;
        Ok(Self { link, hello })
    }

    /// What the agent said of itself.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Ends the conversation; what is under way in it fails with `why`.
    pub fn close(&self, why: &str) {
        self.link.close(why);
    }

    /// Why the conversation is over, if it is.
    #[must_use]
    pub fn closed(&self) -> Option<String> {
        self.link.closed().map(|error| error.to_string())
    }

    /// Writers and file systems.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn identify(&self, limit: Duration) -> Result<Identified, GuestError> {
        let identified: Identified = self.call("identify", Command::Identify {}, limit).await?;
        bounded(
            "identify",
            "exempt extents",
            identified.exempt.len(),
            EXEMPT_MAX,
        )?;
        bounded("identify", "writers", identified.writers.len(), WRITERS_MAX)?;
        let filesystems = identified.filesystems.len();
        bounded("identify", "file systems", filesystems, FILESYSTEMS_MAX)?;
        Ok(identified)
    }

    /// Prepares writers and flushes file systems.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn prepare(
        &self,
        prepare: guest_agent_wire::host::Prepare,
        limit: Duration,
    ) -> Result<Prepared, GuestError> {
        self.call("prepare", Command::Prepare(prepare), limit).await
    }

    /// Freezes writers, then file systems.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn freeze(
        &self,
        freeze: guest_agent_wire::host::Freeze,
        limit: Duration,
    ) -> Result<Frozen, GuestError> {
        let frozen: Frozen = self.call("freeze", Command::Freeze(freeze), limit).await?;
        bounded("freeze", "exempt extents", frozen.exempt.len(), EXEMPT_MAX)?;
        if let Some(found) = &frozen.not_to_snapshot {
            let what = "extents of what need not be in a copy";
            bounded("freeze", what, found.extents.len(), LEFT_OUT_MAX)?;
            let told = found.names.len() + found.reasons.len();
            bounded("freeze", "names of it", told, EXEMPT_MAX)?;
        }
        bounded("freeze", "writers", frozen.writers.len(), WRITERS_MAX)?;
        let filesystems = frozen.filesystems.len();
        bounded("freeze", "file systems", filesystems, FILESYSTEMS_MAX)?;
        Ok(frozen)
    }

    /// Thaws file systems, then writers.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn thaw(
        &self,
        set: String,
        generation: u64,
        limit: Duration,
    ) -> Result<Thawed, GuestError> {
        let command = Command::Thaw { set, generation };
        self.call("thaw", command, limit).await
    }

    /// Tells writers the verdict.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn post_snapshot(
        &self,
        post: PostSnapshot,
        limit: Duration,
    ) -> Result<WritersSaid, GuestError> {
        self.call("post_snapshot", Command::PostSnapshot(post), limit)
            .await
    }

    /// Tells writers what became of the backup.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn backup_complete(
        &self,
        outcome: BackupComplete,
        limit: Duration,
    ) -> Result<WritersSaid, GuestError> {
        self.call("backup_complete", Command::BackupComplete(outcome), limit)
            .await
    }

    /// Tells writers that their files will be replaced.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn pre_restore(
        &self,
        restore: Restore,
        limit: Duration,
    ) -> Result<WritersSaid, GuestError> {
        self.call("pre_restore", Command::PreRestore(restore), limit)
            .await
    }

    /// Tells the same writers how that went.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn post_restore(
        &self,
        restore: Restore,
        limit: Duration,
    ) -> Result<WritersSaid, GuestError> {
        self.call("post_restore", Command::PostRestore(restore), limit)
            .await
    }

    /// Undoes the set.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn abort(
        &self,
        set: String,
        reason: String,
        limit: Duration,
    ) -> Result<(), GuestError> {
        let command = Command::Abort { set, reason };
        let _nothing: Value = self.call("abort", command, limit).await?;
        Ok(())
    }

    async fn call<T: DeserializeOwned>(
        &self,
        name: &'static str,
        command: Command,
        limit: Duration,
    ) -> Result<T, GuestError> {
        let encode = |id| encode(id, command);
        let call = self.link.call(encode, None, Some(limit));
        let Some(run) = &self.hello.run else {
            return decode(name, call.await?);
        };
        tokio::select! {
            // Its answer was sent before that of any status that came behind it.
            biased;
            answer = call => decode(name, answer?),
            lost = self.another_run(run) => Err(lost.into()),
        }
    }

    /// Comes back when another run of the agent answers, which knows nothing of what was asked. QEMU does not close the
    /// connection behind a virtio-serial port when a program in the guest ends.
    async fn another_run(&self, run: &str) -> LinkError {
        loop {
            sleep(LOOK_EVERY).await;
            let status = |id| encode(id, Command::Status {});
            let status = self.link.call(status, None, None);
            // One that is late is not waited for: it may have been lost, and the call has a limit of its own.
            let Ok(Ok(Ok(status))) = timeout(LOOK_EVERY, status).await else {
                continue;
            };
            let now = status.get("run").and_then(Value::as_str);
            if now.is_some_and(|now| now != run) {
                let why = "the agent was started anew".to_owned();
                self.link.close(&why);
                return LinkError::Closed { why };
            }
        }
    }
}

fn bounded(command: &'static str, what: &str, count: usize, max: usize) -> Result<(), GuestError> {
    if count <= max {
        return Ok(());
    }
    let why = format!("{count} {what}, more than {max}");
    Err(GuestError::BadAnswer { command, why })
}

fn encode(id: u64, command: Command) -> Vec<u8> {
    // Our own types always serialise; an empty line would be answered by nobody and end at the deadline.
    let mut bytes = serde_json::to_vec(&Request { id, command }).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

fn decode<T: DeserializeOwned>(
    command: &'static str,
    answer: Result<Value, Value>,
) -> Result<T, GuestError> {
    let bad = |error: serde_json::Error| GuestError::BadAnswer {
        command,
        why: error.to_string(),
    };
    match answer {
        Ok(value) => serde_json::from_value(value).map_err(bad),
        Err(error) => {
            let error: AgentError = serde_json::from_value(error).map_err(bad)?;
            Err(GuestError::Refused(Box::new(error)))
        }
    }
}

/// Everything that is done with bytes of a guest before they are believed, for whoever makes up bytes. Panics if more was kept
/// of them than may be.
#[cfg(any(test, feature = "fuzzing"))]
pub fn hear_anything(chunks: &[&[u8]]) {
    stock::hear_anything(chunks);
    for answer in lines::answers(chunks) {
        let name = "made up";
        drop(dialling::greeted(answer.clone()));
        drop(decode::<Prepared>(name, answer.clone()));
        drop(decode::<Frozen>(name, answer.clone()));
        drop(decode::<Thawed>(name, answer.clone()));
        drop(decode::<WritersSaid>(name, answer.clone()));
        match decode::<Identified>(name, answer) {
            Ok(identified) => drop(identified),
            Err(error) => drop(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests;
