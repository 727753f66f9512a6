//! A bounded cache of index pages, second chance.
//!
//! `run` reads through it. It knows nothing of what pages mean.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::{Key, Location};

/// A checked page: its records in order.
pub(crate) type Page = Arc<[(Key, Location)]>;

#[derive(Debug)]
pub(crate) struct PageCache {
    capacity_pages: usize,
    pages: HashMap<u64, (Page, bool)>,
    queue: VecDeque<u64>,
}

impl PageCache {
    pub(crate) fn new(capacity_pages: usize) -> PageCache {
        let capacity_pages = capacity_pages.max(1);
        PageCache {
            capacity_pages,
            pages: HashMap::new(),
            queue: VecDeque::new(),
        }
    }

    pub(crate) fn get(&mut self, number: u64) -> Option<Page> {
        let (page, used) = self.pages.get_mut(&number)?;
        *used = true;
        Some(Arc::clone(page))
    }

    pub(crate) fn insert(&mut self, number: u64, page: Page) {
        while self.pages.len() >= self.capacity_pages {
            let Some(oldest) = self.queue.pop_front() else {
                break;
            };
            match self.pages.get_mut(&oldest) {
                Some((_, used)) if *used => {
                    *used = false;
                    self.queue.push_back(oldest);
                }
                Some(_) | None => {
                    self.pages.remove(&oldest);
                }
            }
        }
        if self.pages.insert(number, (page, false)).is_none() {
            self.queue.push_back(number);
        }
    }

    pub(crate) fn clear(&mut self) {
        self.pages.clear();
        self.queue.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_never_exceeds_its_capacity_and_keeps_what_is_used() {
        let mut cache = PageCache::new(4);
        let page: Page = Arc::from(Vec::new());
        cache.insert(0, Arc::clone(&page));
        for number in 1..100 {
            assert!(cache.get(0).is_some(), "page 0 is used before each insert");
            cache.insert(number, Arc::clone(&page));
            assert!(cache.pages.len() <= 4);
            assert_eq!(cache.pages.len(), cache.queue.len());
        }
    }
}
