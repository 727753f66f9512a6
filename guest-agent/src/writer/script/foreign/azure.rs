//! The pre-script and post-script of Azure's VM backup, as its plug-in's settings name them.
//!
//! Both are read by `sh`, must belong to root and be for root alone, and exit status 2 is a warning. `fsFreezeEnabled` has no
//! effect: the freeze of file systems is what a set is held by. `timeoutInSeconds` counts as a second at
//! least, and up to the window of a writer.

use super::{Directory, Found, Recipe, Step, below};
use crate::writer::script::recipe::OnFailure;
use crate::writer::script::trust::{self, Access};
use guest_agent_wire::host::WRITER_MS_MAX;
use serde::Deserialize;
use std::path::{Path, PathBuf};

const SETTINGS: &str = "/etc/azure/VMSnapshotScriptPluginConfig.json";
const SETTINGS_BYTES_MAX: u64 = 64 * 1024;
/// Exit status of a script that has done its work and warns.
const WARNING: i32 = 2;
/// Most tries after a failure.
const RETRIES_MAX: u32 = 10;

/// The plug-in's settings; it has more, which concern Azure alone.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Settings {
    #[serde(default = "plugin")]
    plugin_name: String,
    pre_script_location: String,
    post_script_location: String,
    #[serde(default)]
    pre_script_params: Vec<Word>,
    #[serde(default)]
    post_script_params: Vec<Word>,
    #[serde(default)]
    pre_script_no_of_retries: u32,
    #[serde(default)]
    post_script_no_of_retries: u32,
    #[serde(default = "timeout")]
    timeout_in_seconds: u64,
    #[serde(default = "yes")]
    continue_backup_on_failure: bool,
}

/// A parameter of a script. The settings that Azure hands out have text; what else somebody wrote is passed as it stands there.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Word {
    Text(String),
    Number(serde_json::Number),
    Truth(bool),
}

impl Word {
    fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Number(number) => number.to_string(),
            Self::Truth(truth) => truth.to_string(),
        }
    }
}

fn plugin() -> String {
    "ScriptRunner".to_owned()
}

/// What the plug-in takes if its settings do not say.
fn timeout() -> u64 {
    10
}

fn yes() -> bool {
    true
}

pub(super) fn scan(root: &Path) -> Option<Directory> {
    let path = below(root, SETTINGS);
    let unread = Found::new("azure", ORIGIN, "VMSnapshotScriptPluginConfig.json", &path);
    let settings = match read(&path) {
        Ok(settings) => settings?,
        Err(why) => return Some(unread.refused(why)),
    };
    if settings.pre_script_location.is_empty() && settings.post_script_location.is_empty() {
        // The settings as Azure hands them out, before anybody has filled them in.
        return None;
    }
    Some(writer(root, &path, settings))
}

const ORIGIN: &str = "pre-script and post-script of Azure's VM backup";

fn read(path: &Path) -> Result<Option<Settings>, String> {
    let text = trust::text(path, Access::OwnerAlone, SETTINGS_BYTES_MAX)?;
    text.map(|text| serde_json::from_str(&text).map_err(|error| error.to_string()))
        .transpose()
}

fn writer(root: &Path, path: &Path, settings: Settings) -> Directory {
    let limit_ms = settings
        .timeout_in_seconds
        .saturating_mul(1_000)
        .clamp(1_000, WRITER_MS_MAX);
    let step = |location: &str, params: &[Word], retries: u32| Step {
        file: place(root, location),
        arguments: params.iter().map(Word::text).collect(),
        by_shell: true,
        is_private: true,
        warning: Some(WARNING),
        retries: retries.min(RETRIES_MAX),
        limit_ms: Some(limit_ms),
    };
    let recipe = Recipe {
        steps: [
            (
                "freeze",
                step(
                    &settings.pre_script_location,
                    &settings.pre_script_params,
                    settings.pre_script_no_of_retries,
                ),
            ),
            (
                "thaw",
                step(
                    &settings.post_script_location,
                    &settings.post_script_params,
                    settings.post_script_no_of_retries,
                ),
            ),
        ]
        .into(),
        on_failure: if settings.continue_backup_on_failure {
            OnFailure::NotHeld
        } else {
            OnFailure::Veto
        },
        ..Recipe::default()
    };
    Found::new("azure", ORIGIN, &settings.plugin_name, path).writer(recipe)
}

/// A script's place: an absolute path, in the root that is looked at.
fn place(root: &Path, location: &str) -> PathBuf {
    if location.starts_with('/') {
        below(root, location)
    } else {
        // Relative to nothing that anybody could know; `check` does not find it.
        PathBuf::from(location)
    }
}
