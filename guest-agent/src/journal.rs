//! The log: lines kept in a fixed ring in memory while anything is frozen, written to standard error otherwise.
//!
//! Every room writes here through [`note`]. Standard error may be a pipe to a journal whose own files lie on a frozen file
//! system: a blocked write there would keep the guest frozen. So between [`hold`] and [`release`] nothing is written, and
//! nothing is allocated either: lines are cut to a fixed length and the oldest are lost first.

use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

const LINE_BYTES: usize = 240;
const LINES: usize = 128;

#[derive(Clone, Copy)]
struct Line {
    bytes: [u8; LINE_BYTES],
    len: usize,
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            let Some(place) = self.bytes.get_mut(self.len) else {
                break;
            };
            *place = if byte == b'\n' { b' ' } else { byte };
            self.len += 1;
        }
        Ok(())
    }
}

struct Ring {
    lines: [Line; LINES],
    first: usize,
    count: usize,
    lost: u64,
    held: bool,
}

static RING: Mutex<Ring> = Mutex::new(Ring {
    lines: [Line {
        bytes: [0; LINE_BYTES],
        len: 0,
    }; LINES],
    first: 0,
    count: 0,
    lost: 0,
    held: false,
});

fn ring() -> MutexGuard<'static, Ring> {
    RING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes a line, at once or after the thaw.
pub fn note(message: fmt::Arguments<'_>) {
    let mut ring = ring();
    if ring.count == LINES {
        ring.first = (ring.first + 1) % LINES;
        ring.count -= 1;
        ring.lost += 1;
    }
    let at = (ring.first + ring.count) % LINES;
    if let Some(line) = ring.lines.get_mut(at) {
        line.len = 0;
        // A line that is too long is cut; there is nothing to report to.
        line.write_fmt(message).unwrap_or(());
    }
    ring.count += 1;
    if !ring.held {
        flush(&mut ring);
    }
}

/// From now on lines stay in memory.
pub fn hold() {
    ring().held = true;
}

/// Everything is thawed: writes what was kept.
pub fn release() {
    let mut ring = ring();
    ring.held = false;
    flush(&mut ring);
}

fn flush(ring: &mut Ring) {
    let mut out = std::io::stderr().lock();
    // A log that cannot be written must not stop the agent.
    if ring.lost > 0 {
        writeln!(out, "guest-agent: {} older lines were lost", ring.lost).unwrap_or(());
        ring.lost = 0;
    }
    for offset in 0..ring.count {
        if let Some(line) = ring.lines.get((ring.first + offset) % LINES) {
            let text = line.bytes.get(..line.len).unwrap_or_default();
            let text = String::from_utf8_lossy(text);
            writeln!(out, "guest-agent: {text}").unwrap_or(());
        }
    }
    ring.count = 0;
}
