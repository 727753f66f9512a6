//! A session with the server: the commands of a set, each with a limit.
//!
//! Called by the writer. The connection is never made anew: a pause, and what it proves, belong to one run of the server.

use database_writer::{Calls, Watch};
use guest_agent_wire::sdk::{Call, Veto};
use guest_agent_wire::types::WriterFailure;
use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ErrorKind, FromRedisValue, RedisError, ServerErrorKind, cmd,
};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Between two looks at work of the server's.
const LOOK: Duration = Duration::from_millis(5);

/// How the server keeps its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Version of the server.
    pub(crate) version: String,
    /// Working directory; all files lie in it.
    pub(crate) directory: PathBuf,
    /// Name of the dump.
    pub(crate) dump: String,
    /// Directory of the append-only file in it, if there is one.
    pub(crate) append_only: Option<String>,
}

/// Channel of a message that no client reads, and that the server keeps back as long as it holds writes.
const CHANNEL: &str = "vmshadow";

/// An open session.
pub(crate) struct Session {
    connection: MultiplexedConnection,
    /// Waits for the end of the pause; nothing else can be asked there meanwhile.
    waiting: MultiplexedConnection,
    /// From the pause on.
    watch: Option<Watch>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Session").finish_non_exhaustive()
    }
}

/// `INFO` as names and values.
type Info = BTreeMap<String, String>;

fn is(info: &Info, name: &str, value: &str) -> bool {
    info.get(name).is_some_and(|found| found == value)
}

impl Session {
    pub(crate) fn connect(client: &Client, calls: &Calls, call: &Call<'_>) -> Result<Self, Veto> {
        // Limits are ours: the client's own would be shorter than a save.
        let config = AsyncConnectionConfig::new().set_response_timeout(None);
        let connect = || {
            let asked = client.get_multiplexed_async_connection_with_config(&config);
            calls.within(call, "connecting", judge, asked)
        };
        Ok(Self {
            connection: connect()?,
            waiting: connect()?,
            watch: None,
        })
    }

    fn ask<T: FromRedisValue>(
        &mut self,
        calls: &Calls,
        call: &Call<'_>,
        command: &Cmd,
    ) -> Result<T, Veto> {
        let what = String::from_utf8_lossy(&command.get_packed_command()).replace("\r\n", " ");
        calls.within(
            call,
            &what,
            judge,
            command.query_async(&mut self.connection),
        )
    }

    fn info(&mut self, calls: &Calls, call: &Call<'_>) -> Result<Info, Veto> {
        let text: String = self.ask(calls, call, cmd("INFO").arg("everything"))?;
        let pairs = text.lines().filter_map(|line| line.split_once(':'));
        Ok(pairs
            .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            .collect())
    }

    pub(crate) fn layout(&mut self, calls: &Calls, call: &Call<'_>) -> Result<Layout, Veto> {
        let version = self.info(calls, call)?.remove("redis_version");
        let mut setting = |name: &str| -> Result<Option<String>, Veto> {
            let found: BTreeMap<String, String> =
                self.ask(calls, call, cmd("CONFIG").arg("GET").arg(name))?;
            Ok(found.into_values().next())
        };
        let missing = || Veto::nonretryable("the server does not tell its directory");
        let has_log = setting("appendonly")?.as_deref() == Some("yes");
        Ok(Layout {
            version: version.unwrap_or_default(),
            directory: setting("dir")?.ok_or_else(missing)?.into(),
            dump: setting("dbfilename")?.ok_or_else(missing)?,
            // Before version 7 it was a file.
            append_only: match setting("appenddirname")? {
                name if !has_log => name.filter(|_| false),
                Some(name) => Some(name),
                None => setting("appendfilename")?,
            },
        })
    }

    /// A server that does not get its data to its files, or lets nobody wait for the end of a pause, is not asked to hold it.
    pub(crate) fn check(&mut self, calls: &Calls, call: &Call<'_>) -> Result<(), Veto> {
        let info = self.info(calls, call)?;
        if !is(&info, "loading", "0") {
            return Err(Veto::retryable("the server is still loading its data"));
        }
        let wanted = if is(&info, "aof_enabled", "1") {
            "aof_last_write_status"
        } else {
            "rdb_last_bgsave_status"
        };
        if !is(&info, wanted, "ok") {
            return Err(Veto::retryable(format!(
                "{wanted} is not ok: the server cannot write its files"
            )));
        }
        let message = message();
        let sent = message.query_async::<i64>(&mut self.waiting);
        calls.within(call, "PUBLISH", judge, sent)?;
        Ok(())
    }

