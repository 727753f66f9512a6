//! Cuts a stream of bytes into JSON objects, as QEMU does: no newline is needed, 0xFF starts anew.
//!
//! Called by `qga` alone; knows nothing of what the objects mean.
#![deny(clippy::indexing_slicing)]

/// Longest object, bytes: a write of 11 MiB. QEMU's agent takes 64 MiB, which a small guest has not to spare.
const OBJECT_BYTES_MAX: usize = 16 << 20;
const RESET: u8 = 0xff;

/// What a stream contains.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    /// From a brace to its partner.
    Object(Vec<u8>),
    /// An object beyond the limit; it is forgotten.
    TooLong,
}

/// The cutter.
#[derive(Debug, Default)]
pub struct Objects {
    partial: Vec<u8>,
    depth: u32,
    in_string: bool,
    escaped: bool,
}

impl Objects {
    /// Takes bytes; gives `each` what they complete, in order. What lies between objects is skipped.
    pub fn take(&mut self, bytes: &[u8], mut each: impl FnMut(Piece)) {
        for byte in bytes {
            if *byte == RESET {
                *self = Self::default();
                continue;
            }
            if self.depth == 0 && *byte != b'{' {
                continue;
            }
            self.partial.push(*byte);
            self.count(*byte);
            if self.depth == 0 {
                each(Piece::Object(std::mem::take(&mut self.partial)));
            } else if self.partial.len() >= OBJECT_BYTES_MAX {
                *self = Self::default();
                each(Piece::TooLong);
            }
        }
    }

    fn count(&mut self, byte: u8) {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth -= 1,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    //! The bytes that clients were seen to write.
    use super::*;
    use proptest::prelude::*;

    fn objects(chunks: &[&[u8]]) -> Vec<String> {
        let mut objects = Objects::default();
        let mut found = Vec::new();
        for chunk in chunks {
            objects.take(chunk, |piece| match piece {
                Piece::Object(bytes) => found.push(String::from_utf8(bytes).unwrap()),
                Piece::TooLong => found.push("too long".to_owned()),
            });
        }
        found
    }

    #[test]
    fn two_commands_in_one_write_are_two() {
        let proxmox = b"{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":7}}\n{\"execute\":\"guest-ping\",\"arguments\":{}}\n";
        assert_eq!(objects(&[proxmox]).len(), 2);
    }

    #[test]
    fn an_object_needs_no_newline_and_may_come_in_pieces() {
        assert_eq!(
            objects(&[b" {\"a\":", b"{\"b\":[1]}}", b"junk"]),
            ["{\"a\":{\"b\":[1]}}"]
        );
    }

    #[test]
    fn braces_and_quotes_in_strings_do_not_count() {
        let text = br#"{"a":"}\"{"}"#;
        assert_eq!(objects(&[text]), [r#"{"a":"}\"{"}"#]);
    }

    #[test]
    fn the_reset_byte_forgets_a_partial_object() {
        assert_eq!(objects(&[b"{\"a\":\"", b"\xff{\"b\":1}"]), ["{\"b\":1}"]);
    }

    #[test]
    fn an_endless_object_is_forgotten() {
        let long = vec![b'{'; OBJECT_BYTES_MAX];
        assert_eq!(objects(&[&long, b"{}"]), ["too long", "{}"]);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_cutter_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            Objects::default().take(&bytes, |_| {});
        }

        #[test]
        fn cuts_do_not_matter(cut in 0usize..60) {
            let text: &[u8] = b"{\"a\":{\"b\":\"x}\"}}\n\xff{\"execute\":\"guest-ping\"}{\"c\":[{}]} ";
            let (head, tail) = text.split_at(cut.min(text.len()));
            prop_assert_eq!(objects(&[head, tail]), objects(&[text]));
        }
    }
}
