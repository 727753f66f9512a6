//! The daemon `qmp-bridge` as a process: its socket in QMP framing, `vmshadow --bridge`, recovery at the start, signals.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fakes;

use fakes::storage::content;
use fakes::{Fault, World, until};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use vhost_blk_wire::frame::JsonStream;

struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Daemon {
    async fn start(world: &World) -> Self {
        Self::start_with(world, &[]).await
    }

    async fn start_with(world: &World, environment: &[(&str, &str)]) -> Self {
        let dir = world.dir.path();
        let config = dir.join("config.toml");
        let controls: Vec<String> = world
            .storages
            .iter()
            .map(|s| format!("{:?}", s.control))
            .collect();
        let text = format!(
            "state-dir = {:?}\n[[vm]]\nname = 'vm1'\nqmp = {:?}\nagent = {:?}\nvhost-blk = [{}]\n",
            world.state_dir(),
            dir.join("qmp"),
            dir.join("agent"),
            controls.join(", ")
        );
        std::fs::write(&config, text).unwrap();
        let socket = dir.join("bridge");
        let child = Command::new(env!("CARGO_BIN_EXE_qmp-bridge"))
            .arg("--socket")
            .arg(&socket)
            .arg("--config")
            .arg(&config)
            .envs(environment.iter().copied())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        until("the daemon listens", || {
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        })
        .await;
        Self { child, socket }
    }

    async fn vmshadow(&self, arguments: &[&str]) -> std::process::Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmshadow"));
        command.arg("--bridge").arg(&self.socket).args(arguments);
        tokio::time::timeout(Duration::from_secs(30), command.output())
            .await
            .unwrap()
            .unwrap()
    }

    /// The same, again while somebody else still works on the VM; it must succeed in the end.
    async fn vmshadow_when_free(&self, arguments: &[&str]) {
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        loop {
            let output = self.vmshadow(arguments).await;
            let is_busy =
                String::from_utf8_lossy(&output.stderr).contains("SNAPSHOT_SET_IN_PROGRESS");
            if !is_busy || std::time::Instant::now() > deadline {
                assert_eq!(output.status.code(), Some(0), "{output:?}");
                return;
            }
        }
    }

    async fn connect(&self) -> Raw {
        Raw {
            stream: UnixStream::connect(&self.socket).await.unwrap(),
            frames: JsonStream::new(),
        }
    }
}

/// A QMP client that sees every byte.
struct Raw {
    stream: UnixStream,
    frames: JsonStream,
}

impl Raw {
    async fn next(&mut self) -> Value {
        loop {
            if let Some(value) = self.frames.next_value().unwrap() {
                return value;
            }
            let mut buffer = [0_u8; 65536];
            let reading = self.stream.read(&mut buffer);
            let length = tokio::time::timeout(Duration::from_secs(10), reading)
                .await
                .unwrap()
                .unwrap();
            assert_ne!(length, 0, "the daemon hung up");
            self.frames.push(&buffer[..length]).unwrap();
        }
    }

    /// Sends without a newline, as `qemu.qmp` does.
    async fn send(&mut self, value: Value) {
        let text = value.to_string();
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }
}

