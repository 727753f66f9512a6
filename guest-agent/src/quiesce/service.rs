//! The door to the actor: requests in, answers out, for the two protocols and for writers.
//!
//! Cheap to clone. Every method returns at once; answers come by the closure that goes along.

use crate::hold::client::FromHelper;
use guest_agent_wire::host::{
    AgentError, BackupComplete, Failure, Freeze, PostSnapshot, Prepare, Restore,
};
use guest_agent_wire::writer::Reply;
use serde_json::Value;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

/// Takes the answer to a request.
pub type Answer = Box<dyn FnOnce(Result<Value, AgentError>) + Send>;

/// A request of either protocol.
#[derive(Debug)]
pub enum Request {
    /// A conversation begins on the native port.
    Hello {
        /// Versions that the bridge speaks.
        versions: Vec<u32>,
    },
    /// Writers and file systems.
    Identify,
    /// See [`Prepare`].
    Prepare(Prepare),
    /// See [`Freeze`].
    Freeze(Freeze),
    /// Thaw a native set.
    Thaw {
        /// The set.
        set: String,
        /// Its generation.
        generation: u64,
    },
    /// See [`PostSnapshot`].
    PostSnapshot(PostSnapshot),
    /// See [`BackupComplete`].
    BackupComplete(BackupComplete),
    /// Open a restore; see [`Restore`].
    PreRestore(Restore),
    /// End it.
    PostRestore(Restore),
    /// End a native set.
    Abort {
        /// The set.
        set: String,
        /// Why.
        reason: String,
    },
    /// What is going on.
    Status,
    /// The host side of the native port is gone: ends its set.
    HostGone,
    /// Freeze for a client of the QEMU guest agent protocol.
    QgaFreeze {
        /// Only these mount points, if given.
        only: Option<Vec<String>>,
    },
    /// Thaw for such a client; answers the number of file systems.
    QgaThaw,
}

/// What the actor receives.
pub enum Signal {
    /// A request.
    Request(Request, Answer),
    /// From the helper.
    Helper(FromHelper),
    /// A writer's answer to the event with this number.
    Writer(u64, Result<Reply, Failure>),
    /// A connected writer hung up, or was hung up on.
    WriterGone {
        /// Its instance id.
        instance_id: String,
        /// Why.
        why: String,
    },
    /// A connected writer is at work on the event that it was sent.
    WriterProgress {
        /// Its instance id.
        instance_id: String,
    },
    /// A connected writer has resumed by itself.
    WriterReleased {
        /// Its instance id.
        instance_id: String,
        /// The hold that it means.
        generation: u64,
        /// Why.
        why: String,
    },
    /// The alarm of the writers' windows rang.
    WindowOver,
}

impl std::fmt::Debug for Signal {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Request(request, _) => request.fmt(out),
            Self::Helper(message) => message.fmt(out),
            Self::Writer(number, answer) => write!(out, "Writer({number}, {answer:?})"),
            Self::WriterGone { instance_id, .. } => write!(out, "WriterGone({instance_id})"),
            Self::WriterProgress { instance_id } => write!(out, "WriterProgress({instance_id})"),
            Self::WriterReleased { instance_id, .. } => {
                write!(out, "WriterReleased({instance_id})")
            }
            Self::WindowOver => out.write_str("WindowOver"),
        }
    }
}

/// Sends to the actor.
#[derive(Clone, Debug)]
pub struct Service {
    sender: Sender<Signal>,
    frozen: Arc<AtomicBool>,
}

impl Service {
    /// To the actor that reads the other end.
    #[must_use]
    pub fn new(sender: Sender<Signal>) -> Self {
        Self {
            sender,
            frozen: Arc::default(),
        }
    }

    /// Asks; the answer goes to `answer`.
    pub fn ask(
        &self,
        request: Request,
        answer: impl FnOnce(Result<Value, AgentError>) + Send + 'static,
    ) {
        self.send(Signal::Request(request, Box::new(answer)));
    }

    /// Asks and waits. Not for the actor's own thread.
    pub fn ask_and_wait(&self, request: Request) -> Option<Result<Value, AgentError>> {
        let (sender, receiver) = std::sync::mpsc::channel();
        self.ask(request, move |answer| sender.send(answer).unwrap_or(()));
        receiver.recv().ok()
    }

    /// Something is, or is about to be, frozen.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::SeqCst)
    }

    /// Called by the actor when that changes.
    pub(super) fn publish(&self, frozen: bool) {
        self.frozen.store(frozen, Ordering::SeqCst);
    }

    /// Tells the actor something.
    pub fn send(&self, signal: Signal) {
        // The actor lives as long as the process.
        self.sender.send(signal).unwrap_or(());
    }
}
