//! The fsck: reads everything, writes nothing, names what breaks an invariant.
//!
//! `store-check` and every crash test call it. It takes no lock: on a volume in use it may see a
//! checkpoint half done and say so.

use crate::adopt::io;
use crate::error::{FileName, Result, StoreError};
use crate::index::Location;
use crate::layout::LIVE;
use crate::recover::{Loaded, load};
use crate::scan::Scan;
use crate::space::BlockSet;
use crate::units::{BLOCK_BYTES, Block, BootId, in_memory};
use crate::volume::VolumeFiles;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Worth knowing; nothing is lost.
    Note,
    /// The volume must not be trusted.
    Damage,
}

/// One thing found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// In which file.
    pub file: FileName,
    /// Where, in bytes.
    pub offset_bytes: u64,
    /// What it is, with the invariant it breaks.
    pub what: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let severity = match self.severity {
            Severity::Note => "note",
            Severity::Damage => "damage",
        };
        write!(
            out,
            "{severity}: {} at byte {}: {}",
            self.file, self.offset_bytes, self.what
        )
    }
}

/// Pages of the index kept while walking it.
const CACHE_PAGES: usize = 64;
/// Records taken per step of the walk.
const WALK_RECORDS: u64 = 1 << 14;
/// More findings than this add nothing.
const MAX_FINDINGS: usize = 1000;

/// Checks a volume as a reopening would find it: after a power cut, and, if the machine has not booted
/// since, after a killed daemon.
pub fn check(files: &VolumeFiles) -> Vec<Finding> {
    let mut findings = Vec::new();
    let boot_id = crate::open::kernel_boot_id().unwrap_or(BootId([0; 16]));
    if let Err(error) = check_state(files, boot_id, &mut findings) {
        findings.push(from_error(&error));
    }
    findings
}

fn from_error(error: &StoreError) -> Finding {
    let mut finding = Finding {
        severity: Severity::Damage,
        file: FileName::Superblock,
        offset_bytes: 0,
        what: error.to_string(),
    };
    if let StoreError::Corrupted {
        file, offset_bytes, ..
    }
    | StoreError::Io {
        file, offset_bytes, ..
    } = error
    {
        (finding.file, finding.offset_bytes) = (*file, *offset_bytes);
    }
    if let StoreError::Corrupted { what, .. } = error {
        finding.what = (*what).to_owned();
    }
    finding
}

fn check_state(files: &VolumeFiles, boot_id: BootId, findings: &mut Vec<Finding>) -> Result<()> {
    let Some(mut loaded) = load(files, boot_id, CACHE_PAGES)? else {
        findings.push(Finding {
            severity: Severity::Note,
            file: FileName::Superblock,
            offset_bytes: 0,
            what: "blank: the adoption was not finished".to_owned(),
        });
        return Ok(());
    };
    if loaded.other_slot_damaged {
        findings.push(Finding {
            severity: Severity::Note,
            file: FileName::Superblock,
            offset_bytes: 0,
            what: "one slot does not verify; the other one is current".to_owned(),
        });
    }
    check_base(files, &loaded, findings)?;
    check_runs(files, &loaded)?;
    check_records(files, &mut loaded, findings)
}

fn check_base(files: &VolumeFiles, loaded: &Loaded, findings: &mut Vec<Finding>) -> Result<()> {
    let length_bytes = files
        .base
        .len_bytes()
        .map_err(io("measure", FileName::Base))?;
    let plain = loaded.state.table.is_empty() && loaded.state.index.is_empty();
    if !loaded
        .superblock
        .base_fits(length_bytes, files.base.is_device())
        && !plain
    {
        findings.push(Finding {
            severity: Severity::Damage,
            file: FileName::Base,
            offset_bytes: length_bytes,
            what: format!("its size was {} bytes", loaded.superblock.size_bytes),
        });
    }
    Ok(())
}

/// Every page of every run by itself.
fn check_runs(files: &VolumeFiles, loaded: &Loaded) -> Result<()> {
    let mut scan = Scan::new(loaded.state.index.runs(), loaded.bounds());
    let mut named = Vec::new();
    while scan.step(&*files.index, u64::MAX, &mut named)? > 0 {
        named.clear();
    }
    Ok(())
}

fn check_records(
    files: &VolumeFiles,
    loaded: &mut Loaded,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let log_blocks = files
        .log
        .len_bytes()
        .map_err(io("measure", FileName::Log))?
        .div_ceil(BLOCK_BYTES);
    let volume_blocks = loaded.superblock.size_bytes.div_ceil(BLOCK_BYTES);
    let epoch = loaded.state.epoch.0;
    let mut used = BlockSet::new(WALK_RECORDS);
    let mut next = Some(Block(0));
    while let Some(first) = next {
        let (records, after) = loaded
            .state
            .index
            .page_through(first, in_memory(WALK_RECORDS))?;
        for (key, location) in records {
            let mut damage = |what: String| {
                if findings.len() < MAX_FINDINGS {
                    findings.push(Finding {
                        severity: Severity::Damage,
                        file: FileName::Index,
                        offset_bytes: 0,
                        what: format!("block {}, death {}: {what}", key.block.0, key.death),
                    });
                }
            };
            if key.block.0 >= volume_blocks {
                damage("outside the volume (I2)".to_owned());
            }
            if key.death == 0 || (key.death != LIVE && key.death > epoch) {
                damage(format!(
                    "died in an epoch that has not been, now is {epoch} (I5)"
                ));
            }
            if let Location::Log(at) = location {
                if at.0 >= log_blocks {
                    damage(format!("log block {} is behind the log's end (I2)", at.0));
                } else if !used.insert(at.0) {
                    damage(format!("log block {} serves two versions (I2)", at.0));
                }
            }
        }
        next = after;
    }
    Ok(())
}
