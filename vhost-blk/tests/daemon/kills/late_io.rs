//! I/O of a killed daemon that is still under way: the next one waits for it, and serves only then.
//!
//! A write that the kernel holds outlives its process. If it could land after the next daemon has begun, it could bring back what a
//! newer, acknowledged write has replaced. FORMAT.md ("Files") says why it cannot: the request keeps the open file it goes to, and with
//! it the lock.

use super::Campaign;
use super::guest::Mix;
use super::slow_device::SlowDevice;
use super::victim::Victim;
use crate::harness::{Control, Daemon, Scratch, wait_until};
use std::path::Path;
use vhost_blk_wire::types::Method;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slow {
    Base,
    Log,
}

#[test]
fn a_daemon_waits_until_late_writes_of_its_killed_predecessor_to_the_base_have_landed() {
    waits_for_late_writes(Slow::Base);
}

#[test]
fn a_daemon_waits_until_late_writes_of_its_killed_predecessor_to_the_log_have_landed() {
    waits_for_late_writes(Slow::Log);
}

fn waits_for_late_writes(slow: Slow) {
    let scratch = Scratch::new();
    let mut device = match SlowDevice::new(&scratch.path(""), 96 << 20) {
        Ok(device) => device,
        Err(why) => {
            println!("skipped: no device that can be held: {why}");
            return;
        }
    };
    let (base, shadow) = match slow {
        Slow::Base => (device.path().to_owned(), scratch.path("shadow")),
        Slow::Log => {
            let upper = scratch.path("upper");
            device.with_file_system(&upper).unwrap();
            (scratch.disk("disk.raw", 8 << 20), upper.join("shadow"))
        }
    };
    let mut campaign = Campaign::on(7, scratch, &base);
    campaign.arguments.push("--shadow-storage".to_owned());
    campaign.arguments.push(shadow.display().to_string());

    let first = Daemon::launch(campaign.arguments.clone());
    let victim = Victim::new(&first);
    assert!(super::connect(
        &mut campaign.guest,
        &campaign.socket,
        &victim
    ));
    let set = Control::connect(&campaign.control).take_set(&["disk"], Method::Row);
    if slow == Slow::Base {
        // Without a snapshot the writes go to the base.
        let snapshot = set.volumes[0].snapshot.snapshot;
        let delete = vhost_blk_wire::command::SnapshotDelete { snapshot };
        Control::connect(&campaign.control).run(&delete).unwrap();
    }
    // Once over, so that the second time nothing has to be allocated or recorded.
    campaign.guest.offer(&mut campaign.random, Mix::Blocks);
    assert!(campaign.guest.finish(&victim.killed));

    let still = device.stand_still();
    campaign.guest.offer(&mut campaign.random, Mix::Blocks);
    wait_until("writes under way", || device.under_way() > 0);
    victim.kill();

    let told = campaign.scratch.path("told");
    let mut second = Daemon::launch_telling(campaign.arguments.clone(), &told);
    wait_until("the next daemon to meet the lock", || {
        second.assert_running();
        reads(&told).contains("waiting for the last I/O")
    });
    assert!(device.under_way() > 0, "the writes outlive their process");
    assert!(!reads(&told).contains("serving"));

    drop(still);
    let heir = Victim::new(&second);
    assert!(super::connect(&mut campaign.guest, &campaign.socket, &heir));
    campaign.guest.take();
    campaign.oracle.lock().unwrap().killed();
    // Newer ones to the same places, then everything is read.
    for _ in 0..4 {
        campaign.guest.offer(&mut campaign.random, Mix::Blocks);
        assert!(campaign.guest.finish(&heir.killed));
    }
    assert!(campaign.guest.sweep(&mut campaign.random, &heir.killed));
    campaign.guest.stop();
    assert!(second.terminate().success());
    drop(first);
}

fn reads(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}
