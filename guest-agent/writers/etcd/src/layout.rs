//! Where a member's files lie, and whether they are that member's.
//!
//! Called by the writer. A member does not tell where its files are, so they are named by options, and an option can be wrong.
//! What is in the log's newest file says whose it is, and the lock on it that somebody writes there.

#![deny(clippy::indexing_slicing)]

use crate::api::{LogMetadata, METADATA, Record};
use clap::Args;
use guest_agent_wire::metadata::{Component, FileSet, Metadata, Restoring, Source};
use prost::Message;
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::Errno;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The component: a member's keys share its log, so none can be restored alone.
const COMPONENT: &str = "member";

/// What a person is told who restores it.
const PROCEDURE: &str = "Cluster of one member: stop it, put member/ (and the log, if it lies apart) back, start it. \
     Cluster of several: never start an old member beside the others; start a new cluster from it with `etcd --force-new-cluster` \
     and add members to that. A restore of member/snap/db alone lacks what is only in the log yet.";

/// The length of a log record, and padding in its highest byte.
const LENGTH_BYTES: usize = 8;
/// The first two records of a log file are far shorter.
const HEAD_BYTES: u64 = 4096;
/// How often a log is looked at before it is nobody's.
const LOOKS: usize = 5;
/// Between two of these.
const LOOK: Duration = Duration::from_millis(20);

/// Where a member's files are, as its own options of these names say.
#[derive(Args, Clone, Debug)]
pub struct Roots {
    /// etcd's data directory.
    #[arg(
        long,
        default_value = "/var/lib/etcd/default",
        overrides_with = "data_dir"
    )]
    pub data_dir: PathBuf,
    /// Directory of the log, if etcd has one outside of its data directory.
    #[arg(long)]
    pub wal_dir: Option<PathBuf>,
}

impl Roots {
    /// The database and snapshots.
    pub(crate) fn snap(&self) -> PathBuf {
        self.data_dir.join("member/snap")
    }

    /// The log.
    pub(crate) fn wal(&self) -> PathBuf {
        let inside = || self.data_dir.join("member/wal");
        self.wal_dir.clone().unwrap_or_else(inside)
    }

    /// Why these are not the files that this member writes.
    ///
    /// # Errors
    /// It says whose they are, or what could not be read.
    pub(crate) fn are_of(&self, member_id: u64, cluster_id: u64) -> Result<(), String> {
        let tell = |path: &Path, why: String| format!("{}: {why}", path.display());
        let wal = self.wal();
        let newest = newest(&wal).map_err(|error| tell(&wal, error.to_string()))?;
        let newest = newest.ok_or_else(|| tell(&wal, "no log of etcd is there".to_owned()))?;
        let mut file = File::open(&newest).map_err(|error| tell(&newest, error.to_string()))?;
        let mut head = Vec::new();
        Read::by_ref(&mut file)
            .take(HEAD_BYTES)
            .read_to_end(&mut head)
            .map_err(|error| tell(&newest, error.to_string()))?;
        let owner =
            owner(&head).ok_or_else(|| tell(&newest, "it does not say whose it is".to_owned()))?;
        if owner.member_id != member_id || owner.cluster_id != cluster_id {
            return Err(tell(
                &newest,
                format!(
                    "it is the log of member {:x} of cluster {:x}, but the server is member {member_id:x} of cluster {cluster_id:x}",
                    owner.member_id, owner.cluster_id
                ),
            ));
        }
        match is_written(&file) {
            Ok(true) => Ok(()),
            Ok(false) => Err(tell(&newest, "no server has this log open".to_owned())),
            Err(error) => Err(tell(&newest, error.to_string())),
        }
    }

    /// The metadata document of a member of this version.
    pub(crate) fn metadata(&self, version: String, mut restoring: Restoring) -> Metadata {
        restoring.procedure = Some(PROCEDURE.to_owned());
        let mut member = Component::database("", COMPONENT);
        member.selectable_for_restore = true;
        member.database_files = vec![FileSet::tree(self.snap().to_string_lossy())];
        member.log_files = vec![FileSet::tree(self.wal().to_string_lossy())];
        Metadata {
            version,
            source: Source::TransactedDb,
            restore_method: Some(restoring),
            components: vec![member],
            ..Metadata::default()
        }
    }
}

