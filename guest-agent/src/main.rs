//! Entry point: the agent, its helper process, or a script or program about to be run.

use clap::Parser as _;
use guest_agent::config::{Config, Role};
use guest_agent::{agent, hold, qga, writer};
use std::process::ExitCode;

fn main() -> ExitCode {
    let config = Config::parse();
    let outcome = match config.role {
        Some(Role::HoldHelper { state_dir }) => hold::helper::run(&state_dir),
        Some(Role::WriterScript {
            group,
            program,
            words,
        }) => writer::script::process::become_script_of_agent(group.as_deref(), &program, &words),
        Some(Role::ExecChild {
            name,
            program,
            words,
        }) => qga::exec::become_program(&name, &program, &words),
        None if config.agent.thaw_leftovers => agent::thaw_leftovers(&config.agent),
        None => agent::run(config.agent),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-agent: {error}");
            ExitCode::FAILURE
        }
    }
}
