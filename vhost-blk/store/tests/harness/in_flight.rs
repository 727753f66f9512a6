//! Writes in flight: planned, prepared, moved in part or wholly, and neither completed nor given up, while
//! other operations go on. What their sectors hold meanwhile is the old or the new, each for itself.

use vhost_blk_store::{
    BlockFile, ByteRange, DataFile, Extent, FileName, Source, StoreError, View, Volume, WriteKind,
    WritePlan,
};

use super::{Model, SECTOR, World, pick, sector_bytes, try_read_all};

/// How far a write in flight has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Planned,
    /// Room was made and the copies were moved, by the caller; what they preserve is not durable.
    Copied,
    Prepared,
    /// Some of its extents were written.
    HalfMoved,
    Moved,
}

/// A write in flight, as the model knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flight {
    pub sector: u64,
    /// What it writes, one number for each sector.
    pub values: Vec<u64>,
}

impl Flight {
    fn sectors(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        (self.sector..).zip(self.values.iter().copied())
    }
}

/// A write in flight, as the volume knows it.
#[derive(Debug)]
pub struct OpenPlan {
    plan: WritePlan,
    stage: Stage,
    moved_extents: usize,
    /// Whether the caller makes checksums.
    seals: bool,
}

impl Model {
    /// Whether no write in flight touches the sectors.
    pub fn is_free(&self, sector: u64, count: u64) -> bool {
        !self.in_flight.iter().any(|flight| {
            flight.sector < sector + count && sector < flight.sector + flight.values.len() as u64
        })
    }

    /// Whether a write in flight may have put `value` there.
    pub fn flies(&self, sector: usize, value: u64) -> bool {
        self.in_flight.iter().any(|flight| {
            flight
                .sectors()
                .any(|(at, new)| at as usize == sector && new == value)
        })
    }
}

fn file<'a>(volume: &'a Volume, extent: &Extent) -> &'a dyn BlockFile {
    match extent.source {
        Source::Base => &**volume.data_file(DataFile::Base),
        Source::Log | Source::Zero => &**volume.data_file(DataFile::Log),
    }
}

pub fn io_error(extent: &Extent, source: std::io::Error) -> StoreError {
    StoreError::Io {
        op: "write",
        file: FileName::Log,
        offset_bytes: extent.offset_bytes,
        source,
    }
}

/// Writes extents `from..to` of a plan; `data` of a plain write begins with the first of all extents.
pub fn move_extents(
    volume: &Volume,
    plan: &WritePlan,
    data: &[u8],
    extents: std::ops::Range<usize>,
) -> Result<(), StoreError> {
    let mut at = 0;
    for (number, extent) in plan.extents().iter().enumerate() {
        let length = extent.length_bytes as usize;
        if extents.contains(&number) {
            let file = file(volume, extent);
            match plan.kind() {
                WriteKind::Write => file.write_at(&data[at..at + length], extent.offset_bytes),
                WriteKind::WriteZeroes { .. } | WriteKind::Discard => {
                    file.write_zeroes(extent.offset_bytes, extent.length_bytes, false)
                }
            }
            .map_err(|source| io_error(extent, source))?;
        }
        at += length;
    }
    Ok(())
}

/// Moves a plan's copies as an engine with a ring does, with checksums or without.
fn copy_old(volume: &Volume, plan: &mut WritePlan, seals: bool) -> Result<(), StoreError> {
    for (place, copy) in plan.copies().to_vec().iter().enumerate() {
        let mut bytes = vec![0; copy.from.length_bytes as usize];
        if copy.from.source != Source::Zero {
            file(volume, &copy.from)
                .read_at(&mut bytes, copy.from.offset_bytes)
                .map_err(|source| io_error(&copy.from, source))?;
        }
        volume
            .data_file(DataFile::Log)
            .write_at(&bytes, copy.to_offset_bytes)
            .map_err(|source| io_error(&copy.from, source))?;
        if copy.wants_seal && seals {
            plan.seal_copy(place, crc32c::crc32c(&bytes));
        }
    }
    plan.copies_landed();
    Ok(())
}

/// Gives a plan the checksums it asks for. `data` are the bytes that were written.
pub fn seal(plan: &mut WritePlan, data: &[u8]) {
    for (place, part) in plan.seals().to_vec().iter().enumerate() {
        let start = part.offset_bytes as usize;
        let end = start + part.length_bytes as usize;
        plan.seal(place, crc32c::crc32c(&data[start..end]));
    }
}

impl World {
    /// Plans a write and takes it to `stage`.
    pub fn begin(
        &mut self,
        sector: u64,
        count: u64,
        zero: Option<bool>,
        stage: Stage,
        seals: bool,
    ) -> Result<(), StoreError> {
        let (sector, count) = self.model.clip(sector, count);
        if self.open_plans.len() >= 4 || !self.model.is_free(sector, count) {
            return Ok(());
        }
        let range = ByteRange::new(sector * SECTOR, count * SECTOR);
        let kind = zero.map_or(WriteKind::Write, |may_unmap| WriteKind::WriteZeroes {
            may_unmap,
        });
        let plan = match self.volume().plan_write(range, kind) {
            Ok(plan) => plan,
            Err(StoreError::Overlaps) => return Ok(()),
            Err(error) => return Err(error),
        };
        let values = (0..count)
            .map(|place| {
                if zero.is_some() {
                    0
                } else {
                    self.model.next_value + place
                }
            })
            .collect();
        self.model.next_value += count;
        self.model.in_flight.push(Flight { sector, values });
        self.open_plans.push(OpenPlan {
            plan,
            stage: Stage::Planned,
            moved_extents: 0,
            seals,
        });
        let place = self.open_plans.len() - 1;
        let result = self.advance(place, stage);
        if result.is_err() {
            self.give_up(place)?;
        }
        result
    }