    /// Holds writes, at most this long whatever becomes of us.
    pub(crate) fn pause(
        &mut self,
        calls: &Calls,
        hold: Duration,
        call: &Call<'_>,
    ) -> Result<(), Veto> {
        let mut command = cmd("CLIENT");
        let hold_ms = u64::try_from(hold.as_millis()).unwrap_or(u64::MAX);
        command.arg("PAUSE").arg(hold_ms).arg("WRITE");
        self.ask::<()>(calls, call, &command)?;
        self.watch = Some(calls.watch(until_over(self.waiting.clone())));
        Ok(())
    }

    /// The pause was not seen to end, whoever ended it. Never waits.
    pub(crate) fn still_holds(&self) -> Result<(), String> {
        match &self.watch {
            Some(watch) => watch.still_holds(),
            None => Err("it is not frozen".to_owned()),
        }
    }

    pub(crate) fn unpause(&mut self, calls: &Calls, call: &Call<'_>) -> Result<(), Veto> {
        self.ask(calls, call, cmd("CLIENT").arg("UNPAUSE"))
    }

    /// Waits until everything acknowledged is in a file, and no rewriting is under way that would change the evidence.
    pub(crate) fn settle(&mut self, calls: &Calls, call: &Call<'_>) -> Result<(), Veto> {
        loop {
            let info = self.info(calls, call)?;
            let is_busy = [
                "rdb_bgsave_in_progress",
                "aof_rewrite_in_progress",
                "aof_rewrite_scheduled",
            ]
            .iter()
            .any(|name| !is(&info, name, "0"));
            let is_done = if is(&info, "aof_enabled", "1") {
                is(&info, "aof_buffer_length", "0")
            } else {
                is(&info, "rdb_changes_since_last_save", "0")
            };
            if is_done && !is_busy {
                return Ok(());
            }
            if call.is_over() {
                let message = "the server did not get its data to its files in time";
                return Err(Veto::timeout(message));
            }
            if !is_busy && !is(&info, "aof_enabled", "1") {
                self.ask::<()>(calls, call, &cmd("BGSAVE"))?;
            }
            std::thread::sleep(LOOK);
        }
    }

    /// What every write changes; and which run of the server it is.
    pub(crate) fn evidence(&mut self, calls: &Calls, call: &Call<'_>) -> Result<Value, Veto> {
        let client: u64 = self.ask(calls, call, cmd("CLIENT").arg("ID"))?;
        let info = self.info(calls, call)?;
        let names: &[&str] = if is(&info, "aof_enabled", "1") {
            &["run_id", "aof_current_size"]
        } else {
            &[
                "run_id",
                "rdb_changes_since_last_save",
                "rdb_last_save_time",
            ]
        };
        let mut evidence = json!({ "client": client });
        for name in names {
            let Some(value) = info.get(*name) else {
                return Err(Veto::nonretryable(format!(
                    "the server does not tell its {name}"
                )));
            };
            evidence[*name] = json!(value);
        }
        Ok(evidence)
    }
}

/// Changes nothing and goes into no file; but since it goes to replicas, it waits as long as writes are held.
fn message() -> Cmd {
    let mut message = cmd("PUBLISH");
    message.arg(CHANNEL).arg("");
    message
}

/// Ends when the server lets writes go on, or is gone; says which.
async fn until_over(mut waiting: MultiplexedConnection) -> String {
    match message().query_async::<i64>(&mut waiting).await {
        Ok(_) => "the pause is over: writes go on".to_owned(),
        Err(error) => format!("waiting for the end of the pause: {error}"),
    }
}

/// Whether it may work another time.
fn judge(error: &RedisError) -> WriterFailure {
    if error.kind() == ErrorKind::AuthenticationFailed
        || error.kind() == ErrorKind::Server(ServerErrorKind::NoPerm)
    {
        WriterFailure::Nonretryable
    } else {
        WriterFailure::Retryable
    }
}
