//! Plans: what a read or a write does, block by block, before any byte moves.
//!
//! `read_path` and `write_path` make them, the caller moves the data and hands the plan back.
//! Invariants: a plan pins the log blocks it names until it is dropped (I6); blocks whose location a
//! plan changes are in no other plan that writes.

use std::sync::Arc;

use crate::first_write::{Step, decide};
use crate::index::{BlockState, Location};
use crate::layout::MAX_SEALED_BLOCKS;
use crate::pins::Pin;
use crate::snapshot_table::Method;
use crate::space::LogRun;
use crate::units::{BLOCK_BYTES, Block, ByteRange, LogBlock, SnapshotId, in_memory};
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

/// Old bytes that have to be in the log before the plan may go on: preserved blocks, and what lies in a
/// redirected block beside the part that the request covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockCopy {
    /// Where they are, and how many. [`Source::Zero`]: zeroes have to be written.
    pub from: Extent,
    /// Where in the log they go, in bytes.
    pub to_offset_bytes: u64,
    /// Whether [`WritePlan::seal_copy`] is of use for it.
    pub wants_seal: bool,
}

/// A part of a request whose checksum the store can use: whole blocks that go to one place in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SealPart {
    /// Where it begins in the request, in bytes.
    pub offset_bytes: u64,
    /// Its length in bytes.
    pub length_bytes: u64,
}

/// Neighbouring blocks that get a new live location.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapRun {
    pub(crate) block: Block,
    pub(crate) count: u64,
    pub(crate) location: Location,
    /// Where the first of them lived, if those versions become history; the rest follows.
    pub(crate) old: Option<Location>,
    /// Whether the request holds all its bytes, so that a checksum can be made of them.
    pub(crate) whole: bool,
    /// CRC32C of the bytes that were written to the log.
    pub(crate) crc: Option<u32>,
}

/// Neighbouring blocks whose old data is copied first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PreserveRun {
    pub(crate) block: Block,
    pub(crate) count: u64,
    pub(crate) copy: LogBlock,
    /// Its place among the copies.
    pub(crate) place: usize,
    /// CRC32C of the copied bytes.
    pub(crate) crc: Option<u32>,
}

/// What a plan has to do besides moving data.
#[derive(Debug, Default)]
pub(crate) struct Work {
    pub(crate) maps: Vec<MapRun>,
    pub(crate) preserves: Vec<PreserveRun>,
    pub(crate) copies: Vec<BlockCopy>,
    /// Parts of the request, and the run in `maps` that each of them is.
    pub(crate) seals: Vec<SealPart>,
    pub(crate) sealed_maps: Vec<usize>,
    /// All of `copies` have landed.
    pub(crate) copied: bool,
    /// Log segments without space of their own.
    pub(crate) bare_segments: Vec<u64>,
    /// The journal or the memtable is over its bound: a checkpoint comes first.
    pub(crate) pressure: bool,
    /// It writes over data in doubt: a round that confirms it comes first.
    pub(crate) confirm_first: bool,
    /// Blocks no other write may be planned for before the plan is complete: first and last.
    pub(crate) moving: Vec<(u64, u64)>,
    /// The same, but only until their old data is durable: from then on they are written in place.
    pub(crate) preserving: Vec<(u64, u64)>,
    /// Log blocks that nobody lives in any more when the plan is complete.
    pub(crate) supersedes: Vec<LogRun>,
    /// Records that it may append, and that rounds may append for it.
    pub(crate) promised_records: u64,
    /// Log blocks allocated and named by no record yet.
    pub(crate) reserved: Vec<LogRun>,
    pub(crate) prepared: bool,
}

impl Work {
    /// All that it claims, as they were given to [`crate::volume::Core::busy`].
    pub(crate) fn claims(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.moving.iter().chain(&self.preserving).copied()
    }

    pub(crate) fn needs_prepare(&self) -> bool {
        !self.prepared && (self.needs_room() || self.needs_copies() || !self.preserves.is_empty())
    }

    fn needs_room(&self) -> bool {
        self.pressure || self.confirm_first || !self.bare_segments.is_empty()
    }

    fn needs_copies(&self) -> bool {
        !self.copied && !self.copies.is_empty()
    }
}