    fn advance(&mut self, place: usize, stage: Stage) -> Result<(), StoreError> {
        let volume = self.volume.as_ref().unwrap();
        let open = &mut self.open_plans[place];
        if open.stage < Stage::Copied && stage >= Stage::Copied && !open.plan.needs_room() {
            copy_old(volume, &mut open.plan, open.seals)?;
            open.stage = Stage::Copied;
        }
        if open.stage < Stage::Prepared && stage >= Stage::Prepared {
            let plans = std::slice::from_mut(&mut open.plan);
            if open.stage == Stage::Copied {
                volume.preserve(plans)?;
            } else {
                volume.prepare_writes(plans)?;
            }
            open.stage = Stage::Prepared;
        }
        let extents = open.plan.extents().len();
        let end = match stage {
            Stage::Planned | Stage::Copied | Stage::Prepared => 0,
            Stage::HalfMoved => extents.div_ceil(2),
            Stage::Moved => extents,
        };
        if end > open.moved_extents {
            let data: Vec<u8> = self.model.in_flight[place]
                .values
                .iter()
                .flat_map(|value| sector_bytes(*value))
                .collect();
            move_extents(volume, &open.plan, &data, open.moved_extents..end)?;
            open.moved_extents = end;
        }
        if stage != Stage::Copied {
            open.stage = open.stage.max(stage);
        }
        Ok(())
    }

    /// Prepares all writes in flight together, as an engine does.
    pub fn prepare_all(&mut self) -> Result<(), StoreError> {
        let volume = self.volume.as_ref().unwrap();
        let (mut plans, mut waiting) = (Vec::new(), Vec::new());
        let mut opened: Vec<Option<OpenPlan>> = Vec::new();
        let copied = self
            .open_plans
            .iter()
            .any(|open| open.stage == Stage::Copied);
        for mut open in self.open_plans.drain(..) {
            // Copied ones go together, and so do those for which the store has to copy.
            let due = if copied {
                Stage::Copied
            } else {
                Stage::Planned
            };
            if open.stage == due {
                open.stage = Stage::Prepared;
                waiting.push((opened.len(), open.seals));
                plans.push(open.plan);
                opened.push(None);
            } else {
                opened.push(Some(open));
            }
        }
        let result = if copied {
            volume.preserve(&mut plans)
        } else {
            volume.prepare_writes(&mut plans)
        };
        for ((place, seals), plan) in waiting.into_iter().zip(plans) {
            opened[place] = Some(OpenPlan {
                plan,
                stage: Stage::Prepared,
                moved_extents: 0,
                seals,
            });
        }
        self.open_plans = opened.into_iter().flatten().collect();
        if result.is_err() {
            // None of them may go on.
            while !self.open_plans.is_empty() {
                self.give_up(0)?;
            }
        }
        result
    }

    /// Completes one of the writes in flight, or gives it up.
    pub fn finish(&mut self, which: u64, complete: bool) -> Result<(), StoreError> {
        let Some(place) = pick(which, self.open_plans.len()) else {
            return Ok(());
        };
        if !complete {
            return self.give_up(place);
        }
        if let Err(error) = self.advance(place, Stage::Moved) {
            self.give_up(place)?;
            return Err(error);
        }
        // With it all others whose data landed: one append for all of them.
        let landed: Vec<usize> = (0..self.open_plans.len())
            .rev()
            .filter(|at| *at == place || (which > 1 && self.open_plans[*at].stage == Stage::Moved))
            .collect();
        let (mut plans, mut flights) = (Vec::new(), Vec::new());
        for at in landed {
            let mut open = self.open_plans.remove(at);
            let flight = self.model.in_flight.remove(at);
            if open.seals {
                let bytes = flight.values.iter().flat_map(|value| sector_bytes(*value));
                seal(&mut open.plan, &bytes.collect::<Vec<u8>>());
            }
            plans.push(open.plan);
            flights.push(flight);
        }
        let result = self.volume().complete_writes(plans);
        for (sector, value) in flights.iter().flat_map(Flight::sectors) {
            if result.is_ok() {
                self.model.set(sector, value);
            } else {
                self.model.possible[sector as usize].push(value);
            }
        }
        result
    }

    /// A write that failed: each of its sectors is the old or the new one from now on.
    fn give_up(&mut self, place: usize) -> Result<(), StoreError> {
        drop(self.open_plans.remove(place));
        let flight = self.model.in_flight.remove(place);
        let now = try_read_all(self.volume(), View::Head)?;
        self.land(&flight, &now);
        Ok(())
    }

    fn land(&mut self, flight: &Flight, now: &[Option<u64>]) {
        for (sector, new) in flight.sectors() {
            let found = now[sector as usize];
            let old = self.model.head[sector as usize];
            assert!(
                found == Some(old) || found == Some(new),
                "sector {sector} holds {found:?} after a write of {new} over {old} was given up"
            );
            self.model.possible[sector as usize].push(new);
            self.model.set(sector, found.unwrap());
        }
    }

    /// Completes everything in flight: a snapshot, a revert and a close need it.
    pub fn finish_all(&mut self) -> Result<(), StoreError> {
        while !self.open_plans.is_empty() {
            self.finish(0, true)?;
        }
        Ok(())
    }

    /// After a killed daemon: what was in flight happened, or not, or in part.
    pub fn forget_flights(&mut self) -> Result<(), StoreError> {
        self.open_plans.clear();
        if !self.model.in_flight.is_empty() {
            let now = try_read_all(self.volume(), View::Head)?;
            for flight in std::mem::take(&mut self.model.in_flight) {
                self.land(&flight, &now);
            }
        }
        Ok(())
    }
}
