//! The gate between what is left and what is new.

use super::{Gate, Look};
use crate::engine::Kick;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::sync::Arc;
use std::time::Duration;

fn is_woken(kick: &Kick) -> bool {
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let woken = poll(&mut [PollFd::new(kick, PollFlags::IN)], Some(&at_once)).unwrap() == 1;
    kick.clear();
    woken
}

fn is_closed(look: Look) -> bool {
    matches!(look, Look::Closed { .. })
}

#[test]
fn with_nothing_left_it_is_open() {
    assert_eq!(Gate::new(vec![0, 0]).look(0, 0), Look::Open);
    assert_eq!(Gate::new(Vec::new()).look(3, 0), Look::Open);
}

#[test]
fn it_opens_when_the_last_queue_has_nothing_left_and_wakes_who_waits() {
    let gate = Gate::new(vec![2, 0, 1]);
    let wakes = [(); 3].map(|()| Arc::new(Kick::new().unwrap()));
    for (queue, left) in [(0, 2), (1, 0), (2, 1)] {
        gate.join(queue, left, &wakes[queue]);
        assert!(is_closed(gate.look(queue, left)));
    }
    assert!(is_closed(gate.look(0, 1)));
    assert!(is_closed(gate.look(2, 0)));
    assert!(!is_woken(&wakes[1]));
    assert_eq!(gate.look(0, 0), Look::Open);
    assert!(wakes.iter().all(|wake| is_woken(wake)));
    // What is new does not close it.
    assert_eq!(gate.look(1, 5), Look::Open);
    assert_eq!(gate.look(2, 0), Look::Open);
}

#[test]
fn a_queue_that_comes_says_what_it_really_has_left() {
    // The region named two that had been answered.
    let gate = Gate::new(vec![2, 0]);
    let wake = Arc::new(Kick::new().unwrap());
    gate.join(1, 0, &wake);
    assert!(is_closed(gate.look(1, 0)));
    gate.join(0, 0, &Arc::new(Kick::new().unwrap()));
    assert!(is_woken(&wake));
    assert_eq!(gate.look(1, 0), Look::Open);
}

#[test]
fn a_queue_that_leaves_keeps_nobody_out() {
    let gate = Gate::new(vec![2, 3]);
    let wake = Arc::new(Kick::new().unwrap());
    gate.join(1, 3, &wake);
    gate.leave(0);
    assert!(is_closed(gate.look(1, 3)));
    gate.leave(1);
    assert!(is_woken(&wake));
    assert_eq!(gate.look(1, 3), Look::Open);
}

#[test]
fn patience_ends_once_and_for_all() {
    let gate = Gate::with_patience(vec![2, 3], Duration::ZERO);
    let wake = Arc::new(Kick::new().unwrap());
    gate.join(1, 3, &wake);
    assert_eq!(gate.look(1, 2), Look::Overdue { left: 4 });
    assert!(is_woken(&wake));
    assert_eq!(gate.look(0, 2), Look::Open);
}

#[test]
fn progress_of_any_queue_buys_time_for_all() {
    let gate = Gate::new(vec![2, 3]);
    let until = |look| match look {
        Look::Closed { until } => until,
        Look::Open | Look::Overdue { .. } => panic!("{look:?}"),
    };
    let first = until(gate.look(0, 2));
    assert_eq!(until(gate.look(0, 2)), first);
    assert!(until(gate.look(1, 2)) > first);
}
