//! How much a writer may say without being asked: progress, releases, answers to nothing.
//!
//! Used by `socket` for each connection. It bounds what waits for `quiesce`, which takes nothing while it is at work itself.

use std::time::{Duration, Instant};

/// What a line costs, and each KiB of it once more.
const LINE_TIME: Duration = Duration::from_millis(10);
/// What may be spent at once.
const BURST: Duration = Duration::from_secs(2);

/// Why a writer that goes beyond it is hung up on.
pub const TOO_MUCH: &str =
    "it says more than 100 lines, or KiB, a second (200 at once) without being asked";

/// The pace of one connection.
#[derive(Debug, Default)]
pub struct Pace {
    /// When all that was said is paid for.
    paid: Option<Instant>,
}

impl Pace {
    /// Takes a line of this length; false if that is too much.
    #[must_use]
    pub fn takes(&mut self, now: Instant, line_bytes: usize) -> bool {
        let lines = u32::try_from(line_bytes / 1024 + 1).unwrap_or(u32::MAX);
        let from = self.paid.map_or(now, |paid| paid.max(now));
        let paid = from + LINE_TIME * lines;
        self.paid = Some(paid);
        paid.duration_since(now) <= BURST
    }
}

#[cfg(test)]
mod tests {
    //! What is too much, by a clock of the test's own.
    use super::*;

    #[test]
    fn a_hundred_lines_a_second_go_on_for_ever_and_two_hundred_come_at_once() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        assert!((0..200).all(|_| pace.takes(start, 60)));
        assert!(!pace.takes(start, 60));
        let (mut pace, mut now) = (Pace::default(), start);
        for _ in 0..10_000 {
            now += Duration::from_millis(10);
            assert!(pace.takes(now, 60));
        }
        let (mut pace, mut now) = (Pace::default(), start);
        let mut faster = std::iter::from_fn(|| {
            now += Duration::from_millis(9);
            Some(pace.takes(now, 60))
        });
        assert!(faster.by_ref().take(10_000).any(|taken| !taken));
    }

    #[test]
    fn a_long_line_counts_as_many() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        assert!(pace.takes(start, 190 << 10));
        assert!(!pace.takes(start, 20 << 10));
        assert!(!Pace::default().takes(start, 1 << 20));
    }
}
