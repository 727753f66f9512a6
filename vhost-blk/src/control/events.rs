//! What happened, to every client that has negotiated.
//!
//! Filled by the engine's threads through a [`Notice`], read by the connections. A client that does not read loses events
//! rather than memory of ours.

use crate::engine::Notice;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::broadcast;
use vhost_blk_wire::event::Event;
use vhost_blk_wire::qmp::{ServerMessage, Timestamp};

/// Events that a slow client may be behind.
const BACKLOG: usize = 256;

/// The daemon's events.
#[derive(Clone, Debug)]
pub struct Events {
    sender: broadcast::Sender<Arc<str>>,
}

impl Events {
    /// Nobody listens yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            sender: broadcast::Sender::new(BACKLOG),
        }
    }

    /// For the engine: tells an event, never waits.
    #[must_use]
    pub fn notice(&self) -> Notice {
        let events = self.clone();
        Arc::new(move |event| events.tell(&event))
    }

    /// Sends an event to everybody who listens now.
    pub(super) fn tell(&self, event: &Event) {
        match render(event) {
            // An error says that nobody listens.
            Ok(line) => drop(self.sender.send(line)),
            Err(error) => tracing::error!(%error, "an event cannot be written"),
        }
    }

    /// Listens from now on.
    pub(super) fn listen(&self) -> broadcast::Receiver<Arc<str>> {
        self.sender.subscribe()
    }
}

impl Default for Events {
    fn default() -> Self {
        Self::new()
    }
}

/// The event as its line on the wire.
fn render(event: &Event) -> Result<Arc<str>, serde_json::Error> {
    let mut value = serde_json::to_value(event)?;
    let take = |value: &mut serde_json::Value, key| value.get_mut(key).map(serde_json::Value::take);
    let name = take(&mut value, "event");
    let data = take(&mut value, "data");
    let message = ServerMessage::Event {
        event: name
            .as_ref()
            .and_then(|name| name.as_str())
            .unwrap_or("UNKNOWN")
            .to_owned(),
        data,
        timestamp: now(),
    };
    Ok(format!("{}\r\n", serde_json::to_string(&message)?).into())
}

fn now() -> Timestamp {
    let unknown = Timestamp {
        seconds: -1,
        microseconds: -1,
    };
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(unknown, |now| Timestamp {
            seconds: i64::try_from(now.as_secs()).unwrap_or(-1),
            microseconds: i64::from(now.subsec_micros()),
        })
}
