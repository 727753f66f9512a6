//! Commands of the control socket, one struct each; its fields are the `arguments`, [`Command::Return`] is the answer.
//!
//! The life of a set: `snapshot-set-prepare` (before the guest freezes), `snapshot-set-mark` (the guest has said frozen),
//! `snapshot-set-commit` (holds, commits, releases), then `snapshot-set-keep` or `snapshot-set-abort` by the verdict.
//! A set belongs to the connection that prepared it: when that closes before `keep`, the set is undone.

use crate::qmp::VersionInfo;
use crate::types::{ByteRange, Method, SnapshotInfo, VolumeInfo, WriteCount};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

/// A command of the control socket.
pub trait Command: Serialize + DeserializeOwned {
    /// Its name on the wire.
    const NAME: &'static str;
    /// What a success answers.
    type Return: Serialize + DeserializeOwned;
}

/// An answer without content: `{}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

macro_rules! command {
    ($name:literal, $type:ident, $return:ty) => {
        impl Command for $type {
            const NAME: &'static str = $name;
            type Return = $return;
        }
    };
}

/// Names of all commands, for `query-commands`.
pub const COMMAND_NAMES: &[&str] = &[
    QmpCapabilities::NAME,
    QueryVersion::NAME,
    QueryCommands::NAME,
    QueryVolumes::NAME,
    QuerySnapshots::NAME,
    SnapshotSetPrepare::NAME,
    SnapshotSetMark::NAME,
    SnapshotSetHold::NAME,
    SnapshotSetCommit::NAME,
    SnapshotSetRelease::NAME,
    SnapshotSetKeep::NAME,
    SnapshotSetLeaveOut::NAME,
    SnapshotSetAbort::NAME,
    SnapshotSetDelete::NAME,
    SnapshotDelete::NAME,
    SnapshotRevert::NAME,
    BlockResize::NAME,
    Getfd::NAME,
    SnapshotRead::NAME,
    WriteMark::NAME,
    QueryWrites::NAME,
    WriteUnmark::NAME,
    HandOver::NAME,
];

/// Leaves negotiation mode; every other command fails before it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct QmpCapabilities {
    /// Capabilities to enable; must be a subset of the greeting's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub enable: Vec<String>,
}
command!("qmp_capabilities", QmpCapabilities, Empty);

/// Version of the daemon.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct QueryVersion {}
command!("query-version", QueryVersion, VersionInfo);

/// Names of all commands.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct QueryCommands {}
command!("query-commands", QueryCommands, Vec<CommandInfo>);

/// A command's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandInfo {
    /// The name.
    pub name: String,
}

/// All volumes of this daemon.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct QueryVolumes {}
command!("query-volumes", QueryVolumes, Vec<VolumeInfo>);

/// All snapshots, oldest first; of one volume or of all.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct QuerySnapshots {
    /// Only this volume's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
}
command!("query-snapshots", QuerySnapshots, Vec<SnapshotInfo>);

/// Opens a set and does what takes time before the guest freezes: flushes, makes room, prepares segments.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotSetPrepare {
    /// Identity of the set, chosen by the caller; must be new.
    pub set: Uuid,
    /// Volumes by name; 1 to 64, each once.
    pub volumes: Vec<String>,
    /// Method; each volume's own if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<Method>,
}
command!("snapshot-set-prepare", SnapshotSetPrepare, Empty);

/// Starts counting the writes of the set's volumes: the guest has just said that it is frozen. May be repeated.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotSetMark {
    /// The set.
    pub set: Uuid,
    /// Areas that may be written while the guest is frozen (swap, raw partitions), by volume. The rest of each volume
    /// is watched.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exempt: Vec<ExemptRanges>,
}
command!("snapshot-set-mark", SnapshotSetMark, Empty);

/// Areas of a volume that the host's witness does not watch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExemptRanges {
    /// Volume by name.
    pub volume: String,
    /// The areas.
    pub ranges: Vec<ByteRange>,
}

