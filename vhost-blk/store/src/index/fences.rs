//! Fences: the first keys of a run's pages, so that a look-up reads the one page that can hold its key.
//!
//! `run` loads and asks them, `run_writer` makes them. There are never more in memory than a fixed number for each run:
//! of a larger one every second, fourth, ... is kept, and the last steps go over the pages themselves.

use super::Key;

/// Most fences of one run in memory: 2 MiB.
const MAX_FENCES: usize = 1 << 17;

/// First keys of every `stride`-th page.
#[derive(Debug)]
pub(crate) struct Fences {
    most: usize,
    keys: Vec<Key>,
    stride: u64,
    pages: u64,
}

impl Default for Fences {
    fn default() -> Self {
        Fences::new(MAX_FENCES)
    }
}

impl Fences {
    /// No fences yet, and never as many as `most`.
    pub(super) fn new(most: usize) -> Fences {
        Fences {
            most,
            keys: Vec::new(),
            stride: 1,
            pages: 0,
        }
    }

    /// Notes the first key of the next page.
    pub(crate) fn push(&mut self, first: Key) {
        if self.pages.is_multiple_of(self.stride) {
            self.keys.push(first);
        }
        self.pages += 1;
        if self.keys.len() >= self.most {
            let mut place = 0;
            self.keys.retain(|_| {
                place += 1;
                place % 2 == 1
            });
            self.stride *= 2;
        }
    }

    /// Gives back what was set aside for more.
    pub(crate) fn shrink(&mut self) {
        self.keys.shrink_to_fit();
    }

    /// Pages among which the last one that begins at or before `key` is: first and one behind the last.
    pub(crate) fn span(&self, key: Key) -> (u64, u64) {
        let after = self.keys.partition_point(|fence| *fence <= key) as u64;
        let first = after.saturating_sub(1) * self.stride;
        (first, (after * self.stride).min(self.pages))
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }
}
