//! Waiting on conditions with a deadline.
//!
//! Called by every room of the harness. Deadlines are generous on purpose: they decide when a test
//! has failed, never how long it takes.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const POLL: Duration = Duration::from_millis(10);

/// The deadline for one step inside an emulated machine on a busy host.
pub const STEP: Duration = Duration::from_secs(60);
/// The deadline for a boot under TCG on a busy host (alone it takes 2 to 5 s).
pub const BOOT: Duration = Duration::from_secs(180);

/// Polls `condition` until it yields a value; fails with `what` after `deadline`.
pub fn until<T>(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let begin = Instant::now();
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if begin.elapsed() > deadline {
            bail!("waited {} s for {what}", deadline.as_secs_f32());
        }
        thread::sleep(POLL);
    }
}