/// Holds the writes of all volumes of the set until commit and release; needed only when several daemons hold the disks
/// of one set. The hold ends by itself after `limit-ms`, and the set with it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotSetHold {
    /// The set.
    pub set: Uuid,
    /// Longest hold, milliseconds, at most 10,000.
    pub limit_ms: u64,
}
command!("snapshot-set-hold", SnapshotSetHold, Empty);

/// Takes the snapshots at one instant: holds new writes (unless held), waits for those in flight, appends one record per volume, releases
/// (unless `snapshot-set-hold` holds), makes the records durable, and answers. The snapshots are provisional until `keep`.
///
/// Fails with `HoldBroken` (and undoes the set) if that took longer than `limit-ms` by the daemon's monotonic clock,
/// counted from the mark.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotSetCommit {
    /// The set.
    pub set: Uuid,
    /// Time from the mark to the end of the commit, milliseconds, at most 10,000.
    pub limit_ms: u64,
}
command!(
    "snapshot-set-commit",
    SnapshotSetCommit,
    SnapshotSetCommitted
);

/// Answer of `snapshot-set-commit`. Times are microseconds of the daemon's monotonic clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotSetCommitted {
    /// One per volume, in the order of `prepare`.
    pub volumes: Vec<VolumeCommitted>,
    /// From holding new writes until none was in flight.
    pub drain_us: u64,
    /// From then until the records were durable on all volumes.
    pub record_us: u64,
    /// From holding to releasing.
    pub hold_us: u64,
    /// From the mark to the end of the commit.
    pub since_mark_us: u64,
}

/// One volume's part of a committed set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VolumeCommitted {
    /// The snapshot.
    pub snapshot: SnapshotInfo,
    /// What was written to the watched area between the mark and the commit.
    pub writes_in_window: WriteCount,
}

/// Ends a hold that `snapshot-set-hold` began.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotSetRelease {
    /// The set.
    pub set: Uuid,
}
command!("snapshot-set-release", SnapshotSetRelease, Empty);

/// Keeps the snapshots of a committed set. Durable when answered. Idempotent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotSetKeep {
    /// The set.
    pub set: Uuid,
}
command!("snapshot-set-keep", SnapshotSetKeep, Empty);

/// Leaves areas that nobody needs out of the snapshots of a kept set (VSS: `FilesNotToSnapshot`), as well as it can: what was left out
/// reads as zeroes from the snapshot, for ever, and its old content costs no shadow storage. Kept are parts of blocks of 4096
/// bytes, what an older snapshot sees as it is, what was written since the commit, and all of it once there is a newer snapshot or a
/// set is between mark and commit. The disk itself does not change. Takes a sync for every 64 MiB or 64 areas that do not touch; durable
/// when answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotSetLeaveOut {
    /// The set.
    pub set: Uuid,
    /// What to leave out, by volume.
    pub areas: Vec<AreasLeftOut>,
    /// When to stop, in milliseconds from the command on; at most and by default 60,000. What is not left out by then is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_ms: Option<u64>,
}
command!(
    "snapshot-set-leave-out",
    SnapshotSetLeaveOut,
    SnapshotSetLeftOut
);

/// Areas of a volume that nobody needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AreasLeftOut {
    /// Volume by name.
    pub volume: String,
    /// The areas.
    pub ranges: Vec<ByteRange>,
}

/// What a set does not keep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotSetLeftOut {
    /// By volume, those that were named.
    pub volumes: Vec<VolumeLeftOut>,
}

/// What a snapshot does not keep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VolumeLeftOut {
    /// Volume by name.
    pub volume: String,
    /// Bytes that read as zeroes from the snapshot since this command.
    pub left_out_bytes: u64,
}

/// Undoes a set in any state before `keep`: releases writes, drops provisional snapshots. Durable when answered.
/// `SetNotFound` if there is no such set: nothing of it is left then.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotSetAbort {
    /// The set.
    pub set: Uuid,
    /// Why, for the log and the event.
    pub reason: String,
}
command!("snapshot-set-abort", SnapshotSetAbort, Empty);

