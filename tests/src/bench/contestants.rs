//! Who takes turns: our daemon, the storage daemon in its arrangements, fio.
//!
//! Called by the figures. Where everybody only reads and writes the same file (figure 1), all use one file in turn, since where its blocks
//! happen to lie decides as much as the program: then ours comes and goes (`Visiting`), because it locks its base. Where a
//! snapshot makes the files differ, each has its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::Bench;
use super::client::Client;
use super::daemon::Daemon;
use super::fio;
use super::job::Job;
use super::peers::{Overlay, StorageDaemon};
use super::place::{Files, Place};
use super::rounds::{Contestant, Turn};

/// Our daemon with one disk.
#[derive(Debug)]
pub struct Ours {
    name: String,
    base: PathBuf,
    // Hangs up before the daemon is killed.
    client: Client,
    /// The daemon.
    pub daemon: Daemon,
    /// Method of the snapshot that is taken before each round.
    pub snapshot: Option<&'static str>,
    /// Most queues of the connection that a job gets.
    queues_max: usize,
    // Removed after the daemon is killed.
    files: Files,
}

/// How ours is started.
#[derive(Clone, Copy, Debug)]
pub struct OursSpec<'a> {
    /// Name in the tables.
    pub name: &'a str,
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// Further arguments of the daemon.
    pub arguments: &'a [&'a str],
    /// Queues to connect.
    pub queues: usize,
}

impl<'a> OursSpec<'a> {
    /// One queue, and nothing else to say.
    #[must_use]
    pub fn plain(name: &'a str, size_bytes: u64) -> Self {
        Self {
            name,
            size_bytes,
            arguments: &[],
            queues: 1,
        }
    }
}

impl Ours {
    /// On a new file.
    pub fn start(bench: &Bench, place: &Place, spec: OursSpec<'_>) -> Result<Self> {
        let files = place.directory(&spec.name.replace([' ', ','], "-"))?;
        let base = files.path().join("base.raw");
        place.file(&base, spec.size_bytes)?;
        Self::over(&bench.vhost_blk, files, base, spec)
    }

    /// On a file that is there; what else the daemon makes lies in `files`.
    fn over(program: &Path, files: Files, base: PathBuf, spec: OursSpec<'_>) -> Result<Self> {
        let daemon = Daemon::one(program, files.path(), &base, spec.arguments)?;
        let client = daemon.client("disk", spec.queues)?;
        Ok(Self {
            name: spec.name.to_owned(),
            base,
            client,
            daemon,
            snapshot: None,
            queues_max: spec.queues,
            files,
        })
    }

    /// Its base.
    #[must_use]
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// Connection and daemon, for two threads.
    pub fn parts(&mut self) -> (&mut Client, &mut Daemon) {
        (&mut self.client, &mut self.daemon)
    }

    /// Ended in order and started again.
    pub fn restarted(self) -> Result<Self> {
        let Self {
            name,
            base,
            client,
            mut daemon,
            snapshot,
            queues_max,
            files,
        } = self;
        drop(client);
        daemon.stop()?;
        daemon.restart()?;
        let client = daemon.client("disk", queues_max)?;
        Ok(Self {
            name,
            base,
            client,
            daemon,
            snapshot,
            queues_max,
            files,
        })
    }

    /// The daemon and its files; the client has hung up.
    #[must_use]
    pub fn hung_up(self) -> (Daemon, Files) {
        (self.daemon, self.files)
    }

    /// The connection.
    pub fn client(&mut self) -> &mut Client {
        &mut self.client
    }
}

impl Contestant for Ours {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn make_ready(&mut self, _job: &Job) -> Result<()> {
        let Some(method) = self.snapshot else {
            return Ok(());
        };
        self.daemon.snapshot(method)?;
        self.daemon.wait_idle()
    }

    fn settle(&mut self) -> Result<()> {
        if self.snapshot.is_some() {
            self.daemon.wait_idle()?;
        }
        Ok(())
    }

    fn pid(&self) -> Option<u32> {
        Some(self.daemon.pid())
    }

    fn run(&mut self, job: &Job, seed: u64) -> Result<Turn> {
        let queues = job.queues.min(self.queues_max);
        let run = self.client.run(
            &Job {
                queues,
                ..job.clone()
            },
            seed,
        )?;
        Ok(Turn::from(&run))
    }
}

/// What a program that was just started does before its turn: then its memory is mapped and its ways are found.
const WARM_UP: Duration = Duration::from_millis(50);

/// Ours on a file that is not its own: it is there for its turns only.
#[derive(Debug)]
pub struct Visiting {
    program: PathBuf,
    place: Place,
    base: PathBuf,
    spec: OursSpec<'static>,
    present: Option<Ours>,
}

impl Visiting {
    /// Of a file that is there, and that nobody writes in its turns.
    #[must_use]
    pub fn of(bench: &Bench, place: &Place, base: &Path, spec: OursSpec<'static>) -> Self {
        Self {
            program: bench.vhost_blk.clone(),
            place: place.clone(),
            base: base.to_owned(),
            spec,
            present: None,
        }
    }
}

impl Contestant for Visiting {
    fn name(&self) -> String {
        self.spec.name.to_owned()
    }

    fn make_ready(&mut self, job: &Job) -> Result<()> {
        self.settle()?;
        let files = self
            .place
            .directory(&self.spec.name.replace([' ', ','], "-"))?;
        let mut ours = Ours::over(&self.program, files, self.base.clone(), self.spec)?;
        ours.run(&job.clone().limit(WARM_UP), 0)?;
        ours.daemon.wait_idle()?;
        self.present = Some(ours);
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        self.present = None;
        Ok(())
    }

