//! Requests that cannot go on now, and how others know that they wait.
//!
//! Used by the worker. A request waits for one of three things: the end of a hold, the end of another write on its blocks,
//! room in the shadow storage or for the base. Whoever brings one of them raises the volume's count of news and wakes the queues.
//!
//! Invariant: an attempt is repeated only when there are news that came after it began, or when the request has just become
//! known as waiting (what it waits for may have ended before that). So nothing is missed, and nothing burns.

use super::super::volume::{News, VolumeEngine};
use super::{Job, Outcome, Worker};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parked {
    Held,
    Overlapping,
    WithoutRoom,
    /// The base is thin, and its file system full.
    BaseWithoutRoom,
}

impl Parked {
    fn is_for_room(self) -> bool {
        match self {
            Self::Held | Self::Overlapping => false,
            Self::WithoutRoom | Self::BaseWithoutRoom => true,
        }
    }
}

/// The volume knows of a waiting request as long as this lives.
#[derive(Debug)]
pub(super) struct Waits {
    volume: Arc<VolumeEngine>,
    what: Parked,
}

impl Waits {
    /// `None` for a hold: its end wakes everybody anyway. `again`: whoever looks after room knows of the request already.
    fn register(volume: &Arc<VolumeEngine>, what: Parked, again: bool) -> Option<Self> {
        match what {
            Parked::Held => return None,
            Parked::Overlapping => {
                volume.overlapping.fetch_add(1, Ordering::SeqCst);
            }
            Parked::WithoutRoom | Parked::BaseWithoutRoom => {
                if what == Parked::BaseWithoutRoom {
                    volume.base_without_room.fetch_add(1, Ordering::SeqCst);
                }
                if volume.without_room.fetch_add(1, Ordering::SeqCst) == 0 && !again {
                    // Told when background work has found none either.
                    volume.ask_for_room();
                }
            }
        }
        Some(Self {
            volume: Arc::clone(volume),
            what,
        })
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        match self.what {
            Parked::Held => {}
            Parked::Overlapping => {
                self.volume.overlapping.fetch_sub(1, Ordering::SeqCst);
            }
            Parked::WithoutRoom | Parked::BaseWithoutRoom => {
                self.volume.without_room.fetch_sub(1, Ordering::SeqCst);
                if self.what == Parked::BaseWithoutRoom {
                    self.volume.base_without_room.fetch_sub(1, Ordering::SeqCst);
                }
            }
        }
    }
}

#[derive(Debug)]
struct Waiting {
    job: Job,
    why: Parked,
    /// Has just become known as waiting.
    try_at_once: bool,
}

impl Waiting {
    fn is_due(&self, news: News) -> bool {
        self.try_at_once
            || match self.why {
                Parked::Held | Parked::Overlapping => self.job.tried_at.ends != news.ends,
                // There is no use in trying before there may be room.
                Parked::WithoutRoom | Parked::BaseWithoutRoom => {
                    self.job.tried_at.chances_of_room != news.chances_of_room
                }
            }
    }
}

/// Parked requests of one queue, oldest first.
#[derive(Debug, Default)]
pub(super) struct Parking {
    waiting: Vec<Waiting>,
}

impl Parking {
    pub(super) fn forget(&mut self) {
        self.waiting.clear();
    }

    /// True if there is something to be tried, the volume's news being `news`.
    pub(super) fn is_due(&self, news: News) -> bool {
        self.waiting.iter().any(|waiting| waiting.is_due(news))
    }
}

/// What became of an attempt to start a request.
pub(super) enum Started {
    Running,
    Finished(super::Token, Outcome),
    Parked(Job, Parked),
}

impl Worker {
    /// Starts what can start: parked requests for which something has changed, then those that have arrived.
    pub(super) fn start_due(&mut self) {
        let mut with_held = !self.arrived.is_empty();
        loop {
            // Before the attempts: what happens meanwhile is news.
            let news = self.volume.news();
            if !self.parking.waiting.is_empty() {
                let waiting = std::mem::take(&mut self.parking.waiting);
                for parked in waiting {
                    // A hold that ends by its clock brings no news; the first new write finds out.
                    if parked.is_due(news) || (parked.why == Parked::Held && with_held) {
                        self.attempt(parked.job, news);
                    } else {
                        self.parking.waiting.push(parked);
                    }
                }
            }
            if !self.arrived.is_empty() {
                let mut arrived = std::mem::take(&mut self.arrived);
                for job in arrived.drain(..) {
                    self.attempt(job, news);
                }
                self.arrived = arrived;
            }
            with_held = false;
            if !self.parking.waiting.iter().any(|parked| parked.try_at_once) {
                break;
            }
        }
        self.flush_synchronous_writes();
    }

    fn attempt(&mut self, mut job: Job, news: News) {
        job.tried_at = news;
        match self.start(job) {
            Started::Running => {}
            Started::Finished(token, outcome) => self.done.push((token, outcome)),
            Started::Parked(job, why) => self.park(job, why),
        }
    }

    /// Parks a request. What it waits for may have ended before it was known to wait, so that it is tried once more then. One that
    /// could be planned and found no room after all, again, is not, and calls nobody: it would go round between its queue and
    /// whoever looks after room, who looks at his own pace.
    pub(super) fn park(&mut self, mut job: Job, why: Parked) {
        let known = job.waits.as_ref().map(|waits| waits.what);
        let again = why.is_for_room() && job.has_lacked_room;
        job.has_lacked_room |= why.is_for_room();
        if known != Some(why) {
            job.waits = Waits::register(&self.volume, why, again);
        }
        let try_at_once = job.waits.is_some() && known != Some(why) && !again;
        self.parking.waiting.push(Waiting {
            job,
            why,
            try_at_once,
        });
    }

    /// Parks what only a file system had no room for. Not tried again at once: whoever looks after room says when.
    pub(super) fn park_for_room(&mut self, mut job: Job, why: Parked) {
        let again = std::mem::replace(&mut job.has_lacked_room, true);
        job.waits = Waits::register(&self.volume, why, again);
        self.parking.waiting.push(Waiting {
            job,
            why,
            try_at_once: false,
        });
    }
}
