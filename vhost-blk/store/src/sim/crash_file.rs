//! `CrashDisk`: files under one power switch, and what they may hold when it is thrown.
//!
//! Every write is pending until the next sync of its file. After a power cut any subset of the pending
//! sectors of all files is on the disk; after a killed daemon all of them are in the page cache.
//! Points at which that could happen are recorded while a workload runs; images are made of them later.

use std::io;
use std::sync::{Arc, Mutex};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::Image;
use crate::io::BlockFile;
use crate::units::{SECTOR_BYTES, in_memory};
use crate::volume::lock;

/// When a point was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Before a sync took effect.
    BeforeSync,
    /// After it did.
    AfterSync,
    /// After some write.
    AfterWrite,
    /// Where the workload asked for it.
    Asked,
}

#[derive(Clone, Debug)]
enum Pending {
    Write {
        offset_bytes: u64,
        bytes: Arc<[u8]>,
    },
    /// Comes or stays away as one, as a sector does.
    SetLen {
        length_bytes: u64,
    },
}

#[derive(Clone, Debug)]
struct FileState {
    durable: Arc<Image>,
    current: Arc<Image>,
    pending: Arc<Vec<Pending>>,
}

/// The state of all files at one moment.
#[derive(Clone, Debug)]
pub struct CrashPoint {
    /// What the workload was doing: see [`CrashDisk::set_marker`].
    pub marker: u64,
    /// When it was recorded.
    pub moment: Moment,
    files: Vec<FileState>,
}

#[derive(Debug)]
struct DiskState {
    files: Vec<FileState>,
    marker: u64,
    points: Vec<CrashPoint>,
    /// Record after every n-th write; 0 for never.
    every_writes: u64,
    writes: u64,
    /// The file whose next sync fails.
    failing_sync: Option<usize>,
    /// Syncs of any file until one fails.
    syncs_left: Option<u64>,
    syncs: u64,
}

impl DiskState {
    fn count_write(&mut self) {
        self.writes += 1;
        if self.every_writes != 0 && self.writes.is_multiple_of(self.every_writes) {
            self.record(Moment::AfterWrite);
        }
    }

    fn record(&mut self, moment: Moment) {
        let point = CrashPoint {
            marker: self.marker,
            moment,
            files: self.files.clone(),
        };
        self.points.push(point);
    }
}

/// Files that lose power together.
#[derive(Clone, Debug)]
pub struct CrashDisk {
    state: Arc<Mutex<DiskState>>,
}

