//! A Redis server of a test's own: in a temporary directory, reached through a socket in it, gone with it.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const SERVER: &str = "/usr/bin/redis-server";

pub(super) struct Server {
    pub(super) top: tempfile::TempDir,
    child: Child,
}

impl Server {
    /// `None`, said aloud, if there is no server here; in CI that is a failure.
    pub(super) fn start(settings: &[&str]) -> Option<Self> {
        if !Path::new(SERVER).exists() {
            assert!(std::env::var("CI").is_err(), "no Redis (run `make deps`)");
            eprintln!("SKIPPED: no Redis in {SERVER}");
            return None;
        }
        let top = tempfile::tempdir().unwrap();
        Some(Self::serve(top, settings))
    }

    fn serve(top: tempfile::TempDir, settings: &[&str]) -> Self {
        let child = Command::new("setpriv")
            .args(["--pdeathsig=KILL", SERVER, "--port", "0", "--save", ""])
            .arg("--unixsocket")
            .arg(top.path().join("s"))
            .arg("--dir")
            .arg(top.path())
            .args(settings)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self { top, child };
        let until = Instant::now() + Duration::from_secs(60);
        while server.client(&["PING"]) != "PONG" {
            assert!(Instant::now() < until, "Redis does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    pub(super) fn client_of(&self) -> redis::Client {
        let url = format!("redis+unix://{}", self.top.path().join("s").display());
        redis::Client::open(url).unwrap()
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("redis-cli");
        command.arg("-s").arg(self.top.path().join("s")).args(words);
        command
    }

    /// What the stock client prints.
    pub(super) fn client(&self, words: &[&str]) -> String {
        let output = self.command(words).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// The stock client in the middle of a command.
    pub(super) fn begin(&self, words: &[&str]) -> Child {
        self.command(words).stdout(Stdio::null()).spawn().unwrap()
    }

    /// Waits until a client is held beside the writer itself.
    pub(super) fn wait_for_blocked(&self) {
        let until = Instant::now() + Duration::from_secs(60);
        while !self
            .client(&["INFO", "clients"])
            .contains("blocked_clients:2")
        {
            assert!(
                Instant::now() < until,
                "{}",
                self.client(&["INFO", "clients"])
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Another server on a copy of the files as they are now.
    pub(super) fn copy(&self, settings: &[&str]) -> Self {
        let top = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(self.top.path()).unwrap() {
            let entry = entry.unwrap();
            if entry.file_name() != "s" {
                let copied = Command::new("cp")
                    .arg("-a")
                    .arg(entry.path())
                    .arg(top.path())
                    .status();
                assert!(copied.unwrap().success());
            }
        }
        Self::serve(top, settings)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}
