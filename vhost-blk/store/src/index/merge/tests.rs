//! Tests of merging the index's runs.

use super::*;
use crate::units::LogBlock;

fn kept(rule: &MergeRule, versions: &[(u32, Location)]) -> Vec<(u32, Location)> {
    let mut kept = Vec::new();
    rule.keep(versions, |death, location| kept.push((death, location)));
    kept
}

fn log(number: u64) -> Location {
    Location::Log(LogBlock(number))
}

#[test]
fn versions_that_no_snapshot_sees_are_dropped() {
    let rule = MergeRule {
        epochs: vec![2, 5],
        revert_to: None,
        end: Block(u64::MAX),
        to_the_bottom: true,
    };
    let versions = [
        (2, log(1)),
        (3, log(2)),
        (5, log(3)),
        (6, log(4)),
        (LIVE, log(5)),
    ];
    // Snapshot 2 sees the first that died after 2: 3. Snapshot 5 sees 6. 2 and 5 are seen by nobody.
    assert_eq!(
        kept(&rule, &versions),
        [(3, log(2)), (6, log(4)), (LIVE, log(5))]
    );
}

#[test]
fn live_base_is_not_written() {
    let rule = MergeRule {
        epochs: vec![],
        revert_to: None,
        end: Block(u64::MAX),
        to_the_bottom: true,
    };
    assert_eq!(kept(&rule, &[(3, log(2)), (LIVE, Location::Base)]), []);
}

#[test]
fn live_base_hides_what_an_older_layer_may_hold() {
    let rule = MergeRule {
        epochs: vec![],
        revert_to: None,
        end: Block(u64::MAX),
        to_the_bottom: false,
    };
    let versions = [(3, log(2)), (LIVE, Location::Base)];
    assert_eq!(kept(&rule, &versions), [(LIVE, Location::Base)]);
}

#[test]
fn revert_makes_the_view_of_the_snapshot_live() {
    let rule = MergeRule {
        epochs: vec![1, 2],
        revert_to: Some(Epoch(2)),
        end: Block(u64::MAX),
        to_the_bottom: true,
    };
    let versions = [(2, log(1)), (3, log(2)), (4, log(3)), (LIVE, log(5))];
    assert_eq!(kept(&rule, &versions), [(2, log(1)), (LIVE, log(2))]);
    let untouched = [(2, log(1)), (LIVE, log(5))];
    assert_eq!(kept(&rule, &untouched), [(2, log(1)), (LIVE, log(5))]);
    let from_base = [(3, Location::Base), (LIVE, log(5))];
    assert_eq!(kept(&rule, &from_base), []);
}