    fn pid(&self) -> Option<u32> {
        self.present.as_ref()?.pid()
    }

    fn run(&mut self, job: &Job, seed: u64) -> Result<Turn> {
        let present = self.present.as_mut().context("a daemon that is there")?;
        present.run(job, seed)
    }
}

/// How the storage daemon serves a raw file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrangement {
    /// The file itself.
    Raw,
    /// No file: what the client and the ring alone allow.
    Null,
    /// A fresh overlay.
    Overlay(Overlay),
    /// A fresh copy-before-write target.
    CopyBeforeWrite,
}

impl Arrangement {
    /// Name in the tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "QSD raw",
            Self::Null => "QSD null-co",
            Self::Overlay(Overlay::Clusters64K) => "QSD overlay",
            Self::Overlay(Overlay::ExtendedL2) => "QSD overlay l2ext",
            Self::CopyBeforeWrite => "QSD cbw",
        }
    }
}

/// The storage daemon. Overlays and targets are made anew before each round, as a snapshot would be.
#[derive(Debug)]
pub struct Peer {
    arrangement: Arrangement,
    base: PathBuf,
    size_bytes: u64,
    queues: usize,
    /// Whether overlays and targets are made anew before each round.
    pub fresh: bool,
    // The client hangs up before the daemon is killed.
    running: Option<(Client, StorageDaemon)>,
    // Removed after the daemon is killed.
    files: Files,
}

impl Peer {
    /// On a new file.
    pub fn start(
        place: &Place,
        arrangement: Arrangement,
        size_bytes: u64,
        queues: usize,
    ) -> Result<Self> {
        let files = place.directory(&arrangement.name().replace(' ', "-"))?;
        let base = files.path().join("base.raw");
        if arrangement != Arrangement::Null {
            place.file(&base, size_bytes)?;
        }
        Self::over(files, arrangement, base, size_bytes, queues)
    }

    /// The raw file that others use as well; started anew for each turn, as ours is: the client's memory must not be older, and lie
    /// better, than ours.
    pub fn raw(place: &Place, base: &Path, size_bytes: u64, queues: usize) -> Result<Self> {
        let arrangement = Arrangement::Raw;
        let files = place.directory(&arrangement.name().replace(' ', "-"))?;
        let peer = Self::over(files, arrangement, base.to_owned(), size_bytes, queues)?;
        Ok(Self {
            fresh: true,
            ..peer
        })
    }

    fn over(
        files: Files,
        arrangement: Arrangement,
        base: PathBuf,
        size_bytes: u64,
        queues: usize,
    ) -> Result<Self> {
        let mut peer = Self {
            arrangement,
            base,
            size_bytes,
            queues,
            fresh: !matches!(arrangement, Arrangement::Raw | Arrangement::Null),
            running: None,
            files,
        };
        peer.restart()?;
        Ok(peer)
    }

    fn restart(&mut self) -> Result<()> {
        self.running = None;
        let run = self.files.path().join("run");
        if run.exists() {
            fs::remove_dir_all(&run)?;
        }
        fs::create_dir(&run)?;
        let daemon = match self.arrangement {
            Arrangement::Raw => StorageDaemon::raw(&run, &self.base, self.queues)?,
            Arrangement::Null => StorageDaemon::null(&run, self.size_bytes)?,
            Arrangement::Overlay(kind) => StorageDaemon::overlay(&run, &self.base, kind)?,
            Arrangement::CopyBeforeWrite => {
                StorageDaemon::copy_before_write(&run, &self.base, self.size_bytes)?
            }
        };
        let client = daemon.client(self.queues)?;
        self.running = Some((client, daemon));
        Ok(())
    }
}

impl Contestant for Peer {
    fn name(&self) -> String {
        self.arrangement.name().to_owned()
    }

    fn make_ready(&mut self, job: &Job) -> Result<()> {
        if !self.fresh {
            return Ok(());
        }
        self.restart()?;
        if self.arrangement == Arrangement::Raw {
            self.run(&job.clone().limit(WARM_UP), 0)?;
        }
        Ok(())
    }

    fn pid(&self) -> Option<u32> {
        self.running.as_ref().map(|running| running.1.pid())
    }

    fn run(&mut self, job: &Job, seed: u64) -> Result<Turn> {
        let (client, _) = self
            .running
            .as_mut()
            .context("the storage daemon is not there")?;
        Ok(Turn::from(&client.run(job, seed)?))
    }
}

/// fio on a file that others use as well.
#[derive(Debug)]
pub struct Fio {
    /// The file.
    pub file: PathBuf,
}

impl Fio {
    /// Name in the tables.
    pub const NAME: &'static str = "fio";
}

impl Contestant for Fio {
    fn name(&self) -> String {
        Self::NAME.to_owned()
    }

    fn pid(&self) -> Option<u32> {
        None
    }

    fn run(&mut self, job: &Job, seed: u64) -> Result<Turn> {
        let run = fio::run(&self.file, job, seed)?;
        let ios = run.ios as f64;
        Ok(Turn {
            ios: run.ios,
            flushes: 0,
            per_second: ios / run.elapsed.as_secs_f64(),
            latency_us: run.latency_us,
            latency_p99_us: run.latency_p99_us,
            latency_max_us: run.latency_p99_us,
            processor_us: Some(run.processor.as_secs_f64() * 1e6 / ios),
            written_bytes: None,
            read_bytes: None,
            prepared_bytes: None,
        })
    }
}
