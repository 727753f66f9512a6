//! The guest agent: hello, identify, prepare, freeze, thaw, post-snapshot, abort; thaws when its host goes away.

use super::{Fault, Peer};
use guest_agent_wire::components::ComponentReply;
use guest_agent_wire::host::{
    AgentError, Command, ErrorCode, FilesystemInfo, FilesystemReport, FilesystemResult, Frozen,
    Hello, Identified, NotToSnapshot, Outcome, Prepared, Request, Response, Restore, Thawed,
    WriterComponents, WriterInfo, WriterOutcomes, WriterReport, WritersSaid,
};
use guest_agent_wire::metadata::Metadata;
use guest_agent_wire::types::{
    BackupType, DiskExtent, Failure, Hold, Level, WriterFailure, WriterState,
};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

/// What the guest is like and what it says; tests change it.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    /// Names of writers.
    pub(crate) writers: Vec<String>,
    /// The document of each.
    pub(crate) metadata: Option<Box<Metadata>>,
    /// Mount points, one on each disk of the same place.
    pub(crate) mountpoints: Vec<String>,
    pub(crate) serials: Vec<String>,
    pub(crate) exempt: Vec<DiskExtent>,
    /// What need not be in a copy.
    pub(crate) not_to_snapshot: Option<Box<NotToSnapshot>>,
    /// Mount points that are writable, on a covered disk, and do not freeze.
    pub(crate) unfreezable: Vec<String>,
    /// Writers that say at the thaw that they did not hold.
    pub(crate) not_held: Vec<String>,
    /// Writers that say nothing at the thaw.
    pub(crate) silent: Vec<String>,
    /// Mount points whose FITHAW returns EINVAL.
    pub(crate) thawed_by_others: Vec<String>,
    /// Hold that the guest's clock shows.
    pub(crate) hold_ms: u64,
    /// Evidence at the thaw (at the freeze it is 1).
    pub(crate) evidence_at_thaw: u64,
    /// What kind of backup `prepare` named.
    pub(crate) backup_type: BackupType,
    /// What `prepare` picked.
    pub(crate) picked: Vec<WriterComponents>,
    /// Sets that wait for `backup_complete`.
    pub(crate) incomplete: Vec<String>,
    /// Components of the last backup that fared otherwise.
    pub(crate) outcomes: Vec<WriterOutcomes>,
    /// What was said before and after the last restore.
    pub(crate) restores: Vec<Restore>,
    /// The step at which every writer in scope fails, named by the state it then has, and how.
    pub(crate) fails: Option<(WriterState, WriterFailure)>,
    /// State in which `identify` finds the writers.
    pub(crate) found: (WriterState, Option<WriterFailure>),
    /// Which run of the agent it says that it is.
    pub(crate) run: Option<String>,
    set: Option<String>,
    frozen: bool,
    in_scope: Vec<String>,
    left_out: Vec<String>,
}

#[derive(Clone)]
pub(crate) struct FakeAgent {
    pub(crate) peer: Peer,
    pub(crate) guest: Arc<Mutex<Guest>>,
}

