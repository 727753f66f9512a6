//! A bounded cache of index pages, second chance.
//!
//! `run` reads through it, as packed as they are on disk. It knows nothing of what pages mean; a page is known by its
//! run's generation and its number, so pages of a run that is gone are never found and soon replaced.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::layout::PAGE_BYTES;

/// Generation of the run, number of the page.
pub(crate) type PageKey = (u64, u64);

/// Spreads numbers that count up; nobody from outside chooses them.
#[derive(Debug, Default)]
struct PageHasher(u64);

impl Hasher for PageHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(29) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }
}

#[derive(Debug)]
struct Slot {
    key: PageKey,
    used: bool,
    bytes: Box<[u8; PAGE_BYTES]>,
}

#[derive(Debug)]
pub(crate) struct PageCache {
    capacity_pages: usize,
    places: HashMap<PageKey, usize, BuildHasherDefault<PageHasher>>,
    slots: Vec<Slot>,
    hand: usize,
}

impl PageCache {
    pub(crate) fn new(capacity_pages: usize) -> PageCache {
        PageCache {
            capacity_pages: capacity_pages.max(1),
            places: HashMap::default(),
            slots: Vec::new(),
            hand: 0,
        }
    }

    /// The page, which `read` brings in if it is not here.
    pub(crate) fn fetch<E>(
        &mut self,
        key: PageKey,
        read: impl FnOnce(&mut [u8; PAGE_BYTES]) -> Result<(), E>,
    ) -> Result<&[u8; PAGE_BYTES], E> {
        let place = match self.places.get(&key).copied() {
            Some(place) => {
                self.slots[place].used = true;
                place
            }
            None => self.bring(key, read)?,
        };
        Ok(&self.slots[place].bytes)
    }

    fn bring<E>(
        &mut self,
        key: PageKey,
        read: impl FnOnce(&mut [u8; PAGE_BYTES]) -> Result<(), E>,
    ) -> Result<usize, E> {
        if self.slots.len() < self.capacity_pages {
            let mut bytes = Box::new([0; PAGE_BYTES]);
            read(&mut bytes)?;
            self.slots.push(Slot {
                key,
                used: false,
                bytes,
            });
            self.places.insert(key, self.slots.len() - 1);
            return Ok(self.slots.len() - 1);
        }
        loop {
            let place = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &mut self.slots[place];
            if std::mem::take(&mut slot.used) {
                continue;
            }
            // Its page is gone even if the read fails half way.
            self.places.remove(&slot.key);
            slot.key = (u64::MAX, u64::MAX);
            read(&mut slot.bytes)?;
            slot.key = key;
            self.places.insert(key, place);
            return Ok(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_never_exceeds_its_capacity_and_keeps_what_is_used() {
        let mut cache = PageCache::new(4);
        let mut reads = 0;
        for number in 0..100_u64 {
            for wanted in [0, number] {
                let page = cache.fetch((1, wanted), |bytes| {
                    reads += 1;
                    bytes.fill(u8::try_from(wanted).unwrap());
                    Ok::<(), ()>(())
                });
                assert_eq!(u64::from(page.unwrap()[9]), wanted);
            }
            assert!(cache.slots.len() <= 4 && cache.places.len() <= 4);
        }
        assert!(
            reads <= 100,
            "page 0 is used before each other one: {reads} reads"
        );
        let failed = cache.fetch((1, 200), |_| Err("no"));
        assert_eq!(failed, Err("no"));
        assert!(!cache.places.contains_key(&(1, 200)));
    }
}
