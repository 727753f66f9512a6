//! What happens while a set is made: the requester's will and the VM's events.
//!
//! Called by the rooms of `run`. Invariant: from [`Watch::events`] being set, no event of QEMU is passed over.

use super::super::document::ReasonCode;
use super::failure::Failure;
use crate::guest::Guest;
use crate::vm::{disturbance, port_closed};
use serde_json::Value;
use std::future::Future;
use std::sync::Arc;
use tokio::sync::{broadcast, watch};

/// What happens meanwhile: the requester's will and the VM's events.
pub(super) struct Watch {
    pub(super) cancel: watch::Receiver<bool>,
    /// Receiver of QEMU's events while they matter: from the sending of `freeze` on.
    pub(super) events: Option<broadcast::Receiver<Value>>,
    pub(super) disturbances: Vec<String>,
}

impl Watch {
    pub(super) fn cancelled(&self) -> bool {
        *self.cancel.borrow()
    }

    /// Waits for `work`, but no longer than the requester wants it and the VM is left alone.
    pub(super) async fn race<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Failure> {
        if self.cancelled() {
            return Err(cancelled());
        }
        tokio::pin!(work);
        loop {
            let events = &mut self.events;
            let event = async {
                match events {
                    Some(events) => events.recv().await,
                    None => std::future::pending().await,
                }
            };
            let what = tokio::select! {
                biased;
                // An error means that nobody can cancel any more.
                Ok(()) = self.cancel.changed() => {
                    if *self.cancel.borrow() {
                        return Err(cancelled());
                    }
                    continue;
                }
                event = event => heard(event),
                done = &mut work => return Ok(done),
            };
            if let Some(what) = what {
                self.disturbances.push(what.clone());
                return Err(Failure::new(ReasonCode::VmDisturbed, what).retryable());
            }
        }
    }

    /// Notes what has come so far.
    pub(super) fn drain(&mut self) {
        let Some(events) = &mut self.events else {
            return;
        };
        loop {
            let event = match events.try_recv() {
                Ok(event) => Ok(event),
                Err(broadcast::error::TryRecvError::Empty) => return,
                Err(broadcast::error::TryRecvError::Closed) => {
                    Err(broadcast::error::RecvError::Closed)
                }
                Err(broadcast::error::TryRecvError::Lagged(lost)) => {
                    Err(broadcast::error::RecvError::Lagged(lost))
                }
            };
            let ended = matches!(event, Err(broadcast::error::RecvError::Closed));
            if let Some(what) = heard(event) {
                self.disturbances.push(what);
            }
            if ended {
                self.events = None;
                return;
            }
        }
    }
}

/// Ends the conversation with an agent that lets go of its virtio-serial port: it would not answer any more. Another run of it may open
/// the port again at once, but knows nothing of this set, and the hold is over. QEMU itself keeps the connection as it is.
pub(super) fn end_with_port(
    mut events: broadcast::Receiver<Value>,
    port: String,
    guest: &Arc<Guest>,
) {
    let guest = Arc::downgrade(guest);
    tokio::spawn(async move {
        loop {
            match events.recv().await {
                Ok(event) if port_closed(&event, &port) => break,
                // One that was lost costs time: then the limit of the call ends it.
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                // The monitor is let go when the set is over.
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
        if let Some(Guest::Native(guest)) = guest.upgrade().as_deref() {
            guest.close("the agent let go of its port");
        }
    });
}

pub(super) fn heard(event: Result<Value, broadcast::error::RecvError>) -> Option<String> {
    match event {
        Ok(event) => disturbance(&event),
        Err(broadcast::error::RecvError::Closed) => {
            Some("QEMU's monitor connection was lost".to_owned())
        }
        Err(broadcast::error::RecvError::Lagged(lost)) => {
            Some(format!("{lost} of QEMU's events were lost"))
        }
    }
}

pub(super) fn cancelled() -> Failure {
    Failure::new(
        ReasonCode::Cancelled,
        "the requester cancelled or went away",
    )
}