impl FakeAgent {
    pub(crate) fn start(path: &Path, serials: Vec<String>, peer: Peer) -> Self {
        let agent = Self {
            peer,
            guest: Arc::new(Mutex::new(Guest {
                writers: vec!["db".to_owned()],
                metadata: None,
                mountpoints: serials
                    .iter()
                    .enumerate()
                    .map(|(n, _)| format!("/m{n}"))
                    .collect(),
                serials,
                exempt: Vec::new(),
                not_to_snapshot: None,
                unfreezable: Vec::new(),
                not_held: Vec::new(),
                silent: Vec::new(),
                thawed_by_others: Vec::new(),
                hold_ms: 7,
                evidence_at_thaw: 1,
                backup_type: BackupType::default(),
                picked: Vec::new(),
                incomplete: Vec::new(),
                outcomes: Vec::new(),
                restores: Vec::new(),
                fails: None,
                found: (WriterState::Stable, None),
                run: None,
                set: None,
                frozen: false,
                in_scope: Vec::new(),
                left_out: Vec::new(),
            })),
        };
        let listener = UnixListener::bind(path).unwrap();
        let this = agent.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(this.clone().serve(stream));
            }
        });
        agent
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.guest.lock().unwrap().frozen
    }

    pub(crate) fn has_set(&self) -> bool {
        self.guest.lock().unwrap().set.is_some()
    }

    /// The dead-man fires.
    pub(crate) fn thaw_by_dead_man(&self) {
        let mut guest = self.guest.lock().unwrap();
        guest.frozen = false;
        guest.set = None;
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Guest)) {
        change(&mut self.guest.lock().unwrap());
    }

    async fn serve(self, stream: UnixStream) {
        let (reader, mut writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        loop {
            line.clear();
            match reader.read_until(b'\n', &mut line).await {
                Ok(1..) => {}
                Ok(0) | Err(_) => break,
            }
            let start = line.iter().rposition(|b| *b == 0xff).map_or(0, |at| at + 1);
            let request: Request = serde_json::from_slice(&line[start..]).unwrap();
            let encoded = serde_json::to_value(&request.command).unwrap();
            let name = encoded["execute"].as_str().unwrap().to_owned();
            let outcome = match self.peer.arrived(&name) {
                Some(Fault::Hang) => continue,
                Some(Fault::Close) => break,
                Some(Fault::Refuse(code)) => Err(self.refuse(code)),
                Some(Fault::Late(duration)) => {
                    tokio::time::sleep(duration).await;
                    self.answer(request.command)
                }
                Some(Fault::Meanwhile(what)) => {
                    what();
                    self.answer(request.command)
                }
                None => self.answer(request.command),
            };
            let response = Response {
                id: request.id,
                outcome: match outcome {
                    Ok(value) => Outcome::Return(value),
                    Err(error) => Outcome::Error(error),
                },
            };
            let mut text = serde_json::to_vec(&response).unwrap();
            text.push(b'\n');
            if writer.write_all(&text).await.is_err() {
                break;
            }
        }
        // The host has gone: the real agent thaws and aborts.
        let mut guest = self.guest.lock().unwrap();
        if guest.set.take().is_some() {
            guest.frozen = false;
            drop(guest);
            self.peer.note("host gone");
        }
    }

    /// A refusal of prepare or freeze: the real agent has undone everything by then.
    fn refuse(&self, code: &str) -> AgentError {
        let mut guest = self.guest.lock().unwrap();
        guest.set = None;
        guest.frozen = false;
        error(serde_json::from_value(json!(code)).unwrap(), "db said no")
    }

    fn answer(&self, command: Command) -> Result<Value, AgentError> {
        let mut guest = self.guest.lock().unwrap();
        let guest = &mut *guest;
        let value = match command {
            Command::Hello { .. } => {
                guest.set = None;
                guest.frozen = false;
                to_value(&Hello {
                    version: 1,
                    agent: "fake".to_owned(),
                    boot_id: "boot".to_owned(),
                    run: guest.run.clone(),
                })
            }
            Command::Identify {} => to_value(&guest.identified()),
            Command::Prepare(prepare) => {
                guest.set = Some(prepare.set);
                guest.backup_type = prepare.backup_type;
                guest.picked = prepare.components;
                guest.in_scope = guest
                    .writers
                    .iter()
                    .filter(|name| !prepare.exclude_writers.contains(name))
                    .cloned()
                    .collect();
                guest.veto(WriterState::FailedAtPrepareSnapshot)?;
                to_value(&Prepared {
                    writers: guest.reports(WriterState::WaitingForFreeze, None, 0),
                    left_out: Vec::new(),
                    sync_ms: 3,
                })
            }
            Command::Freeze(freeze) => {
                if guest.set.as_ref() != Some(&freeze.set) {
                    return Err(error(ErrorCode::SetNotFound, "no such set"));
                }
                guest.veto(WriterState::FailedAtFreeze)?;
                guest.frozen = true;
                guest.left_out = freeze.exclude_filesystems;
                let filesystems = guest.filesystems(FilesystemResult::Frozen);
                to_value(&Frozen {
                    not_to_snapshot: guest.not_to_snapshot.clone(),
                    generation: 5,
                    writers: guest.reports(WriterState::WaitingForThaw, None, 1),
                    filesystems,
                    exempt: guest.exempt.clone(),
                    writers_ms: 0,
                    filesystems_ms: 0,
                })
            }
            Command::Thaw { set, generation } => {
                if guest.set.as_ref() != Some(&set) || generation != 5 || !guest.frozen {
                    return Err(error(ErrorCode::HoldBroken, "the dead-man had fired"));
                }
                guest.frozen = false;
                let filesystems = guest.filesystems(FilesystemResult::Thawed);
                let held = guest.not_held.is_empty() && guest.thawed_by_others.is_empty();
                to_value(&Thawed {
                    held,
                    why_not: if held {
                        String::new()
                    } else {
                        "see below".to_owned()
                    },
                    writers: guest.or_failed(
                        WriterState::FailedAtThaw,
                        guest.reports(
                            WriterState::WaitingForPostSnapshot,
                            Some(true),
                            guest.evidence_at_thaw,
                        ),
                    ),
                    filesystems,
                    hold_ms: guest.hold_ms,
                })
            }
            Command::PostSnapshot(post) => {
                guest.set = None;
                let told = if post.kept {
                    "told kept"
                } else {
                    "told aborted"
                };
                self.peer.note(told);
                if post.kept {
                    guest.incomplete.push(post.set);
                }
                to_value(&WritersSaid {
                    writers: guest.or_failed(
                        WriterState::FailedAtPostSnapshot,
                        guest.reports(WriterState::WaitingForBackupComplete, None, 0),
                    ),
                })
            }
            Command::BackupComplete(outcome) => {
                if !guest.incomplete.contains(&outcome.set) {
                    return Err(error(ErrorCode::SetNotFound, "no such set"));
                }
                guest.incomplete.retain(|set| *set != outcome.set);
                let told = if outcome.succeeded {
                    "told complete"
                } else {
                    "told failed"
                };
                self.peer.note(told);
                guest.outcomes = outcome.components;
                to_value(&WritersSaid {
                    writers: guest.or_failed(
                        WriterState::FailedAtBackupComplete,
                        guest.reports(WriterState::Stable, None, 0),
                    ),
                })
            }
            Command::PreRestore(restore) => {
                guest.set = Some(restore.set.clone());
                guest.restores = vec![restore];
                to_value(&WritersSaid {
                    writers: guest.reports(WriterState::Stable, None, 0),
                })
            }
            Command::PostRestore(restore) => {
                guest.set = None;
                guest.restores.push(restore);
                to_value(&WritersSaid {
                    writers: guest.reports(WriterState::Stable, None, 0),
                })
            }
            Command::Abort { set, .. } => {
                guest.incomplete.retain(|waiting| *waiting != set);
                guest.set = None;
                guest.frozen = false;
                json!({})
            }
            Command::Status {} => json!({"run": guest.run}),
        };
        Ok(value)
    }
}

