//! `store-dump`: prints what a volume's metadata says and changes nothing.
//!
//! Exit code 0: printed; 1: the metadata is damaged; 2: usage, or the files cannot be opened.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use vhost_blk_store::{OpenOptions, StoreError, VolumeFiles, dump};

/// Print the metadata of a disk's shadow storage; read-only
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The disk: a raw file or a block device
    base: PathBuf,
    /// Its shadow storage directory
    shadow_storage: PathBuf,
    /// Print JSON
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
    let opened = VolumeFiles::open(&arguments.base, &arguments.shadow_storage, &options);
    let printed = opened.and_then(|files| dump(&files)).map(|dump| {
        if arguments.json {
            serde_json::to_string_pretty(&dump)
        } else {
            Ok(dump.to_string())
        }
    });
    match printed {
        Ok(Ok(text)) => {
            println!("{}", text.trim_end());
            ExitCode::SUCCESS
        }
        Ok(Err(error)) => {
            eprintln!("store-dump: {error}");
            ExitCode::from(2)
        }
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            eprintln!("store-dump: {error}{}", cause.unwrap_or_default());
            ExitCode::from(if matches!(error, StoreError::Corrupted { .. }) {
                1
            } else {
                2
            })
        }
    }
}
