//! A daemon that is replaced by another under full load: the guest's connection, memory and rings go over, and it notices nothing but a
//! pause. A replacement that fails leaves the old daemon serving.

use super::Campaign;
use super::guest::Mix;
use super::victim::Victim;
use crate::harness::Daemon;
use rand::Rng;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use vhost_blk_wire::types::Method;

/// Nobody is killed: the guest waits for its answers.
static ALIVE: AtomicBool = AtomicBool::new(false);

impl Campaign {
    fn replacing(&self, more: &[&str]) -> Vec<String> {
        let mut arguments = self.arguments.clone();
        arguments.push("--replace".to_owned());
        arguments.extend(more.iter().map(|text| (*text).to_owned()));
        arguments
    }

    /// Keeps the rings full until so many more answers have come.
    fn load(&mut self, answers: u64) {
        let goal = self.guest.answered + answers;
        while self.guest.answered < goal {
            self.guest.offer(&mut self.random, Mix::All);
            assert!(self.guest.wait(&ALIVE));
        }
    }

    fn check(&mut self) {
        assert!(self.guest.finish(&ALIVE));
        assert!(self.guest.sweep(&mut self.random, &ALIVE));
        drop(self.requester.read_all(&self.control));
    }
}

fn served(seed: u64) -> (Campaign, Daemon) {
    let mut campaign = Campaign::new(seed);
    let daemon = Daemon::launch(campaign.arguments.clone());
    let victim = Victim::new(&daemon);
    assert!(super::connect(
        &mut campaign.guest,
        &campaign.socket,
        &victim
    ));
    (campaign, daemon)
}

#[test]
fn a_guest_under_load_notices_nothing_of_a_replacement_but_a_pause() {
    let (mut campaign, mut daemon) = served(11);
    campaign.load(500);
    let before = campaign.guest.reset_stall();
    let mut stalls = Vec::new();
    for round in 0..6 {
        let method = if round % 2 == 0 {
            Method::Row
        } else {
            Method::Cow
        };
        campaign.requester.take_one(&campaign.control, method);
        let mut next = Daemon::launch(campaign.replacing(&[]));
        let status = loop {
            campaign.load(1);
            next.assert_running();
            if let Some(status) = daemon.ended() {
                break status;
            }
        };
        assert!(status.success(), "{status}");
        daemon = next;
        campaign.load(200);
        stalls.push(campaign.guest.reset_stall());
        campaign.check();
        campaign.guest.reset_stall();
    }
    println!("longest stall of the guest: {before:.1?} without, {stalls:.1?} with a replacement");
    campaign.guest.stop();
    assert!(daemon.terminate().success());
}

#[test]
fn a_replacement_that_cannot_serve_leaves_the_old_daemon_serving() {
    let (mut campaign, mut daemon) = served(12);
    campaign.load(200);
    campaign.requester.take_one(&campaign.control, Method::Row);
    for more in [
        // Refused when it asks.
        vec!["--shadow-storage", "/nonexistent/elsewhere"],
        // Noticed when the disks were given and opened.
        vec!["--num-queues", "3"],
    ] {
        let mut next = Daemon::launch(campaign.replacing(&more));
        let status = loop {
            campaign.load(1);
            if let Some(status) = next.ended() {
                break status;
            }
        };
        assert_eq!(status.code(), Some(1), "{more:?}");
        campaign.load(200);
        daemon.assert_running();
        campaign.check();
    }
    campaign.guest.stop();
    assert!(daemon.terminate().success());
}

#[test]
fn a_replacement_that_is_killed_at_any_moment_leaves_one_that_serves_or_a_connection_that_closes() {
    let (mut campaign, mut daemon) = served(13);
    let (mut killed, mut went_on) = (0, 0);
    for _ in 0..12 {
        campaign.load(50);
        campaign.requester.take_one(&campaign.control, Method::Cow);
        let mut next = Daemon::launch(campaign.replacing(&[]));
        let victim = Victim::new(&next);
        let time = Duration::from_micros(campaign.random.random_range(0..120_000));
        victim.kill_after(time);
        next.wait();
        // The old one has ended if it heard that it was replaced; it cannot hear that any more.
        killed += 1;
        // What was answered so far may be the killed one's work and says nothing of the old one; and it may be all that was asked for.
        campaign.guest.take();
        campaign.guest.offer(&mut campaign.random, Mix::All);
        if campaign.guest.settled(&mut daemon) {
            went_on += 1;
        } else {
            campaign.guest.disconnect();
            campaign.guest.take();
            campaign.oracle.lock().unwrap().killed();
            daemon = Daemon::launch(campaign.arguments.clone());
            let victim = Victim::new(&daemon);
            assert!(super::connect(
                &mut campaign.guest,
                &campaign.socket,
                &victim
            ));
        }
        campaign.load(50);
        campaign.check();
    }
    println!("of {killed} replacements killed: the old one went on {went_on} times");
    campaign.guest.stop();
    assert!(daemon.terminate().success());
}
