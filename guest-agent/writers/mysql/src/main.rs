//! `mysql-writer`: MySQL's part in snapshot sets.
//!
//! Runs in the guest beside the agent, as the user `mysql`, whom the server knows by its socket (`auth_socket`) and an allow
//! file of the agent names, or as root.

use clap::Parser;
use database_writer::{Disks, Identity};
use guest_agent_wire::sdk;
use mysql_family::Server;
use mysql_writer::MysqlWriter;
use std::process::ExitCode;

/// MySQL's part in snapshot sets.
///
/// The server's user needs the privileges BACKUP_ADMIN, RELOAD, PROCESS and SHOW VIEW on everything, and SELECT on performance_schema.*.
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
            eprintln!("mysql-writer: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> std::io::Result<ExitCode> {
    let options = arguments.server.options()?;
    let socket = arguments.identity.socket.clone();
    let mut writer = MysqlWriter::new(arguments.identity, options, Disks::default())?;
    let refused = sdk::run(&mut writer, &socket);
    eprintln!("mysql-writer: {refused}");
    Ok(ExitCode::FAILURE)
}
