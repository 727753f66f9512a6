//! What the model, crash and failure tests share: operations, a plain model of a volume, and the code
//! that applies the one to the other.
//!
//! A sector is one number in the model: what is written repeats that number through the sector, so that
//! a torn sector, or one of foreign data, shows at once. 0 is a sector of zeroes.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]
#![allow(clippy::cast_possible_truncation, reason = "volumes of a few blocks")]

pub mod crash;
mod in_flight;

use in_flight::move_extents;
pub use in_flight::{Flight, OpenPlan, Stage};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use uuid::Uuid;
use vhost_blk_store::sim::memory_volume;
use vhost_blk_store::{
    BootId, ByteRange, LeaveOut, Maintenance, Method, NewSnapshot, OpenOptions, SnapshotId,
    StoreError, View, Volume, VolumeFiles, VolumeId, WriteKind,
};

pub const SECTOR: u64 = 512;
/// Bytes of each of the two journals of [`small_options`].
pub const JOURNAL_REGION: u64 = 32 << 10;
/// Sectors from which on no history grows its volume any more.
const GROWN_SECTORS: u64 = 220;

#[derive(Clone, Debug)]
pub enum Op {
    Write {
        sector: u64,
        count: u64,
    },
    /// Several writes planned, prepared and completed together; with checksums or without.
    Batch {
        writes: Vec<(u64, u64)>,
        seals: bool,
    },
    /// A snapshot whose contents are fixed, and which is made durable by a later flush.
    BeginSnapshot {
        method: Method,
    },
    Zero {
        sector: u64,
        count: u64,
        may_unmap: bool,
    },
    Discard {
        sector: u64,
        count: u64,
    },
    Flush,
    /// The newest snapshot need not keep these, of whole blocks.
    LeaveOut {
        sector: u64,
        count: u64,
    },
    Snapshot {
        method: Method,
        verdict: Verdict,
    },
    Delete {
        which: u64,
    },
    Revert {
        which: u64,
    },
    Maintain {
        steps: u64,
        budget: u64,
    },
    /// The volume gets so many sectors more. In two steps, the first of them while writes may be in flight, or in one.
    Grow {
        by: u64,
        prepared: bool,
    },
    /// A growth that goes no further than its first step.
    PrepareGrow {
        by: u64,
    },
    /// A write that is left in flight; `zero` says whether it zeroes, and may unmap.
    Begin {
        sector: u64,
        count: u64,
        zero: Option<bool>,
        stage: Stage,
        /// Whether the caller makes checksums of what it moves.
        seals: bool,
    },
    /// All writes in flight are prepared together.
    Prepare,
    /// One write in flight is completed, or given up.
    Finish {
        which: u64,
        complete: bool,
    },
    CloseReopen,
    KillReopen,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Keep,
    Discard,
    Leave,
}

/// A snapshot in the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    pub id: SnapshotId,
    pub sectors: Vec<u64>,
}

/// The plain truth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    pub head: Vec<u64>,
    /// What each sector may hold besides `head` after a power cut: the flushed value and all written since.
    pub possible: Vec<Vec<u64>>,
    /// Writes in flight: their sectors may hold the new value already.
    pub in_flight: Vec<Flight>,
    pub snapshots: Vec<Taken>,
    /// Snapshots that no flush has made durable yet: a power cut may take the last ones of them.
    pub begun: Vec<SnapshotId>,
    /// What the last snapshot saw, kept or not.
    pub last_taken: Option<Taken>,
    pub next_value: u64,
    pub next_id: u128,
}

impl Model {
    pub fn new(sectors: u64) -> Model {
        let head: Vec<u64> = (0..sectors).map(|sector| 1_000_000 + sector).collect();
        Model {
            possible: vec![Vec::new(); head.len()],
            head,
            in_flight: Vec::new(),
            snapshots: Vec::new(),
            begun: Vec::new(),
            last_taken: None,
            next_value: 1,
            next_id: 1,
        }
    }

    pub fn sectors(&self) -> u64 {
        self.head.len() as u64
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.head
            .iter()
            .flat_map(|value| sector_bytes(*value))
            .collect()
    }

