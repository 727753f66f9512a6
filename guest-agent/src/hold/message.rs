//! Messages between agent and helper: packets of fixed size on a SEQPACKET socket pair, a path list behind `Open`.
//!
//! Both ends are the same binary, so there is no version. Encoding and decoding allocate nothing, except for paths.
#![deny(clippy::indexing_slicing)]

use crate::clock::BootTime;
use crate::filesystem::mounts::DeviceNumber;

/// Length of every message without its paths, in bytes.
pub const HEAD_BYTES: usize = 48;
/// Longest message, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 32 * 1024;
/// Most file systems at a time.
pub const SLOTS_MAX: usize = 1024;

/// What the agent asks. Paths follow `Open`, separated by NUL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Open a mount point and keep a thread ready for it.
    Open {
        /// Index of the file system.
        slot: u32,
        /// Freeze order.
        step: u32,
        /// Device that the opened directory must lie on.
        device: DeviceNumber,
    },
    /// Write back what is dirty.
    Sync,
    /// Freeze all, step by step.
    Freeze {
        /// Generation of this hold.
        generation: u64,
        /// Limit from now on, milliseconds.
        hold_ms: u64,
    },
    /// Thaw all, in reverse.
    Thaw {
        /// Generation of the hold.
        generation: u64,
    },
    /// Forget all file systems.
    Close,
}

/// What the helper tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tell {
    /// A mount point is open (a duplicate of its descriptor comes along), or could not be opened.
    Opened {
        /// Index.
        slot: u32,
        /// 0 or errno.
        errno: i32,
    },
    /// A file system is written back.
    Synced {
        /// Index.
        slot: u32,
        /// 0 or errno.
        errno: i32,
        /// Time, microseconds.
        took_us: u64,
    },
    /// FIFREEZE returned.
    Froze {
        /// Index.
        slot: u32,
        /// 0 or errno.
        errno: i32,
        /// Time, microseconds.
        took_us: u64,
    },
    /// All steps are frozen, or one failed and the rest were not tried.
    FreezeDone {
        /// Generation.
        generation: u64,
        /// No file system failed.
        ok: bool,
    },
    /// FITHAW returned.
    Thawed {
        /// Index.
        slot: u32,
        /// 0 or errno.
        errno: i32,
        /// Time, microseconds.
        took_us: u64,
    },
    /// Everything that was frozen has been thawed, or does not return from its thaw.
    ThawDone {
        /// Generation.
        generation: u64,
        /// When the first FIFREEZE was called.
        first_freeze: BootTime,
        /// When the first FITHAW was called.
        first_thaw: BootTime,
    },
    /// The limit has passed; thaws follow unasked.
    Ended {
        /// Generation.
        generation: u64,
    },
}

type Head = [u64; 6];

impl Ask {
    /// As bytes.
    #[must_use]
    pub fn encode(self) -> [u8; HEAD_BYTES] {
        encode(match self {
            Self::Open { slot, step, device } => [
                1,
                u64::from(slot),
                u64::from(step),
                u64::from(device.major),
                u64::from(device.minor),
                0,
            ],
            Self::Sync => [2, 0, 0, 0, 0, 0],
            Self::Freeze {
                generation,
                hold_ms,
            } => [3, generation, hold_ms, 0, 0, 0],
            Self::Thaw { generation } => [4, generation, 0, 0, 0, 0],
            Self::Close => [5, 0, 0, 0, 0, 0],
        })
    }

    /// From bytes; the rest is what follows the head.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let ([kind, a, b, c, d, _], rest) = decode(bytes)?;
        let ask = match kind {
            1 => Self::Open {
                slot: u32::try_from(a).ok()?,
                step: u32::try_from(b).ok()?,
                device: DeviceNumber {
                    major: u32::try_from(c).ok()?,
                    minor: u32::try_from(d).ok()?,
                },
            },
            2 => Self::Sync,
            3 => Self::Freeze {
                generation: a,
                hold_ms: b,
            },
            4 => Self::Thaw { generation: a },
            5 => Self::Close,
            _ => return None,
        };
        Some((ask, rest))
    }
}

