//! Starts the real agent over Unix sockets, restricted to loop-mounted images below a directory of its own.
//!
//! Used by every test in this directory. The host's own file systems are never candidates (`--only-under`), and everything is
//! thawed and unmounted when a rig is dropped, whatever the test did.

#![allow(dead_code, reason = "no test uses all of the rig")]
#![allow(
    unreachable_pub,
    reason = "a module of several test crates, public in each"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a rig that cannot be built fails its test"
)]

pub mod played;

use guest_agent::filesystem::devices::BlockDevices;
use guest_agent::filesystem::mounts::DeviceNumber;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for anything; generous, since test machines are busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `condition` is true.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let limit = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < limit, "waited in vain: {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// Prints why a test is skipped, if this machine cannot run it.
pub fn can_run(tools: &[&str]) -> bool {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: mounting and freezing need root");
        return false;
    }
    for tool in ["mkfs.ext4", "mount", "losetup"].iter().chain(tools) {
        let found = Command::new("sh")
            .args(["-c", &format!("command -v {tool}")])
            .stdout(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if !found {
            eprintln!("skipped: no {tool}");
            return false;
        }
    }
    true
}

pub fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A system in which the file system lies on a partition with a serial, which begins at a mebibyte.
pub fn on_a_partition(top: &Path, device: DeviceNumber) -> BlockDevices {
    let partition = top.join("devices/vda/vda1");
    fs::create_dir_all(&partition).unwrap();
    fs::create_dir_all(top.join("dev/block")).unwrap();
    for (path, text) in [
        ("../serial", "ser"),
        ("partition", "1"),
        ("start", "2048"),
        ("size", "8388608"),
    ] {
        fs::write(partition.join(path), text).unwrap();
    }
    let link = top.join("dev/block").join(device.to_string());
    std::os::unix::fs::symlink(&partition, link).unwrap();
    BlockDevices::new(top)
}

/// A directory with mounts, an agent, and what is needed to undo both.
pub struct Rig {
    pub top: tempfile::TempDir,
    mounts: Vec<PathBuf>,
    agent: Option<Child>,
    options: Vec<String>,
}

