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

impl World {
    /// Plans a write and takes it to `stage`.
    pub fn begin(
        &mut self,
        sector: u64,
        count: u64,
        zero: Option<bool>,
        stage: Stage,
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
        if open.stage < Stage::Prepared && stage >= Stage::Prepared {
            volume.prepare_writes(std::slice::from_mut(&mut open.plan))?;
            open.stage = Stage::Prepared;
        }
        let extents = open.plan.extents().len();
        let end = match stage {
            Stage::Planned | Stage::Prepared => 0,
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
        open.stage = open.stage.max(stage);
        Ok(())
    }

    /// Prepares all writes in flight together, as an engine does.
    pub fn prepare_all(&mut self) -> Result<(), StoreError> {
        let volume = self.volume.as_ref().unwrap();
        let (mut plans, mut places) = (Vec::new(), Vec::new());
        let mut rest = Vec::new();
        for (place, open) in self.open_plans.drain(..).enumerate() {
            if open.stage == Stage::Planned {
                plans.push(open.plan);
                places.push(place);
            } else {
                rest.push((place, open));
            }
        }
        let result = volume.prepare_writes(&mut plans);
        let stage = if result.is_ok() {
            Stage::Prepared
        } else {
            Stage::Planned
        };
        rest.extend(places.into_iter().zip(plans).map(|(place, plan)| {
            let moved_extents = 0;
            let open = OpenPlan {
                plan,
                stage,
                moved_extents,
            };
            (place, open)
        }));
        rest.sort_by_key(|(place, _)| *place);
        self.open_plans = rest.into_iter().map(|(_, open)| open).collect();
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
        let open = self.open_plans.remove(place);
        let flight = self.model.in_flight.remove(place);
        let result = self.volume().complete_write(open.plan);
        for (sector, value) in flight.sectors() {
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
