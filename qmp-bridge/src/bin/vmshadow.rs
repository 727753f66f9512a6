//! The command `vmshadow`. See `cli`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    qmp_bridge::cli::main()
}
