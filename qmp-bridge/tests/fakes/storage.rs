//! vhost-blk's control socket: sets by connection, provisional and kept snapshots, reading.

use super::{Fault, Peer};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use uuid::Uuid;
use vhost_blk_wire::frame::JsonStream;
use vhost_blk_wire::types::{Method, SnapshotInfo, SnapshotState, VolumeInfo, WriteCount};

/// Size of each fake disk.
pub(crate) const DISK_BYTES: u64 = 4096;

#[derive(Default)]
struct Store {
    volumes: Vec<VolumeInfo>,
    snapshots: Vec<SnapshotInfo>,
    /// Open sets: the connection they belong to and their volumes.
    open: HashMap<Uuid, (u64, Vec<String>)>,
    holding: bool,
    /// What is counted in the window.
    writes: u64,
    connections: u64,
    /// Exempt ranges of the last mark.
    exempt: Value,
    left_out: Value,
    limit_ms: u64,
}

#[derive(Clone)]
pub(crate) struct FakeStorage {
    pub(crate) peer: Peer,
    pub(crate) control: PathBuf,
    store: Arc<Mutex<Store>>,
}

impl FakeStorage {
    pub(crate) fn start(dir: &Path, index: usize, volumes: &[&str], peer: Peer) -> Self {
        let control = dir.join(format!("control{index}"));
        let volumes = volumes
            .iter()
            .map(|name| VolumeInfo {
                volume: (*name).to_owned(),
                id: Uuid::new_v4(),
                serial: format!("ser-{name}"),
                base: format!("/disks/{name}.raw"),
                shadow_storage: format!("/disks/{name}.shadow"),
                socket: dir.join(format!("{name}.sock")).display().to_string(),
                size_bytes: DISK_BYTES,
                method: Method::Row,
                read_only: false,
                connected: true,
                poisoned: false,
                snapshots: 0,
                shadow_used_bytes: 0,
                shadow_allocated_bytes: 0,
                shadow_ahead_bytes: 0,
                plain: true,
            })
            .collect();
        let storage = Self {
            peer,
            control,
            store: Arc::new(Mutex::new(Store {
                volumes,
                ..Store::default()
            })),
        };
        let listener = UnixListener::bind(&storage.control).unwrap();
        let this = storage.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(this.clone().serve(stream));
            }
        });
        storage
    }

    pub(crate) fn sockets(&self) -> Vec<PathBuf> {
        let store = self.store.lock().unwrap();
        store
            .volumes
            .iter()
            .map(|v| v.socket.clone().into())
            .collect()
    }

    /// Volumes that have snapshots, and in what state.
    pub(crate) fn snapshots(&self) -> Vec<String> {
        let store = self.store.lock().unwrap();
        store
            .snapshots
            .iter()
            .map(|s| format!("{} {:?}", s.volume, s.state))
            .collect()
    }

    pub(crate) fn is_holding(&self) -> bool {
        self.store.lock().unwrap().holding
    }

    pub(crate) fn write_in_window(&self, writes: u64) {
        self.store.lock().unwrap().writes = writes;
    }

    pub(crate) fn set_connected(&self, connected: bool) {
        for volume in &mut self.store.lock().unwrap().volumes {
            volume.connected = connected;
        }
    }

    pub(crate) fn exempt(&self) -> Value {
        self.store.lock().unwrap().exempt.clone()
    }

    /// What was to be left out of the last set.
    pub(crate) fn left_out(&self) -> Value {
        self.store.lock().unwrap().left_out.clone()
    }

    /// Limit that the last commit was given.
    pub(crate) fn commit_limit_ms(&self) -> u64 {
        self.store.lock().unwrap().limit_ms
    }

    /// Loses a snapshot, as a full shadow storage does.
    pub(crate) fn lose(&self, volume: &str) {
        self.store
            .lock()
            .unwrap()
            .snapshots
            .retain(|s| s.volume != volume);
    }

    async fn serve(self, mut stream: UnixStream) {
        let connection = {
            let mut store = self.store.lock().unwrap();
            store.connections += 1;
            store.connections
        };
        self.session(&mut stream, connection).await;
        // What was not kept goes with its connection.
        let mut store = self.store.lock().unwrap();
        let gone: Vec<Uuid> = store
            .open
            .iter()
            .filter(|(_, (owner, _))| *owner == connection)
            .map(|(set, _)| *set)
            .collect();
        for set in gone {
            undo(&mut store, set);
            self.peer.note("requester gone");
        }
    }

    async fn session(&self, stream: &mut UnixStream, connection: u64) {
        let greeting = json!({"QMP": {"version": {"qemu": {"micro": 0, "minor": 1, "major": 0},
            "package": "fake"}, "capabilities": []}});
        if say(stream, &greeting).await.is_err() {
            return;
        }
        let mut frames = JsonStream::new();
        let mut fds: Vec<OwnedFd> = Vec::new();
        loop {
            let Some(bytes) = receive(stream, &mut fds).await else {
                return;
            };
            frames.push(&bytes).unwrap();
            while let Some(request) = frames.next_value().unwrap() {
                let name = request["execute"].as_str().unwrap().to_owned();
                let id = request["id"].clone();
                match self.peer.arrived(&name) {
                    Some(Fault::Hang) => continue,
                    Some(Fault::Close) => return,
                    Some(Fault::Late(duration)) => tokio::time::sleep(duration).await,
                    Some(Fault::Meanwhile(what)) => what(),
                    Some(Fault::Refuse(class)) => {
                        if class == "HoldBroken" {
                            let set = serde_json::from_value(request["arguments"]["set"].clone());
                            undo(&mut self.store.lock().unwrap(), set.unwrap());
                        }
                        let error = json!({"error": {"class": class, "desc": "no"}, "id": id});
                        say(stream, &error).await.ok();
                        continue;
                    }
                    None => {}
                }
                let events = if name == "snapshot-read" {
                    vec![
                        json!({"event": "JOB_PROGRESS", "data": {"job": 1, "done-bytes": 1,
                        "total-bytes": 2}, "timestamp": {"seconds": 0, "microseconds": 0}}),
                    ]
                } else {
                    Vec::new()
                };
                for event in events {
                    say(stream, &event).await.ok();
                }
                let answer = match self.answer(&name, &request["arguments"], connection, &mut fds) {
                    Ok(value) => json!({"return": value, "id": id}),
                    Err(class) => json!({"error": {"class": class, "desc": "no"}, "id": id}),
                };
                if say(stream, &answer).await.is_err() {
                    return;
                }
            }
        }
    }

    fn answer(
        &self,
        name: &str,
        arguments: &Value,
        connection: u64,
        fds: &mut Vec<OwnedFd>,
    ) -> Result<Value, &'static str> {
        let mut store = self.store.lock().unwrap();
        let set: Option<Uuid> = serde_json::from_value(arguments["set"].clone()).ok();
        let snapshot: Option<Uuid> = serde_json::from_value(arguments["snapshot"].clone()).ok();
        let open = set.filter(|set| store.open.contains_key(set));
        match name {
            "query-volumes" => Ok(json!(store.volumes)),
            "query-snapshots" => Ok(json!(store.snapshots)),
            "snapshot-set-prepare" => {
                if !store.open.is_empty() {
                    return Err("SetInProgress");
                }
                let volumes = serde_json::from_value(arguments["volumes"].clone()).unwrap();
                store.open.insert(set.unwrap(), (connection, volumes));
                Ok(json!({}))
            }
            "snapshot-set-mark" => {
                open.ok_or("SetNotFound")?;
                store.exempt = arguments["exempt"].clone();
                Ok(json!({}))
            }
            "snapshot-set-hold" => {
                open.ok_or("SetNotFound")?;
                store.holding = true;
                Ok(json!({}))
            }
            "snapshot-set-release" => {
                open.ok_or("SetNotFound")?;
                store.holding = false;
                Ok(json!({}))
            }
            "snapshot-set-commit" => {
                let set = open.ok_or("SetNotFound")?;
                store.limit_ms = arguments["limit-ms"].as_u64().unwrap();
                let volumes = store.open[&set].1.clone();
                let mut committed = Vec::new();
                for volume in volumes {
                    let info = SnapshotInfo {
                        snapshot: Uuid::new_v4(),
                        set,
                        volume,
                        epoch: 1,
                        method: Method::Row,
                        state: SnapshotState::Provisional,
                        created_unix_ms: 1_700_000_000_000,
                        size_bytes: DISK_BYTES,
                    };
                    store.snapshots.push(info.clone());
                    let count = WriteCount {
                        writes: store.writes,
                        ..WriteCount::default()
                    };
                    committed.push(json!({"snapshot": info, "writes-in-window": count}));
                }
                Ok(
                    json!({"volumes": committed, "drain-us": 10, "record-us": 20,
                    "hold-us": 30, "since-mark-us": 40}),
                )
            }
            "snapshot-set-keep" => {
                let set = open.ok_or("SetNotFound")?;
                store.open.remove(&set);
                for snapshot in &mut store.snapshots {
                    if snapshot.set == set {
                        snapshot.state = SnapshotState::Kept;
                    }
                }
                Ok(json!({}))
            }
            "snapshot-set-leave-out" => {
                store.left_out = arguments["areas"].clone();
                let volumes: Vec<Value> = store.left_out.as_array().unwrap().iter().map(
                    |area| json!({"volume": area["volume"], "left-out-bytes": area["ranges"][0]["length-bytes"]}),
                ).collect();
                Ok(json!({ "volumes": volumes }))
            }
            "snapshot-set-abort" => {
                let set = open.ok_or("SetNotFound")?;
                undo(&mut store, set);
                Ok(json!({}))
            }
            "snapshot-set-delete" => {
                let before = store.snapshots.len();
                store.snapshots.retain(|s| Some(s.set) != set);
                if store.snapshots.len() == before {
                    return Err("SetNotFound");
                }
                Ok(json!({}))
            }
            "snapshot-delete" => {
                let before = store.snapshots.len();
                store.snapshots.retain(|s| Some(s.snapshot) != snapshot);
                if store.snapshots.len() == before {
                    return Err("SnapshotNotFound");
                }
                Ok(json!({}))
            }
            "snapshot-revert" => {
                // Newer ones go; in this fake those that stand behind it.
                let at = store
                    .snapshots
                    .iter()
                    .position(|s| Some(s.snapshot) == snapshot)
                    .ok_or("SnapshotNotFound")?;
                let volume = store.snapshots[at].volume.clone();
                let mut index = 0;
                store.snapshots.retain(|s| {
                    index += 1;
                    index <= at + 1 || s.volume != volume
                });
                Ok(json!({}))
            }
            "getfd" => {
                if fds.is_empty() {
                    return Err("GenericError");
                }
                Ok(json!({}))
            }
            "snapshot-read" => {
                let info = store
                    .snapshots
                    .iter()
                    .find(|s| Some(s.snapshot) == snapshot)
                    .ok_or("SnapshotNotFound")?;
                let fd = fds.pop().ok_or("GenericError")?;
                let mut file = std::fs::File::from(fd);
                let content = content(&info.volume);
                file.write_all(&content).unwrap();
                Ok(json!({"length-bytes": DISK_BYTES, "data-bytes": 4}))
            }
            _ => Ok(json!({})),
        }
    }
}

/// What a copy of a volume holds.
pub(crate) fn content(volume: &str) -> Vec<u8> {
    let mut content = vec![0_u8; usize::try_from(DISK_BYTES).unwrap()];
    content[..volume.len()].copy_from_slice(volume.as_bytes());
    content
}

fn undo(store: &mut Store, set: Uuid) {
    store.open.remove(&set);
    store.holding = false;
    store
        .snapshots
        .retain(|s| s.set != set || s.state == SnapshotState::Kept);
}

async fn receive(stream: &UnixStream, fds: &mut Vec<OwnedFd>) -> Option<Vec<u8>> {
    let mut buffer = [0_u8; 4096];
    loop {
        stream.readable().await.ok()?;
        let received = stream.try_io(Interest::READABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let message = recvmsg(
                stream,
                &mut [IoSliceMut::new(&mut buffer)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )?;
            for ancillary in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = ancillary {
                    fds.extend(received);
                }
            }
            Ok(message.bytes)
        });
        match received {
            Ok(0) => return None,
            Ok(length) => return Some(buffer[..length].to_vec()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return None,
        }
    }
}

async fn say(stream: &mut UnixStream, value: &Value) -> std::io::Result<()> {
    stream.write_all(format!("{value}\n").as_bytes()).await
}
