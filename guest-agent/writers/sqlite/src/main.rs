//! `sqlite-writer`: holds the writes of SQLite databases while a snapshot set is made.
//!
//! Runs in the guest beside the agent, as root or as a user that the agent's allow files name. The databases' own programs
//! need not know of it: it takes SQLite's write lock as any other connection would.

use clap::Parser;
use guest_agent::filesystem::plan::Sources;
use guest_agent_wire::sdk;
use guest_agent_wire::types::Level;
use guest_agent_wire::writer::SOCKET_PATH;
use sqlite_writer::{Identity, SqliteWriter};
use std::path::PathBuf;
use std::process::ExitCode;

/// Holds the writes of SQLite databases while a snapshot set is made.
#[derive(Debug, Parser)]
#[command(version)]
struct Config {
    /// A database file; may be given more than once.
    #[arg(long, required = true)]
    database: Vec<PathBuf>,
    /// The agent's socket for writers.
    #[arg(long, default_value = SOCKET_PATH)]
    socket: PathBuf,
    /// Name for people.
    #[arg(long, default_value = "SQLite")]
    name: String,
    /// Name of this instance, unique in the guest; by default made of the first database's path.
    #[arg(long)]
    instance: Option<String>,
    /// Longest time that the databases can be held, milliseconds.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    freeze_timeout_ms: u64,
}

fn main() -> ExitCode {
    let config = Config::parse();
    let first = config.database.first().map(|path| path.display());
    let instance = config.instance.unwrap_or_else(|| {
        format!(
            "sqlite:{}",
            first.map(|path| path.to_string()).unwrap_or_default()
        )
    });
    let identity = Identity {
        instance_id: instance,
        name: config.name,
        level: Level::BackEnd,
        freeze_timeout_ms: config.freeze_timeout_ms,
    };
    let sources = Sources {
        proc: "/proc".into(),
        sys: "/sys".into(),
        only_under: None,
    };
    let mut writer = SqliteWriter::new(identity, config.database, sources);
    let refused = sdk::run(&mut writer, &config.socket);
    eprintln!("sqlite-writer: {refused}");
    ExitCode::FAILURE
}
