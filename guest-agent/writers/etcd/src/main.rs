//! `etcd-writer`: etcd's part in snapshot sets.
//!
//! Runs in the guest beside the agent, as the user that etcd runs as (its files are that user's alone), whom an allow file of the
//! agent names, or as root.

use clap::Parser;
use database_writer::{Disks, Identity};
use etcd_writer::{EtcdWriter, Reach, Roots};
use guest_agent_wire::sdk;
use std::process::ExitCode;

/// etcd's part in snapshot sets.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(flatten)]
    reach: Reach,
    #[command(flatten)]
    roots: Roots,
    #[command(flatten)]
    identity: Identity,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let socket = arguments.identity.socket.clone();
    let writer = EtcdWriter::new(
        arguments.identity,
        arguments.reach,
        arguments.roots,
        Disks::default(),
    );
    let mut writer = match writer {
        Ok(writer) => writer,
        Err(error) => {
            eprintln!("etcd-writer: {error}");
            return ExitCode::FAILURE;
        }
    };
    let refused = sdk::run(&mut writer, &socket);
    eprintln!("etcd-writer: {refused}");
    ExitCode::FAILURE
}
