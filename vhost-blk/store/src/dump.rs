//! Everything the metadata says, for people and as JSON.
//!
//! `store-dump` calls it. It changes nothing and takes no lock.

use std::fmt;

use crate::error::{FileName, Result, StoreError};
use crate::index::Location;
use crate::layout::LIVE;
use crate::recover::load;
use crate::snapshot_table::SnapshotInfo;
use crate::units::{Block, BootId, in_memory};
use crate::volume::VolumeFiles;

/// The superblock in words.
#[derive(Clone, Debug, serde::Serialize)]
pub struct SuperblockDump {
    /// The volume.
    pub volume_id: String,
    /// Generation of the current slot.
    pub generation: u64,
    /// Size in bytes.
    pub size_bytes: u64,
    /// How long the base may be until it is cut off, in bytes; 0: no longer than the volume.
    pub base_bytes: u64,
    /// Boot id of the machine when it was last opened.
    pub boot_id: String,
    /// Openings so far.
    pub incarnation: u32,
    /// Whether it was closed in order.
    pub clean: bool,
    /// Runs of the index, newest first.
    pub runs: Vec<RunDump>,
    /// No log block at or above this one is named by the runs.
    pub log_high_water: u64,
    /// First journal generation.
    pub journal_generation: u64,
    /// Records up to this one are in the index.
    pub applied_through: u64,
}

/// A run of the index.
#[derive(Clone, Debug, serde::Serialize)]
pub struct RunDump {
    /// Its generation.
    pub generation: u64,
    /// Where it begins in the index file.
    pub first_page: u64,
    /// Its pages.
    pub pages: u64,
    /// Pages of fences behind them.
    pub fence_pages: u64,
    /// Its records.
    pub records: u64,
}

/// A record of the index.
#[derive(Clone, Debug, serde::Serialize)]
pub struct IndexDump {
    /// The block.
    pub block: u64,
    /// The epoch in which the version was superseded; absent for the live one.
    pub death: Option<u32>,
    /// "base", "zero" or "log N".
    pub location: String,
}

/// A record of the journal.
#[derive(Clone, Debug, serde::Serialize)]
pub struct JournalDump {
    /// Its sequence number.
    pub sequence: u64,
    /// The opening that wrote it.
    pub incarnation: u32,
    /// What it says.
    pub record: String,
}

/// A volume's metadata.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Dump {
    /// The superblock.
    pub superblock: SuperblockDump,
    /// The open epoch.
    pub epoch: u32,
    /// The snapshots.
    pub snapshots: Vec<SnapshotInfo>,
    /// The index, journal included.
    pub index: Vec<IndexDump>,
    /// The journal's valid records.
    pub journal: Vec<JournalDump>,
}

/// Reads a volume's metadata as a reopening would find it now.
pub fn dump(files: &VolumeFiles) -> Result<Dump> {
    let boot_id = crate::open::kernel_boot_id().unwrap_or(BootId([0; 16]));
    let mut loaded = load(files, boot_id, 64)?.ok_or(StoreError::Corrupted {
        file: FileName::Superblock,
        offset_bytes: 0,
        what: "blank: the adoption was not finished",
    })?;
    let mut index = Vec::new();
    let mut next = Some(Block(0));
    while let Some(first) = next {
        let (records, after) = loaded.state.index.page_through(first, in_memory(1 << 14))?;
        index.extend(records.into_iter().map(|(key, location)| IndexDump {
            block: key.block.0,
            death: (key.death != LIVE).then_some(key.death),
            location: match location {
                Location::Base => "base".to_owned(),
                Location::Zero => "zero".to_owned(),
                Location::Log(at) => format!("log {}", at.0),
            },
        }));
        next = after;
    }
    let superblock = &loaded.superblock;
    Ok(Dump {
        superblock: SuperblockDump {
            volume_id: superblock.volume_id.to_string(),
            generation: superblock.generation.0,
            size_bytes: superblock.size_bytes,
            base_bytes: superblock.base_bytes,
            boot_id: uuid::Uuid::from_bytes(superblock.boot_id.0).to_string(),
            incarnation: superblock.incarnation.0,
            clean: superblock.clean,
            runs: superblock
                .runs
                .iter()
                .map(|run| RunDump {
                    generation: run.generation.0,
                    first_page: run.first_page,
                    pages: run.pages,
                    fence_pages: run.fence_pages,
                    records: run.records,
                })
                .collect(),
            log_high_water: superblock.log_high_water,
            journal_generation: superblock.journal_generation.0,
            applied_through: superblock.applied_through.0,
        },
        epoch: loaded.state.epoch.0,
        snapshots: loaded.state.table.all().cloned().collect(),
        index,
        journal: loaded
            .chain
            .iter()
            .map(|entry| JournalDump {
                sequence: entry.sequence.0,
                incarnation: entry.incarnation.0,
                record: format!("{:?}", entry.record),
            })
            .collect(),
    })
}

impl fmt::Display for Dump {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let superblock = &self.superblock;
        writeln!(
            out,
            "volume {}, {} bytes",
            superblock.volume_id, superblock.size_bytes
        )?;
        writeln!(
            out,
            "superblock generation {}, incarnation {}, boot {}, {}",
            superblock.generation,
            superblock.incarnation,
            superblock.boot_id,
            if superblock.clean {
                "closed in order"
            } else {
                "not closed"
            },
        )?;
        writeln!(
            out,
            "journal generation {}, applied through {}; log blocks below {}",
            superblock.journal_generation, superblock.applied_through, superblock.log_high_water,
        )?;
        for run in &superblock.runs {
            writeln!(
                out,
                "run {}: {} records in {} pages from page {}, {} fence pages",
                run.generation, run.records, run.pages, run.first_page, run.fence_pages,
            )?;
        }
        writeln!(out, "epoch {}", self.epoch)?;
        for snapshot in &self.snapshots {
            writeln!(
                out,
                "snapshot {} of set {}: epoch {}, {} bytes, {:?}, {:?}",
                snapshot.snapshot_id,
                snapshot.set_id,
                snapshot.epoch.0,
                snapshot.size_bytes,
                snapshot.method,
                snapshot.state,
            )?;
        }
        for record in &self.index {
            match record.death {
                Some(death) => write!(out, "block {} until epoch {death}", record.block)?,
                None => write!(out, "block {} now", record.block)?,
            }
            writeln!(out, ": {}", record.location)?;
        }
        for entry in &self.journal {
            writeln!(
                out,
                "journal {} ({}): {}",
                entry.sequence, entry.incarnation, entry.record
            )?;
        }
        Ok(())
    }
}
