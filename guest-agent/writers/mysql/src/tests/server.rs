//! A MySQL server of a test's own: in a temporary directory, reached through a socket in it, gone with it.

use mysql_async::{Opts, OptsBuilder};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub(super) struct Server {
    pub(super) top: tempfile::TempDir,
    child: Child,
}

/// Where `images/build.sh mysql` puts it: in Cargo's target directory, which this program is in, too.
fn fetched() -> Option<PathBuf> {
    let this = std::env::current_exe().unwrap();
    let places = this.ancestors().map(|directory| directory.join("mysql"));
    places
        .into_iter()
        .find(|place| place.join("packages").exists())
}

/// One of its programs. It comes with its own libraries and their loader.
fn program(place: &Path, name: &str) -> Command {
    let mut command = Command::new("setpriv");
    command
        .arg("--pdeathsig=KILL")
        .arg(place.join("lib/ld-linux-x86-64.so.2"))
        .arg("--library-path")
        .arg(place.join("lib"))
        .arg(place.join("bin").join(name))
        .arg("--no-defaults");
    command
}

impl Server {
    /// `None`, said aloud, if Debian's unstable could not be had.
    pub(super) fn start(options: &[&str]) -> Option<Self> {
        let Some(place) = fetched() else {
            eprintln!("SKIPPED: no MySQL in target/mysql (`images/build.sh mysql`)");
            return None;
        };
        let top = tempfile::tempdir().unwrap();
        let server = |more: &[&str]| {
            let id = Command::new("id").arg("-un").output().unwrap();
            let user = String::from_utf8(id.stdout).unwrap();
            let mut command = program(&place, "mysqld");
            command
                .arg(format!("--user={}", user.trim()))
                .arg(format!("--datadir={}", top.path().join("data").display()))
                .arg(format!("--basedir={}", place.display()))
                .arg(format!("--plugin-dir={}", place.join("plugin").display()))
                .args(["--secure-file-priv=NULL", "--innodb-buffer-pool-size=16M"])
                .args(more)
                .stdout(Stdio::null())
                .stderr(std::fs::File::create(top.path().join("log")).unwrap());
            command
        };
        let log = || std::fs::read_to_string(top.path().join("log")).unwrap();
        let made = server(&["--initialize-insecure"]).status().unwrap();
        assert!(made.success(), "{}", log());
        let socket = format!("--socket={}", top.path().join("s").display());
        let child = server(&["--skip-networking", "--mysqlx=OFF", &socket])
            .args(options)
            .spawn()
            .unwrap();
        let server = Self { top, child };
        let until = Instant::now() + Duration::from_secs(120);
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

    /// As this user, who has no password.
    pub(super) fn options(&self, user: &str) -> Opts {
        OptsBuilder::default()
            .socket(Some(self.top.path().join("s").to_string_lossy()))
            .user(Some(user))
            .into()
    }

    fn command(&self, statement: &str) -> Command {
        let mut command = program(&fetched().unwrap(), "mysql");
        command
            .arg(format!("--socket={}", self.top.path().join("s").display()))
            .args(["--user=root", "-NBe", statement]);
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

    /// Ends every session that waits for this.
    pub(super) fn kill_all(&self, state: &str) {
        let ids = format!(
            "SELECT id FROM performance_schema.processlist WHERE state LIKE '%{state}%' AND id <> connection_id()"
        );
        for id in self.ask(&ids).lines() {
            self.ask(&format!("KILL {id}"));
        }
    }

    /// Waits until a session waits for this.
    pub(super) fn wait_for_state(&self, state: &str) {
        let count = format!(
            "SELECT count(*) FROM performance_schema.processlist WHERE state LIKE '%{state}%' AND id <> connection_id()"
        );
        let until = Instant::now() + Duration::from_secs(60);
        while self.ask(&count) == "0" {
            assert!(
                Instant::now() < until,
                "{}",
                self.ask("SELECT * FROM performance_schema.processlist")
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
