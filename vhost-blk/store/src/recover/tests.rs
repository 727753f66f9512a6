//! What of a chain holds: the cases that histories reach seldom or never.

use super::*;
use crate::sim::memory_volume;
use crate::units::{Block, Epoch, LogBlock};
use crate::volume::OpenOptions;

fn slot() -> Superblock {
    let mut base = crate::sim::Image::default();
    base.set_len(1 << 20);
    let files = memory_volume(vec![base]);
    let options = OpenOptions {
        journal_prewritten_bytes: 0,
        ..OpenOptions::default()
    };
    let opened = crate::Volume::open_files(files.clone(), &options);
    assert!(opened.is_ok());
    match superblock::load(&*files.superblock) {
        Ok(SlotsFound::Valid { current, .. }) => *current,
        Ok(SlotsFound::Blank) | Err(_) => panic!("no slot"),
    }
}

fn sealed_map() -> Record {
    Record::Map {
        block: Block(3),
        count: 1,
        location: Location::Log(LogBlock(50_000)),
        epoch: Epoch(1),
        old: None,
        crc: Some(7),
    }
}

fn commit(through: u64, synced: u64, ordered: bool) -> Record {
    Record::Commit {
        through: Sequence(through),
        superblock: Generation(0),
        synced: Sequence(synced),
        ordered,
    }
}

/// A chain of records numbered from 1.
fn chain(records: Vec<Record>, incarnation: Incarnation) -> Vec<Entry> {
    let start = Record::Start {
        generation: Generation(0),
    };
    (1..)
        .zip(std::iter::once(start).chain(records))
        .map(|(number, record)| Entry {
            sequence: Sequence(number),
            incarnation,
            record,
        })
        .collect()
}

/// Whether record 2 holds after a power cut, what was dropped, and whether data is unconfirmed.
fn outcome(records: Vec<Record>, verifies: bool) -> (bool, u64, bool) {
    let slot = slot();
    let chain = chain(records, slot.incarnation);
    match decide(&chain, &slot, false, |_| Ok(verifies)) {
        Ok(decided) => (
            decided.kept.iter().any(|e| e.sequence == Sequence(2)),
            decided.dropped_records,
            decided.unconfirmed,
        ),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn last_round_holds_if_its_data_verifies_and_waits_for_confirmation() {
    let records = || vec![sealed_map(), commit(2, 1, false)];
    assert_eq!(outcome(records(), true), (true, 0, true));
    assert_eq!(outcome(records(), false), (false, 3, false));
}

#[test]
fn confirmed_data_is_not_asked_for_its_checksum() {
    let ordered = vec![sealed_map(), commit(2, 1, true)];
    assert_eq!(outcome(ordered, false), (true, 0, false));
    let named = vec![sealed_map(), commit(2, 1, false), commit(3, 3, false)];
    assert_eq!(outcome(named, false), (true, 0, false));
}

#[test]
fn restart_voids_a_commit_that_an_earlier_recovery_dropped() {
    let restart = Record::Restart {
        through: Sequence(1),
    };
    let records = vec![sealed_map(), commit(2, 1, false), restart];
    assert_eq!(outcome(records, true), (false, 0, false));
}

#[test]
fn killed_daemon_is_not_asked_for_checksums() {
    let slot = slot();
    let records = vec![sealed_map(), commit(2, 1, false), sealed_map()];
    let chain = chain(records, slot.incarnation);
    let decided = decide(&chain, &slot, true, |_| Ok(false));
    assert!(decided.is_ok_and(|decided| {
        decided.dropped_records == 0
            && decided
                .kept
                .iter()
                .filter(|e| e.record.data().is_some())
                .count()
                == 2
    }));
}
