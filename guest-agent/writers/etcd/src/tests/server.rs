//! A member of a test's own: in a temporary directory, on a loopback address that nobody else has, gone with it.

use crate::{Reach, Roots};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const PROGRAM: &str = "/usr/bin/etcd";
/// Patience with a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

pub(super) struct Server {
    pub(super) top: Arc<TempDir>,
    host: String,
    tls: bool,
    child: Child,
}

/// What a test wants of its member.
#[derive(Clone, Default)]
pub(super) struct Wanted {
    pub(super) options: Vec<String>,
    /// With certificates both ways.
    pub(super) tls: bool,
    /// With its log apart from its data.
    pub(super) log_apart: bool,
}

/// Of the whole 127.0.0.0/8, one for each member: no two tests, nor two runs of them, meet at a port.
fn host() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = u64::from(std::process::id()) * 64;
    let number = number + u64::from(NEXT.fetch_add(1, Ordering::Relaxed));
    let part = |place: u32| number / 250_u64.pow(place) % 250 + 1;
    format!("127.{}.{}.{}", part(2), part(1), part(0))
}

impl Server {
    /// `None`, said aloud, if there is no etcd here; in CI that is a failure.
    pub(super) fn start(wanted: &Wanted) -> Option<Self> {
        if !is_here() {
            return None;
        }
        let top = Arc::new(tempfile::tempdir().unwrap());
        if wanted.tls {
            std::fs::create_dir(top.path().join("pki")).unwrap();
        }
        let host = host();
        if wanted.tls {
            certificates(&top.path().join("pki"), &host);
        }
        let server = Self::serve(top, host, wanted);
        server.wait_until_it_answers();
        Some(server)
    }

    /// Two that are one cluster: alone, each has no quorum.
    pub(super) fn start_two() -> Option<[Self; 2]> {
        if !is_here() {
            return None;
        }
        let hosts = [host(), host()];
        let cluster = hosts
            .each_ref()
            .map(|host| format!("{host}=http://{host}:2380"));
        let wanted = Wanted {
            options: vec![format!("--initial-cluster={}", cluster.join(","))],
            ..Wanted::default()
        };
        let two = hosts.map(|host| {
            let top = Arc::new(tempfile::tempdir().unwrap());
            Self::serve(top, host, &wanted)
        });
        for server in &two {
            server.wait_until_it_answers();
        }
        Some(two)
    }

