//! Revert, delete and settle: the disk becomes what it was, and in the end a plain raw file that needs nobody.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::oracle::{self, Found};
use vmshadow_tests::harness::qmp::Qmp;
use vmshadow_tests::harness::site::Site;
use vmshadow_tests::harness::vm::VmBuilder;
use vmshadow_tests::harness::{requires, wait};

fn reverted_and_settled(method: &str) -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let mut site = Site::start("reverts", &[("a", FileSystem::Ext4)])?;
    let load = site.load()?;
    site.sqlite_writer()?;
    load.wait_for_more(30)?;
    let taken = site.create(&["--method", method])?;
    load.wait_for_more(30)?;
    let newer = site.create(&["--method", method])?;
    load.wait_for_more(30)?;
    load.stop(&site.vm)?;
    let copy = site.read_back(&taken.answer, "copy")?;
    let set = taken.answer.at("/set")?.as_str().context("set")?.to_owned();

    let running = site.bridge.run(&["revert", &set])?;
    ensure!(
        running.code == 1,
        "a disk was turned back under a running machine: {running:#?}"
    );
    site.vm.shut_down()?;
    site.bridge.run(&["revert", &set])?.succeeded()?;
    let ids: Vec<_> = site
        .daemon
        .snapshots()?
        .iter()
        .map(|snapshot| snapshot["set"].clone())
        .collect();
    ensure!(
        ids == [json!(set)],
        "the newer set {:?} should be gone: {ids:?}",
        newer.answer.at("/set")?
    );

    let again = VmBuilder::new("reverted")
        .vhost_user("a", &site.daemon.socket("a"))
        .mounted("/mnt/a", FileSystem::Ext4)
        .boot()
        .with_context(|| site.daemon.log())?;
    let reverted = oracle::open_database(&again, "/mnt/a/load.db")?;
    again.shut_down()?;
    let [expected] = <[Found; 1]>::try_from(oracle::judge(&[oracle::Restored {
        image: &copy[0],
        file_system: FileSystem::Ext4,
        database: "load.db",
    }])?)
    .map_err(|found| anyhow::anyhow!("{found:?}"))?;
    ensure!(
        expected.integrity == "ok" && expected.count == expected.last && expected.last >= 30,
        "{expected:?}"
    );
    ensure!(
        reverted == expected,
        "reverted disk {reverted:?}, copy {expected:?}"
    );

    site.bridge.run(&["delete", &set])?.succeeded()?;
    let mut control = Qmp::connect(site.daemon.control())?;
    wait::until("the disk to settle into its base", wait::STEP, || {
        let volumes = control.execute("query-volumes", json!({}))?;
        let plain = volumes.pointer("/0/plain").and_then(Value::as_bool);
        Ok((plain == Some(true)).then_some(()))
    })?;
    drop(control);
    site.daemon.stop()?;
    // The reverted machine was the last to close the database: its log is in it.
    let expected = Found {
        size: expected.size.map(|size| oracle::Size {
            wal_bytes: 0,
            ..size
        }),
        ..expected
    };
    // Nobody serves it any more: QEMU opens the file itself.
    let plain = oracle::judge(&[oracle::Restored {
        image: &site.disks[0].base,
        file_system: FileSystem::Ext4,
        database: "load.db",
    }])?;
    ensure!(
        plain == [expected.clone()],
        "plain file {plain:?}, expected {expected:?}"
    );
    Ok(())
}

#[test]
fn a_redirected_disk_reverts_and_settles_into_a_plain_file() -> Result<()> {
    reverted_and_settled("row")
}

#[test]
fn a_copied_disk_reverts_and_settles_into_a_plain_file() -> Result<()> {
    reverted_and_settled("cow")
}
