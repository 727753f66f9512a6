//! Standing threads for work that has to run on many volumes at once.
//!
//! Called by `snapshot_set`, whose window must not pay for starting threads: `prepare` uses as many at once as the commit will,
//! so they stand when writes are held. Knows nothing of what it runs.
//!
//! Invariants: work never waits for a thread that does other work; there are never more threads than were busy at one time.

use std::collections::VecDeque;
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    idle: usize,
    is_over: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Threads that stand ready. Dropping it lets them end when they are through.
#[derive(Default)]
pub(super) struct Crew {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Crew {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Crew").finish_non_exhaustive()
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.changed.notify_all();
    }
}

impl Crew {
    /// Runs a job on a thread that has nothing else to do. Without one, and without resources for another, it runs here.
    pub(super) fn start(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.lock();
        if state.idle > state.jobs.len() {
            state.jobs.push_back(Box::new(job));
            drop(state);
            self.shared.changed.notify_one();
            return;
        }
        drop(state);
        let (shared, first) = (Arc::clone(&self.shared), Arc::new(Mutex::new(Some(job))));
        let of_thread = Arc::clone(&first);
        let take =
            move |job: &Mutex<Option<_>>| job.lock().unwrap_or_else(PoisonError::into_inner).take();
        let started = std::thread::Builder::new()
            .name("crew".to_owned())
            .spawn(move || {
                if let Some(job) = take(&of_thread) {
                    job();
                }
                work(&shared);
            });
        if let Err(error) = started {
            tracing::error!(%error, "cannot start a thread");
            if let Some(job) = take(&first) {
                job();
            }
        }
    }

    /// Runs `work` for 0..count at once, one of them here. `None` for those that panicked.
    pub(super) fn on_all<T: Send + 'static>(
        &self,
        count: usize,
        work: impl Fn(usize) -> T + Send + Sync + 'static,
    ) -> Vec<Option<T>> {
        let work = Arc::new(work);
        let (results, incoming) = channel();
        for place in 1..count {
            let (work, results) = (Arc::clone(&work), results.clone());
            self.start(move || {
                // Nobody waits for the result if the caller has panicked.
                let _gone = results.send((place, work(place)));
            });
        }
        drop(results);
        let mut all: Vec<Option<T>> = (0..count).map(|_| None).collect();
        if let Some(first) = all.first_mut() {
            *first = Some(work(0));
        }
        for (place, result) in incoming {
            if let Some(slot) = all.get_mut(place) {
                *slot = Some(result);
            }
        }
        all
    }
}

fn work(shared: &Shared) {
    let mut state = shared.lock();
    loop {
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            job();
            state = shared.lock();
            continue;
        }
        if state.is_over {
            return;
        }
        state.idle += 1;
        state = shared
            .changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner);
        state.idle -= 1;
    }
}

#[cfg(test)]
mod tests;
