//! The bridge's three peers, in this process, on the real wires: QEMU's monitor, the guest agent, vhost-blk.
//!
//! Used by the integration tests. Every command that a peer gets is written to one log in the order of its arrival; a test
//! says what goes wrong by [`Peer::on`]. They keep just enough state to see what would be left behind.
#![allow(dead_code, reason = "each test file uses its own part")]

pub(crate) mod agent;
pub(crate) mod qemu;
pub(crate) mod qga;
pub(crate) mod storage;

use agent::FakeAgent;
use qemu::FakeQemu;
use qga::FakeQga;
use qmp_bridge::guest::AgentAddress;
use qmp_bridge::sets::Sets;
use qmp_bridge::snapshot::document::{CreateRequest, SetDocument, VmTarget};
use qmp_bridge::snapshot::run::Limits;
use qmp_bridge::snapshot::step::FaultPoint;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use storage::FakeStorage;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};

/// What goes wrong at a command.
#[derive(Clone)]
pub(crate) enum Fault {
    /// It is refused, with this class or code.
    Refuse(&'static str),
    /// It is never answered.
    Hang,
    /// The connection is closed instead of an answer.
    Close,
    /// It is answered late.
    Late(Duration),
    /// Something happens elsewhere first; then it is answered as usual.
    Meanwhile(Arc<dyn Fn() + Send + Sync>),
}

/// The log and the faults of a peer.
#[derive(Clone)]
pub(crate) struct Peer {
    pub(crate) name: String,
    pub(crate) log: Arc<Mutex<Vec<String>>>,
    faults: Arc<Mutex<HashMap<String, Fault>>>,
}

impl Peer {
    fn new(name: &str, log: &Arc<Mutex<Vec<String>>>) -> Self {
        Self {
            name: name.to_owned(),
            log: Arc::clone(log),
            faults: Arc::default(),
        }
    }

    /// From now on this goes wrong at that command.
    pub(crate) fn on(&self, command: &str, fault: Fault) {
        self.faults
            .lock()
            .unwrap()
            .insert(command.to_owned(), fault);
    }

    /// Nothing goes wrong any more.
    pub(crate) fn heal(&self) {
        self.faults.lock().unwrap().clear();
    }

    pub(crate) fn note(&self, what: &str) {
        self.log
            .lock()
            .unwrap()
            .push(format!("{} {what}", self.name));
    }

    /// Logs a command and gives its fault.
    pub(crate) fn arrived(&self, command: &str) -> Option<Fault> {
        self.note(command);
        self.faults.lock().unwrap().get(command).cloned()
    }
}

/// A VM with its peers and a state directory.
pub(crate) struct World {
    pub(crate) dir: TempDir,
    pub(crate) log: Arc<Mutex<Vec<String>>>,
    pub(crate) qemu: FakeQemu,
    pub(crate) agent: FakeAgent,
    /// QEMU's agent, if the VM is asked through it.
    pub(crate) qga: Option<FakeQga>,
    pub(crate) storages: Vec<FakeStorage>,
    /// Where the bridge finds the guest's agent.
    pub(crate) address: AgentAddress,
}

impl World {
    /// A VM whose disks are served by one daemon: `root` and `data`.
    pub(crate) fn new() -> Self {
        Self::with_daemons(&[&["root", "data"]])
    }

    /// A VM whose disks are served by several daemons.
    pub(crate) fn with_daemons(volumes: &[&[&str]]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let storages: Vec<FakeStorage> = volumes
            .iter()
            .enumerate()
            .map(|(index, volumes)| {
                let peer = Peer::new(&format!("storage{index}"), &log);
                FakeStorage::start(dir.path(), index, volumes, peer)
            })
            .collect();
        let sockets = storages.iter().flat_map(FakeStorage::sockets).collect();
        let qemu = FakeQemu::start(&dir.path().join("qmp"), sockets, Peer::new("qemu", &log));
        let serials = volumes
            .concat()
            .iter()
            .map(|v| format!("ser-{v}"))
            .collect();
        let agent = FakeAgent::start(&dir.path().join("agent"), serials, Peer::new("agent", &log));
        let agent_path = dir.path().join("agent");
        Self {
            dir,
            log,
            qemu,
            agent,
            qga: None,
            storages,
            address: AgentAddress::Serial(agent_path),
        }
    }

