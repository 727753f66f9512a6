//! Client of QEMU's own guest agent (`qemu-ga`), for guests that have no agent of ours: Linux, and Windows, where it stands
//! between us and VSS.
//!
//! Called by `run` and `undo`. It must not know sets, witnesses or levels: it tells what was said, and [`StockGuest`] keeps it.
//! Invariants: one call at a time (the agent numbers nothing and works through its input in order); nothing counts as an answer
//! before the agent has echoed our own sync, so no answer to an earlier host is taken for ours.

mod errors;
mod vssadmin;

pub use vssadmin::VssWriter;

use super::lines::Cutter;
use super::{AgentAddress, GuestError, dialling};
use crate::link::{Decode, Incoming, Link, Stream};
use base64::Engine as _;
use guest_agent_wire::host::AgentError;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

/// Resets the agent's parser, and stands before the agent's answer to a sync.
const DELIMITER: u8 = 0xff;
/// How often the sync is sent again while the port is not yet open in the guest.
const SYNC_AGAIN: Duration = Duration::from_secs(2);
/// Between two looks at a program that runs in the guest.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// What the agent runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StockSystem {
    /// Windows: `freeze` and `thaw` go through VSS.
    Windows,
    /// Anything else: `freeze` and `thaw` are FIFREEZE and FITHAW, and know no limit of time.
    Unix,
}

/// A file system or volume in the agent's list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StockFilesystem {
    /// Device or volume.
    pub name: String,
    /// Where it is mounted.
    pub mountpoint: String,
    /// Type in the guest's words.
    pub fstype: String,
}

/// Everything that QEMU's agent said of itself and of one set; part of the set document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StockGuest {
    /// Its version.
    pub version: String,
    /// What it runs on.
    pub system: StockSystem,
    /// Name of the operating system, for people.
    pub system_name: String,
    /// What it lists as mounted.
    pub filesystems: Vec<StockFilesystem>,
    /// Number that it answered to `freeze`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<u64>,
    /// Number that it answered to `thaw`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thawed: Option<u64>,
    /// Windows: VSS's own list of writers after the thaw, read by `vssadmin` in the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vss_writers: Option<Vec<VssWriter>>,
    /// Windows: why there is no such list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vss_writers_not_heard: Option<String>,
}

/// An open conversation.
#[derive(Debug)]
pub struct StockClient {
    link: Link,
    waiting: Arc<Waiting>,
}

/// Which call the next line answers.
#[derive(Debug, Default)]
struct Waiting {
    /// The call's number.
    id: AtomicU64,
    /// The number in the sync that has not been echoed, else 0.
    sync: AtomicU64,
    /// A command was sent in one piece with the sync: the call is answered by the line after the echo.
    command_follows: AtomicBool,
}

/// Lines of QEMU's agent.
struct Lines {
    cutter: Cutter,
    meaning: Meaning,
}

/// What a line answers.
struct Meaning {
    waiting: Arc<Waiting>,
    /// First sync of this connection: lower numbers are echoes for another host.
    first_sync: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Line {
    Return(Value),
    Error(Value),
}

impl Decode for Lines {
    fn asked(&mut self) {
        self.cutter.asked();
    }

    fn decode(&mut self, bytes: &[u8]) -> Result<Vec<Incoming>, String> {
        let mut messages = Vec::new();
        let Self { cutter, meaning } = self;
        cutter.cut(bytes, |line| messages.extend(meaning.of(line)))?;
        Ok(messages)
    }
}

impl Meaning {
    /// The answer on this line, if it is one to a call of this conversation.
    fn of(&self, line: &[u8]) -> Option<Incoming> {
        let delimited = line.contains(&DELIMITER);
        let text = line.rsplit(|byte| *byte == DELIMITER).next()?;
        let line: Line = serde_json::from_slice(text).ok()?;
        let sync = self.waiting.sync.load(Ordering::Acquire);
        let answer = |id, result| Some(Incoming::Answer { id, result });
        match line {
            // Echoes of syncs stand behind the delimiter and nothing else does. A late echo of a sync that was sent again answers
            // nobody.
            Line::Return(value) if delimited => {
                let echoed = value.as_u64()?;
                if echoed == sync {
                    self.waiting.sync.store(0, Ordering::Release);
                }
                let ours = self.first_sync <= echoed && echoed <= sync;
                if !ours || self.waiting.command_follows.load(Ordering::Acquire) {
                    return None;
                }
                answer(echoed, Ok(value))
            }
            // Remains of another host's conversation, or the parser's complaint about half a command that it left.
            Line::Return(_) | Line::Error(_) if sync != 0 => None,
            Line::Return(value) => answer(self.waiting.id.load(Ordering::Acquire), Ok(value)),
            Line::Error(error) => answer(self.waiting.id.load(Ordering::Acquire), Err(error)),
        }
    }
}

impl StockClient {
    /// Connects and syncs until the agent answers, since a guest that boots opens its port late.
    ///
    /// # Errors
    /// Nobody answers within `limit`.
    pub async fn connect(address: &AgentAddress, limit: Duration) -> Result<Self, GuestError> {
        let sync = async |stream| {
            let client = Self::unsynced(stream);
            loop {
                let sync = client.call("guest-sync-delimited", Value::Null, None);
                if let Ok(answer) = tokio::time::timeout(SYNC_AGAIN, sync).await {
                    break answer.map(drop);
                }
            }?;
            Ok(client)
        };
        dialling::until_answered(address, limit, sync).await
    }