#[tokio::test]
async fn it_speaks_qmp() {
    let world = World::new();
    let daemon = Daemon::start(&world).await;
    let mut raw = daemon.connect().await;
    assert!(raw.next().await["QMP"]["version"]["package"].is_string());
    raw.send(json!({"execute": "query-vms", "id": 1})).await;
    assert_eq!(raw.next().await["error"]["class"], "CommandNotFound");
    raw.send(json!({"execute": "qmp_capabilities"})).await;
    assert_eq!(raw.next().await, json!({"return": {}}));
    raw.send(json!({"execute": "query-commands", "id": "a"}))
        .await;
    let answer = raw.next().await;
    assert_eq!(answer["id"], "a");
    assert!(
        answer["return"]
            .as_array()
            .unwrap()
            .contains(&json!({"name": "set-create"}))
    );
    raw.send(json!({"execute": "query-vms"})).await;
    assert_eq!(raw.next().await["return"][0]["name"], "vm1");
    raw.send(json!({"execute": "no-such"})).await;
    assert_eq!(raw.next().await["error"]["class"], "CommandNotFound");
    raw.send(json!({"execute": "set-create", "arguments": {"vm": "nobody"}}))
        .await;
    assert_eq!(raw.next().await["error"]["class"], "DeviceNotFound");
    raw.send(json!({"execute": "set-create", "arguments": {"request": {"levle": 1}}}))
        .await;
    assert!(
        raw.next().await["error"]["desc"]
            .as_str()
            .unwrap()
            .contains("levle")
    );
    raw.send(json!({"execute": "set-create", "id": 7})).await;
    let mut steps = Vec::new();
    let document = loop {
        let message = raw.next().await;
        if message["event"] == "SET_PROGRESS" {
            steps.push(message["data"]["step"].as_str().unwrap().to_owned());
        } else {
            break message;
        }
    };
    assert_eq!(document["id"], 7);
    assert_eq!(document["return"]["outcome"], "kept");
    assert_eq!(steps.first().unwrap(), "intent");
    assert_eq!(steps.last().unwrap(), "finished");
    raw.stream.write_all(b"{]").await.unwrap();
    assert_eq!(raw.next().await["error"]["class"], "GenericError");
}

#[tokio::test]
async fn the_command_works_through_it() {
    let world = World::new();
    let daemon = Daemon::start(&world).await;
    let created = daemon.vmshadow(&["create", "--vm", "vm1", "--json"]).await;
    assert_eq!(created.status.code(), Some(0));
    let document: Value = serde_json::from_slice(&created.stdout).unwrap();
    let progress = String::from_utf8_lossy(&created.stderr);
    assert!(
        progress.contains("frozen") && progress.contains("finished"),
        "{progress}"
    );
    let set = document["set"].as_str().unwrap();
    let listed = daemon.vmshadow(&["list", "--json"]).await;
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(listed[0]["set"], document["set"]);
    assert_eq!(listed[0]["copies-found"], 2);
    let snapshot = document["copies"][1]["snapshot"].as_str().unwrap();
    let read = daemon.vmshadow(&["read", snapshot, "-o", "-"]).await;
    assert_eq!(read.stdout, content("data"));
    let writers = daemon.vmshadow(&["list", "writers"]).await;
    assert!(String::from_utf8_lossy(&writers.stdout).contains("back-end"));
    assert_eq!(
        daemon.vmshadow(&["delete", set]).await.status.code(),
        Some(0)
    );
    world.assert_nothing_left();
    world
        .agent
        .peer
        .on("freeze", Fault::Refuse("FREEZE_FAILED"));
    let refused = daemon.vmshadow(&["create"]).await;
    assert_eq!(refused.status.code(), Some(3));
    let named_wrongly = daemon.vmshadow(&["create", "--qmp", "/x"]).await;
    assert_eq!(named_wrongly.status.code(), Some(2));
}

#[tokio::test]
async fn a_requester_that_hangs_up_cancels_its_set() {
    let world = World::new();
    let daemon = Daemon::start(&world).await;
    world.storages[0]
        .peer
        .on("snapshot-set-commit", Fault::Hang);
    let mut raw = daemon.connect().await;
    raw.send(json!({"execute": "qmp_capabilities"})).await;
    raw.send(json!({"execute": "set-create"})).await;
    while raw.next().await["data"]["step"] != "marked" {}
    // The second one is refused at once.
    let second = daemon.vmshadow(&["create"]).await;
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("SNAPSHOT_SET_IN_PROGRESS"));
    drop(raw);
    until("the guest runs", || {
        !world.agent.is_frozen() && !world.agent.has_set()
    })
    .await;
    until("nothing is kept", || {
        world.storages[0].snapshots().is_empty()
    })
    .await;
    world.storages[0].peer.heal();
    let next = daemon.vmshadow(&["create"]).await;
    assert_eq!(
        next.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&next.stderr)
    );
}

