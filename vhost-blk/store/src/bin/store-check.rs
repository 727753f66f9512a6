//! `store-check`: checks a volume's files and changes nothing.
//!
//! Exit code 0: clean (notes allowed); 1: damage found; 2: usage, or the files cannot be opened.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use vhost_blk_store::{OpenOptions, Severity, VolumeFiles, check};

/// Check the shadow storage of a disk; read-only
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The disk: a raw file or a block device
    base: PathBuf,
    /// Its shadow storage directory
    shadow_storage: PathBuf,
    /// Print the findings as a JSON array
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let options = OpenOptions {
        read_only: true,
        direct: false,
        ..OpenOptions::default()
    };
    let files = match VolumeFiles::open(&arguments.base, &arguments.shadow_storage, &options) {
        Ok(files) => files,
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            eprintln!("store-check: {error}{}", cause.unwrap_or_default());
            return ExitCode::from(2);
        }
    };
    let findings = check(&files);
    if arguments.json {
        match serde_json::to_string_pretty(&findings) {
            Ok(text) => println!("{text}"),
            Err(error) => {
                eprintln!("store-check: {error}");
                return ExitCode::from(2);
            }
        }
    } else {
        findings.iter().for_each(|finding| println!("{finding}"));
        if findings.is_empty() {
            println!("clean");
        }
    }
    let damaged = findings
        .iter()
        .any(|finding| finding.severity == Severity::Damage);
    ExitCode::from(u8::from(damaged))
}