    fn unsynced(stream: Stream) -> Self {
        // Answers to an earlier bridge may still be in the pipe: its numbers must not be ours.
        let first_sync = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(1, |d| u64::try_from(d.as_micros()).unwrap_or(1));
        let waiting = Arc::new(Waiting::default());
        waiting.sync.store(first_sync, Ordering::Release);
        let lines = Lines {
            cutter: Cutter::default(),
            meaning: Meaning {
                waiting: Arc::clone(&waiting),
                first_sync,
            },
        };
        let (link, _unasked) = Link::new(stream, lines, first_sync);
        Self { link, waiting }
    }

    /// Thaws whatever is frozen, for a host whose conversation was lost. The thaw is sent in one piece with the sync: an agent
    /// that still freezes reads it when it is done, even if nobody waits any more.
    ///
    /// # Errors
    /// No answer within `limit` (it is unknown whether the guest is frozen), or the agent's refusal.
    pub async fn thaw_whatever(address: &AgentAddress, limit: Duration) -> Result<u64, GuestError> {
        dialling::until_answered(address, limit, Self::sync_and_thaw).await
    }

    async fn sync_and_thaw(stream: Stream) -> Result<u64, GuestError> {
        let client = Self::unsynced(stream);
        let encode = |id| {
            client.waiting.id.store(id, Ordering::Release);
            client.waiting.sync.store(id, Ordering::Release);
            client
                .waiting
                .command_follows
                .store(true, Ordering::Release);
            let mut bytes = encode("guest-sync-delimited", &json!({ "id": id }), true);
            bytes.extend(encode("guest-fsfreeze-thaw", &Value::Null, false));
            bytes
        };
        let answer = client.link.call(encode, None, None).await;
        decode("guest-fsfreeze-thaw", answer?)
    }

    /// Why the conversation is over, if it is.
    #[must_use]
    pub fn closed(&self) -> Option<String> {
        self.link.closed().map(|error| error.to_string())
    }

    /// Who it is, and what is mounted.
    ///
    /// # Errors
    /// See [`GuestError`]; refused with `SNAPSHOT_SET_IN_PROGRESS` if somebody has frozen the guest.
    pub async fn identify(&self, limit: Duration) -> Result<StockGuest, GuestError> {
        #[derive(Deserialize)]
        struct Info {
            version: String,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Os {
            id: Option<String>,
            pretty_name: Option<String>,
        }
        #[derive(Deserialize)]
        struct Mounted {
            name: String,
            mountpoint: String,
            #[serde(rename = "type")]
            fstype: String,
        }
        if !self.is_thawed(limit).await? {
            let text = "the guest's file systems are frozen already, by somebody else".to_owned();
            return Err(errors::in_progress(text));
        }
        let info: Info = self.ask("guest-info", Value::Null, limit).await?;
        let os: Os = self.ask("guest-get-osinfo", Value::Null, limit).await?;
        let mounted: Vec<Mounted> = self.ask("guest-get-fsinfo", Value::Null, limit).await?;
        let id = os.id.unwrap_or_default();
        Ok(StockGuest {
            version: info.version,
            system: if id == "mswindows" {
                StockSystem::Windows
            } else {
                StockSystem::Unix
            },
            system_name: os.pretty_name.unwrap_or(id),
            filesystems: mounted
                .into_iter()
                .map(|m| StockFilesystem {
                    name: m.name,
                    mountpoint: m.mountpoint,
                    fstype: m.fstype,
                })
                .collect(),
            frozen: None,
            thawed: None,
            vss_writers: None,
            vss_writers_not_heard: None,
        })
    }

    /// Freezes everything that the agent can, or only what is mounted there; the number of file systems or volumes.
    ///
    /// # Errors
    /// See [`GuestError`]; the agent has thawed everything if it refuses.
    pub async fn freeze(
        &self,
        mountpoints: Option<Vec<String>>,
        limit: Duration,
    ) -> Result<u64, GuestError> {
        match mountpoints {
            None => self.ask("guest-fsfreeze-freeze", Value::Null, limit).await,
            Some(points) => {
                let arguments = json!({ "mountpoints": points });
                self.ask("guest-fsfreeze-freeze-list", arguments, limit)
                    .await
            }
        }
    }

    /// Thaws; the number of file systems or volumes.
    ///
    /// # Errors
    /// See [`GuestError`]; `HOLD_BROKEN` if VSS could not hold the writes until now.
    pub async fn thaw(&self, limit: Duration) -> Result<u64, GuestError> {
        self.ask("guest-fsfreeze-thaw", Value::Null, limit).await
    }

    /// By the agent's word, nothing is frozen.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn is_thawed(&self, limit: Duration) -> Result<bool, GuestError> {
        let status: String = self
            .ask("guest-fsfreeze-status", Value::Null, limit)
            .await?;
        Ok(status == "thawed")
    }

