//! Plans: what a read or a write does, block by block, before any byte moves.
//!
//! `read_path` and `write_path` make them, the caller moves the data and hands the plan back.
//! Invariants: a plan pins the log blocks it names until it is dropped (I6); blocks whose location a
//! plan changes are in no other plan that writes.

use std::sync::Arc;

use crate::first_write::{Step, decide};
use crate::index::{BlockState, Location};
use crate::pins::Pin;
use crate::snapshot_table::Method;
use crate::space::LogRun;
use crate::units::{BLOCK_BYTES, Block, ByteRange, LogBlock, SnapshotId};
use crate::volume::Shared;

/// Longest request of any kind, in bytes. The device advertises limits no larger.
pub const MAX_REQUEST_BYTES: u64 = 64 << 20;

// One more where it is not aligned to blocks.
const _: () = assert!(MAX_REQUEST_BYTES / BLOCK_BYTES < crate::layout::MAX_RECORD_BLOCKS as u64);

/// Which state of the volume a read sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum View {
    /// The guest's disk as it is now.
    Head,
    /// The disk as it was when the snapshot was taken.
    Snapshot(SnapshotId),
}

/// What a write does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WriteKind {
    /// Stores data.
    Write,
    /// Makes the range read as zeroes; `may_unmap` allows giving the space back.
    WriteZeroes {
        /// Whether the space may be given back.
        may_unmap: bool,
    },
    /// Advice that the range is not needed; whole blocks may read as zeroes afterwards.
    Discard,
}

/// Where an extent's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// In the base, at the extent's offset.
    Base,
    /// In the log, at the extent's offset.
    Log,
    /// Nowhere: zeroes. Only in reads; the offset means nothing.
    Zero,
}

/// Neighbouring bytes in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Which file.
    pub source: Source,
    /// Where in that file, in bytes.
    pub offset_bytes: u64,
    /// How many bytes.
    pub length_bytes: u64,
}

/// Extents of a plan; the usual single one needs no allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Extents {
    One(Extent),
    Many(Vec<Extent>),
}

impl Extents {
    pub(crate) fn base(range: ByteRange) -> Extents {
        Extents::One(Extent {
            source: Source::Base,
            offset_bytes: range.offset_bytes,
            length_bytes: range.length_bytes,
        })
    }

    pub(crate) fn as_slice(&self) -> &[Extent] {
        match self {
            Extents::One(extent) => std::slice::from_ref(extent),
            Extents::Many(extents) => extents,
        }
    }
}

/// Bytes of `block` at `location`.
pub(crate) fn extent_at(
    block: Block,
    location: Location,
    skip_bytes: u64,
    length_bytes: u64,
) -> Extent {
    let (source, offset_bytes) = match location {
        Location::Base => (Source::Base, block.offset_bytes() + skip_bytes),
        Location::Log(at) => (Source::Log, at.offset_bytes() + skip_bytes),
        Location::Zero => (Source::Zero, 0),
    };
    Extent {
        source,
        offset_bytes,
        length_bytes,
    }
}

/// Appends bytes at `location`, in one extent with the last where they follow it.
pub(crate) fn push_extent(
    extents: &mut Vec<Extent>,
    block: Block,
    location: Location,
    skip_bytes: u64,
    length_bytes: u64,
) {
    let extent = extent_at(block, location, skip_bytes, length_bytes);
    if let Some(last) = extents.last_mut()
        && last.source == extent.source
        && (extent.source == Source::Zero
            || last.offset_bytes + last.length_bytes == extent.offset_bytes)
    {
        last.length_bytes += length_bytes;
        return;
    }
    extents.push(extent);
}

/// A planned read. Keep it until the data has been read.
#[derive(Debug)]
pub struct ReadPlan {
    pub(crate) view: View,
    pub(crate) range: ByteRange,
    pub(crate) extents: Extents,
    pub(crate) _pin: Option<Pin>,
}

impl ReadPlan {
    /// Where the bytes are, in the order of the range.
    pub fn extents(&self) -> &[Extent] {
        self.extents.as_slice()
    }
}

/// Neighbouring blocks that get a new live location.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapRun {
    pub(crate) block: Block,
    pub(crate) count: u64,
    pub(crate) location: Location,
    pub(crate) history: bool,
}

/// Neighbouring blocks whose old data is copied first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PreserveRun {
    pub(crate) block: Block,
    pub(crate) count: u64,
    pub(crate) old: Location,
    pub(crate) copy: LogBlock,
}

/// A redirected block of which the request covers a part: the rest comes from the old version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Edge {
    pub(crate) block: Block,
    pub(crate) old: Location,
    pub(crate) new: LogBlock,
    /// First byte of the block that the request covers.
    pub(crate) from: u64,
    /// First byte behind what it covers.
    pub(crate) to: u64,
}

/// What a plan has to do besides moving data.
#[derive(Debug, Default)]
pub(crate) struct Work {
    pub(crate) maps: Vec<MapRun>,
    pub(crate) preserves: Vec<PreserveRun>,
    pub(crate) edges: Vec<Edge>,
    /// Log segments without space of their own.
    pub(crate) bare_segments: Vec<u64>,
    /// The journal or the memtable is over its bound: a checkpoint comes first.
    pub(crate) pressure: bool,
    /// Blocks no other write may be planned for: first and last.
    pub(crate) busy: Vec<(u64, u64)>,
    /// Log blocks allocated and named by no record yet.
    pub(crate) reserved: Vec<LogRun>,
    pub(crate) prepared: bool,
}