/// A planned write. Complete it after the data landed; dropping it gives back what it reserved.
#[derive(Debug)]
pub struct WritePlan {
    pub(crate) shared: Arc<Shared>,
    pub(crate) kind: WriteKind,
    pub(crate) extents: Extents,
    pub(crate) work: Option<Box<Work>>,
    /// Its blocks were given back before it could be completed.
    pub(crate) abandoned: bool,
    pub(crate) _pin: Option<Pin>,
}

impl WritePlan {
    /// Whether [`crate::Volume::prepare_writes`] has to come before the data.
    pub fn needs_prepare(&self) -> bool {
        self.work.as_ref().is_some_and(|work| work.needs_prepare())
    }

    /// Whether the log or the journal needs room first, which only [`crate::Volume::prepare_writes`] can make.
    pub fn needs_room(&self) -> bool {
        self.work
            .as_ref()
            .is_some_and(|work| !work.prepared && work.needs_room())
    }

    /// Whether old data has to be durable before the new may move: after the copies comes
    /// [`crate::Volume::preserve`].
    pub fn needs_preserve(&self) -> bool {
        self.work
            .as_ref()
            .is_some_and(|work| !work.prepared && !work.preserves.is_empty())
    }

    /// What has to be copied into the log before [`crate::Volume::preserve`] or, where nothing is to be
    /// preserved, before the plan is completed. [`crate::Volume::prepare_writes`] does it; a caller that
    /// can do better moves the bytes itself and says so with [`WritePlan::copies_landed`]. No two copies
    /// overlap each other or the plan's own extents in the log.
    pub fn copies(&self) -> &[BlockCopy] {
        match &self.work {
            Some(work) if work.needs_copies() => &work.copies,
            Some(_) | None => &[],
        }
    }

    /// The checksum (CRC32C) of the bytes that copy number `place` wrote to the log.
    pub fn seal_copy(&mut self, place: usize, crc: u32) {
        if let Some(work) = self.work.as_mut()
            && let Some(run) = work.preserves.iter_mut().find(|run| run.place == place)
        {
            run.crc = Some(crc);
        }
    }

    /// The caller has written everything that [`WritePlan::copies`] named.
    pub fn copies_landed(&mut self) {
        if let Some(work) = self.work.as_mut() {
            work.copied = true;
            self.shared
                .gate
                .log_dirty
                .store(true, std::sync::atomic::Ordering::SeqCst);
        }
    }

    /// Parts of the request whose checksum makes its next flush cheaper. The bytes that are summed must be
    /// the very bytes that are written: guest memory may change meanwhile, so they are a private copy.
    pub fn seals(&self) -> &[SealPart] {
        self.work.as_ref().map_or(&[], |work| &work.seals)
    }

