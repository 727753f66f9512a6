//! Flags and file to a checked configuration.
//!
//! Called by `main` only. Knows nothing of how disks are served.
//!
//! One disk is said in flags (`--disk disk.raw --socket S`), several in groups
//! (`--disk path=a.raw,socket=a.sock,serial=A`, a comma inside a value doubled as in QEMU) or in a TOML file. Flags beside groups
//! are defaults for all of them.
#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "these comments are the command line's help"
)]

use crate::engine::EngineKind;
use crate::frontend::QUEUES_MAX;
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Deserialize;
use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vhost_blk_wire::types::Method;

/// Longest serial a guest can read, in bytes (`VIRTIO_BLK_ID_BYTES`).
const SERIAL_BYTES_MAX: usize = 20;
/// Most disks of one daemon.
const DISKS_MAX: usize = 256;

/// As much as the store takes of its own accord: with more, a start after a kill replays longer.
const INDEX_MEMORY_BYTES: u64 = 32 << 20;
const INDEX_MEMORY_RANGE: RangeInclusive<u64> = 1 << 20..=16 << 30;
/// As QEMU's I/O threads look for.
const POLL_US: u32 = 32;
/// Longer than any gap that looking could pay for.
const POLL_US_MAX: u32 = 100_000;

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "vhost-blk", version, about, long_about = None)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve disks to QEMU or Cloud Hypervisor until SIGTERM.
    Serve(Box<ServeArgs>),
}

/// Snapshot method, as flags say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MethodFlag {
    /// Redirect-on-write: new data goes to the shadow storage.
    Row,
    /// Copy-on-write: old data is copied to the shadow storage.
    Cow,
}

impl From<MethodFlag> for Method {
    fn from(flag: MethodFlag) -> Self {
        match flag {
            MethodFlag::Row => Self::Row,
            MethodFlag::Cow => Self::Cow,
        }
    }
}

/// Flags of `serve`.
#[derive(Debug, Default, Args)]
pub struct ServeArgs {
    /// Raw file or block device; or, for several disks, groups like path=FILE,socket=PATH[,name=..][,serial=..]
    /// [,method=row|cow][,shadow-storage=DIR][,num-queues=N][,read-only=on|off]
    #[arg(long, value_name = "FILE|GROUP")]
    pub disk: Vec<String>,
    /// vhost-user socket to listen on (one disk)
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Method of snapshots that do not ask for one [default: row]
    #[arg(long, value_enum)]
    pub method: Option<MethodFlag>,
    /// Directory for preserved and redirected blocks (one disk) [default: <FILE>.shadow]
    #[arg(long, value_name = "DIR")]
    pub shadow_storage: Option<PathBuf>,
    /// Name in the control protocol (one disk) [default: the serial, or the file's name without suffix]
    #[arg(long)]
    pub name: Option<String>,
    /// Serial that the guest reads, at most 20 bytes (one disk) [default: the name]
    #[arg(long)]
    pub serial: Option<String>,
    /// Queues, 1 to 32; a front end may use fewer [default: 4]
    #[arg(long, value_name = "N")]
    pub num_queues: Option<u16>,
    /// The guest may not write
    #[arg(long)]
    pub read_only: bool,
    /// Control socket to listen on
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Go through the page cache instead of O_DIRECT
    #[arg(long)]
    pub no_direct: bool,
    /// How data is moved [default: auto]
    #[arg(long, value_enum)]
    pub engine: Option<EngineKind>,
    /// Most bytes the shadow storage of a disk may grow to; writes that need more are held [default: no limit]
    #[arg(long, value_name = "BYTES")]
    pub shadow_limit: Option<u64>,
    /// Memory for the index of a disk's shadow storage: a half caches it, a half holds what is not merged yet [default: 32 MiB]
    #[arg(long, value_name = "BYTES")]
    pub index_memory: Option<u64>,
    /// Longest time, in microseconds, that a queue's thread looks for work before it sleeps, where more proves to be done so; 0: it sleeps at once [default: 32]
    #[arg(long, value_name = "N")]
    pub poll_max_us: Option<u32>,
    /// Open a base that was changed by somebody else while snapshots needed it unchanged
    #[arg(long)]
    pub force_base: bool,
    /// Take the disks over from the daemon that serves them on --control, with the connections of its front ends: guests do not notice.
    /// Without such a daemon, or if it refuses, nothing is served
    #[arg(long)]
    pub replace: bool,
    /// Only to measure what the order costs: copy-on-write overwrites old data before its copy is durable, so that a power cut may
    /// damage snapshots
    #[arg(long, hide_short_help = true)]
    pub relaxed_order_for_measurement: bool,
    /// TOML file with the same settings
    #[arg(long, value_name = "FILE", conflicts_with_all = ["disk", "socket"])]
    pub config: Option<PathBuf>,
}

