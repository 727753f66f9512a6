//! The four witnesses and the verdict. Pure: it only reads what was said.
//!
//! Called by `run` after the thaw. It must not know sockets, QMP or the state directory.
//!
//! Invariants: a witness that was not heard never agrees; what nobody said is not assumed; `application` needs all four,
//! at least one writer in scope, and every writable disk of the VM in the set or left out by the requester's own word.

mod stock;

use super::level::Level;
use crate::guest::StockGuest;
use guest_agent_wire::host::{
    FilesystemReport, FilesystemResult, Frozen, Identified, Prepared, Thawed, WriterInfo,
    WriterReport,
};
use guest_agent_wire::types::{DiskExtent, Hold, WriterState};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeSet;
use vhost_blk_wire::command::SnapshotSetCommitted;

/// What a witness says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Word {
    /// Writes were held.
    Agrees,
    /// They were not, or not provably.
    Disagrees,
    /// It was not asked, or nothing was there to ask.
    #[default]
    NotHeard,
}

/// A witness: its word and what it rests on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Testimony {
    /// The word.
    pub value: Word,
    /// For people: what agrees, and everything that disagrees.
    pub evidence: Vec<String>,
}

impl Testimony {
    /// Agrees unless there are objections, which then stand first.
    fn from_objections(objections: Vec<String>, supports: Vec<String>) -> Self {
        let value = if objections.is_empty() {
            Word::Agrees
        } else {
            Word::Disagrees
        };
        Self {
            value,
            evidence: objections.into_iter().chain(supports).collect(),
        }
    }

    fn not_heard(why: &str) -> Self {
        Self {
            value: Word::NotHeard,
            evidence: vec![why.to_owned()],
        }
    }
}

/// The four witnesses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Witnesses {
    /// 1: each FIFREEZE returned 0, and its single FITHAW.
    pub filesystems: Testimony,
    /// 2: each writer in scope said that it held.
    pub writers: Testimony,
    /// 3: both clocks are inside the limits and the VM ran all the time.
    pub time: Testimony,
    /// 4: the host saw no write to the disks between the agent's word and the commit.
    pub host: Testimony,
}

impl Witnesses {
    /// None was heard, for this reason.
    #[must_use]
    pub fn none_heard(why: &str) -> Self {
        Self {
            filesystems: Testimony::not_heard(why),
            writers: Testimony::not_heard(why),
            time: Testimony::not_heard(why),
            host: Testimony::not_heard(why),
        }
    }

    /// Post-snapshot comes after the verdict: writers that fail there take back that they take part in the copy, whatever they held
    /// (VSS: FAILED_AT_POST_SNAPSHOT).
    pub fn hear_post_snapshot(&mut self, objections: Vec<String>) {
        let mut evidence = objections;
        evidence.append(&mut self.writers.evidence);
        self.writers = Testimony {
            value: Word::Disagrees,
            evidence,
        };
    }
}

/// Why a writer takes it back.
#[must_use]
pub fn objection_after_snapshot(report: &WriterReport) -> String {
    let failure = report.failure.as_ref();
    let why = failure.map_or("it does not say why", |f| f.message.as_str());
    format!("{}: post-snapshot failed: {why}", report.name)
}

/// The writer says that it failed when it heard that the set is kept.
#[must_use]
pub fn failed_at_post_snapshot(report: &WriterReport) -> bool {
    report.failure.is_some() || report.state == WriterState::FailedAtPostSnapshot
}

/// Times by the host's monotonic clock, and the limits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HostClock {
    /// From the start of the file systems' freeze to the sending of `thaw`.
    pub hold_ms: f64,
    /// From the sending of `freeze` to the answer to `thaw`.
    pub writers_ms: f64,
    /// Limit of the first.
    pub hold_limit_ms: u64,
    /// Limit of the second.
    pub writer_limit_ms: u64,
}

