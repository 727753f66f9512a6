//! One disk as the engine sees it: the store's volume, the gate for its writes, its witness, its hands.
//!
//! Made by the daemon at start; used by the workers of its queues, by snapshot sets and by `control`. Knows nothing of
//! vhost-user: a front end is only "attached" or not.

use super::barrier::Barrier;
use super::blocking::Hand;
use super::kick::Kick;
use super::upkeep::{Alarm, Arrivals};
use super::witness::Witness;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};
use vhost_blk_store::{LeaveOut, Maintenance, SnapshotId, StoreError, Volume};
use vhost_blk_wire::event::Event as WireEvent;
use vhost_blk_wire::types::{Method, VolumeInfo};

/// Longest window between mark and commit.
const QUIET_MAX: Duration = Duration::from_secs(10);

/// Tells the control socket's clients what happened. Must not block.
pub type Notice = Arc<dyn Fn(WireEvent) + Send + Sync>;

/// Hears that the volume has another size. Must not block.
pub type SizeWatcher = dyn Fn() + Send + Sync;

/// How data is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineKind {
    /// io_uring where the kernel has it, else plain system calls.
    Auto,
    /// io_uring, or fail.
    Uring,
    /// Plain system calls, one request at a time on each queue.
    Sync,
}

/// What does not change while the daemon runs.
#[derive(Clone, Debug)]
pub struct VolumeSettings {
    /// Name within the daemon.
    pub name: String,
    /// Serial that the guest reads, at most 20 bytes.
    pub serial: String,
    /// Base file or block device.
    pub base: PathBuf,
    /// Directory of the shadow storage.
    pub shadow_storage: PathBuf,
    /// vhost-user socket.
    pub socket: PathBuf,
    /// Method of new snapshots that do not ask for one.
    pub method: Method,
    /// The guest may not write.
    pub read_only: bool,
    /// How data is moved.
    pub engine: EngineKind,
}

/// One disk.
pub struct VolumeEngine {
    /// What does not change.
    pub settings: VolumeSettings,
    /// Gate for writes.
    pub barrier: Arc<Barrier>,
    /// Counters of writes.
    pub witness: Witness,
    /// Prepares plans and does whole requests. Before `store`: hands end first.
    pub(super) mover: Hand,
    /// Flushes.
    pub(super) flusher: Hand,
    store: Arc<Volume>,
    notice: Notice,
    /// One per queue of the front end that is connected.
    kicks: Mutex<Vec<Weak<Kick>>>,
    /// What each queue has got, connected or not any more.
    arrivals: Mutex<Vec<Weak<Arrivals>>>,
    /// Rings for the thread that makes room.
    alarm: OnceLock<Arc<Alarm>>,
    /// Requests that wait for another queue's write.
    pub(super) overlapping: AtomicUsize,
    /// Requests that wait for room.
    pub(super) without_room: AtomicUsize,
    /// Those of them that wait for room for the base.
    pub(super) base_without_room: AtomicUsize,
    /// What the shadow storage gives back is of no use to the base.
    base_is_apart: bool,
    /// Counts what parked requests wait for: the end of a hold or of another write.
    news: AtomicU64,
    /// How often something happened that may have made room.
    chances_of_room: AtomicU64,
    /// False: every write is flushed before it is acknowledged. Outlives a front end: a guest that has switched its
    /// write cache off does not say so again when its front end reconnects.
    write_cache: AtomicBool,
    /// A set is between mark and commit: maintenance stays away until then at most.
    quiet_until: Arc<Mutex<Option<Instant>>>,
    /// Held during a background step.
    maintenance_step: Mutex<()>,
    /// The driver can flush; one that cannot expects every write to be durable.
    driver_flushes: AtomicBool,
    attached: Mutex<Attachment>,
    poisoned_told: AtomicBool,
    /// It is being resized or reverted.
    pub(super) changing: AtomicBool,
    /// Of the front end that is connected, if it can be told.
    size_watcher: Mutex<Option<Weak<SizeWatcher>>>,
}