    fn set(&mut self, sector: u64, value: u64) {
        let sector = sector as usize;
        let old = self.head[sector];
        if old != value {
            self.possible[sector].push(old);
            self.head[sector] = value;
        }
    }

    /// Sectors that are new hold zeroes; what is behind the end is gone.
    pub fn resize(&mut self, sectors: usize) {
        self.head.resize(sectors, 0);
        self.possible.resize(sectors, Vec::new());
    }

    pub fn flushed(&mut self) {
        self.possible.iter_mut().for_each(Vec::clear);
        self.begun.clear();
    }

    pub fn fresh_id(&mut self) -> Uuid {
        self.next_id += 1;
        Uuid::from_u128(self.next_id)
    }

    /// Clips a request to the volume.
    pub fn clip(&self, sector: u64, count: u64) -> (u64, u64) {
        let sector = sector % self.sectors();
        (sector, count.clamp(1, self.sectors() - sector))
    }
}

pub fn sector_bytes(value: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    bytes
        .chunks_exact_mut(8)
        .for_each(|part| part.copy_from_slice(&value.to_le_bytes()));
    bytes
}

/// The number in a sector; `None` if it is torn.
pub fn sector_value(bytes: &[u8]) -> Option<u64> {
    let first = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    bytes
        .chunks_exact(8)
        .all(|part| u64::from_le_bytes(part.try_into().unwrap()) == first)
        .then_some(first)
}

pub fn try_read_all(volume: &Volume, view: View) -> Result<Vec<Option<u64>>, StoreError> {
    let size_bytes = match view {
        View::Head => volume.size_bytes(),
        View::Snapshot(id) => volume
            .snapshot(id)
            .map_or(512, |snapshot| snapshot.size_bytes),
    };
    let mut bytes = vec![0; size_bytes as usize];
    volume.read_at(view, 0, &mut bytes)?;
    Ok(bytes.chunks_exact(512).map(sector_value).collect())
}

pub fn read_all(volume: &Volume, view: View) -> Vec<Option<u64>> {
    try_read_all(volume, view).unwrap()
}

/// Options that make every threshold small, so that short histories reach everything.
pub fn small_options(boot: u8) -> OpenOptions {
    OpenOptions {
        direct: false,
        boot_id: Some(BootId([boot; 16])),
        volume_id: Some(VolumeId(Uuid::from_u128(0xfeed))),
        segment_bytes: 8 * 4096,
        memtable_records: 24,
        journal_bytes: 40 * 64,
        journal_region_bytes: JOURNAL_REGION,
        cache_pages: 2,
        journal_prewritten_bytes: 0,
        ..OpenOptions::default()
    }
}

pub fn memory_files(base: Vec<u8>) -> VolumeFiles {
    memory_volume(vec![base.into()])
}

/// A volume and its model.
pub struct World {
    pub files: VolumeFiles,
    pub options: OpenOptions,
    pub volume: Option<Volume>,
    /// As `model.in_flight`.
    pub open_plans: Vec<OpenPlan>,
    pub model: Model,
    pub members: Vec<VolumeId>,
}

impl World {
    pub fn new(files: VolumeFiles, options: OpenOptions, model: Model) -> World {
        let (volume, report) = Volume::open_files(files.clone(), &options).unwrap();
        assert!(report.created);
        World::around(volume, files, options, model)
    }

    /// A volume that may be there already.
    pub fn open(files: VolumeFiles, options: OpenOptions, model: Model) -> World {
        let (volume, _) = Volume::open_files(files.clone(), &options).unwrap();
        World::around(volume, files, options, model)
    }

    /// A volume that is open, and what it holds.
    pub fn around(volume: Volume, files: VolumeFiles, options: OpenOptions, model: Model) -> World {
        let members = vec![volume.id()];
        World {
            files,
            options,
            volume: Some(volume),
            open_plans: Vec::new(),
            model,
            members,
        }
    }

