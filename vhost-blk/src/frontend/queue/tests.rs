//! What becomes known when a queue's thread dies.

use super::{Ask, Memory, Order, Shared, Stop, spawn};
use crate::engine::testing::volume_over;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vhost_blk_wire::event::Event;
use vm_memory::GuestMemoryMmap;

/// Runs `serve` as a queue's thread until it ends; answers the events, and what an order to it came to.
fn told(
    serve: impl FnOnce(&Receiver<Ask>) -> std::io::Result<()> + Send + 'static,
) -> (Vec<Event>, bool) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let notice = {
        let events = Arc::clone(&events);
        Arc::new(move |event| events.lock().unwrap().push(event))
    };
    let (volume, _directory) = volume_over("vda", 1 << 20, |base| base, notice);
    let (connection, mut front_end) = UnixStream::pair().unwrap();
    let shared = Arc::new(Shared {
        volume,
        memory: Memory::new(GuestMemoryMmap::new()),
        connection,
        poll_max: Duration::ZERO,
    });
    let (asks, incoming) = channel();
    let (done, answer) = sync_channel(1);
    let order = Order::Stop(Stop::Forget);
    asks.send(Ask { order, done }).unwrap();
    let thread = spawn(Arc::clone(&shared), 3, incoming, serve).unwrap();
    thread.join().unwrap();
    assert!(answer.recv().is_err(), "nobody obeyed");
    front_end.set_nonblocking(true).unwrap();
    let hung_up = matches!(front_end.read(&mut [0]), Ok(0));
    let events = events.lock().unwrap().clone();
    (events, hung_up)
}

#[test]
fn a_thread_that_dies_is_told_to_the_control_socket_and_to_the_front_end() {
    for panics in [true, false] {
        let (events, hung_up) = told(move |_| {
            assert!(!panics, "a defect");
            Err(std::io::ErrorKind::OutOfMemory.into())
        });
        assert!(
            matches!(events.as_slice(), [Event::QueueFailed { queue: 3, .. }]),
            "{events:?}"
        );
        assert!(hung_up);
    }
}

#[test]
fn a_thread_that_ends_in_order_is_not_told() {
    let (events, hung_up) = told(|_| Ok(()));
    assert_eq!(events, []);
    assert!(!hung_up);
}
