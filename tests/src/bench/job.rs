//! What a client does in one round: which requests, where, how many at a time, until when.
//!
//! Called by the figures, which make jobs, and by `client` and `fio`, which run them. The same seed gives the same offsets.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// Bytes of a block of the random workloads.
pub const BLOCK_BYTES: u64 = 4096;
/// Distance of the sparse workload's writes, in bytes.
pub const SPARSE_STRIDE_BYTES: u64 = 64 << 10;
/// Area of the dense workload, in bytes.
pub const DENSE_BYTES: u64 = 64 << 20;

/// Direction of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

/// Where the requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Anywhere in the first `area_bytes`, any number of times.
    Random {
        /// Bytes.
        area_bytes: u64,
    },
    /// One block after the other through the first `area_bytes`, again from the start.
    Sequential {
        /// Bytes.
        area_bytes: u64,
    },
    /// One block of each stride through the first `area_bytes`, once, in random order.
    Once {
        /// Bytes.
        area_bytes: u64,
        /// Bytes from one block to the next.
        stride_bytes: u64,
    },
    /// One block after the other through the first `area_bytes`, once.
    Pass {
        /// Bytes.
        area_bytes: u64,
    },
}

/// One round's work. It ends at `limit`, or when the pattern is through.
#[derive(Clone, Debug)]
pub struct Job {
    /// Name for people, such as `random read 4 KiB QD32`.
    pub name: String,
    /// Direction.
    pub op: Op,
    /// Places.
    pub pattern: Pattern,
    /// Bytes of a request.
    pub block_bytes: u64,
    /// Requests in flight in each queue.
    pub depth: usize,
    /// Queues, each with its own thread.
    pub queues: usize,
    /// A flush after so many writes, when they have ended and before others begin.
    pub flush_every: Option<usize>,
    /// Longest time of a round.
    pub limit: Duration,
}

impl Job {
    /// 4 KiB anywhere in the area.
    #[must_use]
    pub fn random(op: Op, depth: usize, area_bytes: u64) -> Self {
        let verb = match op {
            Op::Read => "read",
            Op::Write => "write",
        };
        Self {
            name: format!("random {verb} 4 KiB QD{depth}"),
            op,
            pattern: Pattern::Random { area_bytes },
            block_bytes: BLOCK_BYTES,
            depth,
            queues: 1,
            flush_every: None,
            limit: Duration::from_millis(400),
        }
    }

    /// One 4 KiB write per 64 KiB of the area.
    #[must_use]
    pub fn sparse(depth: usize, area_bytes: u64) -> Self {
        Self {
            name: format!("sparse write QD{depth}"),
            pattern: Pattern::Once {
                area_bytes,
                stride_bytes: SPARSE_STRIDE_BYTES,
            },
            ..Self::random(Op::Write, depth, area_bytes)
        }
    }

    /// Every 4 KiB of the first 64 MiB.
    #[must_use]
    pub fn dense(depth: usize) -> Self {
        Self {
            name: format!("dense write QD{depth}"),
            pattern: Pattern::Once {
                area_bytes: DENSE_BYTES,
                stride_bytes: BLOCK_BYTES,
            },
            ..Self::random(Op::Write, depth, DENSE_BYTES)
        }
    }

    /// The same with another longest time.
    #[must_use]
    pub fn limit(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }

    /// The same with a flush after so many writes.
    #[must_use]
    pub fn flush_every(self, writes: usize) -> Self {
        Self {
            name: format!("{}, a flush every {writes}", self.name),
            flush_every: Some(writes),
            ..self
        }
    }

    /// The offsets of one queue, in order.
    #[must_use]
    pub fn offsets(&self, seed: u64, queue: usize) -> Offsets {
        let mut rng = SmallRng::seed_from_u64(seed ^ ((queue as u64) << 32));
        match self.pattern {
            Pattern::Random { area_bytes } => Offsets::Random {
                rng,
                blocks: (area_bytes / self.block_bytes).max(1),
                block_bytes: self.block_bytes,
            },
            Pattern::Sequential { area_bytes } => {
                // Each queue has its own part of the area.
                let part = area_bytes / self.queues as u64 / self.block_bytes * self.block_bytes;
                Offsets::Sequential {
                    begin: part * queue as u64,
                    part,
                    next: 0,
                    block_bytes: self.block_bytes,
                }
            }
            Pattern::Once {
                area_bytes,
                stride_bytes,
            } => {
                let mut all: Vec<u64> = (0..area_bytes / stride_bytes)
                    .map(|number| number * stride_bytes)
                    .collect();
                all.shuffle(&mut rng);
                Offsets::Listed(all.into_iter())
            }
            Pattern::Pass { area_bytes } => {
                let all: Vec<u64> = (0..area_bytes / self.block_bytes)
                    .map(|number| number * self.block_bytes)
                    .collect();
                Offsets::Listed(all.into_iter())
            }
        }
    }
}

/// Offsets in bytes.
#[derive(Debug)]
pub enum Offsets {
    /// Without end.
    Random {
        /// Source.
        rng: SmallRng,
        /// Blocks to choose from.
        blocks: u64,
        /// Bytes of each.
        block_bytes: u64,
    },
    /// Without end.
    Sequential {
        /// First byte of this queue's part.
        begin: u64,
        /// Bytes of the part.
        part: u64,
        /// Next byte within the part.
        next: u64,
        /// Bytes of a step.
        block_bytes: u64,
    },
    /// Each once.
    Listed(std::vec::IntoIter<u64>),
}

impl Iterator for Offsets {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        match self {
            Self::Random {
                rng,
                blocks,
                block_bytes,
            } => Some(rng.random_range(0..*blocks) * *block_bytes),
            Self::Sequential {
                begin,
                part,
                next,
                block_bytes,
            } => {
                if *next + *block_bytes > *part {
                    *next = 0;
                }
                let offset = *begin + *next;
                *next += *block_bytes;
                Some(offset)
            }
            Self::Listed(offsets) => offsets.next(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparse_job_touches_every_stride_once_in_an_order_of_its_seed() {
        let job = Job::sparse(32, 1 << 20);
        let first: Vec<u64> = job.offsets(1, 0).collect();
        let again: Vec<u64> = job.offsets(1, 0).collect();
        let other: Vec<u64> = job.offsets(2, 0).collect();
        assert_eq!(first, again);
        assert_ne!(first, other);
        let mut sorted = first;
        sorted.sort_unstable();
        let all: Vec<u64> = (0..16).map(|number| number * SPARSE_STRIDE_BYTES).collect();
        assert_eq!(sorted, all);
    }

    #[test]
    fn a_dense_job_touches_every_block_of_64_mib_once() {
        let mut offsets: Vec<u64> = Job::dense(1).offsets(7, 0).collect();
        offsets.sort_unstable();
        offsets.dedup();
        assert_eq!(offsets.len() as u64, DENSE_BYTES / BLOCK_BYTES);
        assert_eq!(offsets.last(), Some(&(DENSE_BYTES - BLOCK_BYTES)));
    }

    #[test]
    fn queues_of_a_sequential_job_never_share_a_block() {
        let job = Job {
            pattern: Pattern::Sequential {
                area_bytes: 8 << 12,
            },
            queues: 2,
            ..Job::random(Op::Read, 1, 0)
        };
        let take = |queue| job.offsets(0, queue).take(5).collect::<Vec<_>>();
        assert_eq!(take(0), [0, 4096, 8192, 12288, 0]);
        assert_eq!(take(1), [16384, 20480, 24576, 28672, 16384]);
    }
}