    /// Deletes all snapshots: everything finds its way home, the log is empty and the base alone is the disk.
    pub fn settle_everything(&mut self, seed: u64) {
        self.finish_all().unwrap();
        let mut which = seed;
        while !self.model.snapshots.is_empty() {
            which = which.rotate_left(7).wrapping_add(1);
            self.apply(&Op::Delete { which });
        }
        let mut steps = 0;
        while self.volume().maintain(8).unwrap() == Maintenance::More {
            steps += 1;
            assert!(steps < 10_000, "maintenance does not end");
        }
        self.compare();
        assert!(self.volume().is_plain(), "{:?}", self.volume().status());
        assert_eq!(self.volume().status().log_used_bytes, 0);
        // Where a growth went no further than its first step, closing takes it back.
        self.apply(&Op::CloseReopen);
        assert!(self.volume().is_plain());
        let length_bytes = self.files.base.len_bytes().unwrap();
        assert_eq!(length_bytes, self.model.sectors() * SECTOR);
        let mut base = vec![0; self.model.head.len() * 512];
        self.files.base.read_at(&mut base, 0).unwrap();
        assert!(base == self.model.bytes(), "the base is not the disk");
    }

    pub fn volume(&self) -> &Volume {
        self.volume.as_ref().unwrap()
    }

    /// Applies an operation to both sides. Errors other than a full log end the test.
    pub fn apply(&mut self, op: &Op) {
        match self.try_apply(op) {
            Ok(()) => {}
            Err(error) => panic!("{op:?}: {error:?}"),
        }
    }

    pub fn try_apply(&mut self, op: &Op) -> Result<(), StoreError> {
        if matches!(
            op,
            Op::Snapshot { .. }
                | Op::BeginSnapshot { .. }
                | Op::Revert { .. }
                | Op::Grow { .. }
                | Op::CloseReopen
        ) {
            if let Op::Grow { by, prepared: true } = op
                && self.model.sectors() < GROWN_SECTORS
            {
                let wanted = (self.model.sectors() + by) * SECTOR;
                self.volume().prepare_grow(wanted)?;
            }
            if !self.open_plans.is_empty() && !matches!(op, Op::CloseReopen) {
                let id = self.model.fresh_id();
                let refused = self.volume().take_snapshot(NewSnapshot {
                    snapshot_id: id.into(),
                    set_id: id.into(),
                    members: self.members.clone(),
                    method: Method::RedirectOnWrite,
                    created_unix_ms: 0,
                });
                assert!(
                    matches!(refused, Err(StoreError::Busy | StoreError::Poisoned)),
                    "{refused:?}"
                );
            }
            self.finish_all()?;
        }
        let touched = match op {
            Op::Write { sector, count }
            | Op::Zero { sector, count, .. }
            | Op::Discard { sector, count } => Some(self.model.clip(*sector, *count)),
            Op::Batch { .. }
            | Op::BeginSnapshot { .. }
            | Op::Flush
            | Op::LeaveOut { .. }
            | Op::Snapshot { .. }
            | Op::Delete { .. }
            | Op::Revert { .. }
            | Op::Maintain { .. }
            | Op::Grow { .. }
            | Op::PrepareGrow { .. }
            | Op::Begin { .. }
            | Op::Prepare
            | Op::Finish { .. }
            | Op::CloseReopen
            | Op::KillReopen => None,
        };
        let Some((sector, count)) = touched else {
            return self.try_operation(op);
        };
        if !self.model.is_free(sector, count) {
            return Ok(());
        }
        // Another part of a block that is on the move: not now.
        let before = (!self.model.in_flight.is_empty()).then(|| self.model.clone());
        match (self.try_operation(op), before) {
            (Err(StoreError::Overlaps), Some(before)) => {
                self.model = before;
                Ok(())
            }
            (result, _) => result,
        }
    }