/// One daemon's part of the commit.
#[derive(Clone, Debug)]
pub struct DaemonCommit {
    /// Which daemon, for people.
    pub control: String,
    /// Serials of its volumes that were to be committed.
    pub volumes: Vec<String>,
    /// What it answered.
    pub committed: SnapshotSetCommitted,
}

/// Everything that was said, as far as it was said.
#[derive(Clone, Debug, Default)]
pub struct Observations<'a> {
    /// Serials of the disks in the set.
    pub serials: Vec<String>,
    /// Answer to `identify`.
    pub identified: Option<&'a Identified>,
    /// Answer to `prepare`.
    pub prepared: Option<&'a Prepared>,
    /// Answer to `freeze`.
    pub frozen: Option<&'a Frozen>,
    /// Answer to `thaw`.
    pub thawed: Option<&'a Thawed>,
    /// Why there is no answer to `thaw`.
    pub thaw_failure: Option<&'a str>,
    /// The host's clock; absent if nothing was frozen.
    pub clock: Option<HostClock>,
    /// What happened to the VM between the freeze and now that must not.
    pub disturbances: &'a [String],
    /// The commits.
    pub commits: &'a [DaemonCommit],
    /// What QEMU's agent said, if it froze the guest and not ours.
    pub stock: Option<&'a StockGuest>,
    /// Mount points that the requester left out.
    pub left_out: &'a [String],
    /// Writers that the requester left out: names, instances or classes.
    pub excluded_writers: &'a [String],
}

/// Hears the witnesses.
#[must_use]
pub fn hear(said: &Observations<'_>) -> Witnesses {
    if let Some(stock) = said.stock {
        return stock::hear(said, stock);
    }
    let Some(frozen) = said.frozen else {
        return Witnesses::none_heard("the guest was not frozen");
    };
    Witnesses {
        filesystems: hear_filesystems(said, frozen),
        writers: hear_writers(said, frozen),
        time: hear_time(said),
        host: hear_host(said, frozen),
    }
}

/// The highest level that the witnesses support. `every_disk` is false if a writable disk of the VM is neither in the
/// set nor left out by the requester; `writers` counts the writers in scope.
#[must_use]
pub fn level_reached(witnesses: &Witnesses, writers: usize, every_disk: bool) -> Level {
    let agrees = |testimony: &Testimony| testimony.value == Word::Agrees;
    let filesystem =
        agrees(&witnesses.filesystems) && agrees(&witnesses.time) && agrees(&witnesses.host);
    if !filesystem {
        Level::Crash
    } else if agrees(&witnesses.writers) && writers > 0 && every_disk {
        Level::Application
    } else {
        Level::Filesystem
    }
}

fn hear_filesystems(said: &Observations<'_>, frozen: &Frozen) -> Testimony {
    let mut objections = Vec::new();
    let mut supports = Vec::new();
    let Some(thawed) = said.thawed else {
        let why = said.thaw_failure.unwrap_or("the agent did not say");
        return Testimony::from_objections(vec![format!("thaw: {why}")], supports);
    };
    let mut frozen_count = 0_usize;
    for report in &frozen.filesystems {
        match report.result {
            FilesystemResult::Frozen if report.errno == 0 => {
                frozen_count += 1;
                match one_thaw(&report.mountpoint, &thawed.filesystems) {
                    Ok(()) => {
                        supports.push(format!("{}: FIFREEZE 0, FITHAW 0", report.mountpoint));
                    }
                    Err(why) => objections.push(why),
                }
            }
            FilesystemResult::Frozen | FilesystemResult::Thawed | FilesystemResult::Failed => {
                objections.push(format!(
                    "{}: not frozen (errno {}) {}",
                    report.mountpoint, report.errno, report.message
                ));
            }
            FilesystemResult::LeftOut => {
                supports.push(format!("{}: left out by request", report.mountpoint));
            }
            FilesystemResult::ReadOnly => {
                supports.push(format!("{}: read-only", report.mountpoint));
            }
        }
    }
    for report in &thawed.filesystems {
        if report.result == FilesystemResult::Thawed
            && !frozen
                .filesystems
                .iter()
                .any(|f| f.mountpoint == report.mountpoint)
        {
            objections.push(format!(
                "{}: thawed, but never said to be frozen",
                report.mountpoint
            ));
        }
    }
    if frozen_count == 0 {
        objections.push("no file system was frozen".to_owned());
    }
    objections.extend(uncovered_filesystems(said, frozen));
    Testimony::from_objections(objections, supports)
}

