//! Order of publication.

use super::InOrder;
use crate::engine::Outcome;

#[test]
fn nothing_is_published_before_what_arrived_earlier() {
    let mut order = InOrder::default();
    let memory = crate::engine::testing::memory();
    let answer = || Some(crate::frontend::request::testing::answer(&memory));
    let first = order.arrive(10, answer());
    let second = order.arrive(11, answer());
    let third = order.arrive(12, answer());
    let mut used = Vec::new();
    order.finish(third, Outcome::Done);
    order.finish(second, Outcome::Failed);
    assert_eq!(order.publish(|head, _| used.push(head)), 0);
    order.finish(first, Outcome::Done);
    assert_eq!(order.publish(|head, _| used.push(head)), 3);
    assert_eq!(used, [10, 11, 12]);
    assert_eq!(order.len(), 0);
}

#[test]
fn what_is_given_back_starts_at_the_first_unfinished_request() {
    let mut order = InOrder::default();
    let memory = crate::engine::testing::memory();
    let answer = || Some(crate::frontend::request::testing::answer(&memory));
    let first = order.arrive(1, answer());
    order.arrive(2, answer());
    let third = order.arrive(3, answer());
    order.finish(first, Outcome::Done);
    order.finish(third, Outcome::Done);
    assert_eq!(order.publish(|_, _| {}), 1);
    assert_eq!(order.give_back(), 2);
    assert_eq!(order.len(), 0);
    // A late report of a request that was given back does not touch a new one.
    let fourth = order.arrive(4, answer());
    order.finish(third, Outcome::Done);
    assert_eq!(order.publish(|_, _| {}), 0);
    order.finish(fourth, Outcome::Done);
    assert_eq!(order.publish(|_, _| {}), 1);
}
