//! What the writers of database servers share: who they are and where their agent is (command line), where a server's files
//! lie, and calls of an asynchronous client from the writer library's blocking methods, none without a limit.
//!
//! Called by the writers for PostgreSQL, MariaDB, MySQL, Redis and etcd. It knows no database.

use clap::Args;
use guest_agent::filesystem::plan::Sources;
use guest_agent_wire::metadata::{RestoreMethod, Restoring, WriterRestoreEvents};
use guest_agent_wire::sdk::{Call, Veto};
use guest_agent_wire::types::{Hold, Level, WriterFailure};
use guest_agent_wire::writer::{Registration, SOCKET_PATH};
use std::fmt::Display;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;

/// Between two looks whether an answer is still waited for.
const LOOK: Duration = Duration::from_millis(50);

/// Who a writer is, and where its agent listens.
#[derive(Args, Clone, Debug)]
pub struct Identity {
    /// The agent's socket for writers.
    #[arg(long, default_value = SOCKET_PATH)]
    pub socket: PathBuf,
    /// Name of this instance, unique in the guest; by default made of the server's address.
    #[arg(long)]
    pub instance: Option<String>,
    /// Longest time that the server can be held, milliseconds.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub freeze_timeout_ms: u64,
    /// Unit that a restore stops and starts.
    #[arg(long)]
    pub service: Option<String>,
}

impl Identity {
    /// As its class, for people under this name, for a server at this address.
    #[must_use]
    pub fn registration(
        &self,
        class_id: &str,
        name: &str,
        address: &str,
        hold: Hold,
    ) -> Registration {
        let instance = self.instance.clone();
        let instance = instance.unwrap_or_else(|| format!("{class_id}:{address}"));
        Registration {
            level: Level::BackEnd,
            freeze_timeout_ms: self.freeze_timeout_ms,
            hold,
            ..Registration::new(class_id, instance, name)
        }
    }

    /// The restore that all database servers want: stopped, files in place, started. The writer takes no part in it, for it
    /// has nobody to talk to meanwhile.
    #[must_use]
    pub fn restoring(&self, service: &str) -> Restoring {
        Restoring {
            service: Some(self.service.clone().unwrap_or_else(|| service.to_owned())),
            writer_restore: WriterRestoreEvents::Never,
            ..Restoring::by(RestoreMethod::StopRestoreStart)
        }
    }
}

/// On which disks files lie.
#[derive(Clone, Debug)]
pub struct Disks {
    sources: Sources,
}

impl Default for Disks {
    /// Those of this machine.
    fn default() -> Self {
        Self::seen_by(Sources {
            proc: "/proc".into(),
            sys: "/sys".into(),
            only_under: None,
        })
    }
}

impl Disks {
    /// As this `/proc` and `/sys` tell.
    #[must_use]
    pub fn seen_by(sources: Sources) -> Self {
        Self { sources }
    }

    /// Why a set of these disks (by serial; none means all) does not hold these paths: the first that lies elsewhere. Of a
    /// disk without a serial that cannot be told, and it is let pass.
    #[must_use]
    pub fn not_held(&self, set: &[String], paths: &[PathBuf]) -> Option<String> {
        if set.is_empty() {
            return None;
        }
        paths.iter().find_map(|path| self.why_not_held(set, path))
    }

    fn why_not_held(&self, set: &[String], path: &Path) -> Option<String> {
        let extents = match self.sources.extents_of(path) {
            Ok(extents) => extents,
            Err(error) => return Some(format!("{}: {error}", path.display())),
        };
        if extents.is_empty() {
            return Some(format!("{} lies on no disk", path.display()));
        }
        let outside = extents
            .iter()
            .find(|extent| !extent.serial.is_empty() && !set.contains(&extent.serial))?;
        Some(format!(
            "{} lies on disk {} ({}), which is not in the set",
            path.display(),
            outside.serial,
            outside.disk
        ))
    }
}

/// Runs what an asynchronous client does, one thing at a time.
#[derive(Debug)]
pub struct Calls {
    runtime: Runtime,
}

impl Calls {
    /// With one thread of its own, which keeps the client's connections alive between two calls.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn new() -> std::io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        Ok(Self { runtime })
    }

    /// Waits for `asked`, as long as somebody waits for the answer to `call`. A server that says no, or does not answer, is a
    /// veto; `judge` tells of which kind.
    ///
    /// # Errors
    /// What it said.
    pub fn within<T, E: Display>(
        &self,
        call: &Call<'_>,
        what: &str,
        judge: impl Fn(&E) -> WriterFailure,
        asked: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Veto> {
        self.runtime.block_on(async {
            let mut asked = std::pin::pin!(asked);
            loop {
                let look = call.remaining().min(LOOK);
                match tokio::time::timeout(look, &mut asked).await {
                    Ok(Ok(value)) => return Ok(value),
                    Ok(Err(error)) => {
                        return Err(Veto::new(judge(&error), format!("{what}: {error}")));
                    }
                    Err(_) if call.is_over() => {
                        return Err(Veto::timeout(format!("{what}: no answer in time")));
                    }
                    Err(_) => {}
                }
            }
        })
    }

    /// Lets a future run beside the calls: the half of a client that reads its connection.
    pub fn beside(&self, half: impl Future<Output = ()> + Send + 'static) {
        // Its handle is of no use: it ends with its connection.
        drop(self.runtime.spawn(half));
    }

    /// Looks after a hold beside the calls. `until_lost` ends when the hold is lost, and says why.
    #[must_use]
    pub fn watch(&self, until_lost: impl Future<Output = String> + Send + 'static) -> Watch {
        let loss = Arc::new(OnceLock::new());
        let told = Arc::clone(&loss);
        let looking = self.runtime.spawn(async move {
            let why = until_lost.await;
            // Nobody else tells it.
            told.set(why).unwrap_or(());
        });
        Watch { loss, looking }
    }
}

/// A hold that is looked after, until this is dropped.
#[derive(Debug)]
pub struct Watch {
    loss: Arc<OnceLock<String>>,
    looking: JoinHandle<()>,
}

impl Watch {
    /// Whether the hold was not seen to be lost. Never waits.
    ///
    /// # Errors
    /// Why it is lost.
    pub fn still_holds(&self) -> Result<(), String> {
        match self.loss.get() {
            Some(why) => Err(why.clone()),
            // Whoever looks after nothing any more, without a word, has failed.
            None if self.looking.is_finished() => Err("nobody looks after the hold".to_owned()),
            None => Ok(()),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.looking.abort();
    }
}

#[cfg(test)]
mod tests;
