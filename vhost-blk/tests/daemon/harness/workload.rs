//! Writes that go on while snapshots are taken, and the model they are checked against.
//!
//! Each queue owns every n-th slot of the disk. A write fills a slot with its number, which rises with each
//! write of the queue. Writes are issued one after the other on each queue, so that a snapshot must show a prefix: if it shows
//! write n of a queue, it shows all before it that were not overwritten, and none after.

use super::{Disk, Queue};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// Bytes of one slot.
pub(crate) const SLOT_BYTES: usize = 8192;

/// Queues that write on threads of their own until stopped.
pub(crate) struct Workload {
    stop: Arc<AtomicBool>,
    /// Writes that were answered, by queue.
    pub(crate) answered: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<Queue>>,
    /// The connection that the queues belong to: they must not outlive it.
    disk: Disk,
}

/// What write `number` of a queue puts into its slot.
pub(crate) fn content(queue: usize, number: u64) -> Vec<u8> {
    let mut word = [0_u8; 16];
    word[..8].copy_from_slice(&number.to_le_bytes());
    word[8..].copy_from_slice(&(queue as u64 + 1).to_le_bytes());
    word.repeat(SLOT_BYTES / word.len())
}

/// Slot of write `number`: all slots of the queue in turn, in a scattered order.
pub(crate) fn slot(queue: usize, number: u64, queues: usize, slots_per_queue: u64) -> u64 {
    (number * 7 % slots_per_queue) * queues as u64 + queue as u64
}

impl Workload {
    /// Starts writing on every queue, from write 1 on, over `slots_per_queue` slots (not a multiple of 7).
    pub(crate) fn start(mut disk: Disk, slots_per_queue: u64) -> Self {
        assert!(!slots_per_queue.is_multiple_of(7));
        let stop = Arc::new(AtomicBool::new(false));
        let queues = std::mem::take(&mut disk.queues);
        let count = queues.len();
        let answered: Vec<_> = (0..count).map(|_| Arc::new(AtomicU64::new(0))).collect();
        let threads = queues
            .into_iter()
            .enumerate()
            .map(|(index, mut queue)| {
                let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered[index]));
                std::thread::spawn(move || {
                    for number in 1.. {
                        if stop.load(Ordering::SeqCst) {
                            break;
                        }
                        let offset =
                            slot(index, number, count, slots_per_queue) * SLOT_BYTES as u64;
                        queue.write(offset, &content(index, number)).unwrap();
                        answered.store(number, Ordering::SeqCst);
                    }
                    queue
                })
            })
            .collect();
        Self {
            stop,
            answered,
            threads,
            disk,
        }
    }

    pub(crate) fn answered(&self) -> Vec<u64> {
        self.answered
            .iter()
            .map(|count| count.load(Ordering::SeqCst))
            .collect()
    }

    /// Stops writing.
    pub(crate) fn stop(self) {
        drop(self);
    }
}

impl Drop for Workload {
    /// Also when a test fails: the queues must not outlive the connection.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            // What it panicked with was printed.
            if let Ok(queue) = thread.join() {
                self.disk.queues.push(queue);
            }
        }
    }
}

/// Checks that `image` shows of each queue one instant: what was answered before it is there, and of what was answered after it no
/// more than one that was on its way.
pub(crate) fn assert_shows_one_instant(
    image: &[u8],
    slots_per_queue: u64,
    before: &[u64],
    after: &[u64],
) {
    let shown = prefix_of(image, before.len(), slots_per_queue);
    assert_eq!(before.len(), after.len());
    for ((shown_up_to, before_it), after_it) in shown.iter().zip(before).zip(after) {
        assert!(before_it <= shown_up_to, "{before:?} {shown:?}");
        assert!(*shown_up_to <= after_it + 1, "{shown:?} {after:?}");
    }
}

/// Finds for each queue the write up to which `image` shows it, and checks that it shows exactly that.
pub(crate) fn prefix_of(image: &[u8], queues: usize, slots_per_queue: u64) -> Vec<u64> {
    let read = |slot: u64| {
        let start = usize::try_from(slot).unwrap() * SLOT_BYTES;
        &image[start..start + SLOT_BYTES]
    };
    (0..queues)
        .map(|queue| {
            let newest = (0..slots_per_queue)
                .map(|place| {
                    let bytes = read(place * queues as u64 + queue as u64);
                    u64::from_le_bytes(bytes[..8].try_into().unwrap())
                })
                .max()
                .unwrap();
            // The last write to each slot up to the newest has to be there, whole.
            let oldest = newest.saturating_sub(slots_per_queue) + 1;
            for number in oldest..=newest {
                let place = slot(queue, number, queues, slots_per_queue);
                assert_eq!(
                    read(place),
                    content(queue, number),
                    "queue {queue}: write {number} is torn or missing, but {newest} is there"
                );
            }
            newest
        })
        .collect()
}