/// FITHAW is done once for each file system and must have returned 0: EINVAL means that somebody else thawed it.
fn one_thaw(mountpoint: &str, thaws: &[FilesystemReport]) -> Result<(), String> {
    let mut of_it = thaws
        .iter()
        .filter(|report| report.mountpoint == mountpoint);
    match (of_it.next(), of_it.next()) {
        (Some(report), None) if report.result == FilesystemResult::Thawed && report.errno == 0 => {
            Ok(())
        }
        (Some(report), None) => Err(format!(
            "{mountpoint}: FITHAW errno {} {}",
            report.errno, report.message
        )),
        (None, _) => Err(format!("{mountpoint}: frozen, but no word of its thaw")),
        (Some(_), Some(_)) => Err(format!("{mountpoint}: thawed more than once")),
    }
}

/// Writable file systems on disks of the set that `freeze` did not mention.
fn uncovered_filesystems(said: &Observations<'_>, frozen: &Frozen) -> Vec<String> {
    let Some(identified) = said.identified else {
        return Vec::new();
    };
    identified
        .filesystems
        .iter()
        .filter(|filesystem| !filesystem.read_only)
        .filter(|filesystem| {
            filesystem.extents.is_empty()
                || filesystem
                    .extents
                    .iter()
                    .any(|e| e.serial.is_empty() || said.serials.contains(&e.serial))
        })
        .filter(|filesystem| {
            !frozen
                .filesystems
                .iter()
                .any(|report| report.mountpoint == filesystem.mountpoint)
        })
        .map(|filesystem| {
            format!(
                "{} ({}): writable on a disk of the set and not frozen{}",
                filesystem.mountpoint,
                filesystem.fstype,
                filesystem
                    .why_not
                    .as_ref()
                    .map(|why| format!(": {why}"))
                    .unwrap_or_default()
            )
        })
        .collect()
}

fn hear_writers(said: &Observations<'_>, frozen: &Frozen) -> Testimony {
    let in_scope = said.prepared.map_or(&[][..], |p| p.writers.as_slice());
    if in_scope.is_empty() && frozen.writers.is_empty() {
        return Testimony::not_heard("no writer in scope");
    }
    let Some(thawed) = said.thawed else {
        let why = said.thaw_failure.unwrap_or("the agent did not say");
        return Testimony::from_objections(vec![format!("thaw: {why}")], Vec::new());
    };
    let mut objections = never_asked(said);
    let mut supports = Vec::new();
    let mut ids: BTreeSet<&str> = BTreeSet::new();
    ids.extend(in_scope.iter().map(|writer| writer.instance_id.as_str()));
    ids.extend(frozen.writers.iter().map(|w| w.instance_id.as_str()));
    ids.extend(thawed.writers.iter().map(|w| w.instance_id.as_str()));
    for id in ids {
        let at_freeze = only(&frozen.writers, id);
        let at_thaw = only(&thawed.writers, id);
        match held(id, at_freeze, at_thaw, hold_kind(said, id)) {
            Ok(support) => supports.push(support),
            Err(objection) => objections.push(objection),
        }
    }
    Testimony::from_objections(objections, supports)
}

