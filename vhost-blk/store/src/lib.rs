//! The crash-safe snapshot store: a base file or block device, and a shadow storage directory.
//!
//! The daemon `vhost-blk` is its caller; it knows no virtio, no sockets, and starts no threads.
//! FORMAT.md is normative for the bytes and for the order of writes.
//!
//! Rooms, left to right as a request passes them:
//! `plan` (with `first_write`) -> `read_path`, `write_path` (with `prepare`) -> `state` (with `index`, `snapshot_table`) ->
//! `journal`, `space`, `pins`, `confirm` -> `commit` -> `io`. From the side: `snapshot`, `sets`, `grow`, `maintain` (with
//! `checkpoint`, `reclaim`, `scan`, `settle`), `open` (with `adopt`, `recover`), `check`, `dump`.
//!
//! Invariants, named in comments, errors and tests:
//!
//! * I1: the index holds at most one location per (block, death); a newer layer wins.
//! * I2: every record names blocks of the volume and of the log only, and no log block serves two versions.
//! * I3: what a snapshot sees is never overwritten: it is redirected around, or preserved durably first.
//! * I4: what is kept of the journal is a prefix; a COMMIT in it stands only for data synced before.
//! * I5: epochs only grow; a snapshot is the state at the end of its epoch, with nothing later in it.
//! * I6: a log block is reused only after its freeing is durable and older I/O is over.
//! * I7: what the current or the previous superblock slot names is never overwritten.
//! * I8: after a failed sync nothing is acknowledged until the volume is reopened.
//! * I9: a set is kept on all its members or on none.
//! * I10: the bytes that a sealed record names do not change before the record is confirmed.
//! * I11: sizes never decrease from a snapshot to the next, and the base is at least as long as the volume.

mod adopt;
mod ahead;
mod check;
mod checkpoint;
mod commit;
mod confirm;
mod dump;
mod error;
mod first_write;
mod grow;
mod index;
mod index_room;
mod io;
mod journal;
pub mod layout;
mod leave_out;
mod maintain;
mod open;
mod pins;
mod plan;
mod prepare;
mod read_path;
mod reclaim;
mod recover;
mod reserve;
mod scan;
mod sets;
mod settle;
#[cfg(feature = "sim")]
pub mod sim;
mod snapshot;
mod snapshot_table;
mod space;
mod state;
mod superblock;
mod units;
mod volume;
mod write_path;

pub use check::{Finding, Severity, check};
pub use dump::{Dump, IndexDump, JournalDump, RunDump, SuperblockDump, dump};
pub use error::{FileName, Result, StoreError};
pub use io::{Access, AlignedBuffer, BlockFile, DiskFile};
pub use leave_out::LeaveOut;
pub use maintain::Maintenance;
pub use open::RecoveryReport;
pub use plan::{
    BlockCopy, Extent, MAX_REQUEST_BYTES, ReadPlan, SealPart, Source, View, WriteKind, WritePlan,
};
pub use sets::{SetOutcome, SetResolution, resolve_sets};
pub use snapshot_table::{Method, SnapshotInfo, SnapshotState};
pub use superblock::ModifiedTime;
pub use units::{BLOCK_BYTES, BootId, ByteRange, Epoch, SECTOR_BYTES, SetId, SnapshotId, VolumeId};
pub use volume::{
    DataFile, NewSnapshot, OpenOptions, SyncCounters, Volume, VolumeFiles, VolumeStatus,
};
