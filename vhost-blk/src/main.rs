//! The `vhost-blk` program: parse arguments, run, exit code (0 ok, 1 failed, 2 usage).

use clap::Parser;
use std::io::IsTerminal;
use std::process::ExitCode;
use tracing_subscriber::filter::LevelFilter;
use vhost_blk::config::{self, Cli, Command};
use vhost_blk::daemon;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let wanted = std::env::var("VHOST_BLK_LOG")
        .ok()
        .and_then(|level| level.parse().ok());
    tracing_subscriber::fmt()
        .with_max_level(wanted.unwrap_or(LevelFilter::INFO))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match cli.command {
        Command::Serve(args) => match config::resolve(&args) {
            Err(error) => {
                tell(&error);
                ExitCode::from(2)
            }
            Ok(config) => match daemon::run(&config) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    tell(&error);
                    ExitCode::FAILURE
                }
            },
        },
    }
}

/// Prints an error and what caused it, on one line.
#[allow(clippy::print_stderr, reason = "this is what a person sees")]
fn tell(error: &dyn std::error::Error) {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text.push_str(": ");
        text.push_str(&source.to_string());
        cause = source.source();
    }
    eprintln!("vhost-blk: {text}");
}
