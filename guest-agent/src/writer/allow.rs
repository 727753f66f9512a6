//! Who may be a writer beside root: the users that files of root's name.
//!
//! Used by `socket`, for the user that the kernel names as a connection's other end.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// True if a `*.conf` of the directory has a line `CLASS_ID = USER`: a number, or a name of `/etc/passwd`. Files that others
/// than root can change are not read.
#[must_use]
pub fn is_allowed(allow_dir: &Path, class_id: &str, uid: u32) -> bool {
    is_allowed_among(&passwd(), allow_dir, Some(class_id), uid)
}

/// True if it may be a writer of any class.
#[must_use]
pub fn is_writer(allow_dir: &Path, uid: u32) -> bool {
    is_allowed_among(&passwd(), allow_dir, None, uid)
}

/// Read anew each time: a package's user may come after the agent.
fn passwd() -> String {
    fs::read_to_string("/etc/passwd").unwrap_or_default()
}

fn is_allowed_among(passwd: &str, allow_dir: &Path, class_id: Option<&str>, uid: u32) -> bool {
    let Ok(entries) = fs::read_dir(allow_dir) else {
        return false;
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    files
        .iter()
        .filter(|file| {
            file.extension()
                .is_some_and(|extension| extension == "conf")
        })
        .filter(|file| is_roots_alone(file))
        .filter_map(|file| fs::read_to_string(file).ok())
        .any(|text| {
            text.lines()
                .filter(|line| !line.trim_start().starts_with('#'))
                .filter_map(|line| line.rsplit_once('='))
                .any(|(class, user)| {
                    class_id.is_none_or(|class_id| class.trim() == class_id)
                        && number(passwd, user.trim()) == Some(uid)
                })
        })
}

/// A user's number. A word of digits is one, whoever bears it as a name.
fn number(passwd: &str, user: &str) -> Option<u32> {
    if user.is_empty() || user.bytes().all(|byte| byte.is_ascii_digit()) {
        return user.parse().ok();
    }
    let mut accounts = passwd.lines().map(|line| line.split(':'));
    let mut account = accounts.find_map(|mut fields| (fields.next()? == user).then_some(fields))?;
    account.nth(1)?.parse().ok()
}

fn is_roots_alone(file: &Path) -> bool {
    fs::symlink_metadata(file)
        .is_ok_and(|stat| stat.is_file() && stat.uid() == 0 && stat.mode() & 0o022 == 0)
}

#[cfg(test)]
mod tests {
    //! Who may be a writer.
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_user_is_a_writer_only_of_the_class_that_an_allow_file_names() {
        if !rustix::process::getuid().is_root() {
            eprintln!("skipped: allow files must belong to root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.conf");
        fs::write(
            &file,
            "# people\npostgres = 70\n\nweb=33\ndb = ann\ndb = 0\ndb =\n",
        )
        .unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(is_allowed(dir.path(), "postgres", 70));
        assert!(!is_allowed(dir.path(), "postgres", 33));
        assert!(!is_allowed(dir.path(), "mysql", 70));
        assert!(is_writer(dir.path(), 33) && !is_writer(dir.path(), 34));
        let among = |passwd: &str, uid| is_allowed_among(passwd, dir.path(), Some("db"), uid);
        let passwd = "root:x:0:0::/:/bin/sh\nann:x:1000:1001::/:/bin/sh\n70:x:5:5::/:/bin/sh\n";
        assert!(among(passwd, 1000) && among(passwd, 0));
        assert!(!among(passwd, 1001) && !among("annette:x:1000:1::/:\n", 1000));
        assert!(!among("ann\nann:x\n", 1000));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o664)).unwrap();
        assert!(!is_allowed(dir.path(), "postgres", 70));
        fs::rename(&file, dir.path().join("a.conf.bak")).unwrap();
        assert!(!is_allowed(dir.path(), "postgres", 70));
    }
}
