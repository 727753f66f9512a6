//! `postgresql-writer`: PostgreSQL's part in snapshot sets.
//!
//! Runs in the guest beside the agent, as the user the server knows as `postgres` (peer authentication), whom an allow file of
//! the agent names, or as root with another way in.

use clap::Parser;
use database_writer::{Disks, Identity};
use guest_agent_wire::sdk;
use postgresql_writer::{OnlineBackup, PostgresqlWriter};
use std::process::ExitCode;
use tokio_postgres::Config;

/// PostgreSQL's part in snapshot sets.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// How to reach the server, as libpq writes it. A password may be in it.
    #[arg(
        long,
        default_value = "host=/var/run/postgresql user=postgres dbname=postgres connect_timeout=5"
    )]
    connection: Config,
    /// When to bracket a set with pg_backup_start and pg_backup_stop.
    #[arg(long, value_enum, default_value_t)]
    online_backup: OnlineBackup,
    #[command(flatten)]
    identity: Identity,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let socket = arguments.identity.socket.clone();
    let writer = PostgresqlWriter::new(
        arguments.identity,
        arguments.connection,
        arguments.online_backup,
        Disks::default(),
    );
    let mut writer = match writer {
        Ok(writer) => writer,
        Err(error) => {
            eprintln!("postgresql-writer: {error}");
            return ExitCode::FAILURE;
        }
    };
    let refused = sdk::run(&mut writer, &socket);
    eprintln!("postgresql-writer: {refused}");
    ExitCode::FAILURE
}
