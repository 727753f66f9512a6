//! A command becomes calls of the engine, an error becomes a class.
//!
//! Called by `connection` on a thread that may block. Knows nothing of sockets.

use super::connection::{Client, version};
use super::export;
use crate::engine::{SetError, Watched};
use serde_json::Value;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use vhost_blk_wire::command::{
    BlockResize, BlockResized, COMMAND_NAMES, Command, CommandInfo, Empty, Getfd, HandOver,
    HandOverVolume, QmpCapabilities, QueryCommands, QuerySnapshots, QueryVersion, QueryVolumes,
    QueryWrites, SnapshotDelete, SnapshotRead, SnapshotRevert, SnapshotSetAbort, SnapshotSetCommit,
    SnapshotSetCommitted, SnapshotSetDelete, SnapshotSetHold, SnapshotSetKeep, SnapshotSetLeaveOut,
    SnapshotSetLeftOut, SnapshotSetMark, SnapshotSetPrepare, SnapshotSetRelease, VolumeCommitted,
    VolumeLeftOut, WriteMark, WriteMarked, WriteUnmark,
};
use vhost_blk_wire::qmp::{ErrorClass, QmpError, Request};

/// Version of what one daemon says to the next when it hands over. Another version is refused: an update that changes it goes the slow
/// way, by an end and a start.
pub const HAND_OVER_VERSION: u32 = 2;
/// Marks of one client.
const MARKS_MAX: usize = 1024;
/// Named descriptors of one client.
const NAMED_MAX: usize = 64;

/// Runs a command.
pub(super) fn execute(client: &Arc<Client>, request: &Request) -> Result<Value, QmpError> {
    let name = request.execute.as_str();
    let is_negotiation = name == QmpCapabilities::NAME;
    if !client.has_negotiated() && !is_negotiation {
        return Err(QmpError::new(
            ErrorClass::CommandNotFound,
            format!(
                "expecting capabilities negotiation with '{}'",
                QmpCapabilities::NAME
            ),
        ));
    }
    let sets = &client.server.sets;
    match name {
        QmpCapabilities::NAME => run(request, |command: QmpCapabilities| {
            if client.has_negotiated() {
                return Err(QmpError::new(
                    ErrorClass::CommandNotFound,
                    "capabilities negotiation is already complete",
                ));
            }
            if let Some(unknown) = command.enable.first() {
                return Err(generic(format!("no capability {unknown:?}")));
            }
            client.negotiate();
            Ok(Empty {})
        }),
        QueryVersion::NAME => run(request, |_: QueryVersion| Ok(version())),
        QueryCommands::NAME => run(request, |_: QueryCommands| {
            Ok(COMMAND_NAMES
                .iter()
                .map(|name| CommandInfo {
                    name: (*name).to_owned(),
                })
                .collect())
        }),
        QueryVolumes::NAME => run(request, |_: QueryVolumes| {
            Ok(sets.volumes().iter().map(|volume| volume.info()).collect())
        }),
        QuerySnapshots::NAME => run(request, |command: QuerySnapshots| {
            Ok(sets.snapshots(command.volume.as_deref())?)
        }),
        SnapshotSetPrepare::NAME => run(request, |command: SnapshotSetPrepare| {
            sets.prepare(command.set, client.owner, &command.volumes, command.method)?;
            if client.gone.load(std::sync::atomic::Ordering::SeqCst) {
                // The client left while its set was being prepared, after its other sets were undone.
                sets.owner_gone(client.owner);
            }
            Ok(Empty {})
        }),
        SnapshotSetMark::NAME => run(request, |command: SnapshotSetMark| {
            let exempt: Vec<_> = command
                .exempt
                .into_iter()
                .map(|exempt| (exempt.volume, exempt.ranges))
                .collect();
            sets.mark(command.set, &exempt)?;
            Ok(Empty {})
        }),
        SnapshotSetHold::NAME => run(request, |command: SnapshotSetHold| {
            sets.hold(command.set, command.limit_ms)?;
            Ok(Empty {})
        }),
        SnapshotSetCommit::NAME => run(request, |command: SnapshotSetCommit| {
            commit(client, &command)
        }),
        SnapshotSetRelease::NAME => run(request, |command: SnapshotSetRelease| {
            sets.release(command.set)?;
            Ok(Empty {})
        }),
        SnapshotSetKeep::NAME => run(request, |command: SnapshotSetKeep| {
            sets.keep(command.set)?;
            Ok(Empty {})
        }),
        SnapshotSetLeaveOut::NAME => run(request, |command: SnapshotSetLeaveOut| {
            leave_out(client, command)
        }),
        SnapshotSetAbort::NAME => run(request, |command: SnapshotSetAbort| {
            sets.abort(command.set, &command.reason)?;
            Ok(Empty {})
        }),
        SnapshotSetDelete::NAME => run(request, |command: SnapshotSetDelete| {
            sets.delete_set(command.set)?;
            Ok(Empty {})
        }),
        SnapshotDelete::NAME => run(request, |command: SnapshotDelete| {
            sets.delete_snapshot(command.snapshot)?;
            Ok(Empty {})
        }),
        SnapshotRevert::NAME => run(request, |command: SnapshotRevert| {
            sets.revert(command.snapshot)?;
            Ok(Empty {})
        }),
        BlockResize::NAME => run(request, |command: BlockResize| {
            let resized = sets.resize(&command.volume, command.size)?;
            Ok(BlockResized {
                size_bytes: resized.size_bytes,
                hold_us: u64::try_from(resized.hold.as_micros()).unwrap_or(u64::MAX),
            })
        }),
        Getfd::NAME => run(request, |command: Getfd| getfd(client, command)),
        SnapshotRead::NAME => run(request, |command: SnapshotRead| {
            export::snapshot_read(client, &command)
        }),
        WriteMark::NAME => run(request, |command: WriteMark| write_mark(client, command)),
        QueryWrites::NAME => run(request, |command: QueryWrites| {
            let marks = client.marks();
            let (volume, mark) = marks.get(&command.mark).ok_or_else(no_mark)?;
            volume.witness.read(*mark).ok_or_else(no_mark)
        }),
        WriteUnmark::NAME => run(request, |command: WriteUnmark| {
            let (volume, mark) = client.marks().remove(&command.mark).ok_or_else(no_mark)?;
            volume.witness.unmark(mark);
            Ok(Empty {})
        }),
        HandOver::NAME => run(request, |command: HandOver| hand_over(client, &command)),
        _ => Err(QmpError::new(
            ErrorClass::CommandNotFound,
            format!("the command {name} has not been found"),
        )),
    }
}

