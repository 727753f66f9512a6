//! How the habit is found. The clock is only read where its answer does not matter.

use super::{Duration, Habit, IN_FLIGHT_MAX, Polling, TRIAL_EVERY, TRIAL_EVERY_MAX};

const LONGEST: Duration = Duration::from_micros(32);

/// Judgements as a load makes them: a request takes `asleep_us` when the thread sleeps at once, `looking_us` when it looks. Answers how
/// many were of each habit.
fn judge(polling: &mut Polling, judgements: u32, asleep_us: u64, looking_us: u64) -> [u32; 2] {
    let mut spent = [0; 2];
    for _ in 0..judgements {
        let (place, request_us) = match polling.current {
            Habit::Sleep => (0, asleep_us),
            Habit::Look => (1, looking_us),
        };
        if let Some(count) = spent.get_mut(place) {
            *count += 1;
        }
        polling.judge(Duration::from_micros(request_us));
    }
    spent
}

#[test]
fn the_habit_with_which_more_is_done_is_kept() {
    for (asleep_us, looking_us, habit) in [
        (50, 30, Habit::Look),
        (30, 50, Habit::Sleep),
        (50, 49, Habit::Sleep),
        (50, 50, Habit::Sleep),
    ] {
        let mut polling = Polling::new(LONGEST);
        judge(&mut polling, 100, asleep_us, looking_us);
        assert_eq!(
            polling.better, habit,
            "{asleep_us} us asleep, {looking_us} us looking"
        );
    }
}

#[test]
fn trials_that_change_nothing_become_rare() {
    let mut polling = Polling::new(LONGEST);
    let [asleep, looking] = judge(&mut polling, 10 * TRIAL_EVERY_MAX, 20, 30);
    assert!(looking >= 10, "a habit is tried again");
    assert!(asleep / looking > 300, "{asleep} {looking}");
}

#[test]
fn the_other_habit_is_found_when_its_time_has_come() {
    let mut polling = Polling::new(LONGEST);
    judge(&mut polling, 4 * TRIAL_EVERY, 20, 30);
    assert_eq!(polling.better, Habit::Sleep);
    judge(&mut polling, 40 * TRIAL_EVERY_MAX, 20, 10);
    assert_eq!(polling.better, Habit::Look);
}

#[test]
fn another_load_is_judged_anew_at_once() {
    let mut polling = Polling::new(LONGEST);
    judge(&mut polling, 100 * TRIAL_EVERY, 20, 10);
    assert_eq!(polling.better, Habit::Look);
    // Sleeping would be better now; the old times of it, which were longer still, must not keep it from being tried.
    judge(&mut polling, 4, 3, 4);
    assert_eq!(polling.better, Habit::Sleep);
    judge(&mut polling, 4, 80, 40);
    assert_eq!(polling.better, Habit::Look);
}

#[test]
fn without_a_longest_while_there_is_no_looking() {
    let mut polling = Polling::new(Duration::ZERO);
    polling.current = Habit::Look;
    for _ in 0..10 {
        polling.worked(1);
        assert!(!polling.look_again(0));
    }
}

#[test]
fn with_many_requests_in_flight_there_is_no_looking() {
    let mut polling = Polling::new(Duration::from_secs(60));
    polling.current = Habit::Look;
    assert!(!polling.look_again(IN_FLIGHT_MAX + 1));
    assert!(polling.last_look.is_none());
}

#[test]
fn a_thread_with_nothing_to_do_ends_its_look_and_stays_asleep() {
    let mut polling = Polling::new(LONGEST);
    polling.current = Habit::Look;
    // Whether it looks at all depends on the machine's load; that it ends does not.
    while polling.look_again(0) {}
    assert!(polling.last_look.is_none(), "gives its place back");
    std::thread::sleep(LONGEST);
    assert!(!polling.look_again(0));
}

#[test]
fn what_was_not_looked_for_is_no_measure_of_looking() {
    let mut polling = Polling::new(LONGEST);
    polling.worked(1);
    assert!(polling.begin.is_some());
    assert!(!polling.look_again(IN_FLIGHT_MAX + 1));
    assert!(polling.begin.is_none());
}