/// Writers that were there when they were asked who they are, and gone when the others were asked to prepare.
fn never_asked(said: &Observations<'_>) -> Vec<String> {
    let (Some(identified), Some(prepared)) = (said.identified, said.prepared) else {
        return Vec::new();
    };
    let was_asked = |id: &str| {
        let mut reports = prepared.writers.iter().chain(&prepared.left_out);
        reports.any(|report| report.instance_id == id)
    };
    let is_excluded = |writer: &WriterInfo| {
        let mut names = [&writer.instance_id, &writer.class_id, &writer.name].into_iter();
        names.any(|name| said.excluded_writers.contains(name))
    };
    let writers = identified.writers.iter();
    writers
        .filter(|writer| !was_asked(&writer.instance_id) && !is_excluded(writer))
        .map(|writer| {
            format!(
                "{}: it was gone before it was asked to prepare",
                writer.name
            )
        })
        .collect()
}

fn only<'a>(reports: &'a [WriterReport], id: &str) -> Option<&'a WriterReport> {
    let mut of_it = reports.iter().filter(|report| report.instance_id == id);
    match (of_it.next(), of_it.next()) {
        (Some(report), None) => Some(report),
        (_, _) => None,
    }
}

fn hold_kind(said: &Observations<'_>, id: &str) -> Option<Hold> {
    let identified = said.identified?;
    identified
        .writers
        .iter()
        .find(|writer| writer.instance_id == id)
        .map(|writer| writer.hold)
}

fn held(
    id: &str,
    at_freeze: Option<&WriterReport>,
    at_thaw: Option<&WriterReport>,
    hold: Option<Hold>,
) -> Result<String, String> {
    let Some(at_freeze) = at_freeze else {
        return Err(format!("{id}: prepared, but no word of its freeze"));
    };
    let name = &at_freeze.name;
    if let Some(failure) = &at_freeze.failure {
        return Err(format!("{name}: freeze failed: {}", failure.message));
    }
    let Some(at_thaw) = at_thaw else {
        return Err(format!("{name}: frozen, but no word of its thaw"));
    };
    if let Some(failure) = &at_thaw.failure {
        return Err(format!("{name}: thaw failed: {}", failure.message));
    }
    match at_thaw.held {
        Some(true) => {}
        Some(false) => return Err(format!("{name}: did not hold its writes")),
        None => return Err(format!("{name}: did not say whether it held its writes")),
    }
    // An application that holds its own writes must show the same position at both ends. One that leans on the file
    // system goes on writing until that is frozen, so its positions may differ.
    if hold == Some(Hold::App)
        && let Some(key) = differing_evidence(&at_freeze.evidence, &at_thaw.evidence)
    {
        return Err(format!(
            "{name}: its evidence `{key}` changed while it was frozen"
        ));
    }
    Ok(format!("{name}: held"))
}

/// The first member that both ends gave and that differs. What only one end gave cannot be compared.
fn differing_evidence(at_freeze: &Value, at_thaw: &Value) -> Option<String> {
    match (at_freeze, at_thaw) {
        (Value::Null, _) | (_, Value::Null) => None,
        (Value::Object(freeze), Value::Object(thaw)) => freeze
            .iter()
            .find(|(key, value)| thaw.get(*key).is_some_and(|other| other != *value))
            .map(|(key, _)| key.clone()),
        (freeze, thaw) => (freeze != thaw).then(|| "value".to_owned()),
    }
}

/// The host's side of the third witness: what disturbed the VM and what took too long, and what was in time.
fn check_host_times(said: &Observations<'_>) -> (Vec<String>, Vec<String>) {
    let mut objections: Vec<String> = said.disturbances.to_vec();
    let mut supports = Vec::new();
    let Some(clock) = said.clock else {
        objections.push("the host's clock was not read".to_owned());
        return (objections, supports);
    };
    let mut check =
        |what: &str, value_ms: f64, limit_ms: u64| match in_time(what, value_ms, limit_ms) {
            Ok(line) => supports.push(line),
            Err(line) => objections.push(line),
        };
    check("host: hold", clock.hold_ms, clock.hold_limit_ms);
    check("host: writers", clock.writers_ms, clock.writer_limit_ms);
    for commit in said.commits {
        #[allow(
            clippy::cast_precision_loss,
            reason = "a number for people, and limits are far below 2^52"
        )]
        let since_mark_ms = commit.committed.since_mark_us as f64 / 1000.0;
        check(
            &format!("{}: mark to commit", commit.control),
            since_mark_ms,
            clock.hold_limit_ms,
        );
    }
    (objections, supports)
}

