//! What each sector of a disk may hold, given which requests were made and which of them were answered.
//!
//! Used by the kill campaign; knows nothing of rings, sockets or daemons. Every change has a number that is written into every sector it
//! covers, so a reader knows which change it sees.
//!
//! A sector is judged as a register: a change takes effect at one moment between its request and its answer. A read, or a
//! snapshot, may show a version unless another one certainly came after it and before the reader began. "Certainly" is by completion
//! only: the other was requested after this one had been answered, or had been seen by a reader.
//!
//! What a kill changes: a request that was not answered is done again by the next daemon, so it may take effect once more, after
//! changes it ran beside; that it was seen before the kill says nothing then. But it does so before the next daemon takes
//! anything new, so nothing that is asked for behind the kill is undone by it. Nothing that was answered is forgotten.
//!
//! Times are ticks of one counter; every begin and end of anything has its own.

use std::collections::{BTreeMap, HashSet};

/// Bytes of a sector.
pub(super) const SECTOR_BYTES: usize = 512;

/// A moment.
pub(super) type Tick = u64;

/// Number of a change; 0 is the disk as it was made, all zero.
pub(super) type ChangeId = u64;

/// What a change does to its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Write,
    Zero,
    /// Zeroes the sector or leaves it as it is.
    Discard,
}

#[derive(Clone, Copy, Debug)]
struct Change {
    kind: Kind,
    first: usize,
    count: usize,
    asked: Tick,
    answered: Option<Tick>,
    /// Done by two daemons, perhaps: a snapshot between them may show a part of it.
    spanned_a_kill: bool,
}

/// A change as one sector knows it.
#[derive(Clone, Copy, Debug)]
struct Version {
    change: ChangeId,
    seen: Option<Tick>,
    /// From here on it is certainly superseded.
    over: Option<Tick>,
}

/// What a sector shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    Zero,
    Change(ChangeId),
}

/// The judge.
#[derive(Debug)]
pub(super) struct Oracle {
    now: Tick,
    changes: Vec<Change>,
    sectors: Vec<Vec<Version>>,
    open: HashSet<ChangeId>,
    /// Readers at work, by the tick at which they began.
    readers: BTreeMap<Tick, ()>,
}

/// Bytes of a sector that a change has written. Every word differs from sector to sector and from change to change.
pub(super) fn content(change: ChangeId, sector: usize) -> [u8; SECTOR_BYTES] {
    let mut bytes = [0; SECTOR_BYTES];
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = if index == 0 {
            change
        } else {
            (change ^ (sector as u64) << 32).wrapping_mul(2 * index as u64 + 1)
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

fn shown(sector: usize, bytes: &[u8]) -> Result<Shown, String> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(Shown::Zero);
    }
    let change = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    if bytes == content(change, sector) {
        Ok(Shown::Change(change))
    } else {
        Err(format!("sector {sector} is torn or foreign: {bytes:02x?}"))
    }
}

impl Oracle {
    /// A disk of zeroes.
    pub(super) fn new(sectors: usize) -> Self {
        let made = Change {
            kind: Kind::Zero,
            first: 0,
            count: sectors,
            asked: 0,
            answered: Some(0),
            spanned_a_kill: false,
        };
        let version = Version {
            change: 0,
            seen: None,
            over: None,
        };
        Self {
            now: 0,
            changes: vec![made],
            sectors: vec![vec![version]; sectors],
            open: HashSet::new(),
            readers: BTreeMap::new(),
        }
    }

    pub(super) fn tick(&mut self) -> Tick {
        self.now += 1;
        self.now
    }

    fn change(&self, id: ChangeId) -> &Change {
        &self.changes[usize::try_from(id).unwrap()]
    }

    /// A change is about to be asked for.
    pub(super) fn ask(&mut self, kind: Kind, first: usize, count: usize) -> ChangeId {
        let id = self.changes.len() as ChangeId;
        let asked = self.tick();
        self.changes.push(Change {
            kind,
            first,
            count,
            asked,
            answered: None,
            spanned_a_kill: false,
        });
        self.open.insert(id);
        let oldest_reader = self.readers.keys().next().copied().unwrap_or(asked);
        for sector in &mut self.sectors[first..first + count] {
            sector.retain(|version| version.over.is_none_or(|over| over >= oldest_reader));
            sector.push(Version {
                change: id,
                seen: None,
                over: None,
            });
        }
        id
    }

    /// A change was answered.
    pub(super) fn answer(&mut self, id: ChangeId) {
        let now = self.tick();
        assert!(self.open.remove(&id), "change {id} was answered twice");
        let change = &mut self.changes[usize::try_from(id).unwrap()];
        change.answered = Some(now);
        let change = *change;
        if change.kind == Kind::Discard {
            // It may have done nothing.
            return;
        }
        let (changes, range) = (&self.changes, change.first..change.first + change.count);
        for sector in &mut self.sectors[range] {
            for version in sector {
                if version.change != id && took_effect_before(changes, version, change.asked) {
                    version.over.get_or_insert(now);
                }
            }
        }
    }

    /// A reader begins.
    pub(super) fn begin_read(&mut self) -> Tick {
        let now = self.tick();
        self.readers.insert(now, ());
        now
    }