#[tokio::test]
async fn a_restore_goes_through_it_and_ends_with_its_requester() {
    let world = World::new();
    let daemon = Daemon::start(&world).await;
    let created = daemon
        .vmshadow(&["create", "--type", "full", "--json"])
        .await;
    let document: Value = serde_json::from_slice(&created.stdout).unwrap();
    let set = document["set"].as_str().unwrap();
    let restored = daemon
        .vmshadow(&["restore", set, "--json", "--", "true"])
        .await;
    assert_eq!(restored.status.code(), Some(0), "{restored:?}");
    let said: Value = serde_json::from_slice(&restored.stdout).unwrap();
    assert_eq!(said["restored"], "ALL");
    assert_eq!(world.agent.guest.lock().unwrap().restores.len(), 2);

    let mut raw = daemon.connect().await;
    raw.next().await;
    raw.send(json!({"execute": "qmp_capabilities"})).await;
    raw.next().await;
    let post = json!({"execute": "set-post-restore", "arguments": {"restored": "ALL"}});
    raw.send(post).await;
    assert_eq!(raw.next().await["error"]["class"], "InvalidState");
    raw.send(json!({"execute": "set-pre-restore", "arguments": {"id": set}}))
        .await;
    assert_eq!(raw.next().await["return"]["writers"][0]["name"], "db");
    // Whether through the daemon or beside it.
    let busy = daemon.vmshadow(&["create"]).await;
    assert!(String::from_utf8_lossy(&busy.stderr).contains("SNAPSHOT_SET_IN_PROGRESS"));
    let beside = world.vmshadow_create(&[]).output().await.unwrap();
    assert!(String::from_utf8_lossy(&beside.stderr).contains("SNAPSHOT_SET_IN_PROGRESS"));
    drop(raw);
    until("the restore is given up", || !world.agent.has_set()).await;
    daemon.vmshadow_when_free(&["complete", set]).await;

    // One that hangs up while writers still hear of it.
    world.agent.peer.on("pre_restore", Fault::Hang);
    let mut raw = daemon.connect().await;
    raw.send(json!({"execute": "qmp_capabilities"})).await;
    raw.send(json!({"execute": "set-pre-restore", "arguments": {"id": set}}))
        .await;
    until("writers hear of it", || {
        let log = world.log();
        let told = log.iter().filter(|line| *line == "agent pre_restore");
        told.count() == 3
    })
    .await;
    drop(raw);
    world.agent.peer.heal();
    daemon.vmshadow_when_free(&["create"]).await;
}

#[tokio::test]
async fn a_killed_daemon_undoes_at_its_next_start() {
    let world = World::new();
    for step in ["frozen", "committed"] {
        let mut daemon = Daemon::start_with(&world, &[("VMSHADOW_STOP_AT", step)]).await;
        let mut raw = daemon.connect().await;
        raw.send(json!({"execute": "qmp_capabilities"})).await;
        raw.send(json!({"execute": "set-create"})).await;
        let pid = daemon.child.id().unwrap();
        until(step, || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.rsplit(") ").next().unwrap().starts_with('T')
        })
        .await;
        daemon.child.kill().await.unwrap();
        until("the guest runs", || {
            !world.agent.is_frozen() && !world.agent.has_set()
        })
        .await;
        let mut daemon = Daemon::start(&world).await;
        world.assert_nothing_left();
        let listed = daemon.vmshadow(&["list", "--json"]).await;
        let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
        let last = listed.as_array().unwrap().last().unwrap();
        assert_eq!(last["outcome"], "undone", "{step}");
        // Waits for its end. One that is merely dropped may still listen when the next is started.
        daemon.child.kill().await.unwrap();
    }
}

#[tokio::test]
async fn sigterm_undoes_what_is_under_way_and_ends() {
    let world = World::new();
    let mut daemon = Daemon::start(&world).await;
    world.storages[0]
        .peer
        .on("snapshot-set-commit", Fault::Hang);
    let mut raw = daemon.connect().await;
    raw.send(json!({"execute": "qmp_capabilities"})).await;
    raw.send(json!({"execute": "set-create"})).await;
    while raw.next().await["data"]["step"] != "marked" {}
    let pid = daemon.child.id().unwrap().try_into().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(20), daemon.child.wait()).await;
    assert!(ended.unwrap().unwrap().success());
    world.assert_nothing_left();
    assert!(!daemon.socket.exists());
}
