//! Puts the rooms together: opens the disks, serves them, stops in order.
//!
//! Called by `main`. The only room that names all others.
//!
//! Order of starting: open and recover every volume, once no I/O of a killed predecessor is in flight; resolve sets; then sockets. Order
//! of stopping (SIGTERM, SIGINT): front ends are drained and hung up, open sets undone, background work ended, stores closed.

use crate::config::{Config, DiskConfig};
use crate::control::{self, Events};
use crate::engine::{EngineKind, Ring, SnapshotSets, Upkeep, VolumeEngine, VolumeSettings};
use crate::frontend::{self, Ending, Resumed, Serving, SocketError};
use crate::handover::{Given, GivenDisk, HandoverError, Outcome, Taking};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vhost_blk_store::{OpenOptions, StoreError, Volume, resolve_sets};

/// Longest wait for the last user of a store before it is handed over.
const RELEASE_MAX: Duration = Duration::from_secs(5);
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
    /// `--replace` failed; the other daemon serves.
    #[error("not taken over")]
    Handover(#[from] HandoverError),
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

/// Serves until SIGTERM or SIGINT, or until another daemon has taken over.
///
/// # Errors
/// [`DaemonError`].
pub fn run(config: &Config) -> Result<(), DaemonError> {
    if config.engine == EngineKind::Uring {
        Ring::probe().map_err(DaemonError::NoRing)?;
    }
    let mut start = if config.replace {
        let (taking, given) = Taking::ask(config)?;
        Start::Taken(taking, given)
    } else {
        Start::Fresh
    };
    loop {
        let (given, to) = match serve(config, start)? {
            Served::Stopped => return Ok(()),
            Served::HandedOver(given, to) => (given, to),
        };
        match given.give(&to) {
            Outcome::Taken => {
                tracing::info!("handed over");
                return Ok(());
            }
            Outcome::Kept(why) => {
                tracing::warn!(why, "not handed over: serving again");
                start = Start::Again(given);
            }
        }
    }
}

/// What the daemon begins with.
enum Start {
    /// Nothing.
    Fresh,
    /// Another daemon's disks; it takes them back unless it is told that they are served.
    Taken(Taking, Given),
    /// Its own, which another daemon could not take.
    Again(Given),
}

/// How serving ended.
enum Served {
    Stopped,
    HandedOver(Given, UnixStream),
}

fn serve(config: &Config, start: Start) -> Result<Served, DaemonError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // From here on a signal ends the daemon in order, however early it comes.
    let mut stop_signal = {
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
    let released: Vec<_> = stores.iter().map(Arc::downgrade).collect();
    drop(stores);
    let sets = SnapshotSets::new(volumes);
    let (doors, control) = doors(config, &sets, start)?;
    let for_next = control.as_ref().map(UnixListener::try_clone).transpose()?;

    let fronts = Fronts::start(config, &sets, doors)?;
    let upkeep = Upkeep::start(Arc::clone(&sets))?;
    tracing::info!(disks = config.disks.len(), "serving");
    let ended = runtime.block_on(control::serve(control, &sets, &events, &mut stop_signal))?;

    match ended {
        control::Ended::Stopped => {
            tracing::info!("stopping");
            fronts.stop();
            sets.undo_all();
            upkeep.stop();
            runtime.shutdown_timeout(Duration::from_secs(5));
            remove_sockets(config);
            close_all(config, &sets)?;
            Ok(Served::Stopped)
        }
        control::Ended::HandOver(to) => {
            tracing::info!("handing over");
            // While the guests go on: what is synced here does not lengthen their wait.
            upkeep.stop();
            for volume in sets.volumes() {
                if let Err(error) = volume.store().flush() {
                    tracing::warn!(volume = %volume.settings.name, %error, "cannot flush");
                }
            }
            // One that was opened a moment ago must not hold the rings.
            sets.undo_all();
            let disks = fronts.hand_over();
            runtime.shutdown_timeout(Duration::from_secs(1));
            if let Err(error) = close_all(config, &sets) {
                tracing::warn!(error = %error, "the next daemon recovers");
            }
            drop(sets);
            wait_released(&released);
            let given = Given {
                disks,
                control: for_next,
            };
            Ok(Served::HandedOver(given, to))
        }
    }
}

/// Waits until nobody holds the stores any more: their locks have to be free for the next daemon. One that reads a snapshot out to a
/// client that does not read may hold on; the next daemon waits for that, or gives up.
fn wait_released(stores: &[Weak<Volume>]) {
    let deadline = Instant::now() + RELEASE_MAX;
    while stores.iter().any(|store| store.strong_count() > 0) {
        if Instant::now() > deadline {
            tracing::warn!("a disk is still in use");
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn remove_sockets(config: &Config) {
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
}

fn serving(config: &Config, disk: &DiskConfig) -> Serving {
    Serving {
        num_queues: disk.num_queues,
        poll_max: config.poll_max,
    }
}

/// Where the front ends of a volume come in.
struct Door {
    listener: UnixListener,
    /// One that is in already.
    resumed: Option<Resumed>,
}

/// Makes or takes over the sockets. Behind this, what was taken over is ours.
fn doors(
    config: &Config,
    sets: &SnapshotSets,
    start: Start,
) -> Result<(Vec<Door>, Option<UnixListener>), DaemonError> {
    let (taking, given) = match start {
        Start::Fresh => {
            let listeners = config.disks.iter().map(|disk| {
                Ok(Door {
                    listener: frontend::bind(&disk.socket)?,
                    resumed: None,
                })
            });
            let doors = listeners.collect::<Result<_, DaemonError>>()?;
            let control = config.control.as_deref().map(frontend::bind).transpose()?;
            return Ok((doors, control));
        }
        Start::Taken(taking, given) => (Some(taking), given),
        Start::Again(given) => (None, given),
    };
    let mut doors = Vec::new();
    let mut given_disks = given.disks;
    for (disk, volume) in config.disks.iter().zip(sets.volumes()) {
        let place = given_disks.iter().position(|one| one.volume == disk.name);
        let Some(given) = place.map(|place| given_disks.swap_remove(place)) else {
            // Its front thread had failed before.
            let listener = frontend::bind(&disk.socket)?;
            doors.push(Door {
                listener,
                resumed: None,
            });
            continue;
        };
        let resumed = given
            .session
            .map(|session| Resumed::prepare(volume, serving(config, disk), session));
        let resumed = match resumed.transpose() {
            Err(error) if taking.is_none() => {
                // The session closes here, and the front end connects again.
                tracing::error!(volume = %disk.name, %error, "a session cannot be taken up again");
                None
            }
            resumed => resumed.map_err(|source| HandoverError::Unfit {
                volume: disk.name.clone(),
                source,
            })?,
        };
        doors.push(Door {
            listener: given.listener,
            resumed,
        });
    }
    if let Some(taking) = taking {
        taking.taken().map_err(HandoverError::Io)?;
    }
    Ok((doors, given.control))
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

/// Half of the memory for the index caches its pages.
fn cache_pages(index_memory_bytes: u64) -> usize {
    usize::try_from(index_memory_bytes / 2 / 4096).unwrap_or(usize::MAX)
}

/// The other half holds records that are not merged yet: up to four times as many as make a checkpoint due, of about 64 bytes each.
fn memtable_records(index_memory_bytes: u64) -> usize {
    usize::try_from(index_memory_bytes / 2 / 4 / 64).unwrap_or(usize::MAX)
}

/// Opens and recovers all volumes, and resolves the sets that span them.
fn open_all(config: &Config) -> Result<Vec<Arc<Volume>>, DaemonError> {
    if config.relaxed_order {
        tracing::warn!("--relaxed-order-for-measurement: a power cut may damage snapshots");
    }
    let mut volumes = Vec::new();
    for disk in &config.disks {
        let options = OpenOptions {
            direct: config.direct,
            // `read-only` keeps the guest from writing; its snapshots are still ours to take and delete.
            read_only: false,
            force_base: config.force_base,
            relaxed_order: config.relaxed_order,
            log_limit_bytes: config.shadow_limit_bytes,
            cache_pages: cache_pages(config.index_memory_bytes),
            memtable_records: memtable_records(config.index_memory_bytes),
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
    endings: Vec<Arc<Ending>>,
    threads: Vec<JoinHandle<Option<GivenDisk>>>,
}

impl Fronts {
    fn start(config: &Config, sets: &SnapshotSets, doors: Vec<Door>) -> io::Result<Self> {
        let mut fronts = Self {
            endings: Vec::new(),
            threads: Vec::new(),
        };
        for ((disk, volume), door) in config.disks.iter().zip(sets.volumes()).zip(doors) {
            let ending = Arc::new(Ending::new()?);
            let (volume, serving) = (Arc::clone(volume), serving(config, disk));
            fronts.endings.push(Arc::clone(&ending));
            let thread = std::thread::Builder::new().name(format!("front {}", disk.name));
            fronts
                .threads
                .push(thread.spawn(move || front(&volume, door, serving, &ending))?);
        }
        Ok(fronts)
    }

    fn stop(self) {
        self.end(Ending::stop);
    }

    /// Stops all rings; the disks without their stores.
    fn hand_over(self) -> Vec<GivenDisk> {
        self.end(Ending::hand_over)
    }

    fn end(self, how: impl Fn(&Ending)) -> Vec<GivenDisk> {
        for ending in &self.endings {
            how(ending);
        }
        let mut given = Vec::new();
        for thread in self.threads {
            match thread.join() {
                Ok(disk) => given.extend(disk),
                Err(_) => tracing::error!("a front thread has panicked"),
            }
        }
        given
    }
}

/// Serves the front ends of a volume; what is handed over, if that is how it ended.
fn front(
    volume: &Arc<VolumeEngine>,
    door: Door,
    serving: Serving,
    ending: &Ending,
) -> Option<GivenDisk> {
    let Door { listener, resumed } = door;
    match frontend::serve(volume, &listener, serving, ending, resumed) {
        Ok(frontend::Served::Stopped) => None,
        Ok(frontend::Served::HandedOver(session)) => Some(GivenDisk {
            volume: volume.settings.name.clone(),
            listener,
            session: session.map(|session| *session),
        }),
        Err(error) => {
            tracing::error!(volume = %volume.settings.name, %error, "front ends are not served any more");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{OpenOptions, cache_pages, memtable_records};

    #[test]
    fn the_stores_own_bounds_are_those_of_32_mib() {
        let options = OpenOptions::default();
        assert_eq!(cache_pages(32 << 20), options.cache_pages);
        assert_eq!(memtable_records(32 << 20), options.memtable_records);
    }
}
