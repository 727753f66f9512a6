//! Things in flight, found by a small number.
//!
//! Used by the ring (transfers) and the worker (requests), which hand the numbers to the kernel and to the hands. A number is
//! used again once its thing is removed, so who hands it out takes every answer before removing.

/// A list with holes.
#[derive(Debug)]
pub(super) struct Slab<T> {
    places: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            places: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slab<T> {
    /// Puts a thing in; answers its number.
    pub(super) fn insert(&mut self, thing: T) -> u32 {
        if let Some(number) = self.free.pop()
            && let Some(place) = self.places.get_mut(number as usize)
        {
            *place = Some(thing);
            return number;
        }
        // As many requests as rings hold, times the pieces of each: far from the end of u32.
        let number = u32::try_from(self.places.len()).unwrap_or(u32::MAX);
        self.places.push(Some(thing));
        number
    }

    /// Looks at a thing.
    pub(super) fn get(&self, number: u32) -> Option<&T> {
        self.places.get(number as usize)?.as_ref()
    }

    /// Changes a thing.
    pub(super) fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        self.places.get_mut(number as usize)?.as_mut()
    }

    /// Takes a thing out.
    pub(super) fn remove(&mut self, number: u32) -> Option<T> {
        let thing = self.places.get_mut(number as usize)?.take()?;
        self.free.push(number);
        Some(thing)
    }

    /// How many things are in it.
    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// True if there is nothing in it.
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::Slab;

    #[test]
    fn a_number_is_used_again_only_after_its_thing_has_gone() {
        let mut slab = Slab::default();
        assert!(slab.is_empty());
        let first = slab.insert('a');
        let second = slab.insert('b');
        assert_ne!(first, second);
        assert_eq!(slab.len(), 2);
        assert_eq!(slab.remove(first), Some('a'));
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.insert('c'), first);
        assert_eq!(slab.get(first), Some(&'c'));
        assert_eq!(slab.get_mut(second), Some(&mut 'b'));
        assert!(!slab.is_empty());
    }
}