/// The configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct ConfigFile {
    control: Option<PathBuf>,
    engine: Option<EngineKind>,
    direct: Option<bool>,
    method: Option<MethodFlag>,
    num_queues: Option<u16>,
    shadow_limit: Option<u64>,
    index_memory: Option<u64>,
    poll_max_us: Option<u32>,
    #[serde(default)]
    disk: Vec<DiskEntry>,
}

/// A disk as it was written down, in a group or in the file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct DiskEntry {
    path: Option<PathBuf>,
    socket: Option<PathBuf>,
    name: Option<String>,
    serial: Option<String>,
    method: Option<MethodFlag>,
    shadow_storage: Option<PathBuf>,
    num_queues: Option<u16>,
    read_only: Option<bool>,
}

/// A disk to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// Name in the control protocol, unique.
    pub name: String,
    /// Base file or block device.
    pub path: PathBuf,
    /// vhost-user socket, absolute, unique.
    pub socket: PathBuf,
    /// Serial, unique, at most 20 bytes.
    pub serial: String,
    /// Default method.
    pub method: Method,
    /// Directory of the shadow storage, unique.
    pub shadow_storage: PathBuf,
    /// Number of queues.
    pub num_queues: u16,
    /// The guest may not write.
    pub read_only: bool,
}

/// What to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The disks, at least one.
    pub disks: Vec<DiskConfig>,
    /// Control socket, absolute.
    pub control: Option<PathBuf>,
    /// O_DIRECT.
    pub direct: bool,
    /// How data is moved.
    pub engine: EngineKind,
    /// Most bytes of each disk's shadow storage.
    pub shadow_limit_bytes: u64,
    /// Memory for the index of each disk.
    pub index_memory_bytes: u64,
    /// Longest time that a queue's thread looks for work before it sleeps.
    pub poll_max: Duration,
    /// Open a base that was changed by somebody else.
    pub force_base: bool,
    /// Take over from a running daemon.
    pub replace: bool,
    /// Copy-on-write without its durable order.
    pub relaxed_order: bool,
}

/// What is wrong with the flags or the file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: cannot be read")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("{path}: {message}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        message: String,
    },
    /// Anything else.
    #[error("{0}")]
    Invalid(String),
}

fn invalid<T>(message: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError::Invalid(message.into()))
}

