//! Accounts: `guest-set-user-password` and `guest-ssh-*-authorized-keys`.
//!
//! Called by `command`. Accounts are those of `/etc/passwd`: a static program has no name service to ask, so users of a
//! directory (LDAP) are not found. A home directory belongs to its user, who may put anything there: `.ssh` and the file in it
//! are never reached through a symbolic link.

use super::arguments::Arguments;
use super::failed::{Failed, Outcome};
use super::program;
use rustix::fs::{
    AtFlags, Mode, OFlags, fchmod, fchown, mkdirat, open, openat, renameat, unlinkat,
};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use serde_json::json;
use std::fs;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// A list of keys that is longer is not read.
const KEYS_BYTES_MAX: u64 = 1 << 20;
const DIRECTORY: &str = ".ssh";
const FILE: &str = "authorized_keys";
const NEW_FILE: &str = "authorized_keys.vmshadow-new";

/// `guest-set-user-password`, by chpasswd(8).
pub(super) fn set_password(arguments: &mut Arguments) -> Outcome {
    let user = arguments.text("username")?;
    let password = arguments.bytes("password")?;
    let crypted = arguments.flag("crypted")?;
    arguments.end()?;
    // They would be a second line, or another field, of what chpasswd reads, or its end: QEMU's agent sets what stands before a zero.
    if password.contains(&b'\n') || password.contains(&0) {
        return Err(Failed::generic("forbidden characters in raw password"));
    }
    if user.contains(['\n', ':']) {
        return Err(Failed::generic("forbidden characters in username"));
    }
    let chpasswd = program::find("chpasswd")
        .map_err(|_| Failed::generic("cannot find 'passwd' program in PATH"))?;
    let mut line = format!("{user}:").into_bytes();
    line.extend_from_slice(&password);
    line.push(b'\n');
    let options: &[&str] = if crypted { &["-e"] } else { &[] };
    match program::run(&chpasswd, options, &line) {
        Ok(status) if status.success() => Ok(json!({})),
        Ok(_) => Err(Failed::generic(
            "child process has failed to set user password",
        )),
        Err(error) => Err(Failed::because("failed to create child process", &error)),
    }
}

/// One line of passwd(5).
#[derive(Debug, PartialEq, Eq)]
struct Account {
    uid: u32,
    gid: u32,
    home: PathBuf,
}

fn account(passwd: &str, user: &str) -> Option<Account> {
    if user.contains(':') {
        return None;
    }
    let line = passwd
        .lines()
        .find_map(|line| line.strip_prefix(user)?.strip_prefix(':'))?;
    let mut fields = line.split(':').skip(1);
    Some(Account {
        uid: fields.next()?.parse().ok()?,
        gid: fields.next()?.parse().ok()?,
        home: PathBuf::from(fields.nth(1)?),
    })
}

fn look_up(user: &str) -> Result<Account, Failed> {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    account(&passwd, user).ok_or_else(|| {
        // getpwnam(3) finds nothing without an error number.
        Failed::generic(format!("failed to lookup user '{user}': Success"))
    })
}

impl Account {
    fn file(&self) -> PathBuf {
        self.home.join(DIRECTORY).join(FILE)
    }

    fn directory(&self) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let home = open(&self.home, flags, Mode::empty())?;
        openat(home, DIRECTORY, flags | OFlags::NOFOLLOW, Mode::empty())
    }

    /// Makes `.ssh`, of the user's own.
    fn make_directory(&self) -> rustix::io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let home = open(&self.home, flags, Mode::empty())?;
        mkdirat(&home, DIRECTORY, Mode::RWXU)?;
        let made = openat(&home, DIRECTORY, flags | OFlags::NOFOLLOW, Mode::empty())?;
        self.own(&made, Mode::RWXU)
    }

    fn own(&self, fd: &OwnedFd, mode: Mode) -> rustix::io::Result<()> {
        fchown(
            fd,
            Some(Uid::from_raw(self.uid)),
            Some(Gid::from_raw(self.gid)),
        )?;
        fchmod(fd, mode)
    }

    /// The lines of the file; an error if there is none.
    fn read(&self) -> io::Result<Vec<String>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(self.directory()?, FILE, flags, Mode::empty())?;
        let mut text = String::new();
        File::from(file)
            .take(KEYS_BYTES_MAX)
            .read_to_string(&mut text)?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// Replaces the file as a whole.
    fn write(&self, lines: &[String]) -> io::Result<()> {
        let directory = self.directory()?;
        // Of an agent that was killed here.
        match unlinkat(&directory, NEW_FILE, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = openat(&directory, NEW_FILE, flags, mode)?;
        self.own(&file, mode)?;
        let mut text = lines.join("\n");
        if !text.is_empty() {
            text.push('\n');
        }
        File::from(file).write_all(text.as_bytes())?;
        renameat(&directory, NEW_FILE, &directory, FILE)?;
        Ok(())
    }
}

