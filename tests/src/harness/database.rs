//! Servers of the databases' guest: an empty data directory of each, made once, and how they are started.
//!
//! Called by the databases' scenarios and measurements. What the words mean inside the guest is in
//! `images/databases/database`; this room knows its command line alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::disk::{self, FileSystem};
use super::image;
use super::oracle::Found;
use super::vm::{Vm, VmBuilder};

/// A server under emulation on a busy host may take this long to start, to stop, or to be checked.
const PATIENCE: Duration = Duration::from_secs(300);

/// Bytes of a database's disk; sparse on the host.
const DISK_BYTES: u64 = 512 << 20;

/// Which server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// PostgreSQL 15.
    Postgresql,
    /// MariaDB, with a binary log.
    Mariadb,
    /// MySQL as Debian's unstable has it, with a binary log.
    Mysql,
    /// Redis with an append-only file.
    Redis,
    /// Redis with dumps alone.
    RedisDump,
    /// etcd, a cluster of one member.
    Etcd,
}

impl Kind {
    /// Its name in `images/databases/database`, of its directory and of its writer.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Postgresql => "postgresql",
            Self::Mariadb => "mariadb",
            Self::Mysql => "mysql",
            Self::Redis => "redis",
            Self::RedisDump => "redis-dump",
            Self::Etcd => "etcd",
        }
    }

    /// The name under which its writer registers.
    #[must_use]
    pub fn writer(self) -> &'static str {
        match self {
            Self::Postgresql => "PostgreSQL",
            Self::Mariadb => "MariaDB",
            Self::Mysql => "MySQL",
            Self::Redis | Self::RedisDump => "Redis",
            Self::Etcd => "etcd",
        }
    }

    /// A disk with an empty data directory in `NAME/` and nothing else. It is made in a machine by the server's own
    /// programs, once for each image; callers copy it.
    pub fn empty_disk(self) -> Result<PathBuf> {
        let image = image::databases_image()?;
        let beside = image.manifest.parent().context("the image's directory")?;
        let made = beside.join(format!("{}.raw", self.name()));
        if made.is_file() {
            return Ok(made);
        }
        let work = tempfile::Builder::new()
            .prefix(self.name())
            .tempdir_in(beside)?;
        let file = disk::create_sized(work.path(), "disk", FileSystem::Ext4, DISK_BYTES)?;
        let vm = VmBuilder::new(self.name())
            .with_databases()
            .file("disk", &file)
            .mounted("/mnt/disk", FileSystem::Ext4)
            .boot()?;
        self.run(&vm, "make", "/mnt/disk")?;
        vm.shut_down()?;
        // Whole or not at all: another test program may make it at the same time.
        fs::rename(&file, &made)?;
        Ok(made)
    }

    /// What the server's own client prints for words without single quotes.
    pub fn ask(self, vm: &Vm, words: &str) -> Result<String> {
        let command = format!("database ask {} - \"{words}\"", self.name());
        Ok(vm.shell(&command)?.trim().to_owned())
    }

    /// What the load left, by client: each has the numbers from 1 on, and the last one in a place of its own that the same
    /// transaction wrote.
    pub fn found(self, vm: &Vm, clients: usize) -> Result<Vec<Found>> {
        (0..clients)
            .map(|client| self.found_of(vm, client))
            .collect()
    }

    fn found_of(self, vm: &Vm, client: usize) -> Result<Found> {
        let numbers = match self {
            Self::Postgresql | Self::Mariadb | Self::Mysql => {
                let table = format!(
                    "SELECT (SELECT id FROM latest WHERE client = {client}), count(*), coalesce(max(id), 0) \
                     FROM tx WHERE client = {client}"
                );
                self.ask(vm, &table)?
            }
            Self::Redis | Self::RedisDump => {
                let words = [
                    format!("GET latest:{client}"),
                    format!("LLEN tx:{client}"),
                    format!("LINDEX tx:{client} -1"),
                ];
                let mut all = String::new();
                for words in words {
                    all += &(self.ask(vm, &words)? + " ");
                }
                all
            }
            Self::Etcd => {
                let value = "--print-value-only";
                let latest = self.ask(vm, &format!("get latest/{client} {value}"))?;
                let keys = format!("get tx/{client}/ --prefix");
                let last = format!("{keys} --sort-by KEY --order DESCEND --limit 1 {value}");
                let last = self.ask(vm, &last)?;
                // It is that of all, whatever the limit.
                let count = self.ask(
                    vm,
                    &format!("{keys} --limit 1 --keys-only --write-out fields"),
                )?;
                let count = count
                    .lines()
                    .find_map(|line| line.strip_prefix("\"Count\" :"));
                let count = count.context("no count")?;
                format!("{latest} {count} {last}")
            }
        };
        let split = numbers.split(|character: char| !character.is_ascii_digit());
        let words: Vec<u64> = split
            .filter(|word| !word.is_empty())
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let [latest, count, last, ..] = words.as_slice() else {
            bail!("client {client}: {numbers}");
        };
        let whole = if latest == last {
            "ok"
        } else {
            "half a transaction"
        };
        Ok(Found {
            last: *last,
            count: *count,
            integrity: whole.to_owned(),
            size: None,
        })
    }

    /// The copy's log reaches the position that the writer recorded at the freeze. The server has recovered and runs, and the one
    /// that was copied runs too.
    fn reaches(self, origin: &Vm, vm: &Vm, directory: &str, evidence: &Value) -> Result<()> {
        let text = |name: &str| {
            let value = evidence[name].as_str();
            value.with_context(|| format!("no {name} in {evidence}"))
        };
        match self {
            Self::Postgresql => {
                // A recovery ends with a checkpoint where the log it found ends.
                let end = self.ask(vm, "SELECT redo_lsn FROM pg_control_checkpoint()")?;
                let recorded = text("lsn")?;
                ensure!(
                    lsn(&end)? >= lsn(recorded)?,
                    "recovered to {end}, recorded {recorded}"
                );
            }
            Self::Mariadb => {
                let end = self.ask(vm, "SELECT @@gtid_binlog_pos")?;
                let recorded = text("gtid_binlog_pos")?;
                ensure!(end == recorded, "recovered to {end}, recorded {recorded}");
            }
            Self::Mysql => {
                let recorded = text("gtid_executed")?;
                let has_all =
                    format!("SELECT GTID_SUBSET('{recorded}', @@gtid_executed), @@gtid_executed");
                let answer = self.ask(vm, &has_all.replace('\'', "\\\""))?;
                ensure!(
                    answer.starts_with("1\t"),
                    "recovered to {answer}, recorded {recorded}"
                );
            }
            Self::Redis => {
                let recorded: u64 = text("aof_current_size")?.parse()?;
                let bytes = |part: &str| -> Result<u64> {
                    let files = format!("{directory}/redis/appendonlydir/*.{part}.*");
                    let sizes = vm.shell(&format!("stat -c %s {files}"))?;
                    let sizes = sizes.lines().map(str::parse::<u64>);
                    Ok(sizes.sum::<Result<_, _>>()?)
                };
                let (base, log) = (bytes("base")?, bytes("incr")?);
                // A server counts the first of its files only if it has loaded or rewritten it, not if it has made it at its start.
                ensure!(
                    recorded == log || recorded == base + log,
                    "{base} and {log} bytes, recorded {recorded}"
                );
            }
            Self::RedisDump => {
                // A dump has no position: that nothing was in no dump is the writer's word, what the copy has is compared with what
                // clients know, as for every server.
                let changes = text("rdb_changes_since_last_save")?;
                ensure!(changes == "0", "{changes} changes were in no dump");
            }
            Self::Etcd => {
                let recorded = &evidence["revision"];
                let recorded = recorded.as_u64().context("no revision")?;
                // A copy that ends before that revision refuses to say; all up to it is to be the same.
                let words = format!("endpoint hashkv --rev {recorded}");
                let [copy, whole] = [vm, origin].map(|vm| self.ask(vm, &words));
                let (copy, whole) = (copy?, whole?);
                ensure!(
                    copy == whole && !copy.is_empty(),
                    "at {recorded}: {copy}, but {whole}"
                );
                let alarms = self.ask(vm, "alarm list")?;
                ensure!(alarms.is_empty(), "{alarms}");
            }
        }
        Ok(())
    }

    /// Starts the server on a copy of `origin`'s disk that is mounted in `directory`, has its own checker look at it, and returns what the load
    /// left there.
    pub fn judge(
        self,
        origin: &Vm,
        vm: &Vm,
        directory: &str,
        evidence: &Value,
        clients: usize,
    ) -> Result<Vec<Found>> {
        match self {
            Self::Postgresql | Self::Mariadb | Self::Mysql => {
                self.run(vm, "start", directory)?;
                self.reaches(origin, vm, directory, evidence)?;
                let found = self.found(vm, clients)?;
                self.run(vm, "check", directory)?;
                self.run(vm, "stop", directory)?;
                Ok(found)
            }
            Self::Redis | Self::RedisDump | Self::Etcd => {
                // A start could mend what the checker is to see.
                self.run(vm, "check", directory)?;
                self.run(vm, "start", directory)?;
                self.reaches(origin, vm, directory, evidence)?;
                let found = self.found(vm, clients)?;
                self.run(vm, "stop", directory)?;
                Ok(found)
            }
        }
    }

    /// `database WORD KIND DIRECTORY` in the machine; its standard output.
    pub fn run(self, vm: &Vm, word: &str, directory: &str) -> Result<String> {
        let command = format!("database {word} {} {directory}", self.name());
        let answer = vm.guest()?.start(&command)?.wait(PATIENCE)?;
        ensure!(answer.status == 0, "{command}: {answer:?}\n{}", vm.log());
        Ok(answer.stdout)
    }
}

/// A position in PostgreSQL's log: two hexadecimal numbers.
fn lsn(text: &str) -> Result<(u32, u32)> {
    let (high, low) = text.trim().split_once('/').context("not a position")?;
    Ok((
        u32::from_str_radix(high, 16)?,
        u32::from_str_radix(low, 16)?,
    ))
}

/// Copies a disk without filling its holes.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let status = std::process::Command::new("cp")
        .arg("--sparse=always")
        .args([from, to])
        .status()?;
    ensure!(status.success(), "cp {} {}", from.display(), to.display());
    Ok(())
}