    /// The checksum (CRC32C) of part number `place` of [`WritePlan::seals`], before the plan is completed.
    pub fn seal(&mut self, place: usize, crc: u32) {
        if let Some(work) = self.work.as_mut()
            && let Some(run) = work.sealed_maps.get(place)
            && let Some(run) = work.maps.get_mut(*run)
        {
            run.crc = Some(crc);
        }
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
    /// Some of it would go in place, if the data there were confirmed.
    pub(crate) in_doubt: bool,
    /// First and last block of the request; steps of others preserve ahead.
    covers: (Block, Block),
}

/// Blocks that are preserved together when a second one of them is: what other copy-on-write stores copy at
/// the first. 64 KiB, aligned.
pub(crate) const NEIGHBOURHOOD_BLOCKS: u64 = 16;

/// Blocks that are preserved together when writing is dense all around: 1 MiB, aligned.
pub(crate) const DISTRICT_BLOCKS: u64 = 256;

/// So many neighbourhoods of a district have nothing left to preserve when writing in it counts as dense.
const DENSE_NEIGHBOURHOODS: usize = 4;

/// Whether a district of whose blocks these are the states is being written densely.
pub(crate) fn is_dense(states: &[BlockState]) -> bool {
    let is_through = |states: &&[BlockState]| {
        states.iter().any(|state| state.touched)
            && states
                .iter()
                .all(|state| state.touched || state.live != Location::Base)
    };
    let neighbourhoods = states.chunks(in_memory(NEIGHBOURHOOD_BLOCKS));
    neighbourhoods.filter(is_through).count() >= DENSE_NEIGHBOURHOODS
}

/// Decides every block of the request. `in_doubt` tells of a log block whether its bytes must not change yet.
pub(crate) fn outline(
    kind: WriteKind,
    range: ByteRange,
    size_bytes: u64,
    states: &[BlockState],
    method: Option<Method>,
    in_doubt: impl Fn(LogBlock) -> bool,
) -> Outline {
    let mut outline = Outline {
        steps: Vec::new(),
        log_blocks: 0,
        in_doubt: false,
        covers: (range.first_block(), range.last_block()),
    };
    let mut block = range.first_block();
    for state in states {
        let (from, to) = covered(range, block);
        let whole = from == 0 && to == (size_bytes - block.offset_bytes()).min(BLOCK_BYTES);
        let doubt = matches!(state.live, Location::Log(at) if in_doubt(at));
        let step = decide(kind, whole, *state, method, doubt);
        outline.in_doubt |= doubt;
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
    /// Where the neighbourhoods begin that the request covers a part of, if it preserves anything in them.
    pub(crate) fn neighbourhoods(&self) -> Vec<Block> {
        let start = |block: Block| Block(block.0 - block.0 % NEIGHBOURHOOD_BLOCKS);
        let preserves = |at: Block| {
            self.steps
                .iter()
                .any(|(step, block, _)| matches!(step, Step::Preserve(_)) && start(*block) == at)
        };
        let (first, last) = self.covers;
        let mut found = vec![start(first), start(last)];
        found.dedup();
        found.retain(|at| {
            let whole = first <= *at && at.plus(NEIGHBOURHOOD_BLOCKS - 1) <= last;
            !whole && preserves(*at)
        });
        found
    }

    /// Adds the untouched rest of a stretch that begins at `first`, of whose blocks these are the states, if a block
    /// of it was touched: writing goes on there. `is_free` tells whether no write in flight claims a block.
    pub(crate) fn preserve_ahead(
        &mut self,
        first: Block,
        states: &[BlockState],
        is_free: impl Fn(Block) -> bool,
    ) {
        if !states.iter().any(|state| state.touched) {
            return;
        }
        let planned = self.steps.len();
        for (place, state) in (0..).zip(states) {
            let block = first.plus(place);
            let has_step = self.steps[..planned]
                .binary_search_by_key(&block, |(_, block, _)| *block)
                .is_ok();
            if !has_step && !state.touched && state.live == Location::Base && is_free(block) {
                self.log_blocks += 1;
                self.steps
                    .push((Step::Preserve(state.live), block, state.live));
            }
        }
        self.steps.sort_by_key(|(_, block, _)| *block);
    }

    /// Takes back what [`Outline::preserve_ahead`] added; whether there was anything.
    pub(crate) fn forget_ahead(&mut self) -> bool {
        let (before, (first, last)) = (self.steps.len(), self.covers);
        self.steps
            .retain(|(_, block, _)| first <= *block && *block <= last);
        let gone = before - self.steps.len();
        self.log_blocks -= gone as u64;
        gone > 0
    }

    /// Neighbouring blocks in one piece: those whose steps are chosen.
    fn claimed(&self, is_chosen: impl Fn(&Step) -> bool) -> Vec<(u64, u64)> {
        let mut claimed: Vec<(u64, u64)> = Vec::new();
        for (_, block, _) in self.steps.iter().filter(|(step, _, _)| is_chosen(step)) {
            match claimed.last_mut() {
                Some((_, last)) if *last + 1 == block.0 => *last = block.0,
                Some(_) | None => claimed.push((block.0, block.0)),
            }
        }
        claimed
    }

    /// Gives the steps their places in the log. `runs` hold exactly the blocks asked for.
    pub(crate) fn place(
        &self,
        kind: WriteKind,
        range: ByteRange,
        size_bytes: u64,
        runs: &[LogRun],
    ) -> (Vec<Extent>, Work) {
        let mut extents = Vec::new();
        let mut work = Work {
            reserved: runs.to_vec(),
            moving: self
                .claimed(|step| matches!(step, Step::Redirect { .. } | Step::ToZero { .. })),
            preserving: self.claimed(|step| matches!(step, Step::Preserve(_))),
            ..Work::default()
        };
        let mut fresh = runs
            .iter()
            .flat_map(|run| (0..run.count).map(|place| run.start.plus(place)));
        for (step, block, live) in &self.steps {
            match step {
                Step::InPlace(at) => {
                    let (from, to) = covered(range, *block);
                    push_extent(&mut extents, *block, *at, from, to - from);
                }
                Step::Redirect { history } => {
                    let Some(new) = fresh.next() else { continue };
                    let (from, to) = covered(range, *block);
                    push_extent(&mut extents, *block, Location::Log(new), from, to - from);
                    let end = (size_bytes - block.offset_bytes()).min(BLOCK_BYTES);
                    let whole = from == 0 && to == end;
                    let old = history.then_some(*live);
                    push_map(&mut work.maps, *block, Location::Log(new), old, whole);
                    if let (Location::Log(old), false) = (*live, *history) {
                        push_log_block(&mut work.supersedes, old);
                    }
                    for (from, to) in [(0, from), (to, end)] {
                        push_copy(&mut work.copies, *block, *live, new, from, to);
                    }
                }
                Step::Preserve(old) => {
                    let Some(copy) = fresh.next() else { continue };
                    if self.covers.0 <= *block && *block <= self.covers.1 {
                        let (from, to) = covered(range, *block);
                        push_extent(&mut extents, *block, *old, from, to - from);
                    }
                    let length = (size_bytes - block.offset_bytes()).min(BLOCK_BYTES);
                    push_preserve(&mut work, *block, *old, copy, length);
                }
                Step::ToZero { history } => {
                    let old = history.then_some(*live);
                    push_map(&mut work.maps, *block, Location::Zero, old, false);
                }
                Step::Nothing => {}
            }
        }
        for (number, run) in work.maps.iter().enumerate() {
            if kind == WriteKind::Write && run.whole {
                let start = run.block.offset_bytes();
                let end = run.block.plus(run.count).offset_bytes().min(size_bytes);
                work.seals.push(SealPart {
                    offset_bytes: start - range.offset_bytes,
                    length_bytes: end - start,
                });
                work.sealed_maps.push(number);
            }
        }
        // Its own, one COMMIT behind PRESERVE, one behind MAP, one that confirms them.
        work.promised_records = (work.maps.len() + work.preserves.len()) as u64 + 3;
        (extents, work)
    }
}

fn push_log_block(runs: &mut Vec<LogRun>, block: LogBlock) {
    match runs.last_mut() {
        Some(last) if last.start.plus(last.count) == block => last.count += 1,
        Some(_) | None => runs.push(LogRun {
            start: block,
            count: 1,
        }),
    }
}

/// Whether `next` is where a run of `count` blocks that lived at `first` and on goes on.
pub(crate) fn follows(first: Option<Location>, count: u64, next: Option<Location>) -> bool {
    first.map(|first| first.plus(count)) == next
}

fn push_map(
    maps: &mut Vec<MapRun>,
    block: Block,
    location: Location,
    old: Option<Location>,
    whole: bool,
) {
    if let Some(last) = maps.last_mut()
        && follows(last.old, last.count, old)
        && last.whole == whole
        && (!whole || last.count < u64::from(MAX_SEALED_BLOCKS))
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
        old,
        whole,
        crc: None,
    });
}