    /// A reader that began at `begun` shows `bytes` from sector `first` on.
    pub(super) fn end_read(
        &mut self,
        begun: Tick,
        first: usize,
        bytes: &[u8],
    ) -> Result<(), String> {
        let now = self.tick();
        self.readers.remove(&begun);
        for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR_BYTES)) {
            let found = shown(sector, bytes)?;
            let mut candidates = self.sectors[sector]
                .iter()
                .filter(|version| {
                    self.matches(version.change, found)
                        && version.over.is_none_or(|over| over >= begun)
                })
                .map(|version| version.change);
            let Some(candidate) = candidates.next() else {
                return Err(self.complaint(sector, found, begun, &self.sectors[sector]));
            };
            if candidates.next().is_some() {
                continue;
            }
            drop(candidates);
            let changes = &self.changes;
            for version in &mut self.sectors[sector] {
                if version.change == candidate {
                    version.seen.get_or_insert(now);
                } else if took_effect_before(changes, version, begun) {
                    // The reader saw this one after that one had taken effect.
                    version.over.get_or_insert(now);
                }
            }
        }
        Ok(())
    }

    /// The daemon was killed.
    pub(super) fn killed(&mut self) {
        for id in &self.open {
            let change = &mut self.changes[usize::try_from(*id).unwrap()];
            change.spanned_a_kill = true;
            for sector in &mut self.sectors[change.first..change.first + change.count] {
                for version in sector.iter_mut().filter(|version| version.change == *id) {
                    version.seen = None;
                    version.over = None;
                }
            }
        }
    }

    /// What a snapshot may hold that was taken between `begun` and now. Ends the reader.
    pub(super) fn instant(&mut self, begun: Tick) -> Instant {
        self.readers.remove(&begun);
        let ended = self.tick();
        let mut versions = Vec::new();
        let mut starts = vec![0];
        for sector in &self.sectors {
            versions.extend(
                sector
                    .iter()
                    .filter(|version| version.over.is_none_or(|over| over >= begun)),
            );
            starts.push(versions.len());
        }
        Instant {
            begun,
            ended,
            versions,
            starts,
        }
    }

    /// Whether a snapshot's content is what the disk was at one moment of its instant.
    pub(super) fn judge(&self, instant: &Instant, image: &[u8]) -> Result<(), String> {
        let sectors: Vec<(usize, Shown)> = image
            .chunks_exact(SECTOR_BYTES)
            .enumerate()
            .map(|(sector, bytes)| Ok((sector, shown(sector, bytes)?)))
            .collect::<Result<_, String>>()?;
        // The newest change that is certainly in it: the moment was not before it was asked for.
        let mut moment = instant.begun;
        let mut seen = HashSet::new();
        for (sector, found) in &sectors {
            if let Shown::Change(id) = found {
                if self.changes.get(usize::try_from(*id).unwrap()).is_none() {
                    return Err(format!("sector {sector}: change {id} was never made"));
                }
                moment = moment.max(self.change(*id).asked);
                seen.insert(*id);
            }
        }
        if moment > instant.ended {
            return Err(format!(
                "it holds what was asked for at {moment}, after {}",
                instant.ended
            ));
        }
        for (sector, found) in &sectors {
            let versions = instant.sector(*sector);
            let fits = versions.iter().any(|version| {
                self.matches(version.change, *found)
                    && version.over.is_none_or(|over| over >= moment)
            });
            if !fits {
                return Err(self.complaint(*sector, *found, moment, versions));
            }
        }
        // Nothing is in flight when a snapshot is taken, so a change is in it whole or not at all.
        for id in seen {
            let change = self.change(id);
            if change.spanned_a_kill {
                continue;
            }
            for (sector, found) in &sectors[change.first..change.first + change.count] {
                let versions = instant.sector(*sector);
                let newer = versions.iter().any(|version| {
                    self.matches(version.change, *found)
                        && (version.change == id
                            || self
                                .change(version.change)
                                .answered
                                .is_none_or(|answered| answered > change.asked))
                });
                if !newer {
                    return Err(format!(
                        "change {id} {change:?} is in it by half: sector {sector} shows {found:?}"
                    ));
                }
            }
        }
        Ok(())
    }

    fn matches(&self, change: ChangeId, found: Shown) -> bool {
        match (self.change(change).kind, found) {
            (Kind::Write, Shown::Change(id)) => id == change,
            (Kind::Zero | Kind::Discard, Shown::Zero) => true,
            (Kind::Write, Shown::Zero) | (Kind::Zero | Kind::Discard, Shown::Change(_)) => false,
        }
    }

    fn complaint(&self, sector: usize, found: Shown, begun: Tick, versions: &[Version]) -> String {
        let known: Vec<_> = versions
            .iter()
            .map(|version| (version, self.change(version.change)))
            .collect();
        let shown = match found {
            Shown::Change(id) => self.changes.get(usize::try_from(id).unwrap()),
            Shown::Zero => None,
        };
        format!(
            "sector {sector} shows {found:?} ({shown:?}) at {begun} or later; known: {known:#?}"
        )
    }
}

fn took_effect_before(changes: &[Change], version: &Version, tick: Tick) -> bool {
    let change = &changes[usize::try_from(version.change).unwrap()];
    let before = |moment: Option<Tick>| moment.is_some_and(|moment| moment < tick);
    // What a reader of the next daemon has seen is done again already: nothing that is asked for after that comes before it.
    before(change.answered) || before(version.seen)
}

/// What the disk could hold while a snapshot was taken.
#[derive(Debug)]
pub(super) struct Instant {
    begun: Tick,
    ended: Tick,
    versions: Vec<Version>,
    starts: Vec<usize>,
}

impl Instant {
    fn sector(&self, sector: usize) -> &[Version] {
        &self.versions[self.starts[sector]..self.starts[sector + 1]]
    }
}

mod tests;