/// A member has this file of its log open: it locks the newest as long as it runs. A new one is nobody's for a moment, so it is
/// looked at more than once.
fn is_written(file: &File) -> rustix::io::Result<bool> {
    for _ in 0..LOOKS {
        match fcntl_lock(file, FlockOperation::NonBlockingLockShared) {
            Err(Errno::AGAIN | Errno::ACCESS) => return Ok(true),
            Err(error) => return Err(error),
            Ok(()) => fcntl_lock(file, FlockOperation::Unlock)?,
        }
        std::thread::sleep(LOOK);
    }
    Ok(false)
}

/// The newest file of a log: names begin with a number that grows.
fn newest(wal: &Path) -> std::io::Result<Option<PathBuf>> {
    let mut newest = None;
    for entry in wal.read_dir()? {
        let path = entry?.path();
        if path.extension().is_some_and(|word| word == "wal") && newest.as_ref() < Some(&path) {
            newest = Some(path);
        }
    }
    Ok(newest)
}

/// Whose log it is that begins so: each file does with a checksum's record and then that one.
fn owner(mut head: &[u8]) -> Option<LogMetadata> {
    loop {
        let (length, rest) = head.split_at_checked(LENGTH_BYTES)?;
        let [low @ .., high] = <[u8; LENGTH_BYTES]>::try_from(length).ok()?;
        let bytes = low.iter().rev().try_fold(0_usize, |sum, byte| {
            Some(sum.checked_mul(256)? + usize::from(*byte))
        })?;
        // The highest byte is 0x80 and the padding, or nothing.
        let padding = usize::from(high & 0x7);
        let (record, rest) = rest.split_at_checked(bytes)?;
        let record = Record::decode(record).ok()?;
        if record.kind == METADATA {
            return LogMetadata::decode(record.data.as_slice()).ok();
        }
        (_, head) = rest.split_at_checked(padding)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// A log's first bytes with records of these kinds, padded to eight as etcd does.
    fn log(records: &[(i64, &[u8])]) -> Vec<u8> {
        let mut log = Vec::new();
        for (kind, data) in records {
            let record = Record {
                kind: *kind,
                data: data.to_vec(),
            };
            let record = record.encode_to_vec();
            let padding = (8 - record.len() % 8) % 8;
            let mut length = u64::try_from(record.len()).unwrap();
            if padding != 0 {
                length |= (0x80 | u64::try_from(padding).unwrap()) << 56;
            }
            log.extend(length.to_le_bytes());
            log.extend(record);
            log.extend(vec![0; padding]);
        }
        log
    }

    #[test]
    fn a_log_tells_whose_it_is() {
        let of = LogMetadata {
            member_id: 0x8e9e_05c5_2164_694d,
            cluster_id: u64::MAX,
        };
        let head = log(&[(4, &[]), (METADATA, &of.encode_to_vec())]);
        assert_eq!(owner(&head), Some(of));
    }

    #[test]
    fn a_log_that_is_cut_or_nonsense_tells_nothing() {
        let of = LogMetadata {
            member_id: 1,
            cluster_id: 2,
        };
        let head = log(&[(4, b"sum"), (METADATA, &of.encode_to_vec())]);
        // Its padding is not missed.
        let whole = log(&[(4, b"sum")]).len() + LENGTH_BYTES;
        for cut in 0..whole {
            assert_eq!(owner(&head[..cut]), None, "{cut}");
        }
        assert_eq!(owner(&[0xff; 64]), None);
        assert_eq!(owner(&[0; 64]), None);
        assert_eq!(owner(&log(&[(4, &[]), (2, b"entry")])), None);
    }

    #[test]
    fn the_newest_file_is_that_of_the_highest_number() {
        let top = tempfile::tempdir().unwrap();
        assert_eq!(newest(top.path()).unwrap(), None);
        for name in [
            "000000000000000a-0000000000000100.wal",
            "0000000000000009-00000000000000f0.wal",
            "0.tmp",
            "z",
        ] {
            std::fs::write(top.path().join(name), "").unwrap();
        }
        let newest = newest(top.path()).unwrap().unwrap();
        assert_eq!(
            newest.file_name(),
            Some("000000000000000a-0000000000000100.wal".as_ref())
        );
        assert!(super::newest(Path::new("/nowhere")).is_err());
    }
}