/// Bytes `from..to` of a redirected block come from its old version.
fn push_copy(
    copies: &mut Vec<BlockCopy>,
    block: Block,
    old: Location,
    new: LogBlock,
    from: u64,
    to: u64,
) {
    if from < to {
        copies.push(BlockCopy {
            from: extent_at(block, old, from, to - from),
            to_offset_bytes: new.offset_bytes() + from,
            wants_seal: false,
        });
    }
}

/// `length` bytes of an old block are preserved: one copy and one record for up to 16 neighbours.
fn push_preserve(work: &mut Work, block: Block, old: Location, copy: LogBlock, length: u64) {
    let from = extent_at(block, old, 0, length);
    if let Some(last) = work.preserves.last_mut()
        && let Some(bytes) = work.copies.get_mut(last.place)
        && last.count < u64::from(MAX_SEALED_BLOCKS)
        && last.block.plus(last.count) == block
        && last.copy.plus(last.count) == copy
        && bytes.from.source == from.source
        && bytes.from.offset_bytes + bytes.from.length_bytes == from.offset_bytes
    {
        last.count += 1;
        bytes.from.length_bytes += length;
        return;
    }
    work.preserves.push(PreserveRun {
        block,
        count: 1,
        copy,
        place: work.copies.len(),
        crc: None,
    });
    work.copies.push(BlockCopy {
        from,
        to_offset_bytes: copy.offset_bytes(),
        wants_seal: true,
    });
}