/// Decodes the arguments, runs, encodes the answer.
fn run<C: Command>(
    request: &Request,
    work: impl FnOnce(C) -> Result<C::Return, QmpError>,
) -> Result<Value, QmpError> {
    let arguments = request
        .arguments
        .clone()
        .unwrap_or_else(|| Value::Object(Default::default()));
    let command = serde_json::from_value(arguments)
        .map_err(|error| generic(format!("arguments of {}: {error}", C::NAME)))?;
    serde_json::to_value(work(command)?)
        .map_err(|error| generic(format!("the answer cannot be written: {error}")))
}

fn leave_out(
    client: &Client,
    command: SnapshotSetLeaveOut,
) -> Result<SnapshotSetLeftOut, QmpError> {
    let areas: Vec<_> = command
        .areas
        .into_iter()
        .map(|area| (area.volume, area.ranges))
        .collect();
    let left_out = client
        .server
        .sets
        .leave_out(command.set, &areas, command.limit_ms)?;
    let volumes = areas
        .into_iter()
        .zip(left_out)
        .map(|((volume, _), left_out_bytes)| VolumeLeftOut {
            volume,
            left_out_bytes,
        })
        .collect();
    Ok(SnapshotSetLeftOut { volumes })
}

fn commit(client: &Client, command: &SnapshotSetCommit) -> Result<SnapshotSetCommitted, QmpError> {
    let committed = client.server.sets.commit(command.set, command.limit_ms)?;
    let micros = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    Ok(SnapshotSetCommitted {
        drain_us: micros(committed.drain),
        record_us: micros(committed.record),
        hold_us: micros(committed.hold),
        since_mark_us: micros(committed.since_mark),
        volumes: committed
            .volumes
            .into_iter()
            .map(|(snapshot, writes_in_window)| VolumeCommitted {
                snapshot,
                writes_in_window,
            })
            .collect(),
    })
}

