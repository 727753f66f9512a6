//! A disk grows under a running machine and its load: the guest sees the new capacity and uses it, a snapshot from before stays what it
//! was, and a daemon that comes back, or takes over, goes on telling.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vmshadow_tests::harness::disk::{EXT4_BYTES, FileSystem};
use vmshadow_tests::harness::qmp::Qmp;
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::{requires, wait};

/// Not a whole number of the store's blocks, so that the last one is short and grows, too.
const STEP_BYTES: u64 = (32 << 20) + 1536;
/// What the guest writes behind the old end.
const WORD: &str = "grown";
const WORDS_BYTES: u64 = 64 << 10;

/// Grows the disk by a step, and waits until the guest sees it: its size now.
fn grow(site: &Site, size_bytes: u64) -> Result<u64> {
    let wanted = size_bytes + STEP_BYTES;
    let mut control = Qmp::connect(site.daemon.control())?;
    let resized = control.execute("block_resize", json!({ "volume": "a", "size": wanted }))?;
    ensure!(resized["size-bytes"] == json!(wanted), "{resized}");
    println!("{wanted} bytes: writes held for {} us", resized["hold-us"]);
    let sectors = (wanted / 512).to_string();
    wait::until("the guest to see the new size", wait::STEP, || {
        let seen = site.vm.shell("cat /sys/block/vda/size")?;
        Ok((seen.trim() == sectors).then_some(()))
    })
    .with_context(|| site.log())?;
    Ok(wanted)
}

/// The guest writes words right behind `end_bytes` of its disk, through to the disk.
fn write_behind(site: &Site, end_bytes: u64) -> Result<()> {
    let (sector, count) = (end_bytes / 512, WORDS_BYTES / 512);
    site.vm.shell(&format!(
        "yes {WORD} | head -c {WORDS_BYTES} | dd of=/dev/vda bs=512 seek={sector} count={count} conv=notrunc,fsync 2>/dev/null"
    ))?;
    Ok(())
}

/// What a copy has behind `end_bytes`: the words, then zeroes.
fn shows_words(copy: &Path, end_bytes: u64, size_bytes: u64) -> Result<()> {
    let bytes = fs::read(copy)?;
    ensure!(
        bytes.len() as u64 == size_bytes,
        "a copy of {} bytes",
        bytes.len()
    );
    let behind = bytes.split_at(usize::try_from(end_bytes)?).1;
    let (words, rest) = behind.split_at(usize::try_from(WORDS_BYTES)?);
    let word = format!("{WORD}\n");
    ensure!(
        words.iter().zip(word.bytes().cycle()).all(|(a, b)| *a == b),
        "what the guest wrote behind {end_bytes} is not in the copy"
    );
    ensure!(
        rest.iter().all(|byte| *byte == 0),
        "new room that is not zeroes"
    );
    Ok(())
}

fn grows_under_load(method: &str) -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let mut site = Site::start("grows", &[("a", FileSystem::Ext4)])?;
    let load = site.load()?;
    site.sqlite_writer()?;
    let before = site.create(&["--method", method])?;
    load.wait_for_more(20)?;
    let first = grow(&site, EXT4_BYTES)?;
    load.wait_for_more(20)?;
    write_behind(&site, EXT4_BYTES)?;
    let after = site.create(&["--method", method])?;
    load.wait_for_more(20)?;

    // The machine goes on with another daemon, and with one that comes after a kill: both find the channel.
    site.daemon.replace()?;
    let second = grow(&site, first)?;
    site.daemon.kill()?;
    site.daemon.restart()?;
    let third = grow(&site, second)?;
    load.wait_for_more(20)?;
    write_behind(&site, second)?;
    let last = site.create(&["--method", method])?;
    load.wait_for_more(20)?;
    let acks = load.stop(&site.vm)?;

    let mut files = Vec::new();
    for (name, set) in [("before", &before), ("after", &after), ("last", &last)] {
        files.extend(site.read_back(&set.answer, name)?);
    }
    let [old, new, newest] = files.as_slice() else {
        anyhow::bail!("{files:?}");
    };
    ensure!(fs::metadata(old)?.len() == EXT4_BYTES, "the size it had");
    shows_words(new, EXT4_BYTES, first)?;
    shows_words(newest, second, third)?;
    let found = site.judge(&files)?;
    for (found, set) in found.chunks(1).zip([&before, &after, &last]) {
        site.compare(found, &acks, &set.window)?;
    }
    Ok(())
}

#[test]
fn a_redirected_disk_grows_under_load() -> Result<()> {
    grows_under_load("row")
}

#[test]
fn a_copied_disk_grows_under_load() -> Result<()> {
    grows_under_load("cow")
}
