//! QEMU's monitor, as far as the bridge asks it. The shapes are those of QEMU 7.2.

use super::{Fault, Peer};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast;
use vhost_blk_wire::frame::JsonStream;

#[derive(Clone)]
pub(crate) struct FakeQemu {
    pub(crate) peer: Peer,
    running: Arc<AtomicBool>,
    migration: Arc<Mutex<Option<String>>>,
    /// Further entries of `query-block`.
    pub(crate) block: Arc<Mutex<Vec<Value>>>,
    sockets: Arc<Vec<PathBuf>>,
    /// The socket behind the agent's virtio-serial port.
    agent: Arc<PathBuf>,
    events: broadcast::Sender<Value>,
}

impl FakeQemu {
    pub(crate) fn start(path: &Path, sockets: Vec<PathBuf>, peer: Peer) -> Self {
        let qemu = Self {
            peer,
            running: Arc::new(AtomicBool::new(true)),
            migration: Arc::default(),
            block: Arc::default(),
            sockets: Arc::new(sockets),
            agent: Arc::new(path.with_file_name("agent")),
            events: broadcast::channel(64).0,
        };
        let listener = UnixListener::bind(path).unwrap();
        let this = qemu.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(this.clone().serve(stream));
            }
        });
        qemu
    }

    pub(crate) fn set_running(&self, running: bool) {
        self.running.store(running, Ordering::SeqCst);
    }

    pub(crate) fn set_migration(&self, status: Option<&str>) {
        *self.migration.lock().unwrap() = status.map(str::to_owned);
    }

    pub(crate) fn emit(&self, event: &str) {
        self.emit_with(event, &json!({"guest": true}));
    }

    /// A program in the guest opens or lets go of a virtio-serial port; the agent's is `agent0`.
    pub(crate) fn emit_port(&self, id: &str, open: bool) {
        self.emit_with("VSERPORT_CHANGE", &json!({"id": id, "open": open}));
    }

    fn emit_with(&self, event: &str, data: &Value) {
        let event = json!({"event": event, "data": data,
            "timestamp": {"seconds": 1, "microseconds": 2}});
        self.events.send(event).ok();
    }

    async fn serve(self, mut stream: UnixStream) {
        let mut events = self.events.subscribe();
        let greeting = json!({"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7},
            "package": "fake"}, "capabilities": ["oob"]}});
        if say(&mut stream, &greeting).await.is_err() {
            return;
        }
        let mut frames = JsonStream::new();
        let mut buffer = [0_u8; 4096];
        loop {
            tokio::select! {
                biased;
                Ok(event) = events.recv() => {
                    if say(&mut stream, &event).await.is_err() { return; }
                }
                read = stream.read(&mut buffer) => {
                    let Ok(length @ 1..) = read else { return };
                    frames.push(&buffer[..length]).unwrap();
                    while let Some(request) = frames.next_value().unwrap() {
                        let name = request["execute"].as_str().unwrap().to_owned();
                        match self.peer.arrived(&name) {
                            Some(Fault::Hang) => continue,
                            Some(Fault::Close) => return,
                            Some(Fault::Late(duration)) => tokio::time::sleep(duration).await,
                            Some(Fault::Meanwhile(what)) => {
                                what();
                                while let Ok(event) = events.try_recv() {
                                    say(&mut stream, &event).await.ok();
                                }
                            }
                            Some(Fault::Refuse(class)) => {
                                let error = json!({"error": {"class": class, "desc": "no"},
                                    "id": request["id"]});
                                say(&mut stream, &error).await.ok();
                                continue;
                            }
                            None => {}
                        }
                        let value = self.answer(&name, &request["arguments"]);
                        let answer = json!({"return": value, "id": request["id"]});
                        if say(&mut stream, &answer).await.is_err() { return; }
                    }
                }
            }
        }
    }

    fn answer(&self, name: &str, arguments: &Value) -> Value {
        let path = arguments["path"].as_str().unwrap_or_default();
        match name {
            "query-status" => {
                let running = self.running.load(Ordering::SeqCst);
                let status = if running { "running" } else { "paused" };
                json!({"status": status, "singlestep": false, "running": running})
            }
            "query-migrate" => match &*self.migration.lock().unwrap() {
                None => json!({}),
                Some(status) => json!({"status": status}),
            },
            "query-block" => json!(*self.block.lock().unwrap()),
            "qom-list" if path == "/machine/peripheral" => {
                let disks = (0..self.sockets.len()).map(
                    |n| json!({"name": format!("disk{n}"), "type": "child<vhost-user-blk-pci>"}),
                );
                let mut all = vec![
                    json!({"name": "type", "type": "string"}),
                    json!({"name": "console0", "type": "child<virtserialport>"}),
                    json!({"name": "agent0", "type": "child<virtserialport>"}),
                ];
                all.extend(disks);
                json!(all)
            }
            "qom-list" => json!([{"name": "type", "type": "string"},
                {"name": "device[0]", "type": "child<virtio-serial-pci>"}]),
            "qom-get" if path.ends_with("/console0") => json!(""),
            "qom-get" if path.ends_with("/agent0") => json!("charagent"),
            "qom-get" if path.ends_with("/charagent") => {
                json!({"path": *self.agent, "type": "unix"})
            }
            "qom-get" if arguments["property"] == "chardev" => {
                let number = path.rsplit("disk").next().unwrap();
                json!(format!("chr{number}"))
            }
            "qom-get" => {
                let number: usize = path.rsplit("chr").next().unwrap().parse().unwrap();
                json!({"abstract": false, "path": self.sockets[number], "type": "unix", "tight": true})
            }
            _ => json!({}),
        }
    }
}

async fn say(stream: &mut UnixStream, value: &Value) -> std::io::Result<()> {
    stream.write_all(format!("{value}\r\n").as_bytes()).await
}