    fn try_operation(&mut self, op: &Op) -> Result<(), StoreError> {
        let Some(volume) = self.volume.as_ref() else {
            panic!("no volume")
        };
        match op {
            Op::Write { sector, count } => {
                let (sector, count) = self.model.clip(*sector, *count);
                let data = note_write(&mut self.model, sector, count);
                volume.write_at(sector * SECTOR, &data)?;
            }
            Op::Batch { writes, seals } => batch(volume, &mut self.model, writes, *seals)?,
            Op::Zero {
                sector,
                count,
                may_unmap,
            } => {
                let (sector, count) = self.model.clip(*sector, *count);
                (sector..sector + count).for_each(|sector| self.model.set(sector, 0));
                let range = ByteRange::new(sector * SECTOR, count * SECTOR);
                volume.write_zeroes_at(range, *may_unmap)?;
            }
            Op::Discard { sector, count } => {
                let (sector, count) = self.model.clip(*sector, *count);
                // It may zero what it likes of the range: both are possible, then one is true.
                for place in sector..sector + count {
                    self.model.possible[place as usize].push(0);
                }
                volume.discard_at(ByteRange::new(sector * SECTOR, count * SECTOR))?;
                let now = try_read_all(volume, View::Head)?;
                for place in sector..sector + count {
                    let value = now[place as usize];
                    let old = self.model.head[place as usize];
                    assert!(
                        value == Some(old) || value == Some(0),
                        "discard of sector {place}"
                    );
                    self.model.set(place, value.unwrap());
                }
            }
            Op::Flush => {
                volume.flush()?;
                self.model.flushed();
            }
            Op::LeaveOut { sector, count } => {
                if let Some(newest) = self.model.snapshots.last_mut() {
                    leave_out(volume, newest, *sector, *count)?;
                }
            }
            Op::Snapshot { method, verdict } => {
                let (id, set_id) = (self.model.fresh_id(), self.model.fresh_id());
                volume.prepare_snapshot()?;
                volume.take_snapshot(NewSnapshot {
                    snapshot_id: id.into(),
                    set_id: set_id.into(),
                    members: self.members.clone(),
                    method: *method,
                    created_unix_ms: 7,
                })?;
                self.model.flushed();
                let taken = Taken {
                    id: id.into(),
                    sectors: self.model.head.clone(),
                };
                self.model.last_taken = Some(taken.clone());
                self.model.snapshots.push(taken);
                match verdict {
                    Verdict::Keep => volume.keep_set(set_id.into())?,
                    Verdict::Leave => {}
                    Verdict::Discard => {
                        volume.discard_set(set_id.into())?;
                        self.model.snapshots.pop();
                    }
                }
            }
            Op::BeginSnapshot { method } => {
                let (id, set_id) = (self.model.fresh_id(), self.model.fresh_id());
                volume.begin_snapshot(NewSnapshot {
                    snapshot_id: id.into(),
                    set_id: set_id.into(),
                    members: self.members.clone(),
                    method: *method,
                    created_unix_ms: 7,
                })?;
                let taken = Taken {
                    id: id.into(),
                    sectors: self.model.head.clone(),
                };
                self.model.last_taken = Some(taken.clone());
                self.model.begun.push(taken.id);
                self.model.snapshots.push(taken);
            }
            Op::Delete { which } => {
                if let Some(place) = pick(*which, self.model.snapshots.len()) {
                    volume.delete_snapshot(self.model.snapshots[place].id)?;
                    let gone = self.model.snapshots.remove(place);
                    self.model.begun.retain(|id| *id != gone.id);
                }
            }
            Op::Revert { which } => {
                if let Some(place) = pick(*which, self.model.snapshots.len()) {
                    volume.revert(self.model.snapshots[place].id)?;
                    self.model.snapshots.truncate(place + 1);
                    let sectors = self.model.snapshots[place].sectors.clone();
                    self.model.resize(sectors.len());
                    self.model.head = sectors;
                    self.model.flushed();
                }
            }
            Op::Maintain { steps, budget } => {
                for _ in 0..*steps {
                    if volume.maintain(*budget)? == Maintenance::Idle {
                        break;
                    }
                }
            }
            Op::Grow { by, prepared: _ } => {
                let wanted = self.model.sectors() + by;
                if self.model.sectors() < GROWN_SECTORS {
                    volume.grow(wanted * SECTOR)?;
                    self.model.resize(wanted as usize);
                }
            }
            Op::PrepareGrow { by } => {
                if self.model.sectors() < GROWN_SECTORS {
                    volume.prepare_grow((self.model.sectors() + by) * SECTOR)?;
                }
            }
            Op::Begin {
                sector,
                count,
                zero,
                stage,
                seals,
            } => self.begin(*sector, *count, *zero, *stage, *seals)?,
            Op::Prepare => self.prepare_all()?,
            Op::Finish { which, complete } => self.finish(*which, *complete)?,
            Op::CloseReopen => {
                self.volume.take().unwrap().close()?;
                self.model.flushed();
                self.reopen()?;
            }
            Op::KillReopen => {
                self.volume = None;
                self.reopen()?;
            }
        }
        Ok(())
    }

