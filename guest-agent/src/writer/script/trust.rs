//! Whom a script must belong to: root, or the user that the agent runs as; nobody else may be able to change it.
//!
//! Called by `script` before anything is read or run. A path is walked as the kernel walks it, link by link: every directory and
//! every symbolic link on the way must be one that nobody else can change or exchange, so between this look and the run nobody
//! else can make the path mean another file.

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

/// Most symbolic links in one path, as the kernel has it: path_resolution(7).
const LINKS_MAX: usize = 40;

/// Who may read or run a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) enum Access {
    /// Anybody.
    #[default]
    Any,
    /// Its owner alone (the rule of Azure's plug-in).
    OwnerAlone,
}

/// Checks a directory and the way to it.
pub(super) fn directory(path: &Path) -> Result<(), String> {
    match walk(path)? {
        Some(stat) if stat.is_dir() => owner(path, &stat),
        Some(_) => Err(format!("{} is not a directory", path.display())),
        None => Err(format!("{} is not there", path.display())),
    }
}

/// Checks a file and the way to it; false if there is none.
pub(super) fn file(path: &Path, access: Access) -> Result<bool, String> {
    let Some(stat) = walk(path)? else {
        return Ok(false);
    };
    if !stat.is_file() {
        return Err(format!("{} is not a plain file", path.display()));
    }
    owner(path, &stat)?;
    if access == Access::OwnerAlone && stat.mode() & 0o077 != 0 {
        return Err(format!(
            "{} must be for its owner alone (mode 700 or 600)",
            path.display()
        ));
    }
    Ok(true)
}

/// Checks an executable; false if there is none.
pub(super) fn executable(path: &Path) -> Result<bool, String> {
    if !file(path, Access::Any)? {
        return Ok(false);
    }
    let mode = fs::metadata(path)
        .map_err(|error| error.to_string())?
        .mode();
    if mode & 0o100 == 0 {
        return Err(format!("{} is not executable", path.display()));
    }
    Ok(true)
}

/// Goes to what the path names, past directories and links that nobody else can change; nothing if it is not there.
fn walk(path: &Path) -> Result<Option<fs::Metadata>, String> {
    let path = std::path::absolute(path).map_err(|error| error.to_string())?;
    let mut left = names(&path);
    let mut links = 0;
    // No part of it is a link.
    let mut at = PathBuf::from("/");
    loop {
        let stat = match fs::symlink_metadata(&at) {
            Ok(stat) => stat,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(format!("{}: {error}", at.display())),
        };
        if stat.is_symlink() {
            belongs(&at, &stat)?;
            links += 1;
            if links > LINKS_MAX {
                return Err(format!("{}: too many links", path.display()));
            }
            let target = fs::read_link(&at).map_err(|error| error.to_string())?;
            left.extend(names(&target));
            if target.is_absolute() {
                at = PathBuf::from("/");
            } else {
                at.pop();
            }
            continue;
        }
        let Some(name) = left.pop() else {
            return Ok(Some(stat));
        };
        on_the_way(&at, &stat)?;
        if name == ".." {
            at.pop();
        } else {
            at.push(name);
        }
    }
}

/// The names in a path, the last one first.
fn names(path: &Path) -> Vec<OsString> {
    let names = path.components().filter_map(|part| match part {
        Component::Normal(_) | Component::ParentDir => Some(part.as_os_str().to_owned()),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    });
    names.rev().collect()
}

/// Nobody else can put another file in the place of what lies in this directory. Where the sticky bit is set (`/tmp`) others may
/// add files but not exchange what is not theirs.
fn on_the_way(path: &Path, stat: &fs::Metadata) -> Result<(), String> {
    const STICKY: u32 = 0o1000;
    if stat.uid() == 0 && stat.mode() & STICKY != 0 {
        return Ok(());
    }
    owner(path, stat)
}

fn owner(path: &Path, stat: &fs::Metadata) -> Result<(), String> {
    belongs(path, stat)?;
    if stat.mode() & 0o022 != 0 {
        return Err(format!(
            "{} can be changed by others than its owner",
            path.display()
        ));
    }
    Ok(())
}

/// A link has no mode: who owns it, or its directory, can exchange it.
fn belongs(path: &Path, stat: &fs::Metadata) -> Result<(), String> {
    let own = rustix::process::geteuid().as_raw();
    if stat.uid() != 0 && stat.uid() != own {
        return Err(format!("{} does not belong to root", path.display()));
    }
    Ok(())
}

/// Text of a trusted file of at most so many bytes; none if there is no file.
pub(super) fn text(path: &Path, access: Access, bytes_max: u64) -> Result<Option<String>, String> {
    if !file(path, access)? {
        return Ok(None);
    }
    let length = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if length > bytes_max {
        return Err(format!("{} is too large", path.display()));
    }
    fs::read_to_string(path)
        .map(Some)
        .map_err(|error| format!("{}: {error}", path.display()))
}
