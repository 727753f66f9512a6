//! Cuts a stream of bytes into the lines of both protocols.
//!
//! Used by the agent and by the writer library. Allocates no more than one message's limit, whatever comes.
#![deny(clippy::indexing_slicing)]

use crate::MESSAGE_BYTES_MAX;

/// Starts a new conversation, wherever it comes (host protocol).
pub const RESET: u8 = 0xff;

/// Cuts a stream into lines; says where a conversation begins anew.
#[derive(Debug, Default)]
pub struct Lines {
    partial: Vec<u8>,
}

/// What a stream contains.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    /// A line, without its newline. Blank lines are left out.
    Line(Vec<u8>),
    /// The reset byte; what was before it is forgotten.
    Reset,
    /// A line that is too long. The conversation must end.
    TooLong,
}

impl Lines {
    /// Takes bytes; gives `each` what they complete, in order.
    pub fn take(&mut self, bytes: &[u8], mut each: impl FnMut(Piece)) {
        for byte in bytes {
            match *byte {
                RESET => {
                    self.partial.clear();
                    each(Piece::Reset);
                }
                b'\n' => {
                    let line = std::mem::take(&mut self.partial);
                    if !line.iter().all(u8::is_ascii_whitespace) {
                        each(Piece::Line(line));
                    }
                }
                byte if self.partial.len() + 1 < MESSAGE_BYTES_MAX => self.partial.push(byte),
                _ => {
                    self.partial.clear();
                    each(Piece::TooLong);
                    return;
                }
            }
        }
    }
}