    pub fn reopen(&mut self) -> Result<(), StoreError> {
        let (volume, report) = Volume::open_files(self.files.clone(), &self.options)?;
        assert!(!report.created);
        assert_eq!(
            report.dropped_records, 0,
            "nothing may be dropped without a power cut"
        );
        self.volume = Some(volume);
        self.forget_flights()
    }

    /// The volume is exactly the model.
    pub fn compare(&self) {
        let volume = self.volume();
        assert_eq!(volume.size_bytes(), self.model.sectors() * SECTOR);
        let head: Vec<u64> = read_all(volume, View::Head)
            .into_iter()
            .zip(&self.model.head)
            .enumerate()
            .map(|(sector, (found, expected))| {
                let found = found.unwrap_or_else(|| panic!("head: sector {sector} is torn"));
                let flies = found != *expected && self.model.flies(sector, found);
                if flies { *expected } else { found }
            })
            .collect();
        assert_eq!(self.model.head, head, "head");
        let ids: Vec<SnapshotId> = volume.snapshots().iter().map(|s| s.snapshot_id).collect();
        let expected: Vec<SnapshotId> = self.model.snapshots.iter().map(|s| s.id).collect();
        assert_eq!(ids, expected);
        for taken in &self.model.snapshots {
            let view = View::Snapshot(taken.id);
            expect(
                &taken.sectors,
                &read_all(volume, view),
                &format!("snapshot {}", taken.id),
            );
        }
    }
}

pub fn expect(expected: &[u64], found: &[Option<u64>], what: &str) {
    assert_eq!(expected.len(), found.len(), "{what}: its size in sectors");
    for (sector, (expected, found)) in expected.iter().zip(found).enumerate() {
        assert_eq!(Some(*expected), *found, "{what}, sector {sector}");
    }
}

pub fn pick(which: u64, length: usize) -> Option<usize> {
    (length > 0).then(|| (which % length as u64) as usize)
}

/// Gives every sector a new value in the model; the bytes that write it.
fn note_write(model: &mut Model, sector: u64, count: u64) -> Vec<u8> {
    let mut data = Vec::new();
    for sector in sector..sector + count {
        let value = model.next_value;
        model.next_value += 1;
        model.set(sector, value);
        data.extend_from_slice(&sector_bytes(value));
    }
    data
}

fn leave_out(
    volume: &Volume,
    newest: &mut Taken,
    sector: u64,
    count: u64,
) -> Result<(), StoreError> {
    let mut wanted = LeaveOut::new(&[ByteRange::new(sector * SECTOR, count * SECTOR)]);
    while volume.leave_out(newest.id, &mut wanted)? {}
    let changed = note_left_out(volume, newest, sector, count)?;
    assert!(changed * 4096 <= wanted.left_out_bytes(), "{wanted:?}");
    Ok(())
}

/// What is left out is zeroes, in whole blocks within the range: which of them is the store's choice. How many are.
pub fn note_left_out(
    volume: &Volume,
    newest: &mut Taken,
    sector: u64,
    count: u64,
) -> Result<u64, StoreError> {
    let seen = try_read_all(volume, View::Snapshot(newest.id))?;
    let mut changed = 0;
    let blocks = newest.sectors.chunks_mut(8).zip(seen.chunks(8));
    for (first, (old, new)) in (0..).step_by(8).zip(blocks) {
        // The last one may be short; it is whole if the range goes on to where it would end.
        let is_whole = sector <= first && first + 8 <= sector + count;
        let is_zero = new.iter().all(|value| *value == Some(0));
        if is_whole && is_zero && old.iter().any(|value| *value != 0) {
            old.fill(0);
            changed += 1;
        }
    }
    Ok(changed)
}

