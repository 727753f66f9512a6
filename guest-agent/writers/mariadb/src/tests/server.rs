//! A MariaDB server of a test's own: in a temporary directory, reached through a socket in it, gone with it.

use mysql_async::{Opts, OptsBuilder};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const SERVER: &str = "/usr/sbin/mariadbd";

pub(super) struct Server {
    pub(super) top: tempfile::TempDir,
    child: Child,
}

/// The user it runs as; it refuses root unless that is said.
fn user() -> String {
    let id = Command::new("id").arg("-un").output().unwrap();
    format!("--user={}", String::from_utf8(id.stdout).unwrap().trim())
}

impl Server {
    /// `None`, said aloud, if there is no server here; in CI that is a failure.
    pub(super) fn start() -> Option<Self> {
        if !Path::new(SERVER).exists() {
            assert!(std::env::var("CI").is_err(), "no MariaDB (run `make deps`)");
            eprintln!("SKIPPED: no MariaDB in {SERVER}");
            return None;
        }
        let top = tempfile::tempdir().unwrap();
        let made = Command::new("mariadb-install-db")
            .args([
                "--no-defaults",
                "--auth-root-authentication-method=socket",
                "--skip-test-db",
            ])
            .arg(user())
            .arg(format!("--datadir={}", top.path().join("data").display()))
            // A server that starts removes all temporary tables from the directory for them, those of other servers too.
            .env("TMPDIR", top.path())
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let child = Command::new("setpriv")
            .args([
                "--pdeathsig=KILL",
                SERVER,
                "--no-defaults",
                "--skip-networking",
                "--log-bin=log",
            ])
            .args(["--innodb-buffer-pool-size=16M", "--innodb-log-file-size=8M"])
            .arg(user())
            .arg(format!("--datadir={}", top.path().join("data").display()))
            .env("TMPDIR", top.path())
            .arg(format!("--socket={}", top.path().join("s").display()))
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(top.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let server = Self { top, child };
        let until = Instant::now() + Duration::from_secs(60);
        while !server.client("SELECT 1").status.success() {
            let log = std::fs::read_to_string(server.top.path().join("log")).unwrap();
            assert!(Instant::now() < until, "{log}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(server)
    }

    pub(super) fn data(&self) -> PathBuf {
        self.top.path().join("data")
    }

    pub(super) fn options(&self) -> Opts {
        OptsBuilder::default()
            .socket(Some(self.top.path().join("s").to_string_lossy()))
            .user(Some("root"))
            .into()
    }

    fn command(&self, statement: &str) -> Command {
        let mut command = Command::new("mariadb");
        command
            .arg("--no-defaults")
            .arg(format!("--socket={}", self.top.path().join("s").display()))
            .args(["-NBe", statement]);
        command
    }

    fn client(&self, statement: &str) -> Output {
        self.command(statement).output().unwrap()
    }

    /// What the stock client prints.
    pub(super) fn ask(&self, statement: &str) -> String {
        let output = self.client(statement);
        assert!(output.status.success(), "{statement}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// The stock client in the middle of a statement.
    pub(super) fn begin(&self, statement: &str) -> Child {
        self.command(statement)
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Waits until a session has looked several times for another one.
    pub(super) fn wait_for_looks(&self) {
        let looks = || -> u64 {
            let count = "SHOW GLOBAL STATUS LIKE 'Com_select'";
            self.ask(count)
                .rsplit('\t')
                .next()
                .unwrap()
                .parse()
                .unwrap()
        };
        let enough = looks() + 3;
        let until = Instant::now() + Duration::from_secs(60);
        while looks() < enough {
            assert!(Instant::now() < until, "nobody looks");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until a session waits for this.
    pub(super) fn wait_for_state(&self, state: &str) {
        let count = format!(
            "SELECT count(*) FROM information_schema.processlist WHERE state LIKE '%{state}%' AND id <> connection_id()"
        );
        let until = Instant::now() + Duration::from_secs(60);
        while self.ask(&count) == "0" {
            assert!(
                Instant::now() < until,
                "{}",
                self.ask("SHOW FULL PROCESSLIST")
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}
