//! QEMU's guest agent on a guest's port: one host at a time, one command at a time, bytes kept while nobody is connected, frozen
//! until somebody thaws it. Its words are those of qemu-ga's schema and sources; no dialogue with a real Windows guest was at hand.

use super::{Fault, Peer};
use base64::Engine as _;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

/// What the guest is like; tests change it.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    pub(crate) windows: bool,
    /// Name, mount point, type.
    pub(crate) filesystems: Vec<(&'static str, &'static str, &'static str)>,
    /// What `vssadmin list writers` prints; the agent runs no programs without it.
    pub(crate) vssadmin: Option<String>,
    /// Types that it does not freeze and does not count.
    pub(crate) unfreezable: Vec<&'static str>,
    /// How many somebody else thaws before it does.
    pub(crate) thawed_by_others: u64,
    pub(crate) frozen: Option<u64>,
}

impl Guest {
    pub(crate) fn linux() -> Self {
        Self {
            windows: false,
            filesystems: vec![("vda1", "/", "ext4"), ("vdb", "/data", "xfs")],
            vssadmin: None,
            unfreezable: vec!["vfat", "squashfs"],
            thawed_by_others: 0,
            frozen: None,
        }
    }

    pub(crate) fn windows() -> Self {
        Self {
            windows: true,
            filesystems: vec![
                (
                    r"\\?\Volume{c57aa2b2-0000-0000-0000-100000000000}\",
                    "System Reserved",
                    "NTFS",
                ),
                (
                    r"\\?\Volume{c57aa2b2-0000-0000-0000-602200000000}\",
                    r"C:\",
                    "NTFS",
                ),
                (
                    r"\\?\Volume{7d5d9c51-2b6e-11ee-806e-806e6f6e6963}\",
                    r"D:\",
                    "CDFS",
                ),
            ],
            vssadmin: Some(vssadmin(&[("Registry Writer", 1), ("SqlServerWriter", 1)])),
            unfreezable: vec!["CDFS"],
            thawed_by_others: 0,
            frozen: None,
        }
    }
}

/// The output of `vssadmin list writers` for writers in these states.
pub(crate) fn vssadmin(writers: &[(&str, u32)]) -> String {
    let mut text =
        "vssadmin 1.1 - Volume Shadow Copy Service administrative command-line tool\r\n\r\n"
            .to_owned();
    for (name, state) in writers {
        let words = if *state <= 5 {
            ("Stable", "No error")
        } else {
            ("Failed", "Non-retryable error")
        };
        text.push_str(&format!(
            "Writer name: '{name}'\r\n   Writer Id: {{a65faa63-5ea8-4ebc-9dbd-a0c4db26912a}}\r\n   Writer Instance Id: \
             {{4c4b8f52-1c0a-4a5c-8d4a-3a6b1a4d4f11}}\r\n   State: [{state}] {}\r\n   Last error: {}\r\n\r\n",
            words.0, words.1
        ));
    }
    text
}

#[derive(Clone)]
pub(crate) struct FakeQga {
    pub(crate) peer: Peer,
    pub(crate) guest: Arc<Mutex<Guest>>,
}

