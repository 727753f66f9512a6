//! The daemon: options, listening socket, recovery at the start, orderly end.
//!
//! Called by `main`. Each connection is a `session`. Access: the socket has mode 0600, and only its owner's and root's
//! processes are served (SO_PEERCRED).

mod session;

use crate::config::Config;
use crate::error::Error;
use crate::sets::Sets;
use crate::snapshot::intent::DEFAULT_STATE_DIRECTORY;
use crate::snapshot::run::Limits;
use crate::snapshot::step::FaultPoint;
use clap::Parser;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Coordinates guest freeze and host commit; serves requesters in QMP framing.
#[derive(Clone, Debug, Parser)]
#[command(name = "qmp-bridge", version)]
pub struct Options {
    /// Where to listen.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// File that names the VMs.
    #[arg(long, value_name = "FILE.toml")]
    pub config: PathBuf,
    /// Where records of sets are kept (default: the configuration's, or /var/lib/vmshadow).
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// What all sessions share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) sets: Sets,
    pub(crate) config: Config,
    /// Turns true when the daemon is told to end.
    pub(crate) ending: watch::Receiver<bool>,
}

/// Serves until SIGTERM or SIGINT; then cancels what is under way, lets it undo, and returns.
///
/// # Errors
/// The configuration, the state directory or the socket do not serve.
pub fn serve(options: &Options) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| io_error("start", source))?;
    runtime.block_on(listen(options))
}

async fn listen(options: &Options) -> Result<(), Error> {
    let config = Config::read(&options.config)?;
    let state_dir = options
        .state_dir
        .clone()
        .or_else(|| config.state_dir.clone())
        .unwrap_or_else(|| PathBuf::from(DEFAULT_STATE_DIRECTORY));
    let faults = FaultPoint::from_environment().map_err(Error::Usage)?;
    let sets = Sets::open(&state_dir, Limits::default(), faults)?;
    let (end, ending) = watch::channel(false);
    let mut interrupt =
        signal(SignalKind::interrupt()).map_err(|source| io_error("SIGINT", source))?;
    let mut terminate =
        signal(SignalKind::terminate()).map_err(|source| io_error("SIGTERM", source))?;
    for document in sets.recover().await? {
        tracing::warn!(
            "set {} of {}: its bridge had died; now {}",
            document.set,
            document.vm.name,
            document.outcome.as_str()
        );
    }
    let listener = bind(&options.socket)?;
    tracing::info!(
        "serving {} VMs on {}",
        config.vm.len(),
        options.socket.display()
    );
    let shared = Arc::new(Shared {
        sets,
        config,
        ending,
    });
    let mut sessions = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    if may_use(&stream) {
                        sessions.spawn(session::serve(stream, Arc::clone(&shared)));
                    } else {
                        tracing::warn!("a process of another user was refused");
                    }
                }
                Err(error) => tracing::warn!("accept: {error}"),
            },
            Some(_) = sessions.join_next(), if !sessions.is_empty() => {}
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
        }
    }
    // A session ends by itself when it is told to, after its set is undone.
    if end.send(true).is_ok() {
        while sessions.join_next().await.is_some() {}
    }
    if let Err(error) = std::fs::remove_file(&options.socket) {
        tracing::warn!("{}: {error}", options.socket.display());
    }
    Ok(())
}

fn bind(path: &Path) -> Result<UnixListener, Error> {
    let what = |what: &str| format!("{what} {}", path.display());
    // A socket that nobody listens on is left over from a daemon that was killed.
    if path.exists() {
        match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => {
                let text = what("another daemon listens on");
                return Err(Error::InvalidState(text));
            }
            Err(_) => std::fs::remove_file(path).map_err(|e| io_error(&what("remove"), e))?,
        }
    }
    let listener = UnixListener::bind(path).map_err(|e| io_error(&what("listen on"), e))?;
    let owner_only = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, owner_only).map_err(|e| io_error(&what("protect"), e))?;
    Ok(listener)
}

fn may_use(stream: &tokio::net::UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream
        .peer_cred()
        .is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own)
}

fn io_error(what: &str, source: io::Error) -> Error {
    Error::Io {
        what: what.to_owned(),
        source,
    }
}
