//! `vmshadow-writer`: makes any command line a snapshot writer.
//!
//! Runs in the guest beside the agent. `config` reads the command line; `commands` runs a command per event, `session` talks
//! to one that stays; `report` prints. Everything between the agent and them is the writer library's.

mod commands;
mod config;
mod guard;
mod report;
mod session;

use clap::Parser as _;
use config::{Config, Kind, Role};
use guest_agent::writer::script::control_group::ControlGroup;
use guest_agent::writer::script::left_over;
use guest_agent::writer::script::process::{become_script, become_session};
use guest_agent_wire::sdk::{self, Ended, Writer};
use report::Report;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;

/// The agent refused this writer, or the conversation failed.
const REFUSED: u8 = 1;
/// There is no agent (`--once`).
const NO_AGENT: u8 = 3;

fn main() -> ExitCode {
    let mut config = Config::parse();
    match config.role {
        Some(Role::WriterScript {
            group,
            stays,
            program,
            words,
        }) => {
            let become_it = if stays { become_session } else { become_script };
            let failed = become_it(group.as_deref(), &program, &words);
            eprintln!("vmshadow-writer: {}: {failed:?}", program.display());
            return ExitCode::FAILURE;
        }
        Some(Role::KillScripts { of }) => {
            left_over::kill_scripts_of(&of);
            return ExitCode::SUCCESS;
        }
        None => {}
    }
    let kind = match config.settings.check() {
        Ok(kind) => kind,
        Err(wrong) => wrong.exit(),
    };
    let settings = &config.settings;
    let report = Report::new(settings.json);
    if settings.check {
        report.checked(&settings.registration(), &kind);
        return ExitCode::SUCCESS;
    }
    left_over::kill_scripts();
    ControlGroup::sweep();
    let (socket, once) = (settings.socket.clone(), settings.once);
    let mut writer: Box<dyn Writer> = match kind {
        Kind::Commands(commands) => {
            Box::new(commands::CommandWriter::new(settings, commands, report))
        }
        Kind::Session(command) => Box::new(session::SessionWriter::new(settings, command, report)),
    };
    serve(writer.as_mut(), &socket, once)
}

fn serve(writer: &mut dyn Writer, socket: &Path, once: bool) -> ExitCode {
    let ended = if once {
        match UnixStream::connect(socket) {
            Ok(stream) => sdk::serve(writer, &stream),
            Err(error) => {
                eprintln!("vmshadow-writer: {}: {error}", socket.display());
                return ExitCode::from(NO_AGENT);
            }
        }
    } else {
        sdk::run(writer, socket)
    };
    match ended {
        Ended::Gone if once => ExitCode::SUCCESS,
        ended @ (Ended::Refused(_) | Ended::Gone | Ended::Io(_)) => {
            eprintln!("vmshadow-writer: {ended}");
            ExitCode::from(REFUSED)
        }
    }
}

#[cfg(test)]
mod tests;