/// Checks flags, and the file they name.
///
/// # Errors
/// [`ConfigError`].
pub fn resolve(args: &ServeArgs) -> Result<Config, ConfigError> {
    let file = match &args.config {
        Some(path) => read_file(path)?,
        None => ConfigFile::default(),
    };
    let entries = if args.config.is_some() {
        file.disk
    } else {
        entries(args)?
    };
    if entries.is_empty() {
        return invalid(
            "no disk: give --disk FILE --socket PATH, or --config FILE with a [[disk]]",
        );
    }
    if entries.len() > DISKS_MAX {
        return invalid(format!("more than {DISKS_MAX} disks"));
    }
    let method = args.method.or(file.method).unwrap_or(MethodFlag::Row);
    let num_queues = args.num_queues.or(file.num_queues).unwrap_or(4);
    let disks = entries
        .into_iter()
        .map(|entry| disk(entry, method, num_queues, args.read_only))
        .collect::<Result<Vec<_>, _>>()?;
    let control = args.control.clone().or(file.control);
    let config = Config {
        control: control.as_deref().map(absolute).transpose()?,
        direct: !args.no_direct && file.direct.unwrap_or(true),
        engine: args.engine.or(file.engine).unwrap_or(EngineKind::Auto),
        shadow_limit_bytes: args.shadow_limit.or(file.shadow_limit).unwrap_or(u64::MAX),
        index_memory_bytes: index_memory(args.index_memory.or(file.index_memory))?,
        poll_max: poll_max(args.poll_max_us.or(file.poll_max_us))?,
        force_base: args.force_base,
        replace: args.replace,
        relaxed_order: args.relaxed_order_for_measurement,
        disks,
    };
    ensure_unique(&config)?;
    Ok(config)
}

fn index_memory(wanted_bytes: Option<u64>) -> Result<u64, ConfigError> {
    let bytes = wanted_bytes.unwrap_or(INDEX_MEMORY_BYTES);
    if !INDEX_MEMORY_RANGE.contains(&bytes) {
        return invalid(format!(
            "index-memory is {} to {} bytes",
            INDEX_MEMORY_RANGE.start(),
            INDEX_MEMORY_RANGE.end()
        ));
    }
    Ok(bytes)
}

fn poll_max(wanted_us: Option<u32>) -> Result<Duration, ConfigError> {
    let us = wanted_us.unwrap_or(POLL_US);
    if us > POLL_US_MAX {
        return invalid(format!("poll-max-us is at most {POLL_US_MAX}"));
    }
    Ok(Duration::from_micros(u64::from(us)))
}

fn read_file(path: &Path) -> Result<ConfigFile, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    toml::from_str(&text).map_err(|error| ConfigError::Malformed {
        path: path.to_owned(),
        message: error.to_string(),
    })
}

/// Disks of the command line: one plain file, or groups.
fn entries(args: &ServeArgs) -> Result<Vec<DiskEntry>, ConfigError> {
    let of_one = [
        (args.socket.is_some(), "--socket"),
        (args.shadow_storage.is_some(), "--shadow-storage"),
        (args.name.is_some(), "--name"),
        (args.serial.is_some(), "--serial"),
    ];
    if let [plain] = args.disk.as_slice()
        && !plain.starts_with("path=")
    {
        return Ok(vec![DiskEntry {
            path: Some(PathBuf::from(plain)),
            socket: args.socket.clone(),
            name: args.name.clone(),
            serial: args.serial.clone(),
            shadow_storage: args.shadow_storage.clone(),
            ..DiskEntry::default()
        }]);
    }
    if !args.disk.is_empty()
        && let Some((_, flag)) = of_one.iter().find(|(given, _)| *given)
    {
        return invalid(format!(
            "{flag} is for a single --disk FILE; with several disks, write --disk path=FILE,socket=PATH,..."
        ));
    }
    args.disk.iter().map(|group| parse_group(group)).collect()
}

