//! The command line, and what is wrong with it.
//!
//! Read by `main`. A wrong one ends with exit status 2 and a sentence.

use clap::error::ErrorKind;
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use guest_agent::writer::script;
use guest_agent_wire::metadata::Metadata;
use guest_agent_wire::types::{Hold, Level};
use guest_agent_wire::writer::{Registration, SOCKET_PATH};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

/// Makes any command line a snapshot writer: scripts of a directory, a command per event, or one that stays.
#[derive(Debug, Parser)]
#[command(
    name = "vmshadow-writer",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Exit status: 0 done (--check, --once), 1 the agent refused this writer, 2 wrong usage, 3 no agent (--once)."
)]
pub(crate) struct Config {
    /// What this process is; the writer itself if nothing is given.
    #[command(subcommand)]
    pub(crate) role: Option<Role>,
    #[command(flatten)]
    pub(crate) settings: Settings,
}

/// Other roles of the same binary.
#[derive(Debug, Subcommand)]
pub(crate) enum Role {
    /// Moves itself into a control group and becomes a command.
    #[command(hide = true)]
    WriterScript {
        /// `cgroup.procs` of the group.
        #[arg(long)]
        group: Option<PathBuf>,
        /// It outlives this program.
        #[arg(long)]
        stays: bool,
        /// The command's file.
        program: PathBuf,
        /// Its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<OsString>,
    },
    /// Kills what is left of the commands of a process, once it is gone.
    #[command(hide = true)]
    KillScripts {
        /// The process.
        of: String,
    },
}

/// Who the writer is and what it runs.
#[derive(Debug, Args)]
pub(crate) struct Settings {
    /// Name of the writer, for people.
    #[arg(long, default_value = "")]
    pub(crate) name: String,
    /// What kind of writer it is; `command:NAME` by default. A user other than root must be allowed this class.
    #[arg(long, value_name = "ID")]
    pub(crate) class_id: Option<String>,
    /// This instance, unique in the guest; the class by default.
    #[arg(long, value_name = "ID")]
    pub(crate) instance: Option<String>,
    /// FRONT_END freezes first and thaws last, then BACK_END (databases), then SYSTEM.
    #[arg(long, default_value = "FRONT_END", value_parser = level)]
    pub(crate) level: Level,
    /// Who holds the writes: `app` (there must be evidence at freeze, and the same at thaw) or `filesystem` (it may differ).
    #[arg(long, default_value = "filesystem", value_parser = hold)]
    pub(crate) hold: Hold,
    /// Longest time that it can stay frozen, milliseconds.
    #[arg(long, default_value_t = 60_000, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub(crate) freeze_timeout_ms: u64,
    /// Longest time that it may be silent while it prepares, milliseconds.
    #[arg(long, default_value_t = 600_000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    pub(crate) prepare_timeout_ms: u64,
    /// File with its metadata document, JSON.
    #[arg(long, value_name = "FILE")]
    metadata: Option<PathBuf>,
    /// The agent's socket for writers.
    #[arg(long, default_value = SOCKET_PATH)]
    pub(crate) socket: PathBuf,

    /// Directory with an executable per event: identify, prepare-backup, prepare, freeze, thaw, post-snapshot,
    /// backup-complete, backup-shutdown, abort, pre-restore, post-restore.
    #[arg(long, value_name = "DIR", help_heading = "What it runs")]
    scripts: Option<PathBuf>,
    /// One command that stays: events as lines of JSON on its standard input, answers on its standard output.
    #[arg(long, value_name = "COMMAND", help_heading = "What it runs")]
    session: Option<String>,
    #[command(flatten)]
    events: Events,

    /// Print as lines of JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Print what would be run, and exit.
    #[arg(long)]
    pub(crate) check: bool,
    /// Exit when the agent closes the connection, instead of connecting again.
    #[arg(long)]
    pub(crate) once: bool,
}

/// A shell command per event.
#[derive(Debug, Args)]
#[command(next_help_heading = "What it runs")]
struct Events {
    /// Prints the metadata document.
    #[arg(long, value_name = "COMMAND")]
    identify: Option<String>,
    /// Says no before anything is done.
    #[arg(long, value_name = "COMMAND")]
    prepare_backup: Option<String>,
    /// Heavy work: checkpoint, flush.
    #[arg(long, value_name = "COMMAND")]
    prepare: Option<String>,
    /// Writes stand still from its success on; what it prints is the evidence.
    #[arg(long, value_name = "COMMAND")]
    freeze: Option<String>,
    /// Writes go on; success says that they stood still until now.
    #[arg(long, value_name = "COMMAND")]
    thaw: Option<String>,
    /// The copies are there.
    #[arg(long, value_name = "COMMAND")]
    post_snapshot: Option<String>,
    /// The backup has succeeded.
    #[arg(long, value_name = "COMMAND")]
    backup_complete: Option<String>,
    /// The backup has failed, or nobody knows.
    #[arg(long, value_name = "COMMAND")]
    backup_shutdown: Option<String>,
    /// Undoes everything, in any state; by default `--thaw` if it is frozen.
    #[arg(long, value_name = "COMMAND")]
    abort: Option<String>,
    /// Files are about to be replaced.
    #[arg(long, value_name = "COMMAND")]
    pre_restore: Option<String>,
    /// Files have been replaced, or not.
    #[arg(long, value_name = "COMMAND")]
    post_restore: Option<String>,
}