impl Tell {
    /// As bytes.
    #[must_use]
    pub fn encode(self) -> [u8; HEAD_BYTES] {
        let of_slot = |kind, slot: u32, errno: i32, took_us| {
            let errno = u64::from(errno.unsigned_abs());
            [kind, u64::from(slot), errno, took_us, 0, 0]
        };
        encode(match self {
            Self::Opened { slot, errno } => of_slot(1, slot, errno, 0),
            Self::Synced {
                slot,
                errno,
                took_us,
            } => of_slot(2, slot, errno, took_us),
            Self::Froze {
                slot,
                errno,
                took_us,
            } => of_slot(3, slot, errno, took_us),
            Self::FreezeDone { generation, ok } => [4, generation, u64::from(ok), 0, 0, 0],
            Self::Thawed {
                slot,
                errno,
                took_us,
            } => of_slot(5, slot, errno, took_us),
            Self::ThawDone {
                generation,
                first_freeze,
                first_thaw,
            } => [
                6,
                generation,
                first_freeze.as_us(),
                first_thaw.as_us(),
                0,
                0,
            ],
            Self::Ended { generation } => [7, generation, 0, 0, 0, 0],
        })
    }

    /// From bytes.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let ([kind, a, b, took_us, ..], _) = decode(bytes)?;
        let slot = u32::try_from(a);
        let errno = i32::try_from(b);
        Some(match kind {
            1 => Self::Opened {
                slot: slot.ok()?,
                errno: errno.ok()?,
            },
            2 => Self::Synced {
                slot: slot.ok()?,
                errno: errno.ok()?,
                took_us,
            },
            3 => Self::Froze {
                slot: slot.ok()?,
                errno: errno.ok()?,
                took_us,
            },
            4 => Self::FreezeDone {
                generation: a,
                ok: b == 1,
            },
            5 => Self::Thawed {
                slot: slot.ok()?,
                errno: errno.ok()?,
                took_us,
            },
            6 => Self::ThawDone {
                generation: a,
                first_freeze: BootTime::from_us(b),
                first_thaw: BootTime::from_us(took_us),
            },
            7 => Self::Ended { generation: a },
            _ => return None,
        })
    }
}

fn encode(head: Head) -> [u8; HEAD_BYTES] {
    let mut bytes = [0; HEAD_BYTES];
    for (place, word) in bytes.chunks_exact_mut(8).zip(head) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn decode(bytes: &[u8]) -> Option<(Head, &[u8])> {
    let (head, rest) = bytes.split_at_checked(HEAD_BYTES)?;
    let mut words: Head = [0; 6];
    for (word, chunk) in words.iter_mut().zip(head.chunks_exact(8)) {
        *word = u64::from_le_bytes(chunk.try_into().ok()?);
    }
    Some((words, rest))
}

#[cfg(test)]
mod tests {
    //! What is encoded is decoded again; anything else is refused.
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_message_survives_the_way() {
        let device = DeviceNumber { major: 8, minor: 1 };
        let asks = [
            Ask::Open {
                slot: 3,
                step: 1,
                device,
            },
            Ask::Sync,
            Ask::Freeze {
                generation: 7,
                hold_ms: 10_000,
            },
            Ask::Thaw { generation: 7 },
            Ask::Close,
        ];
        for ask in asks {
            assert_eq!(Ask::decode(&ask.encode()), Some((ask, &[][..])));
        }
        let tells = [
            Tell::Opened { slot: 1, errno: 16 },
            Tell::Synced {
                slot: 1,
                errno: 0,
                took_us: 5,
            },
            Tell::Froze {
                slot: 2,
                errno: 95,
                took_us: 9,
            },
            Tell::FreezeDone {
                generation: 7,
                ok: true,
            },
            Tell::Thawed {
                slot: 2,
                errno: 22,
                took_us: 9,
            },
            Tell::ThawDone {
                generation: 7,
                first_freeze: BootTime::from_us(1),
                first_thaw: BootTime::from_us(2),
            },
            Tell::Ended { generation: 7 },
        ];
        for tell in tells {
            assert_eq!(Tell::decode(&tell.encode()), Some(tell));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoders_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(bytes.len() >= HEAD_BYTES || Ask::decode(&bytes).is_none());
            prop_assert!(bytes.len() >= HEAD_BYTES || Tell::decode(&bytes).is_none());
        }
    }
}