impl Rig {
    pub fn new() -> Self {
        let top = tempfile::Builder::new()
            .prefix("agent-test")
            .tempdir()
            .unwrap();
        fs::set_permissions(top.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["mnt", "run", "writers", "allow", "root"] {
            fs::create_dir(top.path().join(name)).unwrap();
        }
        // State on a tmpfs, as in a guest.
        let run_dir = top.path().join("run");
        run(
            "mount",
            &["-t", "tmpfs", "tmpfs", run_dir.to_str().unwrap()],
        );
        Self {
            top,
            mounts: vec![run_dir],
            agent: None,
            options: Vec::new(),
        }
    }

    /// With one file system of this type at `a`, and the agent.
    pub fn with(fstype: &str) -> Self {
        let mut rig = Self::new();
        rig.mount("a", fstype);
        rig.start();
        rig
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.top.path().join(name)
    }

    pub fn mountpoint(&self, name: &str) -> PathBuf {
        self.top.path().join("mnt").join(name)
    }

    pub fn mountpoint_text(&self, name: &str) -> String {
        self.mountpoint(name).to_str().unwrap().to_owned()
    }

    /// Makes and mounts an image; it lies in the rig's directory.
    pub fn mount(&mut self, name: &str, fstype: &str) -> PathBuf {
        let image = self.path(&format!("{name}.img"));
        self.mount_image(name, fstype, &image)
    }

    /// Makes and mounts an image at this path.
    pub fn mount_image(&mut self, name: &str, fstype: &str, image: &Path) -> PathBuf {
        let mib = match fstype {
            "xfs" => 320,
            "btrfs" => 128,
            _ => 24,
        };
        fs::File::create(image).unwrap().set_len(mib << 20).unwrap();
        let file = image.to_str().unwrap();
        match fstype {
            "ext4" => run("mkfs.ext4", &["-q", "-F", file]),
            "vfat" => run("mkfs.vfat", &[file]),
            _ => run(&format!("mkfs.{fstype}"), &["-q", "-f", file]),
        }
        let mountpoint = self.mountpoint(name);
        fs::create_dir_all(&mountpoint).unwrap();
        let place = mountpoint.to_str().unwrap();
        run("mount", &["-t", fstype, "-o", "loop", file, place]);
        self.mounts.push(mountpoint.clone());
        mountpoint
    }

    /// Mounts anything else, to be unmounted at the end.
    pub fn mount_with(&mut self, name: &str, arguments: &[&str]) -> PathBuf {
        let mountpoint = self.mountpoint(name);
        fs::create_dir_all(&mountpoint).unwrap();
        let mut all = arguments.to_vec();
        let place = mountpoint.to_str().unwrap().to_owned();
        all.push(&place);
        run("mount", &all);
        self.mounts.push(mountpoint.clone());
        mountpoint
    }

    /// Knows a mount that was made elsewhere, to thaw and unmount it at the end.
    pub fn adopt(&mut self, mountpoint: &Path) {
        self.mounts.push(mountpoint.to_owned());
    }

    /// Further options for the agent.
    pub fn option(&mut self, name: &str, value: &str) {
        self.options.extend([name.to_owned(), value.to_owned()]);
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_guest-agent"));
        command
            .arg("--port")
            .arg(format!("unix:{}", self.path("run/native").display()))
            .arg("--qga-port")
            .arg(format!("unix:{}", self.path("run/qga").display()))
            .arg("--state-dir")
            .arg(self.path("run"))
            .arg("--writers-dir")
            .arg(self.path("writers"))
            .arg("--allow-dir")
            .arg(self.path("allow"))
            .arg("--foreign-root")
            .arg(self.path("root"))
            .arg("--only-under")
            .arg(self.path("mnt"))
            .args(&self.options);
        command
    }

    /// Starts the agent; returns when it listens.
    pub fn start(&mut self) {
        self.start_by(&[], &self.path("run/log"));
    }

    /// The same by another program that becomes the agent, and with its log elsewhere.
    pub fn start_by(&mut self, program: &[&str], log: &Path) {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(log)
            .unwrap();
        let agent = self.command();
        let mut words = program.iter().map(std::ffi::OsStr::new).collect::<Vec<_>>();
        words.push(agent.get_program());
        words.extend(agent.get_args());
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        for socket in ["native", "qga", "writers.sock"] {
            fs::remove_file(self.path("run").join(socket)).unwrap_or(());
        }
        self.agent = Some(
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(log)
                .spawn()
                .unwrap(),
        );
        for socket in ["native", "qga", "writers.sock"] {
            let path = self.path("run").join(socket);
            wait_until(socket, || UnixStream::connect(&path).is_ok());
        }
    }

    /// Starts `vmshadow-writer` with these arguments; returns when the agent knows its name.
    pub fn writer(&self, name: &str, arguments: &[&str]) -> WriterProcess {
        let child = Command::new(env!("CARGO_BIN_EXE_vmshadow-writer"))
            .args(["--name", name, "--json", "--socket"])
            .arg(self.path("run/writers.sock"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let writer = WriterProcess(child);
        wait_until("the writer is registered", || self.has_writer(name));
        writer
    }

    /// The agent knows a writer of this name.
    pub fn has_writer(&self, name: &str) -> bool {
        let mut bridge = Bridge::connect(&self.path("run/native"));
        let status = bridge.status();
        let writers = status["writers"].as_array().unwrap();
        writers.iter().any(|writer| writer["name"] == name)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("run/log")).unwrap_or_default()
    }

    pub fn agent_pid(&self) -> u32 {
        self.agent.as_ref().unwrap().id()
    }

    /// The helper: the agent's child with the helper's argument.
    pub fn helper_pid(&self) -> u32 {
        children(self.agent_pid())
            .into_iter()
            .find(|pid| {
                fs::read(format!("/proc/{pid}/cmdline"))
                    .is_ok_and(|line| line.split(|b| *b == 0).any(|word| word == b"hold-helper"))
            })
            .expect("a helper runs")
    }

    /// Kills the agent with SIGKILL.
    pub fn kill_agent(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    pub fn bridge(&self) -> Bridge {
        let mut bridge = Bridge::connect(&self.path("run/native"));
        bridge.ok("hello", json!({"versions": [1]}));
        bridge
    }

    pub fn qga(&self) -> Qga {
        let stream = UnixStream::connect(self.path("run/qga")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Qga(stream)
    }

    /// An executable of a script writer.
    pub fn script(&self, writer: &str, event: &str, text: &str) -> PathBuf {
        let directory = self.path("writers").join(writer);
        fs::create_dir_all(&directory).unwrap();
        let path = directory.join(event);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    pub fn file(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    }
}

/// A running `vmshadow-writer`, killed when it is dropped.
pub struct WriterProcess(Child);

impl WriterProcess {
    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    /// Ends it as systemd does.
    pub fn terminate(&mut self) {
        run("kill", &["-TERM", &self.0.id().to_string()]);
        self.0.wait().unwrap();
    }

    /// Waits for its exit status.
    pub fn exit_code(&mut self) -> Option<i32> {
        let mut ended = None;
        wait_until("the writer ends", || {
            ended = self.0.try_wait().unwrap();
            ended.is_some()
        });
        ended.unwrap().code()
    }
}

impl Drop for WriterProcess {
    fn drop(&mut self) {
        self.0.kill().unwrap_or(());
        self.0.wait().map(drop).unwrap_or(());
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Thaw first, or unmounting waits for ever; all at once, since a thaw may itself wait for that of another one.
        let thaws: Vec<Child> = self
            .mounts
            .iter()
            .filter_map(|mount| {
                let mut command = Command::new("fsfreeze");
                command.arg("-u").arg(mount).stderr(Stdio::null());
                command.spawn().ok()
            })
            .collect();
        for mut thaw in thaws {
            thaw.wait().map(drop).unwrap_or(());
        }
        if let Some(agent) = &mut self.agent {
            agent.kill().unwrap_or(());
            agent.wait().map(drop).unwrap_or(());
        }
        if std::thread::panicking() {
            eprintln!("--- log of the agent\n{}---", self.log());
        }
        for mount in self.mounts.iter().rev() {
            for _ in 0..100 {
                let unmounted = Command::new("umount")
                    .arg(mount)
                    .stderr(Stdio::null())
                    .status();
                if unmounted.is_ok_and(|status| status.success()) {
                    break;
                }
                std::thread::park_timeout(Duration::from_millis(50));
            }
        }
    }
}

/// Direct children of a process.
pub fn children(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(
            text.split_ascii_whitespace()
                .filter_map(|pid| pid.parse::<u32>().ok()),
        );
    }
    found
}

pub fn kill_9(pid: u32) {
    run("kill", &["-9", &pid.to_string()]);
}

/// True if a file can be written and synced there at once; the writer is another process, which may stay in D state.
pub struct Probe(Child);

impl Probe {
    /// Starts to write a file.
    pub fn start(mountpoint: &Path) -> Self {
        let file = mountpoint
            .join(format!("probe-{:?}", Instant::now()).replace([' ', '{', '}', ':', ','], ""));
        Self(
            Command::new("sh")
                .args(["-c", "echo x > \"$0\" && sync \"$0\""])
                .arg(file)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap(),
        )
    }

    /// Starts a write that returns only when it is on the disk, and until then counts as a writer of the file system.
    pub fn start_synchronous(mountpoint: &Path) -> Self {
        Self(
            Command::new("dd")
                .args(["if=/dev/zero", "bs=4k", "count=1", "oflag=sync"])
                .arg(format!("of={}", mountpoint.join("synchronous").display()))
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap(),
        )
    }

    pub fn is_done(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }

    /// Waits until it sleeps in the kernel.
    pub fn wait_blocked(&mut self) {
        let stat = format!("/proc/{}/stat", self.0.id());
        wait_until("the writer stands still", || {
            assert!(!self.is_done(), "the writer was not held");
            fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") D "))
        });
    }

    pub fn wait_done(&mut self) {
        wait_until("the writer goes on", || self.is_done());
    }
}

/// True if the file system is frozen: asked by trying to freeze and, if that worked, thawing again.
pub fn is_frozen(mountpoint: &Path) -> bool {
    let frozen = Command::new("fsfreeze")
        .arg("-f")
        .arg(mountpoint)
        .stderr(Stdio::null())
        .status()
        .unwrap();
    if frozen.success() {
        run("fsfreeze", &["-u", mountpoint.to_str().unwrap()]);
    }
    !frozen.success()
}

/// The bridge's end of the native port.
pub struct Bridge {
    reader: BufReader<UnixStream>,
    next: u64,
}

impl Bridge {
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            reader: BufReader::new(stream),
            next: 1,
        }
    }

