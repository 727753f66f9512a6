//! The judge finds what a daemon could do wrong, and nothing in what it may do.

use super::{Kind, Oracle, SECTOR_BYTES, content};

fn image(shows: &[u64]) -> Vec<u8> {
    shows
        .iter()
        .enumerate()
        .flat_map(|(sector, change)| match change {
            0 => [0; SECTOR_BYTES],
            change => content(*change, sector),
        })
        .collect()
}

fn read(oracle: &mut Oracle, shows: &[u64]) -> Result<(), String> {
    let begun = oracle.begin_read();
    oracle.end_read(begun, 0, &image(shows))
}

#[test]
fn an_acknowledged_write_that_is_lost_is_found() {
    let mut oracle = Oracle::new(2);
    let one = oracle.ask(Kind::Write, 0, 2);
    assert!(read(&mut oracle, &[0, one]).is_ok(), "not answered: either");
    oracle.answer(one);
    assert!(read(&mut oracle, &[one, one]).is_ok());
    assert!(read(&mut oracle, &[0, one]).is_err());
}

#[test]
fn a_write_that_lands_again_after_a_newer_one_is_found() {
    let mut oracle = Oracle::new(1);
    let one = oracle.ask(Kind::Write, 0, 1);
    oracle.answer(one);
    let two = oracle.ask(Kind::Write, 0, 1);
    oracle.answer(two);
    assert!(read(&mut oracle, &[one]).is_err());
    assert!(read(&mut oracle, &[two]).is_ok());
}

#[test]
fn of_two_writes_at_once_either_may_stay_but_not_one_after_the_other_was_seen_last() {
    let mut oracle = Oracle::new(1);
    let (one, two) = (oracle.ask(Kind::Write, 0, 1), oracle.ask(Kind::Write, 0, 1));
    oracle.answer(two);
    oracle.answer(one);
    assert!(read(&mut oracle, &[two]).is_ok());
    assert!(read(&mut oracle, &[one]).is_err());
}

#[test]
fn an_unanswered_write_that_was_seen_superseded_may_come_again_only_through_a_kill() {
    for killed in [false, true] {
        let mut oracle = Oracle::new(1);
        let one = oracle.ask(Kind::Write, 0, 1);
        assert!(read(&mut oracle, &[one]).is_ok());
        let two = oracle.ask(Kind::Write, 0, 1);
        oracle.answer(two);
        if killed {
            oracle.killed();
        }
        assert_eq!(read(&mut oracle, &[one]).is_ok(), killed);
    }
}

#[test]
fn a_write_that_a_kill_has_cut_does_not_come_again_after_what_was_asked_for_behind_it() {
    for answered in [false, true] {
        let mut oracle = Oracle::new(1);
        let one = oracle.ask(Kind::Write, 0, 1);
        oracle.killed();
        // Done by the dead daemon or by the living one.
        assert!(read(&mut oracle, &[one]).is_ok());
        let two = oracle.ask(Kind::Write, 0, 1);
        oracle.answer(two);
        if answered {
            oracle.answer(one);
        }
        assert!(read(&mut oracle, &[one]).is_err());
        assert!(read(&mut oracle, &[two]).is_ok());
    }
}

#[test]
fn an_answered_write_is_not_undone_by_a_kill() {
    let mut oracle = Oracle::new(1);
    let one = oracle.ask(Kind::Write, 0, 1);
    oracle.answer(one);
    oracle.killed();
    assert!(read(&mut oracle, &[0]).is_err());
}

#[test]
fn a_torn_sector_and_a_foreign_one_are_found() {
    let mut oracle = Oracle::new(2);
    let one = oracle.ask(Kind::Write, 0, 2);
    let mut torn = image(&[one, one]);
    torn[500] ^= 1;
    let begun = oracle.begin_read();
    assert!(oracle.end_read(begun, 0, &torn).is_err());
    let begun = oracle.begin_read();
    assert!(oracle.end_read(begun, 1, &image(&[one])).is_err());
}

#[test]
fn zeroes_count_and_a_discard_may_do_nothing() {
    let mut oracle = Oracle::new(2);
    let one = oracle.ask(Kind::Write, 0, 2);
    oracle.answer(one);
    let zero = oracle.ask(Kind::Zero, 0, 1);
    oracle.answer(zero);
    let discard = oracle.ask(Kind::Discard, 1, 1);
    oracle.answer(discard);
    assert!(read(&mut oracle, &[0, one]).is_ok());
    assert!(read(&mut oracle, &[one, one]).is_err());
    assert!(
        read(&mut oracle, &[0, 0]).is_err(),
        "it was seen to do nothing"
    );
}

#[test]
fn a_snapshot_is_one_moment() {
    let mut oracle = Oracle::new(2);
    let begun = oracle.begin_read();
    let one = oracle.ask(Kind::Write, 0, 1);
    oracle.answer(one);
    let two = oracle.ask(Kind::Write, 1, 1);
    oracle.answer(two);
    let instant = oracle.instant(begun);
    for good in [[0, 0], [one, 0], [one, two]] {
        oracle.judge(&instant, &image(&good)).unwrap();
    }
    assert!(
        oracle.judge(&instant, &image(&[0, two])).is_err(),
        "the second without the first"
    );
    let late = oracle.ask(Kind::Write, 0, 1);
    assert!(oracle.judge(&instant, &image(&[late, two])).is_err());
    let later = oracle.begin_read();
    let later = oracle.instant(later);
    assert!(oracle.judge(&later, &image(&[0, two])).is_err());
    assert!(oracle.judge(&later, &image(&[late, two])).is_ok());
}

#[test]
fn a_snapshot_holds_a_write_whole_or_not_at_all_unless_a_kill_cut_it() {
    for killed in [false, true] {
        let mut oracle = Oracle::new(2);
        let begun = oracle.begin_read();
        let one = oracle.ask(Kind::Write, 0, 2);
        let instant = oracle.instant(begun);
        if killed {
            oracle.killed();
        }
        assert!(oracle.judge(&instant, &image(&[one, one])).is_ok());
        assert!(oracle.judge(&instant, &image(&[0, 0])).is_ok());
        assert_eq!(oracle.judge(&instant, &image(&[0, one])).is_ok(), killed);
    }
}