impl FakeQga {
    pub(crate) fn start(path: &Path, guest: Guest, peer: Peer) -> Self {
        let agent = Self {
            peer,
            guest: Arc::new(Mutex::new(guest)),
        };
        let listener = UnixListener::bind(path).unwrap();
        let this = agent.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                this.serve(stream).await;
            }
        });
        agent
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.guest.lock().unwrap().frozen.is_some()
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Guest)) {
        change(&mut self.guest.lock().unwrap());
    }

    async fn serve(&self, stream: UnixStream) {
        let (reader, mut writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        // What an earlier host was owed: it must not be taken for an answer.
        drop(writer.write_all(b"{\"return\": 17}\n").await);
        loop {
            line.clear();
            match reader.read_until(b'\n', &mut line).await {
                Ok(1..) => {}
                Ok(0) | Err(_) => return,
            }
            let start = line.iter().rposition(|b| *b == 0xff).map_or(0, |at| at + 1);
            let request: Value = serde_json::from_slice(&line[start..]).unwrap();
            let name = request["execute"].as_str().unwrap().to_owned();
            let arguments = request["arguments"].clone();
            let answer = match self.peer.arrived(&name) {
                Some(Fault::Hang) => continue,
                Some(Fault::Close) => return,
                Some(Fault::Refuse(desc)) => {
                    // It has undone its freeze when it refuses, and VSS has when it complains at the thaw.
                    self.guest.lock().unwrap().frozen = None;
                    error("GenericError", desc)
                }
                Some(Fault::Late(duration)) => {
                    tokio::time::sleep(duration).await;
                    self.answer(&name, &arguments)
                }
                Some(Fault::Meanwhile(what)) => {
                    what();
                    self.answer(&name, &arguments)
                }
                None => self.answer(&name, &arguments),
            };
            let mut text = answer.to_string().into_bytes();
            text.push(b'\n');
            if name == "guest-sync-delimited" {
                text.insert(0, 0xff);
            }
            // Whoever has gone hears nothing; what he had sent is worked through all the same.
            drop(writer.write_all(&text).await);
        }
    }

    fn answer(&self, name: &str, arguments: &Value) -> Value {
        let mut guest = self.guest.lock().unwrap();
        let allowed = [
            "guest-sync-delimited",
            "guest-fsfreeze-status",
            "guest-fsfreeze-thaw",
            "guest-info",
        ];
        if guest.frozen.is_some() && !allowed.contains(&name) {
            let desc = format!("Command {name} has been disabled: the command is not allowed");
            return error("CommandNotFound", &desc);
        }
        let value = match name {
            "guest-sync-delimited" => arguments["id"].clone(),
            "guest-fsfreeze-status" => {
                json!(if guest.frozen.is_some() { "frozen" } else { "thawed" })
            }
            "guest-info" => json!({"version": "108.0.2", "supported_commands": []}),
            "guest-get-osinfo" if guest.windows => {
                json!({"id": "mswindows", "name": "Microsoft Windows", "pretty-name": "Windows Server 2022 Standard"})
            }
            "guest-get-osinfo" => json!({"id": "debian", "pretty-name": "Debian GNU/Linux 12 (bookworm)"}),
            "guest-get-fsinfo" => guest
                .filesystems
                .iter()
                .map(|(name, point, kind)| json!({"name": name, "mountpoint": point, "type": kind, "disk": []}))
                .collect(),
            "guest-fsfreeze-freeze" | "guest-fsfreeze-freeze-list" => {
                let points = arguments["mountpoints"].as_array();
                let count = guest
                    .filesystems
                    .iter()
                    .filter(|(_, point, _)| points.is_none_or(|p| p.contains(&json!(point))))
                    .filter(|(_, _, kind)| !guest.unfreezable.contains(kind))
                    .count() as u64;
                guest.frozen = (count > 0).then_some(count);
                json!(count)
            }
            "guest-fsfreeze-thaw" => {
                let thawed = guest.frozen.take().unwrap_or(0);
                json!(thawed.saturating_sub(guest.thawed_by_others))
            }
            "guest-exec" if guest.vssadmin.is_some() => json!({"pid": 4711}),
            "guest-exec-status" => {
                let output = guest.vssadmin.clone().unwrap_or_default();
                let data = base64::engine::general_purpose::STANDARD.encode(output);
                json!({"exited": true, "exitcode": 0, "out-data": data})
            }
            other => {
                let desc = format!("The command {other} has not been found");
                return error("CommandNotFound", &desc);
            }
        };
        json!({ "return": value })
    }
}

fn error(class: &str, desc: &str) -> Value {
    json!({"error": {"class": class, "desc": desc}})
}