    /// Sends a request and returns its id.
    pub fn send(&mut self, execute: &str, arguments: Value) -> u64 {
        let id = self.next;
        self.next += 1;
        let line = json!({"id": id, "execute": execute, "arguments": arguments});
        let mut stream = self.reader.get_ref();
        stream.write_all(format!("{line}\n").as_bytes()).unwrap();
        id
    }

    /// The next answer, whichever it is.
    pub fn next(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the agent hung up");
        serde_json::from_str(&line).unwrap()
    }

    pub fn ask(&mut self, execute: &str, arguments: Value) -> Value {
        let id = self.send(execute, arguments);
        let answer = self.next();
        assert_eq!(answer["id"], id);
        answer
    }

    pub fn ok(&mut self, execute: &str, arguments: Value) -> Value {
        let answer = self.ask(execute, arguments);
        assert!(answer.get("return").is_some(), "{execute}: {answer:#}");
        answer["return"].clone()
    }

    pub fn error(&mut self, execute: &str, arguments: Value) -> Value {
        let answer = self.ask(execute, arguments);
        assert!(answer.get("error").is_some(), "{execute}: {answer:#}");
        answer["error"].clone()
    }

    pub fn prepare(&mut self) -> Value {
        self.ok("prepare", json!({"set": "s", "limit_ms": 20_000}))
    }

