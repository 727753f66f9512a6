//! The relay does what its duty is, at every depth.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::*;
use crate::bench::job::Pattern;

const BLOCKS: u64 = 64;

fn pass(op: Op, depth: usize) -> Job {
    let area_bytes = BLOCKS * BLOCK_BYTES;
    Job {
        pattern: Pattern::Pass { area_bytes },
        ..Job::random(op, depth, area_bytes).limit(Duration::from_secs(60))
    }
}

fn file(directory: &Path, name: &str, byte: u8) -> Result<PathBuf> {
    let path = directory.join(name);
    fs::write(&path, vec![byte; usize::try_from(BLOCKS * BLOCK_BYTES)?])?;
    Ok(path)
}

/// Not on a tmpfs, where O_DIRECT may not be had.
fn directory() -> Result<tempfile::TempDir> {
    let parent = crate::harness::image::target().join("tmp");
    fs::create_dir_all(&parent)?;
    Ok(tempfile::tempdir_in(parent)?)
}

#[test]
fn every_block_is_written_once_at_any_depth() -> Result<()> {
    let directory = directory()?;
    for depth in [1, 2, 32, 63] {
        let base = file(directory.path(), "base", 0)?;
        let turn = Relay::over(&base).run(&pass(Op::Write, depth), 1)?;
        assert_eq!(turn.ios, BLOCKS);
        let written = fs::read(&base)?;
        assert!(written.iter().all(|byte| *byte == 0x5a), "depth {depth}");
        let turn = Relay::over(&base).run(&pass(Op::Read, depth), 1)?;
        assert_eq!(turn.ios, BLOCKS);
        assert!(turn.processor_us.is_some_and(|spent| spent > 0.0));
    }
    Ok(())
}

#[test]
fn one_that_copies_keeps_what_it_overwrites() -> Result<()> {
    let directory = directory()?;
    let base = file(directory.path(), "base", 7)?;
    let log = file(directory.path(), "log", 0)?;
    Relay::copying(&base, &log).run(&pass(Op::Write, 1), 1)?;
    assert!(fs::read(&log)?.iter().all(|byte| *byte == 7));
    assert!(fs::read(&base)?.iter().all(|byte| *byte == 0x5a));
    Ok(())
}

#[test]
fn a_request_behind_the_end_fails_the_round_and_hangs_nobody() -> Result<()> {
    let directory = directory()?;
    let base = file(directory.path(), "base", 0)?;
    for depth in [1, 32] {
        fs::File::options()
            .write(true)
            .open(&base)?
            .set_len(BLOCK_BYTES * 8)?;
        let error = Relay::over(&base).run(&pass(Op::Read, depth), 1);
        error.err().context("a round without an error")?;
    }
    Ok(())
}
