//! Orders of publication.

use super::{AlreadyInFlight, InFlight, Order};
use crate::engine::Outcome;

fn publish(requests: &mut InFlight) -> Vec<u16> {
    std::iter::from_fn(|| requests.next_finished())
        .map(|finished| finished.head)
        .collect()
}

#[test]
fn in_the_order_of_arrival_nothing_is_published_before_what_arrived_earlier() {
    let mut requests = InFlight::new(16, Order::OfArrival);
    let [first, second, third] = [10, 11, 12].map(|head| requests.arrive(head).unwrap());
    requests.finish(third, Outcome::Done);
    requests.finish(second, Outcome::Failed);
    assert_eq!(publish(&mut requests), [0_u16; 0]);
    assert_eq!(requests.len(), 3);
    requests.finish(first, Outcome::Done);
    assert_eq!(publish(&mut requests), [10, 11, 12]);
    assert!(requests.is_empty());
}

#[test]
fn in_the_order_of_completion_each_is_published_when_it_is_done() {
    let mut requests = InFlight::new(16, Order::OfCompletion);
    let [first, second, third] = [10, 11, 12].map(|head| requests.arrive(head).unwrap());
    requests.finish(third, Outcome::Done);
    requests.finish(first, Outcome::Done);
    assert_eq!(publish(&mut requests), [12, 10]);
    assert_eq!(requests.len(), 1);
    requests.finish(second, Outcome::Done);
    assert_eq!(publish(&mut requests), [11]);
}

#[test]
fn a_head_in_flight_cannot_arrive_again_and_a_published_one_can() {
    for order in [Order::OfArrival, Order::OfCompletion] {
        let mut requests = InFlight::new(16, order);
        let token = requests.arrive(3).unwrap();
        assert_eq!(requests.arrive(3), Err(AlreadyInFlight));
        assert_eq!(requests.arrive(16), Err(AlreadyInFlight), "not in the ring");
        requests.finish(token, Outcome::Done);
        requests.finish(token, Outcome::Done);
        assert_eq!(publish(&mut requests), [3], "once, however often it ends");
        // A late word about the old request does not touch the new one of the same head.
        let again = requests.arrive(3).unwrap();
        requests.finish(token, Outcome::Done);
        assert_eq!(publish(&mut requests), [0_u16; 0]);
        requests.finish(again, Outcome::Done);
        assert_eq!(publish(&mut requests), [3]);
    }
}
