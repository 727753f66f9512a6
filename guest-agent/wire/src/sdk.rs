//! The writer library: what an application needs to take part in snapshot sets.
//!
//! An application implements [`Writer`] (its methods are VSS's `CVssWriter`'s) and calls [`run`]. The library keeps the
//! connection, answers the agent, and sees to it that an application is never left frozen: it resumes by its own timer and
//! when the connection ends, and then says so. It uses the standard library alone; all methods are called on the thread that
//! called [`run`], one after the other.
//!
//! An application that is reached by an asynchronous client keeps a runtime of its own and blocks on it in each method,
//! inside [`Call::remaining`]; a multi-threaded runtime of one thread keeps the client's connection alive between two events.
//!
//! ```no_run
//! use guest_agent_wire::sdk::{self, Call, Held, Veto, Writer};
//! use guest_agent_wire::writer::{Freeze, Registration, Thaw};
//! use serde_json::Value;
//!
//! struct Queue { paused: bool, messages: u64 }
//!
//! impl Writer for Queue {
//!     fn registration(&self) -> Registration {
//!         Registration {
//!             freeze_timeout_ms: 20_000,
//!             ..Registration::new("example-queue", "example-queue:main", "Example queue")
//!         }
//!     }
//!     fn freeze(&mut self, _: &Call<'_>, _: &Freeze) -> Result<Value, Veto> {
//!         if self.paused {
//!             return Err(Veto::retryable("it is paused for other reasons"));
//!         }
//!         self.paused = true; // and wait until the last write is out
//!         Ok(self.messages.into()) // what a write would have changed
//!     }
//!     fn thaw(&mut self, _: &Call<'_>, _: &Thaw) -> Result<Held, Veto> {
//!         let held = std::mem::replace(&mut self.paused, false);
//!         Ok(Held { held, evidence: self.messages.into() })
//!     }
//!     fn abort(&mut self, _set: &str, _reason: &str) {
//!         self.paused = false;
//!     }
//! }
//!
//! // Returns only if the agent refuses this writer.
//! let refused = sdk::run(&mut Queue { paused: false, messages: 0 }, guest_agent_wire::writer::SOCKET_PATH.as_ref());
//! eprintln!("{refused}");
//! ```

mod call;
mod session;

pub use call::Call;
pub use session::{Ended, run, serve};

use crate::components::ComponentReply;
use crate::metadata::Metadata;
use crate::types::WriterFailure;
use crate::writer::{
    BackupComplete, BackupShutdown, Freeze, PostSnapshot, PrepareBackup, PrepareSnapshot,
    Registration, Restore, Thaw,
};
use serde_json::Value;

/// Why a writer says no, or has failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Veto {
    /// Code.
    pub code: WriterFailure,
    /// For people.
    pub message: String,
}

impl Veto {
    /// It may work another time.
    pub fn retryable(message: impl Into<String>) -> Self {
        Self::new(WriterFailure::Retryable, message)
    }

    /// It will not work another time either.
    pub fn nonretryable(message: impl Into<String>) -> Self {
        Self::new(WriterFailure::Nonretryable, message)
    }

    /// The set holds only part of the disks that the writer's files lie on.
    pub fn inconsistent(message: impl Into<String>) -> Self {
        Self::new(WriterFailure::Inconsistentsnapshot, message)
    }

    /// It did not finish in time.
    pub fn timeout(message: impl Into<String>) -> Self {
        Self::new(WriterFailure::Timeout, message)
    }

    /// Memory, connections or the like ran out.
    pub fn out_of_resources(message: impl Into<String>) -> Self {
        Self::new(WriterFailure::Outofresources, message)
    }

