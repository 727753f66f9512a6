//! What a scenario needs from the host, and the reason of a skip.
//!
//! Called first by scenarios that need a program `make deps` installs but a bare checkout may not have.
//! A skip is always said aloud; in CI (`CI=true`) nothing may be skipped, so a missing program fails.

use std::path::Path;

/// The full path of a program in the usual directories.
#[must_use]
pub fn find(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/sbin"])
        .map(|directory| Path::new(directory).join(program))
        .find(|candidate| candidate.is_file())
}

/// True if every program is there. Otherwise prints why the scenario is skipped, or panics in CI.
#[must_use]
pub fn programs(names: &[&str]) -> bool {
    let missing: Vec<_> = names.iter().filter(|name| find(name).is_none()).collect();
    if missing.is_empty() {
        return true;
    }
    let reason = format!("not installed: {missing:?} (run `make deps`)");
    assert!(std::env::var("CI").is_err(), "cannot run: {reason}");
    eprintln!("SKIPPED: {reason}");
    false
}

/// True if real machines can be started here.
#[must_use]
pub fn machines() -> bool {
    programs(&[
        "qemu-system-x86_64",
        "mke2fs",
        "mkfs.xfs",
        "cpio",
        "lz4",
        "objcopy",
    ])
}
