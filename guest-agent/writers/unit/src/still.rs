//! How a service stands still: its processes are frozen, or it is stopped.
//!
//! Called by the writer, which makes it so, and by `watch`, which gets it as a line of text and can only undo it.

use crate::group::Group;
use crate::service::Service;
use guest_agent_wire::sdk::{Call, Veto};
use serde_json::{Value, json};
use std::path::Path;

/// A service that stands still, or is about to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Still {
    /// Its control group is frozen.
    Frozen(Group),
    /// systemd has stopped it.
    Stopped(Service),
}

impl Still {
    /// Returns when it stands still.
    ///
    /// # Errors
    /// It does not. It may be half way: [`Still::let_go`] is for the caller.
    pub fn make(&self, call: &Call<'_>) -> Result<(), Veto> {
        match self {
            Self::Frozen(group) => group.freeze(call),
            Self::Stopped(service) => service.stop(call),
        }
    }

    /// It stands still now.
    ///
    /// # Errors
    /// That cannot be told.
    pub fn is(&self) -> Result<bool, Veto> {
        match self {
            Self::Frozen(group) => group.is_frozen(),
            Self::Stopped(service) => service.is_stopped(),
        }
    }

    /// What changes if it does not stand still all the time.
    ///
    /// # Errors
    /// That cannot be told.
    pub fn evidence(&self) -> Result<Value, Veto> {
        match self {
            Self::Frozen(group) => {
                Ok(json!({ "group": group.name(), "processes": group.processes()? }))
            }
            Self::Stopped(service) => service.evidence(),
        }
    }

    /// Lets it go on, whatever state it is in; does not wait until it does.
    ///
    /// # Errors
    /// The kernel's or systemd's.
    pub fn let_go(&self) -> Result<(), Veto> {
        match self {
            Self::Frozen(group) => group.thaw(),
            Self::Stopped(service) => service.start(),
        }
    }

    /// In words for [`Still::ordered`].
    #[must_use]
    pub fn order(&self) -> String {
        match self {
            Self::Frozen(group) => format!("frozen {}", group.name()),
            Self::Stopped(service) => format!("stopped {}", service.name()),
        }
    }

    /// Of these words.
    ///
    /// # Errors
    /// They are no order.
    pub fn ordered(order: &str) -> Result<Self, Veto> {
        match order.split_once(' ') {
            Some(("frozen", directory)) => Group::at(Path::new(directory)).map(Self::Frozen),
            Some(("stopped", unit)) => Service::named(unit).map(Self::Stopped),
            Some(_) | None => Err(Veto::nonretryable(format!("{order:?} is no order"))),
        }
    }
}
