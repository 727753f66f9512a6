//! Client of a vhost-blk control socket.
//!
//! Called by `run`, `recover` and `sets`. A set belongs to the connection that prepared it: a client that is dropped
//! before `keep` undoes the set, which is also what happens when this process dies.

use crate::link::LinkError;
use crate::qmp::{CallError, QmpClient};
use serde_json::Value;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::broadcast;
use uuid::Uuid;
use vhost_blk_wire::command::{
    Command, Getfd, QuerySnapshots, QueryVolumes, SnapshotRead, SnapshotReadDone,
};
use vhost_blk_wire::qmp::ErrorClass;
use vhost_blk_wire::types::{SnapshotInfo, VolumeInfo};

/// Why a daemon did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[error("vhost-blk at {}: {source}", control.display())]
pub struct StorageError {
    /// The daemon.
    pub control: PathBuf,
    /// What went wrong.
    #[source]
    pub source: CallError,
}

impl StorageError {
    /// True if the daemon answered with this class.
    #[must_use]
    pub fn is(&self, class: ErrorClass) -> bool {
        match &self.source {
            CallError::Refused(error) => error.is(class),
            CallError::Link(_) | CallError::BadAnswer { .. } => false,
        }
    }

    /// True if the daemon did not answer in time.
    #[must_use]
    pub fn is_deadline(&self) -> bool {
        match &self.source {
            CallError::Link(LinkError::Deadline { .. }) => true,
            CallError::Link(
                LinkError::Closed { .. } | LinkError::Absent { .. } | LinkError::Unreadable { .. },
            )
            | CallError::Refused(_)
            | CallError::BadAnswer { .. } => false,
        }
    }

    /// True if the daemon has answered at all, so that its state is known.
    #[must_use]
    pub fn is_answer(&self) -> bool {
        match &self.source {
            CallError::Refused(_) => true,
            CallError::Link(_) | CallError::BadAnswer { .. } => false,
        }
    }
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct StorageClient {
    control: PathBuf,
    client: QmpClient,
}

impl StorageClient {
    /// Connects.
    ///
    /// # Errors
    /// Nobody answers within `limit`.
    pub async fn connect(control: &Path, limit: Duration) -> Result<Self, StorageError> {
        match QmpClient::connect(control, limit).await {
            Ok(client) => Ok(Self {
                control: control.to_owned(),
                client,
            }),
            Err(source) => Err(StorageError {
                control: control.to_owned(),
                source,
            }),
        }
    }

    /// Its control socket.
    #[must_use]
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Why the connection is closed, if it is.
    #[must_use]
    pub fn closed(&self) -> Option<String> {
        self.client.closed()
    }

    /// Events from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Value> {
        self.client.subscribe()
    }

    /// Runs a command.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub async fn call<C: Command>(
        &self,
        command: &C,
        limit: Duration,
    ) -> Result<C::Return, StorageError>
    where
        C::Return: Send,
    {
        let result = self.client.ours(command, None, Some(limit)).await;
        result.map_err(|source| self.error(source))
    }

    /// Its volumes.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub async fn volumes(&self, limit: Duration) -> Result<Vec<VolumeInfo>, StorageError> {
        self.call(&QueryVolumes {}, limit).await
    }

    /// All its snapshots.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub async fn snapshots(&self, limit: Duration) -> Result<Vec<SnapshotInfo>, StorageError> {
        self.call(&QuerySnapshots { volume: None }, limit).await
    }

    /// Copies a snapshot to a descriptor. Waits as long as it takes; `JOB_PROGRESS` events go to `progress`
    /// (bytes done, bytes in all).
    ///
    /// # Errors
    /// See [`StorageError`].
    pub async fn read(
        &self,
        snapshot: Uuid,
        fd: OwnedFd,
        limit: Duration,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<SnapshotReadDone, StorageError> {
        let fdname = format!("read-{snapshot}");
        let getfd = Getfd {
            fdname: fdname.clone(),
        };
        let passed = self.client.ours(&getfd, Some(fd), Some(limit)).await;
        passed.map_err(|source| self.error(source))?;
        let mut events = self.client.subscribe();
        let command = SnapshotRead {
            snapshot,
            fdname,
            range: None,
        };
        let reading = self.client.ours(&command, None, None);
        tokio::pin!(reading);
        let mut listening = true;
        loop {
            tokio::select! {
                done = &mut reading => return done.map_err(|source| self.error(source)),
                event = events.recv(), if listening => match event {
                    Ok(event) => {
                        if let Some((done, total)) = job_progress(&event) {
                            progress(done, total);
                        }
                    }
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => listening = false,
                },
            }
        }
    }

    fn error(&self, source: CallError) -> StorageError {
        StorageError {
            control: self.control.clone(),
            source,
        }
    }
}

fn job_progress(event: &Value) -> Option<(u64, u64)> {
    if event.get("event")?.as_str()? != "JOB_PROGRESS" {
        return None;
    }
    let data = event.get("data")?;
    let number = |name: &str| data.get(name).and_then(Value::as_u64);
    Some((number("done-bytes")?, number("total-bytes")?))
}
