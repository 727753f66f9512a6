//! Scripts of VMware's tools: all files of `backupScripts.d`, and a pair of older ones.
//!
//! Argument `freeze` before, in ascending order; `thaw` after, or `freezeFail` if nothing was frozen in the end, in descending
//! order. The older pair comes first and is thawed last. Unlike with VMware's tools, a script whose own `freeze` failed hears
//! `freezeFail` as well: one that was killed could not put itself right.

use super::{Directory, Found, Recipe, Step, below, entries};
use crate::writer::script::recipe::FREEZE_FAIL;
use std::path::Path;

const DIRECTORY: &str = "/etc/vmware-tools/backupScripts.d";
const FREEZE: &str = "/usr/sbin/pre-freeze-script";
const THAW: &str = "/usr/sbin/post-thaw-script";
/// Freezes before all names of files that people give.
const PAIR: &str = "!pre-freeze-script";

pub(super) fn scan(root: &Path) -> Vec<Directory> {
    let mut found: Vec<Directory> = pair(root).into_iter().collect();
    for (name, path) in entries(&below(root, DIRECTORY)) {
        // VMware's tools run every file, whatever its name, and fail where it is not executable; they go into no directory.
        if !path.is_dir() {
            let steps = [
                ("freeze", Step::executable(&path, &["freeze"])),
                ("thaw", Step::executable(&path, &["thaw"])),
                (FREEZE_FAIL, Step::executable(&path, &["freezeFail"])),
            ];
            found.push(writer(&name, &path, steps.into()));
        }
    }
    found
}

fn pair(root: &Path) -> Option<Directory> {
    let (freeze, thaw) = (below(root, FREEZE), below(root, THAW));
    let mut steps = std::collections::BTreeMap::new();
    if freeze.exists() {
        steps.insert("freeze", Step::executable(&freeze, &["freeze"]));
    }
    if thaw.exists() {
        steps.insert("thaw", Step::executable(&thaw, &["thaw"]));
        steps.insert(FREEZE_FAIL, Step::executable(&thaw, &["freezeFail"]));
    }
    (!steps.is_empty()).then(|| writer(PAIR, &freeze, steps))
}

fn writer(
    name: &str,
    path: &Path,
    steps: std::collections::BTreeMap<&'static str, Step>,
) -> Directory {
    let recipe = Recipe {
        steps,
        ..Recipe::default()
    };
    Found::new("vmware", "quiesce script of VMware's tools", name, path).writer(recipe)
}
