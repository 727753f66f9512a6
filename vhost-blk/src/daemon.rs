//! Puts the rooms together: opens the disks, serves them, stops in order.
//!
//! Called by `main`. The only room that names all others.
//!
//! Order of starting: open and recover every volume, once no I/O of a killed predecessor is in flight; resolve sets; then sockets. Order
//! of stopping (SIGTERM, SIGINT): front ends are drained and hung up, open sets undone, maintenance ended, stores closed.

use crate::config::{Config, DiskConfig};
use crate::control::{self, Events};
use crate::engine::{EngineKind, Kick, Ring, SnapshotSets, VolumeEngine, VolumeSettings};
use crate::frontend::{self, Serving, SocketError};
use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vhost_blk_store::{Maintenance, OpenOptions, StoreError, Volume, resolve_sets};

/// Blocks that one background step may touch: bounds how long a request can wait behind it.
const MAINTENANCE_BLOCKS: u64 = 256;
/// Pause between background steps while there is work: the guest comes first.
const MAINTENANCE_PAUSE: Duration = Duration::from_millis(2);
/// Pause while there is none.
const MAINTENANCE_IDLE: Duration = Duration::from_millis(250);
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
    let maintenance = MaintenanceThread::start(Arc::clone(&sets))?;
    tracing::info!(disks = config.disks.len(), "serving");
    runtime.block_on(control::serve(control, &sets, &events, stop_signal))?;

    tracing::info!("stopping");
    fronts.stop();
    sets.undo_all();
    maintenance.stop();
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

/// The thread that does the stores' background work.
struct MaintenanceThread {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: JoinHandle<()>,
}

impl MaintenanceThread {
    fn start(sets: Arc<SnapshotSets>) -> io::Result<Self> {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("maintenance".to_owned())
            .spawn(move || {
                loop {
                    let more = sets
                        .volumes()
                        .iter()
                        .map(maintain)
                        .fold(false, |any, more| any | more);
                    let pause = if more {
                        MAINTENANCE_PAUSE
                    } else {
                        MAINTENANCE_IDLE
                    };
                    let guard = stopped.0.lock().unwrap_or_else(PoisonError::into_inner);
                    let (stop, _) = stopped
                        .1
                        .wait_timeout_while(guard, pause, |stop| !*stop)
                        .unwrap_or_else(PoisonError::into_inner);
                    if *stop {
                        return;
                    }
                }
            })?;
        Ok(Self { stop, thread })
    }

    fn stop(self) {
        *self.stop.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stop.1.notify_all();
        if self.thread.join().is_err() {
            tracing::error!("the maintenance thread has panicked");
        }
    }
}

/// One background step of a volume; true if there is more to do.
fn maintain(volume: &Arc<VolumeEngine>) -> bool {
    let Some(step) = volume.maintain(MAINTENANCE_BLOCKS) else {
        return false;
    };
    if volume.lacks_room() {
        volume.try_room_again();
    }
    volume.tell_if_poisoned();
    match step {
        Ok(Maintenance::More) => true,
        Ok(Maintenance::Idle) | Err(StoreError::Poisoned) => false,
        Err(error) => {
            tracing::warn!(volume = %volume.settings.name, %error, "a background step failed");
            false
        }
    }
}
