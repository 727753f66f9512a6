//! How the while is learned. The clock is only read where its answer does not matter.

use super::{Duration, Polling};

const LONGEST: Duration = Duration::from_micros(32);

fn after(gaps_us: &[u64]) -> Duration {
    let mut polling = Polling::new(LONGEST);
    for gap in gaps_us {
        polling.learn(Duration::from_micros(*gap));
    }
    polling.current
}

#[test]
fn the_while_grows_with_gaps_that_looking_would_have_met_up_to_the_longest() {
    assert_eq!(after(&[]), Duration::ZERO, "looking has to earn its first");
    assert_eq!(after(&[10]), Duration::from_micros(4));
    assert_eq!(after(&[10, 10]), Duration::from_micros(8));
    assert_eq!(after(&[10, 10, 10]), Duration::from_micros(16));
    assert_eq!(
        after(&[10; 20]),
        Duration::from_micros(16),
        "no more than it takes"
    );
    assert_eq!(after(&[31; 20]), LONGEST);
}

#[test]
fn gaps_that_outlast_the_longest_while_end_it_soon() {
    let mut gaps = vec![31; 10];
    gaps.push(1_000);
    assert_eq!(after(&gaps), Duration::from_micros(8));
    gaps.push(1_000);
    assert_eq!(after(&gaps), Duration::from_micros(2));
    gaps.push(1_000);
    assert_eq!(after(&gaps), Duration::ZERO);
}

#[test]
fn without_a_longest_while_there_is_no_looking() {
    let mut polling = Polling::new(Duration::ZERO);
    for _ in 0..10 {
        polling.worked();
        assert!(!polling.look_again());
    }
}

#[test]
fn a_thread_with_nothing_to_do_ends_its_look_and_stays_asleep() {
    let mut polling = Polling::new(LONGEST);
    polling.current = LONGEST;
    // Whether it looks at all depends on the machine's load; that it ends does not.
    while polling.look_again() {}
    assert!(polling.last_look.is_none(), "gives its place back");
    std::thread::sleep(LONGEST);
    assert!(!polling.look_again());
    polling.worked();
    assert_eq!(polling.current, LONGEST / 4);
}
