//! Where operations on sets are carried out: in this process, or in a daemon.
//!
//! Called by `cli`. Both answer with the same types.

use super::args::{Global, Vm};
use crate::config::Config;
use crate::error::Error;
use crate::guest::AgentAddress;
use crate::protocol::{
    ListedVolume, QueryVolumes, QueryWriters, RestoreBegun, SET_PROGRESS, SetComplete, SetCreate,
    SetDelete, SetList, SetPostRestore, SetPreRestore, SetRecover, SetRevert, SetShow,
};
use crate::qmp::{CallError, QmpClient};
use crate::sets::backup::RestoreSession;
use crate::sets::{ListedSet, Sets};
use crate::snapshot::document::{Copy, CreateRequest, SetDocument, StepTime, VmTarget};
use crate::snapshot::intent::DEFAULT_STATE_DIRECTORY;
use crate::snapshot::run::Limits;
use crate::snapshot::step::FaultPoint;
use guest_agent_wire::components::FilesRestored;
use guest_agent_wire::host::{Identified, WriterOutcomes, WritersSaid};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use vhost_blk_wire::command::Command as WireCommand;

/// Until the daemon greets.
const CONNECT: Duration = Duration::from_secs(5);

/// Who carries out operations.
#[derive(Debug)]
pub(crate) enum Backend {
    /// This process.
    Alone {
        /// The sets.
        sets: Sets,
        /// VMs by name.
        config: Config,
    },
    /// A daemon.
    Daemon {
        /// Its socket.
        socket: PathBuf,
        /// The connection.
        client: QmpClient,
    },
}

/// A VM, by description or by its name in the daemon's configuration.
#[derive(Debug)]
pub(crate) enum Target {
    /// All its sockets.
    Described(VmTarget),
    /// Its name, or the only one.
    Named(Option<String>),
}

/// An open restore. The end of this process gives it up.
#[derive(Debug)]
pub(crate) enum Restoring {
    /// Its conversation with the guest.
    Alone(Box<RestoreSession>),
    /// The daemon has it, for as long as the connection to it lasts.
    Daemon,
}

impl Backend {
    /// Connects to the daemon, or opens the state directory.
    pub(crate) async fn open(global: &Global) -> Result<Self, Error> {
        if let Some(socket) = &global.bridge {
            return match QmpClient::connect(socket, CONNECT).await {
                Ok(client) => Ok(Self::Daemon {
                    socket: socket.clone(),
                    client,
                }),
                Err(source) => Err(Error::Bridge {
                    socket: socket.clone(),
                    source,
                }),
            };
        }
        let config = match &global.config {
            Some(path) => Config::read(path)?,
            None => Config::default(),
        };
        let state_dir = global
            .state_dir
            .clone()
            .or_else(|| config.state_dir.clone())
            .unwrap_or_else(|| PathBuf::from(DEFAULT_STATE_DIRECTORY));
        let faults = FaultPoint::from_environment().map_err(Error::Usage)?;
        Ok(Self::Alone {
            sets: Sets::open(&absolute(&state_dir)?, Limits::default(), faults)?,
            config,
        })
    }

    /// The VM that the options mean.
    pub(crate) fn target(&self, vm: &Vm) -> Result<Target, Error> {
        let described = vm.qmp.is_some() || vm.agent.is_some() || !vm.vhost_blk.is_empty();
        match self {
            Self::Daemon { .. } if described => Err(Error::Usage(
                "--qmp, --agent and --vhost-blk are the daemon's business: name the VM by --vm"
                    .to_owned(),
            )),
            Self::Daemon { .. } => Ok(Target::Named(vm.vm.clone())),
            Self::Alone { .. } if described => Ok(Target::Described(describe(vm)?)),
            Self::Alone { config, .. } if config.vm.is_empty() => Err(Error::Usage(
                "which VM? Give --qmp, --agent and --vhost-blk, or --config and --vm, or --bridge"
                    .to_owned(),
            )),
            Self::Alone { config, .. } => config.vm(vm.vm.as_deref()).map(Target::Described),
        }
    }

