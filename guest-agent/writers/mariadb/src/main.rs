//! `mariadb-writer`: MariaDB's part in snapshot sets.
//!
//! Runs in the guest beside the agent, as the user `mysql`, whom the server knows by its socket and an allow file of the agent
//! names, or as root.

use clap::Parser;
use database_writer::{Disks, Identity};
use guest_agent_wire::sdk;
use mariadb_writer::MariadbWriter;
use mysql_async::OptsBuilder;
use std::path::PathBuf;
use std::process::ExitCode;

/// MariaDB's part in snapshot sets.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The server's socket.
    #[arg(long, default_value = "/run/mysqld/mysqld.sock")]
    server: PathBuf,
    /// The server's name for this user; it needs the privileges RELOAD and BINLOG MONITOR.
    #[arg(long, default_value = "mysql")]
    user: String,
    /// A file with the user's password in its first line; none is needed where the server goes by the socket.
    #[arg(long)]
    password_file: Option<PathBuf>,
    #[command(flatten)]
    identity: Identity,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(never) => never,
        Err(error) => {
            eprintln!("mariadb-writer: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> std::io::Result<ExitCode> {
    let password = match arguments.password_file {
        Some(path) => std::fs::read_to_string(path)?
            .lines()
            .next()
            .map(str::to_owned),
        None => None,
    };
    let options = OptsBuilder::default()
        .socket(Some(arguments.server.to_string_lossy()))
        .user(Some(arguments.user))
        .pass(password);
    let socket = arguments.identity.socket.clone();
    let mut writer = MariadbWriter::new(arguments.identity, options.into(), Disks::default())?;
    let refused = sdk::run(&mut writer, &socket);
    eprintln!("mariadb-writer: {refused}");
    Ok(ExitCode::FAILURE)
}
