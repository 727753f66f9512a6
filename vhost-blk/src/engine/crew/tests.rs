//! Work that waits for each other must all run at once, and a thread serves more than once.

use super::Crew;
use std::collections::HashSet;
use std::sync::{Arc, Barrier, Mutex};

#[test]
fn all_places_run_at_the_same_time_and_answer_in_order() {
    let crew = Crew::default();
    for _ in 0..3 {
        let meeting = Arc::new(Barrier::new(8));
        let results = crew.on_all(8, move |place| {
            meeting.wait();
            place * 10
        });
        let expected: Vec<_> = (0..8).map(|place| Some(place * 10)).collect();
        assert_eq!(results, expected);
    }
}

#[test]
fn threads_stand_for_the_next_round() {
    let crew = Crew::default();
    let seen = Arc::new(Mutex::new(HashSet::new()));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    for rounds in 1.. {
        let (noted, meeting) = (Arc::clone(&seen), Arc::new(Barrier::new(4)));
        crew.on_all(4, move |place| {
            if place > 0 {
                noted.lock().unwrap().insert(std::thread::current().id());
            }
            meeting.wait();
        });
        if seen.lock().unwrap().len() < 3 * rounds {
            return;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "each of {rounds} rounds had threads of its own"
        );
    }
}

#[test]
fn a_place_that_panics_answers_nothing_and_the_others_do() {
    let crew = Crew::default();
    let results = crew.on_all(3, |place| {
        assert!(place != 1, "as the test wants");
        place
    });
    assert_eq!(results, [Some(0), None, Some(2)]);
}
