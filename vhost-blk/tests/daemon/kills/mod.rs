//! kill -9 under full load, again and again: each request takes effect once, each snapshot is what the disk was at its instant.
//!
//! A guest with 80 requests of all kinds in flight on two queues, a requester that takes, reads and deletes snapshots of
//! both methods, and a daemon that lives for some milliseconds at a time. `VMSHADOW_KILLS=N` sets the number of kills.

mod guest;
mod late_io;
mod oracle;
mod replacement;
mod requester;
mod slow_device;
mod victim;

use crate::harness::{Daemon, PATIENCE, Scratch};
use guest::{Guest, Mix};
use oracle::{Oracle, SECTOR_BYTES};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use requester::Requester;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use victim::Victim;

/// Size of the disk: small, so that requests meet.
const SECTORS: usize = 16 * 1024;

/// How the daemon's next life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    /// While it starts and takes up what its predecessor left.
    Starting,
    /// Under load.
    Loaded,
    /// The same, after everything was answered, and disk and snapshots were read.
    Swept,
}

struct Campaign {
    arguments: Vec<String>,
    socket: PathBuf,
    control: PathBuf,
    oracle: Arc<Mutex<Oracle>>,
    guest: Guest,
    requester: Requester,
    random: SmallRng,
    scratch: Scratch,
}

impl Campaign {
    fn new(seed: u64) -> Self {
        let scratch = Scratch::new();
        let disk = scratch.disk("disk.raw", (SECTORS * SECTOR_BYTES) as u64);
        Self::on(seed, scratch, &disk)
    }

    /// On a disk of zeroes that is there.
    fn on(seed: u64, scratch: Scratch, disk: &Path) -> Self {
        let (socket, control) = (scratch.path("socket"), scratch.path("control"));
        let arguments = [
            ("--name", Path::new("disk")),
            ("--disk", disk),
            ("--socket", &socket),
            ("--control", &control),
        ]
        .iter()
        .flat_map(|(flag, path)| [(*flag).to_owned(), path.display().to_string()])
        .collect();
        let oracle = Arc::new(Mutex::new(Oracle::new(SECTORS)));
        Self {
            arguments,
            socket,
            control,
            guest: Guest::new(Arc::clone(&oracle), SECTORS),
            requester: Requester::new(Arc::clone(&oracle), seed + 1),
            oracle,
            random: SmallRng::seed_from_u64(seed),
            scratch,
        }
    }

    /// Starts a daemon, lets it live and kills it.
    fn live(&mut self, life: Life) {
        let mut daemon = Daemon::launch(self.arguments.clone());
        let victim = Victim::new(&daemon);
        let (guest, requester, random) = (&mut self.guest, &mut self.requester, &mut self.random);
        let (socket, control) = (&self.socket, &self.control);
        std::thread::scope(|scope| {
            if life == Life::Starting {
                let time = Duration::from_micros(random.random_range(0..40_000));
                let victim = &victim;
                scope.spawn(move || victim.kill_within(time));
            }
            if !connect(guest, socket, &victim) {
                return;
            }
            if life == Life::Swept {
                guest.finish(&victim.killed);
                guest.sweep(random, &victim.killed);
                requester.read_all(control);
            }
            if life != Life::Starting {
                let time = Duration::from_millis(random.random_range(5..250));
                let victim = &victim;
                scope.spawn(move || victim.kill_within(time));
            }
            let requester = scope.spawn(|| requester.work(control, &victim));
            let mix = if random.random_bool(0.3) {
                Mix::Writes
            } else {
                Mix::All
            };
            loop {
                guest.offer(random, mix);
                if !guest.wait(&victim.killed) {
                    break;
                }
            }
            requester.join().unwrap();
        });
        assert!(victim.is_killed());
        let status = daemon.wait();
        assert!(
            !status.success() && status.code().is_none(),
            "killed, not ended by itself: {status}"
        );
        // What it has answered with its last breath counts.
        guest_ends(&mut self.guest);
        self.oracle.lock().unwrap().killed();
    }

    /// The last daemon is left alone: everything is answered, everything is read, and it ends in order.
    fn end(&mut self) {
        for _ in 0..2 {
            let daemon = Daemon::launch(self.arguments.clone());
            let victim = Victim::new(&daemon);
            assert!(connect(&mut self.guest, &self.socket, &victim));
            assert!(self.guest.finish(&victim.killed));
            assert!(self.guest.sweep(&mut self.random, &victim.killed));
            self.requester.end(&self.control);
            assert!(self.guest.sweep(&mut self.random, &victim.killed));
            self.guest.stop();
            assert!(daemon.terminate().success());
        }
    }
}

fn guest_ends(guest: &mut Guest) {
    guest.disconnect();
    guest.take();
}

/// Connects as soon as the daemon listens; false if it was killed before.
fn connect(guest: &mut Guest, socket: &Path, victim: &Victim) -> bool {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match guest.connect(socket) {
            Ok(()) => return true,
            Err(_) if victim.is_killed() => return false,
            Err(error) => assert!(Instant::now() < deadline, "no connection: {error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn kills() -> u32 {
    std::env::var("VMSHADOW_KILLS")
        .ok()
        .map_or(50, |text| text.parse().expect("VMSHADOW_KILLS is a number"))
}

#[test]
fn every_request_takes_effect_once_however_often_the_daemon_is_killed() {
    let (kills, begin) = (kills(), Instant::now());
    let mut campaign = Campaign::new(u64::from(kills));
    for number in 0..kills {
        let life = match campaign.random.random_range(0..10) {
            _ if number % 10 == 9 => Life::Swept,
            0..2 => Life::Starting,
            _ => Life::Loaded,
        };
        campaign.live(life);
    }
    campaign.end();
    let tracked = if campaign.guest.is_tracked() {
        "requests in flight tracked"
    } else {
        "answered in order"
    };
    println!(
        "kills: {kills} in {:.0?}, {tracked}: {} requests answered once each; sets: {:?}",
        begin.elapsed(),
        campaign.guest.answered,
        campaign.requester.tally,
    );
}
