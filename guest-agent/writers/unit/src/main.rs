//! `unit-writer`: the part in snapshot sets of a service that knows nothing of them.
//!
//! Runs in the guest beside the agent, as root: it freezes control groups.

use clap::Parser;
use database_writer::{Disks, Identity};
use guest_agent_wire::sdk;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use unit_writer::watch::{Watch, serve};
use unit_writer::{Find, UnitWriter};

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
    let find = arguments.cgroup.map_or(Find::Systemd, Find::Directory);
    let socket = arguments.identity.socket.clone();
    let mut writer = UnitWriter::new(
        arguments.identity,
        arguments.unit.unwrap_or_default(),
        find,
        arguments.files,
        Disks::default(),
        watch,
    );
    let refused = sdk::run(&mut writer, &socket);
    eprintln!("unit-writer: {refused}");
    Ok(ExitCode::FAILURE)
}
