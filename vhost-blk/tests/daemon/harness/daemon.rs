//! The daemon as a process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for anything that a living daemon does. Only what hangs takes so long: on a busy machine a single sync may take tens of
/// seconds, and a daemon that waits for its replacement waits for 30 s.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Waits on a condition; panics when patience ends.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A directory for disks and sockets, on the disk of the build (O_DIRECT works there, unlike on some /tmp).
pub(crate) struct Scratch {
    directory: tempfile::TempDir,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self { directory }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A disk of zeroes.
    pub(crate) fn disk(&self, name: &str, size_bytes: u64) -> PathBuf {
        let path = self.path(name);
        std::fs::File::create(&path)
            .unwrap()
            .set_len(size_bytes)
            .unwrap();
        path
    }
}

/// A running daemon; killed when dropped.
pub(crate) struct Daemon {
    child: Child,
    pub(crate) arguments: Vec<String>,
}

impl Daemon {
    /// Starts `vhost-blk serve` and waits until the sockets among its arguments answer.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let daemon = Self::spawn(arguments);
        for socket in daemon.sockets() {
            // A connection to a vhost-user socket would count as a front end, so only its existence is looked at: the
            // daemon binds under another name and renames.
            wait_until("the daemon's socket", || socket.exists());
        }
        daemon
    }

    fn spawn(arguments: &[&str]) -> Self {
        let arguments: Vec<String> = arguments.iter().map(|text| (*text).to_owned()).collect();
        for socket in sockets(&arguments) {
            // What a killed daemon has left must not be taken for the new one's.
            if socket.exists() && std::os::unix::net::UnixStream::connect(&socket).is_err() {
                std::fs::rename(&socket, socket.with_extension("stale")).unwrap();
            }
        }
        Self::launch(arguments)
    }

    /// Starts it without waiting for anything.
    pub(crate) fn launch(arguments: Vec<String>) -> Self {
        Self::launch_with(arguments, Stdio::inherit(), None)
    }

    /// The same; what it tells goes to a file.
    pub(crate) fn launch_telling(arguments: Vec<String>, told: &Path) -> Self {
        let told = std::fs::File::create(told).unwrap();
        Self::launch_with(arguments, told.into(), Some("info"))
    }

    fn launch_with(arguments: Vec<String>, stderr: Stdio, level: Option<&str>) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_vhost-blk"))
            .envs(level.map(|level| ("VHOST_BLK_LOG", level)))
            .arg("serve")
            .args(&arguments)
            .stdin(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        Self { child, arguments }
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    pub(crate) fn assert_running(&mut self) {
        assert_eq!(self.child.try_wait().unwrap(), None);
    }

    /// Runs to the end; for command lines that are refused. Answers exit code and what was told.
    pub(crate) fn refused(arguments: &[&str]) -> (Option<i32>, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_vhost-blk"))
            .arg("serve")
            .args(arguments)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    pub(crate) fn restart(self) -> Self {
        let arguments = self.arguments.clone();
        drop(self);
        Self::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn sockets(&self) -> Vec<PathBuf> {
        sockets(&self.arguments)
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let id = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(id, signal).unwrap();
    }

    /// kill -9, and waits for the end.
    pub(crate) fn kill(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::mem::take(&mut self.arguments)
    }

    /// SIGTERM, and waits for the end.
    pub(crate) fn terminate(mut self) -> ExitStatus {
        self.signal(rustix::process::Signal::TERM);
        self.wait()
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the daemon's end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Number of open descriptors.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.id()))
            .unwrap()
            .count()
    }
}

fn sockets(arguments: &[String]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for (flag, value) in arguments.iter().zip(arguments.iter().skip(1)) {
        if flag == "--socket" || flag == "--control" {
            found.push(Path::new(value).to_owned());
        }
        if flag == "--disk" {
            let socket = value
                .split(',')
                .find_map(|part| part.strip_prefix("socket="));
            found.extend(socket.map(PathBuf::from));
        }
    }
    found
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may be stopped, or gone already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A daemon with one disk, and where it is reached.
pub(crate) struct Served {
    // Before the directory it works in.
    pub(crate) daemon: Daemon,
    pub(crate) scratch: Scratch,
    pub(crate) socket: PathBuf,
    pub(crate) control: PathBuf,
}

/// Serves `disk.raw` of 16 MiB with `extra` arguments.
pub(crate) fn serve(extra: &[&str]) -> Served {
    serve_disk(16 << 20, extra)
}

/// The same with a disk of another size.
pub(crate) fn serve_disk(size_bytes: u64, extra: &[&str]) -> Served {
    let scratch = Scratch::new();
    let disk = scratch.disk("disk.raw", size_bytes);
    let (socket, control) = (scratch.path("socket"), scratch.path("control"));
    let mut arguments = vec![
        "--disk",
        disk.to_str().unwrap(),
        "--socket",
        socket.to_str().unwrap(),
        "--control",
        control.to_str().unwrap(),
    ];
    arguments.extend(extra);
    let daemon = Daemon::start(&arguments);
    Served {
        daemon,
        scratch,
        socket,
        control,
    }
}
