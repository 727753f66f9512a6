//! What unit tests of several rooms need: a volume on a temporary file, and some guest memory.

use super::{EngineKind, Notice, VolumeEngine, VolumeSettings};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost_blk_store::{BlockFile, OpenOptions, Volume, VolumeFiles};
use vhost_blk_wire::types::Method;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// A volume of zeroes; its directory goes with the guard.
pub(crate) fn volume(size_bytes: u64) -> (Arc<VolumeEngine>, tempfile::TempDir) {
    volume_over("vda", size_bytes, |base| base, Arc::new(|_| {}))
}

/// A named volume whose base is behind another file, and whose events are heard.
pub(crate) fn volume_over(
    name: &str,
    size_bytes: u64,
    wrap: impl FnOnce(Arc<dyn BlockFile>) -> Arc<dyn BlockFile>,
    notice: Notice,
) -> (Arc<VolumeEngine>, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("disk.raw");
    let file = std::fs::File::create(&base).unwrap();
    file.set_len(size_bytes).unwrap();
    let shadow_storage = directory.path().join("disk.shadow");
    let options = OpenOptions::default();
    let mut files = VolumeFiles::open(&base, &shadow_storage, &options).unwrap();
    files.base = wrap(files.base);
    let (store, _) = Volume::open_files(files, &options).unwrap();
    let settings = VolumeSettings {
        name: name.to_owned(),
        serial: "test".to_owned(),
        base,
        shadow_storage,
        socket: directory.path().join("socket"),
        method: Method::Row,
        read_only: false,
        engine: EngineKind::Auto,
    };
    let volume = VolumeEngine::new(settings, Arc::new(store), notice).unwrap();
    (volume, directory)
}

/// Waits for a condition, half a minute at most.
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < deadline, "no {what} in half a minute");
        std::thread::yield_now();
    }
}

/// Two regions with a hole between them: 64 KiB at 0 and 64 KiB at 1 MiB.
pub(crate) fn memory() -> Arc<GuestMemoryMmap> {
    let regions = [
        (GuestAddress(0), 0x1_0000),
        (GuestAddress(0x10_0000), 0x1_0000),
    ];
    Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap())
}
