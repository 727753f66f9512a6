//! A session with the server: statements, each with a limit, and the look from beside whether the server still has it. The server
//! releases what a session holds when it ends.
//!
//! Called by the writer and by the statements of each server.

use database_writer::{Calls, Watch};
use guest_agent_wire::sdk::{Call, Veto};
use guest_agent_wire::types::WriterFailure;
use mysql_async::prelude::{FromRow, Queryable};
use mysql_async::{Conn, Error, Opts};
use std::time::Duration;

/// Longest time between prepare and freeze, in which the session is idle.
const IDLE_S: u64 = 900;

/// Time for a server to end a session.
const CLOSING: Duration = Duration::from_secs(5);

/// Between two looks whether the server still has the session.
const LOOK: Duration = Duration::from_millis(50);

/// An open session.
#[derive(Debug)]
pub struct Session {
    connection: Conn,
    /// From the freeze on.
    watch: Option<Watch>,
}

impl Session {
    /// A new one.
    ///
    /// # Errors
    /// No server, or it does not want this user.
    pub fn connect(options: Opts, calls: &Calls, call: &Call<'_>) -> Result<Self, Veto> {
        let connection = calls.within(call, "connecting", judge, Conn::new(options))?;
        Ok(Self {
            connection,
            watch: None,
        })
    }

    /// From now on `other` looks in `processlist`, a table of the server, whether it still has this session. It is another one, since each
    /// statement of this one would put off the server's own dead man.
    pub fn watch_from(&mut self, other: Self, processlist: &'static str, calls: &Calls) {
        let lost = until_ended(self.connection.id(), processlist, other.connection);
        self.watch = Some(calls.watch(lost));
    }

    /// The server was not seen to have ended it. Never waits.
    ///
    /// # Errors
    /// Why it is lost.
    pub fn still_holds(&self) -> Result<(), String> {
        match &self.watch {
            Some(watch) => watch.still_holds(),
            None => Err("it is not frozen".to_owned()),
        }
    }

    /// The server has released everything when this returns, or does not answer.
    pub fn close(self, calls: &Calls) {
        let call = Call::alone(CLOSING);
        drop(calls.within(&call, "closing", judge, self.connection.disconnect()));
    }

    /// A statement without rows.
    ///
    /// # Errors
    /// What the server says of it, or that it says nothing in time.
    pub fn run(&mut self, calls: &Calls, call: &Call<'_>, statement: &str) -> Result<(), Veto> {
        let asked = self.connection.query_drop(statement);
        calls.within(call, statement, judge, asked)
    }

    /// A statement's rows.
    ///
    /// # Errors
    /// What the server says of it, or that it says nothing in time.
    pub fn rows<T: FromRow + Send + 'static>(
        &mut self,
        calls: &Calls,
        call: &Call<'_>,
        statement: &str,
    ) -> Result<Vec<T>, Veto> {
        let asked = self.connection.query(statement);
        calls.within(call, statement, judge, asked)
    }

    /// May say nothing from prepare to the freeze.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn may_idle(&mut self, calls: &Calls, call: &Call<'_>) -> Result<(), Veto> {
        self.limits(calls, call, IDLE_S)
    }

    /// Is ended by the server itself if it says nothing for longer than it may hold: the server's own dead man.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn holds_at_most(
        &mut self,
        calls: &Calls,
        call: &Call<'_>,
        hold: Duration,
    ) -> Result<(), Veto> {
        self.limits(calls, call, hold.as_secs() + 1)
    }

    fn limits(&mut self, calls: &Calls, call: &Call<'_>, idle_s: u64) -> Result<(), Veto> {
        // A quarter is left for the answer: one that is late fails the set as well, but says less.
        let wait_s = (call.remaining() * 3 / 4).as_secs().max(1);
        let settings = format!("SET SESSION lock_wait_timeout = {wait_s}, wait_timeout = {idle_s}");
        self.run(calls, call, &settings)
    }
}

/// Looks through `other` until the server has ended a session, or is told to; says so. A server that does not answer has ended nothing.
async fn until_ended(session: u32, processlist: &'static str, mut other: Conn) -> String {
    let is_there =
        format!("SELECT COUNT(*) FROM {processlist} WHERE id = {session} AND command <> 'Killed'");
    loop {
        match other.query_first::<u64, _>(is_there.as_str()).await {
            Ok(Some(1)) => tokio::time::sleep(LOOK).await,
            Ok(_) => return format!("the server has ended session {session}, which held commits"),
            Err(error) => return format!("looking for session {session}: {error}"),
        }
    }
}

/// Whether it may work another time.
fn judge(error: &Error) -> WriterFailure {
    match error {
        // Access denied, for a user, a database, a table, a statement; no such statement, no such variable.
        Error::Server(error)
            if [1045, 1044, 1142, 1227, 1698, 1064, 1193].contains(&error.code) =>
        {
            WriterFailure::Nonretryable
        }
        // A lock was not to be had in time.
        Error::Server(error) if [1205, 1969].contains(&error.code) => WriterFailure::Timeout,
        Error::Server(error) if error.code == 1040 => WriterFailure::Outofresources,
        Error::Server(_) | Error::Driver(_) | Error::Io(_) | Error::Other(_) | Error::Url(_) => {
            WriterFailure::Retryable
        }
    }
}
