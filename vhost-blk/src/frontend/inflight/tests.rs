//! What recovery makes of a region: after every possible end of a daemon, and after a front end that lies.

use super::{
    BadRegion, BadTracking, ENTRIES_AT, LAST_BATCH_HEAD_AT, Recovered, Region, Tracker,
    USED_INDEX_AT, VERSION_AT, part_bytes,
};
use proptest::prelude::*;
use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vhost::vhost_user::message::VhostUserInflight;

const SIZE: u16 = 8;

fn region() -> (Arc<Region>, VhostUserInflight, File) {
    Region::create(&VhostUserInflight::new(0, 0, 2, SIZE)).unwrap()
}

fn poke(file: &File, queue: usize, field: usize, value: u16) {
    let place = queue * part_bytes(SIZE) + field;
    file.write_all_at(&value.to_le_bytes(), place as u64)
        .unwrap();
}

/// Another daemon maps the same memory.
fn next_daemon(shape: &VhostUserInflight, file: &File) -> Tracker {
    let region = Region::map(shape, file.try_clone().unwrap()).unwrap();
    Tracker::new(region, 1, SIZE).unwrap()
}

#[test]
fn the_layout_is_the_one_of_the_specification() {
    // What QEMU asks for two queues of 128, as other backends answer it.
    let wanted = VhostUserInflight::new(0, 0, 2, 128);
    let (region, answer, file) = Region::create(&wanted).unwrap();
    assert_eq!((answer.mmap_size, answer.mmap_offset), (4224, 0));
    assert_eq!(file.metadata().unwrap().len(), 4224);
    let mut tracker = Tracker::new(region, 1, 128).unwrap();
    assert_eq!(tracker.recover(7, 128), Ok(Recovered::Fresh));
    for head in [3, 100] {
        tracker.mark(head).unwrap();
    }
    tracker.batch(100).unwrap();
    tracker.clear(&[100], 8).unwrap();
    let mut bytes = vec![0; 2112];
    file.read_exact_at(&mut bytes, 2112).unwrap();
    // features, version, desc_num, last_batch_head, used_idx
    assert_eq!(
        bytes[..16],
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 128, 0, 100, 0, 8, 0]
    );
    let entry = |head: usize| bytes[16 + head * 16..][..16].to_vec();
    assert_eq!(entry(3), [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(entry(100), [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    let mut first = vec![0; 2112];
    file.read_exact_at(&mut first, 0).unwrap();
    assert!(first.iter().all(|byte| *byte == 0), "queue 0 is untouched");
}

#[test]
fn requests_come_back_in_the_order_in_which_they_were_fetched() {
    let (region, shape, file) = region();
    let mut tracker = Tracker::new(region, 1, SIZE).unwrap();
    tracker.recover(0, SIZE).unwrap();
    for head in [5, 2, 7, 0] {
        tracker.mark(head).unwrap();
    }
    let mut tracker = next_daemon(&shape, &file);
    let found = tracker.recover(0, SIZE).unwrap();
    assert_eq!(found, Recovered::InFlight(vec![5, 2, 7, 0]));
    // The numbers go on, so that a third daemon sees the whole order.
    tracker.mark(1).unwrap();
    let found = next_daemon(&shape, &file).recover(0, SIZE).unwrap();
    assert_eq!(found, Recovered::InFlight(vec![5, 2, 7, 0, 1]));
}

#[test]
fn memory_that_lies_is_refused() {
    let cases: [(usize, u16, u16, BadTracking); 6] = [
        (VERSION_AT, 2, 0, BadTracking::Version(2)),
        (
            ENTRIES_AT,
            SIZE - 1,
            0,
            BadTracking::Entries {
                entries: SIZE - 1,
                size: SIZE,
            },
        ),
        (
            ENTRIES_AT,
            u16::MAX,
            0,
            BadTracking::Entries {
                entries: u16::MAX,
                size: SIZE,
            },
        ),
        (USED_INDEX_AT, 1, 0, BadTracking::Behind(u16::MAX)),
        (USED_INDEX_AT, 0, SIZE + 1, BadTracking::Behind(SIZE + 1)),
        (LAST_BATCH_HEAD_AT, SIZE, 1, BadTracking::NoSuchHead(SIZE)),
    ];
    for (field, value, used_index, expected) in cases {
        let (region, shape, file) = region();
        Tracker::new(region, 1, SIZE)
            .unwrap()
            .recover(0, SIZE)
            .unwrap();
        poke(&file, 1, field, value);
        assert_eq!(
            next_daemon(&shape, &file).recover(used_index, SIZE),
            Err(expected)
        );
    }
    // An entry beyond the ring, in a region made for longer ones.
    let (region, _, file) = region();
    let mut tracker = Tracker::new(region, 1, SIZE / 2).unwrap();
    tracker.recover(0, SIZE / 2).unwrap();
    poke(&file, 1, 16 + 16 * usize::from(SIZE - 1), 1);
    assert_eq!(
        tracker.recover(0, SIZE / 2),
        Err(BadTracking::NoSuchHead(SIZE - 1))
    );
}

#[test]
fn a_list_that_goes_round_in_a_circle_ends() {
    let (region, shape, file) = region();
    let mut tracker = Tracker::new(region, 1, SIZE).unwrap();
    tracker.recover(0, SIZE).unwrap();
    for head in 0..4 {
        tracker.mark(head).unwrap();
    }
    // 1 -> 2 -> 1
    poke(&file, 1, LAST_BATCH_HEAD_AT, 1);
    poke(&file, 1, 16 + 16 + 6, 2);
    poke(&file, 1, 16 + 32 + 6, 1);
    assert_eq!(
        next_daemon(&shape, &file).recover(SIZE, SIZE),
        Ok(Recovered::InFlight(vec![0, 3]))
    );
}

#[test]
fn regions_of_a_shape_that_the_device_has_not_are_refused() {
    let (_, _, file) = region();
    let file = || file.try_clone().unwrap();
    let map = |bytes, offset, queues, size| {
        Region::map(&VhostUserInflight::new(bytes, offset, queues, size), file())
    };
    for (queues, size) in [
        (0, 8),
        (33, 8),
        (u16::MAX, 8),
        (1, 0),
        (1, 1025),
        (1, u16::MAX),
    ] {
        assert!(matches!(
            map(u64::MAX, 0, queues, size),
            Err(BadRegion::Shape { .. })
        ));
    }
    assert!(matches!(map(383, 0, 2, 8), Err(BadRegion::TooShort(383))));
    // Longer than the file, beyond its end, not at a page.
    for (bytes, offset, queues, size) in [
        (384, 4096, 2, 8),
        (u64::MAX, 0, 32, 1024),
        (384, u64::MAX, 2, 8),
    ] {
        assert!(matches!(
            map(bytes, offset, queues, size),
            Err(BadRegion::TooShort(384))
        ));
    }
    assert!(matches!(map(384, 64, 1, 8), Err(BadRegion::Map(_))));
    let good = map(384, 0, 2, 8).unwrap();
    assert_eq!(
        Tracker::new(Arc::clone(&good), 2, 8).unwrap_err(),
        BadTracking::NoSuchQueue
    );
    assert!(Tracker::new(good, 0, 16).is_err());
}

/// What the device does, one store that a kill may precede after the other.
#[derive(Clone, Debug)]
enum Step {
    Fetch,
    /// Answers so many, in an order that a number picks.
    Answer(usize, usize),
}

/// Runs steps on a ring whose driver offers heads again as soon as it may, killed before store number `kill`; answers heads
/// which a next daemon has to do again, and those which it would fetch from the ring.
struct Model {
    tracker: Tracker,
    /// Stores that are left until the kill.
    left: usize,
    /// Free heads of the driver, in the order in which it offers them.
    offered: VecDeque<u16>,
    fetched: Vec<u16>,
    /// Answered, as the guest sees it.
    used_index: u16,
    fetches: u16,
}

struct Killed;

fn length(heads: &[u16]) -> u16 {
    u16::try_from(heads.len()).unwrap()
}

impl Model {
    fn store(&mut self) -> Result<(), Killed> {
        self.left = self.left.checked_sub(1).ok_or(Killed)?;
        Ok(())
    }

    fn run(&mut self, steps: &[Step]) -> Result<(), Killed> {
        for step in steps {
            match step {
                Step::Fetch => {
                    let Some(head) = self.offered.front().copied() else {
                        continue;
                    };
                    self.store()?;
                    self.tracker.mark(head).unwrap();
                    self.offered.pop_front();
                    self.fetched.push(head);
                    self.fetches = self.fetches.wrapping_add(1);
                }
                Step::Answer(count, pick) => {
                    let count = (*count).min(self.fetched.len());
                    let mut batch = Vec::new();
                    for _ in 0..count {
                        let index = (batch.len() * 3 + pick) % (self.fetched.len() - batch.len());
                        let mut rest: Vec<u16> = self
                            .fetched
                            .iter()
                            .copied()
                            .filter(|head| !batch.contains(head))
                            .collect();
                        batch.push(rest.remove(index));
                    }
                    for head in &batch {
                        self.store()?;
                        self.tracker.batch(*head).unwrap();
                    }
                    if batch.is_empty() {
                        continue;
                    }
                    self.store()?;
                    // The used index is stored: the guest may know, and offer the heads again.
                    self.used_index = self.used_index.wrapping_add(length(&batch));
                    self.fetched.retain(|head| !batch.contains(head));
                    self.offered.extend(&batch);
                    // Cleared one by one, then the index: a kill between any two of these.
                    let cleared = self.left.min(batch.len());
                    for head in &batch[..cleared] {
                        self.tracker.set_in_flight(*head, false).unwrap();
                    }
                    self.left -= cleared;
                    if cleared < batch.len() {
                        return Err(Killed);
                    }
                    self.store()?;
                    self.tracker.clear(&batch, self.used_index).unwrap();
                }
            }
        }
        Ok(())
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec(
        prop_oneof![
            2 => Just(Step::Fetch),
            1 => (1_usize..6, 0_usize..8).prop_map(|(count, pick)| Step::Answer(count, pick)),
        ],
        1..60,
    )
}

proptest! {
    /// Killed before any store, twice in a row: what was fetched and not answered is done again, nothing else is.
    #[test]
    fn a_kill_at_any_store_loses_nothing_and_repeats_nothing_that_was_answered(
        first in steps(),
        second in steps(),
        kills in (0_usize..80, 0_usize..80),
        start in any::<u16>(),
    ) {
        let (region, shape, file) = region();
        let mut tracker = Tracker::new(region, 1, SIZE).unwrap();
        tracker.recover(start, SIZE).unwrap();
        let mut model = Model {
            tracker,
            left: kills.0,
            offered: (0..SIZE).collect(),
            fetched: Vec::new(),
            used_index: start,
            fetches: start,
        };
        drop(model.run(&first));
        for (steps, kill) in [(&second, kills.1), (&Vec::new(), 0)] {
            model.tracker = next_daemon(&shape, &file);
            let Recovered::InFlight(heads) = model.tracker.recover(model.used_index, SIZE).unwrap() else {
                panic!("a used region is not fresh");
            };
            let expected: BTreeSet<u16> = model.fetched.iter().copied().collect();
            prop_assert_eq!(heads.iter().copied().collect::<BTreeSet<_>>(), expected);
            prop_assert_eq!(&heads, &model.fetched, "in the order of their fetching");
            // The position from which the next daemon fetches.
            prop_assert_eq!(model.used_index.wrapping_add(length(&heads)), model.fetches);
            model.left = kill;
            drop(model.run(steps));
        }
    }
}