impl std::fmt::Debug for VolumeEngine {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("VolumeEngine")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// How often parked requests had reason to be tried again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct News {
    /// Ends of holds and of writes that others waited for.
    pub(super) ends: u64,
    /// Chances that there is room.
    pub(super) chances_of_room: u64,
}

/// Maintenance stays away from the volume as long as this lives.
#[derive(Debug)]
pub(super) struct QuietWindow(Arc<Mutex<Option<Instant>>>);

impl Drop for QuietWindow {
    fn drop(&mut self) {
        *lock(&self.0) = None;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whose the volume's data are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attachment {
    /// Nobody's: a front end may connect.
    Free,
    /// A front end is connected.
    FrontEnd,
    /// Something is done to them that no front end may see half done.
    Detached,
}

/// Gives the volume free at the end of [`VolumeEngine::while_detached`], however it ends.
struct Detached<'a>(&'a VolumeEngine);

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        *self.0.attachment() = Attachment::Free;
    }
}

/// A front end is connected as long as this lives.
#[derive(Debug)]
pub struct Attached {
    volume: Arc<VolumeEngine>,
}

impl Drop for Attached {
    fn drop(&mut self) {
        *self.volume.attachment() = Attachment::Free;
        self.volume.tell(WireEvent::VolumeDisconnected {
            volume: self.volume.settings.name.clone(),
        });
    }
}