impl Guest {
    fn identified(&self) -> Identified {
        Identified {
            writers: self
                .writers
                .iter()
                .map(|name| WriterInfo {
                    class_id: "class".to_owned(),
                    instance_id: name.clone(),
                    name: name.clone(),
                    level: Level::BackEnd,
                    freeze_timeout_ms: 20_000,
                    hold: Hold::App,
                    state: self.found.0,
                    last_failure: self.found.1.map(failure),
                    metadata: self.metadata.clone(),
                })
                .collect(),
            filesystems: self
                .mountpoints
                .iter()
                .enumerate()
                .map(|(n, mountpoint)| FilesystemInfo {
                    mountpoint: mountpoint.clone(),
                    fstype: "ext4".to_owned(),
                    device: format!("/dev/vd{n}"),
                    read_only: false,
                    freezable: !self.unfreezable.contains(mountpoint),
                    why_not: None,
                    extents: self.extents(n),
                })
                .collect(),
            exempt: self.exempt.clone(),
        }
    }

    fn extents(&self, n: usize) -> Vec<DiskExtent> {
        vec![DiskExtent {
            serial: self.serials[n % self.serials.len()].clone(),
            disk: format!("vd{n}"),
            start_bytes: 1 << 20,
            length_bytes: 1 << 20,
        }]
    }

