//! `redis-writer`: Redis's part in snapshot sets.
//!
//! Runs in the guest beside the agent, as a user whom an allow file of the agent names, or as root.

use clap::Parser;
use database_writer::{Disks, Identity};
use guest_agent_wire::sdk;
use redis_writer::RedisWriter;
use std::process::ExitCode;

/// Redis's part in snapshot sets.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// How to reach the server: `redis+unix:///path?user=..&pass=..` or `redis://user:password@127.0.0.1`. In an access list the
    /// user needs INFO, CONFIG GET, CLIENT and BGSAVE.
    #[arg(long, default_value = "redis+unix:///run/redis/redis-server.sock", value_parser = client)]
    connection: redis::Client,
    #[command(flatten)]
    identity: Identity,
}

fn client(url: &str) -> Result<redis::Client, String> {
    redis::Client::open(url).map_err(|error| error.to_string())
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let socket = arguments.identity.socket.clone();
    let writer = RedisWriter::new(arguments.identity, arguments.connection, Disks::default());
    let mut writer = match writer {
        Ok(writer) => writer,
        Err(error) => {
            eprintln!("redis-writer: {error}");
            return ExitCode::FAILURE;
        }
    };
    let refused = sdk::run(&mut writer, &socket);
    eprintln!("redis-writer: {refused}");
    ExitCode::FAILURE
}
