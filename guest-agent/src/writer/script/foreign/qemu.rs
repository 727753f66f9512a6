//! Hooks of QEMU's guest agent: one file that is run with `freeze` before and `thaw` after, or the directory beside it.
//!
//! The hook that QEMU ships runs the scripts of `fsfreeze-hook.d` beside itself, but hides what they answer and thaws in the
//! order in which it froze. Where that one is there, or none, its scripts are run directly: each can refuse, and they thaw in
//! descending order. Any other hook is run as it stands and the directory is not, since it may run the directory itself.

use super::{Directory, Found, Recipe, Step, below, entries};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Where packages put them (Debian and others; Red Hat).
const PLACES: [&str; 2] = ["/etc/qemu", "/etc/qemu-ga"];
const HOOK: &str = "fsfreeze-hook";
const DIRECTORY: &str = "fsfreeze-hook.d";
/// A function that QEMU's own hook has had since its first version.
const DISPATCHER: &str = "is_ignored_file";
/// Largest hook that is looked into, bytes.
const HOOK_BYTES_MAX: u64 = 64 * 1024;
/// What QEMU's hook leaves alone in the directory: what editors and package managers leave behind.
const IGNORED: [&str; 14] = [
    "~",
    ".bak",
    ".orig",
    ".rpmnew",
    ".rpmorig",
    ".rpmsave",
    ".sample",
    ".dpkg-old",
    ".dpkg-new",
    ".dpkg-tmp",
    ".dpkg-dist",
    ".dpkg-bak",
    ".dpkg-backup",
    ".dpkg-remove",
];
/// There while QEMU's agent holds a freeze.
const HELD: &str = "/run/qga.state.isfrozen";

pub(super) fn scan(root: &Path, hook: Option<&Path>) -> Vec<Directory> {
    let hooks = match hook {
        Some(hook) => vec![hook.to_owned()],
        None => PLACES.map(|place| below(root, place).join(HOOK)).to_vec(),
    };
    // One place may be a link to the other.
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for hook in hooks {
        let place = hook
            .parent()
            .and_then(|parent| fs::canonicalize(parent).ok());
        let Some(place) = place else {
            continue;
        };
        if seen.insert(place.clone()) {
            let name = hook.file_name().unwrap_or_default();
            found.extend(in_place(root, &place, &place.join(name)));
        }
    }
    found
}

fn in_place(root: &Path, place: &Path, hook: &Path) -> Vec<Directory> {
    if fs::symlink_metadata(hook).is_ok() && !is_dispatcher(hook) {
        let name = hook.file_name().unwrap_or_default().to_string_lossy();
        return vec![writer(root, &name, hook)];
    }
    entries(&place.join(DIRECTORY))
        .into_iter()
        .filter(|(name, path)| !is_ignored(name) && is_executable(path))
        .map(|(name, path)| writer(root, &name, &path))
        .collect()
}

fn writer(root: &Path, name: &str, path: &Path) -> Directory {
    let recipe = Recipe {
        steps: [
            ("freeze", Step::executable(path, &["freeze"])),
            ("thaw", Step::executable(path, &["thaw"])),
        ]
        .into(),
        busy: Some(below(root, HELD)),
        ..Recipe::default()
    };
    Found::new("qemu", "fsfreeze hook of QEMU's guest agent", name, path).writer(recipe)
}

/// It is the hook that QEMU ships.
fn is_dispatcher(hook: &Path) -> bool {
    let is_small =
        fs::metadata(hook).is_ok_and(|stat| stat.is_file() && stat.len() <= HOOK_BYTES_MAX);
    let text = is_small.then(|| fs::read_to_string(hook).ok()).flatten();
    text.is_some_and(|text| text.contains(DIRECTORY) && text.contains(DISPATCHER))
}

fn is_ignored(name: &str) -> bool {
    IGNORED.iter().any(|end| name.ends_with(end))
}

/// Something that QEMU's hook would run. A link to nothing is none.
fn is_executable(path: &PathBuf) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata(path).is_ok_and(|stat| stat.is_file() && stat.mode() & 0o111 != 0)
}
