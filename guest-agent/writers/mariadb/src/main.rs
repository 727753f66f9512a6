//! `mariadb-writer`: MariaDB's part in snapshot sets.
//!
//! Runs in the guest beside the agent, as the user `mysql`, whom the server knows by its socket and an allow file of the agent
//! names, or as root.

use clap::Parser;
use database_writer::{Disks, Identity};
use guest_agent_wire::sdk;
use mariadb_writer::MariadbWriter;
use mysql_family::Server;
use std::process::ExitCode;

/// MariaDB's part in snapshot sets.
///
/// The server's user needs the privileges RELOAD and BINLOG MONITOR.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(flatten)]
    server: Server,
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
    let options = arguments.server.options()?;
    let socket = arguments.identity.socket.clone();
    let mut writer = MariadbWriter::new(arguments.identity, options, Disks::default())?;
    let refused = sdk::run(&mut writer, &socket);
    eprintln!("mariadb-writer: {refused}");
    Ok(ExitCode::FAILURE)
}