/// What an engine does with many requests at once: plan all, prepare all, move all, complete all.
fn batch(
    volume: &Volume,
    model: &mut Model,
    writes: &[(u64, u64)],
    seals: bool,
) -> Result<(), StoreError> {
    let (mut plans, mut data) = (Vec::new(), Vec::new());
    for (sector, count) in writes {
        let (sector, count) = model.clip(*sector, *count);
        if !model.is_free(sector, count) {
            continue;
        }
        let range = ByteRange::new(sector * SECTOR, count * SECTOR);
        match volume.plan_write(range, WriteKind::Write) {
            Ok(plan) => {
                plans.push(plan);
                data.push(note_write(model, sector, count));
            }
            Err(StoreError::Overlaps) => {}
            Err(error) => return Err(error),
        }
    }
    volume.prepare_writes(&mut plans)?;
    for (plan, data) in plans.iter_mut().zip(&data) {
        move_extents(volume, plan, data, 0..plan.extents().len())?;
        if seals {
            in_flight::seal(plan, data);
        }
    }
    plans.reverse();
    volume.complete_writes(plans)
}

/// Which methods a history takes snapshots with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Methods {
    Redirect,
    Copy,
    Mixed,
}

/// A random history of `length` operations.
pub fn history(seed: u64, methods: Methods, length: usize, sectors: u64) -> Vec<Op> {
    let mut random = SmallRng::seed_from_u64(seed);
    (0..length)
        .map(|_| random_op(&mut random, methods, sectors))
        .collect()
}

fn random_method(random: &mut SmallRng, methods: Methods) -> Method {
    match methods {
        Methods::Redirect => Method::RedirectOnWrite,
        Methods::Copy => Method::CopyOnWrite,
        Methods::Mixed if random.random() => Method::RedirectOnWrite,
        Methods::Mixed => Method::CopyOnWrite,
    }
}

fn random_op(random: &mut SmallRng, methods: Methods, sectors: u64) -> Op {
    // Volumes grow by about a half: as long as they have not, what is behind the end is taken from the start on.
    let sector = random.random_range(0..sectors + sectors / 2);
    // Mostly whole or nearly whole blocks, some single sectors.
    let count = match random.random_range(0..4) {
        0 => random.random_range(1..8),
        1 => 8,
        2 => random.random_range(1..40),
        _ => 16,
    };
    let sector = if random.random_bool(0.5) {
        sector / 8 * 8
    } else {
        sector
    };
    match random.random_range(0..100) {
        0..26 => Op::Write { sector, count },
        26..31 => Op::Begin {
            sector,
            count,
            zero: random.random_bool(0.2).then(|| random.random()),
            stage: match random.random_range(0..6) {
                0 => Stage::Planned,
                1 => Stage::Copied,
                2 => Stage::Prepared,
                3 => Stage::HalfMoved,
                _ => Stage::Moved,
            },
            seals: random.random_bool(0.7),
        },
        31..35 => Op::Finish {
            which: random.random_range(0..4),
            complete: random.random_bool(0.8),
        },
        35..36 => Op::Prepare,
        36..40 => {
            let writes = random.random_range(2..5);
            Op::Batch {
                writes: (0..writes)
                    .map(|_| (random.random_range(0..sectors), random.random_range(1..20)))
                    .collect(),
                seals: random.random_bool(0.7),
            }
        }
        40..47 => Op::Zero {
            sector,
            count,
            may_unmap: random.random(),
        },
        47..53 => Op::Discard { sector, count },
        53..60 => Op::Flush,
        60..63 => Op::LeaveOut { sector, count },
        63..66 => Op::BeginSnapshot {
            method: random_method(random, methods),
        },
        66..75 => Op::Snapshot {
            method: random_method(random, methods),
            verdict: match random.random_range(0..6) {
                0 => Verdict::Discard,
                1 | 2 => Verdict::Leave,
                _ => Verdict::Keep,
            },
        },
        75..81 => Op::Delete {
            which: random.random_range(0..8),
        },
        81..84 => Op::Revert {
            which: random.random_range(0..8),
        },
        84..86 => Op::Grow {
            by: random.random_range(1..24),
            prepared: random.random(),
        },
        86..87 => Op::PrepareGrow {
            by: random.random_range(1..24),
        },
        87..95 => Op::Maintain {
            steps: random.random_range(1..30),
            budget: random.random_range(1..12),
        },
        95..97 => Op::CloseReopen,
        _ => Op::KillReopen,
    }
}

/// Tells which case failed, so that it can be tried again.
pub struct Tale(pub String);

impl Drop for Tale {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}