    fn serve(top: Arc<TempDir>, host: String, wanted: &Wanted) -> Self {
        let scheme = if wanted.tls { "https" } else { "http" };
        let peer = format!("http://{host}:2380");
        let client = format!("{scheme}://{host}:2379");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig=KILL", PROGRAM]).args([
            format!("--name={host}"),
            format!("--data-dir={}", top.path().join("data").display()),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
            // A machine that builds lets a member wait.
            "--heartbeat-interval=500".to_owned(),
            "--election-timeout=5000".to_owned(),
        ]);
        if !wanted
            .options
            .iter()
            .any(|option| option.starts_with("--initial-cluster="))
        {
            command.arg(format!("--initial-cluster={host}={peer}"));
        }
        if wanted.log_apart {
            command.arg(format!(
                "--wal-dir={}",
                top.path().join("log-apart").display()
            ));
        }
        if wanted.tls {
            let pki = |name: &str| top.path().join("pki").join(name).display().to_string();
            command.args([
                format!("--cert-file={}", pki("server.pem")),
                format!("--key-file={}", pki("server.key")),
                format!("--trusted-ca-file={}", pki("ca.pem")),
                "--client-cert-auth".to_owned(),
            ]);
        }
        let child = command
            .args(&wanted.options)
            .stdout(Stdio::null())
            .stderr(File::create(top.path().join("output")).unwrap())
            .spawn()
            .unwrap();
        Self {
            top,
            host,
            tls: wanted.tls,
            child,
        }
    }

    fn wait_until_it_answers(&self) {
        let until = Instant::now() + PATIENCE;
        // What it writes first goes through its cluster.
        while !self.etcdctl(&["alarm", "list"]).status.success() {
            assert!(Instant::now() < until, "{}", self.output());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn output(&self) -> String {
        std::fs::read_to_string(self.top.path().join("output")).unwrap()
    }

    pub(super) fn pki(&self, name: &str) -> PathBuf {
        self.top.path().join("pki").join(name)
    }

    pub(super) fn reach(&self) -> Reach {
        let scheme = if self.tls { "https" } else { "http" };
        let file = |name: &str| self.tls.then(|| self.pki(name));
        Reach {
            endpoint: format!("{scheme}://{}:2379", self.host).parse().unwrap(),
            cacert: file("ca.pem"),
            cert: file("client.pem"),
            key: file("client.key"),
            user: None,
            password_file: None,
        }
    }

    pub(super) fn roots(&self) -> Roots {
        let apart = self.top.path().join("log-apart");
        Roots {
            data_dir: self.top.path().join("data"),
            wal_dir: apart.is_dir().then_some(apart),
        }
    }

    fn etcdctl(&self, words: &[&str]) -> Output {
        let reach = self.reach();
        let mut command = Command::new("etcdctl");
        command
            .env("ETCDCTL_API", "3")
            .arg(format!("--endpoints={}", reach.endpoint))
            .args(["--dial-timeout=30s", "--command-timeout=60s"]);
        let files = [
            ("cacert", reach.cacert),
            ("cert", reach.cert),
            ("key", reach.key),
        ];
        for (name, path) in files {
            command.args(path.map(|path| format!("--{name}={}", path.display())));
        }
        command.args(words).output().unwrap()
    }

    /// What the stock client prints.
    pub(super) fn ask(&self, words: &[&str]) -> String {
        let output = self.etcdctl(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Whether a value fits.
    pub(super) fn has_room_for(&self, value: &str) -> bool {
        self.etcdctl(&["put", "filling", value]).status.success()
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = i32::try_from(self.child.id()).unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Copies its files while it stands still, as a frozen file system lets a set do.
    pub(super) fn copy(&self) -> TempDir {
        let copy = tempfile::tempdir().unwrap();
        self.signal(rustix::process::Signal::STOP);
        let status = Command::new("cp")
            .arg("-a")
            .arg(self.top.path().join("data"))
            .arg(copy.path())
            .status();
        self.signal(rustix::process::Signal::CONT);
        assert!(status.unwrap().success());
        copy
    }

    /// A member that starts from a copy, with these options besides; the old one is gone.
    pub(super) fn restart_from(self, copy: TempDir, options: &[&str]) -> Self {
        let host = self.host.clone();
        drop(self);
        let wanted = Wanted {
            options: options.iter().map(|&option| option.to_owned()).collect(),
            ..Wanted::default()
        };
        let server = Self::serve(Arc::new(copy), host, &wanted);
        server.wait_until_it_answers();
        server
    }

    /// The same again: another process at the same address, with the same files.
    pub(super) fn restart(self) -> Self {
        let (top, host) = (Arc::clone(&self.top), self.host.clone());
        drop(self);
        let server = Self::serve(top, host, &Wanted::default());
        server.wait_until_it_answers();
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn is_here() -> bool {
    let is_here = [PROGRAM, "/usr/bin/etcdctl"]
        .iter()
        .all(|path| Path::new(path).exists());
    assert!(
        is_here || std::env::var("CI").is_err(),
        "no etcd (run `make deps`)"
    );
    if !is_here {
        eprintln!("SKIPPED: no {PROGRAM}");
    }
    is_here
}

/// An authority, a server's certificate for this address, and a client's.
fn certificates(pki: &Path, host: &str) {
    let make = |name: &str, more: &[String]| {
        let output = Command::new("openssl")
            .current_dir(pki)
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
            ])
            .args(["-nodes", "-days", "2", "-subj", &format!("/CN={name}")])
            .args([
                "-keyout",
                &format!("{name}.key"),
                "-out",
                &format!("{name}.pem"),
            ])
            .args(more)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_ne!(
            std::fs::metadata(pki.join(format!("{name}.pem")))
                .unwrap()
                .size(),
            0
        );
    };
    for authority in ["ca", "stranger"] {
        make(authority, &[]);
    }
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let signed = "-CA ca.pem -CAkey ca.key -addext basicConstraints=critical,CA:FALSE -addext";
    make(
        "server",
        &words(&format!("{signed} subjectAltName=IP:{host}")),
    );
    make(
        "client",
        &words(&format!("{signed} extendedKeyUsage=clientAuth")),
    );
}