    /// With any code.
    pub fn new(code: WriterFailure, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

/// What a writer says at the thaw.
#[derive(Clone, Debug, PartialEq)]
pub struct Held {
    /// Writes were held from the answer to `freeze` until now.
    pub held: bool,
    /// What proves it; for a writer that holds its writes itself it must equal what `freeze` returned. Bounded, with all that
    /// is said of components, by [`crate::writer::WORDS_BYTES_MAX`].
    pub evidence: Value,
}

/// An application's part in sets. Only its name, freeze, thaw and abort have no default; the defaults agree and do nothing, as
/// `CVssWriter`'s do.
///
/// The order of a set: `prepare_backup`, `prepare_snapshot`, `freeze`, `thaw`, `post_snapshot`, and later `backup_complete` or
/// `backup_shutdown`; at any step instead of the rest: `abort`. Another set may begin between `post_snapshot` and
/// `backup_complete`. The order of a restore: `pre_restore`, `post_restore`.
///
/// **The library's timer runs between calls, not beside them**: the methods have the application to themselves (`&mut self`), so
/// nothing can let it go while one of them waits. An application is frozen for at most `hold_ms` and what the call under way
/// takes: `freeze`, `still_holds` or `thaw`. The library cannot end these, so each must end by itself: whatever they wait for
/// (a server, a lock, a child) is waited for with [`Call::remaining`] as its limit, and `still_holds` does not wait. A client
/// without time-outs has no place in them. What must hold even if the process stands still is the application's own: a lock
/// that ends with its connection, a pause with a time (as with `redis-writer`), a second process (as with `unit-writer`).
pub trait Writer {
    /// Who it is. Asked anew at each connection.
    fn registration(&self) -> Registration;

    /// OnIdentify: its metadata document. The names in it are filled in by the agent.
    fn identify(&mut self, call: &Call<'_>) -> Result<Metadata, Veto> {
        let _unused = call;
        Ok(Metadata::default())
    }

    /// OnPrepareBackup: the last chance to say no before any effect. Stamps and private metadata of components may be
    /// returned here or by `post_snapshot`.
    fn prepare_backup(
        &mut self,
        call: &Call<'_>,
        backup: &PrepareBackup,
    ) -> Result<Vec<ComponentReply>, Veto> {
        let _unused = (call, backup);
        Ok(Vec::new())
    }

    /// OnPrepareSnapshot: complete transactions, flush caches. Heavy work belongs here; [`Call::progress`] keeps it from being
    /// taken for stuck.
    fn prepare_snapshot(
        &mut self,
        call: &Call<'_>,
        snapshot: &PrepareSnapshot,
    ) -> Result<(), Veto> {
        let _unused = (call, snapshot);
        Ok(())
    }

    /// OnFreeze: hold writes from the return on. The value is the evidence; one that holds its writes itself (`Hold::App`) must
    /// give some, or the agent takes it for a refusal. The library calls [`Writer::abort`] when `hold_ms` have passed since the
    /// call, at once if they have when it returns. One that fails holds nothing afterwards.
    fn freeze(&mut self, call: &Call<'_>, hold: &Freeze) -> Result<Value, Veto>;

    /// Whether writes are still held. Asked about ten times a second between `freeze` and `thaw`; must not wait. An error (why
    /// not) fails the set at once: the library calls [`Writer::abort`] and tells the agent.
    fn still_holds(&mut self) -> Result<(), String> {
        Ok(())
    }

    /// OnThaw: go on, and tell whether writes were held.
    fn thaw(&mut self, call: &Call<'_>, hold: &Thaw) -> Result<Held, Veto>;

    /// OnPostSnapshot: the copies are there.
    fn post_snapshot(
        &mut self,
        call: &Call<'_>,
        snapshot: &PostSnapshot,
    ) -> Result<Vec<ComponentReply>, Veto> {
        let _unused = (call, snapshot);
        Ok(Vec::new())
    }

    /// OnBackupComplete: the requester has read what it wanted of the copies, and says whether its backup succeeded.
    fn backup_complete(&mut self, call: &Call<'_>, outcome: &BackupComplete) -> Result<(), Veto> {
        let _unused = (call, outcome);
        Ok(())
    }

    /// OnBackupShutdown: the requester, or the agent, has gone without a word on the backup; nothing is known of it.
    fn backup_shutdown(&mut self, shutdown: &BackupShutdown) -> Result<(), Veto> {
        let _unused = shutdown;
        Ok(())
    }

    /// OnAbort: undo everything and go on: what `thaw` and `post_snapshot` would have undone. Comes in any state and more than
    /// once; also from the library itself, when the hold has lasted too long or the agent is gone. After a `pre_restore` it
    /// means that the restore was given up: files may have been replaced or not.
    fn abort(&mut self, set: &str, reason: &str);

    /// OnPreRestore: files are about to be replaced; let go of them.
    fn pre_restore(
        &mut self,
        call: &Call<'_>,
        restore: &Restore,
    ) -> Result<Vec<ComponentReply>, Veto> {
        let _unused = (call, restore);
        Ok(Vec::new())
    }

    /// OnPostRestore: files have been replaced, as each component's `restored` says; go on.
    fn post_restore(
        &mut self,
        call: &Call<'_>,
        restore: &Restore,
    ) -> Result<Vec<ComponentReply>, Veto> {
        let _unused = (call, restore);
        Ok(Vec::new())
    }
}

#[cfg(test)]
mod tests;
