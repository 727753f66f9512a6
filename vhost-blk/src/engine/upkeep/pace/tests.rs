//! The guest comes first, and work goes on.

use super::*;

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

#[test]
fn a_guest_at_work_leaves_a_tenth_and_one_at_rest_everything() {
    let start = Instant::now();
    let mut pace = Pace::new(start);
    assert_eq!(pace.look(start + ms(500), 10), Load::Busy, "ten came");
    assert_eq!(pace.look(start + ms(599), 10), Load::Busy, "just now");
    assert_eq!(pace.look(start + ms(600), 10), Load::Idle);
    assert_eq!(pace.look(start + ms(601), 11), Load::Busy, "at once");
    for took in [1, 5, 11] {
        let pause = Load::Busy.pause(ms(took));
        assert_eq!(pause, ms(9 * took));
        assert_eq!(Load::Idle.pause(ms(took)), ms(0));
    }
    assert!(Load::Busy.budget_blocks() < Load::Idle.budget_blocks());
}

#[test]
fn work_goes_on_however_slow_the_disk_is_and_at_full_speed_when_writes_wait() {
    assert_eq!(Load::Busy.pause(ms(60_000)), PAUSE_MAX);
    assert_eq!(Load::Busy.pause(Duration::ZERO), PAUSE_MIN);
    assert_eq!(Load::Pressing.pause(ms(60_000)), ms(0));
    assert!(Load::Pressing.budget_blocks() > Load::Idle.budget_blocks());
}

#[test]
fn counters_of_queues_count() {
    let arrivals = Arrivals::default();
    (0..3).for_each(|_| arrivals.note());
    assert_eq!(arrivals.count(), 3);
}

#[test]
fn work_without_hurry_takes_a_hundredth_of_a_busy_guests_time_and_all_of_an_idle_ones() {
    assert_eq!(
        Load::Busy.long_pause(Duration::from_micros(200)),
        Duration::from_millis(18)
    );
    assert_eq!(
        Load::Busy.long_pause(Duration::ZERO),
        Duration::from_millis(10)
    );
    assert_eq!(Load::Busy.long_pause(Duration::from_secs(1)), PAUSE_MAX);
    assert_eq!(
        Load::Idle.long_pause(Duration::from_secs(1)),
        Duration::ZERO
    );
}