/// `guest-ssh-get-authorized-keys`.
pub(super) fn keys(arguments: &mut Arguments) -> Outcome {
    let user = arguments.text("username")?;
    arguments.end()?;
    let account = look_up(&user)?;
    let file = account.file();
    let lines = account.read().map_err(|error| {
        let file = file.display();
        let what = format!("failed to read '{file}': Failed to open file \u{201c}{file}\u{201d}");
        Failed::because(what, &error)
    })?;
    let keys = lines.iter().map(|line| line.trim());
    // The last line first, as theirs.
    let keys: Vec<_> = keys
        .filter(|key| !key.is_empty() && !key.starts_with('#'))
        .rev()
        .collect();
    Ok(json!({ "keys": keys }))
}

/// `guest-ssh-add-authorized-keys`.
pub(super) fn add_keys(arguments: &mut Arguments) -> Outcome {
    let user = arguments.text("username")?;
    let keys = arguments.texts("keys")?;
    let reset = arguments.maybe_flag("reset")?;
    arguments.end()?;
    let account = look_up(&user)?;
    check(&keys)?;
    let directory = account.home.join(DIRECTORY);
    match account.make_directory() {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => {
            let what = format!("failed to create directory '{}'", directory.display());
            return Err(Failed::because(what, &error.into()));
        }
    }
    let mut lines = if reset {
        Vec::new()
    } else {
        account.read().unwrap_or_default()
    };
    for key in keys {
        if !lines.contains(&key) {
            lines.push(key);
        }
    }
    write(&account, &lines)
}

/// `guest-ssh-remove-authorized-keys`.
pub(super) fn remove_keys(arguments: &mut Arguments) -> Outcome {
    let user = arguments.text("username")?;
    let keys = arguments.texts("keys")?;
    arguments.end()?;
    let account = look_up(&user)?;
    check(&keys)?;
    // No file has none of the keys.
    let Ok(mut lines) = account.read() else {
        return Ok(json!({}));
    };
    lines.retain(|line| !keys.contains(line));
    write(&account, &lines)
}

fn check(keys: &[String]) -> Result<(), Failed> {
    match keys
        .iter()
        .find(|key| key.starts_with('#') || key.contains('\n'))
    {
        None => Ok(()),
        Some(key) => Err(Failed::generic(format!(
            "invalid OpenSSH public key: '{key}'"
        ))),
    }
}

fn write(account: &Account, lines: &[String]) -> Outcome {
    account.write(lines).map_err(|error| {
        Failed::because(
            format!("failed to write '{}'", account.file().display()),
            &error,
        )
    })?;
    Ok(json!({}))
}

#[cfg(test)]
mod tests {
    //! Keys in a home directory of the test's own.
    use super::*;
    use rustix::process::{getegid, geteuid};
    use std::os::unix::fs::{MetadataExt as _, symlink};

    fn home() -> (tempfile::TempDir, Account) {
        let directory = tempfile::tempdir().unwrap();
        let account = Account {
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
            home: directory.path().to_owned(),
        };
        (directory, account)
    }

    #[test]
    fn an_account_is_found_by_its_whole_name() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nann:x:7:8::/home/ann:/bin/sh\n";
        let ann = account(passwd, "ann").unwrap();
        assert_eq!(
            (ann.uid, ann.gid, ann.home),
            (7, 8, PathBuf::from("/home/ann"))
        );
        assert_eq!(account(passwd, "an"), None);
        for nobody in ["", "ann:x", "x"] {
            assert_eq!(account(passwd, nobody), None);
        }
    }

    #[test]
    fn keys_are_written_for_the_user_alone() {
        let (directory, account) = home();
        account.make_directory().unwrap();
        account
            .write(&["ssh-rsa A".into(), "ssh-rsa B".into()])
            .unwrap();
        let file = directory.path().join(".ssh/authorized_keys");
        assert_eq!(fs::read_to_string(&file).unwrap(), "ssh-rsa A\nssh-rsa B\n");
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
        assert_eq!(account.read().unwrap(), ["ssh-rsa A", "ssh-rsa B"]);
        account.write(&[]).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "");
    }

    #[test]
    fn a_link_in_the_home_directory_is_not_followed() {
        let (directory, account) = home();
        let elsewhere = tempfile::tempdir().unwrap();
        symlink(elsewhere.path(), directory.path().join(".ssh")).unwrap();
        assert_eq!(account.make_directory(), Err(Errno::EXIST));
        assert!(account.write(&["ssh-rsa A".into()]).is_err());
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
        fs::remove_file(directory.path().join(".ssh")).unwrap();
        account.make_directory().unwrap();
        let secret = elsewhere.path().join("secret");
        fs::write(&secret, "secret\n").unwrap();
        symlink(&secret, directory.path().join(".ssh/authorized_keys")).unwrap();
        assert!(account.read().is_err());
        account.write(&["ssh-rsa A".into()]).unwrap();
        assert_eq!(fs::read_to_string(&secret).unwrap(), "secret\n");
        assert_eq!(account.read().unwrap(), ["ssh-rsa A"]);
    }

    #[test]
    fn a_comment_or_two_lines_are_no_key() {
        for key in ["#x", "a\nb"] {
            assert_eq!(
                check(&[key.to_owned()]).unwrap_err().desc,
                format!("invalid OpenSSH public key: '{key}'")
            );
        }
    }
}