    fn reports(&self, state: WriterState, held: Option<bool>, evidence: u64) -> Vec<WriterReport> {
        self.in_scope
            .iter()
            .filter(|name| held.is_none() || !self.silent.contains(name))
            .map(|name| WriterReport {
                instance_id: name.clone(),
                name: name.clone(),
                state,
                held: held.map(|_| !self.not_held.contains(name)),
                evidence: json!({"position": evidence}),
                components: self.components_of(name),
                failure: None,
                took_ms: 1,
            })
            .collect()
    }

    /// The reports of a step, or those of writers that fail at it.
    fn or_failed(&self, at: WriterState, mut reports: Vec<WriterReport>) -> Vec<WriterReport> {
        if let Some((state, code)) = self.fails
            && state == at
        {
            for report in &mut reports {
                report.state = at;
                report.failure = Some(failure(code));
            }
        }
        reports
    }

    /// Refuses if the writers fail at this step of those that a failure refuses: the real agent has undone everything by then.
    fn veto(&mut self, at: WriterState) -> Result<(), AgentError> {
        let writers = self.or_failed(at, self.reports(WriterState::Stable, None, 0));
        let Some(refused) = writers.iter().find_map(|report| report.failure.clone()) else {
            return Ok(());
        };
        self.set = None;
        let late = [WriterFailure::Timeout, WriterFailure::NotResponding];
        let code = if late.contains(&refused.code) {
            ErrorCode::WriterNotResponding
        } else {
            ErrorCode::WriterVeto
        };
        Err(AgentError {
            writers,
            retryable: refused.code.is_retryable(),
            ..error(code, &refused.message)
        })
    }

    /// Every component that was picked got a stamp.
    fn components_of(&self, name: &String) -> Vec<ComponentReply> {
        let picked = self.picked.iter().filter(|picked| picked.writer == *name);
        picked
            .flat_map(|picked| &picked.components)
            .map(|picked| ComponentReply {
                logical_path: picked.logical_path.clone(),
                name: picked.name.clone(),
                stamp: Some("tuesday".to_owned()),
                metadata: json!({"label": 5}),
                ..ComponentReply::default()
            })
            .collect()
    }

    fn filesystems(&self, result: FilesystemResult) -> Vec<FilesystemReport> {
        let thaw = result == FilesystemResult::Thawed;
        self.mountpoints
            .iter()
            .enumerate()
            .filter(|(_, mountpoint)| !self.unfreezable.contains(mountpoint))
            .filter(|(_, mountpoint)| !(thaw && self.left_out.contains(mountpoint)))
            .map(|(n, mountpoint)| {
                let broken = thaw && self.thawed_by_others.contains(mountpoint);
                FilesystemReport {
                    mountpoint: mountpoint.clone(),
                    fstype: "ext4".to_owned(),
                    result: if self.left_out.contains(mountpoint) {
                        FilesystemResult::LeftOut
                    } else if broken {
                        FilesystemResult::Failed
                    } else {
                        result
                    },
                    errno: if broken { 22 } else { 0 },
                    message: String::new(),
                    extents: self.extents(n),
                    took_us: 100,
                }
            })
            .collect()
    }
}

fn failure(code: WriterFailure) -> Failure {
    Failure {
        code,
        message: "db could not".to_owned(),
    }
}

fn to_value(value: &impl serde::Serialize) -> Value {
    serde_json::to_value(value).unwrap()
}

fn error(code: ErrorCode, message: &str) -> AgentError {
    AgentError {
        code,
        message: message.to_owned(),
        retryable: false,
        writers: Vec::new(),
        filesystems: Vec::new(),
    }
}
