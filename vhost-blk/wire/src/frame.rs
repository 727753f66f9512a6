//! Splits a byte stream into JSON values, as QMP peers send them.
//!
//! Called by every reader of QMP framing. Real clients (`qemu.qmp`, `qmp-shell`) put nothing behind a value, others a
//! newline or CR LF, so a line reader would hang: the end of a value is the end of its JSON.
//!
//! Invariant: at most [`MESSAGE_BYTES_MAX`] bytes are ever kept, so a peer cannot make the reader grow.

use serde_json::Value;

/// Longest message that is accepted, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Why a byte stream cannot be followed any further. The connection has to be closed after any of them, because the
/// place where the next message starts is lost.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The peer sent something that is not JSON.
    #[error("not a JSON value: {0}")]
    NotJson(#[source] serde_json::Error),
    /// The peer sent a value that is longer than [`MESSAGE_BYTES_MAX`].
    #[error("a message is longer than {MESSAGE_BYTES_MAX} bytes")]
    TooLong,
}

/// Incremental splitter of a byte stream into JSON values.
#[derive(Debug, Default)]
pub struct JsonStream {
    pending: Vec<u8>,
    /// Length that `pending` must exceed before parsing is tried again; doubling it keeps a value that arrives byte by
    /// byte from costing quadratic time.
    retry_above_bytes: usize,
}

impl JsonStream {
    /// An empty stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes as they came from the peer.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] if an unfinished value would exceed [`MESSAGE_BYTES_MAX`].
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), FrameError> {
        if self.pending.len().saturating_add(bytes.len()) > MESSAGE_BYTES_MAX {
            return Err(FrameError::TooLong);
        }
        self.pending.extend_from_slice(bytes);
        if matches!(bytes.last(), Some(b'\n' | b'}')) {
            self.retry_above_bytes = 0;
        }
        Ok(())
    }

    /// The next whole value, or `None` if more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError::NotJson`] if the bytes can never become a value.
    pub fn next_value(&mut self) -> Result<Option<Value>, FrameError> {
        if self.pending.len() < self.retry_above_bytes {
            return Ok(None);
        }
        let mut values = serde_json::Deserializer::from_slice(&self.pending).into_iter::<Value>();
        let parsed = values.next();
        let used_bytes = values.byte_offset();
        match parsed {
            None => {
                self.pending.clear();
                Ok(None)
            }
            Some(Ok(value)) => {
                self.pending.drain(..used_bytes);
                self.retry_above_bytes = 0;
                Ok(Some(value))
            }
            Some(Err(error)) if error.is_eof() => {
                self.retry_above_bytes = self.pending.len().saturating_mul(2);
                Ok(None)
            }
            Some(Err(error)) => Err(FrameError::NotJson(error)),
        }
    }
}

#[cfg(test)]
mod tests;