    /// The same VM without an agent of ours.
    pub(crate) fn with_qga(guest: qga::Guest) -> Self {
        let mut world = Self::new();
        let peer = Peer::new("qga", &world.log);
        let path = world.dir.path().join("qga");
        world.qga = Some(FakeQga::start(&path, guest, peer));
        world.address = AgentAddress::Qga(path);
        world
    }

    pub(crate) fn qga(&self) -> &FakeQga {
        self.qga.as_ref().unwrap()
    }

    pub(crate) fn target(&self) -> VmTarget {
        VmTarget {
            name: "vm1".to_owned(),
            qmp: self.dir.path().join("qmp"),
            agent: Some(self.address.clone()),
            vhost_blk: self.storages.iter().map(|s| s.control.clone()).collect(),
        }
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub(crate) fn sets(&self) -> Sets {
        Sets::open(&self.state_dir(), short_limits(), FaultPoint::default()).unwrap()
    }

    /// Makes a set in this process.
    pub(crate) async fn create(&self, request: CreateRequest) -> SetDocument {
        let (progress, _steps) = mpsc::unbounded_channel();
        let (_keep, cancel) = watch::channel(false);
        self.sets()
            .create(self.target(), request, progress, cancel)
            .await
            .unwrap()
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// Positions in the log of these entries, which must be there.
    pub(crate) fn positions(&self, entries: &[&str]) -> Vec<usize> {
        let log = self.log();
        entries
            .iter()
            .map(|entry| {
                log.iter()
                    .position(|line| line == entry)
                    .unwrap_or_else(|| panic!("{entry} is not in {log:#?}"))
            })
            .collect()
    }

    /// Nothing is frozen, held or half kept.
    pub(crate) fn assert_nothing_left(&self) {
        assert!(!self.agent.is_frozen(), "the guest is frozen");
        let qga = self.qga.as_ref();
        assert!(!qga.is_some_and(FakeQga::is_frozen), "the guest is frozen");
        assert!(!self.agent.has_set(), "a set is open in the guest");
        for storage in &self.storages {
            assert_eq!(storage.snapshots(), Vec::<String>::new());
            assert!(!storage.is_holding(), "{} holds writes", storage.peer.name);
        }
    }

    /// The options of `vmshadow` that name this VM.
    pub(crate) fn vm_options(&self) -> Vec<String> {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let mut options = vec![
            "--qmp".to_owned(),
            path("qmp"),
            "--agent".to_owned(),
            self.address.to_string(),
        ];
        for storage in &self.storages {
            options.push("--vhost-blk".to_owned());
            options.push(storage.control.display().to_string());
        }
        options
    }

    /// `vmshadow` with this state directory.
    pub(crate) fn vmshadow(&self, arguments: &[&str]) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_vmshadow"));
        command
            .arg("--state-dir")
            .arg(self.state_dir())
            .args(arguments)
            .kill_on_drop(true);
        command
    }

    /// `vmshadow create` of this VM.
    pub(crate) fn vmshadow_create(&self, arguments: &[&str]) -> tokio::process::Command {
        let mut command = self.vmshadow(&["create"]);
        command.args(self.vm_options()).args(arguments);
        command
    }
}

/// Limits that let a test see an expiry within a second or two.
pub(crate) fn short_limits() -> Limits {
    Limits {
        query: Duration::from_millis(1000),
        hello: Duration::from_millis(1000),
        hello_again: Duration::from_millis(500),
        identify: Duration::from_millis(1000),
        prepare: Duration::from_millis(1000),
        hold_ms: 1000,
        writer_ms: 1500,
        keep: Duration::from_millis(1000),
        abort: Duration::from_millis(1000),
        post: Duration::from_millis(1000),
        restore: Duration::from_millis(1000),
    }
}

/// Waits until something is true, at most ten seconds.
pub(crate) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(std::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