    /// VSS's writers and their states, by the guest's own `vssadmin`: the agent asks VSS for them and does not look.
    ///
    /// # Errors
    /// See [`GuestError`]: the agent may run no programs, or the answer was no list of writers.
    pub async fn vss_writers(&self, limit: Duration) -> Result<Vec<VssWriter>, GuestError> {
        #[derive(Deserialize)]
        struct Started {
            pid: i64,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Program {
            exited: bool,
            exitcode: Option<i64>,
            out_data: Option<String>,
            #[serde(default)]
            out_truncated: bool,
        }
        let deadline = Instant::now() + limit;
        let run =
            json!({"path": "vssadmin.exe", "arg": ["list", "writers"], "capture-output": true});
        let Started { pid } = self.ask("guest-exec", run, limit).await?;
        let bad = |why: String| GuestError::BadAnswer {
            command: "vssadmin list writers",
            why,
        };
        let program = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let program: Program = self
                .ask("guest-exec-status", json!({ "pid": pid }), left)
                .await?;
            if program.exited {
                break program;
            }
            if left.is_zero() {
                return Err(bad(format!("it runs longer than {} ms", limit.as_millis())));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        };
        if program.exitcode != Some(0) || program.out_truncated {
            let end = program.exitcode;
            return Err(bad(format!("exit code {end:?}, or its output was cut")));
        }
        let output = base64::engine::general_purpose::STANDARD
            .decode(program.out_data.unwrap_or_default())
            .map_err(|error| bad(error.to_string()))?;
        vssadmin::writers(&String::from_utf8_lossy(&output)).map_err(bad)
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        command: &'static str,
        arguments: Value,
        limit: Duration,
    ) -> Result<T, GuestError> {
        let answer = self.call(command, arguments, Some(limit)).await?;
        serde_json::from_value(answer).map_err(|error| GuestError::BadAnswer {
            command,
            why: error.to_string(),
        })
    }

    async fn call(
        &self,
        command: &'static str,
        arguments: Value,
        limit: Option<Duration>,
    ) -> Result<Value, GuestError> {
        let sync = command == "guest-sync-delimited";
        let encode = |id| {
            self.waiting.id.store(id, Ordering::Release);
            if sync {
                self.waiting.sync.store(id, Ordering::Release);
                encode(command, &json!({ "id": id }), true)
            } else {
                encode(command, &arguments, false)
            }
        };
        let answer = self.link.call(encode, None, limit).await?;
        answer.map_err(|error| errors::refused(command, &error))
    }
}

fn encode(command: &str, arguments: &Value, reset: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    if reset {
        bytes.push(DELIMITER);
    }
    let request = if arguments.is_null() {
        json!({ "execute": command })
    } else {
        json!({ "execute": command, "arguments": arguments })
    };
    bytes.extend(request.to_string().into_bytes());
    bytes.push(b'\n');
    bytes
}

fn decode<T: DeserializeOwned>(
    command: &'static str,
    answer: Result<Value, Value>,
) -> Result<T, GuestError> {
    let value = answer.map_err(|error| errors::refused(command, &error))?;
    serde_json::from_value(value).map_err(|error| GuestError::BadAnswer {
        command,
        why: error.to_string(),
    })
}

/// What `hear_anything` does, for bytes of this agent.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn hear_anything(chunks: &[&[u8]]) {
    let waiting = Arc::new(Waiting::default());
    let mut lines = Lines {
        cutter: Cutter::default(),
        meaning: Meaning {
            waiting,
            first_sync: 1,
        },
    };
    lines.asked();
    for chunk in chunks {
        let Ok(messages) = lines.decode(chunk) else {
            break;
        };
        for message in messages {
            let Incoming::Answer { result, .. } = message else {
                continue;
            };
            for command in ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"] {
                if let Err(error) = decode::<u64>(command, result.clone()) {
                    drop(error.to_string());
                }
            }
            drop(result.map(|output| vssadmin::writers(output.as_str().unwrap_or_default())));
        }
    }
}

/// What is wrong, as our own agent would say it.
fn refusal(error: AgentError) -> GuestError {
    GuestError::Refused(Box::new(error))
}

#[cfg(test)]
mod tests;
