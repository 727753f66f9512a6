//! Whether a single copy is made durable by the queue's own thread, or by a hand.
//!
//! Used by the worker. A hand costs two wake-ups, which on a disk that syncs at once is as much as the sync; on one that does not, whatever
//! arrives meanwhile would wait for the sync if this thread made it. So it is tried, and only what proved to be quick is done again.
//!
//! Invariant: a sync that was not quick is not waited for here again before twice as many were made by a hand as after the last such.

use std::time::Duration;

/// So long a new request may wait: as long as its thread's own way back from sleep, about.
const QUICK: Duration = Duration::from_micros(50);
/// Rounds that go to a hand after one that was not quick, the first time, and at most.
const PAUSE: u32 = 16;
const PAUSE_MAX: u32 = 1 << 16;

/// What is known of one queue's syncs.
#[derive(Debug)]
pub(super) struct Alone {
    /// Rounds that still go to a hand.
    left: u32,
    pause: u32,
}

impl Default for Alone {
    fn default() -> Self {
        Self {
            left: 0,
            pause: PAUSE,
        }
    }
}

impl Alone {
    /// One that leaves everything to the hand, for a test.
    #[cfg(test)]
    pub(super) fn never() -> Self {
        Self {
            left: u32::MAX,
            pause: PAUSE_MAX,
        }
    }

    /// A round is due, and nothing else is to be done on this queue. True: here; false: by a hand.
    pub(super) fn is_here(&mut self) -> bool {
        let here = self.left == 0;
        self.left = self.left.saturating_sub(1);
        here
    }

    /// One that was made here took so long.
    pub(super) fn took(&mut self, spent: Duration) {
        if spent <= QUICK {
            self.pause = PAUSE;
        } else {
            self.left = self.pause;
            self.pause = (self.pause * 2).min(PAUSE_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of so many rounds, those made here.
    fn here(alone: &mut Alone, rounds: u32, spent: Duration) -> u32 {
        let mut count = 0;
        for _ in 0..rounds {
            if alone.is_here() {
                count += 1;
                alone.took(spent);
            }
        }
        count
    }

    #[test]
    fn quick_syncs_are_all_made_here_and_slow_ones_ever_more_rarely() {
        let mut alone = Alone::default();
        assert_eq!(here(&mut alone, 1000, QUICK), 1000);
        let slow = QUICK * 2;
        // One, and one behind each pause: 16, 32, ... 512 rounds.
        assert_eq!(here(&mut alone, 1024, slow), 7);
        assert!(here(&mut alone, PAUSE_MAX * 16, slow) < 32);
    }

    #[test]
    fn a_disk_that_has_become_quick_is_found_out() {
        let mut alone = Alone::default();
        here(&mut alone, 100, QUICK * 2);
        assert!(here(&mut alone, 200, QUICK) > 100);
    }
}
