//! `Image`: the bytes of a simulated file, in pages that copies share and that holes do not have.
//!
//! Crash tests make many thousands of nearly equal copies of a volume whose files are mostly holes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::units::in_memory;

const PAGE_BYTES: u64 = 4096;

type Page = [u8; in_memory(PAGE_BYTES)];

/// Bytes of a file. Cheap to clone.
#[derive(Clone, Default)]
pub struct Image {
    length_bytes: u64,
    pages: BTreeMap<u64, Arc<Page>>,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            out,
            "Image({} bytes, {} pages)",
            self.length_bytes,
            self.pages.len()
        )
    }
}

impl From<Vec<u8>> for Image {
    fn from(bytes: Vec<u8>) -> Image {
        let mut image = Image::default();
        image.write(&bytes, 0);
        image
    }
}

impl PartialEq for Image {
    fn eq(&self, other: &Image) -> bool {
        const HOLE: Page = [0; in_memory(PAGE_BYTES)];
        let page = |image: &'_ Image, number: &u64| -> Page {
            image.pages.get(number).map_or(HOLE, |page| **page)
        };
        self.length_bytes == other.length_bytes
            && self
                .pages
                .keys()
                .chain(other.pages.keys())
                .all(|number| page(self, number) == page(other, number))
    }
}

impl Eq for Image {}

/// Calls `with` for every part of a range that lies in one page: page, start within it, part of the range.
fn parts(offset_bytes: u64, length: usize, mut with: impl FnMut(u64, usize, Range<usize>)) {
    let mut done = 0;
    while done < length {
        let at = offset_bytes + done as u64;
        let within = in_memory(at % PAGE_BYTES);
        let count = (length - done).min(in_memory(PAGE_BYTES) - within);
        with(at / PAGE_BYTES, within, done..done + count);
        done += count;
    }
}

impl Image {
    /// Length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// Cuts it off, or extends it by a hole.
    pub fn set_len(&mut self, length_bytes: u64) {
        if length_bytes < self.length_bytes {
            let whole = length_bytes.div_ceil(PAGE_BYTES);
            self.pages.split_off(&whole);
            let within = in_memory(length_bytes % PAGE_BYTES);
            if within != 0
                && let Some(page) = self.pages.get_mut(&(length_bytes / PAGE_BYTES))
            {
                Arc::make_mut(page)[within..].fill(0);
            }
        }
        self.length_bytes = length_bytes;
    }

    /// Fills `buffer` from `offset_bytes`, zeroes behind the end.
    pub fn read(&self, buffer: &mut [u8], offset_bytes: u64) {
        let length = buffer.len();
        parts(offset_bytes, length, |number, within, part| {
            let target = &mut buffer[part];
            match self.pages.get(&number) {
                Some(page) => target.copy_from_slice(&page[within..within + target.len()]),
                None => target.fill(0),
            }
        });
    }

    /// Writes `data` at `offset_bytes`, growing the image.
    pub fn write(&mut self, data: &[u8], offset_bytes: u64) {
        self.length_bytes = self.length_bytes.max(offset_bytes + data.len() as u64);
        parts(offset_bytes, data.len(), |number, within, part| {
            let source = &data[part];
            if let Some(page) = self.pages.get_mut(&number) {
                Arc::make_mut(page)[within..within + source.len()].copy_from_slice(source);
            } else if source.iter().any(|byte| *byte != 0) {
                let mut page = [0; in_memory(PAGE_BYTES)];
                page[within..within + source.len()].copy_from_slice(source);
                self.pages.insert(number, Arc::new(page));
            }
        });
    }

    /// Writes `length_bytes` times `byte`.
    pub fn fill(&mut self, byte: u8, offset_bytes: u64, length_bytes: u64) {
        if length_bytes == 0 {
            return;
        }
        let end = offset_bytes + length_bytes;
        if byte == 0 {
            // However long it is, only pages that are there have to go.
            let numbers = offset_bytes / PAGE_BYTES..end.div_ceil(PAGE_BYTES);
            let there: Vec<u64> = self.pages.range(numbers).map(|page| *page.0).collect();
            for number in there {
                let from = in_memory(offset_bytes.saturating_sub(number * PAGE_BYTES));
                let to = in_memory((end - number * PAGE_BYTES).min(PAGE_BYTES));
                if let Some(page) = self.pages.get_mut(&number) {
                    Arc::make_mut(page)[from..to].fill(0);
                }
            }
        } else {
            parts(
                offset_bytes,
                in_memory(length_bytes),
                |number, within, part| {
                    let page = self
                        .pages
                        .entry(number)
                        .or_insert_with(|| Arc::new([0; in_memory(PAGE_BYTES)]));
                    Arc::make_mut(page)[within..within + part.len()].fill(byte);
                },
            );
        }
        self.length_bytes = self.length_bytes.max(offset_bytes + length_bytes);
    }

    /// Flips the bits of `mask` in one byte, if the image has it.
    pub fn flip(&mut self, offset_bytes: u64, mask: u8) {
        if offset_bytes < self.length_bytes {
            let mut byte = [0];
            self.read(&mut byte, offset_bytes);
            self.write(&[byte[0] ^ mask], offset_bytes);
        }
    }

    /// All bytes, holes included.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; in_memory(self.length_bytes)];
        self.read(&mut bytes, 0);
        bytes
    }

    /// Parts that are no holes, in order: offset and length in bytes.
    pub fn written(&self) -> Vec<(u64, u64)> {
        let mut parts: Vec<(u64, u64)> = Vec::new();
        for number in self.pages.keys() {
            let start = number * PAGE_BYTES;
            let length = PAGE_BYTES.min(self.length_bytes - start);
            match parts.last_mut() {
                Some((at, count)) if *at + *count == start => *count += length,
                Some(_) | None => parts.push((start, length)),
            }
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_is_a_vector_with_holes() {
        let (mut image, mut plain) = (Image::default(), Vec::<u8>::new());
        let mut number = 7_u64;
        for step in 0..4000_u64 {
            number = number
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(step);
            let at = (number >> 33) % 20_000;
            let length = (number >> 12) % 9000;
            match step % 4 {
                0 | 1 => {
                    let value = u8::try_from(step % 3).unwrap_or(0);
                    let end = in_memory(at + length);
                    if length > 0 && plain.len() < end {
                        plain.resize(end, 0);
                    }
                    plain[in_memory(at).min(end)..]
                        .iter_mut()
                        .take(in_memory(length))
                        .for_each(|b| *b = value);
                    if step % 4 == 0 {
                        image.fill(value, at, length);
                    } else if length > 0 {
                        image.write(&vec![value; in_memory(length)], at);
                    }
                }
                2 if step % 64 == 2 => {
                    plain.resize(in_memory(at), 0);
                    image.set_len(at);
                }
                2 => {
                    image.flip(at, 5);
                    if let Some(byte) = plain.get_mut(in_memory(at)) {
                        *byte ^= 5;
                    }
                }
                _ => {
                    let mut buffer = vec![9; in_memory(length)];
                    image.read(&mut buffer, at);
                    let expected: Vec<u8> = (at..at + length)
                        .map(|at| plain.get(in_memory(at)).copied().unwrap_or(0))
                        .collect();
                    assert_eq!(buffer, expected);
                }
            }
            assert_eq!(image.len_bytes(), plain.len() as u64);
        }
        assert_eq!(image.to_bytes(), plain);
        assert_eq!(image, Image::from(plain));
    }
}