/// What is run.
#[derive(Debug)]
pub(crate) enum Kind {
    /// A command per event, by the event's name.
    Commands(BTreeMap<&'static str, Command>),
    /// One that stays.
    Session(String),
}

/// One command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// An executable, which must be trusted.
    Script(PathBuf),
    /// A line for the shell.
    Shell(String),
}

impl Command {
    /// Program and arguments.
    pub(crate) fn words(&self) -> (&Path, Vec<OsString>) {
        match self {
            Self::Script(file) => (file, Vec::new()),
            Self::Shell(line) => (Path::new("/bin/sh"), vec!["-c".into(), line.into()]),
        }
    }
}

impl Settings {
    /// What is run, or what is wrong.
    pub(crate) fn check(&mut self) -> Result<Kind, clap::Error> {
        if self.name.is_empty() {
            return Err(wrong("--name is missing: what shall the writer be called?"));
        }
        self.read_metadata().map_err(wrong)?;
        let mut commands = self.events.given();
        let ways = [
            self.scripts.is_some(),
            self.session.is_some(),
            !commands.is_empty(),
        ];
        if ways.into_iter().filter(|way| *way).count() != 1 {
            return Err(wrong(
                "give one of --scripts DIR, --session COMMAND, or commands for events (--freeze COMMAND --thaw COMMAND ..)",
            ));
        }
        if let Some(session) = &self.session {
            return Ok(Kind::Session(session.clone()));
        }
        if let Some(directory) = &self.scripts {
            let directory = std::path::absolute(directory).map_err(wrong)?;
            commands = script::executables(&directory)
                .map_err(|why| wrong(format!("--scripts {}: {why}", directory.display())))?
                .into_iter()
                .map(|(event, file)| (event, Command::Script(file)))
                .collect();
        }
        if commands.contains_key("freeze")
            && !commands.contains_key("thaw")
            && !commands.contains_key("abort")
        {
            return Err(wrong(
                "there is a freeze but neither a thaw nor an abort: nothing would let the application go on",
            ));
        }
        Ok(Kind::Commands(commands))
    }

    pub(crate) fn registration(&self) -> Registration {
        let class_id = self
            .class_id
            .clone()
            .unwrap_or_else(|| format!("command:{}", self.name));
        let instance = self.instance.clone().unwrap_or_else(|| class_id.clone());
        Registration {
            level: self.level,
            hold: self.hold,
            freeze_timeout_ms: self.freeze_timeout_ms,
            prepare_timeout_ms: self.prepare_timeout_ms,
            ..Registration::new(class_id, instance, &self.name)
        }
    }

    /// The metadata document that the command line names.
    pub(crate) fn read_metadata(&self) -> Result<Metadata, String> {
        let Some(path) = &self.metadata else {
            return Ok(Metadata::default());
        };
        let text = fs::read_to_string(path).map_err(|error| error.to_string());
        let read = text.and_then(|text| read_metadata(&text));
        read.map_err(|why| format!("--metadata {}: {why}", path.display()))
    }
}

/// A metadata document from its JSON.
pub(crate) fn read_metadata(text: &str) -> Result<Metadata, String> {
    let metadata: Metadata = serde_json::from_str(text).map_err(|error| error.to_string())?;
    metadata.check().map_err(|error| error.to_string())?;
    Ok(metadata)
}

impl Events {
    fn given(&self) -> BTreeMap<&'static str, Command> {
        let all = [
            ("identify", &self.identify),
            ("prepare-backup", &self.prepare_backup),
            ("prepare", &self.prepare),
            ("freeze", &self.freeze),
            ("thaw", &self.thaw),
            ("post-snapshot", &self.post_snapshot),
            ("backup-complete", &self.backup_complete),
            ("backup-shutdown", &self.backup_shutdown),
            ("abort", &self.abort),
            ("pre-restore", &self.pre_restore),
            ("post-restore", &self.post_restore),
        ];
        let given = all.into_iter().filter_map(|(event, command)| {
            let command = command.as_ref()?;
            Some((event, Command::Shell(command.clone())))
        });
        given.collect()
    }
}

fn wrong(why: impl std::fmt::Display) -> clap::Error {
    Config::command().error(ErrorKind::ValueValidation, why)
}

fn level(word: &str) -> Result<Level, String> {
    let word = word.to_ascii_uppercase().replace('-', "_");
    serde_json::from_value(word.into())
        .map_err(|_| "it is one of FRONT_END, BACK_END, SYSTEM".to_owned())
}

fn hold(word: &str) -> Result<Hold, String> {
    serde_json::from_value(word.into()).map_err(|_| "it is app or filesystem".to_owned())
}