fn getfd(client: &Client, command: Getfd) -> Result<Empty, QmpError> {
    let descriptor = client
        .take_arrived()
        .ok_or_else(|| generic("no file descriptor came with this message (SCM_RIGHTS)"))?;
    let mut named = client.named();
    if named.len() >= NAMED_MAX && !named.contains_key(&command.fdname) {
        return Err(generic(format!("more than {NAMED_MAX} descriptors")));
    }
    named.insert(command.fdname, descriptor);
    Ok(Empty {})
}

fn hand_over(client: &Client, command: &HandOver) -> Result<Empty, QmpError> {
    let descriptor = client
        .named()
        .remove(&command.fdname)
        .ok_or_else(|| generic(format!("no descriptor named {:?}", command.fdname)))?;
    let refused = |why: String| QmpError::new(ErrorClass::InvalidState, why);
    if command.version != HAND_OVER_VERSION {
        return Err(refused(format!(
            "this daemon hands over by version {HAND_OVER_VERSION}, not {}",
            command.version
        )));
    }
    let sets = &client.server.sets;
    let own = sets.volumes().iter().map(|volume| HandOverVolume {
        volume: volume.settings.name.clone(),
        socket: volume.settings.socket.display().to_string(),
        base: volume.settings.base.display().to_string(),
        shadow_storage: volume.settings.shadow_storage.display().to_string(),
    });
    if !own.eq(command.volumes.iter().cloned()) {
        return Err(refused(
            "it serves other disks, by other names, or on other sockets".to_owned(),
        ));
    }
    if sets.any_open() {
        return Err(refused("a snapshot set is open".to_owned()));
    }
    if !client.server.begin_hand_over(UnixStream::from(descriptor)) {
        return Err(refused("it is being handed over, or stops".to_owned()));
    }
    Ok(Empty {})
}

fn write_mark(client: &Client, command: WriteMark) -> Result<WriteMarked, QmpError> {
    let volume = Arc::clone(client.server.sets.volume(&command.volume)?);
    let mut marks = client.marks();
    if marks.len() >= MARKS_MAX {
        return Err(generic(format!("more than {MARKS_MAX} marks")));
    }
    let watched = if command.ranges.is_empty() {
        Watched::AllBut(Vec::new())
    } else {
        Watched::Only(command.ranges)
    };
    let mark = volume.witness.mark(watched);
    let number = client.server.next_number();
    marks.insert(number, (volume, mark));
    Ok(WriteMarked { mark: number })
}

fn no_mark() -> QmpError {
    generic("no such mark on this connection")
}

pub(super) fn generic(text: impl Into<String>) -> QmpError {
    QmpError::new(ErrorClass::GenericError, text)
}

impl From<SetError> for QmpError {
    fn from(error: SetError) -> Self {
        let class = match &error {
            SetError::NoSuchVolume(_) => ErrorClass::DeviceNotFound,
            SetError::NoSuchSet(_) | SetError::Undone(_) => ErrorClass::SetNotFound,
            SetError::NoSuchSnapshot(_) => ErrorClass::SnapshotNotFound,
            SetError::InProgress(..) => ErrorClass::SetInProgress,
            SetError::Refused(_) | SetError::InvalidState(_) => ErrorClass::InvalidState,
            SetError::HoldBroken(_) => ErrorClass::HoldBroken,
            SetError::NoSpace(_) => ErrorClass::InsufficientStorage,
            SetError::Poisoned(_) => ErrorClass::VolumePoisoned,
            SetError::BadArgument(_) | SetError::Store { .. } => ErrorClass::GenericError,
        };
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(source) = cause {
            text.push_str(": ");
            text.push_str(&source.to_string());
            cause = source.source();
        }
        Self::new(class, text)
    }
}