impl VolumeEngine {
    /// Starts the volume's hands.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn new(
        settings: VolumeSettings,
        store: Arc<Volume>,
        notice: Notice,
    ) -> std::io::Result<Arc<Self>> {
        let device = |path: &Path| rustix::fs::stat(path).map(|stat| stat.st_dev).ok();
        let base_is_apart = device(&settings.base) != device(&settings.shadow_storage);
        let hand = |what| Hand::start(format!("{what} {}", settings.name), Arc::clone(&store));
        Ok(Arc::new(Self {
            barrier: Barrier::new(),
            witness: Witness::default(),
            mover: hand("mover")?,
            flusher: hand("flusher")?,
            settings,
            store,
            notice,
            kicks: Mutex::new(Vec::new()),
            arrivals: Mutex::new(Vec::new()),
            alarm: OnceLock::new(),
            overlapping: AtomicUsize::new(0),
            without_room: AtomicUsize::new(0),
            base_without_room: AtomicUsize::new(0),
            base_is_apart,
            news: AtomicU64::new(0),
            chances_of_room: AtomicU64::new(0),
            write_cache: AtomicBool::new(true),
            quiet_until: Arc::new(Mutex::new(None)),
            maintenance_step: Mutex::new(()),
            driver_flushes: AtomicBool::new(true),
            attached: Mutex::new(Attachment::Free),
            poisoned_told: AtomicBool::new(false),
            changing: AtomicBool::new(false),
            size_watcher: Mutex::new(None),
        }))
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> &Arc<Volume> {
        &self.store
    }

    /// Whether it is being resized or reverted: no set may be opened on it.
    pub(super) fn is_changing(&self) -> bool {
        self.changing.load(Ordering::SeqCst)
    }

    /// Calls `watcher` whenever the size has changed, as long as it lives. One at a time.
    pub fn watch_size(&self, watcher: &Arc<SizeWatcher>) {
        *lock(&self.size_watcher) = Some(Arc::downgrade(watcher));
    }

    /// The size has changed: the front end and the control socket's clients hear of it.
    pub(super) fn tell_size(&self) {
        let watcher = lock(&self.size_watcher).as_ref().and_then(Weak::upgrade);
        if let Some(watcher) = watcher {
            watcher();
        }
        self.tell(WireEvent::VolumeResized {
            volume: self.settings.name.clone(),
            size_bytes: self.size_bytes(),
        });
    }

    /// Size of the disk in bytes, now.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.store.size_bytes()
    }

    /// Tells the control socket's clients.
    pub fn tell(&self, event: WireEvent) {
        (self.notice)(event);
    }

    /// The guest's setting of the write cache.
    #[must_use]
    pub fn write_cache(&self) -> bool {
        self.write_cache.load(Ordering::Acquire)
    }

    /// True if writes may be acknowledged before they are durable.
    #[must_use]
    pub fn may_cache_writes(&self) -> bool {
        self.write_cache() && self.driver_flushes.load(Ordering::Acquire)
    }

    /// Whether the driver has taken a feature by which it can flush.
    pub fn set_driver_flushes(&self, can: bool) {
        self.driver_flushes.store(can, Ordering::Release);
    }

    /// Switches the write cache.
    pub fn set_write_cache(&self, on: bool) {
        self.write_cache.store(on, Ordering::Release);
    }

    /// Adds a queue that has to be woken when parked requests may go on.
    pub fn add_queue(&self, kick: &Arc<Kick>) {
        let mut kicks = self.kicks.lock().unwrap_or_else(PoisonError::into_inner);
        kicks.retain(|kick| kick.strong_count() > 0);
        kicks.push(Arc::downgrade(kick));
    }

    /// A counter for the requests of one more queue.
    pub(super) fn count_arrivals(&self) -> Arc<Arrivals> {
        let counter = Arc::default();
        let mut arrivals = lock(&self.arrivals);
        arrivals.retain(|counter| counter.strong_count() > 0);
        arrivals.push(Arc::downgrade(&counter));
        counter
    }

    /// A number that changes when requests come.
    pub(super) fn arrivals(&self) -> u64 {
        let arrivals = lock(&self.arrivals);
        let live = arrivals.iter().filter_map(Weak::upgrade);
        live.fold(0, |sum, counter| sum.wrapping_add(counter.count()))
    }

    pub(super) fn set_alarm(&self, alarm: &Arc<Alarm>) {
        // A second thread of background work would be a mistake of the daemon; the first one stays in charge.
        let _already = self.alarm.set(Arc::clone(alarm));
    }

    /// Writes wait for room: background work looks for it at once.
    pub(super) fn ask_for_room(&self) {
        if let Some(alarm) = self.alarm.get() {
            alarm.ring();
        }
    }

    /// Wakes all queues: parked requests are tried again.
    pub fn wake_queues(&self) {
        self.news.fetch_add(1, Ordering::SeqCst);
        let kicks = self.kicks.lock().unwrap_or_else(PoisonError::into_inner);
        for kick in kicks.iter().filter_map(Weak::upgrade) {
            kick.wake();
        }
    }

    /// True if guest writes wait for room.
    #[must_use]
    pub fn lacks_room(&self) -> bool {
        self.without_room.load(Ordering::SeqCst) > 0
    }

    /// True if room in the shadow storage would help one of those that wait.
    pub(super) fn would_be_helped_by_room(&self) -> bool {
        let for_base = if self.base_is_apart {
            self.base_without_room.load(Ordering::SeqCst)
        } else {
            0
        };
        self.without_room.load(Ordering::SeqCst) > for_base
    }

    /// There may be room again: requests that wait for it are tried once more.
    pub fn try_room_again(&self) {
        self.chances_of_room.fetch_add(1, Ordering::SeqCst);
        self.wake_queues();
    }

    /// What has happened so far that parked requests may wait for.
    pub(super) fn news(&self) -> News {
        News {
            ends: self.news.load(Ordering::SeqCst),
            chances_of_room: self.chances_of_room.load(Ordering::SeqCst),
        }
    }

    /// Keeps maintenance away while a set is marked, but no longer than a window may last: a coordinator that marks and never
    /// commits must not stop it. One set at a time is open on a volume. Returns when a step that is under way is over, so that a
    /// commit never waits for one with writes held.
    pub(super) fn quiet_window(&self) -> QuietWindow {
        *self.lock_quiet() = Some(Instant::now() + QUIET_MAX);
        drop(lock(&self.maintenance_step));
        QuietWindow(Arc::clone(&self.quiet_until))
    }

    fn lock_quiet(&self) -> MutexGuard<'_, Option<Instant>> {
        lock(&self.quiet_until)
    }

    /// One background step of the store; `None` while a set is between mark and commit on this volume.
    pub fn maintain(&self, budget_blocks: u64) -> Option<Result<Maintenance, StoreError>> {
        let _step = lock(&self.maintenance_step);
        let is_quiet = self
            .lock_quiet()
            .is_some_and(|until| Instant::now() < until);
        (!is_quiet).then(|| self.store.maintain(budget_blocks))
    }

    /// One step of leaving areas out of a snapshot: `false` when nothing is left to do; `None` while a set is between mark and commit
    /// on this volume.
    pub(super) fn leave_out(
        &self,
        snapshot: SnapshotId,
        wanted: &mut LeaveOut,
    ) -> Option<Result<bool, StoreError>> {
        let _step = lock(&self.maintenance_step);
        let is_quiet = self
            .lock_quiet()
            .is_some_and(|until| Instant::now() < until);
        if is_quiet {
            return None;
        }
        let more = self.store.leave_out(snapshot, wanted);
        // Writes to these blocks were turned back during the sync.
        self.wake_queues();
        Some(more)
    }

    /// Tells once that the store has poisoned itself.
    pub fn tell_if_poisoned(&self) {
        if self.store.status().poisoned && !self.poisoned_told.swap(true, Ordering::SeqCst) {
            tracing::error!(volume = %self.settings.name, "the volume is poisoned: restart the daemon");
            self.tell(WireEvent::VolumePoisoned {
                volume: self.settings.name.clone(),
                reason: "an earlier sync or journal write failed".to_owned(),
            });
        }
    }

    /// A front end has connected. `None` if there is one already, or none may be now.
    #[must_use]
    pub fn attach(self: &Arc<Self>) -> Option<Attached> {
        let mut attached = self.attachment();
        if *attached != Attachment::Free {
            return None;
        }
        *attached = Attachment::FrontEnd;
        drop(attached);
        self.tell(WireEvent::VolumeConnected {
            volume: self.settings.name.clone(),
        });
        Some(Attached {
            volume: Arc::clone(self),
        })
    }

    /// Runs `work` while no front end can connect; `None` if one is, or if such work is under way.
    pub fn while_detached<T>(&self, work: impl FnOnce(&Volume) -> T) -> Option<T> {
        let mut attached = self.attachment();
        if *attached != Attachment::Free {
            return None;
        }
        *attached = Attachment::Detached;
        // The work may take long, and others want to know meanwhile.
        drop(attached);
        let _detached = Detached(self);
        Some(work(&self.store))
    }

    /// What `query-volumes` tells.
    #[must_use]
    pub fn info(&self) -> VolumeInfo {
        let status = self.store.status();
        VolumeInfo {
            volume: self.settings.name.clone(),
            id: self.store.id().into(),
            serial: self.settings.serial.clone(),
            base: self.settings.base.display().to_string(),
            shadow_storage: self.settings.shadow_storage.display().to_string(),
            socket: self.settings.socket.display().to_string(),
            size_bytes: self.store.size_bytes(),
            method: self.settings.method,
            read_only: self.settings.read_only,
            connected: *self.attachment() == Attachment::FrontEnd,
            poisoned: status.poisoned,
            snapshots: u32::try_from(status.snapshots).unwrap_or(u32::MAX),
            shadow_used_bytes: status.log_used_bytes,
            shadow_allocated_bytes: status.log_backed_bytes,
            shadow_ahead_bytes: status.log_ahead_bytes,
            plain: status.plain,
        }
    }

    fn attachment(&self) -> MutexGuard<'_, Attachment> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
