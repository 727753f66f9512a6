//! A running session that moves to another daemon: everything the front end has said, and the descriptors it has given.
//!
//! Made by `handler` after the rings were stopped, taken apart by the daemon's hand-over, put together and gone on with in the
//! process that takes over (or in this one, if that one cannot). The front end notices nothing: its socket, its memory and its event
//! descriptors are the same open files. Knows nothing of how the parts travel.
//!
//! Invariants:
//! * What arrives is checked like what a front end says: counts and sizes by the same limits, by the handler's own messages.
//! * No ring runs before [`super::listener::Resumed::start`]: until then the other process may still go on with the session.

use super::config_space::QUEUES_MAX;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use vhost::vhost_user::message::VhostUserInflight;

/// Most regions of guest memory.
pub(super) const MEMORY_REGIONS_MAX: usize = 509;

/// A session of a front end.
#[derive(Debug)]
pub struct Session {
    pub(super) connection: UnixStream,
    pub(super) features: u64,
    pub(super) protocol_features: u64,
    pub(super) write_cache: bool,
    /// The size of the disk that the front end has read, in bytes.
    pub(super) read_bytes: Option<u64>,
    /// Where it is told of another.
    pub(super) back_channel: Option<UnixStream>,
    pub(super) regions: Vec<Region>,
    pub(super) tracking: Option<(TrackingState, File)>,
    pub(super) rings: Vec<Ring>,
}

/// A region of guest memory.
#[derive(Debug)]
pub(super) struct Region {
    pub(super) place: Place,
    pub(super) file: File,
}

/// Where a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Place {
    pub(super) guest: u64,
    pub(super) front_end: u64,
    pub(super) length_bytes: u64,
    pub(super) file_offset_bytes: u64,
}

/// A ring, stopped.
#[derive(Debug)]
pub(super) struct Ring {
    pub(super) state: RingState,
    pub(super) kick: Option<File>,
    pub(super) call: Option<File>,
    pub(super) error: Option<File>,
}

/// Numbers of a ring; addresses are the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RingState {
    pub(super) size: u16,
    pub(super) table: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    /// Next entry of the available ring that was not fetched, or not kept in the in-flight memory.
    pub(super) position: u16,
    pub(super) enabled: bool,
    /// It was started: it had a kick and was not stopped since.
    pub(super) started: bool,
}

/// A session without its descriptors, in the order in which they go with it: connection, back-end channel, regions, tracking, then kick, call and
/// error of each ring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionState {
    features: u64,
    protocol_features: u64,
    write_cache: bool,
    read_bytes: Option<u64>,
    back_channel: bool,
    regions: Vec<Place>,
    tracking: Option<TrackingState>,
    rings: Vec<(RingState, Given)>,
}

/// Shape of the in-flight memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TrackingState {
    size_bytes: u64,
    offset_bytes: u64,
    queues: u16,
    entries: u16,
}

impl From<&VhostUserInflight> for TrackingState {
    fn from(shape: &VhostUserInflight) -> Self {
        Self {
            size_bytes: shape.mmap_size,
            offset_bytes: shape.mmap_offset,
            queues: shape.num_queues,
            entries: shape.queue_size,
        }
    }
}

impl From<TrackingState> for VhostUserInflight {
    fn from(shape: TrackingState) -> Self {
        Self::new(
            shape.size_bytes,
            shape.offset_bytes,
            shape.queues,
            shape.entries,
        )
    }
}

/// Which descriptors a ring has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Given {
    kick: bool,
    call: bool,
    error: bool,
}

/// Why a session cannot be put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSession {
    /// More rings than a device has.
    #[error("a session with {0} rings")]
    Rings(usize),
    /// More regions than a device takes.
    #[error("a session with {0} regions of memory")]
    Regions(usize),
    /// Fewer descriptors than it needs.
    #[error("a session with a descriptor missing")]
    Descriptors,
}

