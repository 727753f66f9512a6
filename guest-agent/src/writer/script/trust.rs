//! Whom a script must belong to: root, or the user that the agent runs as; nobody else may be able to change it.
//!
//! Called by `script` before anything is read or run. Symbolic links are refused: what they point at could be exchanged. So
//! could a file below a directory that another user can write to, so all directories above are looked at as well.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// Who may read or run a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) enum Access {
    /// Anybody.
    #[default]
    Any,
    /// Its owner alone (the rule of Azure's plug-in).
    OwnerAlone,
}

/// Checks a directory and those above it.
pub(super) fn directory(path: &Path) -> Result<(), String> {
    let stat = fs::symlink_metadata(path).map_err(|error| error.to_string())?;
    if !stat.is_dir() {
        return Err(format!("{} is not a directory", path.display()));
    }
    owner(path, &stat)?;
    above(path)
}

/// Checks a file; false if there is none.
pub(super) fn file(path: &Path, access: Access) -> Result<bool, String> {
    let stat = match fs::symlink_metadata(path) {
        Ok(stat) => stat,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error.to_string()),
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
    above(path).map(|()| true)
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

/// Checks the directories above: nobody else may put another file in the place of this one. Where the sticky bit is set
/// (`/tmp`) others may add files but not exchange what is not theirs.
fn above(path: &Path) -> Result<(), String> {
    const STICKY: u32 = 0o1000;
    let parent = path.parent().unwrap_or(path);
    let parent = fs::canonicalize(parent).map_err(|error| error.to_string())?;
    for directory in parent.ancestors() {
        let stat = fs::symlink_metadata(directory).map_err(|error| error.to_string())?;
        if stat.uid() != 0 || stat.mode() & STICKY == 0 {
            owner(directory, &stat)?;
        }
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