/// Deletes all kept snapshots of a set. Answers at once; space comes back in the background.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotSetDelete {
    /// The set.
    pub set: Uuid,
}
command!("snapshot-set-delete", SnapshotSetDelete, Empty);

/// Deletes one snapshot. Answers at once; space comes back in the background.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotDelete {
    /// The snapshot.
    pub snapshot: Uuid,
}
command!("snapshot-delete", SnapshotDelete, Empty);

/// Makes the disk what it was at the snapshot; newer snapshots are deleted. Refused with `InvalidState` while a front
/// end is connected, since a running guest would not notice that its disk has changed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotRevert {
    /// The snapshot.
    pub snapshot: Uuid,
}
command!("snapshot-revert", SnapshotRevert, Empty);

/// Grows a disk while it is served; its front end is told, and the guest sees the new capacity. Snapshots keep the size they were taken
/// with. Durable when answered. `GenericError` for a size that is smaller or no multiple of 512, `SetInProgress` while a set is open on
/// the volume; nothing has changed then.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BlockResize {
    /// Volume by name.
    pub volume: String,
    /// New size in bytes, as of QEMU's command of this name.
    pub size: u64,
}
command!("block_resize", BlockResize, BlockResized);

/// Answer of `block_resize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockResized {
    /// Size of the disk now, in bytes.
    pub size_bytes: u64,
    /// How long writes were held, in microseconds.
    pub hold_us: u64,
}

/// Stores the file descriptor that came with this message (SCM_RIGHTS) under a name, as QEMU's `getfd` does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Getfd {
    /// The name; an older descriptor of the same name is closed.
    pub fdname: String,
}
command!("getfd", Getfd, Empty);

/// Copies a snapshot's content to a descriptor. Answers when all is written; `JOB_PROGRESS` events tell how far it is.
/// A regular file is made sparse (it must be empty and writable); a pipe or socket gets every byte.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotRead {
    /// The snapshot.
    pub snapshot: Uuid,
    /// Name given to `getfd`; the descriptor is closed afterwards.
    pub fdname: String,
    /// What part; the whole disk if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<ByteRange>,
}
command!("snapshot-read", SnapshotRead, SnapshotReadDone);

/// Answer of `snapshot-read`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotReadDone {
    /// Bytes of the disk that were read out.
    pub length_bytes: u64,
    /// Of these, bytes that are not zero.
    pub data_bytes: u64,
}

/// Starts a counter of writes to a volume, in ranges or (none given) the whole of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WriteMark {
    /// Volume by name.
    pub volume: String,
    /// Watched ranges.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<ByteRange>,
}
command!("write-mark", WriteMark, WriteMarked);

/// Answer of `write-mark`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteMarked {
    /// Number of the mark, valid on this connection until it closes or the mark is removed.
    pub mark: u64,
}

/// What was written since a mark.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct QueryWrites {
    /// Number of the mark.
    pub mark: u64,
}
command!("query-writes", QueryWrites, WriteCount);

/// Removes a mark.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct WriteUnmark {
    /// Number of the mark.
    pub mark: u64,
}
command!("write-unmark", WriteUnmark, Empty);

/// Hands all disks, with the connections of their front ends, to another daemon (`vhost-blk serve --replace`), and ends. Answered when
/// the hand-over begins; the rest goes over the socket. If the other daemon cannot take over, this one goes on.
/// Refused with `InvalidState` while a set is open or somebody hands over already.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HandOver {
    /// Name given to `getfd`: one end of a Unix stream socket pair, whose other end the other daemon has.
    pub fdname: String,
    /// Version of the hand-over that the other daemon speaks.
    pub version: u32,
    /// The disks it would serve: exactly those of this daemon.
    pub volumes: Vec<HandOverVolume>,
}
command!("hand-over", HandOver, Empty);

/// A disk as the other daemon was told to serve it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HandOverVolume {
    /// Name.
    pub volume: String,
    /// Its vhost-user socket, absolute path.
    pub socket: String,
    /// Base file or block device.
    pub base: String,
    /// Directory of the shadow storage.
    pub shadow_storage: String,
}
