//! Whom a script must belong to: root, or the user that the agent runs as; nobody else may be able to change it.
//!
//! Called by `script` before anything is read or run. Symbolic links are refused: what they point at could be exchanged.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// Checks a directory.
pub(super) fn directory(path: &Path) -> Result<(), String> {
    let stat = fs::symlink_metadata(path).map_err(|error| error.to_string())?;
    if !stat.is_dir() {
        return Err("it is not a directory".to_owned());
    }
    owner(path, &stat)
}

/// Checks a file; false if there is none.
pub(super) fn file(path: &Path) -> Result<bool, String> {
    let stat = match fs::symlink_metadata(path) {
        Ok(stat) => stat,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error.to_string()),
    };
    if !stat.is_file() {
        return Err(format!("{} is not a plain file", path.display()));
    }
    owner(path, &stat).map(|()| true)
}

/// Checks an executable; false if there is none.
pub(super) fn executable(path: &Path) -> Result<bool, String> {
    if !file(path)? {
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

fn owner(path: &Path, stat: &fs::Metadata) -> Result<(), String> {
    let own = rustix::process::geteuid().as_raw();
    if stat.uid() != 0 && stat.uid() != own {
        return Err(format!("{} does not belong to root", path.display()));
    }
    if stat.mode() & 0o022 != 0 {
        return Err(format!(
            "{} can be changed by others than its owner",
            path.display()
        ));
    }
    Ok(())
}
