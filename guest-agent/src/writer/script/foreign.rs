//! Hooks that were written for other programs, read as they stand: each script becomes a writer.
//!
//! Called by `script`. Whoever has such hooks expects that a snapshot runs them; a set that is called application-consistent
//! although they were not asked would be a lie. So they are all on by default. The rules of trust are those of the agent's own
//! directory, or stricter where the other program's are. Only what is found by a scan is known here; nothing is run.

mod azure;
mod qemu;
mod vmware;

use super::recipe::{Recipe, Step};
use super::{Directory, Identity};
use crate::journal;
use guest_agent_wire::host::WRITER_MS_MAX;
use guest_agent_wire::metadata::WriterRestoreEvents;
use guest_agent_wire::metadata::{Component, Metadata, RestoreMethod, Restoring, Usage};
use guest_agent_wire::types::{Hold, Level};
use guest_agent_wire::writer::PREPARE_MS_MAX;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// Whose hooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Hooks {
    /// Of QEMU's guest agent: `/etc/qemu/fsfreeze-hook.d` or `fsfreeze-hook` (Red Hat: `/etc/qemu-ga`).
    Qemu,
    /// Of VMware's tools: `/etc/vmware-tools/backupScripts.d`, `/usr/sbin/pre-freeze-script` and `post-thaw-script`.
    Vmware,
    /// Of Azure's VM backup: `/etc/azure/VMSnapshotScriptPluginConfig.json`.
    Azure,
    /// Nobody's.
    None,
}

/// Which hooks, and where.
#[derive(Clone, Debug, Default)]
pub struct Foreign {
    /// Whose.
    pub hooks: Vec<Hooks>,
    /// Directory that stands for `/`.
    pub root: PathBuf,
    /// QEMU's hook, if it is in another place than its own.
    pub fsfreeze_hook: Option<PathBuf>,
}

impl Foreign {
    /// All that are there now, in freeze order within each kind.
    pub(super) fn scan(&self) -> Vec<Directory> {
        let mut found = Vec::new();
        for hooks in &self.hooks {
            found.extend(match hooks {
                Hooks::Qemu => qemu::scan(&self.root, self.fsfreeze_hook.as_deref()),
                Hooks::Vmware => vmware::scan(&self.root),
                Hooks::Azure => azure::scan(&self.root).into_iter().collect(),
                Hooks::None => Vec::new(),
            });
        }
        for found in &found {
            if let Directory::Refused(name, why) = found {
                journal::note(format_args!("hook {name} is refused: {why}"));
            }
        }
        found
    }
}

/// A script of another program, as a writer.
struct Found<'a> {
    /// `qemu`, `vmware`, `azure`.
    owner: &'static str,
    /// What the script is to its owner, for people.
    origin: &'static str,
    /// Name among those of its owner.
    name: &'a str,
    /// The file that tells of it.
    path: &'a Path,
    freeze_timeout_ms: u64,
}

impl<'a> Found<'a> {
    fn new(owner: &'static str, origin: &'static str, name: &'a str, path: &'a Path) -> Self {
        Self {
            owner,
            origin,
            name,
            path,
            freeze_timeout_ms: WRITER_MS_MAX,
        }
    }

    fn instance_id(&self) -> String {
        format!("{}:{}", self.owner, self.name)
    }

    /// A writer with these steps, or refused if one of them may not be run.
    fn writer(&self, recipe: Recipe) -> Directory {
        for step in recipe.steps.values() {
            if let Err(why) = step.check() {
                return self.refused(why);
            }
        }
        let recipe = Recipe {
            metadata: self.metadata(),
            ..recipe
        };
        let identity = Identity {
            class_id: format!("{}:hook", self.owner),
            instance_id: self.instance_id(),
            name: self.instance_id(),
            // Such scripts mostly hold databases, which what uses them must precede.
            level: Level::BackEnd,
            freeze_timeout_ms: self.freeze_timeout_ms,
            prepare_timeout_ms: PREPARE_MS_MAX,
            hold: Hold::Filesystem,
            uid: 0,
        };
        Directory::Writer(Box::new(recipe), identity)
    }

    fn refused(&self, why: String) -> Directory {
        Directory::Refused(self.instance_id(), why)
    }

    /// Where it comes from. The component lets a requester pick it in component mode; nobody knows its files.
    fn metadata(&self) -> Value {
        let mut component = Component::file_group(self.owner, self.name);
        component.caption = self.origin.to_owned();
        component.notify_on_backup_complete = false;
        component.info = json!({ "origin": self.origin, "path": self.path });
        let restoring = Restoring {
            writer_restore: WriterRestoreEvents::Never,
            ..Restoring::by(RestoreMethod::Custom)
        };
        let document = Metadata {
            usage: Usage::Other,
            restore_method: Some(restoring),
            components: vec![component],
            ..Metadata::default()
        };
        serde_json::to_value(document).unwrap_or_default()
    }
}

/// A path below the directory that stands for `/`.
fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// The entries of a directory by name, ascending; none if it is not there.
fn entries(directory: &Path) -> Vec<(String, PathBuf)> {
    let mut found: Vec<(String, PathBuf)> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, entry.path())
        })
        .collect();
    found.sort();
    found
}
