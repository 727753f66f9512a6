//! The program `qmp-bridge`: serves requesters on a socket. See `daemon`.
#![forbid(unsafe_code)]

use clap::Parser;
use qmp_bridge::daemon::{Options, serve};
use std::process::ExitCode;

fn main() -> ExitCode {
    let options = Options::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(false)
        .init();
    match serve(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("qmp-bridge: {}", qmp_bridge::cli::chain(&error));
            ExitCode::FAILURE
        }
    }
}