    /// Ends what dead bridges left. A daemon has done so at its start, and does it again.
    pub(crate) async fn recover(&self) -> Result<Vec<SetDocument>, Error> {
        match self {
            Self::Alone { sets, .. } => sets.recover().await,
            Self::Daemon { .. } => self.ask(&SetRecover {}).await,
        }
    }

    /// Makes a set.
    pub(crate) async fn create(
        &self,
        target: Target,
        request: CreateRequest,
        progress: mpsc::UnboundedSender<StepTime>,
        mut cancel: watch::Receiver<bool>,
    ) -> Result<SetDocument, Error> {
        match (self, target) {
            (Self::Alone { sets, .. }, Target::Described(vm)) => {
                sets.create(vm, request, progress, cancel).await
            }
            (Self::Daemon { client, .. }, Target::Named(vm)) => {
                let mut events = client.subscribe();
                let command = SetCreate { vm, request };
                let asking = self.ask(&command);
                tokio::pin!(asking);
                loop {
                    tokio::select! {
                        biased;
                        Ok(event) = events.recv() => {
                            if event.get("event").and_then(|e| e.as_str()) == Some(SET_PROGRESS)
                                && let Some(data) = event.get("data")
                                && let Ok(step) = serde_json::from_value::<StepTime>(data.clone())
                            {
                                // The printer may have given up.
                                progress.send(step).ok();
                            }
                        }
                        document = &mut asking => return document,
                        Ok(()) = cancel.changed() => {
                            // Hanging up cancels at the daemon, which undoes the set and keeps its document.
                            return Err(Error::InvalidState("cancelled".to_owned()));
                        }
                    }
                }
            }
            (Self::Alone { .. }, Target::Named(_))
            | (Self::Daemon { .. }, Target::Described(_)) => {
                Err(Error::Usage("which VM?".to_owned()))
            }
        }
    }

    /// All sets, or those of a VM.
    pub(crate) async fn list(&self, vm: Option<&str>) -> Result<Vec<ListedSet>, Error> {
        match self {
            Self::Alone { sets, .. } => sets.list(vm).await,
            Self::Daemon { .. } => {
                let vm = vm.map(str::to_owned);
                self.ask(&SetList { vm }).await
            }
        }
    }

    /// A document.
    pub(crate) async fn show(&self, id: &str) -> Result<SetDocument, Error> {
        match self {
            Self::Alone { sets, .. } => Ok(sets.find(id)?.document()),
            Self::Daemon { .. } => self.ask(&SetShow { id: id.to_owned() }).await,
        }
    }

    /// The copies that an id means.
    pub(crate) async fn copies(&self, id: &str) -> Result<Vec<Copy>, Error> {
        match self {
            Self::Alone { sets, .. } => Ok(sets.find(id)?.copies()),
            Self::Daemon { .. } => {
                let document = self.show(id).await?;
                let id = id.to_ascii_lowercase();
                let mut copies = document.copies;
                if !document.set.to_string().starts_with(&id) {
                    copies.retain(|copy| copy.snapshot.to_string().starts_with(&id));
                }
                Ok(copies)
            }
        }
    }

    /// Deletes.
    pub(crate) async fn delete(&self, id: &str, forget: bool) -> Result<(), Error> {
        match self {
            Self::Alone { sets, .. } => sets.delete(id, forget).await,
            Self::Daemon { .. } => {
                let id = id.to_owned();
                self.ask(&SetDelete { id, forget }).await?;
                Ok(())
            }
        }
    }

    /// Reverts.
    pub(crate) async fn revert(&self, id: &str) -> Result<(), Error> {
        match self {
            Self::Alone { sets, .. } => sets.revert(id).await,
            Self::Daemon { .. } => {
                self.ask(&SetRevert { id: id.to_owned() }).await?;
                Ok(())
            }
        }
    }

    /// Says whether the backup of a set succeeded, and which components fared otherwise.
    pub(crate) async fn complete(
        &self,
        id: &str,
        succeeded: bool,
        components: Vec<WriterOutcomes>,
    ) -> Result<SetDocument, Error> {
        match self {
            Self::Alone { sets, .. } => sets.complete(id, succeeded, components).await,
            Self::Daemon { .. } => {
                let command = SetComplete {
                    id: id.to_owned(),
                    succeeded,
                    components,
                };
                self.ask(&command).await
            }
        }
    }

