//! A PostgreSQL server of a test's own: in a temporary directory, reached through a socket in it, gone with it.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio_postgres::Config;

const PROGRAMS: &str = "/usr/lib/postgresql/15/bin";

pub(super) struct Server {
    top: tempfile::TempDir,
    child: Child,
}

/// The server refuses to run as root; Debian's package has made a user for it.
fn command(program: &str) -> Command {
    let program = Path::new(PROGRAMS).join(program);
    if !rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command
        .args([
            "--reuid=postgres",
            "--regid=postgres",
            "--clear-groups",
            "--pdeathsig=KILL",
        ])
        .arg(program);
    command
}

fn directory() -> tempfile::TempDir {
    let top = tempfile::tempdir().unwrap();
    // Its owner is the server's user, whose number the account file has.
    let accounts = std::fs::read_to_string("/etc/passwd").unwrap();
    let postgres = accounts.lines().find(|line| line.starts_with("postgres:"));
    let numbers: Vec<u32> = postgres
        .into_iter()
        .flat_map(|line| line.split(':').skip(2).take(2))
        .map(|word| word.parse().unwrap())
        .collect();
    if rustix::process::geteuid().is_root() {
        chown(top.path(), Some(numbers[0]), Some(numbers[1])).unwrap();
    }
    std::fs::set_permissions(top.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    top
}

impl Server {
    /// `None`, said aloud, if there is no server here; in CI that is a failure.
    pub(super) fn start() -> Option<Self> {
        if !Path::new(PROGRAMS).join("postgres").exists() {
            assert!(
                std::env::var("CI").is_err(),
                "no PostgreSQL (run `make deps`)"
            );
            eprintln!("SKIPPED: no PostgreSQL 15 in {PROGRAMS}");
            return None;
        }
        let top = directory();
        let made = command("initdb")
            .args([
                "--username=postgres",
                "--auth=trust",
                "--no-sync",
                "--locale=C",
                "--pgdata",
            ])
            .arg(top.path().join("data"))
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(made.success());
        Some(Self::serve(top))
    }

    fn serve(top: tempfile::TempDir) -> Self {
        let child = command("postgres")
            .args([
                "-c",
                "listen_addresses=",
                "-c",
                "shared_buffers=8MB",
                "-c",
                "autovacuum=off",
            ])
            .arg("-k")
            .arg(top.path())
            .arg("-D")
            .arg(top.path().join("data"))
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(top.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let server = Self { top, child };
        let until = Instant::now() + Duration::from_secs(60);
        while !server.psql("SELECT 1").status.success() {
            assert!(Instant::now() < until, "{}", server.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    pub(super) fn log(&self) -> String {
        std::fs::read_to_string(self.top.path().join("log")).unwrap()
    }

    pub(super) fn config(&self) -> Config {
        let mut config = Config::new();
        config
            .host_path(self.top.path())
            .user("postgres")
            .dbname("postgres");
        config
    }

    fn psql(&self, statement: &str) -> std::process::Output {
        Command::new(Path::new(PROGRAMS).join("psql"))
            .args(["-XAtq", "-U", "postgres", "-c", statement, "-h"])
            .arg(self.top.path())
            .output()
            .unwrap()
    }

    /// What the stock client prints.
    pub(super) fn ask(&self, statement: &str) -> String {
        let output = self.psql(statement);
        assert!(output.status.success(), "{statement}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Makes a tablespace and returns its directory.
    pub(super) fn tablespace(&self, name: &str) -> PathBuf {
        let path = self.top.path().join(name);
        let made = Command::new("install")
            .args(["-d", "-o", "postgres"])
            .arg(&path)
            .status();
        assert!(made.unwrap().success());
        let path = path.canonicalize().unwrap();
        self.ask(&format!(
            "CREATE TABLESPACE {name} LOCATION '{}'",
            path.display()
        ));
        path
    }

    /// Copies the data directory, but for what a backup of a running server leaves out.
    pub(super) fn copy_files(&self) -> PathBuf {
        let copy = self.top.path().join("copy");
        let status = Command::new("cp")
            .arg("-a")
            .arg(self.top.path().join("data"))
            .arg(&copy)
            .status();
        assert!(status.unwrap().success());
        std::fs::remove_file(copy.join("postmaster.pid")).unwrap();
        copy
    }

    /// Starts another server on such a copy, with the label that the writer returned, and the log as it is now.
    pub(super) fn start_copy(&self, copy: &Path, label: &str) -> Self {
        let top = directory();
        let data = top.path().join("data");
        for (from, to) in [
            (copy, &data),
            (&self.top.path().join("data/pg_wal"), &data.join("pg_wal")),
        ] {
            std::fs::remove_dir_all(to).ok();
            let status = Command::new("cp").arg("-a").arg(from).arg(to).status();
            assert!(status.unwrap().success());
        }
        std::fs::write(data.join("backup_label"), label).unwrap();
        let owner = Command::new("chown")
            .arg("--reference")
            .arg(copy)
            .arg(data.join("backup_label"))
            .status();
        assert!(owner.unwrap().success());
        Self::serve(top)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // An immediate shutdown takes its children along, which a kill of the first process would not.
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(pid.unwrap(), rustix::process::Signal::QUIT).unwrap();
        self.child.wait().unwrap();
    }
}
