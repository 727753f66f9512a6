//! Holding, draining and the deadline.

use super::Barrier;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

fn later() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

#[test]
fn a_held_barrier_lets_no_write_in_until_released() {
    let barrier = Barrier::new();
    let hold = barrier.hold(later()).unwrap();
    assert!(barrier.enter().is_none());
    assert!(barrier.is_intact(hold));
    assert!(barrier.release(hold));
    assert!(barrier.enter().is_some());
    assert!(!barrier.is_intact(hold), "a released hold is over");
}

#[test]
fn draining_waits_for_the_last_write_in_flight() {
    let barrier = Barrier::new();
    let ticket = barrier.enter().unwrap();
    let hold = barrier.hold(later()).unwrap();
    let (drained, is_drained) = channel();
    let waiting = Arc::clone(&barrier);
    let waiter = thread::spawn(move || drained.send(waiting.drain(hold)).unwrap());
    assert!(is_drained.try_recv().is_err());
    drop(ticket);
    assert!(is_drained.recv_timeout(Duration::from_secs(10)).unwrap());
    waiter.join().unwrap();
}

#[test]
fn a_write_that_comes_after_the_deadline_breaks_the_hold() {
    let barrier = Barrier::new();
    let hold = barrier.hold(Instant::now()).unwrap();
    let ticket = barrier.enter();
    assert!(ticket.is_some());
    assert!(!barrier.is_intact(hold));
    assert!(!barrier.release(hold));
}

#[test]
fn draining_gives_up_at_the_deadline() {
    let barrier = Barrier::new();
    let _ticket = barrier.enter().unwrap();
    let hold = barrier
        .hold(Instant::now() + Duration::from_millis(20))
        .unwrap();
    assert!(!barrier.drain(hold));
}

#[test]
fn a_deadline_alone_breaks_the_hold_even_if_no_write_came() {
    let barrier = Barrier::new();
    let hold = barrier.hold(Instant::now()).unwrap();
    assert!(!barrier.is_intact(hold));
    assert!(!barrier.release(hold));
}

#[test]
fn a_second_hold_is_refused_and_an_old_name_does_not_end_a_new_hold() {
    let barrier = Barrier::new();
    let first = barrier.hold(later()).unwrap();
    assert!(barrier.hold(later()).is_none());
    assert!(barrier.release(first));
    let second = barrier.hold(later()).unwrap();
    assert!(!barrier.release(first));
    assert!(barrier.is_intact(second));
}
