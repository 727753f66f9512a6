//! Pins: which I/O planned in the past is still under way.
//!
//! Plans hold a pin; `checkpoint` and `settle` close a generation and wait for its pins, without
//! blocking, before log blocks are reused (I6).

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

/// Held by a plan for as long as its I/O may run.
#[derive(Clone, Debug)]
pub(crate) struct Pin(#[allow(dead_code, reason = "held, not read")] Arc<()>);

/// A closed generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PinGeneration(u64);

#[derive(Debug, Default)]
pub(crate) struct Pins {
    generation: u64,
    current: Arc<()>,
    closed: VecDeque<(PinGeneration, Weak<()>)>,
}

impl Pins {
    pub(crate) fn pin(&self) -> Pin {
        Pin(Arc::clone(&self.current))
    }

    /// Closes the current generation; what is pinned from now on is not waited for.
    pub(crate) fn close(&mut self) -> PinGeneration {
        let generation = PinGeneration(self.generation);
        self.generation += 1;
        let old = std::mem::take(&mut self.current);
        self.closed.push_back((generation, Arc::downgrade(&old)));
        generation
    }

    /// Whether every pin of `generation` and before is gone.
    pub(crate) fn is_over(&mut self, generation: PinGeneration) -> bool {
        while self
            .closed
            .front()
            .is_some_and(|(_, pins)| pins.strong_count() == 0)
        {
            self.closed.pop_front();
        }
        self.closed
            .front()
            .is_none_or(|(oldest, _)| *oldest > generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_is_over_when_its_pins_and_all_older_ones_are_gone() {
        let mut pins = Pins::default();
        let (old, first) = (pins.pin(), pins.close());
        let (young, second) = (pins.pin(), pins.close());
        let _later = pins.pin();
        drop(young);
        assert!(!pins.is_over(second), "an older pin is held");
        assert!(!pins.is_over(first));
        drop(old);
        assert!(pins.is_over(first) && pins.is_over(second));
    }
}