impl CrashDisk {
    /// Files of these durable contents. A point is recorded around every sync, and after every
    /// `every_writes`-th write (0: never).
    pub fn new(images: Vec<Image>, every_writes: u64) -> CrashDisk {
        let files = images
            .into_iter()
            .map(|image| {
                let image = Arc::new(image);
                FileState {
                    durable: Arc::clone(&image),
                    current: image,
                    pending: Arc::default(),
                }
            })
            .collect();
        let state = DiskState {
            files,
            marker: 0,
            points: Vec::new(),
            every_writes,
            writes: 0,
            failing_sync: None,
            syncs_left: None,
            syncs: 0,
        };
        CrashDisk {
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// The file at `place`.
    pub fn file(&self, place: usize) -> Arc<dyn BlockFile> {
        Arc::new(CrashFile {
            disk: self.clone(),
            place,
        })
    }

    /// Points recorded from now on carry `marker`.
    pub fn set_marker(&self, marker: u64) {
        lock(&self.state).marker = marker;
    }

    /// Makes the next sync of the file at `place` fail, and lose for good what it should have written.
    pub fn fail_next_sync(&self, place: usize) {
        lock(&self.state).failing_sync = Some(place);
    }

    /// Makes one sync fail, after `syncs` more of any file, and lose for good what it should have written.
    pub fn fail_sync_after(&self, syncs: u64) {
        lock(&self.state).syncs_left = Some(syncs);
    }

    /// Syncs so far, of all files.
    pub fn syncs(&self) -> u64 {
        lock(&self.state).syncs
    }

    /// Records a point now.
    pub fn record(&self) {
        lock(&self.state).record(Moment::Asked);
    }

    /// Takes the points recorded so far.
    pub fn take_points(&self) -> Vec<CrashPoint> {
        std::mem::take(&mut lock(&self.state).points)
    }
}

impl CrashPoint {
    /// A disk in this very state: what was pending is pending, and later syncs make it durable.
    pub fn resume(&self, every_writes: u64) -> CrashDisk {
        let disk = CrashDisk::new(Vec::new(), every_writes);
        lock(&disk.state).files.clone_from(&self.files);
        disk
    }

    /// Sectors a power cut may or may not have written.
    pub fn pending_sectors(&self) -> u64 {
        let mut sectors = 0;
        self.power_cut(|_| {
            sectors += 1;
            false
        });
        sectors
    }

    /// The files of a killed daemon: all writes are there.
    pub fn killed(&self) -> Vec<Image> {
        self.files
            .iter()
            .map(|file| Image::clone(&file.current))
            .collect()
    }

    /// The files after a power cut that wrote exactly the pending sectors `chosen` says, counted over all
    /// files in the order of the writes.
    pub fn power_cut(&self, mut chosen: impl FnMut(u64) -> bool) -> Vec<Image> {
        let mut number = 0;
        self.files
            .iter()
            .map(|file| {
                let mut image = Image::clone(&file.durable);
                for change in &*file.pending {
                    let (mut at, mut rest) = match change {
                        Pending::Write {
                            offset_bytes,
                            bytes,
                        } => (*offset_bytes, &bytes[..]),
                        Pending::SetLen { length_bytes } => {
                            if chosen(number) {
                                image.set_len(*length_bytes);
                            }
                            number += 1;
                            continue;
                        }
                    };
                    while !rest.is_empty() {
                        // A write may begin within a sector, as journal records do: its part of the
                        // sector comes or stays away as one.
                        let room = SECTOR_BYTES - at % SECTOR_BYTES;
                        let (now, later) = rest.split_at(rest.len().min(in_memory(room)));
                        if chosen(number) {
                            image.write(now, at);
                        }
                        number += 1;
                        at += now.len() as u64;
                        rest = later;
                    }
                }
                image
            })
            .collect()
    }

    /// The files after a power cut that destroyed what was being written to the file at `place`, and wrote
    /// nothing else; `None` if nothing was being written to it.
    pub fn power_cut_garbling(&self, place: usize) -> Option<Vec<Image>> {
        let pending = &self.files.get(place)?.pending;
        if pending.is_empty() {
            return None;
        }
        let mut images = self.power_cut(|_| false);
        let image = images.get_mut(place)?;
        for change in &**pending {
            if let Pending::Write {
                offset_bytes,
                bytes,
            } = change
            {
                image.fill(0xdb, *offset_bytes, bytes.len() as u64);
            }
        }
        Some(images)
    }

    /// Images of this point: all subsets when there are at most `most` of them, else `most` of them, the
    /// extremes first, then seeded samples of every density.
    pub fn power_cuts(&self, most: u64, seed: u64) -> Vec<Vec<Image>> {
        let sectors = self.pending_sectors();
        if sectors < 63 && 1 << sectors <= most {
            return (0..1_u64 << sectors)
                .map(|subset| self.power_cut(|sector| subset >> sector & 1 == 1))
                .collect();
        }
        let mut random = SmallRng::seed_from_u64(seed);
        (0..most)
            .map(|sample| match sample {
                0 => self.power_cut(|_| false),
                1 => self.power_cut(|_| true),
                // One sector lost, or one sector alone.
                2 | 3 => {
                    let odd = random.random_range(0..sectors);
                    self.power_cut(|sector| (sector == odd) == (sample == 3))
                }
                // Everything up to some point, in order.
                4 => {
                    let end = random.random_range(0..sectors);
                    self.power_cut(|sector| sector < end)
                }
                _ => {
                    let density = random.random_range(0.05..0.95);
                    self.power_cut(|_| random.random_bool(density))
                }
            })
            .collect()
    }
}

#[derive(Debug)]
struct CrashFile {
    disk: CrashDisk,
    place: usize,
}

impl BlockFile for CrashFile {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(lock(&self.disk.state).files[self.place].current.len_bytes())
    }

    fn read_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        lock(&self.disk.state).files[self.place]
            .current
            .read(buffer, offset_bytes);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset_bytes: u64) -> io::Result<()> {
        let mut state = lock(&self.disk.state);
        let file = &mut state.files[self.place];
        Arc::make_mut(&mut file.current).write(data, offset_bytes);
        Arc::make_mut(&mut file.pending).push(Pending::Write {
            offset_bytes,
            bytes: data.into(),
        });
        state.count_write();
        Ok(())
    }

    fn set_len(&self, length_bytes: u64) -> io::Result<()> {
        let mut state = lock(&self.disk.state);
        let file = &mut state.files[self.place];
        Arc::make_mut(&mut file.current).set_len(length_bytes);
        Arc::make_mut(&mut file.pending).push(Pending::SetLen { length_bytes });
        state.count_write();
        Ok(())
    }

    fn write_zeroes(&self, offset_bytes: u64, length_bytes: u64, _unmap: bool) -> io::Result<()> {
        self.write_at(&vec![0; in_memory(length_bytes)], offset_bytes)
    }

    fn allocate(&self, _offset_bytes: u64, _length_bytes: u64) -> io::Result<()> {
        Ok(())
    }

    fn release(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        // What a hole reads as is of no interest; garbage shows who looks all the same.
        let length = self
            .len_bytes()?
            .saturating_sub(offset_bytes)
            .min(length_bytes);
        self.write_at(&vec![0xdb; in_memory(length)], offset_bytes)
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = lock(&self.disk.state);
        state.record(Moment::BeforeSync);
        let here = state.failing_sync.take_if(|place| *place == self.place);
        let now = state.syncs_left.take_if(|left| *left == 0);
        state.syncs_left = state.syncs_left.map(|left| left - 1);
        state.syncs += 1;
        let fails = here.is_some() || now.is_some();
        let file = &mut state.files[self.place];
        for change in std::mem::take(&mut file.pending).iter() {
            let durable = Arc::make_mut(&mut file.durable);
            match change {
                // A failed sync leaves pages that are marked clean and are not on the disk: later syncs pass
                // them over, unless somebody writes them again.
                Pending::Write { .. } if fails => {}
                Pending::Write {
                    offset_bytes,
                    bytes,
                } => durable.write(bytes, *offset_bytes),
                // A length is no page: the file system keeps it, and writes it when it can.
                Pending::SetLen { length_bytes } => durable.set_len(*length_bytes),
            }
        }
        state.record(Moment::AfterSync);
        if fails {
            return Err(io::Error::from_raw_os_error(5));
        }
        Ok(())
    }
}