impl Work {
    pub(crate) fn needs_prepare(&self) -> bool {
        !self.prepared
            && (self.pressure
                || !self.preserves.is_empty()
                || !self.edges.is_empty()
                || !self.bare_segments.is_empty())
    }
}

/// A planned write. Complete it after the data landed; dropping it gives back what it reserved.
#[derive(Debug)]
pub struct WritePlan {
    pub(crate) shared: Arc<Shared>,
    pub(crate) kind: WriteKind,
    pub(crate) extents: Extents,
    pub(crate) work: Option<Box<Work>>,
    pub(crate) _pin: Option<Pin>,
}

impl WritePlan {
    /// Whether [`crate::Volume::prepare_writes`] has to come before the data.
    pub fn needs_prepare(&self) -> bool {
        self.work.as_ref().is_some_and(|work| work.needs_prepare())
    }

    /// Where the guest's bytes go, in order. For `WriteZeroes` and `Discard`: what to zero in place,
    /// and it may be nothing, or less than the range. Extents in the log are zeroed, never punched.
    pub fn extents(&self) -> &[Extent] {
        self.extents.as_slice()
    }

    /// What the write does.
    pub fn kind(&self) -> WriteKind {
        self.kind
    }
}

/// What a request does to its blocks, still without addresses in the log.
#[derive(Debug)]
pub(crate) struct Outline {
    /// What happens to each block, and where its live version is.
    steps: Vec<(Step, Block, Location)>,
    /// Log blocks needed.
    pub(crate) log_blocks: u64,
}

/// Decides every block of the request.
pub(crate) fn outline(
    kind: WriteKind,
    range: ByteRange,
    size_bytes: u64,
    states: &[BlockState],
    method: Option<Method>,
) -> Outline {
    let mut outline = Outline {
        steps: Vec::new(),
        log_blocks: 0,
    };
    let mut block = range.first_block();
    for state in states {
        let (from, to) = covered(range, block);
        let whole = from == 0 && to == (size_bytes - block.offset_bytes()).min(BLOCK_BYTES);
        let step = decide(kind, whole, *state, method);
        if matches!(step, Step::Redirect { .. } | Step::Preserve(_)) {
            outline.log_blocks += 1;
        }
        outline.steps.push((step, block, state.live));
        block = block.plus(1);
    }
    outline
}

/// The part of `block` that `range` covers: first byte and first byte behind.
fn covered(range: ByteRange, block: Block) -> (u64, u64) {
    let start = block.offset_bytes();
    let from = range.offset_bytes.saturating_sub(start);
    (from, (range.end_bytes() - start).min(BLOCK_BYTES))
}

impl Outline {
    /// Blocks whose location changes: no other write may be planned for them meanwhile.
    pub(crate) fn busy(&self) -> Vec<(u64, u64)> {
        let mut busy: Vec<(u64, u64)> = Vec::new();
        for (step, block, _) in &self.steps {
            match step {
                Step::InPlace(_) | Step::Nothing => {}
                Step::Redirect { .. } | Step::Preserve(_) | Step::ToZero { .. } => {
                    match busy.last_mut() {
                        Some((_, last)) if *last + 1 == block.0 => *last = block.0,
                        Some(_) | None => busy.push((block.0, block.0)),
                    }
                }
            }
        }
        busy
    }

    /// Gives the steps their places in the log. `runs` hold exactly the blocks asked for.
    pub(crate) fn place(
        &self,
        range: ByteRange,
        size_bytes: u64,
        runs: &[LogRun],
    ) -> (Vec<Extent>, Work) {
        let mut extents = Vec::new();
        let mut work = Work {
            reserved: runs.to_vec(),
            busy: self.busy(),
            ..Work::default()
        };
        let mut fresh = runs
            .iter()
            .flat_map(|run| (0..run.count).map(|place| run.start.plus(place)));
        for (step, block, live) in &self.steps {
            let (from, to) = covered(range, *block);
            match step {
                Step::InPlace(at) => push_extent(&mut extents, *block, *at, from, to - from),
                Step::Redirect { history } => {
                    let Some(new) = fresh.next() else { continue };
                    push_extent(&mut extents, *block, Location::Log(new), from, to - from);
                    push_map(&mut work.maps, *block, Location::Log(new), *history);
                    if from != 0 || to != (size_bytes - block.offset_bytes()).min(BLOCK_BYTES) {
                        work.edges.push(Edge {
                            block: *block,
                            old: *live,
                            new,
                            from,
                            to,
                        });
                    }
                }
                Step::Preserve(old) => {
                    let Some(copy) = fresh.next() else { continue };
                    push_extent(&mut extents, *block, *old, from, to - from);
                    push_preserve(&mut work.preserves, *block, *old, copy);
                }
                Step::ToZero { history } => {
                    push_map(&mut work.maps, *block, Location::Zero, *history);
                }
                Step::Nothing => {}
            }
        }
        (extents, work)
    }
}

fn push_map(maps: &mut Vec<MapRun>, block: Block, location: Location, history: bool) {
    if let Some(last) = maps.last_mut()
        && last.history == history
        && last.block.plus(last.count) == block
        && last.location.plus(last.count) == location
    {
        last.count += 1;
        return;
    }
    maps.push(MapRun {
        block,
        count: 1,
        location,
        history,
    });
}

fn push_preserve(runs: &mut Vec<PreserveRun>, block: Block, old: Location, copy: LogBlock) {
    if let Some(last) = runs.last_mut()
        && last.block.plus(last.count) == block
        && last.copy.plus(last.count) == copy
        && last.old.plus(last.count) == old
    {
        last.count += 1;
        return;
    }
    runs.push(PreserveRun {
        block,
        count: 1,
        old,
        copy,
    });
}
