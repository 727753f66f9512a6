//! The writers of the agent's own directory: a directory per writer, an executable per event.
//!
//! Called by `script`. A directory that is not trusted or understood is reported, never skipped.

use super::event::EVENTS;
use super::recipe::{Recipe, Step};
use super::trust::{self, Access};
use super::{Directory, Identity};
use crate::journal;
use guest_agent_wire::host::WRITER_MS_MAX;
use guest_agent_wire::types::{Hold, Level};
use guest_agent_wire::writer::PREPARE_MS_MAX;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Largest `writer.json`, bytes.
const SETTINGS_BYTES_MAX: u64 = 64 * 1024;

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Settings {
    class_id: Option<String>,
    name: Option<String>,
    level: Level,
    freeze_timeout_ms: Option<u64>,
    hold: Option<Hold>,
}

/// Finds the writers below a directory, in the order of their names. A directory that does not exist has none.
#[must_use]
pub(super) fn scan(top: &Path) -> Vec<Directory> {
    let Ok(entries) = fs::read_dir(top) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let name = path
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default();
            match identify(top, &path, &name) {
                Ok((recipe, identity)) => Directory::Writer(Box::new(recipe), identity),
                Err(why) => {
                    journal::note(format_args!("writer directory {name} is refused: {why}"));
                    Directory::Refused(name, why)
                }
            }
        })
        .collect()
}

fn identify(top: &Path, path: &Path, name: &str) -> Result<(Recipe, Identity), String> {
    trust::directory(top)?;
    trust::directory(path)?;
    let steps = executables(path)?.into_iter();
    let recipe = Recipe {
        steps: steps
            .map(|(event, file)| (event, Step::executable(file, &[])))
            .collect(),
        ..Recipe::default()
    };
    let settings = read_settings(&path.join("writer.json"))?;
    let freeze_timeout_ms = settings.freeze_timeout_ms.unwrap_or(WRITER_MS_MAX);
    if !(1..=WRITER_MS_MAX).contains(&freeze_timeout_ms) {
        return Err(format!("freeze_timeout_ms must be 1 to {WRITER_MS_MAX}"));
    }
    let identity = Identity {
        class_id: settings
            .class_id
            .unwrap_or_else(|| format!("script:{name}")),
        instance_id: format!("script:{name}"),
        name: settings.name.unwrap_or_else(|| name.to_owned()),
        level: settings.level,
        freeze_timeout_ms,
        prepare_timeout_ms: PREPARE_MS_MAX,
        // A script is not there while the hold lasts, so it can keep no lock by itself.
        hold: settings.hold.unwrap_or(Hold::Filesystem),
        uid: 0,
    };
    Ok((recipe, identity))
}

/// The executables of a directory by the events that they are for.
pub(super) fn executables(path: &Path) -> Result<BTreeMap<&'static str, PathBuf>, String> {
    let mut found = BTreeMap::new();
    for event in EVENTS {
        let file = path.join(event);
        if trust::executable(&file)? {
            found.insert(event, file);
        }
    }
    if found.is_empty() {
        return Err(format!("it has none of {}", EVENTS.join(", ")));
    }
    Ok(found)
}

fn read_settings(path: &Path) -> Result<Settings, String> {
    match trust::text(path, Access::Any, SETTINGS_BYTES_MAX)? {
        Some(text) => serde_json::from_str(&text).map_err(|error| format!("writer.json: {error}")),
        None => Ok(Settings::default()),
    }
}
