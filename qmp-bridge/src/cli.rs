//! The command `vmshadow`: options in, an operation on sets, tables or JSON out, an exit code.
//!
//! Called by `bin/vmshadow`. It works alone or through a daemon (`backend`); the texts are in `show`. Progress goes to
//! standard error from a thread of its own, so that a slow terminal never keeps a guest frozen.

mod args;
mod backend;
mod output;
mod show;
mod table;

use crate::error::Error;
use crate::protocol::{RestoreBegun, SetPreRestore};
use crate::sets::backup::build_on;
use crate::shown;
use crate::snapshot::document::{Outcome, SetDocument, StepTime};
use args::{Arguments, Command, Listed};
use backend::Backend;
use clap::Parser;
use guest_agent_wire::components::FilesRestored;
use serde::Serialize;
use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

/// The asked level was not reached; the set was deleted.
const EXIT_LEVEL: u8 = 3;
/// The command line makes no sense.
const EXIT_USAGE: u8 = 2;
/// Anything else.
const EXIT_FAILED: u8 = 1;

/// Runs the command of this process.
#[must_use]
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(false)
        .without_time()
        .with_max_level(tracing::Level::WARN)
        .init();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(run(&arguments)),
        Err(source) => Err(Error::Io {
            what: "start".to_owned(),
            source,
        }),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vmshadow: {}", chain(&error));
            if arguments.global.json {
                let answer = serde_json::json!({"error": error.to_qmp()});
                if let Err(error) = out(&format!("{answer:#}\n")) {
                    eprintln!("vmshadow: {}", chain(&error));
                }
            }
            match error {
                Error::Usage(_) => ExitCode::from(EXIT_USAGE),
                Error::Config { .. }
                | Error::NotFound(_)
                | Error::SetInProgress { .. }
                | Error::InvalidState(_)
                | Error::Storage(_)
                | Error::Guest(_)
                | Error::State(_)
                | Error::Bridge { .. }
                | Error::Io { .. } => ExitCode::from(EXIT_FAILED),
            }
        }
    }
}

/// An error and its causes on one line; a cause that only repeats the error is left out.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    shown::lines(&text)
}