/// `path=a,socket=b`; `,,` is a comma.
fn parse_group(group: &str) -> Result<DiskEntry, ConfigError> {
    let mut entry = DiskEntry::default();
    const COMMA: char = '\0';
    if group.contains(COMMA) {
        return invalid("--disk: a NUL byte");
    }
    let protected = group.replace(",,", &COMMA.to_string());
    for part in protected.split(',') {
        let part = part.replace(COMMA, ",");
        let Some((key, value)) = part.split_once('=') else {
            return invalid(format!("--disk {group}: {part:?} is not key=value"));
        };
        let value = value.to_owned();
        let bad =
            |what: &str| ConfigError::Invalid(format!("--disk {group}: {key} has to be {what}"));
        match key {
            "path" => entry.path = Some(value.into()),
            "socket" => entry.socket = Some(value.into()),
            "name" => entry.name = Some(value),
            "serial" => entry.serial = Some(value),
            "shadow-storage" => entry.shadow_storage = Some(value.into()),
            "method" => {
                let method = MethodFlag::from_str(&value, false);
                entry.method = Some(method.map_err(|_| bad("row or cow"))?);
            }
            "num-queues" => entry.num_queues = Some(value.parse().map_err(|_| bad("a number"))?),
            "read-only" => {
                entry.read_only = Some(match value.as_str() {
                    "on" => true,
                    "off" => false,
                    _ => return Err(bad("on or off")),
                });
            }
            _ => return invalid(format!("--disk {group}: unknown key {key:?}")),
        }
    }
    Ok(entry)
}

fn disk(
    entry: DiskEntry,
    method: MethodFlag,
    num_queues: u16,
    read_only: bool,
) -> Result<DiskConfig, ConfigError> {
    let Some(path) = entry.path else {
        return invalid("a disk has no path");
    };
    let shown = path.display().to_string();
    let Some(socket) = entry.socket else {
        return invalid(format!("disk {shown}: no socket"));
    };
    let stem = path
        .file_stem()
        .map(|stem| stem.to_string_lossy().into_owned());
    let Some(name) = entry.name.or_else(|| entry.serial.clone()).or(stem) else {
        return invalid(format!("disk {shown}: give it a name"));
    };
    if name.is_empty() || name.len() > 128 || name.chars().any(char::is_control) {
        return invalid(format!("disk {shown}: {name:?} is no name"));
    }
    let serial = match entry.serial {
        Some(serial) if serial.len() > SERIAL_BYTES_MAX || !serial.is_ascii() => {
            return invalid(format!(
                "disk {shown}: a serial is at most {SERIAL_BYTES_MAX} ASCII characters"
            ));
        }
        Some(serial) => serial,
        None => name
            .chars()
            .filter(char::is_ascii)
            .take(SERIAL_BYTES_MAX)
            .collect(),
    };
    let num_queues = entry.num_queues.unwrap_or(num_queues);
    if !(1..=QUEUES_MAX).contains(&num_queues) {
        return invalid(format!(
            "disk {shown}: num-queues has to be 1 to {QUEUES_MAX}"
        ));
    }
    let shadow_storage = entry.shadow_storage.unwrap_or_else(|| {
        let mut beside = path.clone().into_os_string();
        beside.push(".shadow");
        beside.into()
    });
    Ok(DiskConfig {
        name,
        serial,
        socket: absolute(&socket)?,
        method: entry.method.unwrap_or(method).into(),
        shadow_storage: absolute(&shadow_storage)?,
        path: absolute(&path)?,
        num_queues,
        read_only: entry.read_only.unwrap_or(read_only),
    })
}

fn absolute(path: &Path) -> Result<PathBuf, ConfigError> {
    std::path::absolute(path)
        .map_err(|error| ConfigError::Invalid(format!("{}: {error}", path.display())))
}

fn ensure_unique(config: &Config) -> Result<(), ConfigError> {
    let mut seen = HashSet::new();
    let controls = config
        .control
        .iter()
        .map(|path| ("socket", path.display().to_string()));
    let of_disks = config.disks.iter().flat_map(|disk| {
        [
            ("name", disk.name.clone()),
            ("serial", disk.serial.clone()),
            ("path", disk.path.display().to_string()),
            ("socket", disk.socket.display().to_string()),
            ("shadow storage", disk.shadow_storage.display().to_string()),
        ]
    });
    for (what, value) in controls.chain(of_disks) {
        if !seen.insert((what, value.clone())) {
            return invalid(format!("{what} {value:?} is given twice"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