/// A line that says so, or the objection.
fn in_time(what: &str, value_ms: f64, limit_ms: u64) -> Result<String, String> {
    // Limits are at most 60,000: exact in an f64.
    #[allow(
        clippy::cast_precision_loss,
        reason = "limits are far below 2^52 milliseconds"
    )]
    let inside = value_ms <= limit_ms as f64;
    let line = format!("{what} {value_ms:.1} ms of {limit_ms} ms");
    if inside {
        Ok(line)
    } else {
        Err(format!("{line}: too long"))
    }
}

fn hear_time(said: &Observations<'_>) -> Testimony {
    let (mut objections, mut supports) = check_host_times(said);
    let Some(clock) = said.clock else {
        return Testimony::from_objections(objections, supports);
    };
    match said.thawed {
        Some(thawed) => {
            #[allow(
                clippy::cast_precision_loss,
                reason = "a number for people, and limits are far below 2^52"
            )]
            let hold_ms = thawed.hold_ms as f64;
            match in_time("guest: hold", hold_ms, clock.hold_limit_ms) {
                Ok(line) => supports.push(line),
                Err(line) => objections.push(line),
            }
            if !thawed.held {
                objections.push(format!("guest: not held: {}", thawed.why_not));
            }
        }
        None => objections.push(format!(
            "guest: no word of its clock: {}",
            said.thaw_failure.unwrap_or("the agent did not say")
        )),
    }
    Testimony::from_objections(objections, supports)
}

/// What the stores counted.
fn hear_counts(said: &Observations<'_>) -> (Vec<String>, Vec<String>) {
    let mut objections = Vec::new();
    let mut supports = Vec::new();
    if said.commits.is_empty() {
        objections.push("nothing was committed".to_owned());
    }
    for commit in said.commits {
        if commit.committed.volumes.len() != commit.volumes.len() {
            objections.push(format!(
                "{}: {} volumes asked, {} answered",
                commit.control,
                commit.volumes.len(),
                commit.committed.volumes.len()
            ));
        }
        for volume in &commit.committed.volumes {
            let name = &volume.snapshot.volume;
            let count = &volume.writes_in_window;
            if count.total() == 0 {
                supports.push(format!("{name}: no write in the window"));
            } else {
                let place = count.first.map_or(String::new(), |range| {
                    format!(
                        ", the first {} bytes at byte {}",
                        range.length_bytes, range.offset_bytes
                    )
                });
                objections.push(format!(
                    "{name}: {} writes, {} write-zeroes, {} discards in the window{place}",
                    count.writes, count.write_zeroes, count.discards
                ));
            }
        }
    }
    (objections, supports)
}

fn hear_host(said: &Observations<'_>, frozen: &Frozen) -> Testimony {
    let (mut objections, mut supports) = hear_counts(said);
    // The guest names the areas that are not watched. It may not so blind the host to what it says it froze.
    for extent in &frozen.exempt {
        let blinded = frozen
            .filesystems
            .iter()
            .filter(|report| report.result == FilesystemResult::Frozen)
            .find(|report| report.extents.iter().any(|e| overlap(e, extent)));
        match blinded {
            Some(report) => objections.push(format!(
                "{}: lies in an area that the guest asked not to watch",
                report.mountpoint
            )),
            None => supports.push(format!(
                "{}: {} bytes at byte {} are not watched",
                extent.disk, extent.length_bytes, extent.start_bytes
            )),
        }
    }
    Testimony::from_objections(objections, supports)
}

fn overlap(a: &DiskExtent, b: &DiskExtent) -> bool {
    a.serial == b.serial
        && a.disk == b.disk
        && a.start_bytes < b.start_bytes.saturating_add(b.length_bytes)
        && b.start_bytes < a.start_bytes.saturating_add(a.length_bytes)
}

#[cfg(test)]
mod tests;
