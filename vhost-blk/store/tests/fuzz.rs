//! Everything read from disk, edited behind its checksums: the inputs of `fuzz/`, made by a plain random loop.
//!
//! `VMSHADOW_FUZZ_SECONDS=N` goes on for so long with fresh inputs; a failing one is printed.
#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]
#![allow(clippy::cast_possible_truncation, reason = "volumes of a few blocks")]
#![allow(clippy::let_underscore_must_use, reason = "any answer is right")]

#[path = "../fuzz/edited_volume.rs"]
mod edited_volume;
mod harness;

use std::time::{Duration, Instant};

use edited_volume::{Target, run};
use harness::Tale;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

fn input(random: &mut SmallRng) -> Vec<u8> {
    let edits = [1, 1, 1, 2, 3, 8, 24][random.random_range(0..7)];
    (0..1 + edits * 8).map(|_| random.random()).collect()
}

fn seconds() -> Option<u64> {
    std::env::var("VMSHADOW_FUZZ_SECONDS").ok()?.parse().ok()
}

fn edit_at_random(target: Target) {
    let (mut tried, started) = (0_u64, Instant::now());
    let limit = seconds().map(Duration::from_secs);
    let mut random = SmallRng::seed_from_u64(if limit.is_some() {
        std::process::id().into()
    } else {
        1
    });
    while limit.map_or(tried < 1_500, |limit| started.elapsed() < limit) {
        let input = input(&mut random);
        let _tale = Tale(format!("{target:?}: {input:?}"));
        run(target, &input);
        tried += 1;
    }
    println!("{target:?}: {tried} inputs");
}

#[test]
fn edited_superblock_is_survived() {
    edit_at_random(Target::Superblock);
}

#[test]
fn edited_journal_is_survived() {
    edit_at_random(Target::Journal);
}

#[test]
fn edited_index_is_survived() {
    edit_at_random(Target::Index);
}

#[test]
fn edited_volume_is_survived() {
    edit_at_random(Target::Volume);
}
