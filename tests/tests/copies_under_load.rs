//! The main job: sets taken under a running database, restored by booting a second machine on the copies.

use anyhow::{Result, ensure};
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::requires;
use vmshadow_tests::harness::site::Site;

#[test]
fn sets_of_both_methods_over_two_disks_restore_every_acknowledged_transaction() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let site = Site::start("copies", &[("a", FileSystem::Ext4), ("b", FileSystem::Xfs)])?;
    let load = site.load()?;
    site.sqlite_writer()?;
    let mut sets = Vec::new();
    for method in ["row", "cow", "row"] {
        let set = site.create(&["--method", method])?;
        for disk in 0..site.disks.len() {
            ensure!(set.answer.at(&format!("/copies/{disk}/method"))? == method);
        }
        for witness in ["filesystems", "writers", "time", "host"] {
            let said = set.answer.at(&format!("/witnesses/{witness}/value"))?;
            ensure!(said == "agrees", "{witness}: {said}");
        }
        sets.push(set);
        // Blocks change after each set: the copies below are read only when they differ from the disk.
        load.wait_for_more(60)?;
    }
    let acks = load.stop(&site.vm)?;
    let mut files = Vec::new();
    for (number, set) in sets.iter().enumerate() {
        files.extend(site.read_back(&set.answer, &format!("set{number}"))?);
    }
    let found = site.judge(&files)?;
    for (found, set) in found.chunks(site.disks.len()).zip(&sets) {
        site.compare(found, &acks, &set.window)?;
    }
    Ok(())
}
