//! Places for connections that have not said yet who they are, counted by the user that the kernel names.
//!
//! `socket` takes one before anything is read and gives it back when the writer is registered or gone. Invariants: what one
//! user does takes no place of another's for longer than a registration may take, and none of root's ever.

use super::registry::CONNECTED_MAX;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The user whose connections are the machine's own.
pub const ROOT: u32 = 0;

/// Most of one user but root.
const OF_ONE_MAX: usize = 16;
/// Most of all users but root.
const OF_OTHERS_MAX: usize = 64;

/// Lines that may be logged of those that get none or are refused, in this time: the log is everybody's.
const NOTES_MAX: u32 = 10;
const NOTES_TIME: Duration = Duration::from_secs(60);

/// The places.
#[derive(Debug, Default)]
pub struct Places {
    taken: Mutex<BTreeMap<u32, usize>>,
    /// When the time began, and how many lines there were since.
    notes: Mutex<Option<(Instant, u32)>>,
}

/// A place; free again when it is dropped.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    uid: u32,
}

impl Places {
    /// A place for a connection of this user, if it has one left.
    #[must_use]
    pub fn take(self: &Arc<Self>, uid: u32) -> Option<Place> {
        let mut taken = self.lock();
        let own = taken.get(&uid).copied().unwrap_or(0);
        let others = taken.iter().filter(|(uid, _)| **uid != ROOT);
        let others: usize = others.map(|(_, count)| count).sum();
        let has_room = if uid == ROOT {
            own < CONNECTED_MAX
        } else {
            own < OF_ONE_MAX && others < OF_OTHERS_MAX
        };
        if !has_room {
            return None;
        }
        taken.insert(uid, own + 1);
        Some(Place {
            places: Arc::clone(self),
            uid,
        })
    }

    /// One more line may be logged.
    #[must_use]
    pub fn may_note(&self) -> bool {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let (since, count) = match *notes {
            Some((since, count)) if now.duration_since(since) < NOTES_TIME => (since, count),
            _ => (now, 0),
        };
        *notes = Some((since, count.saturating_add(1)));
        count < NOTES_MAX
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Whose it is.
    #[must_use]
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// See [`Places::may_note`].
    #[must_use]
    pub fn may_note(&self) -> bool {
        self.places.may_note()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        match taken.get_mut(&self.uid) {
            Some(count) if *count > 1 => *count -= 1,
            Some(_) | None => {
                taken.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    //! Who keeps whom out.
    use super::*;

    fn take_all(places: &Arc<Places>, uid: u32) -> Vec<Place> {
        std::iter::from_fn(|| places.take(uid)).collect()
    }

    #[test]
    fn a_user_that_takes_all_it_can_get_keeps_out_no_other() {
        let places = Arc::<Places>::default();
        let own = take_all(&places, 1000);
        assert_eq!(own.len(), OF_ONE_MAX);
        assert!(places.take(1001).is_some() && places.take(ROOT).is_some());
        drop(own);
        assert!(places.take(1000).is_some());
    }

    #[test]
    fn as_many_users_as_there_may_be_leave_root_its_places() {
        let places = Arc::<Places>::default();
        let users: Vec<Place> = (1..100).flat_map(|uid| take_all(&places, uid)).collect();
        assert_eq!(users.len(), OF_OTHERS_MAX);
        assert_eq!(take_all(&places, ROOT).len(), CONNECTED_MAX);
    }

    #[test]
    fn refusals_do_not_fill_the_log() {
        let places = Places::default();
        let noted = (0..1000).filter(|_| places.may_note()).count();
        assert_eq!(noted, 10);
    }
}