async fn run(arguments: &Arguments) -> Result<ExitCode, Error> {
    let json = arguments.global.json;
    let backend = Backend::open(&arguments.global).await?;
    let recovered = backend.recover().await?;
    match &arguments.command {
        Command::Create(create) => {
            let target = backend.target(&create.vm)?;
            let (progress, printer) = progress_printer()?;
            let cancel = on_signals()?;
            let mut request = create.request();
            if let Some(since) = &create.since {
                build_on(&mut request.components, &backend.show(since).await?);
            }
            let document = backend.create(target, request, progress, cancel).await?;
            // The thread ends with the channel; its lines must stand before the result.
            if printer.join().is_err() {
                tracing::warn!("progress could not be printed");
            }
            print(json, &document, show::set)?;
            Ok(exit_code(&document))
        }
        Command::List(list) => {
            match list.what {
                Listed::Sets => {
                    let sets = backend.list(list.vm.vm.as_deref()).await?;
                    print(json, &sets, |sets| show::sets(sets))?;
                }
                Listed::Writers => {
                    let target = backend.target(&list.vm)?;
                    print(json, &backend.writers(target).await?, show::writers)?;
                }
                Listed::Volumes => {
                    let volumes = backend.volumes(&list.vm).await?;
                    print(json, &volumes, |volumes| show::volumes(volumes))?;
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Show { id } => {
            print(json, &backend.show(id).await?, show::set)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Delete { ids, forget } => {
            for id in ids {
                backend.delete(id, *forget).await?;
                if !json {
                    out(&format!("deleted {id}\n"))?;
                }
            }
            if json {
                print(json, &serde_json::json!({"deleted": ids}), |_| {
                    String::new()
                })?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Revert { id } => {
            let copies = backend.copies(id).await?;
            let bytes = copies.iter().map(|copy| copy.left_out_bytes).sum();
            backend.revert(id).await?;
            let answer = serde_json::json!({"reverted": id, "left-out-bytes": bytes});
            print(json, &answer, |_| {
                format!("reverted to {id}\n{}", show::left_out(bytes))
            })?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Complete {
            id,
            failed,
            failed_components,
        } => {
            let components = failed_components.clone();
            let document = backend.complete(id, !failed, components).await?;
            print(json, &document, show::set)?;
            let mut said = document.writers.iter().filter_map(|w| w.complete.as_ref());
            let is_whole = said.all(|report| report.failure.is_none());
            Ok(if is_whole {
                ExitCode::SUCCESS
            } else {
                ExitCode::from(EXIT_FAILED)
            })
        }
        Command::Restore {
            id,
            writers,
            components,
            additional_restores,
            options,
            command,
        } => {
            let what = SetPreRestore {
                id: id.clone(),
                writers: writers.clone(),
                components: components.clone(),
                additional_restores: *additional_restores,
                options: options.clone(),
            };
            restore(&backend, &what, command, json).await
        }
        Command::Read(read) => {
            output::read(&backend, read, json).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Recover => {
            print(json, &recovered, |documents| {
                let lines = documents.iter().map(|document| {
                    format!(
                        "set {} of {}: {}\n",
                        document.set,
                        document.vm.name,
                        document.outcome.as_str()
                    )
                });
                let text: String = lines.collect();
                if text.is_empty() {
                    "nothing to recover\n".to_owned()
                } else {
                    text
                }
            })?;
            // What could not be reached stays open, and is said so.
            let open = backend
                .list(None)
                .await?
                .iter()
                .any(|set| set.document.outcome == Outcome::Open);
            Ok(if open {
                ExitCode::from(EXIT_FAILED)
            } else {
                ExitCode::SUCCESS
            })
        }
    }
}

/// Runs a command between the writers' two events.
async fn restore(
    backend: &Backend,
    what: &SetPreRestore,
    command: &[OsString],
    json: bool,
) -> Result<ExitCode, Error> {
    let Some((program, arguments)) = command.split_first() else {
        return Err(Error::Usage("no command".to_owned()));
    };
    let (restoring, begun) = backend.pre_restore(what).await?;
    // Now, while somebody can still see to it.
    for need in &begun.needs {
        eprintln!("vmshadow: {}", show::need(need));
    }
    let status = tokio::process::Command::new(program)
        .args(arguments)
        .env("VMSHADOW_SET", &what.id)
        .status()
        .await;
    let succeeded = status.as_ref().is_ok_and(std::process::ExitStatus::success);
    let restored = match &status {
        Ok(_) if succeeded => FilesRestored::All,
        Ok(_) => FilesRestored::Failed,
        // It was not even started.
        Err(_) => FilesRestored::None,
    };
    let after = backend.post_restore(restoring, restored).await?;
    status.map_err(|source| Error::Io {
        what: program.to_string_lossy().into_owned(),
        source,
    })?;
    let is_whole = after.writers.iter().all(|writer| writer.failure.is_none());
    let RestoreBegun { said, needs } = begun;
    let answer =
        serde_json::json!({"restored": restored, "before": said, "needs": needs, "after": after});
    print(json, &answer, |_| show::restored(&after))?;
    Ok(if succeeded && is_whole {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EXIT_FAILED)
    })
}

fn exit_code(document: &SetDocument) -> ExitCode {
    match (document.outcome, &document.reason) {
        (Outcome::Kept, _) => ExitCode::SUCCESS,
        (Outcome::Refused, _) => ExitCode::from(EXIT_LEVEL),
        (Outcome::Open, Some(reason)) if reason.code.is_about_the_level() => {
            ExitCode::from(EXIT_LEVEL)
        }
        (Outcome::Open | Outcome::Failed | Outcome::Undone, _) => ExitCode::from(EXIT_FAILED),
    }
}

fn print<T: Serialize>(json: bool, value: &T, text: impl Fn(&T) -> String) -> Result<(), Error> {
    if json {
        let mut text = serde_json::to_string_pretty(value).map_err(|error| Error::Io {
            what: "JSON".to_owned(),
            source: error.into(),
        })?;
        text.push('\n');
        out(&shown::json(&text))
    } else {
        out(&text(value))
    }
}

fn out(text: &str) -> Result<(), Error> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|source| Error::Io {
            what: "standard output".to_owned(),
            source,
        })
}

type Printer = std::thread::JoinHandle<()>;

/// A channel for steps and the thread that prints them.
fn progress_printer() -> Result<(mpsc::UnboundedSender<StepTime>, Printer), Error> {
    let (sender, mut receiver) = mpsc::unbounded_channel::<StepTime>();
    let thread = std::thread::Builder::new()
        .name("progress".to_owned())
        .spawn(move || {
            let mut stderr = std::io::stderr();
            while let Some(time) = receiver.blocking_recv() {
                if writeln!(stderr, "{}", show::step(time)).is_err() {
                    // Nobody reads it any more; the set does not depend on that.
                    return;
                }
            }
        });
    let thread = thread.map_err(|source| Error::Io {
        what: "start a thread".to_owned(),
        source,
    })?;
    Ok((sender, thread))
}

/// Turns true at SIGINT, SIGTERM or SIGHUP.
fn on_signals() -> Result<watch::Receiver<bool>, Error> {
    let (sender, receiver) = watch::channel(false);
    for kind in [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
    ] {
        let mut stream = signal(kind).map_err(|source| Error::Io {
            what: "signals".to_owned(),
            source,
        })?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while stream.recv().await.is_some() {
                if sender.send(true).is_err() {
                    return;
                }
            }
        });
    }
    Ok(receiver)
}
