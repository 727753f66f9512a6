//! Patterns of file names, and the files in `/etc` that hold them.
//!
//! Called by `not_to_snapshot` and by `quiesce`. A line of a `.conf` file is an absolute path whose last part may have `*` and
//! `?`; `/**` behind it means everything below; `#` begins a comment.

use guest_agent_wire::metadata::FileSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path};

/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Longest names that are looked for: no file has a longer one, and asterisks cost time.
const SPEC_BYTES_MAX: usize = 512;
/// Most patterns.
const PATTERNS_MAX: usize = 4096;

/// The patterns of all `.conf` files of a directory, in the order of their names; none if there is no directory. Lines that are no
/// pattern come back as reasons, and so do files that others than the agent's own user can change.
pub fn read_directory(directory: &Path) -> (Vec<FileSet>, Vec<String>) {
    let mut sets = Vec::new();
    let mut wrong = Vec::new();
    let Ok(entries) = std::fs::read_dir(directory) else {
        return (sets, wrong);
    };
    let own = rustix::process::geteuid().as_raw();
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "conf"));
    files.sort();
    for path in files {
        let text = match std::fs::metadata(&path) {
            Ok(metadata) if !metadata.is_file() => Err("is no file".to_owned()),
            Ok(metadata) if metadata.len() > FILE_BYTES_MAX => Err("too large".to_owned()),
            Ok(metadata) if metadata.mode() & 0o022 != 0 || metadata.uid() != own => {
                Err("others can change it".to_owned())
            }
            Ok(_) => std::fs::read_to_string(&path).map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match text {
            Ok(text) => {
                for line in text.lines().map(str::trim) {
                    if line.is_empty() || line.starts_with('#') {
                        continue;
                    }
                    match parse(line) {
                        Some(set) if sets.len() < PATTERNS_MAX => sets.push(set),
                        Some(_) => wrong.push(format!("more than {PATTERNS_MAX} patterns")),
                        None => wrong.push(format!("{}: {line}", path.display())),
                    }
                }
            }
            Err(why) => wrong.push(format!("{}: {why}", path.display())),
        }
    }
    (sets, wrong)
}

fn parse(line: &str) -> Option<FileSet> {
    if let Some(tree) = line.strip_suffix("/**") {
        return is_plain(Path::new(tree)).then(|| FileSet::tree(tree));
    }
    let (directory, spec) = line.rsplit_once('/')?;
    let directory = if directory.is_empty() { "/" } else { directory };
    let named = !spec.is_empty() && spec != "." && spec != ".." && !directory.contains(['*', '?']);
    (named && is_plain(Path::new(directory))).then(|| FileSet::new(directory, spec))
}

/// Absolute, and every part is a name.
pub(super) fn is_plain(path: &Path) -> bool {
    path.is_absolute()
        && path
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}

/// A name fits a pattern with `*` (any characters) and `?` (one). Nothing fits one that is longer than any name.
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    if pattern.len() > SPEC_BYTES_MAX {
        return false;
    }
    let name: Vec<char> = name.chars().collect();
    // Which beginnings of the name fit the pattern so far.
    let mut fits = vec![false; name.len() + 1];
    if let Some(first) = fits.first_mut() {
        *first = true;
    }
    for wanted in pattern.chars() {
        let mut next = vec![false; name.len() + 1];
        let mut before = false;
        for (place, (fit, out)) in fits.iter().zip(next.iter_mut()).enumerate() {
            if wanted == '*' {
                before |= *fit;
                *out = before;
            } else {
                let here = place.checked_sub(1).and_then(|at| name.get(at));
                *out = before && here.is_some_and(|c| wanted == '?' || *c == wanted);
                before = *fit;
            }
        }
        fits = next;
    }
    fits.last().copied().unwrap_or(false)
}

#[cfg(test)]
mod tests;