    /// Tells writers that files will be replaced.
    pub(crate) async fn pre_restore(
        &self,
        what: &SetPreRestore,
    ) -> Result<(Restoring, RestoreBegun), Error> {
        match self {
            Self::Alone { sets, .. } => {
                let (session, begun) = sets.restore(what).await?;
                Ok((Restoring::Alone(Box::new(session)), begun))
            }
            Self::Daemon { .. } => Ok((Restoring::Daemon, self.ask(what).await?)),
        }
    }

    /// Tells them how it went.
    pub(crate) async fn post_restore(
        &self,
        restoring: Restoring,
        restored: FilesRestored,
    ) -> Result<WritersSaid, Error> {
        match restoring {
            Restoring::Alone(session) => session.end(restored).await,
            Restoring::Daemon => self.ask(&SetPostRestore { restored }).await,
        }
    }

    /// Writers and file systems.
    pub(crate) async fn writers(&self, target: Target) -> Result<Identified, Error> {
        match (self, target) {
            (Self::Alone { sets, .. }, Target::Described(vm)) => sets.writers(&vm).await,
            (Self::Daemon { .. }, Target::Named(vm)) => self.ask(&QueryWriters { vm }).await,
            (Self::Alone { .. }, Target::Named(_))
            | (Self::Daemon { .. }, Target::Described(_)) => {
                Err(Error::Usage("which VM?".to_owned()))
            }
        }
    }

    /// Volumes. Alone, control sockets suffice.
    pub(crate) async fn volumes(&self, vm: &Vm) -> Result<Vec<ListedVolume>, Error> {
        match self {
            Self::Alone { sets, .. } if !vm.vhost_blk.is_empty() => {
                let controls: Result<Vec<PathBuf>, Error> =
                    vm.vhost_blk.iter().map(|path| absolute(path)).collect();
                sets.volumes(&controls?).await
            }
            Self::Alone { sets, .. } => match self.target(vm)? {
                Target::Described(vm) => sets.volumes(&vm.vhost_blk).await,
                Target::Named(_) => Err(Error::Usage("which VM?".to_owned())),
            },
            Self::Daemon { .. } => {
                let vm = vm.vm.clone();
                self.ask(&QueryVolumes { vm }).await
            }
        }
    }

    async fn ask<C: WireCommand>(&self, command: &C) -> Result<C::Return, Error>
    where
        C::Return: Send,
    {
        match self {
            Self::Daemon { socket, client } => {
                // As long as it takes: the daemon keeps the limits, and its end is seen.
                let result = client.ours(command, None, None).await;
                result.map_err(|source: CallError| Error::Bridge {
                    socket: socket.clone(),
                    source,
                })
            }
            Self::Alone { .. } => Err(Error::Usage("no daemon".to_owned())),
        }
    }
}

fn describe(vm: &Vm) -> Result<VmTarget, Error> {
    let Some(qmp) = &vm.qmp else {
        return Err(Error::Usage("--qmp is missing".to_owned()));
    };
    if vm.vhost_blk.is_empty() {
        return Err(Error::Usage("--vhost-blk is missing".to_owned()));
    }
    let name = vm.vm.clone().unwrap_or_else(|| {
        qmp.file_stem()
            .map_or("vm".to_owned(), |stem| stem.to_string_lossy().into_owned())
    });
    let vhost_blk: Result<Vec<PathBuf>, Error> =
        vm.vhost_blk.iter().map(|path| absolute(path)).collect();
    let agent = vm.agent.clone().map(AgentAddress::absolute).transpose();
    Ok(VmTarget {
        name,
        qmp: absolute(qmp)?,
        agent: agent.map_err(|source| Error::Io {
            what: "the working directory".to_owned(),
            source,
        })?,
        vhost_blk: vhost_blk?,
    })
}

/// Records outlive this working directory.
fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(|source| Error::Io {
        what: path.display().to_string(),
        source,
    })
}
