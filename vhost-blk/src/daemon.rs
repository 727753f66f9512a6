//! Puts the rooms together: opens the disks, serves them, stops in order.
//!
//! Called by `main`. The only room that names all others.
//!
//! Order of starting: open and recover every volume, once no I/O of a killed predecessor is in flight; resolve sets; then sockets. Order
//! of stopping (SIGTERM, SIGINT): front ends are drained and hung up, open sets undone, background work ended, stores closed.

use crate::config::{Config, DiskConfig};
use crate::control::{self, Events};
use crate::engine::{EngineKind, Kick, Ring, SnapshotSets, Upkeep, VolumeEngine, VolumeSettings};
use crate::frontend::{self, Serving, SocketError};
use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vhost_blk_store::{OpenOptions, StoreError, Volume, resolve_sets};

/// Longest wait for I/O of a killed predecessor to end.
const FENCE_MAX: Duration = Duration::from_secs(10);

/// Why the daemon could not run, or could not stop cleanly.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// A disk cannot be opened.
    #[error("disk {path}: cannot be opened")]
    Open {
        /// Base file or block device.
        path: PathBuf,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// Sets of an earlier run cannot be resolved.
    #[error("snapshot sets of an earlier run cannot be resolved")]
    Sets(#[source] StoreError),
    /// A socket cannot be had.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// `--engine uring` on a machine without it.
    #[error("--engine uring")]
    NoRing(#[source] crate::engine::RingUnavailable),
    /// The system has no more threads or descriptors.
    #[error("out of system resources")]
    System(#[from] io::Error),
    /// A volume could not be closed; its next start recovers it.
    #[error("disk {path}: not closed cleanly")]
    Close {
        /// Base file or block device.
        path: PathBuf,
        /// Why.
        #[source]
        source: StoreError,
    },
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// [`DaemonError`].
pub fn run(config: &Config) -> Result<(), DaemonError> {
    if config.engine == EngineKind::Uring {
        Ring::probe().map_err(DaemonError::NoRing)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // From here on a signal ends the daemon in order, however early it comes.
    let stop_signal = {
        let _inside = runtime.enter();
        control::StopSignal::new()?
    };
    let events = Events::new();
    let stores = open_all(config)?;
    let volumes = config
        .disks
        .iter()
        .zip(&stores)
        .map(|(disk, store)| {
            VolumeEngine::new(settings(config, disk), Arc::clone(store), events.notice())
        })
        .collect::<io::Result<Vec<_>>>()?;
    drop(stores);
    let sets = SnapshotSets::new(volumes);

    let listeners = config
        .disks
        .iter()
        .map(|disk| frontend::bind(&disk.socket))
        .collect::<Result<Vec<_>, _>>()?;
    let control = config.control.as_deref().map(frontend::bind).transpose()?;

    let fronts = Fronts::start(config, &sets, listeners)?;
    let upkeep = Upkeep::start(Arc::clone(&sets))?;
    tracing::info!(disks = config.disks.len(), "serving");
    runtime.block_on(control::serve(control, &sets, &events, stop_signal))?;

    tracing::info!("stopping");
    fronts.stop();
    sets.undo_all();
    upkeep.stop();
    runtime.shutdown_timeout(Duration::from_secs(5));
    for socket in config
        .disks
        .iter()
        .map(|disk| &disk.socket)
        .chain(&config.control)
    {
        if let Err(error) = std::fs::remove_file(socket) {
            tracing::warn!(socket = %socket.display(), %error, "cannot remove the socket");
        }
    }
    close_all(config, &sets)
}

fn settings(config: &Config, disk: &DiskConfig) -> VolumeSettings {
    VolumeSettings {
        name: disk.name.clone(),
        serial: disk.serial.clone(),
        base: disk.path.clone(),
        shadow_storage: disk.shadow_storage.clone(),
        socket: disk.socket.clone(),
        method: disk.method,
        read_only: disk.read_only,
        engine: config.engine,
    }
}

/// Opens and recovers all volumes, and resolves the sets that span them.
fn open_all(config: &Config) -> Result<Vec<Arc<Volume>>, DaemonError> {
    let mut volumes = Vec::new();
    for disk in &config.disks {
        let options = OpenOptions {
            direct: config.direct,
            // `read-only` keeps the guest from writing; its snapshots are still ours to take and delete.
            read_only: false,
            force_base: config.force_base,
            log_limit_bytes: config.shadow_limit_bytes,
            // The loop below waits, and tells.
            lock_wait: Duration::ZERO,
            ..OpenOptions::default()
        };
        let begin = Instant::now();
        let mut is_told = false;
        let (volume, report) = loop {
            match Volume::adopt(&disk.path, &disk.shadow_storage, &options) {
                // A killed predecessor may have I/O in flight: its locks are free when the last of it has landed.
                Err(StoreError::InUse) if begin.elapsed() < FENCE_MAX => {
                    if !std::mem::replace(&mut is_told, true) {
                        tracing::info!(volume = %disk.name, "in use: waiting for the last I/O of a predecessor");
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
                opened => {
                    break opened.map_err(|source| DaemonError::Open {
                        path: disk.path.clone(),
                        source,
                    })?;
                }
            }
        };
        tracing::info!(volume = %disk.name, id = %volume.id(), size_bytes = volume.size_bytes(), ?report, "opened");
        volumes.push(Arc::new(volume));
    }
    let all: Vec<&Volume> = volumes.iter().map(Arc::as_ref).collect();
    for resolution in resolve_sets(&all).map_err(DaemonError::Sets)? {
        tracing::warn!(?resolution, "a snapshot set of an earlier run");
    }
    Ok(volumes)
}

fn close_all(config: &Config, sets: &SnapshotSets) -> Result<(), DaemonError> {
    let mut result = Ok(());
    for (disk, volume) in config.disks.iter().zip(sets.volumes()) {
        match volume.store().close() {
            Ok(()) => {}
            // A snapshot is being read out by a thread that hangs in its reader, or a disk hangs. Everything acknowledged is
            // safe: the next start recovers as after a kill.
            Err(source) => {
                result = Err(DaemonError::Close {
                    path: disk.path.clone(),
                    source,
                });
            }
        }
    }
    result
}

/// The threads that take front ends.
struct Fronts {
    stops: Vec<Arc<Kick>>,
    threads: Vec<JoinHandle<()>>,
}

impl Fronts {
    fn start(
        config: &Config,
        sets: &SnapshotSets,
        listeners: Vec<UnixListener>,
    ) -> io::Result<Self> {
        let mut fronts = Self {
            stops: Vec::new(),
            threads: Vec::new(),
        };
        for ((disk, volume), listener) in config.disks.iter().zip(sets.volumes()).zip(listeners) {
            let stop = Arc::new(Kick::new()?);
            let volume = Arc::clone(volume);
            let serving = Serving {
                num_queues: disk.num_queues,
                poll_max: config.poll_max,
            };
            fronts.stops.push(Arc::clone(&stop));
            let thread = std::thread::Builder::new().name(format!("front {}", disk.name));
            fronts.threads.push(thread.spawn(move || {
                if let Err(error) = frontend::serve(&volume, &listener, serving, &stop) {
                    tracing::error!(volume = %volume.settings.name, %error, "front ends are not served any more");
                }
            })?);
        }
        Ok(fronts)
    }

    fn stop(self) {
        for stop in &self.stops {
            stop.wake();
        }
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a front thread has panicked");
            }
        }
    }
}
