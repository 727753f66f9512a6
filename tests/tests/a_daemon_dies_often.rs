//! `vhost-blk` killed (-9) again and again under a real machine, with snapshots of both methods taken in between: the guest
//! reads back what it wrote, and no request fails or hangs. `VMSHADOW_QEMU_KILLS=N` sets the number of kills.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vmshadow_tests::harness::daemon::VhostBlk;
use vmshadow_tests::harness::disk::FileSystem;
use vmshadow_tests::harness::guest::Running;
use vmshadow_tests::harness::qmp::Qmp;
use vmshadow_tests::harness::requires;
use vmshadow_tests::harness::site::SiteDisk;
use vmshadow_tests::harness::vm::{Vm, VmBuilder};
use vmshadow_tests::harness::wait;

/// Snapshots that are kept at a time.
const KEPT_MAX: usize = 6;

/// A machine with one raw disk, and writers on it.
struct Rig {
    vm: Vm,
    daemon: VhostBlk,
    _directory: tempfile::TempDir,
}

impl Rig {
    fn start(name: &str) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("vmshadow-kills-")
            .tempdir()?;
        let base = directory.path().join("disk.raw");
        std::fs::File::create(&base)?.set_len(64 << 20)?;
        let disk = SiteDisk {
            name: "disk".to_owned(),
            file_system: FileSystem::Ext4,
            base,
        };
        let daemon = VhostBlk::start(directory.path(), &[disk])?;
        let machine = VmBuilder::new(name).vhost_user("disk", &daemon.socket("disk"));
        let vm = machine.boot().with_context(|| daemon.log())?;
        Ok(Self {
            vm,
            daemon,
            _directory: directory,
        })
    }

    fn write(&self) -> Result<Running> {
        self.vm
            .guest()?
            .start("exec guest-writers /dev/vda /tmp/stop")
    }

    fn requests(&self) -> Result<u64> {
        // Field 1 and 5 of the device's statistics: reads and writes that were answered.
        let text = self.vm.shell("cat /sys/block/vda/stat")?;
        let fields: Vec<u64> = text
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let (reads, writes) = (
            fields.first().context("reads")?,
            fields.get(4).context("writes")?,
        );
        Ok(reads + writes)
    }

    /// Waits until the device has answered more.
    fn wait_for_more(&self, writers: &Running, count: u64) -> Result<()> {
        let goal = self.requests()? + count;
        wait::until("the guest's requests to be answered", wait::STEP, || {
            ensure!(writers.still_runs(), "the writers have ended");
            Ok((self.requests()? >= goal).then_some(()))
        })
        .with_context(|| format!("{}\n{}", self.vm.log(), self.daemon.log()))
    }

    /// Takes a set, and deletes the oldest snapshot if there are many.
    fn take_set(&self, number: u32) -> Result<()> {
        let mut control = Qmp::connect(self.daemon.control())?;
        let set = format!("00000000-0000-4000-8000-{number:012}");
        let method = if number.is_multiple_of(2) {
            "row"
        } else {
            "cow"
        };
        control.execute(
            "snapshot-set-prepare",
            json!({"set": set, "volumes": ["disk"], "method": method}),
        )?;
        control.execute("snapshot-set-mark", json!({"set": set}))?;
        control.execute(
            "snapshot-set-commit",
            json!({"set": set, "limit-ms": 10_000}),
        )?;
        control.execute("snapshot-set-keep", json!({"set": set}))?;
        let kept = self.daemon.snapshots()?;
        if kept.len() > KEPT_MAX {
            let oldest = kept.first().and_then(|snapshot| snapshot.get("snapshot"));
            let oldest: &Value = oldest.context("snapshot")?;
            control.execute("snapshot-delete", json!({"snapshot": oldest}))?;
        }
        Ok(())
    }

    /// Ends the writers: how many requests they made, all of them right, and how long the slowest took.
    fn end(&self, writers: &Running) -> Result<(u64, Duration)> {
        self.vm.shell("touch /tmp/stop")?;
        let end = writers.wait(wait::STEP)?;
        ensure!(end.status == 0, "{end:?}\n{}", self.vm.log());
        let (requests, slowest_us) = end.stdout.trim().split_once(' ').context("two numbers")?;
        Ok((
            requests.parse()?,
            Duration::from_micros(slowest_us.parse()?),
        ))
    }
}

fn kills() -> u32 {
    std::env::var("VMSHADOW_QEMU_KILLS").ok().map_or(5, |text| {
        text.parse().expect("VMSHADOW_QEMU_KILLS is a number")
    })
}

#[test]
fn a_guest_reads_back_what_it_wrote_however_often_the_daemon_is_killed() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let mut rig = Rig::start("often")?;
    let writers = rig.write()?;
    rig.wait_for_more(&writers, 100)?;
    let (kills, begin) = (kills(), Instant::now());
    for number in 0..kills {
        rig.take_set(number)?;
        // A moment that differs from kill to kill, right behind the snapshot.
        std::thread::sleep(Duration::from_millis(u64::from(number) * 7 % 60));
        rig.daemon.kill()?;
        rig.daemon.restart()?;
        rig.wait_for_more(&writers, 50)
            .with_context(|| format!("kill {number}"))?;
    }
    let (requests, slowest) = rig.end(&writers)?;
    println!(
        "kills with QEMU: {kills} in {:.0?}, {requests} requests of the guest, every read right, the slowest took {slowest:.1?}",
        begin.elapsed()
    );
    rig.daemon.stop()
}

#[test]
fn a_guest_goes_on_while_the_daemon_is_replaced_by_another() -> Result<()> {
    if !requires::machines() {
        return Ok(());
    }
    let mut slowest = Vec::new();
    for replacements in [0, 4] {
        let mut rig = Rig::start("replaced")?;
        let writers = rig.write()?;
        rig.wait_for_more(&writers, 200)?;
        for number in 0..replacements {
            rig.take_set(number)?;
            rig.daemon.replace()?;
            rig.wait_for_more(&writers, 200)
                .with_context(|| format!("replacement {number}"))?;
            ensure!(
                !rig.daemon.log().contains("front end connected"),
                "QEMU has reconnected: {}",
                rig.daemon.log()
            );
        }
        rig.wait_for_more(&writers, 200)?;
        let (_, took) = rig.end(&writers)?;
        slowest.push(took);
        rig.daemon.stop()?;
    }
    println!("replacement with QEMU: slowest request without and with: {slowest:.1?}");
    Ok(())
}