    pub fn freeze(&mut self) -> Value {
        self.ok("freeze", freeze_arguments(10_000))
    }

    pub fn thaw(&mut self, frozen: &Value) -> Value {
        let generation = frozen["generation"].clone();
        self.ok("thaw", json!({"set": "s", "generation": generation}))
    }

    pub fn abort(&mut self) {
        self.ok("abort", json!({"set": "s", "reason": "test"}));
    }

    pub fn status(&mut self) -> Value {
        self.ok("status", json!({}))
    }
}

pub fn freeze_arguments(hold_ms: u64) -> Value {
    json!({"set": "s", "hold_ms": hold_ms, "writer_ms": 60_000})
}

/// A client of the QEMU guest agent protocol; speaks in bytes.
pub struct Qga(UnixStream);

impl Qga {
    pub fn write(&mut self, bytes: &str) {
        self.write_bytes(bytes.as_bytes());
    }

    pub fn write_bytes(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    /// Reads up to and with a newline.
    pub fn line(&mut self) -> Vec<u8> {
        let mut line = Vec::new();
        let mut byte = [0];
        while line.last() != Some(&b'\n') {
            self.0.read_exact(&mut byte).unwrap();
            line.push(byte[0]);
        }
        line
    }

    pub fn ask(&mut self, bytes: &str) -> String {
        self.write(bytes);
        String::from_utf8(self.line()).unwrap()
    }
}
