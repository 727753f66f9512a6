//! The rig before it is trusted to judge: machines boot from stock backends, the shell works on a
//! frozen machine, the load keeps its numbers, and the oracle sees a fault when there is one.
//!
//! Disks are served by `qemu-storage-daemon`, so none of this needs a program under test.

use anyhow::{Context, Result};
use vmshadow_tests::guest_protocol::Ack;
use vmshadow_tests::harness::daemon::StorageDaemon;
use vmshadow_tests::harness::disk::{self, FileSystem};
use vmshadow_tests::harness::load::Load;
use vmshadow_tests::harness::oracle::{self, Found, Restored, Window};
use vmshadow_tests::harness::requires;
use vmshadow_tests::harness::vm::VmBuilder;
use vmshadow_tests::harness::wait;

#[test]
fn a_machine_boots_from_stock_backends_and_its_database_survives_a_power_cut() -> Result<()> {
    if !requires::machines() || !requires::programs(&["qemu-storage-daemon"]) {
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let ext4 = disk::create(directory.path(), "ext4", FileSystem::Ext4)?;
    let xfs = disk::create(directory.path(), "xfs", FileSystem::Xfs)?;
    let (ext4_server, xfs_server) = (StorageDaemon::serve(&ext4)?, StorageDaemon::serve(&xfs)?);
    // The serial is qemu-storage-daemon's own and empty on 7.2, so it mounts by hand.
    let vm = VmBuilder::new("stock")
        .vhost_user("", ext4_server.socket())
        .vhost_user("", xfs_server.socket())
        .boot()?;
    eprintln!("ready after {} ms", vm.boot_time().as_millis());
    vm.shell("insmod /lib/modules/libcrc32c.ko && insmod /lib/modules/xfs.ko")?;
    vm.shell(
        "mkdir /mnt/a /mnt/b && mount -t ext4 /dev/vda /mnt/a && mount -t xfs /dev/vdb /mnt/b",
    )?;

    let load = Load::start(&vm, &["/mnt/a/load.db", "/mnt/b/load.db"])?;
    // The shell answers while a file system is frozen, the load stands still.
    vm.shell("fsfreeze --freeze /mnt/a")?;
    let stalled = vm.guest()?.start("touch /mnt/a/blocked")?;
    assert_eq!(vm.shell("echo alive")?, "alive\n");
    assert!(stalled.still_runs());
    vm.shell("fsfreeze --unfreeze /mnt/a")?;
    assert_eq!(stalled.wait(wait::STEP)?.status, 0);
    // Who has seen that a command is over can still ask how.
    let failed = vm.guest()?.start("echo why >&2; exit 3")?;
    wait::until("the command's end", wait::STEP, || {
        Ok((!failed.still_runs()).then_some(()))
    })?;
    let end = failed.wait(wait::STEP)?;
    assert_eq!((end.status, end.stderr.as_str()), (3, "why\n"));
    load.wait_for_more(20)?;

    let acks = load.acks();
    let last = |database| {
        acks.iter()
            .rev()
            .find(|ack| ack.database == database)
            .context("no ack")
    };
    let (last_a, last_b) = (last(0)?.id, last(1)?.id);
    vm.power_cut()?;
    drop((ext4_server, xfs_server));
    // Not a copy of a frozen disk: the journal is full, so e2fsck needs to replay it first.
    disk::run("e2fsck", &["-p"], &ext4).ok();
    let found = oracle::judge(&[
        Restored {
            image: &ext4,
            file_system: FileSystem::Ext4,
            database: "load.db",
        },
        Restored {
            image: &xfs,
            file_system: FileSystem::Xfs,
            database: "load.db",
        },
    ])?;
    for (found, last) in found.iter().zip([last_a, last_b]) {
        assert_eq!(found.integrity, "ok");
        assert_eq!(found.count, found.last);
        assert!(found.last >= last, "{last} was acknowledged, {found:?}");
    }
    Ok(())
}

/// Transactions of 10 ms each; number 6 stood still for 500 ms.
fn acks() -> Vec<Ack> {
    let ack = |id: u64| {
        let began_us = id * 10_000 + if id > 6 { 500_000 } else { 0 };
        let acked_us = id * 10_000 + 9_000 + if id >= 6 { 500_000 } else { 0 };
        Ack {
            database: 0,
            id,
            began_us,
            acked_us,
        }
    };
    (1..=20).map(ack).collect()
}

#[test]
fn the_oracle_accepts_only_a_copy_that_ends_at_the_stall() {
    let window = Window {
        asked_us: 30_000,
        answered_us: 600_000,
        hold_ms: 400,
    };
    let verdict = |last, count, integrity: &str| {
        let found = Found {
            last,
            count,
            integrity: integrity.to_owned(),
            size: None,
        };
        oracle::compare(&found, 0, &acks(), &window)
    };
    // 5 was acknowledged before the stall, 6 was in flight; both are true copies.
    verdict(5, 5, "ok").unwrap();
    verdict(6, 6, "ok").unwrap();
    assert!(
        verdict(1, 1, "ok").is_err(),
        "acknowledged before the request, and lost"
    );
    assert!(
        verdict(3, 3, "ok").is_err(),
        "acknowledged before the freeze, and lost"
    );
    assert!(
        verdict(8, 8, "ok").is_err(),
        "begun after the thaw, and there"
    );
    assert!(
        verdict(14, 14, "ok").is_err(),
        "begun after the answer, and there"
    );
    assert!(verdict(5, 4, "ok").is_err(), "a gap");
    assert!(
        verdict(5, 5, "row 7 missing from index").is_err(),
        "a damaged database"
    );
}
