//! The process that lets a service go on when the writer cannot: when the time is over, or the writer is gone.
//!
//! The writer tells it of each freeze before it begins ([`Watch::keep`]) and of each end ([`Watch::forget`]), over a pipe; its end is
//! the writer's. [`serve`] is that process's whole work. It touches no disk.

use crate::still::Still;
use guest_agent_wire::sdk::Veto;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

/// Answer to a line of the writer's.
const HEARD: &[u8] = b"+";

/// The writer's end.
#[derive(Debug)]
pub struct Watch {
    child: Child,
    /// Until the end.
    orders: Option<ChildStdin>,
}

impl Watch {
    /// Starts the other process with this command, which must call [`serve`] on its standard input and output.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start(mut command: Command) -> io::Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let orders = child.stdin.take();
        Ok(Self { child, orders })
    }

    /// Sees to it that the service goes on after `hold`.
    ///
    /// # Errors
    /// The other process does not answer: without it nothing may be frozen.
    pub fn keep(&mut self, still: &Still, hold: Duration) -> Result<(), Veto> {
        let order = format!("{} {}\n", hold.as_millis(), still.order());
        self.tell(&order)
            .map_err(|error| Veto::retryable(format!("the watch: {error}")))
    }

    /// The service was let go on.
    pub fn forget(&mut self) {
        // A watch that is gone keeps nothing.
        drop(self.tell("\n"));
    }

    fn tell(&mut self, order: &str) -> io::Result<()> {
        let orders = self.orders.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        orders.write_all(order.as_bytes())?;
        let mut heard = [0; 1];
        let answers = self
            .child
            .stdout
            .as_mut()
            .ok_or(io::ErrorKind::BrokenPipe)?;
        answers.read_exact(&mut heard)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // The end of its input is its end, and it has let go by then. Killed, it could not.
        self.orders = None;
        drop(self.child.wait());
    }
}

/// Serves a writer until it is gone.
///
/// # Errors
/// The pipe's.
pub fn serve(orders: impl Read + AsFd, mut answers: impl Write) -> io::Result<()> {
    let mut orders = BufReader::new(orders);
    let mut kept: Option<(Still, Instant)> = None;
    loop {
        if let Some((still, until)) = &kept {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
            let mut descriptors = [PollFd::new(orders.get_ref(), PollFlags::IN)];
            if poll(&mut descriptors, Some(&timeout))? == 0 {
                let_go(still);
                kept = None;
                continue;
            }
        }
        let mut order = String::new();
        if orders.read_line(&mut order)? == 0 {
            if let Some((still, _)) = &kept {
                let_go(still);
            }
            return Ok(());
        }
        kept = match order.trim_end().split_once(' ') {
            Some((hold_ms, order)) => {
                let hold = hold_ms.parse().map_err(|_| io::ErrorKind::InvalidData)?;
                let still = Still::ordered(order).map_err(|veto| io::Error::other(veto.message))?;
                Some((still, Instant::now() + Duration::from_millis(hold)))
            }
            None => None,
        };
        answers.write_all(HEARD)?;
        answers.flush()?;
    }
}

fn let_go(still: &Still) {
    if let Err(veto) = still.let_go() {
        eprintln!("unit-writer: {}", veto.message);
    }
}
