//! What happens while a set is made: the requester's will and the VM's events.
//!
//! Called by the rooms of `run`. Invariant: from [`Watch::events`] being set, no event of QEMU is passed over.

use super::super::document::ReasonCode;
use super::failure::Failure;
use crate::vm::disturbance;
use serde_json::Value;
use std::future::Future;
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
