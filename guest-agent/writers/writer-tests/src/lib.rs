//! What tests of writers share: the agent's part, called or over a connection, and a guest of two disks.
#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "it is a part of tests"
)]

mod agent;

pub use agent::Agent;
use database_writer::{Disks, Identity};
use guest_agent::filesystem::plan::Sources;
use guest_agent_wire::sdk::{Call, Writer};
use guest_agent_wire::writer::{Freeze, PrepareBackup, PrepareSnapshot, Thaw};
use std::path::Path;
use std::time::{Duration, Instant};

/// For anything that ends at all.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// A name that has to be quoted.
const SET: &str = "it's a set";

/// A call in a set of one writer.
#[must_use]
pub fn call() -> Call<'static> {
    Call::alone(DEADLINE)
}

/// Of a writer that no agent knows: tests call it.
#[must_use]
pub fn identity() -> Identity {
    Identity {
        socket: "/none".into(),
        instance: None,
        freeze_timeout_ms: 10_000,
        service: None,
    }
}

/// With these disks in the set.
#[must_use]
pub fn backup(disks: &[&str]) -> PrepareBackup {
    PrepareBackup {
        set: SET.to_owned(),
        disks: disks.iter().map(|disk| (*disk).to_owned()).collect(),
        ..PrepareBackup::default()
    }
}

/// The second step of that set.
#[must_use]
pub fn snapshot() -> PrepareSnapshot {
    PrepareSnapshot {
        set: SET.to_owned(),
    }
}

/// The writer lets go by itself after this time.
#[must_use]
pub fn hold(hold_ms: u64) -> Freeze {
    Freeze {
        set: SET.to_owned(),
        generation: 1,
        hold_ms,
    }
}

/// Of that hold.
#[must_use]
pub fn thaw() -> Thaw {
    Thaw {
        set: SET.to_owned(),
        generation: 1,
    }
}

/// Waits until a frozen writer says that its hold is lost; returns why.
pub fn why_lost(writer: &mut impl Writer) -> String {
    let until = Instant::now() + DEADLINE;
    loop {
        match writer.still_holds() {
            Err(why) => return why,
            Ok(()) => assert!(Instant::now() < until, "it still says that it holds"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A guest with a disk "data" at its root and a disk "fast" at this directory. It lasts as long as the first that is returned.
#[must_use]
pub fn guest(apart: &Path) -> (tempfile::TempDir, Disks) {
    let guest = tempfile::tempdir().unwrap();
    let write = |path: &str, text: &str| {
        let path = guest.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let apart = apart.canonicalize().unwrap();
    let mounts = format!(
        "1 1 254:0 / / rw - ext4 /dev/vda rw\n2 1 254:16 / {} rw - ext4 /dev/vdb rw\n",
        apart.display()
    );
    write("proc/1/mountinfo", &mounts);
    for (device, serial) in [("254:0", "data"), ("254:16", "fast")] {
        write(&format!("sys/dev/block/{device}/size"), "8\n");
        write(&format!("sys/dev/block/{device}/serial"), serial);
    }
    let disks = Disks::seen_by(Sources {
        proc: guest.path().join("proc"),
        sys: guest.path().join("sys"),
        only_under: None,
    });
    (guest, disks)
}
