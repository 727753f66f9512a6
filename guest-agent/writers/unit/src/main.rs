//! `unit-writer`: the part in snapshot sets of a service that knows nothing of them.
//!
//! Runs in the guest beside the agent, as root: it freezes control groups, or has systemd stop and start a service.

use clap::Parser;
use database_writer::{Disks, Identity};
use guest_agent_wire::sdk;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use unit_writer::watch::{Watch, serve};
use unit_writer::{UnitWriter, Way};

/// The part in snapshot sets of a service that knows nothing of them: it stands still meanwhile.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The unit, for instance `app.service`.
    #[arg(long, required_unless_present = "watch")]
    unit: Option<String>,
    /// Its control group's directory, where there is no systemd to ask.
    #[arg(long)]
    cgroup: Option<PathBuf>,
    /// Stop the unit and start it again instead of freezing it: its clients lose it meanwhile, but the copy holds what it leaves
    /// behind when it ends in order. Only a service that nobody else needs or starts.
    #[arg(long, conflicts_with = "cgroup")]
    stop: bool,
    /// A directory where the service keeps its files; may be repeated. A set without its disk is refused.
    #[arg(long)]
    files: Vec<PathBuf>,
    #[command(flatten)]
    identity: Identity,
    /// Let go when the process at the other end of standard input cannot; started by this program itself.
    #[arg(long, hide = true)]
    watch: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("unit-writer: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> std::io::Result<ExitCode> {
    if arguments.watch {
        serve(std::io::stdin(), std::io::stdout())?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut command = Command::new("/proc/self/exe");
    command.arg("--watch");
    let watch = Watch::start(command)?;
    let way = match arguments.cgroup {
        Some(path) => Way::FreezeGroup(path),
        None if arguments.stop => Way::StopUnit,
        None => Way::FreezeUnit,
    };
    let socket = arguments.identity.socket.clone();
    let mut writer = UnitWriter::new(
        arguments.identity,
        arguments.unit.unwrap_or_default(),
        way,
        arguments.files,
        Disks::default(),
        watch,
    );
    let refused = sdk::run(&mut writer, &socket);
    eprintln!("unit-writer: {refused}");
    Ok(ExitCode::FAILURE)
}