impl Session {
    /// Numbers and descriptors apart.
    #[must_use]
    pub fn take_apart(&self) -> (SessionState, Vec<BorrowedFd<'_>>) {
        let mut descriptors = vec![self.connection.as_fd()];
        descriptors.extend(self.back_channel.iter().map(AsFd::as_fd));
        descriptors.extend(self.regions.iter().map(|region| region.file.as_fd()));
        descriptors.extend(self.tracking.iter().map(|(_, file)| file.as_fd()));
        for ring in &self.rings {
            let files = [&ring.kick, &ring.call, &ring.error];
            descriptors.extend(files.into_iter().flatten().map(AsFd::as_fd));
        }
        let state = SessionState {
            features: self.features,
            protocol_features: self.protocol_features,
            write_cache: self.write_cache,
            read_bytes: self.read_bytes,
            back_channel: self.back_channel.is_some(),
            regions: self.regions.iter().map(|region| region.place).collect(),
            tracking: self.tracking.as_ref().map(|(shape, _)| *shape),
            rings: self
                .rings
                .iter()
                .map(|ring| {
                    let given = Given {
                        kick: ring.kick.is_some(),
                        call: ring.call.is_some(),
                        error: ring.error.is_some(),
                    };
                    (ring.state, given)
                })
                .collect(),
        };
        (state, descriptors)
    }

    /// Takes what the state needs from `descriptors`, in order.
    ///
    /// # Errors
    /// [`BadSession`].
    pub fn put_together(
        state: SessionState,
        descriptors: &mut impl Iterator<Item = OwnedFd>,
    ) -> Result<Self, BadSession> {
        if state.rings.len() > usize::from(QUEUES_MAX) {
            return Err(BadSession::Rings(state.rings.len()));
        }
        if state.regions.len() > MEMORY_REGIONS_MAX {
            return Err(BadSession::Regions(state.regions.len()));
        }
        let mut next = || descriptors.next().ok_or(BadSession::Descriptors);
        let connection = UnixStream::from(next()?);
        let back_channel = match state.back_channel {
            true => Some(UnixStream::from(next()?)),
            false => None,
        };
        let regions = state
            .regions
            .into_iter()
            .map(|place| {
                let file = next()?.into();
                Ok(Region { place, file })
            })
            .collect::<Result<_, BadSession>>()?;
        let tracking = match state.tracking {
            Some(shape) => Some((shape, next()?.into())),
            None => None,
        };
        let mut one = |given: bool| -> Result<Option<File>, BadSession> {
            given.then(|| next().map(File::from)).transpose()
        };
        let rings = state
            .rings
            .into_iter()
            .map(|(state, given)| {
                Ok(Ring {
                    state,
                    kick: one(given.kick)?,
                    call: one(given.call)?,
                    error: one(given.error)?,
                })
            })
            .collect::<Result<_, BadSession>>()?;
        Ok(Self {
            connection,
            features: state.features,
            protocol_features: state.protocol_features,
            write_cache: state.write_cache,
            read_bytes: state.read_bytes,
            back_channel,
            regions,
            tracking,
            rings,
        })
    }

    /// The messages by which a new endpoint of the connection learns what was negotiated on it: it goes by what it hears.
    pub(super) fn negotiation(&self) -> Vec<Vec<u8>> {
        /// Flags of a request: version 1.
        const REQUEST: u32 = 1;
        const GET_FEATURES: u32 = 1;
        const SET_FEATURES: u32 = 2;
        const SET_PROTOCOL_FEATURES: u32 = 16;
        let message = |request: u32, value: Option<u64>| {
            let length = if value.is_some() { 8 } else { 0 };
            let mut bytes = [request, REQUEST, length].map(u32::to_le_bytes).concat();
            bytes.extend(value.iter().flat_map(|value| value.to_le_bytes()));
            bytes
        };
        vec![
            message(GET_FEATURES, None),
            message(SET_FEATURES, Some(self.features)),
            message(SET_PROTOCOL_FEATURES, Some(self.protocol_features)),
        ]
    }
}

/// A copy of a descriptor that is somebody else's.
pub(super) fn copy(file: &Option<File>) -> io::Result<Option<File>> {
    file.as_ref().map(File::try_clone).transpose()
}

#[cfg(test)]
mod tests;
